"""What a call refuses, how it says so, and that a refused call has changed nothing."""

import inspect
import itertools
import math
import re
from contextlib import contextmanager

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from cases import WITHOUT_PEER, each_pair
from fusedstep import _storage
from optional import optional

torch = optional("torch")

OPTIMIZERS = [
    cls
    for cls in vars(fs).values()
    if isinstance(cls, type) and issubclass(cls, fs.Optimizer) and cls is not fs.Optimizer
]
BAD_CALL = (TypeError, ValueError)
SHAPES = {"a": (3, 4), "b": (5,), "c": (2,)}


class Exporter:
    """Memory that is reachable through DLPack alone, on the device that it claims."""

    def __init__(self, array, device=(1, 0)):
        self.array, self.on = array, device

    def __dlpack__(self, **keywords):
        assert self.on[0] == 1, "memory of another device must not be exported"
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.on


class Odd(Exporter):
    """Claims CPU memory and exports `capsule` instead."""

    def __init__(self, capsule):
        super().__init__(None)
        self.capsule = capsule

    def __dlpack__(self, **keywords):
        return self.capsule() if callable(self.capsule) else self.capsule


@pytest.mark.parametrize("capsule", [None, 5, "dltensor"])
def test_exporter_without_a_capsule_is_refused(capsule):
    with pytest.raises(TypeError, match=r"params\[0\] must export a DLPack capsule, got"):
        fs.SGD([Odd(capsule)])


def test_grads_list_that_changes_while_it_is_read_is_refused():
    params = [np.ones(4, np.float32) for _ in range(64)]
    grads = [np.ones(4, np.float32) for _ in range(64)]

    def shrink():
        grads.clear()
        return np.ones(4, np.float32).__dlpack__()

    grads[0] = Odd(shrink)
    opt = fs.SGD(params, lr=1.0)
    with pytest.raises(ValueError, match="grads must stay as given while it is read, got a list"):
        opt.step(grads)
    assert opt.steps == 0
    assert all((p == 1).all() for p in params)


@pytest.mark.parametrize("use", ["pack", "set", "over"])
def test_buffer_refuses_a_masked_array(use):
    masked = np.ma.masked_array(np.ones(64, np.float32), np.arange(64) % 2)
    buffer = fs.FlatBuffer.zeros([64])
    call = {
        "pack": lambda: fs.FlatBuffer.pack([masked]),
        "set": lambda: buffer.__setitem__(0, masked),
        "over": lambda: fs.FlatBuffer.over(masked, [1]),
    }[use]
    with pytest.raises(TypeError, match="must be a plain array, got a masked one"):
        call()
    assert not buffer.flat.any()


@pytest.mark.parametrize("shape", [(2**40, 2**40), (2**45,)])
def test_buffer_too_large_for_any_memory_says_so(shape):
    with pytest.raises(MemoryError, match=r"shapes take \d+ bytes"):
        fs.FlatBuffer.zeros([shape])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fs.SGD(ones()).load_state_dict(None), "state_dict must be a dict, got NoneType"),
        (lambda: fs.SGD(ones(), groups=fs.Group("a")), "groups must be a sequence of Group"),
        (lambda: fs.Group(3, lr=1), "pattern must be a string or several, got 3"),
        (lambda: fs.FlatBuffer.zeros([3], torch.float32), "dtype must be .*, got torch.float32"),
        (lambda: fs.FlatBuffer.zeros([3], None), "dtype must be .*, got None"),
    ],
)
def test_wrong_kind_of_argument_is_named(call, says):
    with pytest.raises(TypeError, match=says):
        call()


@pytest.mark.parametrize("place", ["params", "grads"])
def test_tensor_with_a_pending_negation_is_refused(place):
    lazy = torch.ones(3)
    lazy = torch._neg_view(lazy)
    with pytest.raises(ValueError, match=rf"{place}\[0\] must not have its negative bit set"):
        fs.SGD([lazy]) if place == "params" else fs.SGD([torch.zeros(3)]).step([lazy])


def ones(dtype=np.float32):
    return {name: np.ones(shape, dtype) for name, shape in SHAPES.items()}


def raw(array):
    if not isinstance(array, np.ndarray):
        array = array.detach().reshape(-1).view(torch.uint8).numpy()
    return array.tobytes()


def snapshot(opt, *more):
    """Everything that a step may change, by value."""
    state = opt.state_dict()["state"]
    return (
        [raw(array) for array in opt.params.values()],
        [raw(array) for states in opt.state.values() for array in states.values()],
        {i: {k: v for k, v in s.items() if np.ndim(v) == 0} for i, s in state.items()},
        [raw(array) for array in more],
        opt.steps,
        repr(opt),
    )


@contextmanager
def refused(opt, match, *more, error=BAD_CALL):
    """The call inside raises and leaves the optimizer and the arrays `more` as they were."""
    before = snapshot(opt, *more)
    with pytest.raises(error, match=match):
        yield
    assert snapshot(opt, *more) == before


@pytest.fixture(params=["dict", "buffer"])
def opt(request):
    """An optimizer that has taken a step, over three arrays and over a FlatBuffer of them."""
    params = ones() if request.param == "dict" else fs.FlatBuffer.pack(ones())
    opt = fs.AdamW(params, lr=0.1, groups=[fs.Group("b", lr=0.2)])
    opt.step(ones())
    return opt


# -- gradients ------------------------------------------------------------------------------------

# What goes wrong, made from a good gradient; and what the message must hold beside the argument.
BAD_GRADS = {
    "int64": (lambda g: g.astype(np.int64), "float32.*got int64"),
    "bool": (lambda g: g.astype(bool), "float32.*got bool"),
    "complex64": (lambda g: g.astype(np.complex64), "float32.*got complex64"),
    "object": (lambda g: g.astype(object), "float32.*got object"),
    "text": (lambda g: g.astype(str), "float32.*got"),
    "float8": (lambda g: g.astype(ml_dtypes.float8_e4m3fn), "float32.*got float8_e4m3fn"),
    "longdouble": (lambda g: g.astype(np.longdouble), "float32.*got (float128|longdouble)"),
    "one more": (lambda g: np.ones(g.size + 1, np.float32), r"shape \(.*got \("),
    "one less": (lambda g: np.ones(g.size - 1, np.float32), r"shape \(.*got \("),
    "more dimensions": (lambda g: g[None], r"shape \(.*got \(1, "),
    "0-d": (lambda g: np.array(1, np.float32), r"shape \(.*got \(\)"),
    "empty": (lambda g: np.ones(0, np.float32), r"shape \(.*got \(0,\)"),
    "swapped": (lambda g: g.astype(g.dtype.newbyteorder()), "native byte order, got"),
    "unaligned": (
        lambda g: np.frombuffer(bytearray(g.nbytes + 1), g.dtype, offset=1).reshape(g.shape),
        "aligned.*got",
    ),
    "list": (lambda g: g.tolist(), "NumPy array or a DLPack exporter, got list"),
    "number": (lambda g: 1.0, "NumPy array or a DLPack exporter, got float"),
    "str": (lambda g: "g", "NumPy array or a DLPack exporter, got str"),
    "torch int64": (lambda g: torch.ones(g.shape, dtype=torch.int64), "float32.*got int64"),
    "torch float8": (
        lambda g: torch.ones(g.shape).to(torch.float8_e4m3fn),
        "float32.*got.*float8_e4m3fn",
    ),
    "torch complex64": (
        lambda g: torch.ones(g.shape, dtype=torch.complex64),
        "float32.*got.*complex64",
    ),
    "torch shape": (lambda g: torch.ones(g.size + 1), r"shape \(.*got \("),
    "torch sparse": (lambda g: torch.ones(g.shape).to_sparse(), "got"),
    "torch meta": (lambda g: torch.ones(g.shape, device="meta"), "CPU memory, got device meta"),
    "CUDA": (lambda g: Exporter(g, (2, 0)), r"CPU memory, got device type 2"),
    "exporter dtype": (lambda g: Exporter(g.astype(np.int32)), "float32.*got"),
    "exporter shape": (lambda g: Exporter(np.ones(g.size + 1, g.dtype)), r"shape \(.*got \("),
}


@pytest.mark.parametrize("name", list(SHAPES))
@pytest.mark.parametrize("what", list(BAD_GRADS))
def test_grad_bad_is_refused_wherever_it_stands(opt, what, name):
    make, says = BAD_GRADS[what]
    grads = ones()
    good = list(grads.values())
    grads[name] = make(grads[name])
    with refused(opt, rf"(?s)grads\[{name}\] must.*{says}", *good):
        opt.step(grads)
    opt.step(ones())  # and the next good call is not disturbed


@each_pair()
def test_grad_of_any_format_goes_with_any_parameter(param, grad):
    params, grads = (fs.FlatBuffer.zeros([(2,)], dtype) for dtype in (param, grad))
    params[0] = grads[0] = [1, 3]
    fs.SGD(params, lr=0.5).step(grads)
    assert params[0].tolist() == [0.5, 1.5]
    assert grads[0].tolist() == [1, 3]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_grad_in_float64_is_rounded_to_float32_before_anything_else(dtype):
    params = [fs.FlatBuffer.zeros([(3,)], dtype) for _ in range(2)]
    grad = np.array([1 + 2**-25, 1e-300, 2.0**60 + 1])
    for param, given in zip(params, (grad, grad.astype(np.float32)), strict=True):
        fs.SGD(param, lr=2.0**-50, momentum=0.5).step([given])
    assert raw(params[0].flat) == raw(params[1].flat) != bytes(params[0].nbytes)


@pytest.mark.parametrize("frozen", [False, True])
def test_grad_may_be_read_only(frozen):
    grad = np.ones(3, np.float32)
    grad.flags.writeable = not frozen
    param = np.ones(3, np.float32)
    fs.SGD(param, lr=1.0).step(grad)
    assert param.tolist() == [0, 0, 0]
    assert grad.tolist() == [1, 1, 1]


def test_grads_must_be_as_many_as_parameters():
    opt = fs.Adam([np.ones(2, np.float32), np.ones(3, np.float32)])
    good = [np.ones(2, np.float32), np.ones(3, np.float32)]
    for grads in ([], good[:1], [*good, good[0]], (good[0],), iter(good[:1]), good[0], None):
        with refused(opt, r"grads must have one entry per parameter \(2\), got [013]", *good):
            opt.step(grads)


@pytest.mark.parametrize("grads", [{}, {"a": 1}, {"A": 1}, "rename"])
def test_grads_must_have_the_parameters_names(opt, grads):
    if grads == "rename":
        grads = dict(zip("abd", ones().values(), strict=True))
    with refused(opt, r"grads must have the names of params, got missing \[.*\], unknown \["):
        opt.step(grads)


def test_grads_buffer_of_another_layout_is_refused(opt):
    for bad in (
        fs.FlatBuffer.zeros({"a": (3, 4), "b": (5,)}),
        fs.FlatBuffer.zeros({"a": (3, 4), "b": (5,), "d": (2,)}),
        fs.FlatBuffer.zeros({"a": (4, 3), "b": (5,), "c": (2,)}),
        fs.FlatBuffer.zeros([(3, 4), (5,), (2,)]),
    ):
        with refused(opt, "grads", bad.flat):
            opt.step(bad)


@pytest.mark.parametrize("grads", [3, 3.0, "abc", b"abc", True, object()])
def test_grads_of_a_wrong_type_are_refused(opt, grads):
    with refused(opt, "grads must be an array, a FlatBuffer", error=TypeError):
        opt.step(grads)


# -- overlap --------------------------------------------------------------------------------------


def test_overlap_of_parameters_is_refused():
    memory = np.ones(100, np.float32)
    for first, second in [
        (memory, memory),
        (memory[:50], memory[49:]),
        (memory[49:], memory[:50]),
        (memory, memory[50:51]),
        (memory[10:11], memory),
    ]:
        with pytest.raises(ValueError, match=r"params\[\w\] and params\[\w\] must not share memor"):
            fs.SGD({"x": first, "y": np.ones(3, np.float32), "z": second})
    assert (memory == 1).all()
    fs.SGD([memory[:50], memory[50:], memory[50:50]])  # neighbours and empty views do not overlap


def test_overlap_through_another_exporter_or_dtype_is_refused():
    memory = np.ones(16, np.float64)
    with pytest.raises(ValueError, match="must not share memory"):
        fs.SGD([memory, torch.from_numpy(memory)])
    with pytest.raises(ValueError, match="must not share memory"):
        fs.SGD([memory[:8], memory[7:].view(np.float32)])


def test_overlap_of_gradient_and_parameter_is_refused():
    memory = np.ones(100, np.float32)
    p, q = memory[:40], memory[40:80]
    opt = fs.Adam({"p": p, "q": q})
    good = np.ones(40, np.float32)
    for i, grads in enumerate([(p, good), (good, q), (good, p), (memory[1:41], good)] * 2):
        with refused(opt, r"grads\[[pq]\] must not share memory with params\[[pq]\]", good):
            opt.step(list(grads))
        if i == 3:
            opt.step([good, good])  # the same refusals hold after a good step
    with refused(opt, r"grads\[q\] must not share memory with params\[q\]", good):
        opt.step([good, memory[60:100]])


def test_overlap_of_gradient_and_state_is_refused():
    opt = fs.Adam({"p": np.ones(40, np.float32), "q": np.ones(40, np.float32)})
    good = np.ones(40, np.float32)
    for name, state in itertools.product("pq", ["exp_avg", "exp_avg_sq"]):
        says = rf"grads\[q\] must not share memory with state\[{name}\]\['{state}'\]"
        with refused(opt, says, good):
            opt.step([good, opt.state[name][state]])


def test_overlap_of_a_flat_gradient_is_refused():
    params = fs.FlatBuffer.pack(ones())
    opt = fs.Adam(params)
    with refused(opt, "must not share memory with params"):
        opt.step(params)
    # Memory of which only the last segment meets a parameter: segments lie 32 elements apart.
    own = fs.FlatBuffer.zeros([(200,)])[0]
    opt = fs.Adam(fs.FlatBuffer.over(own[64:], SHAPES))
    with refused(opt, r"grads\[c\] must not share memory with params\[a\]"):
        opt.step(fs.FlatBuffer.over(own, SHAPES))
    apart = fs.FlatBuffer.zeros([(300,)])[0]
    params = fs.FlatBuffer.over(apart[96:], SHAPES)  # right behind its gradients
    fs.Adam(params).step(fs.FlatBuffer.over(apart, SHAPES))


def test_overlap_that_appears_with_a_later_gradient_dtype_is_refused():
    # The same address under a wider type reaches further: it must be looked at again.
    memory = np.ones(32, np.float32)
    opt = fs.SGD(memory[8:24])
    opt.step(memory[:8].view(np.float16))
    with refused(opt, r"grads\[0\] must not share memory"):
        opt.step(memory[:16])


def test_gradients_may_share_memory_with_each_other():
    grad = np.ones(4, np.float32)
    params = [np.ones(4, np.float32), np.ones(4, np.float32)]
    fs.SGD(params, lr=1.0).step([grad, grad])
    assert not any(p.any() for p in params)


# -- parameters -----------------------------------------------------------------------------------


def read_only():
    array = np.ones(4, np.float32)
    array.flags.writeable = False
    return array


BAD_PARAMS = {
    "int64": (lambda: np.ones(4, np.int64), "float32.*got int64"),
    "complex": (lambda: np.ones(4, np.complex128), "float32.*got complex128"),
    "longdouble": (lambda: np.ones(4, np.longdouble), "float32.*got"),
    "read-only": (read_only, "writable, got"),
    "strided": (lambda: np.ones(8, np.float32)[::2], "C-contiguous, got"),
    "fortran": (lambda: np.ones((2, 3), np.float32, "F"), "C-contiguous, got"),
    "swapped": (lambda: np.ones(4, np.dtype(np.float32).newbyteorder()), "native byte order, got"),
    "unaligned": (lambda: np.frombuffer(bytearray(17), np.float32, offset=1), "aligned.*got"),
    "list": (lambda: [1.0, 2.0], "NumPy array or a DLPack exporter, got list"),
    "None": (lambda: None, "NumPy array or a DLPack exporter, got NoneType"),
    "masked": (lambda: np.ma.masked_array(np.ones(4, np.float32), [0, 1, 0, 0]), "plain array"),
    "CUDA": (lambda: Exporter(np.ones(4, np.float32), (2, 3)), r"CPU memory, got device type 2"),
    "torch meta": (lambda: torch.ones(4, device="meta"), "CPU memory, got device meta"),
    "torch int": (lambda: torch.ones(4, dtype=torch.int32), "float32.*got int32"),
    "torch strided": (lambda: torch.ones(4, 4).T, "C-contiguous, got"),
    "exporter read-only": (lambda: Exporter(read_only()), "got"),
}


@pytest.mark.parametrize("what", list(BAD_PARAMS))
@pytest.mark.parametrize("place", ["first", "last"])
def test_param_bad_is_refused_at_construction(what, place):
    make, says = BAD_PARAMS[what]
    good = np.ones(4, np.float32)
    params = {"bad": make(), "good": good} if place == "first" else {"good": good, "bad": make()}
    with pytest.raises(BAD_CALL, match=rf"(?s)params\[bad\] must.*{says}"):
        fs.Adam(params)
    assert good.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("params", [3, 1.5, "abc", None, np.float32(1), object()])
def test_params_of_a_wrong_type_are_refused(params):
    with pytest.raises(TypeError, match="params"):
        fs.Adam(params)


def test_params_names_must_be_distinct_as_text():
    arrays = [np.ones(2, np.float32) for _ in range(2)]
    with pytest.raises(ValueError, match="params must have distinct names, got"):
        fs.SGD({1: arrays[0], "1": arrays[1]})


def test_param_that_becomes_read_only_is_refused_at_the_step():
    params = ones()
    opt = fs.Adam(params)
    opt.step(ones())
    params["c"].flags.writeable = False
    with refused(opt, r"params\[c\] must be writable, got"):
        opt.step(ones())


def empties():
    yield np.ones(0, np.float32)
    yield np.ones((3, 0, 2), np.float64)
    yield []
    yield {}
    yield {"a": np.ones(0, np.float32), "b": np.ones(0, np.float16)}
    yield fs.FlatBuffer.pack([])
    yield fs.FlatBuffer.zeros([(0,), (0, 4)])


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("params", list(empties()), ids=str)
def test_empty_is_fine(cls, params):
    opt = cls(params)
    assert opt.step(params) == (1, opt.param_groups[0]["lr"], 0)
    assert opt.step(params).step == 2
    cls(params).load_state_dict(opt.state_dict())


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_empty_tensor_is_fine(cls):
    test_empty_is_fine(cls, torch.ones(0))


def test_empty_array_among_others_is_counted_like_them():
    params = {"a": np.ones(0, np.float32), "b": np.ones(2, np.float32)}
    opt = fs.Adam(params)
    assert opt.step({"a": np.ones(0, np.float32), "b": np.ones(2, np.float32)}).elements == 2
    assert [entry["step"] for entry in opt.state_dict()["state"].values()] == [1, 1]


# -- None -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_grad_none_leaves_its_tensor_and_its_count_alone(cls):
    params, alone = ones(), {"b": np.ones(5, np.float32)}
    opt, other = cls(params, lr=0.1), cls(alone, lr=0.1)
    for step in range(3):
        grads = {**ones(), "b": None if step == 1 else np.full(5, 0.5 - step, np.float32)}
        before = params["b"].tobytes(), {k: v.tobytes() for k, v in opt.state["b"].items()}
        report = opt.step(grads)
        assert report.elements == (14 if step == 1 else 19)
        if step == 1:
            after = params["b"].tobytes(), {k: v.tobytes() for k, v in opt.state["b"].items()}
            assert after == before
        else:
            other.step({"b": grads["b"]})
    # The tensor fares as if the step it sat out had not been.
    assert params["b"].tobytes() == alone["b"].tobytes()
    mine, its = opt.state_dict()["state"].get(1, {}), other.state_dict()["state"].get(0, {})
    assert {k: np.asarray(v).tobytes() for k, v in mine.items()} == {
        k: np.asarray(v).tobytes() for k, v in its.items()
    }


def test_grads_all_none_change_nothing_but_the_step_number():
    opt = fs.Adam(ones())
    before = snapshot(opt)
    assert opt.step(dict.fromkeys(SHAPES)).elements == 0
    after = snapshot(opt)
    assert after[:4] == before[:4]
    assert opt.steps == 1


# -- hyperparameters ------------------------------------------------------------------------------

FINITE = [-1e9, -1.0, -1e-12, -0.0, 0.0, 1e-300, 0.3, 0.5, 0.999999, 1.0, 1.0000001, 1.5, 1e9]
OPEN = {"dampening", "lambd", "t0"}  # torch takes any number


def hyper_names(cls):
    skip = {"self", "params", "groups", *_storage.HOW}
    return [name for name in inspect.signature(cls.__init__).parameters if name not in skip]


def default(cls, name):
    return inspect.signature(cls.__init__).parameters[name].default


def numeric(cls):
    return [n for n in hyper_names(cls) if not isinstance(default(cls, n), bool)]


def accepted(make):
    try:
        make()
    except (ValueError, TypeError):
        return False
    return True


def torch_class(cls):
    return getattr(torch.optim, cls.__name__, None)


def spread(cls, name, values):
    """`values` as values of a hyperparameter, in each place of a tuple."""
    whole = default(cls, name)
    if not isinstance(whole, tuple):
        return values
    return [(*whole[:i], v, *whole[i + 1 :]) for i in range(len(whole)) for v in values]


RANGES = [(cls, name) for cls in OPTIMIZERS for name in numeric(cls)]


@pytest.mark.parametrize(("cls", "name"), RANGES)
def test_hyper_range_is_torch_s(cls, name):
    peer = torch_class(cls)
    if peer is None or name not in inspect.signature(peer.__init__).parameters:
        known = cls.__name__ in WITHOUT_PEER or name in cls._spec.beyond_torch
        assert known, f"torch has no {cls.__name__}.{name}: where does its range come from?"
        low = 4 if name == "threshold" else 0  # below 4 RAdam takes the root of a negative number
        rule = (lambda x: 0 <= x < 1) if name == "betas" else (lambda x: x >= low)
        for value in spread(cls, name, FINITE):
            fine = all(map(rule, value)) if isinstance(value, tuple) else rule(value)
            assert accepted(lambda v=value: cls(ones(), **{name: v})) == fine, value
        return
    for value in spread(cls, name, FINITE):
        ours = accepted(lambda v=value: cls(ones(), **{name: v}))
        theirs = accepted(lambda v=value: peer([torch.ones(2)], **{name: v}))
        assert ours == theirs, value


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    list(itertools.product([0.0, 0.5], [0.0, 0.1, -0.1], [False, True])),
)
def test_nesterov_conditions_are_torch_s(momentum, dampening, nesterov):
    keywords = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
    ours = accepted(lambda: fs.SGD(ones(), **keywords))
    assert ours == accepted(lambda: torch.optim.SGD([torch.ones(2)], lr=1e-3, **keywords))
    if not ours:
        with pytest.raises(ValueError, match=r"nesterov needs momentum > 0 and dampening = 0, got"):
            fs.SGD(ones(), **keywords)


@pytest.mark.parametrize(("cls", "name"), RANGES)
def test_hyper_nan_is_refused(cls, name):
    for value in spread(cls, name, [math.nan, np.float32("nan"), np.array(math.nan)]):
        with pytest.raises(ValueError, match=rf"^{name}(\[\d\])? must be .*, got .*nan"):
            cls(ones(), **{name: value})


@pytest.mark.parametrize(("cls", "name"), RANGES)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_hyper_infinite_is_refused_where_torch_has_no_rule(cls, name, value):
    free = name in OPEN or (cls is fs.ASGD and name == "alpha")
    if free or (value < 0 and name != "step_sizes"):
        for spreaded in spread(cls, name, [value]):
            with pytest.raises(ValueError, match=rf"^{name}(\[\d\])? must be .*, got .*inf"):
                cls(ones(), **{name: spreaded})


MESSAGES = [
    (fs.Adam, {"betas": (0.9, 1.0)}, "betas[1] must be in [0, 1), got 1.0"),
    (fs.Adam, {"betas": (-0.5, 0.9)}, "betas[0] must be in [0, 1), got -0.5"),
    (fs.SGD, {"lr": -1.0}, "lr must be >= 0, got -1.0"),
    (fs.SGD, {"momentum": -2}, "momentum must be >= 0, got -2"),
    (fs.Adadelta, {"rho": 1.5}, "rho must be in [0, 1], got 1.5"),
    (fs.Rprop, {"etas": (0.5, 0.9)}, "etas must be 0 < etas[0] < 1 < etas[1], got (0.5, 0.9)"),
    (fs.ASGD, {"t0": math.inf}, "t0 must be finite, got inf"),
]


@pytest.mark.parametrize(("cls", "keywords", "message"), MESSAGES)
def test_hyper_message_has_argument_rule_and_value(cls, keywords, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cls(ones(), **keywords)


@pytest.mark.parametrize(("cls", "name"), RANGES)
@pytest.mark.parametrize(
    "value",
    ["0.1", b"1", True, False, np.True_, None, [0.1], 1j, np.ones(1), [[1], [1, 2]], {}, ...],
    ids=str,
)
def test_hyper_number_of_a_wrong_type_is_refused(cls, name, value):
    for spreaded in spread(cls, name, [value]):
        with pytest.raises(TypeError, match=rf"^{name}(\[\d\])? must be a"):
            cls(ones(), **{name: spreaded})


def test_hyper_integer_too_large_for_a_double_counts_as_infinite():
    with pytest.raises(ValueError, match=r"^dampening must be finite, got 1000"):
        fs.SGD(ones(), dampening=10**400)
    assert fs.SGD(ones(), lr=10**400).param_groups[0]["lr"] == math.inf


@pytest.mark.parametrize("betas", [0.9, None, (0.9,), (0.9, 0.99, 0.999), "ab", True, 1j])
def test_hyper_pair_must_be_two_numbers(betas):
    with pytest.raises(TypeError, match=r"^betas(\[0\])? must be a"):
        fs.Adam(ones(), betas=betas)


FLAGS = [(cls, name) for cls in OPTIMIZERS for name in hyper_names(cls) if name not in numeric(cls)]


@pytest.mark.parametrize(("cls", "name"), FLAGS)
def test_hyper_flag_must_be_a_bool(cls, name):
    for value in (0, 1, 1.0, "True", "", None, [], np.array([True])):
        with pytest.raises(TypeError, match=f"^{name} must be True or False, got"):
            cls(ones(), **{name: value})
    extra = {"momentum": 0.5} if name == "nesterov" else {}
    for value in (True, np.True_):
        assert cls(ones(), **extra, **{name: value}).param_groups[0][name] is True


@pytest.mark.parametrize(
    "kind", [np.float64, np.float32, np.array, lambda x: torch.tensor(x), np.float16]
)
def test_hyper_number_may_be_any_real_scalar(kind):
    number = kind(0.5)
    assert fs.SGD(ones(), lr=number, momentum=number).param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_hyper_unknown_keyword_is_refused(cls):
    with pytest.raises(TypeError, match="learning_rate"):
        cls(ones(), learning_rate=0.1)
    with pytest.raises(ValueError, match=r"hyperparameter must be one of lr.*'learning_rate'"):
        cls(ones()).param_groups[0]["learning_rate"] = 0.1


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("lr", -1.0, "lr must be >= 0, got -1.0"),
        ("lr", "1", "lr must be a number"),
        ("betas", (0.9, 1.0), r"betas\[1\] must be in \[0, 1\), got 1.0"),
        ("eps", math.nan, "eps must be >= 0, got nan"),
        ("maximize", 1, "maximize must be True or False, got 1"),
        ("params", [0], "hyperparameter must be one of"),
    ],
)
def test_hyper_edit_is_checked_and_refused_edits_change_nothing(opt, name, value, says):
    for group in opt.param_groups:
        with refused(opt, says):
            group[name] = value
        with refused(opt, says):
            group.update({name: value})
        with refused(opt, "stay", error=TypeError):
            del group[name]


def test_hyper_edits_that_do_not_go_together_are_refused_at_the_step():
    opt = fs.SGD(ones(), lr=0.1, momentum=0.5, groups=[fs.Group("b", momentum=0.0)])
    opt.step(ones())
    opt.param_groups[0]["lr"] = 0.2
    opt.param_groups[1]["nesterov"] = True  # its momentum is 0
    for _ in range(2):  # it must not be forgotten after the first refusal
        with refused(opt, "nesterov needs momentum > 0"):
            opt.step(ones())
    opt.param_groups[1]["momentum"] = 0.5
    opt.step(ones())


# -- groups ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group", "error", "says"),
    [
        (lambda: fs.Group("b", momentum=0.5), ValueError, "momentum"),
        (lambda: fs.Group("b", params=[0]), ValueError, "params"),
        (lambda: fs.Group("b", lr=-1.0), ValueError, "lr must be >= 0, got -1.0"),
        (lambda: fs.Group("b", betas=(0.5, 1.0)), ValueError, r"betas\[1\] must be in"),
        (lambda: fs.Group("b", amsgrad=1), TypeError, "amsgrad must be True or False, got 1"),
        (lambda: fs.Group("b", decoupled_weight_decay=False), ValueError, "decoupled_weight_decay"),
        (lambda: fs.Group("x*", lr=1.0), ValueError, r"Group\('x\*'.*must match.*'a', 'b', 'c'"),
        (lambda: fs.Group("B", lr=1.0), ValueError, "must match"),
        (lambda: fs.Group(["x", "y"], lr=1.0), ValueError, "must match"),
        (lambda: fs.Group([]), TypeError, "pattern must be a string"),
        (lambda: fs.Group(["a", 3]), TypeError, "pattern must be a string"),
        (lambda: fs.Group(3), TypeError, "not iterable|pattern must be"),
        (lambda: {"params": ["a"], "lr": 1.0}, TypeError, "groups must be Group objects"),
        (lambda: "b", TypeError, "groups must be Group objects"),
    ],
)
def test_group_bad_is_refused(group, error, says):
    with pytest.raises(error, match=says):
        fs.AdamW(ones(), groups=[group()])


def test_group_that_an_earlier_one_shadows_is_refused():
    with pytest.raises(ValueError, match=r"Group\('b', .*must match a parameter that no earlier"):
        fs.SGD(ones(), groups=[fs.Group("[ab]", lr=0.1), fs.Group("b", lr=0.2)])


def test_group_values_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="nesterov needs momentum > 0"):
        fs.SGD(ones(), groups=[fs.Group("b", nesterov=True)])


# -- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["default", "group"])
@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (math.nan, ValueError, "lr must be >= 0, got nan"),
        (-1e-9, ValueError, "lr must be >= 0, got -1e-09"),
        ("0.1", TypeError, "lr must be a number"),
        (None, TypeError, "lr must be a number"),
        (True, TypeError, "lr must be a number"),
        ([0.1], TypeError, "lr must be a number"),
        (np.array([0.1]), TypeError, "lr must be a number"),
        (ZeroDivisionError("boom"), ZeroDivisionError, "boom"),
    ],
)
def test_schedule_that_fails_changes_nothing(where, value, error, says):
    current = [0.1]

    def schedule(t):
        if isinstance(current[0], Exception):
            raise current[0]
        return current[0]

    group = fs.Group("b", lr=schedule if where == "group" else 0.3)
    opt = fs.Adam(ones(), lr=schedule if where == "default" else 0.3, groups=[group])
    opt.step(ones())
    before = snapshot(opt)
    current[0] = value
    with pytest.raises(error, match=says):
        opt.step(ones())
    current[0] = 0.1  # state_dict, which the snapshot reads, asks the schedule too
    assert snapshot(opt) == before
    assert opt.step(ones()).step == 2


def test_schedule_is_asked_again_for_the_step_that_failed():
    asked = []
    opt = fs.SGD(ones(), lr=lambda t: asked.append(t) or 0.1)
    opt.step(ones())
    with pytest.raises(ValueError, match="grads"):
        opt.step([])
    opt.step(ones())
    assert asked == [0, 1, 1]
