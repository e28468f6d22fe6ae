"""`SGD.lookahead` of both layers: one arithmetic, that of a step."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import fusedstep as fs
import fusedstep.torch as ft

LR, MOMENTUM = 0.1, 0.9
REAL = {
    "float32": np.float32,
    "float64": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}
SHAPE = (5, 6, 7)


def gaps(tensor):
    view = tensor.new_zeros([2 * n for n in tensor.shape])[::2, 1::2, ::2]
    return view.copy_(tensor)


LAYOUTS = {
    "contiguous": lambda t: t,
    "permuted": lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "gaps": gaps,
}


def drawn(seed, dtype, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return (rng.choice([-1, 1], shape) * rng.uniform(0.1, 2, shape)).astype(dtype)


def as_tensor(array):
    """A tensor of its own with the array's bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def bits(values):
    if isinstance(values, torch.Tensor):
        values = values.detach().resolve_conj().resolve_neg().contiguous()
        values = values.view(torch.uint8 if values.dim() else values.dtype).numpy()
    return values.tobytes()


def ahead_of(p, b):
    """p - lr*momentum*b in one rounding of the type that steps compute in, then to p's."""
    wide = np.float64 if p.dtype == np.float64 else np.float32
    reach = Fraction(float(wide(LR * MOMENTUM)))
    pairs = zip(p.flat, b.flat, strict=True)
    exact = [Fraction(float(x)) - reach * Fraction(float(y)) for x, y in pairs]
    if wide is np.float64:
        moved = [float(x) for x in exact]  # correctly rounded
    else:  # of so few bits that a long double holds them all
        moved = [np.longdouble(x.numerator) / np.longdouble(x.denominator) for x in exact]
    return np.array(moved).astype(wide).astype(p.dtype).reshape(p.shape)


@pytest.mark.parametrize("isa", fs.usable_isas(), indirect=True)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", REAL)
def test_look_ahead_has_the_same_bits_in_both_layers(dtype, layout, isa):
    start, grad = drawn(1, REAL[dtype]), drawn(2, REAL[dtype])
    array, param = start.copy(), torch.nn.Parameter(LAYOUTS[layout](as_tensor(start)))
    neutral = fs.SGD(array, lr=LR, momentum=MOMENTUM)
    torch_s = ft.SGD([param], lr=LR, momentum=MOMENTUM)
    neutral.step(grad)
    param.grad = LAYOUTS[layout](as_tensor(grad))
    torch_s.step()
    before = bits(array)
    assert bits(param) == before
    with neutral.lookahead(), torch_s.lookahead():
        assert bits(param) == bits(array) != before
        wanted = ahead_of(np.frombuffer(before, array.dtype), neutral.state[0]["momentum_buffer"])
        assert bits(array) == bits(wanted)
    assert bits(param) == bits(array) == before


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16", "q8"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_look_ahead_follows_the_numbers_of_a_narrow_buffer(dtype, state_dtype):
    array, grad = drawn(0, REAL[dtype]), drawn(1, np.float32)
    param = torch.nn.Parameter(as_tensor(array).permute(2, 0, 1).contiguous().permute(1, 2, 0))
    how = {"lr": LR, "momentum": MOMENTUM, "state_dtype": state_dtype}
    neutral, torch_s = fs.SGD(array, **how), ft.SGD([param], **how)
    param.grad = as_tensor(grad).to(param.dtype)
    neutral.step(grad)
    torch_s.step()
    before, narrow = array.copy(), bits(neutral.state[0]["momentum_buffer"])
    buffer = neutral.state_dict(state_dtype="float32")["state"][0]["momentum_buffer"]
    with neutral.lookahead(), torch_s.lookahead():
        assert bits(array) == bits(ahead_of(before, buffer)) == bits(param)
    assert bits(array) == bits(before) == bits(param)
    assert bits(neutral.state[0]["momentum_buffer"]) == narrow


@pytest.mark.parametrize("lazy", ["plain", "conj", "neg"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_look_ahead_of_complex_tensors_is_that_of_their_reals(dtype, layout, lazy):
    real = np.float32 if dtype == np.complex64 else np.float64
    start, grad = (drawn(seed, real, (*SHAPE, 2)) for seed in (1, 2))
    array = start.copy()
    values, toward = (LAYOUTS[layout](torch.view_as_complex(as_tensor(a))) for a in (start, grad))
    if lazy == "conj":
        values = values.conj().resolve_conj().conj()
    if lazy == "neg":
        values = torch._neg_view(-values)
    param = values.requires_grad_()
    assert (param.is_conj(), param.is_neg()) == (lazy == "conj", lazy == "neg")
    neutral = fs.SGD(array, lr=LR, momentum=MOMENTUM)
    torch_s = ft.SGD([param], lr=LR, momentum=MOMENTUM)
    neutral.step(grad)
    param.grad = toward
    torch_s.step()
    before = bits(array)
    assert bits(param) == before
    with neutral.lookahead(), torch_s.lookahead():
        assert bits(param) == bits(array) != before
    assert bits(param) == bits(array) == before


def test_look_ahead_of_torch_overflows_to_infinity_as_a_step_does():
    array = np.array([6e4, -6e4, 1], np.float16)
    param = torch.nn.Parameter(as_tensor(array))
    neutral = fs.SGD(array, lr=1.0, momentum=0.9)
    torch_s = ft.SGD([param], lr=1.0, momentum=0.9)
    grad = np.array([-5e3, 5e3, 1], np.float16)
    neutral.step(grad)
    param.grad = as_tensor(grad)
    torch_s.step()
    with neutral.lookahead(), torch_s.lookahead():
        assert np.isinf(array[:2]).all()
        assert bits(param) == bits(array)


def test_look_ahead_of_tensors_runs_no_step_hook():
    param = torch.nn.Parameter(torch.ones(3))
    opt = ft.SGD([param], lr=LR, momentum=MOMENTUM)
    param.grad = torch.ones(3)
    opt.step()
    ran = []
    hook = register_optimizer_step_pre_hook(lambda *_: ran.append(1))
    try:
        with opt.lookahead():
            pass
    finally:
        hook.remove()
    assert ran == []
    assert torch.equal(param.grad, torch.ones(3))


def test_look_ahead_names_a_buffer_of_another_shape():
    param = torch.nn.Parameter(torch.ones(3))
    opt = ft.SGD([("weight", param)], lr=LR, momentum=MOMENTUM)
    param.grad = torch.ones(3)
    opt.step()
    before = bits(param)
    opt.state[param]["momentum_buffer"] = torch.ones(2)
    wanted = r"state\[weight\]\['momentum_buffer'\] must have shape \(3,\), got \(2,\)"
    with pytest.raises(ValueError, match=wanted), opt.lookahead():
        pass
    assert bits(param) == before


def test_look_ahead_of_a_buffer_that_has_the_rate_takes_it_as_it_is():
    # At a constant rate both forms are one method.
    found = []
    for within in (False, True):
        p = np.array([1.0, -2.0])
        opt = fs.SGD(p, lr=0.25, momentum=0.5, lr_in_momentum=within)
        for _ in range(4):
            with opt.lookahead():
                g = 2 * p
            opt.step(g)
        found.append(p)
    assert np.array_equal(*found)
    assert found[0][0] != 1
