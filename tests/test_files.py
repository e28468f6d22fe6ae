"""Checkpoints in files: what is saved comes back, and nothing is lost, mixed up or believed."""

import errno
import json
import math
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter, OrderedDict

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from cases import CASES
from fusedstep import _core, _safetensors
from optional import optional

safetensors, xxhash = optional("safetensors"), optional("xxhash")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def bits(array):
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).tolist()


def params_of(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"w": (130, 3), "b": (7,), "scalar": ()}
    return {name: np.array(rng.standard_normal(s), np.float32) for name, s in shapes.items()}


def grads_of(params, seed):
    rng = np.random.default_rng(seed)
    return [np.array(rng.standard_normal(p.shape), np.float32) for p in params.values()]


def stepped(opt, params, seeds, **options):
    for seed in seeds:
        opt.step(grads_of(params, seed), **options)


# -- what comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_run_resumes_under_another_set_with_the_same_bits(name, tmp_path):
    for hypers in CASES[name]:
        check_resumes(lambda params: getattr(fs, name)(params, **hypers), tmp_path / "a")  # noqa: B023


def check_resumes(make, path):
    fs.set_isa(fs.usable_isas()[-1])
    fs.set_num_threads(2)
    params = fs.FlatBuffer.pack(params_of())
    opt = make(params)
    stepped(opt, params, range(3), ema=0.9)
    fs.save(path, params=params, optimizer=opt)
    stepped(opt, params, range(3, 6), ema=0.9)

    fs.set_isa("scalar")
    fs.set_num_threads(1)
    again = params_of(seed=1)
    resumed = make(again)
    saved = fs.load(path, params=again, optimizer=resumed)
    assert saved.step == resumed.steps == 3
    stepped(resumed, again, range(3, 6), ema=0.9)
    for name in params:
        assert bits(again[name]) == bits(params[name])
        assert bits(resumed.state[name]["ema"]) == bits(opt.state[name]["ema"])


@pytest.mark.parametrize(
    "how",
    [
        {"state_dtype": "q8"},
        {"state_dtype": "bfloat16", "state_rounding": "nearest"},
        {"rounding": "split", "ema_dtype": "bfloat16"},
        {"rounding": "kahan", "state_dtype": {"exp_avg": "q8"}},
        {"rounding": "stochastic", "seed": 7},
    ],
    ids=str,
)
def test_narrow_states_and_roundings_resume_with_the_same_bits(how, tmp_path):
    def made(seed):
        params = {k: v.astype(BFLOAT16) for k, v in params_of(seed).items()}
        return params, fs.AdamW(params, lr=0.01, **how)

    params, opt = made(0)
    stepped(opt, params, range(3), ema=0.9)
    fs.save(tmp_path / "a", params=params, optimizer=opt)
    stepped(opt, params, range(3, 6), ema=0.9)
    again, resumed = made(1)
    fs.load(tmp_path / "a", params=again, optimizer=resumed)
    stepped(resumed, again, range(3, 6), ema=0.9)
    for name in params:
        assert bits(again[name]) == bits(params[name])


def test_schedules_resume_with_their_progress(tmp_path):
    def made():
        params = params_of()
        plateau = fs.schedules.ReduceOnPlateau(0.1, patience=0)
        cosine = fs.schedules.Cosine(0.01, total=20)
        return params, plateau, fs.AdamW(params, lr=plateau, weight_decay=cosine)

    params, plateau, opt = made()
    for seed in range(4):
        stepped(opt, params, [seed])
        plateau.step(1.0)
    fs.save(tmp_path / "a", params=params, optimizer=opt)
    again, plateau_2, resumed = made()
    fs.load(tmp_path / "a", params=again, optimizer=resumed)
    assert plateau_2(4) == plateau(4) < 0.1
    stepped(opt, params, [4])
    stepped(resumed, again, [4])
    assert bits(again["w"]) == bits(params["w"])


ODD = {
    "strided": np.arange(40.0)[::-3],
    "transposed": np.arange(12, dtype=np.int16).reshape(3, 4).T,
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "broadcast": np.broadcast_to(np.float32(3), (2, 5)),
    "complex": np.array([[1 + 2j, 3 - 4j]]).T,
    "complex 0-d": np.array(1 + 2j),
    "bfloat16": np.arange(10).astype(BFLOAT16)[::2],
    "float8": np.arange(4).astype(ml_dtypes.float8_e4m3fn),
    "bool": np.array([True, False]),
    "0-d": np.array(7, np.uint64),
    "empty": np.zeros((3, 0, 2)),
    "one": np.float64(1.5),
}
PLAIN = {
    "numbers": [1, -(2**200), 2.5, float("inf"), True, None, "ü\n"],
    "tuple": (1, (2,), []),
    "mixed": {"a": 1, 2: {"b": ()}},
    "counter": Counter({3: 1}),
    "nested": [[{"x": [1.5]}]],
}


def test_arrays_of_any_layout_come_back(tmp_path):
    fs.save(tmp_path / "a", **{"odd": ODD, "metadata.": 1})
    found = fs.load(tmp_path / "a")["odd"]
    with safetensors.safe_open(tmp_path / "a", "np") as file:
        for name, array in ODD.items():
            assert type(found[name]) is type(array)
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert bits(found[name]) == bits(array)
            if array.dtype.name not in ("complex128", "float8_e4m3fn"):
                theirs = file.get_tensor(f"odd.{name}")
                assert (theirs.shape, bits(theirs)) == (array.shape, bits(array))


def test_numbers_texts_and_metadata_come_back(tmp_path):
    fs.save(tmp_path / "a", **PLAIN, nan=float("nan"), metadata={"run": (1, "x")})
    found = fs.load(tmp_path / "a")
    assert np.isnan(found.pop("nan"))
    assert found == PLAIN
    assert found.metadata == {"run": (1, "x")}
    assert found.step is None
    assert type(found["counter"]) is Counter


def test_large_arrays_in_pieces_come_back(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.integers(0, 255, 3_000_001, np.uint8),
        "b": rng.standard_normal((1100, 1000)),
        "c": rng.standard_normal((1300, 1200)).T,
        "d": rng.integers(0, 255, 9_000_000, np.uint8)[::2],
    }
    fs.save(tmp_path / "a", **arrays)
    found = fs.load(tmp_path / "a")
    assert all((found[name] == array).all() for name, array in arrays.items())


def test_generators_go_on(tmp_path):
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox):
        rng, again = np.random.Generator(kind(0)), np.random.Generator(kind(1))
        rng.standard_normal(3)
        fs.save(tmp_path / "a", rng=rng)
        fs.load(tmp_path / "a", rng=again)
        assert rng.random() == again.random()
    with pytest.raises(TypeError, match="rng must be a generator of Philox, got PCG64"):
        fs.load(tmp_path / "a", rng=np.random.default_rng())


def test_names_are_kept_and_distinct(tmp_path):
    params = params_of()
    opt = fs.Adam(params, groups=[fs.Group("b", lr=0.1)])
    stepped(opt, params, [0])
    fs.save(tmp_path / "a", params=params, optimizer=opt, t={"a.b": np.ones(1), "a": {"b": ODD}})
    with safetensors.safe_open(tmp_path / "a", "np") as file:
        names = set(file.keys())
    assert {"params.w", "optimizer.state.w.exp_avg", "t.a.b", "t.a.b.strided"} <= names
    fs.save(tmp_path / "a", t={"a.b": np.ones(1), "a": {"b": np.zeros(1)}})
    found = fs.load(tmp_path / "a")["t"]
    assert (found["a.b"], found["a"]["b"]) == (1, 0)


def test_loaded_arrays_are_the_files_pages_and_writable(tmp_path):
    fs.save(tmp_path / "a", w=np.ones(1000))
    before = (tmp_path / "a").read_bytes()
    w = fs.load(tmp_path / "a")["w"]
    assert w.flags.writeable
    assert w.ctypes.data % 64 == 0
    opt = fs.SGD(w, lr=1.0)
    opt.step(np.ones(1000))
    assert (w == 0).all()
    assert (tmp_path / "a").read_bytes() == before


def test_dicts_and_lists_are_filled_with_numbers_too(tmp_path):
    fs.save(tmp_path / "a", run={"epoch": 3, "best": [0.5, np.ones(2)]})
    array = np.zeros(2)
    run = {"epoch": 0, "best": [9.0, array]}
    saved = fs.load(tmp_path / "a", run=run)
    assert run == {"epoch": 3, "best": [0.5, array]}
    assert saved["run"] is run
    assert (array == 1).all()


def test_numpy_scalars_and_nan_are_numbers(tmp_path):
    fs.save(tmp_path / "a", run={"best": np.float32(0.5), "pair": (math.nan, np.int16(3))})
    run = {"best": np.float32(9), "pair": (math.nan, np.int16(3))}
    fs.load(tmp_path / "a", run=run)
    assert run["best"] == 0.5
    assert type(run["best"]) is np.float32
    with pytest.raises(ValueError, match=r"run\['pair'\]\[1\] must be an array of int16"):
        fs.load(tmp_path / "a", run={"best": 1.0, "pair": (math.nan, 4)})


def test_dicts_are_not_taken_for_arrays(tmp_path):
    fs.save(tmp_path / "a", w=np.ones(4))
    for target in ({"w": np.ones(4)}, [1, 2, 3, 4], (1, 2, 3, 4)):
        with pytest.raises(TypeError, match="w must be of the file's kind, an array of float64, s"):
            fs.load(tmp_path / "a", w=target)
    fs.save(tmp_path / "a", w=list(range(10**5)))
    with pytest.raises(TypeError, match=r"w must be of the file's kind, \[0, 1") as raised:
        fs.load(tmp_path / "a", w=np.ones(4))
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "state",
    [
        {"param_groups": []},
        {"param_groups": [], "state": [1]},
        {"param_groups": [{"lr": 1}], "state": {}},
        {"param_groups": [], "state": {}, "step": math.nan},
        {"param_groups": [], "state": {0: {"step": math.inf}}},
        {"param_groups": 3},
    ],
    ids=str,
)
def test_states_of_other_forms_are_kept(state, tmp_path):
    class Odd:
        def state_dict(self):
            return state

        def load_state_dict(self, state):
            """Nothing."""

    fs.save(tmp_path / "a", odd=Odd())
    assert repr(fs.load(tmp_path / "a")["odd"]) == repr(state)


def test_header_is_as_documented(tmp_path):
    params = params_of()
    opt = fs.SGD(params, momentum=0.9)
    stepped(opt, params, range(5))
    fs.save(tmp_path / "a", params=params, optimizer=opt)
    data = (tmp_path / "a").read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + n])
    about = json.loads(header["__metadata__"]["fusedstep"])
    assert (about["version"], about["step"]) == (1, 5)
    assert (8 + n) % 4096 == 0
    digest = header["__metadata__"]["fusedstep.digest"]
    blank = data[: 8 + n].replace(digest.encode(), b"0" * 16, 1)
    assert xxhash.xxh64_hexdigest(blank) == digest
    assert xxhash.xxh64_hexdigest(data[8 + n :]) == header["__metadata__"]["fusedstep.pieces"]


def test_digest_is_xxh64():
    data = np.random.default_rng(0).bytes(1000)
    for n in (*range(70), 255, 1000):
        for size in (1, 31, 32, 33, 1000):
            expected = [
                xxhash.xxh64_intdigest(data[i : min(i + size, n)]) for i in range(0, n, size)
            ]
            assert _core.digests(data[:n], size) == expected


WHOLE = r"path must be of a whole file of fusedstep\.save"


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (object(), "x must be an array, something with state_dict and load_state_dict, .*object"),
        ({"a": {1.5: 2}}, r"x\['a'\] must have strings and integers as keys, got 1.5"),
        (np.array(["a"]), "x must be of bool, .*, got str"),
        (np.array([None]), "x must be of bool, .*, got object"),
        (np.zeros(2, ">f4"), "x must be in native byte order"),
        ([np.zeros(2, np.longdouble)], r"x\[0\] must be of bool"),
        (np.ma.array([1.0], mask=[True]), "x must be an array without a mask"),
        ({"a": {1}}, r"x\['a'\] must be an array, .*, got set"),
    ],
)
def test_save_refuses_what_it_cannot_bring_back(value, error, tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError, match=error):
        fs.save(tmp_path / "a", x=value)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_text() == "old"


BAD_NAMES = ["../w", "/etc/w", "a/../../b", "..", "", "C:\\w", "a\\..\\b", "a\0b", "a\nb", "\ud800"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_save_refuses_names_of_paths(name, tmp_path):
    with pytest.raises(ValueError, match=r"must (not be a path's|be printable)"):
        fs.save(tmp_path / "a", **{name: np.ones(1)})
    fs.save(tmp_path / "a", **{"conv/kernel": np.ones(1), "..a": np.ones(1)})  # which are none
    assert fs.load(tmp_path / "a").keys() == {"conv/kernel", "..a"}


def test_save_refuses_other_arguments(tmp_path):
    with pytest.raises(ValueError, match="named must have something to save"):
        fs.save(tmp_path / "a")
    with pytest.raises(TypeError, match="metadata must be a dict, got list"):
        fs.save(tmp_path / "a", w=1, metadata=[])
    with pytest.raises(ValueError, match="path must be a file's"):
        fs.save(tmp_path, w=1)
    with pytest.raises(ValueError, match="named must have text that UTF-8 has"):
        fs.save(tmp_path / "a", w="\ud800")
    deep = value = []
    for _ in range(70):
        value.append([])
        value = value[0]
    with pytest.raises(ValueError, match="must be at most 64 levels deep"):
        fs.save(tmp_path / "a", w=deep)
    with pytest.raises(ValueError, match="named must not be the format's own, got '__metadata__'"):
        fs.save(tmp_path / "a", __metadata__=np.ones(3))
    with pytest.raises(ValueError, match=r"w must be of at most 14000 bits, got 16610"):
        fs.save(tmp_path / "a", w=10**5000)
    with pytest.raises(ValueError, match="path must be a file's"):
        fs.save(f"{tmp_path}{os.sep}a{os.sep}", w=1)
    assert not os.listdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        fs.save(tmp_path / "none" / "a", w=1)


def targets():
    """Objects to fill, and a function that tells whether they are as they were."""
    params, rng = params_of(seed=3), np.random.default_rng(3)
    opt = fs.AdamW(params)
    stepped(opt, params, [0])
    given = {"params": params, "optimizer": opt, "rng": rng, "list": [1, np.zeros(3)]}

    def marks():
        arrays = [*params.values(), *opt.state["w"].values(), given["list"][1]]
        return [bits(a) for a in arrays], opt.steps, rng.bit_generator.state, given["list"][0]

    before = marks()
    return given, lambda: marks() == before


@pytest.fixture
def saved(tmp_path):
    """A file of what `targets` has."""
    params, path = params_of(), tmp_path / "a.safetensors"
    opt = fs.AdamW(params)
    stepped(opt, params, range(2))
    rng = np.random.default_rng(0)
    fs.save(path, params=params, optimizer=opt, rng=rng, list=[2, np.ones(3)], epoch=7)
    return path


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": {"w": np.ones(1)}}, ValueError, "params must have the names in the file"),
        (
            {"list": [1, np.zeros(4)]},
            ValueError,
            r"list\[1\] must have shape \(3,\), .* got \(4,\)",
        ),
        ({"list": [1, np.zeros(3, "f4")]}, TypeError, r"list\[1\] must be float64, as in the file"),
        ({"list": [1]}, ValueError, "list must have the names in the file, got missing"),
        ({"list": (1, np.zeros(3))}, ValueError, r"list\[0\] must be 2, as in the file, got 1"),
        ({"list": np.zeros(3)}, TypeError, "list must be of the file's kind"),
        (
            {"list": [np.zeros(1), np.zeros(3)]},
            TypeError,
            r"list\[0\] must be of the file's kind, 2",
        ),
        ({"epoch": 1}, TypeError, "epoch must be something to fill, got 1"),
        ({"other": np.ones(1)}, ValueError, r"named must be of \['params', .*, got \['other'\]"),
        ({"optimizer": fs.SGD(np.ones(3), momentum=0.9)}, ValueError, "optimizer: state_dict"),
        ({"rng": np.ones(1)}, TypeError, "rng must be of the file's kind"),
    ],
)
def test_load_that_does_not_fit_has_changed_nothing(change, error, message, saved):
    given, unchanged = targets()
    with pytest.raises(error, match=message):
        fs.load(saved, **{**given, **change})
    assert unchanged()


@pytest.mark.parametrize(
    "array",
    [
        np.lib.stride_tricks.as_strided(np.zeros(1), (3,), (0,)),
        np.lib.stride_tricks.as_strided(np.zeros(9), (3,), (4,)),
    ],
    ids=["expanded", "sliding"],
)
def test_arrays_that_overlap_themselves_are_not_filled(array, saved):
    given, unchanged = targets()
    given["list"][1] = array
    with pytest.raises(ValueError, match="memory of its own for each element"):
        fs.load(saved, **given)
    assert not array.any()
    given["list"][1] = np.zeros(3)
    assert unchanged()


def test_what_is_not_given_cannot_end_a_load_half_way(tmp_path, monkeypatch):
    fs.save(tmp_path / "a", w=np.ones(3), other=np.ones(3, BFLOAT16))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    w = np.zeros(3)
    with pytest.raises(ModuleNotFoundError, match="ml_dtypes"):
        fs.load(tmp_path / "a", w=w)
    assert not w.any()


def test_dict_that_refuses_a_value_puts_back_all(saved):
    class Refusing(dict):
        def __setitem__(self, key, value):
            if key == "b" and value != 0:
                raise OSError("no")
            super().__setitem__(key, value)

    fs.save(saved, **fs.load(saved), run={"a": 1, "b": 2})
    given, unchanged = targets()
    run = Refusing(a=0, b=0)
    with pytest.raises(OSError, match="no"):
        fs.load(saved, **given, run=run)
    assert run == {"a": 0, "b": 0}
    assert unchanged()


def test_read_only_arrays_are_not_filled(saved):
    given, unchanged = targets()
    given["list"][1].flags.writeable = False
    with pytest.raises(ValueError, match=r"list\[1\] must be writable"):
        fs.load(saved, **given)
    assert unchanged()


def test_load_whose_last_object_refuses_puts_back_the_first(saved):
    class Refusing:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            raise ValueError("no")

    fs.save(saved, **{**fs.load(saved), "optimizer": fs.AdamW(params_of()), "last": Refusing()})
    given, unchanged = targets()
    with pytest.raises(ValueError, match="last: no"):
        fs.load(saved, **given, last=Refusing())
    assert unchanged()


def test_every_changed_byte_is_noticed(saved):
    data = saved.read_bytes()
    given, unchanged = targets()
    rng = random.Random(0)
    end = data.index(b"    ") + 4  # of the header's text; spaces follow
    places = [*range(80), *rng.sample(range(80, end), 400), *rng.sample(range(end, len(data)), 200)]
    for at in places:
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        saved.write_bytes(changed)
        with pytest.raises(ValueError, match=WHOLE):
            fs.load(saved, **given)
    assert unchanged()


def test_every_truncated_file_is_noticed(saved):
    data = saved.read_bytes()
    given, unchanged = targets()
    lengths = [*range(80), *random.Random(0).sample(range(80, len(data)), 100), len(data) - 1]
    for n in lengths:
        saved.write_bytes(data[:n])
        with pytest.raises(ValueError, match=WHOLE):
            fs.load(saved, **given)
    saved.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match="bytes, where its header speaks of"):
        fs.load(saved, **given)
    assert unchanged()


def digest_of(data):
    """Ours, which is XXH64 as the tests of digests say."""
    return f"{_core.digests(data, len(data))[0]:016x}"


def forged(header, data=b"", claimed=None):
    """A file with any header, and a right digest."""
    mark = _safetensors._MARK + b"0" * 16 + b'",'
    text = mark + header
    n = len(text) if claimed is None else claimed
    blank = struct.pack("<Q", n) + text
    digest = digest_of(blank).encode()
    return blank.replace(b"0" * 16, digest, 1) + data


def tree(**named):
    return head(version=1, named=named)


def head(**parts):
    return json.dumps(json.dumps({"metadata": {"dict": {}}, **parts}))


def entry(name, shape, begin, end, dtype="F32"):
    offsets = f'"data_offsets":[{begin},{end}]'
    return f'{json.dumps(name)}:{{"dtype":"{dtype}","shape":{shape},{offsets}}}'


def header(*entries, pieces=None, about=None, data=b""):
    pieces = digest_of(data) if data and pieces is None else pieces or ""
    about = tree() if about is None else about
    first = f'"fusedstep.pieces":"{pieces}","fusedstep":{about}}}'
    return ",".join([first, *entries]).encode() + b"}"


FOUR = b"\1\2\3\4"
W = {"array": "w"}
PAIR = entry("w", "[2]", 0, 4, "I16")
OTHER = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(80)
HOSTILE = {
    "a length beyond the file": (forged(header(), claimed=2**40), "claims 1099511627776 bytes"),
    "the largest length": (forged(header(), claimed=2**64 - 1), "claims 18446744073709551615"),
    "a shape beyond the file": (
        forged(header(entry("w", "[999999999999]", 0, 4)), FOUR),
        "lies at",
    ),
    "a shape whose product overflows": (
        forged(header(entry("w", [2**40, 2**40], 0, 4)), FOUR),
        "has the shape",
    ),
    "a negative size": (forged(header(entry("w", "[-1]", 0, 4)), FOUR), "has the shape"),
    "a fraction": (forged(header(entry("w", "[1.0]", 0, 4)), FOUR), "has the shape"),
    "a truth": (forged(header(entry("w", "[true]", 0, 4)), FOUR), "has the shape"),
    "many dimensions": (forged(header(entry("w", [1] * 10**5, 0, 4)), FOUR), "has the shape"),
    "a long number": (forged(header(entry("w", "[" + "9" * 10**6 + "]", 0, 4)), FOUR), "digits"),
    "a hole": (forged(header(entry("w", "[1]", 4, 8)), FOUR * 2), "lies at"),
    "an overlap": (
        forged(header(entry("w", "[1]", 0, 4), entry("v", "[1]", 0, 4)), FOUR),
        "lies at",
    ),
    "an unknown dtype": (forged(header(entry("w", "[1]", 0, 4, "F31")), FOUR), "has the dtype"),
    "an entry without a shape": (forged(header('"w":{"dtype":"F32"}'), FOUR), "has not dtype"),
    "an entry that is none": (forged(header('"w":3')), "has not dtype"),
    "twice one name": (
        forged(header(entry("w", "[1]", 0, 4), entry("w", "[1]", 4, 8)), FOUR * 2),
        "name 'w' twice",
    ),
    "twice the metadata": (forged(header('"__metadata__":{}')), "name '__metadata__' twice"),
    "a path": (forged(header(entry("../w", "[1]", 0, 4)), FOUR), "must not be a path's"),
    "an absolute path": (forged(header(entry("/w", "[1]", 0, 4)), FOUR), "must not be a path's"),
    "deep JSON": (forged(header('"w":' + "[" * 10**6)), "nested too deeply"),
    "deep JSON in the tree": (
        forged(header(about=json.dumps('{"version":1,"named":' + '{"a":' * 10**5))),
        "nested too deeply",
    ),
    "a deep tree": (
        forged(header(about=tree(w=json.loads("[" * 200 + "]" * 200)))),
        "more than 64 levels deep",
    ),
    "no JSON": (forged(b'"x":'), "is no JSON"),
    "no text": (forged(b'"x":"\xff"}}'), "is no text"),
    "metadata that is no text": (forged(b'"x":1}}'), "no text"),
    "no version": (forged(header(about='"{}"')), "has no version"),
    "a later version": (forged(header(about='"{\\"version\\":2}"')), "version 2"),
    "no tree": (forged(header(about='"{\\"version\\":1}"')), "its tree has"),
    "a tensor without a place": (
        forged(header(entry("w", "[1]", 0, 4), data=FOUR), FOUR),
        r"no place for \['w'\]",
    ),
    "a place without a tensor": (forged(header(about=tree(w=W))), "'w', which is no tensor"),
    "an unhashable name": (forged(header(about=tree(w={"array": [1]}))), "which is no tensor"),
    "a number of another kind": (forged(header(about=tree(w={"float": "1"}))), "its tree has"),
    "complex of integers": (
        forged(
            header(entry("w", "[2]", 0, 4, "I16"), about=tree(w=W | {"complex": True}), data=FOUR),
            FOUR,
        ),
        "as complex, which is I16",
    ),
    "too few digests": (
        forged(header(entry("w", "[1]", 0, 4), about=tree(w=W), pieces=" "), FOUR),
        "has 0 digests of its data, not 1",
    ),
    "too many digests": (
        forged(header(entry("w", "[1]", 0, 4), about=tree(w=W), pieces="0" * 64), FOUR),
        "has 4 digests of its data, not 1",
    ),
    "a length within the mark": (forged(header(), claimed=20), "claims 20 bytes"),
    "a length to the mark's end": (forged(header(), claimed=53), "claims 53 bytes"),
    "no length": (forged(header(), claimed=0), "claims 0 bytes"),
    "places that are fractions": (
        forged(header(entry("w", "[1]", "0.0", "4.0"), about=tree(w=W), data=FOUR), FOUR),
        "lies at",
    ),
    "a place that is a truth": (
        forged(header(entry("w", "[1]", "false", 4), about=tree(w=W), data=FOUR), FOUR),
        "lies at",
    ),
    "one name twice, after many": (
        forged(header(*(entry(f"w{i}", "[1]", 0, 4) for i in [*range(20_000), 9]))),
        "name 'w9' twice",
    ),
    "a long text in the wrong place": (forged(b'"x":["%s"]}}' % (b"x" * 10**6)), "no text"),
    "no number": (forged(header(about=json.dumps('{"version":NaN}'))), "has NaN, which is no"),
    "a version before the first": (forged(header(about=head(version=-5, named={}))), "no version"),
    "a step that is a text": (
        forged(header(about=head(version=1, named={}, step="x" * 999))),
        "its step is 'xxx",
    ),
    "metadata that is no dict": (
        forged(header(about=head(version=1, named={}, metadata=3))),
        "its metadata is 3",
    ),
    "a key twice": (
        forged(header(about=tree(w={"items": [[1, 2], [1, 3]]}))),
        "its tree has {'items'",
    ),
    "a counter of dicts": (
        forged(header(about=tree(w={"counter": [["a", {"dict": {}}]]}))),
        "its tree has {'counter'",
    ),
    "objects in objects": (
        forged(header(about=tree(w=json.loads('{"module":' * 300 + "1" + "}" * 300)))),
        "more than 64 levels deep",
    ),
    "an empty file": (b"", "it has 0 bytes"),
    "a zip file": (b"PK\x03\x04" + bytes(100), "a zip file, as torch.save"),
    "a pickle": (b"\x80\x04\x95" + bytes(100), "a pickle"),
    "numpy's": (b"\x93NUMPY" + bytes(100), "numpy.save"),
    "another program's safetensors": (
        struct.pack("<Q", 80)
        + b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(80)
        + FOUR,
        "safetensors file of another program",
    ),
    "text": (b"lr: 0.1\n" * 20, "it begins with b'lr: 0.1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_foreign_files_are_refused(name, tmp_path):
    data, message = HOSTILE[name]
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message) as raised:
            fs.load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(path) in str(raised.value)
    assert len(str(raised.value)) < 400
    assert peak < 2**20 + 40 * len(data)  # of what is there, not of what it claims


def test_forged_files_are_read_where_nothing_is_wrong(tmp_path):
    text = header(entry("w", "[1]", 0, 4, "I32"), about=tree(w=W), data=FOUR)
    (tmp_path / "a").write_bytes(forged(text, FOUR))
    assert fs.load(tmp_path / "a")["w"] == 0x04030201


def test_load_of_no_file_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        fs.load(tmp_path / "none")
    with pytest.raises(ValueError, match="path must be a file's"):
        fs.load(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="path must be a file's"):
            fs.load(tmp_path / "pipe")  # which would wait for a writer


# -- whenever it ends ------------------------------------------------------------------------------

# Saves version after version of a few arrays, in a child that is killed.
KILLED = """
import os, random, signal, sys, time
import numpy as np
import fusedstep as fs

path, tries = sys.argv[1], int(sys.argv[2])
fs.set_num_threads(1)

def run(version):
    thin = np.full(90_000, version)[::3]
    return {"a": np.full(100_000, version), "b": [np.full(7, -version), thin]}

begin = time.perf_counter()
for version in range(2):
    fs.save(path, **run(0))
long = time.perf_counter() - begin
rng, seen, left = random.Random(0), set(), 0
for k in range(tries):
    child = os.fork()
    if child == 0:
        version = 1000 * k
        try:
            while True:
                version += 1
                fs.save(path, **run(version))
        finally:
            os._exit(1)
    time.sleep(rng.uniform(0, long))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = fs.load(path)  # whole, or it raises
    version = int(found["a"][0])
    assert (found["a"] == version).all() and (found["b"][0] == -version).all()
    assert (found["b"][1] == version).all() and len(found["b"][1]) == 30_000
    seen.add(version)
    left = max(left, len(os.listdir(os.path.dirname(path))))
assert len(seen) > tries // 5, seen
fs.save(path, **run(1))
print(left, os.listdir(os.path.dirname(path)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked child")
def test_process_killed_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "run.safetensors"
    command = [sys.executable, "-c", KILLED, str(path), "200"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr
    # What killed saves left is removed by the next one.
    assert found.stdout.split(" ", 1)[1].strip() == "['run.safetensors']"
    assert int(found.stdout.split()[0]) <= 2


CALLS = ("open", "write", "fsync", "lseek", "close", "replace", "chmod", "stat", "listdir")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a forked child is cut off in each call")
def test_process_cut_off_in_each_system_call_leaves_a_whole_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    finished = 0
    for after in (False, True):
        for k in range(100):
            fs.save(path, w=np.zeros(3))
            child = os.fork()
            if child == 0:
                try:
                    _cut_off(k, after)
                    fs.save(path, w=np.ones(3))
                    os._exit(0)
                finally:  # whatever happens: no second run of the tests goes on here
                    os._exit(1)
            status = os.waitpid(child, 0)[1]
            found = fs.load(path)["w"]
            assert (found == 0).all() or (found == 1).all()
            if os.WIFEXITED(status):  # no k-th call
                assert os.WEXITSTATUS(status) == 0
                assert (found == 1).all()
                finished += 1
                break
    assert finished == 2


def _cut_off(k, after):
    """Kills this process in the k-th call of the operating system, before or after it works."""
    count = [0]

    def counted(call):
        def wrapper(*args, **kwargs):
            count[0] += 1
            last = count[0] > k
            if last and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **kwargs)
            if last:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EIO),
        ("fsync", errno.EIO),
        ("replace", errno.EACCES),
    ],
)
@pytest.mark.parametrize("nth", [0, 1])
def test_failing_system_call_leaves_the_old_file(name, number, nth, tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    fs.save(path, w=np.zeros(3))
    real, count = getattr(os, name), [0]

    def failing(*args, **kwargs):
        count[0] += 1
        if count[0] > nth:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)
    only_folder = name == "fsync" and nth == 1  # which comes after the renaming
    if name == "replace" and nth == 1:
        fs.save(path, w=np.zeros(3))
    else:
        with pytest.raises(OSError, match=os.strerror(number)) as raised:
            fs.save(path, w=np.ones(3))
        assert raised.value.errno == number
        assert str(path) in str(raised.value) or only_folder
    monkeypatch.undo()
    assert (fs.load(path)["w"] == only_folder).all()
    assert os.listdir(tmp_path) == ["run.safetensors"]


FULL = """
import os, resource, sys
import numpy as np
import fusedstep as fs

resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))  # as a full disk, in the middle
try:
    fs.save(sys.argv[1], w=np.ones(2**20))
except OSError as error:
    print(type(error).__name__, error.filename == sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")
def test_file_that_cannot_be_whole_leaves_the_old_one(tmp_path):
    path = tmp_path / "run.safetensors"
    fs.save(path, w=np.zeros(3))
    found = subprocess.run([sys.executable, "-c", FULL, path], capture_output=True, text=True)
    assert found.stdout == "OSError True\n", found.stderr
    assert (fs.load(path)["w"] == 0).all()
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_save_interrupted_by_an_exception_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.safetensors"
    fs.save(path, w=np.zeros(3))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fs.save(path, w=np.ones(3))
    monkeypatch.undo()
    assert (fs.load(path)["w"] == 0).all()
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_interrupted_load_has_filled_all_arrays(saved, monkeypatch):
    from fusedstep import _arrays

    given, _ = targets()
    real, count = _arrays.writer, [0]

    def writer(*args):
        put = real(*args)

        def interrupting(values):
            count[0] += 1
            put(values)
            if count[0] in (1, 3):
                raise KeyboardInterrupt

        return interrupting

    monkeypatch.setattr(_arrays, "writer", writer)
    with pytest.raises(KeyboardInterrupt):
        fs.load(saved, **given)
    expected = fs.load(saved)
    assert all(bits(given["params"][k]) == bits(expected["params"][k]) for k in given["params"])
    assert given["list"][0] == 2
    assert (given["list"][1] == 1).all()
    assert given["optimizer"].steps == 2


def test_load_interrupted_at_any_line_has_filled_all_or_nothing(saved):
    """As the handler of a signal may raise between any two lines of Python."""
    expected, seen = fs.load(saved), set()

    def lines(frame, event, _):
        if event == "line":
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
        return lines

    def calls(frame, event, _):
        return lines if frame.f_code.co_filename == fs.files.__file__ else None

    for k in range(1, 2000):
        given, unchanged = targets()
        left, before = [k], sys.gettrace()
        sys.settrace(calls)
        try:
            fs.load(saved, **given)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        if not unchanged():
            parts = given["params"], expected["params"]
            assert all(bits(parts[0][name]) == bits(parts[1][name]) for name in parts[0]), k
            assert given["optimizer"].steps == 2, k
            assert given["list"][0] == 2, k
            assert (given["list"][1] == 1).all(), k
        seen.add(unchanged())
        if left[0] > 0:  # it came to its end
            assert seen == {True, False}
            return
    raise AssertionError("load takes more lines than expected")


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes there")
def test_file_keeps_its_mode_and_links_stay(tmp_path):
    before = os.umask(0o027)
    try:
        fs.save(tmp_path / "new", w=1)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o640
    os.chmod(tmp_path / "new", 0o604)
    os.symlink("new", tmp_path / "link")
    fs.save(tmp_path / "link", w=2)
    assert os.readlink(tmp_path / "link") == "new"
    assert stat.S_IMODE(os.stat(tmp_path / "new").st_mode) == 0o604
    assert fs.load(tmp_path / "new")["w"] == 2
    assert sorted(os.listdir(tmp_path)) == ["link", "new"]


def test_relative_paths_and_long_names_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "x" * 255
    for path in ("a", name, name.encode(), os.path.join(".", "b")):
        fs.save(path, w=1)
        assert fs.load(path)["w"] == 1


def test_two_processes_may_save_to_one_path(tmp_path):
    path = tmp_path / "run.safetensors"
    script = (
        "import sys, numpy as np, fusedstep as fs\n"
        "for k in range(60): fs.save(sys.argv[1], w=np.full(100_000, int(sys.argv[2])))"
    )
    both = [subprocess.Popen([sys.executable, "-c", script, path, str(i)]) for i in (1, 2)]
    while any(process.poll() is None for process in both):
        if path.exists():
            w = fs.load(path)["w"]
            assert len(set(w.tolist())) == 1
    assert [process.returncode for process in both] == [0, 0]
    assert os.listdir(tmp_path) == ["run.safetensors"]


@pytest.mark.skipif(sys.platform == "win32", reason="there files are not locked")
def test_new_file_that_is_taken_for_one_left_behind_is_made_again(tmp_path, monkeypatch):
    """Another save finds it between its open and its lock, locks it itself, and removes it."""
    import fcntl

    lock, flush, taken = fcntl.flock, os.fsync, []

    def locked_by_another(descriptor, operation):
        if not taken:
            taken.extend(os.listdir(tmp_path))
            raise BlockingIOError
        lock(descriptor, operation)

    def removed_by_another(descriptor):
        if len(taken) == 1:
            os.unlink(tmp_path / taken[0])
            taken.append("removed")
        flush(descriptor)

    monkeypatch.setattr(fcntl, "flock", locked_by_another)
    monkeypatch.setattr(os, "fsync", removed_by_another)
    fs.save(tmp_path / "run.safetensors", w=1)
    assert os.listdir(tmp_path) == ["run.safetensors"]


def test_arrays_that_change_meanwhile_leave_a_file_that_loads(tmp_path, monkeypatch):
    w = np.zeros(1 << 20)
    real, begun = os.write, []

    def write(descriptor, data):
        w[...] += 1  # as another thread may, between a piece's digest and its way to the disk
        begun.append(len(data))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    fs.save(tmp_path / "a", w=w, short=np.zeros(3))
    assert len(begun) > 3
    assert set(fs.load(tmp_path / "a")["w"].tolist()) <= set(range(len(begun)))


@pytest.mark.parametrize("within", [lambda opt: opt, lambda opt: {"a": [1, (opt,)]}])
def test_nobody_steps_while_a_file_is_written(within, tmp_path, monkeypatch):
    params = params_of()
    opt = fs.AdamW(params)
    real, begun, go_on = os.fsync, threading.Event(), threading.Event()

    def waiting(descriptor):
        begun.set()
        go_on.wait(30)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", waiting)
    thread = threading.Thread(target=fs.save, args=(tmp_path / "a",), kwargs={"run": within(opt)})
    thread.start()
    assert begun.wait(30)
    with pytest.raises(RuntimeError, match="thread"):
        opt.step(grads_of(params, 0))
    go_on.set()
    thread.join()
    opt.step(grads_of(params, 0))


def test_ordered_dicts_and_subclasses(tmp_path):
    fs.save(tmp_path / "a", w=OrderedDict(b=1, a=2))
    assert list(fs.load(tmp_path / "a")["w"]) == ["b", "a"]
    pair = type("Pair", (tuple,), {})((1, 2))
    with pytest.raises(TypeError, match=r"w must be an array, .* got Pair"):
        fs.save(tmp_path / "a", w=pair)
