"""FlatBuffer: packing, layout, access by name, huge pages, a caller's memory, copies, pickles."""

import copy
import pickle
import sys
from math import prod

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusedstep as fs
from cases import FORMATS
from fusedstep import _core
from fusedstep._arrays import as_dtype
from optional import optional

torch = optional("torch")

DTYPES = FORMATS
SHAPES = {"w": (3, 5), "b": (5,), "scale": (), "none": (0,), "hollow": (4, 0, 2), "one": (1,)}
MIB = 1 << 20


def numpy_dtype(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def filled(shapes=SHAPES, dtype="float32"):
    rng = np.random.default_rng(0)
    values = {key: rng.standard_normal(shape) for key, shape in shapes.items()}
    return {key: np.asarray(value).astype(numpy_dtype(dtype)) for key, value in values.items()}


def address(array):
    return array.__array_interface__["data"][0]


def memory(n, dtype="float32", off=0):
    """A 1-D array of n elements that starts `off` elements after a 64-byte boundary."""
    itemsize = numpy_dtype(dtype).itemsize
    raw = np.zeros(n * itemsize + 128, np.uint8)
    start = -address(raw) % 64 + off * itemsize
    return raw[start : start + n * itemsize].view(numpy_dtype(dtype))


class Exporter:
    """Memory that is reachable through DLPack alone."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **keywords):
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


# -- pack -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_dict_keeps_names_shapes_values_and_dtype(dtype):
    arrays = filled(dtype=dtype)
    buffer = fs.FlatBuffer.pack(arrays)
    assert list(buffer) == list(arrays)
    assert buffer.dtype == numpy_dtype(dtype)
    for name, array in arrays.items():
        assert buffer[name].shape == array.shape
        assert buffer[name].dtype == array.dtype
        assert buffer[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("sequence", [list, tuple, iter])
def test_pack_sequence_numbers_from_0(sequence):
    arrays = list(filled().values())
    buffer = fs.FlatBuffer.pack(sequence(arrays))
    assert list(buffer) == list(range(len(arrays)))
    assert all(np.array_equal(buffer[i], array) for i, array in enumerate(arrays))


def test_pack_copies():
    array = np.ones(3, np.float32)
    buffer = fs.FlatBuffer.pack([array])
    array[:] = 7
    assert buffer[0].tolist() == [1, 1, 1]
    buffer[0][:] = 5
    assert array.tolist() == [7, 7, 7]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_pack_torch_tensors_keeps_bits(dtype, requires_grad):
    tensor = torch.linspace(-2, 2, 12).to(getattr(torch, dtype)).reshape(3, 4)
    tensor.requires_grad_(requires_grad)
    buffer = fs.FlatBuffer.pack({"t": tensor})
    assert buffer.dtype == numpy_dtype(dtype)
    bits = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    assert buffer["t"].tobytes() == bits


def test_pack_dlpack_exporter():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    buffer = fs.FlatBuffer.pack([Exporter(array)])
    assert np.array_equal(buffer[0], array)
    assert not np.shares_memory(buffer[0], array)


def test_pack_takes_strided_and_read_only_arrays():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    fixed = np.broadcast_to(np.float32(2), (2, 2))
    buffer = fs.FlatBuffer.pack({"t": array.T, "s": array[:, ::2], "f": fixed})
    assert np.array_equal(buffer["t"], array.T)
    assert np.array_equal(buffer["s"], array[:, ::2])
    assert np.array_equal(buffer["f"], fixed)


def test_pack_mixed_dtypes_refused_naming_them():
    arrays = {"w": np.zeros(2, np.float32), "b": np.zeros(2, np.float64)}
    with pytest.raises(TypeError, match=r"one dtype.*w: float32, b: float64"):
        fs.FlatBuffer.pack(arrays)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pack_dtype_converts(dtype):
    arrays = {"a": np.array([1.5, -0.1]), "b": np.array([1 / 3], np.float32), "i": np.arange(3)}
    buffer = fs.FlatBuffer.pack(arrays, dtype=dtype)
    for name, array in arrays.items():
        assert np.array_equal(buffer[name], array.astype(numpy_dtype(dtype)))


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        (np.zeros(3, np.float32), "arrays"),
        ([[1.0, 2.0]], r"arrays\[0\]"),
        ({"a": 3.0}, r"arrays\[a\]"),
        ({"a": None}, r"arrays\[a\]"),
        ("ab", r"arrays\[0\]"),
        ([np.arange(3)], "int64"),
        ([np.zeros(2, np.complex64)], "complex64"),
    ],
)
def test_pack_refuses_what_is_no_list_of_supported_arrays(arrays, named):
    with pytest.raises(TypeError, match=named):
        fs.FlatBuffer.pack(arrays)


def test_pack_refuses_a_tensor_alone():
    with pytest.raises(TypeError, match="arrays"):
        fs.FlatBuffer.pack(torch.zeros(3))


@pytest.mark.parametrize("dtype", ["int32", "complex64", "float128", "nonsense", np.bool_])
def test_dtype_unsupported_is_a_type_error(dtype):
    with pytest.raises(TypeError):
        fs.FlatBuffer.zeros([2], dtype)


def test_dtype_foreign_byte_order_is_refused():
    # No kernel takes it, so such a buffer could only disappoint later.
    swapped = np.dtype(np.float32).newbyteorder()
    with pytest.raises((TypeError, ValueError), match=r"byte order|native|[<>]f4"):
        fs.FlatBuffer.zeros([2], swapped)
    with pytest.raises((TypeError, ValueError), match=r"byte order|native|[<>]f4"):
        fs.FlatBuffer.over(memory(64).view(swapped), [(2,)])


def test_pack_without_bfloat16_support_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # import fails, as where it is missing
    with pytest.raises(ModuleNotFoundError, match=r"fusedstep\[bfloat16\]"):
        fs.FlatBuffer.zeros([2], "bfloat16")


# -- layout ---------------------------------------------------------------------------------------


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), max_size=8),
    dtype=st.sampled_from(DTYPES),
)
def test_layout_segments_are_aligned_ordered_disjoint_and_padded_with_zeros(shapes, dtype):
    buffer = fs.FlatBuffer.zeros(shapes, dtype)
    flat = buffer.flat.view(np.uint8)
    base, end, covered = address(flat), 0, np.zeros(flat.size, bool)
    for i, shape in enumerate(shapes):
        view = buffer[i]
        assert view.shape == shape
        assert view.flags.c_contiguous
        if not view.size:
            continue
        view[...] = 1
        start = address(view) - base
        assert (base + start) % 64 == 0
        assert start >= end
        end = start + view.nbytes
        covered[start:end] = True
    assert end <= flat.size
    assert not flat[~covered].any()
    assert buffer.n == sum(map(prod, shapes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_layout_is_the_same_under_every_dtype(dtype):
    # A parameter's states and gradients sit at its own offsets, whatever their type.
    buffer = fs.FlatBuffer.pack(filled())
    other = buffer.zeros_like(dtype)

    def offsets(b):
        starts = [address(view) - address(b.flat) for view in b.values() if view.size]
        return [start // b.dtype.itemsize for start in starts]

    assert offsets(buffer) == offsets(other)


def test_views_share_the_flat_memory():
    buffer = fs.FlatBuffer.pack(filled())
    buffer.flat[:] = 3
    assert all((view == 3).all() for view in buffer.values())
    buffer["b"][2] = 9
    assert (buffer.flat == 9).sum() == 1
    assert buffer["w"] is buffer["w"]
    assert all(np.shares_memory(buffer.flat, view) for view in buffer.values() if view.size)


def test_n_and_nbytes_count_elements_and_the_whole_memory():
    buffer = fs.FlatBuffer.zeros({"w": (3, 5), "b": 5, "s": ()}, "float64")
    assert buffer.n == 21
    assert buffer.shapes == {"w": (3, 5), "b": (5,), "s": ()}
    assert buffer.nbytes == buffer.flat.nbytes == 8 * buffer.flat.size
    assert buffer.flat.size == fs.FlatBuffer.n_for(buffer.shapes) >= buffer.n
    assert buffer.flat.ndim == 1
    assert not buffer.flat.any()


@pytest.mark.parametrize("empty", [{}, [], {"a": (0,)}, [(0, 3)]])
def test_empty_buffer_is_fine(empty):
    buffer = fs.FlatBuffer.zeros(empty)
    assert (buffer.n, len(buffer)) == (0, len(empty))
    assert buffer.copy().n == buffer.zeros_like("float64").n == 0
    assert pickle.loads(pickle.dumps(buffer)).shapes == buffer.shapes


def test_pack_nothing_is_a_float32_buffer():
    assert fs.FlatBuffer.pack([]).dtype == np.float32


@pytest.mark.parametrize("shape", [-1, (2, -3), (2.5,), ("a",)])
def test_zeros_bad_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"shapes\[w\] must be integers >= 0, got"):
        fs.FlatBuffer.zeros({"w": shape})


@pytest.mark.parametrize("three", [3, np.int64(3), (3,), [3], (np.int32(3),)])
def test_zeros_takes_any_integer_as_a_length(three):
    assert fs.FlatBuffer.zeros([three])[0].shape == (3,)


def test_n_for_takes_a_buffer_as_over_does():
    buffer = fs.FlatBuffer.pack(filled())
    assert fs.FlatBuffer.n_for(buffer) == buffer.flat.size


# -- zeros_like and copy --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_zeros_like_has_names_shapes_and_no_values(dtype):
    buffer = fs.FlatBuffer.pack(filled())
    other = buffer.zeros_like(dtype)
    assert other.dtype == numpy_dtype(dtype or "float32")
    assert other.shapes == buffer.shapes
    assert list(other) == list(buffer)
    assert not other.flat.astype(np.float64).any()
    assert not np.shares_memory(other.flat, buffer.flat)


@pytest.mark.parametrize("duplicate", [fs.FlatBuffer.copy, copy.copy, copy.deepcopy])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copy_is_equal_and_apart(duplicate, dtype):
    buffer = fs.FlatBuffer.pack(filled(dtype=dtype))
    other = duplicate(buffer)
    assert other.flat.tobytes() == buffer.flat.tobytes()
    assert (other.dtype, other.shapes) == (buffer.dtype, buffer.shapes)
    assert address(other.flat) % 64 == 0
    other["w"][...] = 0
    assert buffer["w"].any()


def test_deepcopy_keeps_one_buffer_one():
    buffer = fs.FlatBuffer.pack(filled())
    first, second = copy.deepcopy([buffer, buffer])
    assert first is second


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", DTYPES)
def test_pickle_round_trip(protocol, dtype):
    buffer = fs.FlatBuffer.pack(filled(dtype=dtype))
    other = pickle.loads(pickle.dumps(buffer, protocol))
    assert list(other) == list(buffer)
    assert (other.dtype, other.shapes) == (buffer.dtype, buffer.shapes)
    assert other.flat.tobytes() == buffer.flat.tobytes()
    assert address(other.flat) % 64 == 0
    assert not np.shares_memory(other.flat, buffer.flat)
    assert np.shares_memory(other["w"], other.flat)


# -- access by name -------------------------------------------------------------------------------


def test_mapping_access():
    arrays = filled()
    buffer = fs.FlatBuffer.pack(arrays)
    assert list(buffer.keys()) == list(arrays)
    assert [key for key, _ in buffer.items()] == list(arrays)
    assert all(view is buffer[key] for key, view in buffer.items())
    assert len(buffer) == len(list(buffer.values())) == len(arrays)
    assert "w" in buffer
    assert "x" not in buffer
    assert 0 not in buffer
    assert buffer.get("x") is None


def test_unknown_name_is_a_key_error_that_lists_names():
    buffer = fs.FlatBuffer.pack(filled())
    with pytest.raises(KeyError, match=r"'x'.*'w'"):
        buffer["x"]
    with pytest.raises(KeyError, match=r"'x'.*'w'"):
        buffer["x"] = 1


def test_buffers_compare_by_identity_and_hash():
    # Comparing by value would return arrays, which have no truth value.
    buffer = fs.FlatBuffer.pack(filled())
    assert buffer == buffer
    assert buffer != buffer.copy()
    assert len({buffer, buffer.copy()}) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(6).reshape(2, 3),
        lambda: [[0, 1, 2], [3, 4, 5]],
        lambda: torch.arange(6.0).reshape(2, 3),
        lambda: torch.arange(6.0).reshape(2, 3).requires_grad_(),
        lambda: torch.arange(6.0).reshape(2, 3).bfloat16(),
    ],
    ids=["ints", "lists", "torch", "torch-leaf", "torch-bf16"],
)
def test_setitem_copies_values_of_the_view_s_shape(make):
    value = make()
    buffer = fs.FlatBuffer.zeros({"w": (2, 3), "b": (3,)})
    view = buffer["w"]
    buffer["w"] = value
    assert buffer["w"] is view
    assert view.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert not buffer["b"].any()


def test_setitem_scalar_fills():
    buffer = fs.FlatBuffer.zeros({"w": (2, 3), "b": (3,)})
    buffer["w"] = 2
    assert (buffer["w"] == 2).all()
    assert not buffer["b"].any()


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 2, 3), (6,), (1, 1)])
def test_setitem_other_shape_is_refused_and_writes_nothing(shape):
    # Broadcasting a row into a matrix is far more often a mistake than a wish.
    buffer = fs.FlatBuffer.zeros({"w": (2, 3)})
    with pytest.raises(ValueError, match=r"\[w\] must have shape \(2, 3\), got"):
        buffer["w"] = np.ones(shape)
    assert not buffer.flat.any()


def test_repr_tells_size_and_dtype():
    buffer = fs.FlatBuffer.zeros({"w": (2, 3), "b": (3,)}, "float16")
    assert repr(buffer) == f"FlatBuffer(2 arrays, 9 elements, float16, {buffer.nbytes} bytes)"


# -- huge pages -----------------------------------------------------------------------------------


def vm_flags(array):
    """The kernel's flags of the mapping that an array's middle lies in, or a skip."""
    at = address(array) + array.nbytes // 2
    try:
        with open("/proc/self/smaps") as file:
            lines = file.read().splitlines()
    except OSError:
        pytest.skip("no /proc/self/smaps: not Linux")
    inside = False
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):
            low, high = (int(x, 16) for x in words[0].split("-"))
            inside = low <= at < high
        elif inside and words[0] == "VmFlags:":
            return set(words[1:])
    pytest.skip("the kernel shows no VmFlags")


def needs_huge_pages():
    if fs.info()["huge_pages_system"] == "unavailable":
        pytest.skip("the kernel has no transparent huge pages")


@pytest.fixture(autouse=True)
def _huge_pages():
    before = fs.huge_pages()
    yield
    fs.set_huge_pages(before)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("way", ["argument", "setting"])
def test_huge_pages_are_asked_for_as_told(enabled, way):
    needs_huge_pages()
    fs.set_huge_pages(enabled if way == "setting" else not enabled)
    keyword = {} if way == "setting" else {"huge_pages": enabled}
    shapes = [(4 * MIB,)]
    packed = fs.FlatBuffer.pack([np.broadcast_to(np.float32(0), shapes[0])], **keyword)
    zeros = fs.FlatBuffer.zeros(shapes, **keyword)
    for buffer in (packed, zeros, zeros.copy(**keyword), zeros.zeros_like(**keyword)):
        flags = vm_flags(buffer.flat)
        assert ("hg" in flags) == enabled
        assert ("nh" in flags) == (not enabled)
        if enabled:
            assert address(buffer.flat) % (2 * MIB) == 0


def test_huge_pages_are_not_asked_for_small_buffers():
    needs_huge_pages()
    small = fs.FlatBuffer.zeros([(_core.HUGE_FROM // 4 - 32,)], huge_pages=True)
    large = fs.FlatBuffer.zeros([(_core.HUGE_FROM // 4,)], huge_pages=True)
    assert "hg" not in vm_flags(small.flat)
    assert "hg" in vm_flags(large.flat)


def test_huge_pages_are_granted_where_the_system_allows():
    if fs.info()["huge_pages_system"] not in ("always", "madvise"):
        pytest.skip(f"huge pages are {fs.info()['huge_pages_system']} on this system")
    buffer = fs.FlatBuffer.zeros([(4 * MIB,)], huge_pages=True)
    buffer.flat[:] = 1
    with open("/proc/self/smaps") as file:
        text = file.read()
    at, found = address(buffer.flat), None
    for line in text.splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            low, high = (int(x, 16) for x in words[0].split("-"))
        elif words[0] == "AnonHugePages:" and low <= at < high:
            found = int(words[1])
    if found == 0:
        pytest.skip("the system had no huge page free")
    assert found is not None


def test_huge_pages_setting_takes_a_bool_only():
    with pytest.raises(TypeError, match="enabled must be True or False, got 1"):
        fs.set_huge_pages(1)


def test_memory_goes_back_when_the_last_view_dies():
    # Address space is looked at, as untouched buffers take no memory.
    if sys.platform != "linux":
        pytest.skip("no /proc/self/statm: not Linux")
    kept = [fs.FlatBuffer.zeros([(1 << 28,)])[0][:1] for _ in range(2)]
    sizes = []
    for _ in range(64):
        fs.FlatBuffer.zeros([(1 << 28,)])
        with open("/proc/self/statm") as file:
            sizes.append(int(file.read().split()[0]))
    assert max(sizes) - min(sizes) < (1 << 30) // 4096
    assert all(not view.any() for view in kept)  # a view alone keeps its buffer's memory


# -- over -----------------------------------------------------------------------------------------


def test_shapes_that_are_missing_or_none_are_asked_for():
    rule = (
        "shapes must be a list of shapes, a dict of them by name, or a FlatBuffer, got {}: pass"
        ' shapes=[(2, 3), 4], or shapes={{"w": (2, 3), "b": 4}}'
    )
    for shapes in ((), (None,), (3,), ("w",)):
        got = repr(shapes[0]) if shapes else "None"
        with pytest.raises(TypeError) as caught:
            fs.FlatBuffer.over(memory(64), *shapes)
        assert str(caught.value) == rule.format(got)
    for make in (fs.FlatBuffer.zeros, fs.FlatBuffer.n_for):
        with pytest.raises(TypeError, match=r"^shapes must be a list of shapes, .* got 3: pass"):
            make(3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("off", [0, 1, 3])
def test_over_starts_at_the_first_boundary_and_keeps_values(dtype, off):
    n = fs.FlatBuffer.n_for(SHAPES)
    own = memory(n + 64, dtype, off)
    own[:] = 1
    buffer = fs.FlatBuffer.over(own, SHAPES)
    assert address(buffer.flat) % 64 == 0
    assert 0 <= address(buffer.flat) - address(own) < 64
    assert np.shares_memory(buffer.flat, own)
    assert (buffer.flat == 1).all()
    buffer["w"][...] = 2
    assert (own == 2).sum() == 15
    assert buffer.shapes == SHAPES


def test_over_exact_size_fits_and_one_less_does_not():
    n = fs.FlatBuffer.n_for(SHAPES)
    assert fs.FlatBuffer.over(memory(n), SHAPES).n == 22
    with pytest.raises(ValueError, match=rf"at least {n} elements.*got {n - 1}"):
        fs.FlatBuffer.over(memory(n - 1), SHAPES)
    # One element past a boundary, 15 float32 are skipped.
    assert fs.FlatBuffer.over(memory(n + 15, off=1), SHAPES).n == 22
    with pytest.raises(ValueError, match=rf"at least {n + 15} elements \(15 .*got {n + 14}"):
        fs.FlatBuffer.over(memory(n + 14, off=1), SHAPES)


def test_over_takes_another_buffer_s_shapes():
    buffer = fs.FlatBuffer.pack(filled())
    other = fs.FlatBuffer.over(memory(buffer.flat.size), buffer)
    assert other.shapes == buffer.shapes


def test_over_read_only_memory_makes_read_only_views():
    own = memory(fs.FlatBuffer.n_for(SHAPES))
    own.flags.writeable = False
    buffer = fs.FlatBuffer.over(own, SHAPES)
    with pytest.raises(ValueError, match="read-only"):
        buffer["w"] = 1
    with pytest.raises(ValueError, match=r"params\[w\] must be writable"):
        fs.SGD(buffer)
    fs.SGD(buffer.copy()).step(buffer)  # gradients are only read


@pytest.mark.parametrize(
    ("own", "error"),
    [
        ([0.0] * 1000, TypeError),
        (bytearray(4096), TypeError),
        (np.zeros(1000, np.int32), TypeError),
        (np.zeros((10, 100), np.float32), ValueError),
        (np.zeros(1000, np.float32)[::2], ValueError),
        (np.frombuffer(bytearray(4001), np.float32, 1000, offset=1), ValueError),
    ],
    ids=["list", "bytes", "int32", "2-d", "strided", "unaligned"],
)
def test_over_refuses_memory_that_cannot_hold_it(own, error):
    with pytest.raises(error, match="memory"):
        fs.FlatBuffer.over(own, [(3,)])


def test_over_memmap_trains_on_disk(tmp_path):
    arrays = filled()
    grads = fs.FlatBuffer.pack(arrays)
    expected = fs.FlatBuffer.pack(arrays)
    opt = fs.Adam(expected, lr=0.1)
    for _ in range(3):
        opt.step(grads)

    path = tmp_path / "params.bin"
    n = fs.FlatBuffer.n_for(SHAPES)
    disk = np.memmap(path, np.float32, "w+", shape=(n,))
    params = fs.FlatBuffer.over(disk, SHAPES)
    assert address(params.flat) == address(disk)
    for name, array in arrays.items():
        params[name] = array
    opt = fs.Adam(params, lr=0.1)
    for _ in range(3):
        opt.step(grads)
    disk.flush()
    del opt, params, disk

    again = fs.FlatBuffer.over(np.memmap(path, np.float32, "r"), SHAPES)
    assert again.flat.tobytes() == expected.flat.tobytes()


def test_pack_names_the_array_of_a_dtype_that_no_kernel_takes():
    with pytest.raises(TypeError, match=r"arrays\[w\] must be float32.*, got int32"):
        fs.FlatBuffer.pack({"w": np.ones(3, np.int32)})


# -- accumulation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("own", ["float32", "float64", "bfloat16"])
def test_add_is_one_fma_rounded_once(own, other):
    rng = np.random.default_rng(2)
    shapes = {"a": (300, 7), "b": (5,)}
    arrays = {k: rng.standard_normal(s).astype(as_dtype(own)) for k, s in shapes.items()}
    more = {k: rng.standard_normal(s).astype(as_dtype(other)) for k, s in shapes.items()}
    compute = np.float64 if own == "float64" else np.float32
    exact = np.longdouble if own == "float64" else np.float64  # holds products
    flat = fs.FlatBuffer.pack(arrays).add_(fs.FlatBuffer.pack(more), scale=0.3)
    apart = fs.FlatBuffer.pack(arrays).add_(more, scale=np.float64(0.3))
    for key, array in arrays.items():
        product = more[key].astype(compute).astype(exact) * exact(compute(0.3))
        expected = (product + array.astype(exact)).astype(compute).astype(array.dtype)
        np.testing.assert_allclose(
            flat[key].astype("f8"), expected.astype("f8"), rtol=4e-16 if own == "float64" else 0
        )
        assert flat[key].tobytes() == apart[key].tobytes()


def test_add_leaves_out_none_and_refuses_what_does_not_fit():
    buffer = fs.FlatBuffer.pack({"a": np.ones(3, "f4"), "b": np.ones(2, "f4")})
    buffer.add_({"a": None, "b": np.ones(2, np.float16)})
    assert buffer["a"].tolist() + buffer["b"].tolist() == [1, 1, 1, 2, 2]
    ones = np.ones(3, "f4")
    for other, scale, error, message in [
        ({"a": ones}, 1.0, ValueError, r"other must have the names of params, got missing \['b'\]"),
        ([ones], 1.0, ValueError, "other must have 2 arrays, got 1"),
        ([ones, ones], 1.0, ValueError, r"other\[b\] must have shape \(2,\), got \(3,\)"),
        ([ones.astype(int), None], 1.0, TypeError, r"other\[a\] must be float32, .* got int64"),
        ([ones, buffer["b"]], 1.0, ValueError, r"other\[b\] must not share memory with buffer\["),
        (buffer, 1.0, ValueError, r"other\[flat\] must not share memory with buffer\[flat\]"),
        ([ones, None], np.inf, ValueError, "scale must be finite, got inf"),
        ([ones, None], "2", TypeError, "scale must be a finite number, got '2'"),
    ]:
        with pytest.raises(error, match=message):
            buffer.add_(other, scale)
    assert buffer["a"].tolist() + buffer["b"].tolist() == [1, 1, 1, 2, 2]
