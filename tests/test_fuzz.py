"""Any dtypes, shapes, strides, offsets, groups and options: the same bits from every set and number
of threads, no byte outside the arrays, and nothing changed by a call that raises.

FUSEDSTEP_FUZZ_EXAMPLES says how many examples instead of a few. They are the same in each run; from
1000 on, others each time. A failure prints the example. The engine by itself is native/fuzz.cpp's
subject.
"""

import os
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES, FORMATS
from fusedstep._arrays import as_dtype
from test_values import same_numbers

GUARD = 0x5A  # the byte around all arrays
EXAMPLES = int(os.environ.get("FUSEDSTEP_FUZZ_EXAMPLES", "25"))
SHAPES = [(), (0,), (1,), (3, 5), (17,), (128,), (129,), (4, 130), (2, 3, 7), (513,), (1100,)]
LARGE = (131_101,)  # from 2^17 elements on a step has several threads
LAYOUTS = ["plain", "transposed", "every other"]
# What a call may raise. All else is a fault of ours.
REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)


@dataclass
class Case:
    """What an example is made of; arrays come from the seed."""

    layer: str
    name: str
    hypers: dict[str, Any]
    how: dict[str, Any]
    shapes: list[tuple[int, ...]]
    layouts: list[str]
    offsets: list[int]
    dtypes: list[str]
    grads: list[str]
    absent: list[bool]
    group: bool
    steps: list[dict[str, Any]]
    faults: list[str]
    raw: bool  # arbitrary bits, else numbers of common size
    seed: int


@st.composite
def cases(draw):
    def one_of(*choices):
        return draw(st.sampled_from(choices))

    def often(value, *others):  # three times in four
        return one_of(*[value] * 3 * len(others), *others)

    name = one_of(*CASES)
    n = draw(st.integers(1, 5))
    layer = one_of("neutral", "torch")
    narrow = one_of(True, False)
    dtypes = ["bfloat16"] * n if narrow else [one_of(*FORMATS) for _ in range(n)]
    shapes = [one_of(*SHAPES) for _ in range(n)]
    if one_of(*[False] * 11, True):
        shapes[0] = LARGE
    how = {
        "rounding": one_of("nearest", "stochastic", "kahan", "split") if narrow else "nearest",
        "state_dtype": often(None, "bfloat16", "q8"),
        "state_rounding": one_of("stochastic", "nearest"),
        "seed": one_of(0, 7),
    }
    steps = []
    for _ in range(draw(st.integers(1, 3))):
        steps.append(
            {
                "max_norm": often(None, 1.0, 1e-3, np.inf),
                "skip_nonfinite": one_of(False, True),
                "clip_value": often(None, 0.25, 1e30),
                "ema": often(None, 0.9, 0.25),
                "zero_grad": one_of(False, True),
                "shadow": often(None, *FORMATS),
            }
        )
    return Case(
        layer, name, dict(one_of(*CASES[name])), how, shapes,
        [often("plain", *LAYOUTS[1:]) for _ in shapes],
        [draw(st.integers(0, 15)) for _ in shapes],
        dtypes,
        dtypes if layer == "torch" else [one_of(*FORMATS) for _ in shapes],
        [often(False, True) for _ in shapes],
        one_of(False, True), steps,
        [often("none", "option", "overlap", "shape") for _ in steps],
        one_of(False, True), draw(st.integers(0, 2**32 - 1)),
    )  # fmt: skip


@dataclass
class Arena:
    """One allocation of guard bytes with arrays in it, some of whose elements lie apart."""

    rng: np.random.Generator
    raw: bool
    size: int
    at: int = 64

    def __post_init__(self):
        self.memory = np.full(self.size, GUARD, np.uint8)
        self.inside = np.zeros(self.size, np.uint8)

    def array(self, shape, dtype, layout="plain", offset=0):
        dtype = as_dtype(dtype)
        size = dtype.itemsize
        word = np.dtype(f"u{size}")
        strided = layout == "every other" and len(shape) > 0
        outer = (*shape[:-1], 2 * shape[-1]) if strided else shape
        if layout == "transposed":
            outer = shape[::-1]
        begin = -(-self.at // 64) * 64 + offset * size
        end = begin + int(np.prod(outer)) * size
        self.at = end + 64
        assert self.at <= self.memory.size

        def view(memory):
            found = memory[begin:end].view(word).reshape(outer)
            return found[..., ::2] if strided else found.T if layout == "transposed" else found

        view(self.inside)[...] = np.iinfo(word).max
        found = view(self.memory)
        if self.raw:
            bits = self.rng.integers(0, np.iinfo(word).max, shape, word, endpoint=True)
        else:
            numbers = self.rng.standard_normal(shape) * 2.0 ** self.rng.integers(-3, 3, shape)
            bits = np.asarray(numbers).astype(dtype).view(word)
        found[...] = bits
        return found.view(dtype)

    def check(self):
        assert np.all(self.memory[self.inside == 0] == GUARD), "bytes outside arrays were written"


def as_tensor(array):
    if array.dtype == as_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def leaves(found, path=""):
    """What a state_dict holds, by place: arrays as NumPy's, and numbers."""
    if isinstance(found, dict):
        for key, value in found.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(found, list | tuple):
        yield from leaves(dict(enumerate(found)), path)
    elif isinstance(found, torch.Tensor):
        wide = found.detach().to(torch.float64 if found.is_floating_point() else found.dtype)
        yield path, wide.numpy().copy()
    elif isinstance(found, np.ndarray):
        yield path, found.astype(np.float64) if found.dtype.kind == "V" else found.copy()
    else:
        yield path, found


class Run:
    """A case's steps by one set and number of threads."""

    def __init__(self, case):
        self.case = case
        size = 1 << (24 if LARGE in case.shapes else 19)
        self.arena = Arena(np.random.default_rng(case.seed), case.raw, size)
        make = self.arena.array
        places = list(zip(case.shapes, case.layouts, case.offsets, strict=True))
        self.params = [
            make(s, d, lay, o) for (s, lay, o), d in zip(places, case.dtypes, strict=True)
        ]
        self.grads = [make(s, d, lay, o) for (s, lay, o), d in zip(places, case.grads, strict=True)]
        self.shadows = [
            [make(s, step["shadow"], "plain", o) for s, _, o in places] if step["shadow"] else None
            for step in case.steps
        ]
        self.refused = []  # what raised
        self.elements = 0

    def attempt(self, call, opt=None):
        """Calls, and where that raises makes sure that nothing has changed."""
        before = self.arena.memory.copy()
        state = list(leaves(opt.state_dict())) if opt else []
        try:
            return call()
        except REFUSALS as error:
            self.refused.append(f"{type(error).__name__}: {error}")
        assert np.array_equal(self.arena.memory, before), "a call that raised has written"
        assert_same(state, list(leaves(opt.state_dict())) if opt else [])
        return None

    def step(self):
        case = self.case
        groups = {}
        if case.layer == "torch":
            there = [torch.nn.Parameter(as_tensor(p)) for p in self.params]
            given = (
                [{"params": there[:1], "lr": 0.25}, {"params": there[1:]}] if case.group else there
            )
            make = getattr(ft, case.name)
        else:
            given = {f"{'ab'[i > 0]}{i}": p for i, p in enumerate(self.params)}
            groups = {"groups": [fs.Group("a*", lr=0.25)]} if case.group else {}
            make = getattr(fs, case.name)
        opt = self.attempt(lambda: make(given, **case.hypers, **case.how, **groups))
        if opt is None:
            return
        for number, (options, fault) in enumerate(zip(case.steps, case.faults, strict=True)):
            self.one_step(opt, given, number, dict(options), fault)
        self.states = list(leaves(opt.state_dict(state_dtype="float32")))

    def one_step(self, opt, given, number, options, fault):
        case = self.case
        shadow, grads = self.shadows[number], self.grads
        if fault == "option":
            options["clip_value"] = -1.0
        if fault == "overlap":
            shadow = list(self.params)
        if fault == "shape" and case.layer == "neutral":
            grads = [np.ones(3 + g.size, g.dtype) for g in grads]
        grads = [None if gone else g for g, gone in zip(grads, case.absent, strict=True)]
        if case.layer == "torch":
            params = [p for group in opt.param_groups for p in group["params"]]
            for p, g in zip(params, grads, strict=True):
                p.grad = None if g is None else as_tensor(g)
            options["shadow"] = shadow and [as_tensor(s) for s in shadow]
            arguments = ()
        else:
            options["shadow"] = shadow and dict(zip(given, shadow, strict=True))
            arguments = (dict(zip(given, grads, strict=True)),)
        before = [g.tobytes() for g in self.grads]
        refusals = len(self.refused)
        self.attempt(lambda: opt.step(*arguments, **options), opt)
        if len(self.refused) == refusals:
            assert fault != "option"
            self.elements += sum(g.size for g in grads if g is not None)
        for g, old in zip(self.grads, before, strict=True):
            new = g.tobytes()
            assert new == old or (options["zero_grad"] and not any(new)), "a gradient was written"


def assert_same(wanted, found):
    assert [key for key, _ in wanted] == [key for key, _ in found]
    for (key, a), (_, b) in zip(wanted, found, strict=True):
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, key
            assert same_numbers(a, b) if a.dtype.kind in "fV" else np.array_equal(a, b), key
        else:
            assert a == b or a != a, key  # NaN


def finish(case, isa, threads):
    fs.set_isa(isa)
    fs.set_num_threads(threads)
    run = Run(case)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # casts of arbitrary numbers
        run.step()
        run.arena.check()
    return run


def check(case):
    wanted = finish(case, "scalar", 1)
    for isa in fs.usable_isas():
        for threads in (1, 3):
            run = finish(case, isa, threads)
            assert run.refused == wanted.refused
            arrays = zip(run.params, wanted.params, strict=True)
            assert all(same_numbers(a, b) for a, b in arrays), f"parameters, {isa}"
            for mine, theirs in zip(run.shadows, wanted.shadows, strict=True):
                pairs = zip(mine or [], theirs or [], strict=True)
                assert all(same_numbers(a, b) for a, b in pairs), f"shadows, {isa}"
            if hasattr(wanted, "states"):
                assert_same(wanted.states, run.states)
    return wanted


def test_any_call_has_the_same_bits_everywhere_or_changes_nothing():
    runs = []

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=EXAMPLES < 1000,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases())
    def each(case):
        runs.append(check(case))

    each()
    elements, refused = sum(run.elements for run in runs), sum(len(run.refused) for run in runs)
    print(f"{len(runs)} examples, {elements} elements stepped by each set, {refused} refusals")
    assert elements > 0
    assert sum(run.elements > 0 for run in runs) > len(runs) / 4  # most are no refusals
