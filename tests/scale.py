"""What takes too long or too much memory for the suite: large, many, little memory, long.

    python tests/scale.py large      # a buffer and a tensor of 2^31 + 4099 elements (9 GiB, 3 min)
    python tests/scale.py tensors    # 100,000 tensors
    python tests/scale.py groups     # 4,000 groups
    python tests/scale.py memory     # memory that ends at each place where it can
    python tests/scale.py soak       # random calls for 30 minutes: the same bits, flat memory

Each is a check of both layers, prints what it took, and ends with an error if one does not hold.
`python tests/scale.py all` runs all of them, the soak for as long as `--minutes` says.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import os
import pickle
import random
import resource
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES

GIB = 2**30


def memory(field: str = "VmRSS") -> int:
    """Bytes of this process, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Prints how long something took, and the memory that is in use afterwards."""
    begin = time.perf_counter()
    yield
    seconds = time.perf_counter() - begin
    print(f"{what:48} {seconds:8.2f} s  {memory() / GIB:6.2f} GiB", flush=True)


def bits(array: Any) -> bytes:
    """The bytes of an array or a tensor."""
    if isinstance(array, torch.Tensor):
        array = array.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(array).tobytes()


# -- large -----------------------------------------------------------------------------------------

LARGE = 2**31 + 4099
# Where 32-bit counts of elements or bytes would turn over, each from a block of 128 on.
PLACES = (0, 2**29 - 256, 2**30 - 256, 2**31 - 4096, 2**31)
AT = [slice(at, LARGE if at == 2**31 else at + 4096) for at in PLACES]


def large() -> None:
    """One buffer, and one tensor, of more elements than an int32 counts.

    Pages that are only read are one page of zeros, so that gradients cost no memory.
    """
    with timed("a FlatBuffer of 2^31 + 4099 bfloat16, and 1000"):
        params = fs.FlatBuffer.zeros({"w": LARGE, "b": 1000}, "bfloat16")
        grads = params.zeros_like(huge_pages=False)
    small = {str(at.start): np.zeros(at.stop - at.start, params.dtype) for at in AT}
    small["b"] = np.zeros(1000, params.dtype)
    rng = np.random.default_rng(0)
    small_grads = {}
    for name, array in small.items():
        array[...] = rng.integers(-99, 99, array.size)
        small_grads[name] = rng.integers(-9, 9, array.size).astype(params.dtype)
    where = {str(at.start): at for at in AT}

    def put(buffer: Any, values: dict[str, Any]) -> None:
        for name, array in values.items():
            view = buffer["b"] if name == "b" else buffer["w"][where[name]]
            view[...] = array

    def check(what: str) -> None:
        for name, array in small.items():
            view = params["b"] if name == "b" else params["w"][where[name]]
            if bits(view) != bits(array):
                bad = np.flatnonzero(view.view("u2") != array.view("u2"))
                raise AssertionError(f"{what} differs at {name} + {bad[:8]}")
        rest = params["w"][2**31 - 8192 : 2**31 - 4096]
        assert not rest.any(), f"{what} changed what has no gradient"

    put(params, small)
    put(grads, small_grads)
    norm = float(np.sqrt(sum(np.square(g.astype(float)).sum() for g in small_grads.values())))
    runs: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("SGD", "SGD", {"lr": 0.5}, {"max_norm": 0.25 * norm}),
        (
            "Lion, q8 states",
            "Lion",
            {"lr": 0.5, "state_dtype": "q8", "state_rounding": "nearest"},
            {},
        ),
        (
            "AdamW, q8 states",
            "AdamW",
            {"lr": 0.5, "state_dtype": "q8", "state_rounding": "nearest"},
            {},
        ),
        ("SGD, split", "SGD", {"lr": 0.01, "rounding": "split"}, {}),
    ]
    for what, name, hypers, options in runs:
        opt = getattr(fs, name)(params, **hypers)
        own = getattr(fs, name)(small, **hypers)
        for _ in range(2):
            with timed(f"step, {what}"):
                report = opt.step(grads, **options)
            assert report.elements == LARGE + 1000, report
            # The squares are whole numbers, so that their sum is exact in any order.
            own.step(small_grads, **options)
            assert opt.grad_norm == own.grad_norm, (opt.grad_norm, own.grad_norm)
            check(what)
        del opt, own
    with timed("add_"):
        params.add_(grads, 0.5)
    for name, array in small.items():  # halves of whole numbers: rounded once, to bfloat16
        total = array.astype(np.float32) + 0.5 * small_grads[name].astype(np.float32)
        array[...] = total.astype(array.dtype)
    check("add_")

    tensor = torch.from_numpy(params["w"].view(np.int16)).view(torch.bfloat16)
    tensor.grad = torch.from_numpy(grads["w"].view(np.int16)).view(torch.bfloat16)
    mine = {
        name: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
        for name, a in small.items()
        if name != "b"
    }
    for name, one in mine.items():
        one.grad = torch.from_numpy(small_grads[name].view(np.int16)).view(torch.bfloat16)
    for what, name, hypers in (
        ("SGD", "SGD", {"lr": 0.5}),
        ("Lion, q8 states", "Lion", {"lr": 0.5, "state_dtype": "q8", "state_rounding": "nearest"}),
    ):
        opt = getattr(ft, name)([tensor], **hypers)
        with timed(f"step, one tensor, {what}"):
            opt.step()
        getattr(ft, name)(list(mine.values()), **hypers).step()
        check(f"torch, {what}")
        del opt


# -- tensors, groups -------------------------------------------------------------------------------


def tensors(n: int = 100_000) -> None:
    """Many tensors: the same bits as one, and an equation that is written here again."""
    sizes = [1 + i % 37 for i in range(n)]
    ends = np.cumsum(sizes)
    rng = np.random.default_rng(0)
    start = rng.standard_normal(ends[-1]).astype(np.float32)
    grad = rng.standard_normal(ends[-1]).astype(np.float32)

    def parts(flat: Any) -> list[Any]:
        return [flat[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    one, hypers = start.copy(), {"lr": 0.1, "weight_decay": 0.1}
    single = fs.AdamW(one, **hypers)
    single.step(grad)
    # The first step of AdamW: m / bias correction is g, and likewise v is g^2.
    expected = start * (1 - 0.1 * 0.1) - 0.1 * np.sign(grad) / (1 + 1e-8 / np.abs(grad))
    np.testing.assert_allclose(one, expected, rtol=2e-5, atol=1e-6)
    single.step(grad, max_norm=1.0)

    def check(found: list[Any], what: str) -> None:
        assert b"".join(map(bits, found)) == bits(one), f"{what} differs from one array"

    print(f"{n:,} tensors, {ends[-1]:,} elements")
    many, grads = parts(start.copy()), parts(grad)
    with timed("AdamW of a list of arrays"):
        opt = fs.AdamW(many, **hypers)
    with timed("step"):
        opt.step(grads)
    with timed("step, clipped"):
        opt.step(grads, max_norm=1.0)
    check(many, "a list")
    with timed("state_dict, load_state_dict"):
        opt.load_state_dict(opt.state_dict())
    with timed("deepcopy"):
        copy.deepcopy(opt)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "many.safetensors")
        with timed("save"):
            fs.save(path, params=many, optimizer=opt)
        for array in many:
            array[...] = 0
        with timed("load"):
            fs.load(path, params=many, optimizer=opt)
    check(many, "a file")
    with timed("FlatBuffer.pack"):
        params, packed = fs.FlatBuffer.pack(parts(start)), fs.FlatBuffer.pack(grads)
    with timed("AdamW of it"):
        opt = fs.AdamW(params, **hypers)
    with timed("step"):
        opt.step(packed)
    opt.step(packed, max_norm=1.0)
    check(list(params.values()), "a FlatBuffer")

    for flat in (False, True):
        leaves = [torch.nn.Parameter(torch.from_numpy(part.copy())) for part in parts(start)]
        if flat:
            with timed("flatten_"):
                ft.flatten_(leaves)
        for leaf, own in zip(leaves, grads, strict=True):
            if flat:
                leaf.grad.copy_(torch.from_numpy(own))
            else:
                leaf.grad = torch.from_numpy(own)
        with timed("torch AdamW of a list of tensors"):
            opt = ft.AdamW(leaves, **hypers)
        with timed("step, which makes the states"):
            opt.step()
        with timed("step, clipped"):
            opt.step(max_norm=1.0)
        check(leaves, "torch")
        with timed("state_dict, load_state_dict"):
            opt.load_state_dict(opt.state_dict())


def groups(n: int = 4000) -> None:
    """Thousands of groups, each with a rate of its own, two parameters in each."""
    rates = [2.0**-k for k in range(1, 9)]
    rng = np.random.default_rng(0)
    names = [f"layer.{i}.{kind}" for i in range(n) for kind in ("weight", "bias")]
    start = {name: rng.integers(-99, 99, 5).astype(np.float32) for name in names}
    grads = {name: rng.integers(-9, 9, 5).astype(np.float32) for name in names}
    lrs = {name: rates[i // 2 % 8] for i, name in enumerate(names)}
    # Whole numbers times powers of two: nothing is rounded.
    expected = {name: start[name] - lrs[name] * grads[name] for name in names}
    print(f"{n:,} groups")

    def check(found: dict[str, Any]) -> None:
        for name in names:
            assert bits(found[name]) == bits(expected[name]), name

    params = {name: array.copy() for name, array in start.items()}
    with timed("SGD"):
        given = [fs.Group(f"layer.{i}.*", lr=rates[i % 8]) for i in range(n)]
        opt = fs.SGD(params, lr=1.0, groups=given)
    with timed("step"):
        opt.step(grads)
    check(params)
    with timed("state_dict, load_state_dict"):
        opt.load_state_dict(opt.state_dict())
    with timed("deepcopy"):
        copy.deepcopy(opt)

    leaves = {name: torch.nn.Parameter(torch.from_numpy(a.copy())) for name, a in start.items()}
    for name, leaf in leaves.items():
        leaf.grad = torch.from_numpy(grads[name])
    with timed("torch SGD"):
        both = [
            {"params": [leaves[f"layer.{i}.weight"], leaves[f"layer.{i}.bias"]], "lr": rates[i % 8]}
            for i in range(n // 2)
        ]
        top = ft.SGD(both, lr=1.0)
    with timed("add_param_group, as many again"):
        for i in range(n // 2, n):
            pair = [leaves[f"layer.{i}.weight"], leaves[f"layer.{i}.bias"]]
            top.add_param_group({"params": pair, "lr": rates[i % 8]})
    with timed("step"):
        top.step()
    check(leaves)
    with timed("state_dict, load_state_dict"):
        top.load_state_dict(top.state_dict())


# -- memory ----------------------------------------------------------------------------------------


class Situation(NamedTuple):
    """What is done when memory ends."""

    call: Callable[[], Any]
    seen: Callable[[], Any]  # what must be as before if it raised


def _run(cls: str = "AdamW", n: int = 2**20, **hypers: Any) -> tuple[Any, Any, Any]:
    params = fs.FlatBuffer.pack({"w": np.ones(n, np.float32)})
    grads = fs.FlatBuffer.pack({"w": np.ones(n, np.float32)})
    return params, grads, getattr(fs, cls)(params, **hypers)


def _seen(params: Any, opt: Any) -> Any:
    """Bits of all that a run has."""
    values = params.values() if hasattr(params, "values") else params
    saved = opt.state_dict()
    return (
        [bits(p) for p in values],
        [[(k, bits(np.asarray(v))) for k, v in s.items()] for s in saved["state"].values()],
        saved.get("step"),
    )


def _alone(call: Callable[[Any], Any], given: Any) -> Situation:
    return Situation(lambda: call(given), lambda: 0)


def _neutral(call: Callable[[Any, Any], Any], steps: int = 0, **given: Any) -> Situation:
    params, grads, opt = _run(**given)
    for _ in range(steps):
        opt.step(grads, ema=0.5)
    return Situation(lambda: call(opt, grads), lambda: _seen(params, opt))


def _many(steps: int = 0, n: int = 3000, **options: Any) -> Situation:
    params = [np.ones(1 + i % 9, np.float32) for i in range(n)]
    grads = [p.copy() for p in params]
    opt = fs.Adam(params)
    for _ in range(steps):
        opt.step(grads)
    return Situation(lambda: opt.step(grads, **options), lambda: _seen(params, opt))


def _torch(
    call: Callable[[Any, Any], Any], sizes: tuple[int, ...] = (2**20,), steps: int = 0, **how: Any
) -> Situation:
    params = [torch.nn.Parameter(torch.ones(n)) for n in sizes]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = ft.AdamW(params, **how)
    for _ in range(steps):
        opt.step()
    return Situation(lambda: call(opt, params), lambda: _seen(params, opt))


def _ema(opt: Any, _: Any) -> None:
    with opt.ema():
        pass


def _file(load: bool) -> Situation:
    params, grads, opt = _run()
    opt.step(grads)
    folder = tempfile.TemporaryDirectory()  # until the situation, which holds it, is over
    path = Path(folder.name, "run.safetensors")
    fs.save(path, params=params, optimizer=opt)
    call = fs.load if load else fs.save
    return Situation(
        lambda: call(path, params=params, optimizer=opt),
        lambda: (Path(folder.name, path.name).read_bytes(), _seen(params, opt)),
    )


def _pool() -> Situation:
    fs.set_num_threads(64)
    params, grads, opt = _run("SGD", 2**22)
    return Situation(lambda: opt.step(grads), lambda: _seen(params, opt))


MANY = (5,) * 3000
SITUATIONS: dict[str, Callable[[], Situation]] = {
    "FlatBuffer.zeros": lambda: _alone(fs.FlatBuffer.zeros, [2**21]),
    "FlatBuffer.pack": lambda: _alone(fs.FlatBuffer.pack, [np.ones(2**21, np.float32)]),
    "constructor": lambda: _neutral(lambda opt, _: fs.AdamW(opt._buffer)),
    "constructor, 3000 arrays": lambda: _alone(fs.AdamW, [np.ones(3, "f4") for _ in range(3000)]),
    "step": lambda: _neutral(lambda opt, grads: opt.step(grads)),
    "step, which begins an average": lambda: _neutral(lambda opt, grads: opt.step(grads, ema=0.5)),
    "step, q8": lambda: _neutral(
        lambda opt, grads: opt.step(grads, norms=True, ema=0.5), state_dtype="q8"
    ),
    "step, 3000 arrays": _many,
    "step, 3000 arrays, measured": lambda: _many(1, norms=True),
    "step, 3000 arrays, everything": lambda: _many(1, max_norm=1.0, ema=0.5, zero_grad=True),
    "step, 64 threads": _pool,
    "state_dict, float32": lambda: _neutral(
        lambda opt, _: opt.state_dict(state_dtype="float32"), 1, state_dtype="q8"
    ),
    "load_state_dict": lambda: _neutral(lambda opt, _: opt.load_state_dict(opt.state_dict()), 1),
    "ema": lambda: _neutral(_ema, 1, ema_dtype="bfloat16"),
    "masters": lambda: _neutral(lambda opt, _: opt.masters(), 1),
    "deepcopy": lambda: _neutral(lambda opt, _: copy.deepcopy(opt), 1),
    "pickle": lambda: _neutral(lambda opt, _: pickle.loads(pickle.dumps(opt)), 1),
    "save": lambda: _file(False),
    "load": lambda: _file(True),
    "torch, step": lambda: _torch(lambda opt, _: opt.step()),
    "torch, step, small states": lambda: _torch(lambda opt, _: opt.step(), (2**18,) * 16),
    "torch, step, 3000 tensors": lambda: _torch(lambda opt, _: opt.step(), MANY),
    "torch, step, 3000 tensors, everything": lambda: _torch(
        lambda opt, _: opt.step(norms=True, ema=0.5), MANY, 1
    ),
    "torch, step, q8": lambda: _torch(lambda opt, _: opt.step(), state_dtype="q8"),
    "torch, flatten_": lambda: _torch(lambda _, params: ft.flatten_(params)),
    "torch, state_dict": lambda: _torch(
        lambda opt, _: opt.state_dict(state_dtype="float32"), steps=1, state_dtype="q8"
    ),
    "torch, load_state_dict": lambda: _torch(
        lambda opt, _: opt.load_state_dict(opt.state_dict()), steps=1
    ),
    "torch, deepcopy": lambda: _torch(lambda opt, _: copy.deepcopy(opt), steps=1),
}


def _outcome(make: Callable[[], Situation], extra: int | None) -> str:
    """Runs a situation in a child that is granted so many bytes more, or all; says what came."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        text = ""
        try:
            text = _in_child(make, extra)
        except BaseException:
            text = "unexpected: " + traceback.format_exc()
        os.write(write, text.encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return text if os.WIFEXITED(status) and text else f"crash: signal {os.WTERMSIG(status)}"


def _in_child(make: Callable[[], Situation], extra: int | None) -> str:
    situation = make()
    before = situation.seen()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    gc.collect()
    text = "done"
    if extra is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + extra, limits[1]))
        try:
            situation.call()
        except MemoryError as error:
            text = f"MemoryError: {error}"
            error.__traceback__ = None
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        if text == "done":
            return text
        if situation.seen() != before:
            return "unexpected: changed, then " + text
    situation.call()  # as if nothing had happened
    return text + "\n" + str(hash(str(situation.seen())))


def little(names: list[str]) -> None:
    """Calls in processes that are granted a little more memory each time, until they succeed."""
    failed = []
    chosen = {k: v for k, v in SITUATIONS.items() if not names or any(n in k for n in names)}
    for name, make in chosen.items():
        whole = _outcome(make, None).partition("\n")[2]
        extras = [0] + [round(2 ** (k / 2)) for k in range(28, 60)]
        told: dict[str, int] = {}
        for extra in extras:
            text, _, after = _outcome(make, extra).partition("\n")
            told[text] = told.get(text, 0) + 1
            if not text.startswith(("done", "MemoryError")):
                failed.append(f"{name}: {text}\n{after}")
            elif after and after != whole:
                failed.append(f"{name}: after {text} another result")
            if text == "done" and extra > 2**26:
                break
        print(f"{name}: " + "; ".join(f"{n} x {text}" for text, n in told.items()), flush=True)
    if failed:
        raise SystemExit("\n\n".join(failed))


# -- soak ------------------------------------------------------------------------------------------


def same_nan(value: Any) -> bytes:
    """The bytes of an array or a tensor, in which all NaNs are one: what they carry is nobody's."""
    array = value.detach().clone() if isinstance(value, torch.Tensor) else np.array(value)
    if (array != array).any():
        array[array != array] = float("nan")
    return bits(array)


class World:
    """A run of the neutral layer, which random calls are made of."""

    def __init__(self, rng: random.Random) -> None:
        self.folder = Path(tempfile.gettempdir(), f"fusedstep-soak-{os.getpid()}.safetensors")
        self.rule = rng.choice(list(CASES))
        self.hypers = rng.choice(CASES[self.rule])
        self.dtype = rng.choice(["float32", "float32", "float64", "bfloat16", "float16"])
        self.how: dict[str, Any] = {}
        if self.dtype == "bfloat16":
            self.how["rounding"] = rng.choice(["nearest", "stochastic", "kahan", "split"])
        if self.dtype != "float64":
            self.how["state_dtype"] = rng.choice([None, "bfloat16", "q8"])
        self.sizes = [rng.choice([1, 7, 130, 513, 5000, 140_000]) for _ in range(rng.randint(1, 6))]
        self.make(np.random.default_rng(rng.getrandbits(32)), rng)
        self.averaged = False

    def values(self, rng: np.random.Generator, n: int, dtype: str) -> Any:
        return fs.FlatBuffer.pack([rng.standard_normal(n)], dtype=dtype)[0].copy()

    def make(self, values: np.random.Generator, rng: random.Random) -> None:
        arrays = {f"p{i}": self.values(values, n, self.dtype) for i, n in enumerate(self.sizes)}
        self.params: Any = fs.FlatBuffer.pack(arrays) if rng.random() < 0.5 else arrays
        self.begin()

    def begin(self) -> None:
        try:
            self.new()
        except ValueError:  # a rule whose states have no narrow format
            del self.how["state_dtype"]
            self.new()

    def new(self) -> None:
        self.opt = getattr(fs, self.rule)(
            self.params, groups=[fs.Group("p1", lr=0.01)][: len(self.sizes) - 1], **self.arguments()
        )

    def arguments(self) -> dict[str, Any]:
        return {**self.hypers, **{k: v for k, v in self.how.items() if v is not None}}

    def grads(self, rng: random.Random) -> Any:
        values = np.random.default_rng(rng.getrandbits(32))
        dtype = rng.choice([self.dtype, "float32", "float64", "bfloat16", "float16"])
        grads = {name: self.values(values, p.size, dtype) for name, p in self.params.items()}
        kind = rng.randrange(4)
        if kind == 0:
            return fs.FlatBuffer.pack(grads)
        if kind == 1 and len(grads) > 1:
            grads[rng.choice(list(grads))] = None
        if kind == 2:
            first = next(iter(grads))
            grads[first][0] = np.inf
        return grads

    def options(self, rng: random.Random) -> dict[str, Any]:
        all_of = {
            "max_norm": rng.choice([0.5, float("inf")]),
            "skip_nonfinite": True,
            "norms": True,
            "clip_value": 0.5,
            "ema": 0.9,
            "zero_grad": True,
        }
        return {name: value for name, value in all_of.items() if rng.random() < 0.3}

    # The calls. Each is made of both worlds, with generators that are the same.

    def step(self, rng: random.Random) -> None:
        grads, options = self.grads(rng), self.options(rng)
        if rng.random() < 0.3:
            options["shadow"] = self.shadow = {
                name: np.zeros(p.shape, "float16") for name, p in self.params.items()
            }
        report = self.opt.step(grads, **options)
        self.averaged |= "ema" in options and report.elements > 0

    def refused(self, rng: random.Random) -> None:
        try:
            self.opt.step([np.zeros(3, np.int32)] * len(self.params))
        except (TypeError, ValueError):
            return
        raise AssertionError("integers were taken")

    def reload(self, rng: random.Random) -> None:
        saved = self.opt.state_dict(state_dtype=rng.choice([None, "float32"]))
        if rng.random() < 0.5:
            saved = pickle.loads(pickle.dumps(saved))
            self.new()
        self.opt.load_state_dict(saved)

    def duplicate(self, rng: random.Random) -> None:
        both = (self.params, self.opt)
        again = copy.deepcopy(both) if rng.random() < 0.5 else pickle.loads(pickle.dumps(both))
        self.params, self.opt = again
        if not isinstance(self.params, fs.FlatBuffer):  # the optimizer's own are these
            self.params = dict(self.opt._params)

    def file(self, rng: random.Random) -> None:
        fs.save(self.folder, params=self.params, optimizer=self.opt)
        if rng.random() < 0.5:
            self.new()
        fs.load(self.folder, params=self.params, optimizer=self.opt)

    def average(self, rng: random.Random) -> None:
        if self.averaged:
            with self.opt.ema():
                self.inside = [same_nan(p) for p in self.params.values()]

    def ahead(self, rng: random.Random) -> None:
        with contextlib.suppress(AttributeError, ValueError), self.opt.lookahead():
            self.inside = [same_nan(p) for p in self.params.values()]

    def edit(self, rng: random.Random) -> None:
        self.opt.param_groups[0]["lr"] = rng.choice([0.0, 0.01, 0.1])

    def accumulate(self, rng: random.Random) -> None:
        total = fs.FlatBuffer.zeros({name: p.shape for name, p in self.params.items()}, self.dtype)
        others = {
            n: self.values(np.random.default_rng(1), p.size, "float32")
            for n, p in self.params.items()
        }
        self.inside = same_nan(total.add_(others, 0.25).flat)

    def look(self) -> Any:
        """All bits of it."""
        saved = self.opt.state_dict()
        states = [
            (i, key, same_nan(value))
            for i, entry in saved["state"].items()
            for key, value in entry.items()
        ]
        return (
            [same_nan(p) for p in self.params.values()],
            states,
            repr(self.opt.grad_norm),
            getattr(self, "inside", None),
            [same_nan(a) for a in getattr(self, "shadow", {}).values()],
        )


class TorchWorld(World):
    """A run of the torch layer."""

    def values(self, rng: np.random.Generator, n: int, dtype: str) -> Any:
        return torch.from_numpy(rng.standard_normal(n)).to(getattr(torch, dtype))

    def make(self, values: np.random.Generator, rng: random.Random) -> None:
        leaves = {
            f"p{i}": torch.nn.Parameter(self.values(values, n, self.dtype))
            for i, n in enumerate(self.sizes)
        }
        self.params = torch.nn.ParameterDict(leaves)
        if rng.random() < 0.5:
            ft.flatten_(self.params)
        self.begin()

    def new(self) -> None:
        leaves = list(self.params.values())
        self.opt = getattr(ft, self.rule)(leaves[:1], **self.arguments())
        for leaf in leaves[1:]:
            self.opt.add_param_group({"params": [leaf], "lr": 0.01})

    def step(self, rng: random.Random) -> None:
        values = np.random.default_rng(rng.getrandbits(32))
        self.opt.zero_grad()
        for leaf in self.params.values():
            if rng.random() < 0.8:
                given = self.values(values, leaf.numel(), self.dtype)
                if leaf.grad is None:
                    leaf.grad = given
                else:
                    leaf.grad.copy_(given)
        options = self.options(rng)
        self.opt.step(**options)
        self.averaged |= "ema" in options and self.finite(options)

    def finite(self, options: dict[str, Any]) -> bool:
        return any(p.grad is not None for p in self.params.values())

    def refused(self, rng: random.Random) -> None:
        try:
            self.opt.step(max_norm=-1.0)
        except ValueError:
            return
        raise AssertionError("a negative norm was taken")

    def duplicate(self, rng: random.Random) -> None:
        both = (self.params, self.opt)
        again = copy.deepcopy(both) if rng.random() < 0.5 else pickle.loads(pickle.dumps(both))
        self.params, self.opt = again

    def file(self, rng: random.Random) -> None:
        ft.save(self.folder, model=self.params, optimizer=self.opt)
        if rng.random() < 0.5:
            self.new()
        ft.load(self.folder, model=self.params, optimizer=self.opt)

    def average(self, rng: random.Random) -> None:
        if any("ema" in entry for entry in self.opt.state.values()):
            with self.opt.ema():
                self.inside = [same_nan(p) for p in self.params.values()]

    def accumulate(self, rng: random.Random) -> None:
        total = [torch.zeros_like(p, requires_grad=False) for p in self.params.values()]
        others = [self.values(np.random.default_rng(1), p.numel(), "float32") for p in total]
        ft.add_(total, others, 0.25)
        self.inside = [same_nan(t) for t in total]


CALLS = [
    *(["step"] * 8),
    "refused",
    "reload",
    "duplicate",
    "file",
    "average",
    "ahead",
    "edit",
    "accumulate",
]


def _episode(seed: int) -> int:
    """One run of random calls, on one instruction set and number of threads, and on another."""
    rng = random.Random(seed)
    kind = rng.choice([World, TorchWorld])
    sides = [(rng.choice(fs.usable_isas()), rng.randint(1, 4)) for _ in range(2)]
    begin = rng.getrandbits(32)
    worlds = []
    for isa, threads in sides:
        fs.set_isa(isa)
        fs.set_num_threads(threads)
        worlds.append(kind(random.Random(begin)))
    done = []
    for _ in range(rng.randint(5, 25)):
        call, key = rng.choice(CALLS), rng.getrandbits(32)
        done.append(call)
        seen = []
        for (isa, threads), world in zip(sides, worlds, strict=True):
            fs.set_isa(isa)
            fs.set_num_threads(threads)
            getattr(world, call)(random.Random(key))
            seen.append(world.look())
        if seen[0] != seen[1]:
            one = worlds[0]
            what = (kind.__name__, one.rule, one.hypers, one.dtype, one.how, one.sizes)
            raise AssertionError(f"episode {seed}: {sides} differ after {done} of {what}")
    worlds[0].folder.unlink(missing_ok=True)
    return len(done)


def soak(minutes: float, seed: int) -> None:
    """Random calls of both layers: the same bits on two sets, and memory that stays as it is."""
    begin = time.monotonic()
    sampled: list[int] = []
    calls = episodes = 0
    print(f"seed {seed}", flush=True)
    while time.monotonic() - begin < 60 * minutes:
        try:
            calls += _episode(seed + episodes)
        except Exception:
            print(f"in episode {seed + episodes}", flush=True)
            raise
        episodes += 1
        if time.monotonic() - begin >= 60 * minutes * (len(sampled) + 1) / max(9, minutes):
            gc.collect()
            sampled.append(memory())
            print(
                f"{(time.monotonic() - begin) / 60:6.1f} min  {episodes:6} runs  {calls:7} calls"
                f"  {sampled[-1] / 2**20:8.1f} MiB",
                flush=True,
            )
    third = len(sampled) // 3
    first, last = statistics.median(sampled[:third]), statistics.median(sampled[-third:])
    print(f"memory in the last third: {last / first:.3f} of that in the first")
    if last > 1.03 * first:
        raise SystemExit("memory must stay as it is")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    checks = ("large", "tensors", "groups", "memory", "soak", "all")
    parser.add_argument("check", choices=checks)
    parser.add_argument("names", nargs="*", help="memory: situations whose names have one of these")
    parser.add_argument("--minutes", type=float, default=30, help="of the soak")
    parser.add_argument("--seed", type=int, default=0, help="of the soak's first run")
    given = parser.parse_args()
    runs: dict[str, Callable[[], None]] = {
        "memory": lambda: little(given.names),  # first, while the process is small
        "groups": groups,
        "tensors": tensors,
        "large": large,
        "soak": lambda: soak(given.minutes, given.seed),
    }
    for name, run in runs.items():
        if given.check in (name, "all"):
            print(f"== {name}", flush=True)
            run()


if __name__ == "__main__":
    main()
