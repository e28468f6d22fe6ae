"""The GPU module on the host: its kernels' bits, its tables and launches, and both layers over it.

Everything but the GPU is real here (tests/native/cuda_on_host); tests/test_gpu.py runs on one.
"""

import contextlib
import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import cuda_on_host
import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES, each_case_in_turn, each_pair, make
from fusedstep import _arrays, _core, _gpu
from fusedstep._arrays import as_dtype, is_array
from fusedstep.torch import optimizers as torch_layer

# Below, at and above a vector (4), a tile (1024) and what three blocks sweep at a time.
LENGTHS = [0, 1, 3, 4, 5, 1023, 1024, 1025, 2049, 30_001]
TILE = 32 * 512  # elements of a tile of the norm
STEPS = 3


@pytest.fixture(scope="session")
def module(tmp_path_factory):
    return cuda_on_host.build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture
def controls(module):
    return module.controls


@pytest.fixture
def gpu(module, controls):
    """A context in which the memory of tensors and arrays is a GPU's."""
    stream = 0

    @contextlib.contextmanager
    def inside(on=True, to=stream):
        with pytest.MonkeyPatch.context() as patch:
            if on:
                patch.setattr(_gpu, "module", lambda: module)
                patch.setattr(_arrays, "index_of", lambda a, *_: 0 if is_array(a) else None)
                patch.setattr(_arrays, "stream_of", lambda array, index: to)
                patch.setattr(torch_layer, "gpu_of", lambda device: module.device())
                patch.setattr(torch_layer, "stream_of", lambda device: to)
                patch.setattr(torch_layer, "recording", lambda device: controls.recording(to) == 1)
            yield

    return inside


def drawn(rng, n, dtype):
    """Numbers of either sign, no zeros, which make NaN of eps=0."""
    return (rng.choice([-1.0, 1.0], n) * rng.uniform(0.1, 2, n)).astype(as_dtype(dtype))


def unaligned(array):
    """A copy that begins some elements behind an aligned address; vectors may begin after 4."""
    memory = np.zeros(array.size + 4 + 64 // array.itemsize, array.dtype)
    begin = -memory.ctypes.data % 64 // array.itemsize + (1, 2, 4)[array.size % 3]
    view = memory[begin : begin + array.size]
    view[...] = array
    return view


def bits(arrays):
    return b"".join(np.ascontiguousarray(np.asarray(a)).tobytes() for a in arrays)


def result(opt, params):
    """All that a step may have written: parameters, states, clocks."""
    states = [a for entry in opt.state.values() for a in entry.values()]
    return bits(params), bits(states), opt._table.clocks()


def run_neutral(name, hypers, param, grad, place=lambda a: a, asked=None):
    rng = np.random.default_rng(5)
    params = [place(drawn(rng, n, param)) for n in LENGTHS]
    opt = make(name, params, dict(hypers))
    for _ in range(STEPS):
        opt.step([place(drawn(rng, n, grad)) for n in LENGTHS], **(asked or {}))
    return result(opt, params)


def test_kernels_are_as_many_as_sets_of_states_in_float_and_in_double(module):
    """Formats are read at run time: a further one would add none. On a GPU there are three more."""
    names = Path(module.__file__).read_bytes()
    for kind in (b"5sweep", b"6staged"):
        sweeps = set(re.findall(kind + rb"INS0_\d+(\w+?ELj\d+)ENS0_3F(32|64)E", names))
        assert len(sweeps) == 46
        assert len([name for name, width in sweeps if width == b"32"]) == 23
    assert sorted(p.name for p in cuda_on_host.CUDA.glob("*.cu")) == [
        *("backend.cu", "norm.cu", "staged.cu", "sweep.cu"),  # an object each
    ]


# -- bits ------------------------------------------------------------------------------------------


@each_case_in_turn()
def test_gpu_has_the_cpu_bits(gpu, name, hypers, param, grad):
    here = run_neutral(name, hypers, param, grad)
    with gpu():
        assert run_neutral(name, hypers, param, grad) == here


@each_pair()
@pytest.mark.parametrize("name", CASES)
def test_gpu_has_the_cpu_bits_unaligned_clipped_and_scaled(gpu, name, param, grad):
    asked = {"max_norm": 1.0, "loss_scale": 3.0, "skip_nonfinite": True}
    here = run_neutral(name, {}, param, grad, unaligned, asked)
    with gpu():
        assert run_neutral(name, {}, param, grad, unaligned, asked) == here


# How parameters and states are stored, each with a gradient's format.
KEPT = {
    "bfloat16 states": ("float32", "float32", {"state_dtype": "bfloat16"}),
    "q8 states": ("float32", "bfloat16", {"state_dtype": "q8", "ema_dtype": "bfloat16"}),
    "nearest": ("float32", "float16", {"state_dtype": "q8", "state_rounding": "nearest"}),
    "split": ("bfloat16", "bfloat16", {"rounding": "split", "state_dtype": "q8"}),
    "kahan": (
        *("bfloat16", "float64"),
        {"rounding": "kahan", "state_dtype": "bfloat16", "state_rounding": "nearest"},
    ),
    "stochastic": ("bfloat16", "float32", {"rounding": "stochastic", "ema_dtype": "float64"}),
    "below float64": ("float64", "float64", {"state_dtype": "float32", "ema_dtype": "bfloat16"}),
    "q8 below float64": ("float64", "float16", {"state_dtype": "q8", "ema_dtype": "float32"}),
}
EXACT = {"ASGD", "Rprop"}  # rules that refuse narrow states


def run_kept(name, kept, place, asked, skips=()):
    """Everything that steps write with all that may follow an update, or with none of it.

    The last parameter never has a gradient, the first copy is missing. Gradients of the steps in
    `skips` have a NaN.
    """
    param, grad, how = KEPT[kept]
    rng = np.random.default_rng(5)
    params = [place(drawn(rng, n, param)) for n in LENGTHS]
    opt = make(name, params, {**CASES[name][-2], **how, "seed": 3})
    copies = [None, *(place(np.zeros(n, np.float16)) for n in LENGTHS[1:])] if asked else []
    zeros = []
    for step in range(STEPS + len(skips)):
        grads = [*(place(drawn(rng, n, grad)) for n in LENGTHS[:-1]), None]
        if step in skips:
            grads[4][1] = np.nan
        zeros += grads[:-1]
        more = {"ema": 0.9, "shadow": copies, "zero_grad": True, "clip_value": 0.3}
        opt.step(grads, **({**more, **asked} if asked else {}))
    states = [np.asarray(a) for entry in opt.state.values() for a in entry.values()]
    return bits(params), bits(states), bits(copies[1:]), bits(zeros), opt._table.clocks()


@pytest.mark.parametrize("kept", KEPT)
@pytest.mark.parametrize("name", [name for name in CASES if name not in EXACT])
def test_streams_of_other_formats_have_the_cpu_bits(gpu, name, kept):
    place = (np.copy, unaligned)[len(name) % 2]
    asked = ({}, {"max_norm": 0.5})[len(kept) % 2]
    here = run_kept(name, kept, place, asked)
    with gpu():
        assert run_kept(name, kept, place, asked) == here


@pytest.mark.parametrize("kept", ["split", "below float64"])
def test_average_begins_with_the_first_step_that_is_not_skipped(gpu, kept):
    """Which only the device knows; a step that it does not count follows."""
    asked = {"skip_nonfinite": True}
    here = run_kept("NAdam", kept, np.copy, asked, skips=(0, 1, 3))
    with gpu():
        assert run_kept("NAdam", kept, np.copy, asked, skips=(0, 1, 3)) == here

    # The host's next step is the first that averages.
    def run():
        w, g = np.ones(2000, np.float32), np.full(2000, 0.5, np.float32)
        opt = fs.AdamW(w)
        opt.step(g)
        opt.step(g * np.nan, ema=0.5, skip_nonfinite=True)
        opt.step(g, ema=0.5)
        opt.step(g, ema=0.5, skip_nonfinite=True)
        return bits([w, opt.state[0]["ema"]])

    here = run()
    with gpu():
        assert run() == here


@each_pair()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_gpu_has_the_cpu_values_where_they_are_special(gpu, name, param, grad):
    values = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-42, -1e-42, 6e-8, 65504.0, 3e38, 1.0]

    def run():
        params = np.repeat(values, len(values)).astype(as_dtype(param))
        grads = np.tile(values, len(values)).astype(as_dtype(grad))
        opt = make(name, params, {})
        for _ in range(STEPS):
            opt.step(grads)
        arrays = [params, *opt.state[0].values()]
        return [np.asarray(a).astype(np.float64) for a in arrays]

    here = run()
    with gpu():
        there = run()
    for a, b in zip(here, there, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(np.signbit(a[a == 0]), np.signbit(b[b == 0]))


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_gpu_results_do_not_depend_on_the_order_of_blocks_and_threads(gpu, monkeypatch, seed):
    asked = {"max_norm": 0.5, "skip_nonfinite": True}
    here = run_neutral("NAdam", {}, "float32", "float32", asked=asked)
    monkeypatch.setenv("CUDA_ON_HOST_SEED", seed)
    with gpu():
        assert run_neutral("NAdam", {}, "float32", "float32", asked=asked) == here


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "lengths",
    [
        *([1], [511], [512], [513], [TILE], [TILE + 1], [0]),
        *([3 * TILE + 5], [32 * TILE], [32 * TILE + 1]),  # a tree of one node, of three
        [700, 0, TILE, 1, TILE + 1, 40_000, 513, 2000],  # side by side in a tile, and with gaps
        *([5] * 300, [600, 5] * 520, [TILE + 1, 9] * 20),  # trees of tensors
    ],
    ids=lambda lengths: f"{len(lengths)}x{max(lengths)}",
)
@pytest.mark.parametrize("place", [lambda a: a, unaligned])
def test_norm_has_the_cpu_bits(gpu, dtype, lengths, place):
    rng = np.random.default_rng(3)
    grads = [place(drawn(rng, n, dtype)) for n in lengths]

    def run():
        opt = fs.SGD([np.zeros(n, np.float32) for n in lengths])
        opt.step([grads[0], *[None for _ in grads[1:]]], norms=True)  # a tree of its own
        opt.step(grads, norms=True)
        return opt.grad_norm, opt.grad_norms, opt.nonfinite

    here = run()
    read = [g.astype(np.float32) if dtype == "float64" else g for g in grads]
    assert here[0] == np.sqrt(_core.sum_of_squares(read)[0])
    with gpu():
        assert run() == here


def test_norms_of_tensors_are_those_of_the_step_that_measured(gpu, controls):
    def run():
        params = {
            name: np.ones(n, np.float32) for name, n in zip("abcd", (9, 40_000, 0, 3), strict=True)
        }
        opt = fs.SGD(params)
        grads = {name: np.full(p.shape, 2.0, np.float32) for name, p in params.items()}
        grads["b"][39_999] = np.inf
        opt.step({**grads, "a": None}, norms=True, loss_scale=4.0)
        found = [(opt.grad_norms, opt.nonfinite)]
        opt.step({**grads, "b": None}, norms=True)
        found.append((opt.grad_norms, opt.nonfinite))
        with pytest.raises(ValueError, match="shape"):
            opt.step({**grads, "d": grads["a"]}, norms=True)
        return [*found, (opt.grad_norms, opt.nonfinite)]

    here = run()
    with gpu():
        assert run() == here
    assert here[0][1] == ["b"]
    assert here[2] == here[1] == ({"a": 6.0, "c": 0.0, "d": 2 * np.sqrt(3)}, [])


def test_norm_of_more_tiles_than_one_pass_of_the_tree_takes(gpu):
    n = 2100 * 16384 + 77  # more than 2048 tiles of 32 blocks of 512 elements
    grads = np.arange(n, dtype=np.int32).view(np.uint32)
    grads = ((grads * np.uint32(2654435761)) >> 20).astype(np.float16)
    total, _ = _core.sum_of_squares([grads])
    with gpu():
        opt = fs.SGD(np.zeros_like(grads))
        opt.step(grads, max_norm=1.0)
        assert opt.grad_norm == np.sqrt(total)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("at", [(0, 0), (0, 2047), (1, 6000), (1, 20_000), (2, 2)])
def test_one_gradient_that_is_not_finite_skips_the_step(gpu, dtype, bad, at):
    rng = np.random.default_rng(1)
    lengths = [2048, 20_001, 3]
    with gpu():
        params = [drawn(rng, n, dtype) for n in lengths]
        opt = fs.AdamW(params, lr=0.1)
        grads = [drawn(rng, n, dtype) for n in lengths]
        opt.step(grads, skip_nonfinite=True)
        before = result(opt, params)
        wrong = [g.copy() for g in grads]
        wrong[at[0]][at[1]] = bad
        opt.step(wrong, skip_nonfinite=True)
        assert result(opt, params) == before
        opt.step(grads, skip_nonfinite=True)
        assert [clock[0] for clock in opt._table.clocks()] == [2, 2, 2]
        assert result(opt, params)[0] != before[0]


def test_float64_gradient_whose_square_overflows_is_finite(gpu):
    with gpu():
        params = np.ones(600)
        opt = fs.SGD(params, lr=2.0**-600)
        opt.step(np.full(600, 2.0**600), skip_nonfinite=True)
        assert opt.grad_norm == np.inf
        np.testing.assert_array_equal(params, 0)


def test_torch_has_the_cpu_s_norms_of_tensors(gpu):
    def bad(opt, params, k):
        params[1].grad[7] = torch.nan
        params[2].grad = None

    def run():
        opt, _ = torch_run("AdamW", before=bad, norms=True)
        return opt.grad_norms, opt.nonfinite

    here = repr(run())  # NaN is NaN
    assert "nan" in here
    with gpu():
        assert repr(run()) == here


# -- launches and tables ---------------------------------------------------------------------------


def counted(controls, call):
    before = controls.launches(), controls.copies()
    call()
    return controls.launches() - before[0], controls.copies() - before[1]


@pytest.mark.parametrize("tensors", [1, 2, 100])
def test_launches_do_not_grow_with_the_tensors(gpu, controls, tensors):
    with gpu():
        params = [np.ones(100, np.float32) for _ in range(tensors)]
        grads = [np.ones(100, np.float32) for _ in range(tensors)]
        opt = fs.AdamW(params)
        opt.step(grads)
        opt.step(grads, max_norm=1.0)
        assert counted(controls, lambda: opt.step(grads, max_norm=1.0)) == (2, 0)
        opt.step(grads)
        assert counted(controls, lambda: opt.step(grads)) == (1, 0)
        opt.step(grads, skip_nonfinite=True)
        assert counted(controls, lambda: opt.step(grads, skip_nonfinite=True)) == (2, 0)


def test_table_is_sent_again_only_when_it_changed(gpu, controls):
    with gpu():
        params = [np.ones(100, np.float32) for _ in range(9)]
        grads = [np.ones(100, np.float32) for _ in range(9)]
        opt = fs.AdamW(params)
        opt.step(grads)
        assert counted(controls, lambda: opt.step(grads))[1] == 0
        moved = [grads[0].copy(), *grads[1:]]
        assert counted(controls, lambda: opt.step(moved))[1] == 1
        assert counted(controls, lambda: opt.step(moved))[1] == 0
        assert counted(controls, lambda: opt.step([None, *moved[1:]]))[1] == 1


def test_more_groups_than_travel_with_the_launch(gpu):
    def run():
        params = {str(i): np.ones(50, np.float32) for i in range(20)}
        groups = [fs.Group(str(i), lr=0.1 * i) for i in range(1, 20)]
        opt = fs.Adam(params, groups=groups)
        for k in range(STEPS):
            opt.step({name: np.full(50, k + 1, np.float32) for name in params})
        return result(opt, params.values())

    here = run()
    with gpu():
        assert run() == here


def test_rows_are_one_for_each_group_and_count_however_they_alternate(gpu, controls):
    """So few rows travel with the launch; more would be sent, in every step as counts change."""
    with gpu():
        params = {f"{'wb'[i % 2]}{i}": np.ones(3, np.float32) for i in range(60)}
        grads = {name: np.ones(3, np.float32) for name in params}
        half = {name: grads[name] if i % 3 else None for i, name in enumerate(params)}
        opt = fs.NAdam(params, groups=[fs.Group("b*", weight_decay=0.1)])
        opt.step(grads)
        assert counted(controls, lambda: opt.step(grads)) == (1, 0)
        opt.step(half)
        opt.step(grads)
        assert counted(controls, lambda: opt.step(grads)) == (1, 0)
        assert {clock[0] for clock in opt._table.clocks()} == {4, 5}


@pytest.mark.parametrize(("run_of", "many"), [(1, 2), (1, 7), (256, 2)])
def test_more_tensors_than_threads_count_for_themselves(gpu, run_of, many):
    """A GPU's thread counts every 128th tensor; its own one may be of another group or count."""

    def run():
        names = [f"{'abcdefg'[i // run_of % many]}{i}" for i in range(900)]
        params = {name: np.ones(3, np.float32) for name in names}
        groups = [fs.Group(f"{c}*", lr=0.1 * k) for k, c in enumerate("bcdefg"[: many - 1], 2)]
        opt = fs.NAdam(params, lr=0.1, groups=groups)
        for k in range(4):
            grads = {
                name: None if k == 1 and i % 5 > 1 else np.full(3, 0.5 + k, np.float32)
                for i, name in enumerate(params)
            }
            opt.step(grads, skip_nonfinite=True)
        return result(opt, params.values())

    here = run()
    with gpu():
        assert run() == here


def test_types_and_variants_that_need_kernels_of_their_own(gpu, controls):
    def run():
        dtypes = ["float32", "float64", "float16", "bfloat16", "float32"]
        rng = np.random.default_rng(2)
        params = {f"{d}{i}": drawn(rng, 3000, d) for i, d in enumerate(dtypes)}
        opt = fs.Adam(params, groups=[fs.Group("*4", amsgrad=True)])
        for _ in range(STEPS):
            opt.step({k: drawn(rng, 3000, k[:-1]) for k in params}, max_norm=1.0)
        return result(opt, params.values())

    here = run()
    with gpu():
        before = controls.launches()
        assert run() == here
        # The norm; in float, without and with amsgrad's state; and in double.
        assert controls.launches() - before == STEPS * (1 + 3)


def test_staging_memory_is_not_written_while_it_is_being_sent(gpu, controls, monkeypatch):
    rng = np.random.default_rng(4)
    grads = [[drawn(rng, n, "float32") for n in (5, 3000, 9)] for _ in range(20)]

    def run():
        params = [np.ones(n, np.float32) for n in (5, 3000, 9)]
        opt = fs.AdamW(params)
        for g in grads:
            opt.step(g, max_norm=1.0)
        return opt, params

    here = result(*run())
    monkeypatch.setenv("CUDA_ON_HOST_LAZY", "1")
    with gpu():
        opt, params = run()
        assert controls.finish() == 0
        assert result(opt, params) == here


def test_memory_goes_with_the_optimizer(gpu, controls):
    with gpu():
        before = controls.live_allocations()
        opt = fs.AdamW([np.ones(100, np.float32), np.ones(3, np.float32)])
        opt.step([np.ones(100, np.float32), np.ones(3, np.float32)], skip_nonfinite=True)
        assert controls.live_allocations() > before
        del opt
        assert controls.live_allocations() == before


# -- the neutral layer -----------------------------------------------------------------------------


class Exporter:
    """An array that shows its memory by __cuda_array_interface__ alone."""

    def __init__(self, array, **changes):
        self.array, self.changes = array, changes

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self.array.shape,
            "typestr": self.array.dtype.str,
            "data": (self.array.ctypes.data, not self.array.flags.writeable),
            "strides": None if self.array.flags.c_contiguous else self.array.strides,
            "stream": None,
            "version": 3,
            **self.changes,
        }


def test_cuda_array_interface_is_read(gpu):
    def run(wrap):
        params = {"w": np.ones((30, 7), np.float32), "b": np.ones(4, np.float64)}
        opt = fs.NAdam({k: wrap(p) for k, p in params.items()}, lr=0.1)
        for k in range(STEPS):
            opt.step({n: wrap(np.full(p.shape, k - 0.5, p.dtype)) for n, p in params.items()})
        return result(opt, params.values())

    here = run(lambda a: a)
    with gpu():
        assert run(Exporter) == here
        assert run(lambda a: Exporter(a, stream=1)) == here  # CUDA's default, on which we step


def test_cuda_array_interface_s_stream_is_waited_for(gpu, controls, stream):
    with gpu():
        opt = fs.SGD(np.ones(3, np.float32))
        opt.step(Exporter(np.ones(3, np.float32), stream=stream))
        assert controls.begin_capture(stream) == 0  # of which no other stream can wait
        with pytest.raises(RuntimeError, match=r"could not (order|record)"):
            opt.step(Exporter(np.ones(3, np.float32), stream=stream))
        controls.end_capture(stream)


@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda: Exporter(np.ones(3, np.int32)), TypeError, r"params\[0\] must be float32, .*<i4"),
        (lambda: Exporter(np.ones((4, 4), "f4")[:, ::2]), ValueError, "must be C-contiguous"),
        (lambda: Exporter(np.ones(3, "f4"), data=None), TypeError, "must have a valid"),
        (lambda: Exporter(np.ones(3, "f4"), strides="x"), TypeError, "must have a valid"),
        (lambda: Exporter(np.ones(3, "f4"), strides=()), TypeError, "must have a valid"),
        (lambda: Exporter(np.ones(3, "f4"), stream="x"), TypeError, "must have a valid"),
        (lambda: Exporter(np.ones(3, "f4"), shape=None), TypeError, "must have a valid"),
        (lambda: Exporter(np.ones(3, "f4"), data=(2, False)), ValueError, "must be aligned"),
        (lambda: Exporter(np.ones(3, "f4"), data=(0, False)), ValueError, "must have memory for"),
        (lambda: Exporter(np.ones(3, "f4"), mask=np.ones(3, bool)), TypeError, "a plain array"),
        (lambda: Exporter(np.broadcast_to(np.float32(1), (1,))), ValueError, "must be writable"),
    ],
)
def test_cuda_array_interface_is_checked(gpu, made, error, message):
    with gpu(), pytest.raises(error, match=message):
        fs.SGD([made()])


def test_cuda_array_interface_is_not_cpu_memory():
    class OnGpu(Exporter):
        __dlpack_device__ = staticmethod(lambda: (1, 0))

    with pytest.raises(ValueError, match=r"params\[1\] must be in CPU memory, got a GPU's memory"):
        fs.SGD([np.ones(3, np.float32), OnGpu(np.ones(3, np.float32))])


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "ASGD"])
def test_neutral_state_goes_from_gpu_to_cpu_and_back(gpu, name):
    def grads(k):
        return {"w": np.full((5, 3), k - 1.5, np.float32), "b": np.full(700, 0.5 + k, np.float32)}

    def make_one():
        params = {"w": np.ones((5, 3), np.float32), "b": np.ones(700, np.float32)}
        return make(name, params, {"momentum": 0.9} if name == "SGD" else {}), params

    here, there = make_one(), make_one()
    for k in range(3):
        here[0].step(grads(k), skip_nonfinite=True)
    with gpu():
        opt, params = there[0].__class__, there[1]
        opt, params = make_one()
        for k in range(3):
            opt.step(grads(k), skip_nonfinite=True)
        assert isinstance(opt.state["w"][next(iter(opt.state["w"]))], _arrays.Array)
        saved = opt.state_dict()
        again = pickle.loads(pickle.dumps(opt))
        copied = copy.deepcopy(opt)
    # On the CPU from the GPU's checkpoint.
    resumed, values = make_one()
    for key, array in params.items():
        values[key][...] = array
    resumed.load_state_dict(saved)
    for k in range(3, 5):
        here[0].step(grads(k))
        resumed.step(grads(k))
    assert result(resumed, values.values())[:2] == result(here[0], here[1].values())[:2]
    with gpu():
        for one in (again, copied):
            for k in range(3, 5):
                one.step(grads(k))
            assert result(one, one.params.values())[:2] == result(here[0], here[1].values())[:2]
        back, values = make_one()
        back.load_state_dict(here[0].state_dict())
        assert result(back, [])[1] == result(here[0], [])[1]


def test_gpu_array_is_seen_and_copied(gpu):
    with gpu():
        opt = fs.Adagrad(np.ones((2, 3), np.float32), initial_accumulator_value=0.5)
        array = opt.state[0]["sum"]
        assert (array.shape, array.dtype, array.device) == ((2, 3), np.float32, "cuda:0")
        assert (array.size, array.nbytes) == (6, 24)
        np.testing.assert_array_equal(np.asarray(array), np.full((2, 3), 0.5, np.float32))
        array[...] = np.arange(6, dtype=np.float32).reshape(2, 3)
        np.testing.assert_array_equal(array.copy(), np.arange(6).reshape(2, 3))
        shown = array.__cuda_array_interface__
        assert (shown["shape"], shown["typestr"], shown["strides"]) == ((2, 3), "<f4", None)
        assert "cuda:0" in repr(array)
        with pytest.raises(TypeError, match=r"key must be \.\.\., got 0"):
            array[0] = 1
        with pytest.raises(ValueError, match="copy must not be False"):
            np.array(array, copy=False) if np.__version__ >= "2" else array.__array__(copy=False)


# -- the torch layer -------------------------------------------------------------------------------


def torch_run(name, steps=STEPS, hypers=None, before=None, **asked):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(n)) for n in (5, 2048, 1, 0, 7001)]
    opt = getattr(ft, name)(params, **(hypers or {"lr": 0.1}))
    for k in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape)
        if before:
            before(opt, params, k)
        opt.step(**asked)
    return opt, params


def torch_bits(opt, params):
    entries = [opt.state[p] for p in params]
    values = [v for e in entries for v in e.values()]
    return [bits([v.detach().numpy() for v in some]) for some in (params, values)]


@pytest.mark.parametrize(
    "asked", [{}, {"max_norm": 0.5}, {"max_norm": 0.5, "skip_nonfinite": True}]
)
@pytest.mark.parametrize("name", CASES)
def test_torch_on_gpu_has_the_cpu_bits(gpu, name, asked):
    here = torch_run(name, **asked)
    with gpu():
        there = torch_run(name, **asked)
        assert torch_bits(*there) == torch_bits(*here)
        if asked:
            assert torch.equal(there[0].grad_norm, here[0].grad_norm)
        else:
            assert there[0].grad_norm is None


def test_torch_looks_ahead_on_gpu_with_the_cpu_bits(gpu):
    def run():
        opt, params = torch_run("SGD", hypers={"lr": 0.1, "momentum": 0.9})
        before = [p.detach().clone() for p in params]
        with opt.lookahead():
            ahead = [p.detach().clone() for p in params]
            assert not torch.equal(ahead[0], before[0])
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
        return bits(p.numpy() for p in ahead)

    here = run()
    with gpu():
        assert run() == here


@pytest.mark.parametrize("name", CASES)
def test_torch_under_a_grad_scaler(gpu, name):
    """As GradScaler does it: scale and found_inf are tensors, the second step is to be skipped."""

    def scaled(opt, params, k):
        opt.grad_scale = torch.tensor(8.0)
        opt.found_inf = torch.tensor(float(k == 1))
        if k == 1:
            params[1].grad[7] = torch.inf

    here = torch_run(name, before=scaled)
    with gpu():
        there = torch_run(name, before=scaled)
        assert torch_bits(*there) == torch_bits(*here)


def test_first_step_that_is_skipped_leaves_momentum_to_begin(gpu):
    hypers = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}

    def spoiled(opt, params, k):
        if k < 2:
            params[0].grad[0] = torch.nan

    here = torch_run("SGD", 4, hypers, spoiled, skip_nonfinite=True)
    with gpu():
        there = torch_run("SGD", 4, hypers, spoiled, skip_nonfinite=True)
        assert torch_bits(*there) == torch_bits(*here)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "SGD", "RAdam"])
def test_counts_go_from_host_to_device(gpu, name):
    hypers = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}

    def run(pattern):
        torch.manual_seed(0)
        param = torch.nn.Parameter(torch.randn(3000))
        opt = getattr(ft, name)([param], **hypers)
        for skip in pattern:
            param.grad = torch.randn(3000)
            opt.step(skip_nonfinite=skip)
        return torch_bits(opt, [param])

    here = run([False] * 6)
    with gpu():
        assert run([False, False, True, True, False, True]) == here


def test_count_beyond_float32_stays_exact_on_the_device(gpu, module):
    def run():
        param = torch.nn.Parameter(torch.ones(8))
        opt = ft.RAdam([param], lr=0.1, betas=(0.9, 1 - 2**-24))
        param.grad = torch.ones(8)
        opt.step(skip_nonfinite=True)
        entry = opt.state[param]
        entry["step"] = entry["step"].double().fill_(2.0**24)
        for _ in range(5):
            opt.step(skip_nonfinite=True)
        return torch_bits(opt, [param])

    here = run()
    with gpu():
        assert run() == here


def test_flat_parameters_are_swept_and_scaled_by_torch_amp(gpu):
    def run():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(30, 70), torch.nn.Linear(70, 3))
        ft.flatten_(model)
        opt = ft.AdamW(model.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for k in range(5):
            opt.zero_grad()
            out = model(torch.randn(4, 30))
            if k == 2:
                out = out * torch.inf
            scaler.scale(out.square().mean()).backward()
            scaler.step(opt, max_norm=0.5)
            scaler.update()
        return torch_bits(opt, list(model.parameters())), scaler.get_scale()

    here = run()
    with gpu():
        assert run() == here


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_shards_of_distributed_tensors_are_stepped(gpu, name):
    dist = torch.distributed
    if not dist.is_available():
        pytest.skip("this torch has no torch.distributed")
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))

        def run():
            torch.manual_seed(0)
            param = torch.nn.Parameter(distribute_tensor(torch.randn(50, 90), mesh, [Shard(0)]))
            opt = getattr(ft, name)([param], lr=0.1, weight_decay=0.1)
            for live in (False, True, True):
                param.grad = distribute_tensor(torch.randn(50, 90), mesh, [Shard(0)])
                opt.found_inf = torch.tensor(0.0) if live else None
                opt.step()
            states = list(opt.state[param].values())
            return [(v.to_local() if isinstance(v, DTensor) else v) for v in (param, *states)]

        here = run()
        with gpu():
            for a, b in zip(run(), here, strict=True):
                assert torch.equal(a, b)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("rounding", ["split", "stochastic"])
@pytest.mark.parametrize("first", [0, 1, 128, 132, 2**32 - 700])
def test_shards_begin_anywhere_in_a_block(gpu, monkeypatch, first, rounding):
    """Blocks of 8-bit states are those of the whole parameter. Some steps are skipped, unseen."""
    monkeypatch.setattr(torch_layer._Helper, "_first_of", lambda self, i: first)
    how = {"rounding": rounding, "state_dtype": "q8", "seed": 1, "ema": 0.5, "zero_grad": True}

    def run():
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (3, 1500, 4096)]
        shadow = [torch.zeros(n, dtype=torch.float16) for n in (3, 1500, 4096)]
        opt = ft.AdamW(params, lr=0.1, shadow=shadow, **how)
        for bad in (True, False, True, False):
            for p in params[1:]:
                p.grad = torch.randn(len(p)).bfloat16()
            params[1].grad[2] = torch.nan if bad else 0.5
            opt.step(skip_nonfinite=True)
        states = [s for p in params for s in opt.state[p].values()]
        found = [*params, *shadow, *states]
        return bits([t.detach().reshape(-1).view(torch.uint8).numpy() for t in found])

    here = run()
    with gpu():
        assert run() == here


def on(*devices):
    """Parameters of which torch believes that they are on these devices."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    params = []
    for device in devices:
        mode = contextlib.nullcontext() if device == "cpu" else FakeTensorMode()
        with mode:
            params.append(torch.nn.Parameter(torch.ones(3, device=device)))
    return params


@pytest.mark.parametrize(
    "devices", [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")]
)
def test_mixed_devices_are_refused(devices):
    message = rf"params\[1\] must be on {devices[0]} as the others, got {devices[1]}"
    with pytest.raises(ValueError, match=message):
        ft.AdamW(on(*devices))
    with pytest.raises(ValueError, match=message.replace("params", "module_or_params")):
        ft.flatten_(on(*devices))
    other = "cuda:0"
    opt = ft.SGD([torch.nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=rf"params\[1\] must be on cpu as the others, got {other}"):
        opt.add_param_group({"params": on(other)})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("where", ["grads", "exp_avg"])
def test_gradient_or_state_on_another_device_is_refused(where):
    param = torch.nn.Parameter(torch.ones(3))
    opt = ft.AdamW([param])
    param.grad = torch.ones(3)
    opt.step()
    before = param.detach().clone()
    wrong = on("cuda:0")[0].detach()
    label = "grads[0]" if where == "grads" else "state[0]['exp_avg']"
    if where == "grads":

        class Lying(torch.nn.Parameter):
            grad = wrong

        param = Lying(before.clone())
        opt = ft.AdamW([param])
    else:
        opt.state[param]["exp_avg"] = wrong
    with pytest.raises((ValueError, TypeError)) as caught:
        opt.step()
    assert label in str(caught.value)
    assert "got device cuda:0" in str(caught.value)
    assert torch.equal(param.detach(), before)


def test_checkpoint_leaves_the_optimizer_as_it_is(gpu):
    with gpu():
        params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
        opt = ft.SGD(params, lr=0.5, momentum=0.9)
        params[0].grad = torch.full((3,), torch.nan)
        params[1].grad = None
        opt.step(skip_nonfinite=True)
        buffer = opt.state[params[0]]["momentum_buffer"]
        assert not opt.state_dict()["state"]
        assert not copy.deepcopy(opt).state
        assert opt.state[params[0]]["momentum_buffer"] is buffer
        # Another parameter under the number has nothing to do with it.
        opt.param_groups[0]["params"] = [params[1]]
        del opt.state[params[0]]
        params[1].grad = torch.ones(3)
        assert opt.state_dict()["state"] == {}
        opt.step(skip_nonfinite=True)
        assert list(opt.state_dict()["state"]) == [0]


def test_group_whose_device_cannot_be_opened_is_not_left_behind(monkeypatch):
    opt = ft.SGD([torch.nn.Parameter(torch.ones(3))])
    opt.param_groups[0]["params"] = []

    def refuse(device):
        raise RuntimeError("no memory")

    monkeypatch.setattr(torch_layer, "gpu_of", refuse)
    with pytest.raises(RuntimeError, match="no memory"):
        opt.add_param_group({"params": on("cuda:0")})
    assert len(opt.param_groups) == 1


# -- recorded steps --------------------------------------------------------------------------------


@pytest.fixture
def stream(controls):
    return controls.make_stream()


@pytest.mark.parametrize("asked", [{}, {"max_norm": 0.5, "skip_nonfinite": True}])
@pytest.mark.parametrize("name", CASES)
def test_recorded_step_replays(gpu, controls, stream, name, asked):
    rates = [0.5, 0.25, 0.125, 1.0]
    torch.manual_seed(0)
    grads = torch.randn(len(rates), 5000)

    def eager():
        param = torch.nn.Parameter(torch.ones(5000))
        opt = getattr(ft, name)([param], lr=0.5)
        for rate, grad in zip(rates, grads, strict=True):
            opt.param_groups[0]["lr"] = rate
            param.grad = grad.clone()
            opt.step(**asked)
        return torch_bits(opt, [param])

    here = eager()
    with gpu(to=stream):
        param, lr = torch.nn.Parameter(torch.ones(5000)), torch.tensor(rates[0])
        opt = getattr(ft, name)([param], lr=lr, capturable=True)
        param.grad = grads[0].clone()
        opt.step(**asked)  # as torch asks for: states are made before the recording
        assert controls.begin_capture(stream) == 0
        opt.step(**asked)
        graph = controls.end_capture(stream)
        assert graph
        for rate, grad in zip(rates[1:], grads[1:], strict=True):
            lr.fill_(rate)
            param.grad.copy_(grad)
            assert controls.replay(graph, stream) == 0
        assert torch_bits(opt, [param]) == here


def test_replays_and_other_steps_do_not_disturb_each_other(gpu, controls, stream):
    """A step with other gradients sends another table, and the graph must go on with its own."""
    torch.manual_seed(0)
    grads = torch.randn(6, 2, 700)

    def eager():
        params = [torch.nn.Parameter(torch.ones(700)) for _ in range(2)]
        opt = ft.NAdam(params, lr=0.1)
        for both in grads:
            for param, grad in zip(params, both, strict=True):
                param.grad = grad.clone()
            opt.step(max_norm=1.0)
        return torch_bits(opt, params)

    here = eager()
    with gpu(to=stream):
        params = [torch.nn.Parameter(torch.ones(700)) for _ in range(2)]
        opt = ft.NAdam(params, lr=0.1, capturable=True)
        fixed = [grad.clone() for grad in grads[0]]

        def put(tensors):
            for param, grad in zip(params, tensors, strict=True):
                param.grad = grad

        put(fixed)
        opt.step(max_norm=1.0)
        assert controls.begin_capture(stream) == 0
        opt.step(max_norm=1.0)
        graph = controls.end_capture(stream)
        norm = opt.grad_norm  # a graph's memory, which torch keeps for the graph on a GPU
        for k in range(1, len(grads)):
            if k % 2:
                put([grad.clone() for grad in grads[k]])
                opt.step(max_norm=1.0)
            else:
                for grad, values in zip(fixed, grads[k], strict=True):
                    grad.copy_(values)
                assert controls.replay(graph, stream) == 0
        assert torch_bits(opt, params) == here
        assert norm > 1


def test_step_that_is_not_capturable_cannot_be_recorded(gpu, controls, stream):
    with gpu(to=stream):
        param = torch.nn.Parameter(torch.ones(50))
        opt = ft.AdamW([param])
        param.grad = torch.ones(50)
        opt.step()
        before = torch_bits(opt, [param])
        assert controls.begin_capture(stream) == 0
        with pytest.raises(RuntimeError, match="only with capturable=True"):
            opt.step()
        assert controls.replay(controls.end_capture(stream), stream) == 0
        assert torch_bits(opt, [param]) == before
        opt.step()


def test_look_ahead_cannot_be_recorded(gpu, controls, stream):
    """Replays would keep to the rate of the recording."""
    with gpu(to=stream):
        param = torch.nn.Parameter(torch.ones(50))
        opt = ft.SGD([param], lr=0.1, momentum=0.9, capturable=True)
        param.grad = torch.ones(50)
        opt.step()
        before = torch_bits(opt, [param])
        assert controls.begin_capture(stream) == 0
        with pytest.raises(RuntimeError, match="lookahead must not be recorded in a CUDA graph"):
            opt.lookahead().__enter__()
        assert controls.replay(controls.end_capture(stream), stream) == 0
        assert torch_bits(opt, [param]) == before
        with opt.lookahead():
            assert not torch.equal(param.detach(), torch.full((50,), 0.9))


def test_states_are_not_made_in_a_recording(gpu, controls, stream):
    """Each replay would make them again."""
    with gpu(to=stream):
        param = torch.nn.Parameter(torch.ones(50))
        opt = ft.AdamW([param], capturable=True)
        param.grad = torch.ones(50)
        assert controls.begin_capture(stream) == 0
        with pytest.raises(RuntimeError, match="must come before the recording"):
            opt.step()
        assert controls.replay(controls.end_capture(stream), stream) == 0
        assert not opt.state
        opt.step()
        assert controls.begin_capture(stream) == 0
        opt.step()
        assert controls.end_capture(stream)


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "RAdam"])
def test_loaded_optimizer_can_be_recorded_at_once(gpu, controls, stream, name):
    torch.manual_seed(0)
    grads = torch.randn(8, 700)

    def make_one(**more):
        param = torch.nn.Parameter(torch.ones(700))
        param.grad = torch.zeros(700)
        return getattr(ft, name)([param], lr=0.125, **more), param

    def steps(opt, param, some, step):
        for grad in some:
            param.grad.copy_(grad)
            step()

    here, param = make_one()
    steps(here, param, grads[:3], here.step)
    saved, values = copy.deepcopy(here.state_dict()), param.detach().clone()
    resumed, other = make_one()
    resumed.load_state_dict(saved)
    other.data.copy_(values)
    steps(resumed, other, grads[3:], resumed.step)
    with gpu(to=stream):
        there, third = make_one(capturable=True)
        there.load_state_dict(saved)
        third.data.copy_(values)
        assert controls.begin_capture(stream) == 0
        there.step()
        graph = controls.end_capture(stream)
        steps(there, third, grads[3:], lambda: controls.replay(graph, stream))
        assert torch_bits(there, [third]) == torch_bits(resumed, [other])


def test_momentum_that_never_began_is_not_in_a_checkpoint(gpu):
    with gpu():
        param = torch.nn.Parameter(torch.ones(3))
        opt = ft.SGD([param], lr=0.5, momentum=0.9, dampening=0.5)
        param.grad = torch.tensor([1.0, torch.inf, 1.0])
        opt.step(skip_nonfinite=True)
        for one in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            assert not one.state
        saved = opt.state_dict()
        assert not saved["state"]
        opt.load_state_dict(copy.deepcopy(saved))
        param.grad = torch.ones(3)
        for _ in range(2):
            opt.step(skip_nonfinite=True)
        # b = 1, then 0.9 + 0.5.
        torch.testing.assert_close(param.detach(), torch.full((3,), 1 - 0.5 - 0.5 * 1.4))
        assert opt.state_dict()["state"]


def test_another_parameter_under_a_number_begins_anew(gpu):
    def run():
        params = [torch.nn.Parameter(torch.ones(9)) for _ in range(3)]
        opt = ft.SGD([{"params": [p]} for p in params[:2]], lr=0.5, momentum=0.5, dampening=0.5)
        for p in params:
            p.grad = torch.ones(9)
        opt.step(skip_nonfinite=True)
        opt.param_groups[1]["params"] = [params[2]]
        opt.step(skip_nonfinite=True)
        return bits([p.detach().numpy() for p in params])

    here = run()
    with gpu():
        assert run() == here


def test_host_does_not_wait_for_tensors_that_sit_out(gpu, controls):
    """After a step that only the device counted, their clocks are fetched once."""
    with gpu():
        params = [np.ones(9, np.float32) for _ in range(3)]
        grads = [np.ones(9, np.float32) for _ in range(3)]
        opt = fs.AdamW(params)
        opt.step(grads, skip_nonfinite=True)
        some = [grads[0], None, None]
        opt.step(some)
        opt.step(some)
        assert counted(controls, lambda: opt.step(some)) == (1, 0)
        assert [clock[0] for clock in opt._table.clocks()] == [4, 1, 1]


# -- builds without CUDA ---------------------------------------------------------------------------


def test_array_on_a_gpu_is_refused_where_there_is_no_cuda(monkeypatch):
    monkeypatch.setattr(_gpu, "module", lambda: None)

    class OnGpu:
        __dlpack_device__ = staticmethod(lambda: (2, 0))
        __dlpack__ = None

    with pytest.raises(ValueError, match=r"params\[0\] must be in CPU .* no CUDA"):
        fs.SGD([OnGpu()])
    with pytest.raises(ValueError, match=r"params must be .* got device cuda:0.* no CUDA"):
        torch_layer.gpu_of(torch.device("cuda:0"))
    assert _gpu.info() is False


def test_info_tells_of_the_gpu(gpu, capsys):
    from fusedstep.__main__ import main

    with gpu():
        assert fs.info()["cuda"]["architectures"] == ["host"]
        assert fs.info()["cuda"]["devices"][0]["capability"] == "9.0"
        main(["info"])
    assert "cuda               host; devices: host (9.0), host (9.0)" in capsys.readouterr().out
    assert _gpu._architectures("80-real 90a-virtual 120 all-major") == [
        *("sm_80", "compute_90a", "sm_120", "compute_120", "all-major"),
    ]
