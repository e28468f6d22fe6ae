"""What a step does beside its rule, averages, copies, zeros and clipping, against torch."""

import copy

import pytest
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedstep.torch as ft
from cases import CASES
from fusedstep.torch.tensors import Swap, _SwapThere
from test_torch_narrow import assert_same, optimizer, params_of, set_grads, train
from this_torch import recalled

each_class = pytest.mark.parametrize("name", CASES)
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64]
)


@each_dtype
@each_class
def test_one_step_is_torch_s_sequence(name, dtype):
    mine, theirs = params_of(dtype), params_of(dtype)
    frozen = [torch.nn.Parameter(torch.ones(3, dtype=dtype)) for _ in range(2)]
    low = torch.complex64 if dtype.is_complex else torch.float16
    shadows = [torch.zeros_like(p, dtype=low) for p in [*mine, frozen[0]]]
    opt = optimizer(name, [*mine, frozen[0]], ema=0.75, zero_grad=True, shadow=shadows)
    oracle = optimizer(name, [*theirs, frozen[1]])
    average = [p.detach().clone() for p in theirs]
    for step in range(4):
        set_grads(mine, step)
        set_grads(theirs, step)
        opt.step(max_norm=1.0)
        if dtype.is_complex:  # torch clips its norm in another way
            oracle.step(max_norm=1.0)
        else:
            clip_grad_norm_(theirs, 1.0)
            oracle.step()
        if step == 0:
            average = [p.detach().clone() for p in theirs]
        else:
            torch._foreach_lerp_(average, [p.detach() for p in theirs], 0.25)
        for p, q, shadow in zip(mine, theirs, shadows, strict=False):
            # torch rounds bfloat16 gradients as it clips them.
            coarse = (2**-6, 2**-8) if dtype == torch.bfloat16 else (1e-4, 1e-5)
            torch.testing.assert_close(p, q, rtol=coarse[0], atol=coarse[1])
            assert torch.equal(shadow, p.detach().to(low))
            assert torch.equal(p.grad, torch.zeros_like(p))
    for p, expected in zip(mine, average, strict=True):
        found = opt.state[p]["ema"]
        coarse = 0.02 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(found.to(dtype), expected, rtol=coarse, atol=coarse)
    assert torch.equal(opt.state[frozen[0]]["ema"], torch.ones_like(opt.state[frozen[0]]["ema"]))
    assert torch.equal(shadows[-1], torch.ones(3, dtype=low))


def test_averages_are_those_of_averaged_model():
    module = torch.nn.Linear(5, 3)
    module.bias.requires_grad_(False)
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    opt = ft.SGD(module.parameters(), lr=0.1, ema=0.9)
    for step in range(5):
        set_grads([module.weight], step)
        opt.step()
        averaged.update_parameters(module)
    for param, expected in zip(module.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(opt.state[param]["ema"], expected.detach(), rtol=1e-6, atol=0)


def test_a_decay_is_called_with_the_number_of_averages():
    seen = []
    params = params_of()
    opt = ft.SGD(params, lr=0.1, ema=lambda n: seen.append(n) or n / (n + 1))
    train(params, opt, range(3))
    train(params, opt, range(3, 4), ema=None)
    other = ft.SGD(params, lr=0.1, ema=opt._each.ema)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(params, other, range(4, 5))
    assert seen == [0, 1, 2, 3]


def test_clip_value_comes_after_the_norm():
    mine, theirs = params_of(), params_of()
    opt, oracle = ft.SGD(mine, lr=0.5, clip_value=0.01), ft.SGD(theirs, lr=0.5)
    for its in (mine, theirs):
        set_grads(its, 0)
    mine[1].grad[7] = theirs[1].grad[7] = torch.inf
    opt.step(max_norm=torch.inf)
    clip_grad_value_(theirs, 0.01)
    oracle.step()
    assert_same(mine, theirs)
    assert opt.grad_norm == torch.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_swaps_as_the_cpu_does(dtype):
    special = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-40, 3.0001, -1.998])
    params = [torch.cat([special, torch.randn(50)]).to(dtype) for _ in range(2)]
    averages = [torch.cat([torch.randn(50), special]) for _ in range(2)]
    params[1].copy_(params[0])
    averages[1].copy_(averages[0])
    there, here = _SwapThere(params[:1], averages[:1]), Swap([(params[1], averages[1])])
    before = [tensor.clone() for tensor in (params[0], averages[0])]
    there.swap()
    here()
    assert_same([params[0], averages[0]], [params[1], averages[1]])
    there.swap()
    here()
    assert_same([params[0]], before[:1])
    torch.testing.assert_close(averages[0], before[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ema_dtype", [None, "float64", "bfloat16", "parameter"])
@pytest.mark.parametrize("rounding", ["nearest", "split"])
@each_dtype
def test_averages_stand_in_the_parameters_place(dtype, rounding, ema_dtype):
    if rounding == "split" and dtype != torch.bfloat16:
        return
    if dtype.is_complex and ema_dtype == "bfloat16":
        return
    params = params_of(dtype)
    opt = optimizer("AdamW", params, ema=0.5, ema_dtype=ema_dtype, rounding=rounding)
    train(params, opt)
    before, averages = copy.deepcopy(params), [opt.state[p]["ema"].clone() for p in params]
    addresses = [p.data_ptr() for p in params]
    calls = (opt.step, opt.state_dict, lambda: copy.deepcopy(opt), opt.masters,
             lambda: opt.load_state_dict({}), lambda: opt.ema().__enter__())  # fmt: skip

    def evaluate():
        for p, average in zip(params, averages, strict=True):
            torch.testing.assert_close(p.detach(), average.to(dtype), rtol=2**-7, atol=0)
        assert addresses == [p.data_ptr() for p in params]
        for call in calls:
            with pytest.raises(RuntimeError, match="not inside it"):
                call()
        raise KeyError("evaluation")

    with pytest.raises(KeyError, match="evaluation"), opt.ema():
        evaluate()
    assert_same(params, before)
    assert_same([opt.state[p]["ema"] for p in params], averages)
    train(params, opt, range(4, 5))


def test_there_must_be_an_average():
    with pytest.raises(ValueError, match="ema must follow a step with ema="):
        ft.SGD(params_of(), lr=1.0).ema().__enter__()


def test_what_a_step_writes_is_known_to_autograd():
    params = params_of()
    shadow = torch.zeros(300)
    opt = ft.SGD(params, lr=0.1, zero_grad=True, ema=0.9)
    train(params, opt, range(1))
    set_grads(params, 1)
    average = opt.state[params[1]]["ema"]
    watched = [params[1], params[1].grad, shadow, average]
    versions = [t._version for t in watched]
    opt.step(shadow=[None, shadow, None])
    assert all(t._version > before for t, before in zip(watched, versions, strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [True, False])
def test_under_a_scaler(fused, bad):
    params, other = params_of(), params_of()
    shadow = [torch.zeros_like(p) for p in params]
    opt = ft.AdamW(params, lr=0.01, fused=fused, ema=0.9, shadow=shadow, zero_grad=True)
    oracle = ft.AdamW(other, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    train(params, opt, range(1))
    train(other, oracle, range(1))
    before = copy.deepcopy((params, shadow, opt.state_dict()["state"]))
    scaler.scale(torch.ones(()))
    set_grads(params, 1)
    for p in params:
        p.grad *= 4
    if bad:
        params[0].grad[0, 0] = torch.nan
    scaler.step(opt)
    if bad:
        after = (params, shadow, opt.state_dict()["state"])
        torch.testing.assert_close(after, before, rtol=0, atol=0)
        assert params[1].grad.any()
    else:
        train(other, oracle, range(1, 2))
        assert_same(params, other)
        assert_same(shadow, other)
        assert not any(p.grad.any() for p in params)


@pytest.mark.parametrize("layout", ["plain", "gaps", "expanded"])
def test_gradients_and_shadows_of_other_strides(layout):
    (param,) = params_of(shapes=((4, 6),))
    plain = copy.deepcopy(param)
    grad = torch.arange(24.0).view(4, 6)
    shadow = torch.full((4, 6), 7.0, dtype=torch.bfloat16)
    if layout != "plain":
        grad = torch.zeros(6, 8)[:, ::2].t().copy_(grad)
        shadow = torch.zeros(6, 4, dtype=torch.bfloat16).t()
    if layout == "expanded":
        grad = torch.ones(1, 6).expand(4, 6)
    param.grad, plain.grad = grad, grad.clone()
    opt = ft.SGD([param], lr=0.1, shadow=[shadow], zero_grad=True)
    if layout == "expanded":
        before = param.detach().clone()
        with pytest.raises(ValueError, match=r"grads\[0\] must have memory of its own"):
            opt.step()
        assert torch.equal(param, before)
        return
    opt.step()
    ft.SGD([plain], lr=0.1).step()
    assert torch.equal(param, plain)
    assert torch.equal(shadow, plain.detach().bfloat16())
    assert not grad.any()


@pytest.mark.parametrize(("shadow", "error"), [
    (torch.zeros(4), r"shadow\[1\] must have shape \(300,\), got \(4,\)"),
    (torch.zeros(300, dtype=torch.float64), r"shadow\[1\] must be float32, bfloat16 or float16"),
    (torch.zeros(300, dtype=torch.int16), r"shadow\[1\] must be float32"),
    (torch.zeros(300, device="meta"), r"shadow\[1\] must be on the CPU"),
    ("the parameter", r"params\[1\]|shadow\[1\]"),
    ("the gradient", r"grads\[1\]|shadow\[1\]"),
])  # fmt: skip
def test_a_shadow_that_does_not_fit_is_refused(shadow, error):
    params = params_of()
    opt = ft.AdamW(params, lr=0.1)
    train(params, opt)
    set_grads(params, 9)
    before = copy.deepcopy((params, opt.state_dict()))
    of = {"the parameter": params[1].detach(), "the gradient": params[1].grad}
    shadow = of.get(shadow, shadow) if isinstance(shadow, str) else shadow
    with pytest.raises((TypeError, ValueError), match=error):
        opt.step(shadow=[None, shadow, None], ema=0.9)
    torch.testing.assert_close((params, opt.state_dict()), before, rtol=0, atol=0)


def test_in_backward():
    model = torch.nn.Linear(5, 3)
    other = copy.deepcopy(model)
    shadow = [torch.zeros_like(p) for p in model.parameters()]
    opt = ft.SGD(model.parameters(), lr=0.1, ema=0.5, shadow=shadow, clip_value=0.3)
    oracle = ft.SGD(other.parameters(), lr=0.1, ema=0.5, clip_value=0.3)
    with ft.step_in_backward(model, opt):
        for step in range(3):
            x = torch.full((2, 5), float(step))
            for one, its in ((model, opt), (other, oracle)):
                one(x).square().sum().backward()
                its.step()
                its.zero_grad()
        with pytest.raises(RuntimeError, match="zero_grad must be False"):
            opt.step(zero_grad=True)
    assert_same(model.parameters(), other.parameters())
    assert_same(shadow, other.parameters())
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(opt.state[p]["ema"], oracle.state[q]["ema"])
    assert opt.param_groups[0]["averages"] == 3
    zeroing = ft.SGD(model.parameters(), lr=0.1, zero_grad=True)
    with pytest.raises(ValueError, match="optimizer must not be told to zero_grad"):
        ft.step_in_backward(model, zeroing)


def test_flat_parameters_are_averaged_and_zeroed():
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2)).bfloat16()
    other = copy.deepcopy(model)
    how = {"rounding": "split", "state_dtype": "q8", "ema": 0.5, "zero_grad": True}
    buffers = ft.flatten_(model)
    opt, oracle = (ft.AdamW(m.parameters(), lr=0.1, **how) for m in (model, other))
    for step in range(3):
        for m, its in ((model, opt), (other, oracle)):
            m(torch.full((2, 5), 1.0 + step).bfloat16()).sum().backward()
            its.step()
    assert_same(model.parameters(), other.parameters())
    assert not buffers.flat_grad.any()
    with opt.ema(), oracle.ema():
        assert_same(model.parameters(), other.parameters())


def test_states_that_nobody_sees_are_not_read_again():
    params, other = params_of(torch.bfloat16), params_of(torch.bfloat16)
    shadows = [torch.zeros_like(p) for p in params]
    how = {"rounding": "split", "state_dtype": "q8", "ema": 0.9, "zero_grad": True}
    opt, oracle = ft.AdamW(params, **how, shadow=shadows), ft.AdamW(other, **how)
    for step in range(5):
        train(params, opt, range(step, step + 1))
        assert oracle.state is not None
        train(other, oracle, range(step, step + 1))
    assert recalled(opt, len(params))
    assert_same(params, other)
    assert_same(shadows, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_add_rounds_once(dtype, other_dtype):
    into = params_of(dtype)
    others = [p.detach().to(other_dtype) for p in params_of(seed=1)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = 0.5  # so that the product is exact
    pairs = zip(into, others, strict=True)
    expected = [(a.to(wide) + scale * b.to(wide)).to(dtype) for a, b in pairs]
    versions = [p._version for p in into]
    assert ft.add_(into, others, scale=scale) is None
    assert_same(into, expected)
    assert all(p._version > before for p, before in zip(into, versions, strict=True))


def test_add_takes_strides_complex_numbers_and_none():
    into = [torch.zeros(6, 8)[:, ::2], torch.ones(3, dtype=torch.complex64).conj(), torch.zeros(2)]
    others = [torch.ones(4, 6).t(), torch.full((3,), 1j), None]
    ft.add_(into, others, scale=2.0)
    assert torch.equal(into[0], torch.full((6, 4), 2.0))
    assert torch.equal(into[1].resolve_conj(), torch.full((3,), 1 + 2j))
    assert not into[2].any()


@pytest.mark.parametrize(("others", "error"), [
    ([torch.zeros(3)], r"others\[0\] must have shape \(2,\), got \(3,\)"),
    ([torch.zeros(2, dtype=torch.int32)], r"others\[0\] must be float32"),
    ([torch.zeros(2, dtype=torch.complex64)], r"others\[0\] must be real"),
    ([None, None], "others must have 1 tensors, got 2"),
    ("itself", r"others\[0\] must not share memory with tensors\[0\]"),
])  # fmt: skip
def test_what_cannot_be_added_is_refused(others, error):
    into = [torch.ones(2)]
    with pytest.raises((TypeError, ValueError), match=error):
        ft.add_(into, into if others == "itself" else others)
    assert torch.equal(into[0], torch.ones(2))
