"""Clipped, unscaled and skipped steps: the step multiplies, measures or does nothing, by itself.

Beside each stands a plain step of gradients multiplied by hand, by one number computed here.
"""

import copy
import functools
import math
import pickle
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES, PAIRS, each_case, each_case_in_turn, each_pair, make
from test_against_torch import torch_has, torch_optimizer
from test_optimizers import contents, raw, to_torch
from test_torch_optimizers import TOLERANCES, bits, fingerprint

# More than a block of the norm, less than a row of it, one element, none.
SHAPES = {"w": (3, 7), "b": (513,), "none": (0, 3), "s": (), "m": (40,)}
TOTAL = 575
BAD = [math.inf, -math.inf, math.nan]
ASKED = [
    {"max_norm": 0.37},
    {"max_norm": 0.1, "loss_scale": 3.0},
    {"max_norm": 1e3, "loss_scale": 0.7},
]

each_class = pytest.mark.parametrize("name", CASES)
each_bad = pytest.mark.parametrize("bad", BAD)


def some_hypers(name):
    """A set with weight decay, or with whatever else its third set has."""
    return CASES[name][2]


# -- data ------------------------------------------------------------------------------------------


def params_of(dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.uniform(0.5, 2, s)).astype(dtype) for k, s in SHAPES.items()}


def grads_of(seed, dtype="float32"):
    """Numbers of seven binary digits: their squares add up exactly in double, in any order."""
    rng = np.random.default_rng(100 + seed)
    signed = {k: rng.choice([-1, 1], s) * rng.integers(1, 128, s) for k, s in SHAPES.items()}
    return {k: np.asarray(a / 1024).astype(dtype) for k, a in signed.items()}


def exact_norm(grads, compute=np.float64):
    """Of gradients as a step reads them that computes in `compute`."""
    values = np.concatenate([np.asarray(g).astype(compute).astype("f8").ravel() for g in grads])
    return math.sqrt(math.fsum((values * values).tolist()))


def clip_of(norm, max_norm):
    return min(1.0, max_norm / (norm + 1e-6))


def factor_of(grads, compute, max_norm, loss_scale=1.0):
    """What a gradient is multiplied by, in the type that the step computes in."""
    inverse = 1 / loss_scale
    return compute(inverse * clip_of(exact_norm(grads, compute) * inverse, max_norm))


def in_torch(arrays):
    return [to_torch(np.array(a)) for a in arrays.values()]


class ByHand:
    """A plain optimizer fed with multiplied gradients, exact where parameters are narrow.

    It steps the parameters in the type that is computed in, and rounds them after each step.
    """

    def __init__(self, name, params, hypers):
        self.dtypes = {k: a.dtype for k, a in params.items()}
        self.compute = np.float64 if self.dtypes["w"] == np.float64 else np.float32
        self.wide = {k: a.astype(self.compute) for k, a in params.items()}
        self.opt = make(name, self.wide, hypers)

    def step(self, grads, factor):
        self.opt.step(
            {
                k: None if g is None else np.asarray(g.astype(self.compute) * self.compute(factor))
                for k, g in grads.items()
            }
        )
        for key, array in self.wide.items():
            with np.errstate(over="ignore"):
                array[...] = array.astype(self.dtypes[key]).astype(self.compute)

    def contents(self):
        params = {k: a.astype(self.dtypes[k]).tobytes() for k, a in self.wide.items()}
        return (params, *contents(self.opt)[1:])


def leaves(params):
    return [torch.nn.Parameter(t) for t in in_torch(params)]


def set_grads(params, grads):
    for param, grad in zip(params, in_torch(grads), strict=True):
        if grad.dtype != param.dtype:
            param.grad_dtype = grad.dtype
        param.grad = grad


def of_torch(name, dtype="float32", hypers=None):
    """Parameters and fusedstep.torch's optimizer of them."""
    params = leaves(params_of(dtype))
    return params, getattr(ft, name)(params, **(hypers or {}))


def of_both(params, opt):
    """What a torch optimizer has computed, as `contents` has it."""
    names = [k for group in opt.param_groups for k in range(len(group["params"]))]
    assert len(names) == len(SHAPES)
    states = {
        i: {k: float(v) if v.ndim == 0 and k == "step" else raw(v) for k, v in opt.state[p].items()}
        for i, p in enumerate(params)
        if p in opt.state
    }
    return {k: raw(p) for k, p in zip(SHAPES, params, strict=True)}, states


# -- the factor ------------------------------------------------------------------------------------


@each_case_in_turn()
def test_clipped_step_is_the_step_of_gradients_multiplied_by_hand(name, hypers, param, grad):
    params = params_of(param)
    hand, opt = ByHand(name, params, hypers), make(name, params, hypers)
    for seed, asked in enumerate(ASKED):
        grads = grads_of(seed, grad)
        factor = factor_of(grads.values(), hand.compute, **asked)
        assert (factor == 1 / hand.compute(asked.get("loss_scale", 1))) == (seed == 2)
        report = opt.step(grads, **asked)
        hand.step(grads, factor)
        assert (report.step, report.elements) == (seed + 1, TOTAL)
        norm = exact_norm(grads.values(), hand.compute)
        assert opt.grad_norm == norm * (1 / asked.get("loss_scale", 1.0))
        assert contents(opt) == hand.contents()


@each_case_in_turn()
def test_torch_s_clipped_step_has_the_bits_of_the_neutral_one(name, hypers, param, grad):
    if grad != param and not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    params, opt = of_torch(name, param, hypers)
    arrays = params_of(param)
    neutral = make(name, arrays, hypers)
    for seed, max_norm in enumerate([0.37, 0.1, 1e3]):
        set_grads(params, grads_of(seed, grad))
        before = [bits(p.grad) for p in params]
        versions = [(p._version, p.grad._version) for p in params]
        assert opt.step(max_norm=max_norm) is None
        neutral.step(grads_of(seed, grad), max_norm=max_norm)
        assert [bits(p.grad) for p in params] == before
        assert [(p._version - 1, p.grad._version) for p in params] == versions
        assert float(opt.grad_norm) == neutral.grad_norm
        assert [raw(p) for p in params] == [raw(a) for a in arrays.values()]
    for i, entry in neutral.state_dict()["state"].items():
        mine = opt.state[params[i]]
        assert set(mine) == set(entry)
        for key, value in entry.items():
            value = torch.as_tensor(np.asarray(value))  # Python's numbers as doubles
            assert bits(mine[key].double()) == bits(value.to(mine[key].dtype).double())


@each_pair()
def test_factor_is_rounded_once_to_the_type_computed_in(param, grad):
    # Norms whose last digits a sum in another order would change, and none of whose factors lies so
    # near the middle of two floats that this could round it to the other.
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        grads = [(rng.normal(size=700) * 2.0 ** rng.uniform(-6, 0, 700)).astype(grad)]
        compute = np.float64 if param == "float64" else np.float32
        norm = exact_norm(grads, compute)
        near = {compute(clip_of(norm * (1 + e * 2e-15), 0.3)) for e in (-1, 1)}
        if len(near) > 1 and compute is np.float32:
            continue
        start = np.zeros(700, compute)
        opt = fs.SGD([start.astype(param)], lr=1.0, momentum=0.5)
        opt.step(grads, max_norm=0.3)
        wide = grads[0].astype(compute)
        got = opt.state[0]["momentum_buffer"]
        if compute is np.float32:
            assert got.tobytes() == (wide * near.pop()).tobytes()
        else:
            np.testing.assert_allclose(got, wide * clip_of(norm, 0.3), rtol=4e-15)
        assert opt.grad_norm == pytest.approx(norm, rel=1e-15)
        hits += 1
    assert hits > 30


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_norm_feels_what_is_added_to_it(dtype):
    grads = np.full(4, 2.0**-21, dtype)
    opt = fs.SGD([np.zeros(4, dtype)], lr=1.0)
    opt.step([grads], max_norm=2.0**-21)
    norm = 2.0**-20
    assert opt.grad_norm == norm
    expected = -grads * grads.dtype.type(2.0**-21 / (norm + 1e-6))
    assert opt.params[0].tobytes() == expected.tobytes()
    # At the norm itself torch clips a little, too.
    again = fs.SGD([np.zeros(4, dtype)], lr=1.0)
    again.step([grads], max_norm=norm)
    assert abs(again.params[0][0]) < 0.6 * grads[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clipped_gradient_is_torch_s_to_a_few_ulp(dtype):
    torch.manual_seed(0)
    for shape in [(5,), (70, 11), (3000,)]:
        mine = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        theirs = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
        theirs.grad = torch.randn(shape, dtype=dtype)
        mine.grad = theirs.grad.clone()
        opt = ft.SGD([mine], lr=1.0)
        opt.step(max_norm=0.7)
        norm = clip_grad_norm_([theirs], 0.7)
        torch.optim.SGD([theirs], lr=1.0, foreach=False).step()
        rtol = 6 * torch.finfo(dtype).eps  # norm, quotient and product, each rounded by torch
        torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=rtol, atol=0.0)
        torch.testing.assert_close(opt.grad_norm.to(dtype), norm.detach(), rtol=rtol, atol=0.0)


@pytest.mark.usefixtures("_double_scalars")
@each_case(torch_has)
def test_clipped_steps_match_torch(name, hypers):
    mine, opt = of_torch(name, "float64", hypers)
    theirs = leaves(params_of("float64"))
    oracle = torch_optimizer(name, theirs, hypers)
    for seed, max_norm in enumerate([0.4, 0.1, 100.0, 0.4, 0.0]):
        grads = grads_of(seed, "float64")
        set_grads(mine, grads)
        set_grads(theirs, grads)
        opt.step(max_norm=max_norm)
        norm = clip_grad_norm_(theirs, max_norm)
        oracle.step()
        torch.testing.assert_close(opt.grad_norm, norm.detach(), rtol=1e-14, atol=0.0)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-11, atol=1e-12)


@each_case()
@pytest.mark.parametrize("max_norm", [1e3, 1e300, math.inf])
def test_norm_below_max_norm_changes_no_bit(name, hypers, max_norm):
    mine, plain = make(name, params_of(), hypers), make(name, params_of(), hypers)
    tensors, opt = of_torch(name, hypers=hypers)
    for seed in range(3):
        grads = grads_of(seed)
        report = mine.step(grads, max_norm=max_norm)
        assert report == plain.step(grads)
        set_grads(tensors, grads)
        opt.step(max_norm=max_norm)
        assert mine.grad_norm == float(opt.grad_norm) == exact_norm(grads.values())
    assert contents(mine) == contents(plain)
    assert [raw(p) for p in tensors] == [raw(p) for p in plain.params.values()]


def same_numbers(mine, plain):
    """Equal bits but for the payloads of NaNs."""
    for a, b in zip(mine, plain, strict=True):
        np.testing.assert_array_equal(a, b)
        keep = ~np.isnan(a)
        assert np.array_equal(np.signbit(a)[keep], np.signbit(b)[keep])


def arrays_of(opt):
    states = [a for entry in opt.state.values() for a in entry.values()]
    return [*opt.params.values(), *states]


@each_class
@each_bad
def test_infinite_max_norm_only_measures_even_what_is_not_finite(name, bad):
    hypers = some_hypers(name)
    mine, plain = make(name, params_of(), hypers), make(name, params_of(), hypers)
    grads = grads_of(0)
    grads["b"][5] = bad
    mine.step(grads, max_norm=math.inf)
    plain.step(grads)
    np.testing.assert_array_equal(mine.grad_norm, abs(bad))
    same_numbers(arrays_of(mine), arrays_of(plain))
    finite = [np.isfinite(a).sum() for a in mine.params.values()]
    assert sum(finite) >= TOTAL - 1  # the others were not touched by it


@each_class
def test_max_norm_of_zero_is_a_step_of_zeros(name):
    hypers = some_hypers(name)
    mine, hand = make(name, params_of(), hypers), ByHand(name, params_of(), hypers)
    for seed in range(2):
        mine.step(grads_of(seed), max_norm=0)
        hand.step(grads_of(seed), 0.0)
        assert mine.grad_norm > 0
    assert contents(mine) == hand.contents()


def test_all_gradients_zero_stay_zero():
    opt = fs.SGD([np.ones(9, np.float32)], lr=1.0)
    for max_norm in (0.0, 1.0, math.inf):
        opt.step([np.zeros(9, np.float32)], max_norm=max_norm, skip_nonfinite=True)
        assert opt.grad_norm == 0.0
    assert (opt.params[0] == 1).all()


@each_bad
@pytest.mark.parametrize("layer", ["neutral", "torch"])
def test_norm_that_is_not_finite_spreads_as_in_torch(layer, bad):
    # NaN makes all of them NaN; infinity makes them zero, but itself NaN.
    grads = grads_of(0)
    grads["b"][512] = bad
    if layer == "torch":
        params, opt = of_torch("SGD", hypers={"lr": 1.0})
        set_grads(params, grads)
        opt.step(max_norm=1.0)
        found = [p.detach().numpy() for p in params]
    else:
        opt = fs.SGD(params_of(), lr=1.0)
        opt.step(grads, max_norm=1.0)
        found = list(opt.params.values())
    theirs = leaves(params_of())
    set_grads(theirs, grads)
    norm = clip_grad_norm_(theirs, 1.0)
    torch.optim.SGD(theirs, lr=1.0, foreach=False).step()
    for p, q in zip(found, theirs, strict=True):
        np.testing.assert_array_equal(p, q.detach().numpy())
    np.testing.assert_array_equal(float(opt.grad_norm), float(norm))
    everywhere = all(np.isnan(p).all() for p in found)
    assert everywhere == math.isnan(bad)


@each_class
def test_norm_of_nan_is_a_step_of_nans(name):
    hypers = some_hypers(name)
    mine, hand = make(name, params_of(), hypers), ByHand(name, params_of(), hypers)
    grads = spoiled(0, "float32", "w", (2, 6), math.nan)
    mine.step(grads, max_norm=1.0)
    hand.step(grads, math.nan)
    same_numbers(arrays_of(mine), arrays_of(hand.opt))
    assert all(
        np.isnan(a).any() for entry in mine.state.values() for a in entry.values() if a.size
    ) or name in ("Adamax", "Rprop")  # whose maximum and signs know no NaN


def test_squares_that_overflow_clip_to_zero_as_in_torch():
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    param.grad = torch.full((3,), 1e200, dtype=torch.float64)
    opt = ft.SGD([param], lr=1.0)
    opt.step(max_norm=1.0)
    assert opt.grad_norm == clip_grad_norm_([param], 1.0) == math.inf
    assert (param == 1).all()
    assert (param.grad == 0).all()
    # Those of float32 do not overflow, as they are added in double.
    wide = fs.SGD([np.zeros(3, np.float32)], lr=1.0)
    big = np.full(3, 3e38, np.float32)
    wide.step([big], max_norm=1.0)
    norm = exact_norm([big])
    assert wide.grad_norm == pytest.approx(norm, rel=1e-15)
    np.testing.assert_allclose(wide.params[0], -3e38 / norm, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_gradients_square_in_double(dtype):
    grads = np.full(8, 60000.0).astype(dtype)
    opt = fs.SGD([np.zeros(8, np.float32)], lr=1.0)
    opt.step([grads], max_norm=1.0)
    assert opt.grad_norm == exact_norm([grads])
    tiny = np.full(8, 2.0**-24).astype(dtype)  # float16's smallest
    opt.step([tiny], max_norm=math.inf)
    assert opt.grad_norm == exact_norm([tiny]) > 0


# -- what is left as it was, and what is told ------------------------------------------------------


@each_pair()
def test_gradients_are_read_and_not_written(param, grad):
    grads = grads_of(3, grad)
    grads["w"][1, 2] = -0.0
    grads["s"][...] = np.nan
    before = {k: g.tobytes() for k, g in grads.items()}
    opt = fs.AdamW(params_of(param))
    for asked in (*ASKED, {"skip_nonfinite": True}, {"max_norm": 0.0, "skip_nonfinite": True}):
        for g in grads.values():
            g.setflags(write=False)
        opt.step(grads, **asked)
        assert {k: g.tobytes() for k, g in grads.items()} == before


def test_grad_norm_is_a_float_of_the_last_step_if_that_was_asked():
    opt = fs.Adam(params_of())
    assert opt.grad_norm is None
    grads = grads_of(1)
    norm = exact_norm(grads.values())
    for asked, expected in [
        ({}, None),
        ({"max_norm": 0.1}, norm),
        ({}, None),
        ({"skip_nonfinite": True}, norm),
        ({"loss_scale": 4.0}, None),
        ({"loss_scale": 4.0, "max_norm": math.inf}, norm / 4),
        ({"loss_scale": 4.0, "skip_nonfinite": True}, norm / 4),
        ({"max_norm": None, "loss_scale": 1.0, "skip_nonfinite": False}, None),
    ]:
        opt.step(grads, **asked)
        assert opt.grad_norm == expected
        assert opt.grad_norm is None or type(opt.grad_norm) is float


def test_torch_s_grad_norm_is_a_float64_tensor_of_no_dimension():
    params, opt = of_torch("Adam")
    assert opt.grad_norm is None
    grads = grads_of(1)
    set_grads(params, grads)
    for asked in ({"max_norm": 0.1}, {"skip_nonfinite": True}, {"max_norm": 1e9}):
        opt.step(**asked)
        norm = opt.grad_norm
        assert (norm.dtype, norm.shape, norm.device.type) == (torch.float64, (), "cpu")
        assert (norm.requires_grad, float(norm)) == (False, exact_norm(grads.values()))
        opt.step()
        assert opt.grad_norm is None
        assert float(norm) == exact_norm(grads.values())  # the one taken before is the caller's


def test_norm_is_of_raw_gradients_without_decay_or_sign():
    for hypers in ({"weight_decay": 0.5}, {"weight_decay": 0.5, "maximize": True}):
        for cls in (fs.Adam, fs.AdamW):
            opt = cls(params_of(), **hypers)
            opt.step(grads_of(0), max_norm=0.1)
            assert opt.grad_norm == exact_norm(grads_of(0).values())


def test_norm_as_a_number_of_any_kind():
    expected = None
    for max_norm in (0.25, np.float32(0.25), np.array(0.25), torch.tensor(0.25), np.float16(0.25)):
        opt = fs.SGD(params_of(), lr=1.0)
        opt.step(grads_of(0), max_norm=max_norm, loss_scale=4 * max_norm)  # 1.0
        params, other = of_torch("SGD", hypers={"lr": 1.0})
        set_grads(params, grads_of(0))
        other.step(max_norm=max_norm)
        found = [raw(p) for p in opt.params.values()]
        assert [raw(p) for p in params] == found
        expected = expected or found
        assert found == expected


# -- loss scales -----------------------------------------------------------------------------------


@each_case()
@pytest.mark.parametrize("scale", [2.0**-9, 1024, 2.0**16])
def test_power_of_two_unscales_exactly(name, hypers, scale):
    mine, plain = make(name, params_of(), hypers), make(name, params_of(), hypers)
    for seed in range(3):
        grads = grads_of(seed)
        asked = {"max_norm": 0.3} if seed else {}
        mine.step(
            {k: np.asarray(g * np.float32(scale)) for k, g in grads.items()},
            loss_scale=scale,
            **asked,
        )
        plain.step(grads, **asked)
        assert mine.grad_norm == plain.grad_norm
    assert contents(mine) == contents(plain)


@each_pair()
@pytest.mark.parametrize("scale", [3.0, 0.1, 65535.0, np.float32(7e4)])
def test_loss_scale_multiplies_by_its_rounded_inverse(param, grad, scale):
    params = params_of(param)
    hand, opt = ByHand("AdamW", params, {}), fs.AdamW(params)
    for seed in range(3):
        opt.step(grads_of(seed, grad), loss_scale=scale)
        hand.step(grads_of(seed, grad), hand.compute(1 / float(scale)))
        assert opt.grad_norm is None
    assert contents(opt) == hand.contents()


def scaler_steps(params, opt, scale, max_norm, bad=(), clip=False, fused=None, unscale=False):
    """Steps under a GradScaler; with `clip` by torch's own clipping."""
    if fused is not None:
        opt.param_groups[0]["fused"] = fused
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=100)
    scales, norms = [], []
    for seed in range(5):
        set_grads(params, grads_of(seed))
        for p in params:
            p.grad *= scaler.scale(torch.ones(()))
        if seed in bad:
            params[1].grad[7] = math.inf
        if clip or unscale:
            scaler.unscale_(opt)
        if clip:
            norms.append(float(clip_grad_norm_(params, max_norm)))
            scaler.step(opt)
        else:
            scaler.step(opt, max_norm=max_norm)
            norms.append(float(opt.grad_norm) if seed not in bad else math.inf)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, norms


@each_class
@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_scaler_s_steps_are_clipped_by_the_unscaled_norm(name, fused, unscale):
    hypers = some_hypers(name)
    params, opt = of_torch(name, hypers=hypers)
    scales, norms = scaler_steps(params, opt, 2.0**11, 0.3, (0, 2), fused=fused, unscale=unscale)
    assert scales == [2.0**10, 2.0**10, 2.0**9, 2.0**9, 2.0**9]
    plain = make(name, params_of(), hypers)
    for seed in (1, 3, 4):
        plain.step(grads_of(seed), max_norm=0.3)
        assert norms[seed] == plain.grad_norm
    assert [raw(p) for p in params] == [raw(p) for p in plain.params.values()]
    assert not {"grad_scale", "found_inf"} & set(vars(opt))


def test_scale_that_is_no_power_of_two_is_the_neutral_loss_scale():
    params, opt = of_torch("Adam", hypers={"lr": 0.1, "fused": True})
    plain = fs.Adam(params_of(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1000.0, growth_interval=100)
    for seed in range(3):
        scaler.scale(torch.ones(()))
        set_grads(params, grads_of(seed))
        scaler.step(opt, max_norm=1e-4)
        plain.step(grads_of(seed), loss_scale=1000.0, max_norm=1e-4)
        assert float(opt.grad_norm) == plain.grad_norm
        scaler.update()
    assert [raw(p) for p in params] == [raw(p) for p in plain.params.values()]


@pytest.mark.parametrize("name", [name for name in CASES if torch_has(name, {})])
@pytest.mark.parametrize("bad", [(), (1, 3)])
def test_scaled_and_clipped_training_is_torch_s(name, bad):
    mine, opt = of_torch(name)
    theirs = leaves(params_of())
    oracle = torch_optimizer(name, theirs, {})
    scales, norms = scaler_steps(mine, opt, 1024.0, 0.3, bad)
    expected, theirs_norms = scaler_steps(theirs, oracle, 1024.0, 0.3, bad, clip=True)
    assert scales == expected
    np.testing.assert_allclose(norms, theirs_norms, rtol=1e-5)
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("asked", [{"max_norm": 1.0}, {"skip_nonfinite": True}])
def test_step_that_the_scaler_skips_changes_nothing(asked):
    params, opt = of_torch("AdamW", hypers={"fused": True})
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for taken in (False, True):
        scaler.scale(torch.ones(()))
        set_grads(params, grads_of(0))
        params[4].grad[3] = math.nan
        before = fingerprint(opt)
        scaler.step(opt, **asked)
        scaler.update()
        assert fingerprint(opt) == before
        assert bool(opt.state) == taken
        set_grads(params, grads_of(1))
        opt.step()


# -- skipping --------------------------------------------------------------------------------------


def spoiled(seed, dtype, key, place, bad):
    grads = grads_of(seed, dtype)
    grads[key][place] = bad
    return grads


@each_case()
@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("asked", [{}, {"max_norm": 0.3, "loss_scale": 2.0}])
def test_skipped_step_leaves_no_trace(name, hypers, taken, asked):
    opt, twin = make(name, params_of(), hypers), make(name, params_of(), hypers)
    for seed in range(taken):
        opt.step(grads_of(seed), **asked)
        twin.step(grads_of(seed), **asked)
    before = contents(opt), {k: list(v) for k, v in opt.state.items()}
    for bad in BAD:
        report = opt.step(spoiled(7, "float32", "b", 511, bad), skip_nonfinite=True, **asked)
        assert report == (taken, hypers.get("lr", opt.param_groups[0]["lr"]), 0)
        assert (contents(opt), {k: list(v) for k, v in opt.state.items()}) == before
        assert contents(opt) == contents(twin)
        np.testing.assert_array_equal(opt.grad_norm, abs(bad))
    for seed in (2, 3):
        # A finite step with skipping on is a plain one.
        report = opt.step(grads_of(seed), skip_nonfinite=True, **asked)
        assert report == twin.step(grads_of(seed), **asked)
        assert contents(opt) == contents(twin)


@each_case()
@pytest.mark.parametrize("taken", [0, 2])
def test_torch_s_skipped_step_leaves_no_trace(name, hypers, taken):
    params, opt = of_torch(name, hypers=hypers)
    twins, twin = of_torch(name, hypers=hypers)

    def both(seed, **asked):
        for tensors in (params, twins):
            set_grads(tensors, grads_of(seed))
        opt.step(**asked)
        twin.step()

    for seed in range(taken):
        both(seed)
    for bad in BAD:
        set_grads(params, spoiled(7, "float32", "m", 39, bad))
        before, versions = fingerprint(opt), [p._version for p in params]
        keys = list(opt.state)
        assert opt.step(skip_nonfinite=True) is None
        assert fingerprint(opt) == before
        assert list(opt.state) == keys
        assert [p._version for p in params] == versions
        np.testing.assert_array_equal(float(opt.grad_norm), abs(bad))
    for seed in (2, 3):
        both(seed, skip_nonfinite=True)
        assert of_both(params, opt) == of_both(twins, twin)


PLACES = [("w", (0, 0)), ("w", (2, 6)), ("b", 0), ("b", 511), ("b", 512), ("s", ()), ("m", 39)]


@each_pair()
@each_bad
@pytest.mark.parametrize(("key", "place"), PLACES)
def test_gradient_that_is_not_finite_is_found_anywhere(param, grad, bad, key, place, isa):
    opt = fs.Lion(params_of(param))
    before = contents(opt)
    grads = spoiled(0, grad, key, place, bad)
    for form in (grads, fs.FlatBuffer.pack(grads)):
        assert opt.step(form, skip_nonfinite=True) == (0, 1e-4, 0)
        assert contents(opt) == before
    assert opt.step(grads_of(0, grad), skip_nonfinite=True) == (1, 1e-4, TOTAL)


@pytest.mark.parametrize("threads", [1, 3])
def test_one_infinity_among_many_blocks_is_found(threads):
    fs.set_num_threads(threads)
    n = 400_000
    params, grads = np.ones(n, np.float32), np.ones(n, np.float32)
    opt = fs.SGD([params], lr=0.5, momentum=0.5)
    for place in (0, 131_071, 131_072, 262_143, n - 1):
        grads[place] = math.inf
        assert opt.step([grads], skip_nonfinite=True).elements == 0
        assert (params == 1).all()
        assert not opt.state_dict()["state"]
        grads[place] = 1
    assert opt.step([grads], skip_nonfinite=True).elements == n
    assert (params == 0.5).all()


@pytest.mark.parametrize("layer", ["neutral", "torch"])
def test_float64_whose_square_overflows_is_finite(layer):
    grads = {"p": np.array([1e200, -1e300, np.finfo(np.float64).max, 1.0])}
    if layer == "neutral":
        opt = fs.SGD({"p": np.zeros(4)}, lr=1.0)
        assert opt.step(grads, skip_nonfinite=True).elements == 4
        found = opt.params["p"]
    else:
        params = leaves({"p": np.zeros(4)})
        opt = ft.SGD(params, lr=1.0)
        set_grads(params, grads)
        opt.step(skip_nonfinite=True)
        found = params[0].detach().numpy()
    assert found.tobytes() == (-grads["p"]).tobytes()
    assert float(opt.grad_norm) == math.inf


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_largest_numbers_are_finite(dtype):
    big = np.full(1024, ml_dtypes.finfo(dtype).max, dtype)
    opt = fs.Lion([np.zeros(1024, dtype)], lr=1.0)
    assert opt.step([big], skip_nonfinite=True).elements == 1024
    assert (opt.params[0] == -1).all()
    assert math.isfinite(opt.grad_norm)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("layer", ["neutral", "torch"])
def test_momentum_begins_with_the_gradient_after_a_skipped_first_step(layer, nesterov):
    hypers = {
        "lr": 1.0,
        "momentum": 0.5,
        **({"nesterov": True} if nesterov else {"dampening": 0.25}),
    }
    grads = np.array([1.0, 2.0], np.float32)
    bad = np.array([1.0, math.nan], np.float32)
    if layer == "neutral":
        opt = fs.SGD([np.zeros(2, np.float32)], **hypers)
        opt.step([bad], skip_nonfinite=True)
        opt.step([grads], skip_nonfinite=True)
        buffer = opt.state[0]["momentum_buffer"]
    else:
        (param,) = params = leaves({"p": np.zeros(2, np.float32)})
        opt = ft.SGD(params, **hypers)
        set_grads(params, {"p": bad})
        opt.step(skip_nonfinite=True)
        assert not opt.state
        set_grads(params, {"p": grads})
        opt.step(skip_nonfinite=True)
        buffer = opt.state[param]["momentum_buffer"].numpy()
    assert buffer.tolist() == [1.0, 2.0]


def test_schedules_stand_still_in_a_skipped_step():
    asked = []

    def rate(t):
        asked.append(t)
        return 0.5 / (t + 1)

    opt = fs.AdamW(params_of(), lr=rate, weight_decay=fs.schedules.Linear(0.4, total=4))
    twin = fs.AdamW(params_of(), lr=lambda t: 0.5 / (t + 1),
                    weight_decay=fs.schedules.Linear(0.4, total=4))  # fmt: skip
    bad = spoiled(0, "float32", "s", (), math.nan)
    steps = 0
    for seed, skip in enumerate([True, False, True, True, False, True, False]):
        asked.clear()
        saved = opt.state_dict()
        report = opt.step(bad if skip else grads_of(seed), skip_nonfinite=True)
        steps += not skip
        assert report == (steps, 0.5 / (steps + skip), 0 if skip else TOTAL)
        assert set(asked) == {steps if skip else steps - 1}
        assert opt.steps == steps
        if skip:
            assert opt.state_dict()["param_groups"] == saved["param_groups"]
        else:
            twin.step(grads_of(seed))
        assert contents(opt) == contents(twin)


@pytest.mark.parametrize("raises", [False, True])
def test_state_that_a_skipped_step_called_for_is_not_kept(raises):
    momentum = fs.schedules.MultiStep(0.9, milestones=[1], factor=0.5)
    opt = fs.SGD(params_of(), lr=0.5, momentum=lambda t: 0.0 if t == 0 else momentum(t),
                 dampening=0.25)  # fmt: skip
    opt.step(grads_of(0))
    assert not any(opt.state.values())
    bad = spoiled(1, "float32", "b", 3, math.inf)
    for _ in range(2):
        if raises:
            bad["m"] = np.zeros(3, np.float32)
            with pytest.raises(ValueError, match="shape"):
                opt.step(bad, skip_nonfinite=True)
        else:
            assert opt.step(bad, skip_nonfinite=True).elements == 0
        assert not any(opt.state.values())
        assert opt.state_dict()["state"] == {}
    opt.step(grads_of(1), skip_nonfinite=True)
    for key, grad in grads_of(1).items():
        assert opt.state[key]["momentum_buffer"].tobytes() == grad.tobytes()


def test_state_switched_on_in_torch_is_not_kept_by_a_skipped_step():
    params, opt = of_torch("Adam")
    set_grads(params, grads_of(0))
    opt.step()
    opt.param_groups[0]["amsgrad"] = True
    set_grads(params, spoiled(1, "float32", "w", (1, 1), math.nan))
    before = fingerprint(opt)
    opt.step(skip_nonfinite=True, max_norm=1.0)
    assert fingerprint(opt) == before
    assert all(set(entry) == {"step", "exp_avg", "exp_avg_sq"} for entry in opt.state.values())
    set_grads(params, grads_of(1))
    opt.step(skip_nonfinite=True)
    assert all("max_exp_avg_sq" in entry for entry in opt.state.values())


def test_autograd_hears_of_a_step_that_was_taken_only():
    params = leaves(params_of())
    opt = fs.Adam(params)
    bad = list(spoiled(0, "float32", "w", (0, 0), math.inf).values())
    opt.step(bad, skip_nonfinite=True)
    assert [p._version for p in params] == [0] * len(params)
    opt.step(list(grads_of(0).values()), skip_nonfinite=True, max_norm=0.1, loss_scale=2.0)
    assert [p._version for p in params] == [1] * len(params)


def test_flattened_model_begins_after_a_skipped_step():
    torch.manual_seed(3)
    models = [torch.nn.Linear(9, 4), torch.nn.Linear(9, 4)]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        ft.flatten_(model)
    opt, twin = (ft.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5) for m in models)
    models[0].weight.grad[1, 2] = math.nan
    opt.step(skip_nonfinite=True)
    assert not opt.state
    for _ in range(2):
        for model, one in zip(models, (opt, twin), strict=True):
            one.zero_grad()
            model(torch.ones(9)).square().sum().backward()
            one.step(skip_nonfinite=one is opt)
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        assert bits(p) == bits(q)
        buffers = opt.state[p]["momentum_buffer"], twin.state[q]["momentum_buffer"]
        assert bits(buffers[0]) == bits(buffers[1])


def test_skipped_step_without_skipping_would_have_shown():
    # Guards the tests above: what they skip is not harmless.
    opt = fs.SGD(params_of(), lr=0.5)
    opt.step(spoiled(0, "float32", "b", 3, math.nan))
    assert np.isnan(opt.params["b"][3])


@each_bad
def test_skipping_a_tensor_that_is_not_dense_writes_no_copy_back(bad):
    memory = torch.ones(6, 8)
    params = [torch.nn.Parameter(memory[:, ::2]), torch.nn.Parameter(torch.ones(3))]
    opt = ft.Adam(params)
    params[0].grad = torch.ones(6, 4)
    params[1].grad = torch.tensor([1.0, bad, 1.0])
    version = memory._version
    opt.step(skip_nonfinite=True)
    assert (memory == 1).all()
    assert memory._version == version
    assert not opt.state
    params[1].grad = torch.ones(3)
    opt.step(skip_nonfinite=True, max_norm=math.inf)
    assert (memory[:, ::2] < 1).all()
    assert (memory[:, 1::2] == 1).all()
    assert float(opt.grad_norm) == math.sqrt(27)


# -- groups, layouts and machines ------------------------------------------------------------------


@each_case()
def test_groups_share_one_norm(name, hypers):
    extra = {"lr": 0.25} | ({} if name == "Rprop" else {"weight_decay": 0.01})
    groups = [fs.Group(["b", "m"], **extra, maximize=True)]
    params = params_of()
    opt = getattr(fs, name)(params, **hypers, groups=groups)
    twin = getattr(fs, name)(params_of(), **hypers, groups=groups)
    tensors = leaves(params_of())
    split = {"b": extra | {"maximize": True}, "m": extra | {"maximize": True}}
    peer = getattr(ft, name)(
        [{"params": [t], **split.get(k, {})} for k, t in zip(SHAPES, tensors, strict=True)],
        **hypers,
    )
    for seed in range(2):
        grads = grads_of(seed)
        factor = factor_of(grads.values(), np.float32, 0.2)
        opt.step(grads, max_norm=0.2)
        twin.step({k: np.asarray(g * factor) for k, g in grads.items()})
        set_grads(tensors, grads)
        peer.step(max_norm=0.2)
    assert contents(opt) == contents(twin)
    assert [raw(t) for t in tensors] == [raw(p) for p in params.values()]


@pytest.mark.parametrize("absent", [["b"], ["w", "s"], ["none"], list(SHAPES)])
def test_tensors_without_a_gradient_have_no_part_in_the_norm(absent):
    grads = {k: None if k in absent else g for k, g in grads_of(0).items()}
    opt, hand = fs.AdamW(params_of(), lr=0.5), ByHand("AdamW", params_of(), {"lr": 0.5})
    present = [g for g in grads.values() if g is not None]
    norm = exact_norm(present) if present else 0.0
    report = opt.step(grads, max_norm=0.1, skip_nonfinite=True)
    assert report.elements == sum(g.size for g in present)
    assert opt.grad_norm == norm
    hand.step(grads, np.float32(clip_of(norm, 0.1)))
    assert contents(opt) == hand.contents()
    params, peer = of_torch("AdamW", hypers={"lr": 0.5})
    set_grads(params, grads_of(0))
    for key, param in zip(SHAPES, params, strict=True):
        if key in absent:
            param.grad = None
    peer.step(max_norm=0.1, skip_nonfinite=True)
    assert float(peer.grad_norm) == norm
    assert [raw(p) for p in params] == [raw(p) for p in opt.params.values()]
    assert len(peer.state) == len(SHAPES) - len(absent)


def unaligned(arrays):
    """The same numbers at odd places, with NaN beside them."""
    views = {}
    for k, a in arrays.items():
        memory = np.full(a.size + 8, np.nan, a.dtype)
        views[k] = memory[3 : 3 + a.size].reshape(a.shape)
        views[k][...] = a
    return views


FORMS = {
    "list": lambda arrays: list(arrays.values()),
    "dict": dict,
    "buffer": fs.FlatBuffer.pack,
    "unaligned": unaligned,
    "tensors": in_torch,
}


def uneven(seed, dtype):
    """Numbers of many magnitudes: added in another order they have another norm."""
    rng = np.random.default_rng(seed)
    return {
        k: np.asarray(rng.normal(size=s) * 2.0 ** rng.uniform(-12, 0, s)).astype(dtype)
        for k, s in SHAPES.items()
    }


ODD = [{"max_norm": 0.03, "loss_scale": 3.0}, {"max_norm": 0.01}, {"loss_scale": 7.0}]


@functools.cache
def plainly(name, case, param, grad):
    """The scalar set's clipped steps of arrays: what every other way must have, and the norms."""
    before = fs.isa()
    fs.set_isa("scalar")
    opt = make(name, params_of(param), CASES[name][case])
    norms = []
    for seed, asked in enumerate(ODD):
        opt.step(uneven(seed, grad), **asked)
        norms.append(opt.grad_norm)
    fs.set_isa(before)
    return [raw(p) for p in opt.params.values()], norms


@each_case()
def test_clipped_steps_have_the_same_bits_on_every_instruction_set(name, hypers, isa):
    param, grad = PAIRS[CASES[name].index(hypers) % len(PAIRS)]
    form = list(FORMS.values())[CASES[name].index(hypers) % len(FORMS)]
    expected, norms = plainly(name, CASES[name].index(hypers), param, grad)
    opt = make(name, form(params_of(param)), hypers)
    for seed, asked in enumerate(ODD):
        opt.step(form(uneven(seed, grad)), **asked)
        assert opt.grad_norm == norms[seed]
    assert [raw(p) for p in opt.params.values()] == expected


@each_pair()
@pytest.mark.parametrize("held", FORMS)
@pytest.mark.parametrize("given", FORMS)
def test_form_of_memory_does_not_change_a_bit(param, grad, held, given):
    expected, norms = plainly("NAdam", 3, param, grad)
    opt = make("NAdam", FORMS[held](params_of(param)), CASES["NAdam"][3])
    numbers = not isinstance(next(iter(opt.params)), str)
    for seed, asked in enumerate(ODD):
        grads = FORMS[given](uneven(seed, grad))
        if numbers and hasattr(grads, "values"):
            grads = list(grads.values())
        opt.step(grads, **asked)
        assert opt.grad_norm == norms[seed]
    assert [raw(p) for p in opt.params.values()] == expected


@pytest.mark.parametrize("grad", ["float32", "bfloat16"])
def test_threads_and_instruction_sets_change_no_bit_of_large_steps(grad):
    shapes = [300_001, 17, 512, 140_003]
    rng = np.random.default_rng(5)
    grads = [(rng.normal(size=n) * 2.0 ** rng.uniform(-12, 0, n)).astype(grad) for n in shapes]
    found = set()
    for isa in fs.usable_isas():
        fs.set_isa(isa)
        for threads in (1, 2, 3):
            fs.set_num_threads(threads)
            for form in (list, fs.FlatBuffer.pack):
                params = form([np.ones(n, np.float32) for n in shapes])
                opt = fs.AdamW(params, lr=0.5)
                opt.step(form(grads), max_norm=0.25, loss_scale=3.0, skip_nonfinite=True)
                values = params.values() if form is not list else params
                found.add((opt.grad_norm, *(p.tobytes() for p in values)))
    assert len(found) == 1


def test_flattened_model_has_the_bits_of_many_tensors():
    torch.manual_seed(3)
    plain = torch.nn.Sequential(torch.nn.Linear(9, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    flattened = copy.deepcopy(plain)
    ft.flatten_(flattened)
    x = torch.randn(30, 9)
    opts = [ft.AdamW(m.parameters(), lr=0.1) for m in (plain, flattened)]
    for _ in range(4):
        for model, opt in zip((plain, flattened), opts, strict=True):
            opt.zero_grad()
            (100 * model(x).square().mean()).backward()
            opt.step(max_norm=0.01, skip_nonfinite=True)
        assert opts[0].grad_norm == opts[1].grad_norm > 0.01
    for p, q in zip(plain.parameters(), flattened.parameters(), strict=True):
        assert bits(p) == bits(q)
        assert bits(p.grad) == bits(q.grad)


def test_layouts_of_torch_are_read_as_they_are():
    torch.manual_seed(1)
    values, grads = torch.randn(6, 8), torch.randn(6, 8)
    expected = None
    for lay in (lambda t: t.clone(), lambda t: t.t().contiguous().t(), lambda t: spread(t)):
        param = torch.nn.Parameter(lay(values))
        param.grad = grads.clone()
        opt = ft.Adam([param], lr=0.5)
        opt.step(max_norm=0.5)
        norm = torch.linalg.vector_norm(grads.double())
        torch.testing.assert_close(opt.grad_norm, norm, rtol=1e-14, atol=0.0)
        assert torch.equal(param.grad, grads)
        expected = param.detach().clone() if expected is None else expected
        assert torch.equal(param, expected)


def spread(tensor):
    memory = torch.zeros(*tensor.shape, 2)
    memory[..., 0] = tensor
    return memory[..., 0]


def test_broadcast_gradient_counts_each_element():
    param = torch.nn.Parameter(torch.zeros(4))
    param.grad = torch.ones(()).expand(4)
    opt = ft.SGD([param], lr=1.0)
    opt.step(max_norm=1.0)
    assert float(opt.grad_norm) == 2.0
    assert param.tolist() == [-np.float32(1 / (2 + 1e-6))] * 4
    assert param.grad.stride() == (0,)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_number_counts_as_two_reals(dtype):
    param = torch.nn.Parameter(torch.zeros(2, dtype=dtype))
    param.grad = torch.tensor([3 + 4j, 12j], dtype=dtype)
    opt = ft.SGD([param], lr=1.0)
    opt.step(max_norm=6.5)
    assert float(opt.grad_norm) == 13.0
    factor = 6.5 / (13 + 1e-6)
    torch.testing.assert_close(param.detach(), -param.grad * factor)
    param.grad[1] = complex(1, math.nan)
    before = fingerprint(opt)
    opt.step(skip_nonfinite=True)
    assert fingerprint(opt) == before


# -- errors ----------------------------------------------------------------------------------------

WRONG = [
    ("max_norm", -1, ValueError, "max_norm must be >= 0, got -1"),
    ("max_norm", -1e-300, ValueError, "max_norm must be >= 0, got -1e-300"),
    ("max_norm", -math.inf, ValueError, "max_norm must be >= 0, got -inf"),
    ("max_norm", math.nan, ValueError, "max_norm must be >= 0, got nan"),
    ("max_norm", "1", TypeError, "max_norm must be a number >= 0, got '1'"),
    ("max_norm", True, TypeError, "max_norm must be a number >= 0, got True"),
    ("max_norm", False, TypeError, "max_norm must be a number >= 0, got False"),
    ("max_norm", np.True_, TypeError, f"max_norm must be a number >= 0, got {np.True_!r}"),
    ("max_norm", 1j, TypeError, "max_norm must be a number >= 0, got 1j"),
    ("max_norm", np.complex64(1), TypeError, "max_norm must be a number >= 0, got .*1.*"),
    ("max_norm", torch.tensor(1 + 1j), TypeError, r"max_norm must be a number >= 0, got tensor.*"),
    ("max_norm", torch.tensor(True), TypeError, r"max_norm must be a number >= 0, got tensor.*"),
    ("max_norm", [1.0], TypeError, r"max_norm must be a number >= 0, got \[1.0\]"),
    ("max_norm", np.ones(1), TypeError, r"max_norm must be a number >= 0, got array\(\[1.\]\)"),
    ("skip_nonfinite", 1, TypeError, "skip_nonfinite must be True or False, got 1"),
    ("skip_nonfinite", 0, TypeError, "skip_nonfinite must be True or False, got 0"),
    ("skip_nonfinite", None, TypeError, "skip_nonfinite must be True or False, got None"),
    ("skip_nonfinite", "no", TypeError, "skip_nonfinite must be True or False, got 'no'"),
    # NumPy's too, though a hyperparameter may be one.
    (
        "skip_nonfinite",
        np.True_,
        TypeError,
        f"skip_nonfinite must be True or False, got {np.True_!r}",
    ),
    (
        "skip_nonfinite",
        np.False_,
        TypeError,
        f"skip_nonfinite must be True or False, got {np.False_!r}",
    ),
]
SCALES = [
    ("loss_scale", 0, ValueError, "loss_scale must be finite and > 0, got 0"),
    ("loss_scale", -2.0, ValueError, r"loss_scale must be finite and > 0, got -2\.0"),
    ("loss_scale", math.inf, ValueError, "loss_scale must be finite and > 0, got inf"),
    ("loss_scale", math.nan, ValueError, "loss_scale must be finite and > 0, got nan"),
    ("loss_scale", "2", TypeError, "loss_scale must be a finite number > 0, got '2'"),
    ("loss_scale", None, TypeError, "loss_scale must be a finite number > 0, got None"),
    ("loss_scale", False, TypeError, "loss_scale must be a finite number > 0, got False"),
    ("loss_scale", 2j, TypeError, "loss_scale must be a finite number > 0, got 2j"),
    ("loss_scale", True, TypeError, "loss_scale must be a finite number > 0, got True"),
    ("loss_scale", np.True_, TypeError, "loss_scale must be a finite number > 0, got .*True_?"),
    ("loss_scale", np.ones(1), TypeError, r"loss_scale must be a finite number > 0, got array.*"),
    ("loss_scale", 1e-310, ValueError, "loss_scale must have a finite inverse, got 1e-310"),
]


def ids(rows):
    return [f"{name}={value!r}" for name, value, *_ in rows]


def test_norm_is_of_the_last_step_also_where_a_scaler_skipped_it():
    w = torch.nn.Parameter(torch.zeros(2))
    opt = ft.SGD([w], lr=1.0, fused=True)
    w.grad = torch.tensor([3.0, 4.0])
    opt.step(max_norm=1.0)
    assert float(opt.grad_norm) == 5.0
    before = w.detach().clone()
    for asked, norm in (
        ({}, None),
        ({"max_norm": 1.0}, math.inf),
        ({"max_norm": 10**400}, math.inf),
    ):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))
        w.grad = torch.tensor([math.inf, 4.0])
        scaler.step(opt, **asked)
        assert opt.grad_norm is None if norm is None else float(opt.grad_norm) == norm
    assert torch.equal(w.detach(), before)


@pytest.mark.parametrize("wrong", WRONG + SCALES, ids=ids(WRONG + SCALES))
def test_wrong_argument_is_named_and_changes_nothing(wrong):
    name, value, error, message = wrong
    opt = fs.AdamW(params_of())
    opt.step(grads_of(0), max_norm=0.1)
    before, norm = contents(opt), opt.grad_norm
    others = [{}, {"max_norm": 0.5, "loss_scale": 2.0, "skip_nonfinite": True}]
    for asked in others:
        with pytest.raises(error, match=rf"^{message}$"):
            opt.step(grads_of(1), **{**asked, name: value})
        assert (contents(opt), opt.grad_norm) == (before, norm)
    opt.step(grads_of(1))


@pytest.mark.parametrize("wrong", WRONG, ids=ids(WRONG))
def test_torch_s_wrong_argument_is_named_before_the_closure_runs(wrong):
    name, value, error, message = wrong
    params, opt = of_torch("AdamW")
    set_grads(params, grads_of(0))
    opt.step(max_norm=0.1)
    before, norm = fingerprint(opt), opt.grad_norm
    calls = []
    for asked in ({}, {"max_norm": 0.5, "skip_nonfinite": True}):
        with pytest.raises(error, match=rf"^{message}$"):
            opt.step(lambda: calls.append(1), **{**asked, name: value})
        assert (fingerprint(opt), calls) == (before, [])
        assert opt.grad_norm is norm


def test_keywords_are_keywords():
    opt = fs.SGD(params_of())
    with pytest.raises(TypeError, match="positional"):
        opt.step(grads_of(0), 1.0)
    params, other = of_torch("SGD")
    set_grads(params, grads_of(0))
    with pytest.raises(TypeError, match="positional"):
        other.step(None, 1.0)
    with pytest.raises(TypeError, match="loss_scale"):
        other.step(loss_scale=2.0)


@pytest.mark.parametrize("asked", [{"max_norm": 0.5}, {"skip_nonfinite": True}])
def test_step_that_raises_for_its_gradients_changes_nothing(asked):
    opt = fs.AdamW(params_of())
    opt.step(grads_of(0), max_norm=0.1)
    before, norm = contents(opt), opt.grad_norm
    for spoil in ({"m": np.zeros(3, np.float32)}, {"m": np.zeros(40, int)}, {"b": opt.params["b"]}):
        with pytest.raises((ValueError, TypeError), match=r"grads\["):
            opt.step({**grads_of(1), **spoil}, **asked)
        assert (contents(opt), opt.grad_norm) == (before, norm)
    params, peer = of_torch("AdamW")
    set_grads(params, grads_of(0))
    params[1].grad = params[1].detach()
    before = fingerprint(peer)
    with pytest.raises(ValueError, match="grads\\[1\\] must not share memory"):
        peer.step(**asked)
    assert fingerprint(peer) == before
    assert not peer.state
    assert peer.grad_norm is None


@pytest.fixture
def mesh():
    """One process that is a world of its own."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensors_are_refused_and_stepped_without(mesh):
    whole = torch.nn.Parameter(torch.ones(3))
    part = torch.nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Replicate()]))
    opt = ft.AdamW([whole, part], lr=0.5)
    whole.grad = torch.ones(3)
    part.grad = DTensor.from_local(torch.ones(4), mesh, [Replicate()])
    calls = []
    for asked in ({"max_norm": 1.0}, {"max_norm": math.inf}, {"skip_nonfinite": True}):
        with pytest.raises(ValueError, match=r"max_norm, skip_nonfinite and norms .*DTensors"):
            opt.step(lambda: calls.append(1), **asked)
        assert not opt.state
        assert not calls
        assert (whole == 1).all()
        assert (part.to_local() == 1).all()
    opt.step(max_norm=None, skip_nonfinite=False)
    assert (part.to_local() < 1).all()


# -- beside what else an optimizer does ------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"max_norm": 1.0}, {"skip_nonfinite": True}])
def test_step_in_backward_excludes_what_needs_all_gradients(asked):
    model = torch.nn.Linear(3, 2)
    opt = ft.SGD(model.parameters(), lr=0.5)
    handle = ft.step_in_backward(model, opt)
    model(torch.ones(3)).sum().backward()
    before, calls = fingerprint(opt), []
    with pytest.raises(
        RuntimeError, match=r"max_norm, skip_nonfinite and norms .*step_in_backward"
    ):
        opt.step(lambda: calls.append(1), **asked)
    assert (fingerprint(opt), calls, opt.grad_norm) == (before, [], None)
    opt.step()
    opt.step(max_norm=None, skip_nonfinite=False)
    assert fingerprint(opt) == before
    handle.remove()
    model(torch.ones(3)).sum().backward()
    opt.step(**asked)
    assert float(opt.grad_norm) == math.sqrt(8)
    assert fingerprint(opt) != before


def test_step_in_backward_forgets_the_norm_of_the_step_before():
    model = torch.nn.Linear(3, 2)
    opt = ft.SGD(model.parameters(), lr=0.5)
    model(torch.ones(3)).sum().backward()
    opt.step(max_norm=1.0)
    assert opt.grad_norm is not None
    opt.zero_grad()
    with ft.step_in_backward(model, opt):
        model(torch.ones(3)).sum().backward()
    assert opt.grad_norm is None


def test_lookahead_s_gradient_may_be_clipped():
    target = np.linspace(-1, 1, 40, dtype=np.float32)
    start = params_of()["m"]
    mine, hand = start.copy(), start.copy()
    tensor = torch.nn.Parameter(torch.from_numpy(start.copy()))
    opt, plain = (fs.SGD([p], lr=0.1, momentum=0.9) for p in (mine, hand))
    peer = ft.SGD([tensor], lr=0.1, momentum=0.9)
    for _ in range(4):
        with opt.lookahead():
            grad = mine - target
            with pytest.raises(RuntimeError, match="lookahead"):
                opt.step([grad], max_norm=1.0)
        with plain.lookahead():
            same = hand - target
        with peer.lookahead():
            tensor.grad = tensor.detach() - torch.from_numpy(target)
            with pytest.raises(RuntimeError, match="lookahead"):
                peer.step(max_norm=1.0)
        opt.step([grad], max_norm=2.0)
        peer.step(max_norm=2.0)
        plain.step([same * np.float32(clip_of(opt.grad_norm, 2.0))])
        assert opt.grad_norm == float(peer.grad_norm)
        assert mine.tobytes() == hand.tobytes() == raw(tensor)


def test_hooks_see_the_keywords_and_run_around_a_skipped_step():
    params, opt = of_torch("AdamW")
    seen = []
    opt.register_step_pre_hook(lambda o, args, kwargs: seen.append(("pre", args, kwargs)))
    opt.register_step_post_hook(
        lambda o, args, kwargs: seen.append(("post", args, kwargs, float(o.grad_norm)))
    )
    set_grads(params, spoiled(0, "float32", "b", 1, math.nan))
    before = fingerprint(opt)
    asked = {"max_norm": 1.0, "skip_nonfinite": True}
    opt.step(**asked)
    assert fingerprint(opt) == before
    assert [entry[0] for entry in seen] == ["pre", "post"]
    assert all(entry[2] == asked for entry in seen)
    assert math.isnan(seen[1][3])
    seen.clear()
    set_grads(params, grads_of(0))
    assert opt.step(lambda: 5.0, max_norm=0.1) == 5.0
    assert seen[1][3] == exact_norm(grads_of(0).values())
    plain, twin = of_torch("AdamW")
    set_grads(plain, grads_of(0))
    twin.step(max_norm=0.1)
    assert [bits(p) for p in params] == [bits(p) for p in plain]


def test_pre_hook_may_ask_for_clipping():
    params, opt = of_torch("SGD", hypers={"lr": 1.0})
    opt.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "max_norm": 0.1}))
    set_grads(params, grads_of(0))
    opt.step()
    expected = fs.SGD(params_of(), lr=1.0)
    expected.step(grads_of(0), max_norm=0.1)
    assert [raw(p) for p in params] == [raw(p) for p in expected.params.values()]


def test_profiled_step_passes_the_keywords_on():
    params, opt = of_torch("Adam")
    plain, twin = of_torch("Adam")
    for tensors in (params, plain):
        set_grads(tensors, grads_of(0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step(max_norm=0.1, skip_nonfinite=True)
    twin.step(max_norm=0.1)
    assert opt.grad_norm == twin.grad_norm
    assert [bits(p) for p in params] == [bits(p) for p in plain]
    assert any("Optimizer.step#Adam.step" in event.key for event in profile.key_averages())


def test_subclass_may_clip_in_a_step_of_its_own():
    class Clipped(ft.AdamW):
        def step(self, closure=None):
            return super().step(closure, max_norm=0.1)

    params, plain = leaves(params_of()), leaves(params_of())
    opt, twin = Clipped(params), ft.AdamW(plain)
    for tensors in (params, plain):
        set_grads(tensors, grads_of(0))
    opt.step()
    twin.step(max_norm=0.1)
    assert [bits(p) for p in params] == [bits(p) for p in plain]


def test_closure_s_gradients_are_the_ones_clipped():
    params, opt = of_torch("SGD", hypers={"lr": 1.0})
    set_grads(params, grads_of(5))

    def closure():
        assert torch.is_grad_enabled()
        set_grads(params, grads_of(0))
        return 2.5

    assert opt.step(closure, max_norm=0.1, skip_nonfinite=True) == 2.5
    assert float(opt.grad_norm) == exact_norm(grads_of(0).values())
    expected = fs.SGD(params_of(), lr=1.0)
    expected.step(grads_of(0), max_norm=0.1)
    assert [raw(p) for p in params] == [raw(p) for p in expected.params.values()]


def test_schedulers_drive_a_clipped_optimizer():
    params, opt = of_torch("SGD", hypers={"lr": 1.0})
    scheduler = lr_scheduler.StepLR(opt, 2, gamma=0.5)  # which wraps opt.step
    ours = ft.LRScheduler(other := of_torch("SGD")[1], fs.schedules.Step(1.0, every=2, factor=0.5))
    plain = fs.SGD(params_of(), lr=fs.schedules.Step(1.0, every=2, factor=0.5))
    for seed in range(4):
        for tensors in (params, other.param_groups[0]["params"]):
            set_grads(tensors, grads_of(seed))
        opt.step(max_norm=0.1)
        scheduler.step()
        other.step(max_norm=0.1)
        ours.step()
        plain.step(grads_of(seed), max_norm=0.1)
    expected = [raw(p) for p in plain.params.values()]
    assert [raw(p) for p in params] == expected
    assert [raw(p) for p in other.param_groups[0]["params"]] == expected
    assert opt.param_groups[0]["lr"] == 0.25


@each_class
@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copy_made_after_a_clipped_step_goes_on(name, how):
    hypers = some_hypers(name)
    opt = make(name, params_of(), hypers)
    opt.step(grads_of(0), max_norm=0.1)
    opt.step(spoiled(0, "float32", "b", 1, math.nan), skip_nonfinite=True)
    again = how(opt)
    assert again.grad_norm is None
    assert contents(again) == contents(opt)
    for one in (opt, again):
        one.step(grads_of(1), max_norm=0.1, loss_scale=3.0, skip_nonfinite=True)
    assert contents(again) == contents(opt)
    assert again.grad_norm == opt.grad_norm

    params, peer = of_torch(name, hypers=hypers)
    set_grads(params, grads_of(0))
    peer.step(max_norm=0.1)
    twin = how(peer)
    assert twin.grad_norm is None
    twins = [p for group in twin.param_groups for p in group["params"]]
    for tensors, one in ((params, peer), (twins, twin)):
        set_grads(tensors, grads_of(1))
        one.step(max_norm=0.1, skip_nonfinite=True)
    assert twin.grad_norm == peer.grad_norm
    for p, q in zip(twins, params, strict=True):  # a copy of NAdam has the float32 mu_product only
        torch.testing.assert_close(p.detach(), q.detach(), **TOLERANCES[torch.float32])


@each_class
def test_checkpoint_taken_after_skipped_and_clipped_steps_resumes(name):
    hypers = some_hypers(name)
    opt = make(name, params_of(), hypers)
    for seed in range(3):
        opt.step(grads_of(seed), max_norm=0.1)
        opt.step(spoiled(seed, "float32", "w", (0, 0), math.inf), skip_nonfinite=True)
    again = make(name, {k: p.copy() for k, p in opt.params.items()}, hypers)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one in (opt, again):
        one.step(grads_of(4), max_norm=0.1)
    assert contents(again) == contents(opt)
