"""Bit-identity: one result for every instruction set, thread count, alignment and layout.

The yardstick is the scalar set on one thread over separate, aligned arrays. What it computes is
test_reference.py's business.
"""

import contextlib
import functools
import itertools
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs
from cases import each_case, each_case_in_turn, make
from fusedstep import _core
from fusedstep._arrays import as_dtype

# Below, at and above one register and one block; the last is more than four of the pieces that
# threads take (32768 elements), so that pieces begin and end inside of it and of its neighbours.
LENGTHS = [0, 1, 15, 16, 17, 1023, 1024, 1025, 140003]
STARTS = np.cumsum([0, *LENGTHS])
STEPS = 3
LANES = {"scalar": 1, "avx2": 8, "avx512": 16, "neon": 4}
GUARD = 0x5A  # the byte around unaligned views


@functools.cache
def streams(param, grad):
    """The parameters and each step's gradients, end to end; no zeros, which make NaN of eps=0."""
    rng = np.random.default_rng(7)

    def draw(dtype):
        sign = rng.choice([-1.0, 1.0], STARTS[-1])
        return (sign * rng.uniform(0.1, 2, STARTS[-1])).astype(as_dtype(dtype))

    return draw(param), [draw(grad) for _ in range(STEPS)]


def split(flat):
    return [flat[a:b] for a, b in itertools.pairwise(STARTS)]


def contents(opt, params):
    """Every byte that a step may write: parameters, states, and the numbers beside them."""
    entries = opt.state_dict()["state"].values()
    arrays = {"params": params}
    numbers = []
    for entry in entries:
        for key, value in entry.items():
            if isinstance(value, np.ndarray):
                arrays.setdefault(key, []).append(value)
            else:
                numbers.append((key, value))
    joined = {key: np.concatenate(parts).view(np.uint8) for key, parts in arrays.items()}
    return joined, sorted(set(numbers))


@functools.lru_cache(maxsize=2)  # the sets of one case follow each other
def yardstick(name, hypers, param, grad):
    before = fs.isa(), fs.num_threads()
    fs.set_isa("scalar")
    fs.set_num_threads(1)
    start, grads = streams(param, grad)
    params = fs.FlatBuffer.zeros(LENGTHS, param)  # only for its aligned arrays
    for array, values in zip(params.values(), split(start), strict=True):
        array[...] = values
    params = list(params.values())
    opt = make(name, params, dict(hypers))
    for g in grads:
        opt.step(split(g))
    fs.set_isa(before[0])
    fs.set_num_threads(before[1])
    return contents(opt, params)


class Guarded:
    """Views at odd offsets of one allocation, with guard bytes before, between and behind them."""

    def __init__(self, lengths, dtype):
        dtype = as_dtype(dtype)
        size = sum(lengths) + 3 * len(lengths) + 1
        self.memory = np.full(size * dtype.itemsize, GUARD, np.uint8)
        elements = self.memory.view(dtype)
        self.inside = np.zeros(size, bool)
        self.views = []
        at = 1
        for n in lengths:
            self.views.append(elements[at : at + n])
            self.inside[at : at + n] = True
            at += n + 1
            at += 1 - at % 2
        self.inside = np.repeat(self.inside, dtype.itemsize)

    def fill(self, flat):
        at = 0
        for view in self.views:
            view[...] = flat[at : at + view.size]
            at += view.size

    def check(self):
        assert np.all(self.memory[~self.inside] == GUARD), "bytes beside a view were written"


def run_arrays(name, hypers, param, grad):
    start, steps = streams(param, grad)
    params = [array.copy() for array in split(start)]
    opt = make(name, params, hypers)
    for g in steps:
        opt.step(split(g))
    return contents(opt, params)


@functools.cache
def guarded_grads(lengths, param, grad):
    """Each step's gradients, and a copy of their memory to see that nobody writes there."""
    made = [Guarded(lengths, grad) for _ in range(STEPS)]
    for guarded, g in zip(made, streams(param, grad)[1], strict=True):
        guarded.fill(g)
    return [(guarded, guarded.memory.copy()) for guarded in made]


def run_guarded(lengths, name, hypers, param, grad):
    params = Guarded(lengths, param)
    params.fill(streams(param, grad)[0])
    opt = make(name, params.views, hypers)
    for grads, before in guarded_grads(lengths, param, grad):
        opt.step(grads.views)
        assert np.array_equal(grads.memory, before), "gradients were written"
    params.check()
    return contents(opt, params.views)


@functools.cache
def buffers(param, grad):
    """The parameters, each step's gradients, and where the gaps between the arrays are."""
    start, steps = streams(param, grad)
    params = fs.FlatBuffer.pack(split(start))
    gaps = np.ones(params.flat.size, bool)
    for array in params.values():
        begin = (array.ctypes.data - params.flat.ctypes.data) // array.itemsize
        gaps[begin : begin + array.size] = False
    assert gaps.any()
    made = []
    for g in steps:
        grads = params.zeros_like(grad)
        for array, values in zip(grads.values(), split(g), strict=True):
            array[...] = values
        grads.flat[gaps] = 1  # read or not, what is in a gradient's gaps must reach nothing
        made.append(grads)
    return params, made, gaps


def run_buffer(name, hypers, param, grad):
    start, steps, gaps = buffers(param, grad)
    params = start.copy()
    opt = make(name, params, hypers)
    for grads in steps:
        opt.step(grads)
    assert not params.flat.view(np.uint8).reshape(gaps.size, -1)[gaps].any(), "gaps were written"
    for key, state in opt.state[0].items():
        whole = state.base.view(state.dtype)  # the allocation of all states of this name
        assert whole.shape == gaps.shape
        assert not whole[gaps].any(), f"gaps between {key} were written"
    return contents(opt, list(params.values()))


LAYOUTS = {
    "separate arrays": run_arrays,
    "unaligned views": functools.partial(run_guarded, tuple(LENGTHS)),
    "one unaligned array": functools.partial(run_guarded, (sum(LENGTHS),)),
    "FlatBuffer": run_buffer,
}


@pytest.mark.parametrize("isa", fs.usable_isas(), indirect=True)  # innermost, for the cache
@each_case_in_turn()
def test_step_bits_are_the_same_everywhere(name, hypers, param, grad, isa):
    assert fs.isa() == isa
    assert _core.lanes() == LANES[isa]
    want, numbers = yardstick(name, tuple(hypers.items()), param, grad)
    for threads in (1, 3):
        fs.set_num_threads(threads)
        assert fs.num_threads() == threads
        for layout, run in LAYOUTS.items():
            got, got_numbers = run(name, hypers, param, grad)
            for key, value in want.items():
                assert np.array_equal(got[key], value), f"{key} on {threads} threads, {layout}"
            assert got.keys() == want.keys()
            assert got_numbers == numbers


@each_case()
def test_step_bits_do_not_depend_on_what_groups_and_counts_lie_between(name, hypers):
    """Tensors of one group and count share scalars; each is what it would be alone."""
    start, steps = streams("float32", "float32")
    rates = {"a": 0.25, "b": 0.5, "c": 0.125}

    def run(keys):
        params = {key: start[: 40 + int(key[1:])].copy() for key in keys}
        groups = [fs.Group(f"{c}*", lr=rates[c]) for c in sorted({key[0] for key in keys})]
        opt = make(name, params, {**hypers, "groups": groups})
        for k, g in enumerate(steps * 2):
            there = [key for key in keys if (k + int(key[1:])) % 4]
            opt.step({key: g[: p.size] if key in there else None for key, p in params.items()})
        return [[p, *opt.state.get(key, {}).values()] for key, p in params.items()]

    keys = [f"{'abc'[i % 3]}{i}" for i in range(24)]
    for key, together in zip(keys, run(keys), strict=True):
        for a, b in zip(together, *run([key]), strict=True):
            np.testing.assert_array_equal(
                np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
            )


def available_bytes():
    """Memory to be had without swapping, or 0 where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    except OSError:
        return 0
    limits = [found.get("MemAvailable", 0)]
    for path in ("memory.max", "memory/memory.limit_in_bytes"):  # a container's, cgroup v2 and v1
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", path).read_text()))
    return min(limits)


@pytest.mark.skipif(available_bytes() < 12 << 30, reason="needs 12 GiB of free memory")
def test_step_indexes_beyond_32_bits():
    n = (1 << 31) + 12345
    params, grads = fs.FlatBuffer.zeros([n], "bfloat16"), fs.FlatBuffer.zeros([n], "bfloat16")
    p, g = params[0], grads[0]
    marks = np.array([0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, n - 2, n - 1])
    p[marks] = np.arange(1, 8)
    g[marks] = 2
    opt = fs.SGD(params, lr=0.5)
    assert opt.step(grads).elements == n
    assert p[marks].astype("f4").tolist() == [0, 1, 2, 3, 4, 5, 6]
    bits = params.flat.view(np.uint64)  # zeros stay zeros: nothing but the marks was written
    touched = np.unique(marks[1:] // 4)  # marks[0] has become 0
    assert np.count_nonzero(bits) == touched.size
