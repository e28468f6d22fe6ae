"""The gradients' sum of squares: the bits of its defined order, for every set, thread and layout.

The order: a tensor's blocks of 512 elements, each in sixteen partial sums, in double, each with
fma(x, x, s); lanes, then the tensor's blocks, in a binary tree; then, in another, the tensors that
have elements. `lane_sums` and `emulated` are that.
"""

import functools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest

import fusedstep as fs
from cases import FORMATS
from fusedstep import _core
from fusedstep._arrays import as_dtype

LANES, BLOCK = 16, 512
ALONE = 256 * BLOCK  # elements up to which one thread works alone
DTYPES = FORMATS
LENGTHS = [0, 1, 15, 16, 17, 511, 512, 513, 1023, 1025, 70_000]
# More than ALONE, and no multiple of a piece, a block or a row.
LONG = 2 * ALONE + 3 * BLOCK + 21
GUARD = 3  # elements beside a view

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


# -- the defined order, emulated ------------------------------------------------------------------


def exact_fma(x, s):
    """x*x + s in rational numbers, rounded once."""
    try:
        return float(Fraction(x) * Fraction(x) + Fraction(s))  # int / int rounds correctly
    except OverflowError:  # beyond float64, or s is infinite
        return math.inf


def squares_in_double(rows, sums):
    """fma in NumPy: the square of a float32 or narrower is exact in double."""
    return sums + rows * rows


def squares_exactly(rows, sums):
    return np.array([exact_fma(float(x), float(s)) for x, s in zip(rows, sums, strict=True)])


def lane_sums(values, fma):
    """The sum of one block of at most 512 float64 values."""
    padded = np.zeros(-(-len(values) // LANES) * LANES)
    padded[: len(values)] = values
    sums = np.zeros(LANES)
    for row in padded.reshape(-1, LANES):
        sums = fma(row, sums)
    while len(sums) > 1:
        half = len(sums) // 2
        sums = sums[:half] + sums[half:]
    return sums[0]


def block_sums(array):
    fma = squares_exactly if array.dtype == np.float64 else squares_in_double
    values = array.astype(np.float64)
    return [lane_sums(values[i : i + BLOCK], fma) for i in range(0, len(values), BLOCK)]


def tree(sums):
    size = 1
    while size < len(sums):
        size *= 2
    level = np.zeros(size)
    level[: len(sums)] = sums
    while len(level) > 1:
        level = level[0::2] + level[1::2]
    return float(level[0])


def emulated(*arrays):
    return tree([tree(block_sums(array)) for array in arrays if array.size])


# -- data and comparison --------------------------------------------------------------------------


@functools.cache
def data(dtype, n):
    """Numbers of many magnitudes, so that another order of additions has other bits."""
    rng = np.random.default_rng(n + 1)
    # A narrow type's squares have few digits: they need many magnitudes to be rounded when added.
    low, high = {"bfloat16": (-20, 20), "float16": (-13, 11)}.get(dtype, (-8, 4))
    values = rng.standard_normal(n) * 2.0 ** rng.uniform(low, high, n)
    array = values.astype(as_dtype(dtype))
    array.setflags(write=False)
    return array


@functools.cache
def expected(dtype, n):
    return emulated(data(dtype, n))


def bits(x):
    return struct.pack("<d", x)


def assert_same(got, sum, finite=True):
    assert (got[0].hex(), got[1]) == (float(sum).hex(), finite)
    assert bits(got[0]) == bits(sum)  # the sign of zero too


def squared(*arrays):
    return _core.sum_of_squares(list(arrays))


# -- the emulation itself -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_emulation_in_double_is_the_exact_one(dtype):
    values = data(dtype, 70_000)[:1600].astype(np.float64)
    tiny = np.full(16, np.finfo(np.float32).smallest_subnormal, np.float64)
    values = np.concatenate([values, tiny, np.full(16, np.finfo(np.float32).max, np.float64)])
    sums = np.zeros(LANES)
    for row in values.reshape(-1, LANES):
        after = squares_in_double(row, sums)
        assert np.array_equal(after, squares_exactly(row, sums))
        sums = after


def test_emulation_tells_orders_apart():
    # Were the data too tame, every order would have the same bits and these tests no teeth.
    for dtype in DTYPES:
        array = data(dtype, 70_000)
        plain = float(np.cumsum(array.astype(np.float64) ** 2)[-1])
        assert expected(dtype, 70_000) != plain
        assert expected(dtype, 70_000) == pytest.approx(plain, rel=1e-12)
        permuted = block_sums(array.reshape(-1, 4, 4).swapaxes(1, 2).reshape(-1))
        differ = sum(a != b for a, b in zip(blocks_of(dtype, 70_000), permuted, strict=True))
        assert differ > len(permuted) // 4


# -- one tensor ------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("n", LENGTHS)
def test_sum_has_the_bits_of_its_defined_order(n, dtype, isa):
    assert_same(squared(data(dtype, n)), expected(dtype, n))


@each_dtype
@pytest.mark.parametrize("n", [1, 17, 513, 70_000])
def test_sum_is_the_exact_one_to_a_few_roundings(n, dtype, isa):
    # Independent of any order: 32 additions per lane and a tree of 4 + 8 levels round up.
    exact = sum((Fraction(x) ** 2 for x in data(dtype, n).astype(np.float64).tolist()), Fraction())
    got, finite = squared(data(dtype, n))
    assert finite
    assert abs(Fraction(got) - exact) <= 44 * Fraction(1, 2**53) * exact


@pytest.mark.parametrize("isa", fs.usable_isas(), indirect=True)
@each_dtype
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads, dtype, isa):
    fs.set_num_threads(threads)
    array = np.resize(data(dtype, 70_000), LONG)
    assert_same(squared(array), expected_long(dtype))


@functools.cache
def expected_long(dtype):
    return emulated(np.resize(data(dtype, 70_000), LONG))


@pytest.mark.parametrize("blocks", [255, 256, 257, 320, 321, 383, 384, 511, 512, 513])
@pytest.mark.parametrize("threads", [1, 3])
def test_tree_over_any_number_of_blocks(threads, blocks):
    # Around the sizes at which a second thread sets in, and whole and broken pieces of 64 blocks.
    fs.set_num_threads(threads)
    array = np.resize(data("float32", 70_000), blocks * BLOCK - 5)
    assert_same(squared(array), emulated(array))


@each_dtype
@pytest.mark.parametrize("n", [1, 15, 16, 17, 511, 512, 513, 1025])
@pytest.mark.parametrize("offset", range(1, 9))
def test_unaligned_view_has_the_same_bits_and_its_neighbours_are_not_read(offset, n, dtype, isa):
    array = data(dtype, n)
    memory = np.full(n + offset + GUARD, np.nan, array.dtype)
    memory[offset : offset + n] = array
    assert_same(squared(memory[offset : offset + n]), expected(dtype, n))


@each_dtype
def test_sign_changes_nothing(dtype, isa):
    array = data(dtype, 1025)
    assert_same(squared(-array), expected(dtype, 1025))
    assert_same(squared(np.full(17, -0.0, array.dtype)), 0.0)


# -- many tensors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tensors_are_summed_one_by_one_and_then_their_sums(threads, isa):
    fs.set_num_threads(threads)
    kinds = [(dtype, n) for n in LENGTHS for dtype in DTYPES]
    assert sum(-(-n // BLOCK) for _, n in kinds) > 2 * 256  # threads share it, and tensors, out
    arrays = [data(*kind) for kind in kinds]
    assert_same(squared(*arrays), tree([expected(*kind) for kind in kinds if kind[1]]))
    # One tree over all blocks, as if there were no tensors, would have other bits.
    assert squared(*arrays)[0] != tree([s for kind in kinds for s in blocks_of(*kind)])


@functools.cache
def blocks_of(dtype, n):
    return block_sums(data(dtype, n))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_thousand_small_tensors(threads, isa):
    # More tensors than blocks in a piece, empty ones among them, first and last too.
    fs.set_num_threads(threads)
    lengths = [0, 0] + [(7 * i) % 23 for i in range(1000)] + [0]
    arrays = [data("float32", n) for n in lengths]
    assert lengths.count(0) > 20
    assert_same(squared(*arrays), tree([expected("float32", n) for n in lengths if n]))


@each_dtype
def test_flat_buffer_and_tensors_of_subtrees_agree(dtype, isa):
    flat = np.resize(data(dtype, 70_000), 256 * BLOCK)
    parts = flat.reshape(4, -1)
    assert_same(squared(*parts), squared(flat)[0])


def test_order_of_tensors_is_the_caller_s(isa):
    one, small = np.ones(1), np.full(1, 1.25 * 2.0**-27)  # whose square is below half an ulp of 1
    assert_same(squared(one, small, small), 1.0)
    assert_same(squared(small, small, one), 1 + 2.0**-52)
    assert_same(squared(small, one, small), 1.0)


@pytest.mark.parametrize("tensors", [0, 1, 3])
def test_nothing_sums_to_zero(tensors, isa):
    assert_same(squared(*[np.zeros(0, np.float32)] * tensors), 0.0)


# -- non-finite elements --------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_element_is_seen_wherever_it_is(bad, dtype, isa):
    n = 2 * BLOCK + 3 * LANES + 5
    array = data(dtype, n).copy()
    assert squared(array)[1]
    # Each lane of a first, a middle and a last row of whole blocks, of the last block's whole rows,
    # and each element of its broken row.
    rows = [0, 15, 31, 32, 63, 64, 66]
    for at in [row * LANES + lane for row in rows for lane in range(LANES)] + list(range(n - 5, n)):
        before, array[at] = array[at], bad
        total, finite = squared(array)
        array[at] = before
        assert not finite, at
        assert math.isnan(total) if math.isnan(bad) else total == math.inf, at
    assert squared(array)[1]


@each_dtype
@pytest.mark.parametrize("threads", [1, 2])
def test_non_finite_element_is_seen_in_any_piece_and_tensor(threads, dtype, isa):
    fs.set_num_threads(threads)
    array = np.resize(data(dtype, 70_000), LONG)
    for at in (0, ALONE - 1, ALONE, LONG // 2, LONG - 1):
        before, array[at] = array[at], np.nan
        assert not squared(array)[1], at
        array[at] = before
    good, bad = data(dtype, 513), np.array([np.inf], array.dtype)
    for arrays in ([bad, good, good], [good, bad, good], [good, good, bad]):
        assert squared(*arrays) == (math.inf, False)


@pytest.mark.parametrize("n", [1, 16, 17, 513])
def test_float64_squares_may_overflow_while_the_elements_are_finite(n, isa):
    for value in (1e200, -1e200, np.finfo(np.float64).max):
        assert squared(np.full(n, value)) == (math.inf, True)
    array = np.full(n, 1e200)
    array[-1] = np.inf
    assert squared(array) == (math.inf, False)
    array[-1] = np.nan
    assert not squared(array)[1]


def test_float64_sums_may_overflow_between_blocks_and_lanes(isa):
    large = 2.0**511.25  # two of its squares are finite, three are not
    assert squared(np.array([large, large]))[0] < math.inf
    assert squared(np.full(3, large)) == (math.inf, True)
    assert squared(*[np.array([large])] * 3) == (math.inf, True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_largest_elements_do_not_overflow(dtype, isa):
    largest = {"float32": 0x7F7FFFFF, "bfloat16": 0x7F7F, "float16": 0x7BFF}[dtype]
    kind = np.uint32 if dtype == "float32" else np.uint16
    array = np.full(70_000, largest, kind).view(as_dtype(dtype))
    assert_same(squared(array), emulated(array))


# -- denormals ------------------------------------------------------------------------------------


@each_dtype
def test_denormals_count(dtype, isa):
    kind = {"float32": np.uint32, "float64": np.uint64}.get(dtype, np.uint16)
    fraction = {"float32": 23, "float64": 52, "bfloat16": 7, "float16": 10}[dtype]
    rng = np.random.default_rng(3)
    patterns = rng.integers(0, 1 << fraction, 1025).astype(kind)
    patterns[0] = 1  # the smallest, alone in the last block as well
    patterns[-1] = 1
    array = patterns.view(as_dtype(dtype))
    assert_same(squared(array), emulated(array))
    if dtype != "float64":  # whose denormals' squares are less than any double
        assert squared(array)[0] > 0
        assert squared(array[:1])[0] == float(array[0]) ** 2 > 0


@pytest.mark.parametrize("exponent", [-511, -530, -536, -537, -538])
def test_float64_squares_that_are_denormal_round_once(exponent, isa):
    array = data("float64", 513) * 2.0**exponent
    assert_same(squared(array), emulated(array))


@each_dtype
def test_flushed_denormals_change_nothing(dtype, isa):
    torch = pytest.importorskip("torch")
    kind = np.uint32 if dtype == "float32" else np.uint16
    smallest = np.ones(17, kind)
    array = np.full(17, 2.0**-530) if dtype == "float64" else smallest.view(as_dtype(dtype))
    assert torch.set_flush_denormal(True)
    try:
        got = squared(array)
    finally:
        torch.set_flush_denormal(False)
    assert_same(got, emulated(array))
    assert got[0] > 0


# -- what is accepted -----------------------------------------------------------------------------


def test_gradients_of_other_exporters(isa):
    torch = pytest.importorskip("torch")
    array = data("float32", 1025)
    tensor = torch.tensor(array)
    assert_same(squared(tensor), expected("float32", 1025))
    half = tensor.to(torch.bfloat16)
    assert_same(squared(half), emulated(half.float().numpy()))


def test_gradients_that_cannot_be_read_are_named():
    good = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"grads\[1\] must be C-contiguous"):
        squared(good, good[::2])
    with pytest.raises(TypeError, match=r"grads\[0\] must be float32, float64, bfloat16 or"):
        squared(np.ones(4, np.int32), good)
    with pytest.raises(TypeError, match=r"grads\[1\] must be a NumPy array"):
        squared(good, [1.0])
