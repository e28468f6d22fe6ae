"""What may be trained: memory that is there and may be written, in containers that keep it."""

import collections
import ctypes
import mmap
import shelve
import types
from multiprocessing import shared_memory

import ml_dtypes
import numpy as np
import pytest
import torch

import fusedstep as fs
from cases import FORMATS
from fusedstep import convergence
from fusedstep._arrays import as_array

DTYPES = FORMATS


def ones(dtype="float32", shape=4):
    return np.ones(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def tensor(array):
    """A torch tensor of the same values, which exports bfloat16 too."""
    return torch.from_numpy(array.astype("f8")).to(getattr(torch, array.dtype.name))


class Unversioned:
    """Exports as JAX and TensorFlow do: in a capsule that has no word for read-only."""

    def __init__(self, array):
        self.tensor = tensor(array)

    def __dlpack__(self, **keywords):
        return self.tensor.__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)

    def show(self, read_only=False, address=None):
        data = self.tensor.data_ptr() if address is None else address
        return {"data": (data, read_only), "shape": (4,), "typestr": "<f4", "version": 3}


class Shows(Unversioned):
    """Says by NumPy's protocol whether its memory may be written."""

    @property
    def __array_interface__(self):
        return self.show()


class ShowsReadOnly(Unversioned):
    @property
    def __array_interface__(self):
        return self.show(read_only=True)


class ShowsOther(Unversioned):
    """Shows memory that is not what it exports."""

    @property
    def __array_interface__(self):
        return self.show(address=8)


class ShowsNothing(Unversioned):
    __array_interface__ = 5


class Bytes(bytearray):
    """Says it by the buffer protocol."""

    def __dlpack__(self, **keywords):
        return np.frombuffer(self, "f4").__dlpack__()

    def __dlpack_device__(self):
        return (1, 0)


class OldTensor(torch.Tensor):
    """As torch before 2.9, which knew no versioned capsule."""

    def __dlpack__(self, stream=None):
        return super().__dlpack__()


# -- memory of which nobody knows that it may be written ------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_unversioned_capsule_is_read_only(dtype):
    theirs = Unversioned(ones(dtype))
    with pytest.raises(ValueError, match=r"params\[w\] must be writable, got an array whose libra"):
        fs.SGD({"good": ones(), "w": theirs})
    assert (theirs.tensor == 1).all()
    assert not as_array(theirs, "x").flags.writeable
    mine = ones(dtype)
    fs.SGD(mine, lr=1.0).step(theirs)  # as a gradient it is only read
    assert not mine.any()


@pytest.mark.parametrize("make", [ShowsReadOnly, ShowsOther, ShowsNothing])
def test_unversioned_capsule_needs_a_flag_of_its_own(make):
    with pytest.raises(ValueError, match=r"params\[0\] must be writable, got an array whose"):
        fs.SGD(make(ones()))


def test_unversioned_capsule_with_a_flag_is_trained():
    theirs, raw = Shows(ones()), Bytes(16)
    fs.SGD([theirs, raw], lr=1.0).step([ones(), ones()])
    assert not theirs.tensor.any()
    assert np.frombuffer(raw, "f4").tolist() == [-1] * 4
    assert as_array(theirs, "x").flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_library_known_to_be_mutable_is_trained(dtype):
    theirs = tensor(ones(dtype)).as_subclass(OldTensor)
    fs.SGD(theirs, lr=1.0).step(ones(dtype))
    assert not theirs.any()
    assert as_array(theirs, "x").flags.writeable


def test_immutable_memory_is_read_only_in_a_buffer_too():
    theirs = Unversioned(ones(shape=64))
    buffer = fs.FlatBuffer.over(as_array(theirs, "x"), [16])
    with pytest.raises(ValueError, match=r"params\[0\] must be writable"):
        fs.SGD(buffer)
    with pytest.raises(ValueError, match=r"params\[0\] must be writable"):
        convergence.curvature(lambda p: p, Unversioned(ones()))
    opt = fs.SGD(ones(shape=4), momentum=0.5)
    opt.step(ones())
    saved = opt.state_dict()
    saved["state"][0]["momentum_buffer"] = Unversioned(ones())
    opt.load_state_dict(saved)
    opt.step(ones())  # the states are copies
    assert (saved["state"][0]["momentum_buffer"].tensor == 1).all()


@pytest.mark.parametrize("kind", ["bytearray", "ctypes", "mmap", "shared_memory"])
def test_writable_buffer_seen_by_numpy_is_trained(kind):
    shared = shared_memory.SharedMemory(create=True, size=16) if kind == "shared_memory" else None
    raw = {
        "bytearray": lambda: bytearray(16),
        "ctypes": lambda: (ctypes.c_float * 4)(),
        "mmap": lambda: mmap.mmap(-1, 16),
        "shared_memory": lambda: shared.buf,
    }[kind]()
    seen = np.frombuffer(raw, "f4", 4)
    fs.SGD(seen, lr=1.0).step(ones())
    assert bytes(raw)[:16] == np.full(4, -1, "f4").tobytes()
    del seen, raw
    if shared:
        shared.close()
        shared.unlink()


# -- memory that is not there ---------------------------------------------------------------------


def freed(dtype="float32", keep=0, offset=0):
    """A tensor of 1,000 elements whose storage was shrunk under it, to `keep` elements."""
    whole = torch.ones(1000 + offset, dtype=getattr(torch, dtype))
    part = whole[offset:]
    whole.untyped_storage().resize_(keep * whole.element_size())
    return part


LOST = {
    "all": {},
    "all, with an offset": {"offset": 4},
    "one element": {"keep": 999},
    "one element, with an offset": {"keep": 1003, "offset": 4},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lost", list(LOST))
def test_tensor_without_storage_is_refused(dtype, lost):
    says = r"must have memory for its elements, got"
    bad = freed(dtype, **LOST[lost])
    with pytest.raises(ValueError, match=rf"params\[bad\] {says}"):
        fs.SGD({"good": ones(dtype), "bad": bad})
    param, other = ones(dtype, 1000), ones(dtype)
    opt = fs.SGD({"other": other, "w": param}, lr=1.0)
    with pytest.raises(ValueError, match=rf"grads\[w\] {says}"):
        opt.step({"other": ones(dtype), "w": bad}, max_norm=1.0)
    assert opt.steps == 0
    assert (param == 1).all()
    assert (other == 1).all()
    with pytest.raises(ValueError, match=rf"arrays\[0\] {says}"):
        fs.FlatBuffer.pack([bad])
    buffer = fs.FlatBuffer.zeros([1000], dtype)
    with pytest.raises(ValueError, match=rf"value {says}"):
        buffer[0] = bad
    assert not buffer[0].any()


@pytest.mark.parametrize("offset", [0, 4])
def test_exporter_of_elements_at_no_address_is_refused(offset):
    theirs = Unversioned(ones())
    theirs.tensor = freed(offset=offset)
    for use in (fs.SGD, fs.SGD(ones(shape=1000)).step, lambda x: fs.FlatBuffer.pack([x])):
        with pytest.raises(ValueError, match=r"\w+\[0\] must have memory for its elements, got n"):
            use(theirs)


def test_tensor_without_storage_is_refused_in_a_checkpoint():
    opt = fs.SGD(ones(shape=1000), momentum=0.5)
    opt.step(ones(shape=1000))
    saved = opt.state_dict()
    saved["state"][0]["momentum_buffer"] = freed()
    with pytest.raises(ValueError, match=r"\['momentum_buffer'\] must have memory for its elem"):
        opt.load_state_dict(saved)
    assert (opt.state[0]["momentum_buffer"] == 1).all()


def test_parameter_that_loses_its_storage_is_refused_at_the_step():
    # Of the other types torch itself fixes the storage, once it has shown it to NumPy.
    param, other = torch.ones(1000, dtype=torch.bfloat16), ones("bfloat16")
    opt = fs.SGD({"other": other, "w": param}, lr=1.0)
    param.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"params\[w\] must have memory for its elements"):
        opt.step([ones("bfloat16"), ones("bfloat16", 1000)])
    assert opt.steps == 0
    assert (other == 1).all()


def test_strided_tensor_is_measured_to_its_last_element():
    whole = torch.ones(10, 10)
    column = whole[:, 2]
    whole.untyped_storage().resize_(4 * 93)
    assert fs.FlatBuffer.pack([column])[0].sum() == 10
    whole.untyped_storage().resize_(4 * 92)
    with pytest.raises(ValueError, match=r"arrays\[0\] must have memory for its elements"):
        fs.FlatBuffer.pack([column])
    empty = torch.ones(0, 3)
    assert fs.FlatBuffer.pack([empty, empty.T])[0].shape == (0, 3)


# -- containers that make their arrays anew -------------------------------------------------------


class Anew(collections.abc.Mapping):
    """Makes an array from `found(key)` whenever it is asked for one."""

    def __init__(self, found):
        self.found = found

    def __getitem__(self, key):
        return self.found(key)

    def __iter__(self):
        return iter("ab")

    def __len__(self):
        return 2


class Rows:
    """As a dataset in a file: its rows are read when they are asked for."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return (self.rows(i) for i in range(2))


def npz(path):
    np.savez(path / "w.npz", a=ones(), b=ones())
    return np.load(path / "w.npz")


def shelf(path):
    with shelve.open(str(path / "shelf")) as opened:
        opened.update(a=ones(), b=ones())
    return shelve.open(str(path / "shelf"))  # its user closes it


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (npz, "a"),
        (shelf, "a"),
        (lambda path: Anew(lambda key: ones()), "a"),
        (lambda path: Anew(lambda key: torch.ones(4)), "a"),
        (lambda path: Anew(lambda key: Shows(ones())), "a"),
        (lambda path: Rows(lambda i: ones()), "0"),
        (lambda path: Rows(lambda i: np.float32(i)), "0"),
        (lambda path: {1: ones(), 2: Rows(lambda i: ones())}[2], "0"),
    ],
)
def test_container_that_makes_its_arrays_anew_is_refused(tmp_path, make, key):
    params = make(tmp_path)
    kind = type(params).__name__
    says = rf"params must give the same arrays each .*, got a {kind} that makes params\[{key}\]"
    for use in (
        fs.Adam,
        lambda p: convergence.curvature(lambda p: p, p),
        lambda p: convergence.lr_range_test(lambda lr: 1.0, params=p),
    ):
        with pytest.raises(ValueError, match=says):
            use(params)
    if hasattr(params, "close"):
        params.close()


def test_container_that_gives_another_number_the_second_time_is_refused():
    arrays = [ones()]

    class Grows:
        def __iter__(self):
            yield from list(arrays)
            arrays.append(ones())

    with pytest.raises(ValueError, match="got a Grows that makes params"):
        fs.SGD(Grows())


def test_container_that_keeps_its_arrays_is_trained():
    memory = {key: ones() for key in "ab"}
    views = Anew(lambda key: memory[key][:])  # another object each time, of the same memory
    tensors = Anew(lambda key: torch.from_numpy(memory[key]))
    rows = Rows(lambda i: memory["ab"[i]][:])
    proxy = types.MappingProxyType(memory)
    lists = [tuple(memory.values()), collections.deque(memory.values()), memory.values()]
    for params in (views, tensors, rows, proxy, *lists, iter(memory.values())):
        before = memory["a"][0]
        fs.SGD(params, lr=1.0).step([ones(), ones()])
        assert memory["a"][0] == memory["b"][0] == before - 1
    fs.SGD(Anew(lambda key: ones(shape=0)))  # nothing to train


def test_gradients_may_come_from_any_container(tmp_path):
    params = {"a": ones(), "b": ones()}
    opt = fs.SGD(params, lr=0.25)
    with npz(tmp_path) as grads, shelf(tmp_path) as more:
        for some in (grads, more, Anew(lambda key: ones()), Rows(lambda i: ones())):
            opt.step(some)
    assert not params["a"].any()
    assert not params["b"].any()
    assert fs.FlatBuffer.pack(Anew(lambda key: ones()))["b"].sum() == 4  # copies, as it says


# -- masks, interrupts ----------------------------------------------------------------------------


class Image(np.ndarray):
    """An array that has a mask among its attributes, as a picture of a camera's."""

    mask = "of glass"


def test_attribute_mask_makes_no_masked_array():
    image = ones().view(Image)
    fs.SGD(image, lr=1.0).step(ones().view(Image))
    assert not image.any()
    assert fs.FlatBuffer.pack([image])[0].tolist() == [0] * 4
    masked = np.ma.masked_array(ones())  # without a mask too
    for use in (fs.SGD, lambda m: fs.SGD(ones()).step(m), lambda m: fs.FlatBuffer.pack([m])):
        with pytest.raises(TypeError, match="must be a plain array, got a masked one"):
            use(masked)


class Calls(Unversioned):
    """Raises `error` where it is asked to export, or whether that may be written."""

    def __init__(self, error, at):
        super().__init__(ones())
        self.error, self.at = error, at

    def __dlpack__(self, **keywords):
        if self.at == "export":
            raise self.error
        return super().__dlpack__()

    @property
    def __array_interface__(self):
        return self

    def __getitem__(self, key):
        raise self.error


class Stops:
    """Raises `error` where it is asked for `at`."""

    def __init__(self, error, at):
        self.error, self.at = error, at

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "at"):
            raise object.__getattribute__(self, "error")
        if name == "__dlpack__":
            return lambda **keywords: 1 / 0
        if name == "__dlpack_device__":
            return lambda: (1, 0)
        return object.__getattribute__(self, name)


class Numpy(torch.Tensor):
    """A tensor whose way to NumPy raises."""

    error: BaseException

    def numpy(self, **keywords):
        raise Numpy.error


ERRORS = [KeyboardInterrupt, SystemExit, MemoryError]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    "at", ["__dlpack__", "__dlpack_device__", "__cuda_array_interface__", "detach"]
)
def test_interrupt_under_an_exporter_is_passed_on(error, at):
    opt = fs.SGD(ones())
    with pytest.raises(error):
        opt.step([Stops(error(), at) if at != "__cuda_array_interface__" else OnlyInterface(error)])
    assert opt.steps == 0


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at", ["export", "interface"])
def test_interrupt_inside_an_exporter_is_passed_on(error, at):
    with pytest.raises(error):
        fs.SGD(Calls(error(), at))
    with pytest.raises(error):
        as_array(Calls(error(), at), "x")


def test_exporter_that_cannot_is_refused_by_name():
    for at, says in (("export", "exportable through DLPack, got no"), ("interface", "writable")):
        with pytest.raises(ValueError, match=rf"params\[0\] must be {says}"):
            fs.SGD(Calls(OSError("no"), at))


class OnlyInterface:
    """Exports through CUDA's interface alone, which raises."""

    def __init__(self, error):
        self.error = error

    @property
    def __cuda_array_interface__(self):
        raise self.error


@pytest.mark.parametrize("error", [*ERRORS, ZeroDivisionError])
def test_interrupt_under_a_tensor_is_passed_on(error):
    Numpy.error = error()
    bad = torch.ones(4).as_subclass(Numpy)
    opt = fs.SGD(ones())
    with pytest.raises(error):
        opt.step(bad)
    with pytest.raises(error):
        fs.SGD(bad)


# -- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["array", "list", "dict", "tensor"])
def test_number_is_a_gradient_of_a_parameter_without_dimensions(dtype, form):
    rounded = ones(dtype, ()) * ones(dtype, ()).dtype.type(0.1)
    for grad in (0.1, rounded[()], 3, 1e-9, 257 / 256, 1.00390625 + 2**-12):
        make = tensor if form == "tensor" else np.copy
        theirs, ours = make(ones(dtype, ())), make(ones(dtype, ()))
        wrap = {"list": lambda x: [x], "dict": lambda x: {"w": x}}.get(form, lambda x: x)
        fs.SGD(wrap(theirs), lr=1.0).step(wrap(np.asarray(grad, rounded.dtype)))
        fs.SGD(wrap(ours), lr=1.0).step(wrap(grad), max_norm=np.inf)
        assert float(ours) == float(theirs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_numpy_s_is_a_gradient_whatever_its_width(dtype):
    kinds = ("float16", "float32", "float64", "longdouble", "int8", "int64", "uint16")
    for kind in kinds:
        theirs, ours = ones(dtype, ()), ones(dtype, ())
        number = np.dtype(kind).type(1.1)
        fs.SGD({"w": theirs}, lr=1.0).step({"w": float(number)})
        fs.SGD({"w": ours}, lr=1.0).step({"w": number})
        assert ours == theirs != 1


def test_number_of_another_kind_is_no_gradient():
    param = ones(shape=())
    opt = fs.SGD(param, lr=1.0)
    opt.step(ml_dtypes.bfloat16(0.5))
    for bad in (True, np.True_, "1", np.str_("1"), 1j, np.complex64(1), None.__class__):
        with pytest.raises(TypeError, match="grads"):
            opt.step(bad)
    with pytest.raises(ValueError, match=r"grads\[0\] must fit in float32, got 1000"):
        opt.step(10**400)
    assert param == 0.5


def test_number_is_no_gradient_of_an_array():
    opt = fs.SGD({"w": ones(), "s": ones(shape=())})
    with pytest.raises(TypeError, match=r"grads\[w\] must be a NumPy array or .*, got float"):
        opt.step([1.0, 1.0])
    with pytest.raises(ValueError, match=r"grads\[w\] must have shape \(4,\), got \(\)"):
        opt.step([np.float32(1), 1.0])
    opt.step([None, 1.0])
    with pytest.raises(
        TypeError, match=r"grads must be an array, a FlatBuffer, or a .*, got float"
    ):
        fs.SGD(ones()).step(1.0)


def test_number_is_no_parameter():
    says = r"params\[\w\] must be an array, got a NumPy scalar, which is immutable"
    for params in (np.float32(1), [np.float32(1)], {"w": np.float64(1)}):
        with pytest.raises(TypeError, match=says):
            fs.SGD(params)


def test_number_is_taken_by_curvature():
    scalar = np.array(2.0)
    for grad_fn in (lambda p: 3 * float(p), lambda p: 3 * p[()], lambda p: [3 * float(p)]):
        found = convergence.curvature(grad_fn, scalar)
        assert found.largest == pytest.approx(3, rel=1e-6)


# -- buffers --------------------------------------------------------------------------------------


def test_buffer_takes_what_a_step_takes():
    jax = Unversioned(ones("bfloat16"))
    buffer = fs.FlatBuffer.pack({"w": jax, "s": ml_dtypes.bfloat16(2)})
    assert buffer.dtype == ml_dtypes.bfloat16
    assert buffer["w"].tolist() == [1] * 4
    assert buffer["s"] == 2
    buffer["w"] = Unversioned(2 * ones("bfloat16"))
    assert buffer["w"].tolist() == [2] * 4
    whole = fs.FlatBuffer.zeros([4])
    whole[0] = jax
    assert whole[0].tolist() == [1] * 4
    ints = [torch.arange(6).reshape(2, 3).T, Unversioned(np.arange(3))]
    packed = fs.FlatBuffer.pack(ints, dtype="float32")
    assert packed[0].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert packed[1].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match=r"arrays\[0\] must not have its negative bit set"):
        fs.FlatBuffer.pack([torch._neg_view(torch.ones(3))])


def test_buffer_is_not_one_array(tmp_path):
    buffer = fs.FlatBuffer.pack({"w": ones(), "b": ones()})
    says = r"array must be one array, got a FlatBuffer.*buffer\.flat.*\*\*buffer"
    for use in (
        np.asarray,
        np.array,
        lambda b: np.asarray(b, "f4"),
        lambda b: np.save(tmp_path / "p.npy", b),
        lambda b: np.savez(tmp_path / "p.npz", params=b),
        lambda b: np.savetxt(tmp_path / "p.txt", b),
        lambda b: np.copyto(ones(), b),
        np.mean,
    ):
        with pytest.raises(TypeError, match=says):
            use(buffer)
    np.savez(tmp_path / "p.npz", **buffer)
    np.save(tmp_path / "p.npy", buffer.flat)
    with np.load(tmp_path / "p.npz") as saved:
        assert saved["w"].tolist() == [1] * 4
    assert np.load(tmp_path / "p.npy").size == buffer.flat.size


def test_classes_that_are_not_called_say_what_is():
    for args in ((), ({"w": ones()},), ([ones()],)):
        with pytest.raises(TypeError, match=r"FlatBuffer must be made by pack.*FlatBuffer\.pack\("):
            fs.FlatBuffer(*args)
    for args in ((ones(),), (ones(), [])):
        with pytest.raises(TypeError, match=r"must be one of SGD, Lion.*AdamW.*the base class"):
            fs.Optimizer(*args)


def test_base_class_of_somebody_s_own_needs_a_specification():
    class Base(fs.Optimizer):
        """Has no rule."""

    class Mine(fs.AdamW):
        def __init__(self, params, note):
            super().__init__(params)
            self.note = note

    with pytest.raises(TypeError, match=r"must be one of SGD, Lion.*got Base: Optimizer is the"):
        Base([ones()])
    opt = Mine([ones()], "kept")
    assert opt.note == "kept"
    opt.spec = "its own"
    assert opt.step([ones()]).step == 1


def test_subclass_may_have_a_spec_of_another_kind():
    class Mine(fs.AdamW):
        def spec(self):
            return "its own"

    opt = Mine([ones()])
    assert (opt.spec(), opt.step([ones()]).step) == ("its own", 1)
