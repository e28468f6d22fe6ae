"""What a training script relies on in torch.optim, asked of fusedstep.torch beside torch itself."""

import ast
import collections.abc
import copy
import fractions
import functools
import importlib.abc
import inspect
import io
import math
import pathlib
import pickle
import subprocess
import sys
import typing

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES, defaults, each_case, make
from fusedstep._storage import HOW
from test_against_torch import torch_has, torch_optimizer
from this_torch import NEW_KEYS, needs, needs_names

SHAPES = [(3, 5), (70,), (), (0, 3), (2, 3, 4)]

# Both sides round a few times per step; large rates and divisions by small roots magnify that.
TOLERANCES = {
    torch.float32: {"rtol": 1e-5, "atol": 5e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.complex64: {"rtol": 1e-5, "atol": 5e-6},
}
each_class = pytest.mark.parametrize("name", CASES)
each_peer = pytest.mark.parametrize("name", [name for name in CASES if hasattr(torch.optim, name)])

FLAGS = {"foreach", "fused", "capturable", "differentiable"}
# How parameters and states are stored, and what a step does beside its rule.
BESIDE = {*HOW, "clip_value", "ema", "shadow", "zero_grad"}


def absent(name, hypers):
    """What torch keeps in vain: without beta1 Adam's first moment is the gradient."""
    late = getattr(fs, name)._spec.late
    return {late} if late and hypers.get("betas", (1,))[0] == 0 else set()


def parameters(dtype=torch.float32, shapes=SHAPES):
    """The same parameters at each call."""
    rng = np.random.default_rng(3)
    return [torch.nn.Parameter(numbers(rng.uniform, (0.5, 2), s, dtype)) for s in shapes]


def numbers(draw, limits, shape, dtype=torch.float32):
    parts = [torch.tensor(draw(*limits, shape)) for _ in range(2 if dtype.is_complex else 1)]
    return (torch.complex(*parts) if dtype.is_complex else parts[0]).to(dtype)


@functools.cache
def gradients(step, *likes):
    rng = np.random.default_rng(1000 + step)
    return [numbers(rng.normal, (0, 1), shape, dtype) for shape, dtype in likes]


def set_grads(step, *sets):
    """Gives each set of parameters the gradients of this step, of their own."""
    for params in sets:
        grads = gradients(step, *((p.shape, p.dtype) for p in params))
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad.clone()


def train(opt, params, steps):
    for step in steps:
        set_grads(step, params)
        opt.step()


def pair(name, hypers, dtype=torch.float32, shapes=SHAPES):
    """Ours and torch's plain for-loop on equal parameters."""
    mine, theirs = parameters(dtype, shapes), parameters(dtype, shapes)
    opt, oracle = getattr(ft, name)(mine, **hypers), torch_optimizer(name, theirs, hypers)
    return mine, theirs, opt, oracle


def assert_close(mine, theirs):
    for i, (p, want) in enumerate(zip(mine, theirs, strict=True)):
        torch.testing.assert_close(
            p.detach(), want.detach(), **TOLERANCES[p.dtype], msg=lambda m, i=i: f"params[{i}]: {m}"
        )


def bits(tensor):
    tensor = tensor.detach().to_dense() if tensor.is_sparse else tensor.detach()
    tensor = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)
    return str(tensor.dtype), tensor.view(torch.uint8).numpy().tobytes()


def assert_same_bits(mine, theirs):
    assert [bits(p) for p in mine] == [bits(p) for p in theirs]


def fingerprint(value):
    """All that can be seen of an optimizer, by value, for comparison with `==`."""
    if isinstance(value, torch.optim.Optimizer):
        params = [p for group in value.param_groups for p in group["params"]]
        state = [(id(key), fingerprint(entry)) for key, entry in value.state.items()]
        groups = [{**g, "params": list(map(id, g["params"]))} for g in value.param_groups]
        return [fingerprint(params), [fingerprint(p.grad) for p in params], state,
                fingerprint(groups)]  # fmt: skip
    if isinstance(value, torch.Tensor):
        return (*bits(value), tuple(value.shape))
    if isinstance(value, dict):
        return [(key, fingerprint(entry)) for key, entry in value.items()]
    if isinstance(value, list | tuple):
        return [fingerprint(entry) for entry in value]
    return value


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.float64])
def test_count_beyond_float32_goes_on_whatever_its_tensor_was(dtype):
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = ft.AdamW([param])
    opt.step()
    opt.state[param]["step"] = torch.tensor(2**24, dtype=dtype)
    for _ in range(4):
        opt.step()
    assert float(opt.state[param]["step"]) == 2**24 + 4


# -- signatures and options ------------------------------------------------------------------------


def test_classes_are_those_of_the_table():
    found = {n for n, c in vars(ft).items() if isinstance(c, type) and issubclass(c, ft.Optimizer)}
    assert found - {"Optimizer"} == set(CASES) <= set(ft.__all__)


@each_class
def test_class_is_a_torch_optimizer_of_its_name(name):
    cls = getattr(ft, name)
    assert issubclass(cls, torch.optim.Optimizer)
    assert (cls.__name__, cls.__module__) == (name, "fusedstep.torch")


@each_peer
def test_signature_is_torch_s_and_keyword_only_extras(name):
    mine = inspect.signature(getattr(ft, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = [(n, p.kind, p.default) for n, p in mine.items()]
    assert ours[: len(theirs)] == [(n, p.kind, p.default) for n, p in theirs.items()]
    extras = {n: p for n, p in mine.items() if n not in theirs}
    assert {p.kind for p in extras.values()} <= {inspect.Parameter.KEYWORD_ONLY}
    assert set(extras) == (set(defaults(name)) | FLAGS | BESIDE) - set(theirs)


@each_class
def test_arguments_have_types_torch_s_where_torch_has_them(name):
    cls, peer = getattr(ft, name), getattr(torch.optim, name, None)
    hints = typing.get_type_hints(cls.__init__)
    parameters = inspect.signature(cls).parameters
    assert {n: p.annotation for n, p in parameters.items()} | {"return": type(None)} == hints
    theirs = {} if peer is None else typing.get_type_hints(peer.__init__)
    assert {n: hints[n] for n in theirs} == theirs
    for key, value in defaults(name).items():
        if key not in theirs:
            kind = type(value)
            if isinstance(value, tuple):
                kind = tuple[(float,) * len(value)]
            assert hints[key] == (float | torch.Tensor if key == "lr" else kind)
    # The neutral classes' hints name types of ours, which resolve too.
    assert set(defaults(name)) < set(typing.get_type_hints(getattr(fs, name).__init__))


def test_signature_of_lion_is_its_paper_s():
    found = inspect.signature(ft.Lion).parameters.items()
    positional = {n: p.default for n, p in found if p.kind is not inspect.Parameter.KEYWORD_ONLY}
    assert list(positional) == ["params", "lr", "betas", "weight_decay"]
    assert (positional["lr"], positional["betas"], positional["weight_decay"]) == (
        1e-4, (0.9, 0.99), 0.0)  # fmt: skip


@each_class
def test_defaults_are_the_neutral_class_s(name):
    found = inspect.signature(getattr(ft, name)).parameters
    assert {n: found[n].default for n in defaults(name)} == defaults(name)


@each_class
@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}])
def test_flags_of_how_have_no_effect(name, flags):
    mine, same = parameters(), parameters()
    train(getattr(ft, name)(mine), mine, range(3))
    train(getattr(ft, name)(same, **flags), same, range(3))
    assert_same_bits(mine, same)


@each_class
@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_unsupported_flag_is_refused_wherever_it_is_given(name, flag):
    message = f"{flag} must be False, got True"
    cls, params = getattr(ft, name), parameters()
    with pytest.raises(ValueError, match=message):
        cls(params, **{flag: True})
    with pytest.raises(ValueError, match=message):
        cls([{"params": params, flag: True}])
    opt = cls(params, **{flag: False})
    train(opt, params, range(2))
    extra = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [extra], flag: True})
    assert len(opt.param_groups) == 1
    opt.param_groups[0][flag] = True
    before = fingerprint(opt)
    with pytest.raises(ValueError, match=message):
        opt.step()
    assert fingerprint(opt) == before
    opt.param_groups[0][flag] = False
    opt.step()


@each_class
def test_unknown_keyword_is_refused(name):
    with pytest.raises(TypeError, match="learning_rate"):
        getattr(ft, name)(parameters(), learning_rate=0.1)


# -- results ---------------------------------------------------------------------------------------


@each_case(torch_has)
def test_float32_steps_match_torch(name, hypers):
    mine, theirs, opt, oracle = pair(name, hypers)
    for step in range(8):
        set_grads(step, mine, theirs)
        assert opt.step() is None
        oracle.step()
    assert_close(mine, theirs)


@pytest.mark.usefixtures("_double_scalars")
@each_case(torch_has)
def test_float64_steps_match_torch(name, hypers):
    mine, theirs, opt, oracle = pair(name, hypers, torch.float64)
    for step in range(8):
        set_grads(step, mine, theirs)
        if step == 4:  # one parameter sits a step out, and counts one less from here on
            mine[1].grad = theirs[1].grad = None
        opt.step()
        oracle.step()
    assert_close(mine, theirs)
    for p, q in zip(mine, theirs, strict=True):
        entry, want = opt.state.get(p, {}), oracle.state.get(q, {})
        assert set(entry) == set(want) - absent(name, hypers)
        for key, value in entry.items():
            torch.testing.assert_close(value, want[key], rtol=1e-12, atol=1e-12)


@needs(hasattr(torch.Tensor, "grad_dtype"), "gradients of another dtype")
@each_class
def test_bfloat16_model_trains_with_gradients_that_are_summed_in_float32(name):
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(0.1)
    for param in model.parameters():
        param.grad_dtype = torch.float32
    arrays = [param.detach().clone() for param in model.parameters()]
    lr = 1.0 if name == "Adadelta" else 0.01
    opt = getattr(ft, name)(model.parameters(), lr=lr)
    neutral = getattr(fs, name)(arrays, lr=lr)
    losses = []
    for _ in range(5):
        opt.zero_grad()
        losses.append(0.0)
        for batch in torch.eye(8, dtype=torch.bfloat16).chunk(3):
            loss = (model(batch) - batch).float().square().sum()
            loss.backward()
            losses[-1] += loss.item()
        grads = [param.grad for param in model.parameters()]
        assert {grad.dtype for grad in grads} == {torch.float32}
        assert any((grad.to(torch.bfloat16) != grad).any() for grad in grads)  # they need it
        opt.step(max_norm=10.0)
        neutral.step(grads, max_norm=10.0)
    assert [bits(param) for param in model.parameters()] == list(map(bits, arrays))
    assert losses[-1] < losses[0]


@each_case(lambda name, hypers: torch_has(name, hypers) and hypers.get("eps") != 0)
def test_complex_steps_match_torch(name, hypers):
    mine, theirs, opt, oracle = pair(name, hypers, torch.complex64)
    for step in range(5):
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_close(mine, theirs)
    assert_same_layout(opt.state_dict(), oracle.state_dict())


@each_case()
def test_steps_have_the_bits_of_the_neutral_class(name, hypers):
    mine, arrays = parameters(), [p.detach().clone() for p in parameters()]
    opt, neutral = getattr(ft, name)(mine, **hypers), make(name, arrays, hypers)
    for step in range(6):
        set_grads(step, mine)
        if step == 2:
            mine[0].grad = None
        opt.step()
        neutral.step([p.grad for p in mine])
    assert_same_bits(mine, arrays)
    for i, entry in neutral.state_dict()["state"].items():
        assert set(opt.state.get(mine[i], {})) == set(entry) - absent(name, hypers)
        for key in opt.state.get(mine[i], {}):
            value = entry[key]
            assert bits(opt.state[mine[i]][key].double()) == bits(torch.as_tensor(value).double())


# -- groups and hyperparameters --------------------------------------------------------------------


# torch starts the sums of all groups at the constructor's value, whatever a group says; we do not.
@each_case(
    lambda name, hypers: torch_has(name, hypers) and "initial_accumulator_value" not in hypers
)
def test_group_options_are_its_own(name, hypers):
    mine, theirs = parameters(), parameters()

    def groups(params):
        return [{"params": params[:2], **hypers}, {"params": params[2:]}]

    opt, oracle = getattr(ft, name)(groups(mine)), torch_optimizer(name, groups(theirs), {})
    for step in range(4):
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_close(mine, theirs)
    some = {"fused", "foreach"} | NEW_KEYS
    keys = [set(group) - some for group in opt.param_groups]
    assert keys == [set(group) - some for group in oracle.param_groups]


# What a script may write into a group between two steps.
EDITS = [
    ("SGD", {}, {"lr": 0.5}),
    ("SGD", {}, {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9}, {"momentum": 0.0}),
    ("SGD", {"momentum": 0.9}, {"nesterov": True}),
    ("SGD", {"momentum": 0.9}, {"dampening": 0.5, "maximize": True}),
    ("Adam", {}, {"betas": (0.5, 0.75), "eps": 0.1}),
    ("Adam", {}, {"betas": [0.5, 0.75]}),
    ("Adam", {"amsgrad": True}, {"amsgrad": False}),
    ("Adam", {"lr": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("AdamW", {"lr": 0.1}, {"weight_decay": 0.5}),
    ("AdamW", {"lr": 0.1}, {"lr": 0}),
    ("RMSprop", {}, {"alpha": 0.5}),
    ("Rprop", {}, {"etas": (0.25, 1.5), "step_sizes": (0.01, 0.02)}),
    ("NAdam", {}, {"momentum_decay": 0.1}),
    ("ASGD", {}, {"lambd": 0.25, "lr": 0.25}),
    ("Adadelta", {}, {"rho": 0.5, "maximize": True}),
]


@pytest.mark.parametrize(("name", "hypers", "edit"), EDITS)
@pytest.mark.parametrize("place", [0, 1])
def test_edited_group_is_used_from_the_next_step_on(name, hypers, edit, place):
    mine, theirs = parameters(), parameters()
    opt = getattr(ft, name)([{"params": mine[:2]}, {"params": mine[2:]}], **hypers)
    oracle = torch_optimizer(name, [{"params": theirs[:2]}, {"params": theirs[2:]}], hypers)
    for step in range(6):
        if step == 3:
            opt.param_groups[place].update(edit)
            oracle.param_groups[place].update(edit)
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("Adam", {"amsgrad": True}),
        ("RMSprop", {"momentum": 0.9}),
        ("RMSprop", {"centered": True}),
        ("RMSprop", {"centered": True, "momentum": 0.5}),
    ],
)
def test_state_switched_on_later_begins_as_the_neutral_class_s(name, switch):
    # torch raises KeyError here; only its SGD makes a state when it is first called for.
    mine, arrays = parameters(), [p.detach().clone() for p in parameters()]
    opt, neutral = getattr(ft, name)(mine), make(name, arrays, {})
    for step in range(5):
        if step == 2:
            opt.param_groups[0].update(switch)
            for key, value in switch.items():
                neutral.param_groups[0][key] = value
        set_grads(step, mine)
        opt.step()
        neutral.step([p.grad for p in mine])
    assert_same_bits(mine, arrays)


def test_list_of_betas_may_be_changed_in_place():
    mine, theirs, opt, oracle = pair("Adam", {"betas": [0.9, 0.99], "lr": 0.1})
    for step in range(4):
        for group in (opt.param_groups[0], oracle.param_groups[0]):
            group["betas"] = list(group["betas"]) if step == 0 else group["betas"]
            group["betas"][0] = 0.9 - 0.1 * step
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_close(mine, theirs)


@each_class
def test_added_group_is_stepped_with_its_options(name):
    mine, whole = parameters(), parameters()
    opt = getattr(ft, name)(mine[:2])
    set_grads(0, mine)
    opt.step()
    opt.add_param_group({"params": mine[2:], "lr": 0.5})
    reference = [getattr(ft, name)(whole[:2]), getattr(ft, name)(whole[2:], lr=0.5)]
    set_grads(0, whole)
    reference[0].step()
    for step in range(1, 4):
        set_grads(step, mine, whole)
        opt.step()
        for one in reference:
            one.step()
    assert_same_bits(mine, whole)
    assert opt.param_groups[1]["lr"] == 0.5


@pytest.mark.parametrize(
    "group",
    [
        {"lr": -1.0},
        {"betas": (0.9, 1.0)},
        {"weight_decay": float("nan")},
        {"lr": torch.ones(2)},
        {"differentiable": True},
    ],
)
def test_added_group_that_is_wrong_changes_nothing(group):
    params = parameters()
    opt = ft.Adam(params)
    train(opt, params, range(1))
    before = fingerprint(opt)
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(group))}.* must be "):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], **group})
    assert fingerprint(opt) == before


@needs_names
@each_peer
def test_named_parameters_are_kept_as_torch_keeps_them(name):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    opt = getattr(ft, name)(model.named_parameters())
    oracle = getattr(torch.optim, name)(model.named_parameters())
    assert opt.param_groups[0]["param_names"] == oracle.param_groups[0]["param_names"]
    assert opt.state_dict()["param_groups"][0]["param_names"][0] == "0.weight"
    opt.load_state_dict(opt.state_dict())
    opt.param_groups[0]["params"][1].grad = torch.ones(3).to_sparse()
    with pytest.raises(ValueError, match=r"grads\[0\.bias\] must be dense"):
        opt.step()


NUMBERS = [
    ("Adam", "lr", (0.1, 0.2, 0.05)),
    ("SGD", "lr", (0.5, 0.25, 1.0)),
    ("RAdam", "lr", (0.1, 0.3, 0.2)),
    ("Lion", "lr", (0.1, 0.2, 0.05)),
    ("Adam", "betas", ((0.9, 0.99), (0.5, 0.75), (0.25, 0.875))),
]


@pytest.mark.parametrize(("name", "key", "values"), NUMBERS)
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_hyperparameter_tensor_is_read_anew_each_step(name, key, values, shape, how):
    def tensors(value):
        if isinstance(value, tuple):
            return tuple(map(tensors, value))
        return torch.full(shape, value, dtype=torch.float64)

    def write(old, new):
        if isinstance(new, tuple):
            for one, other in zip(old, new, strict=True):
                write(one, other)
        else:
            old.fill_(new)

    mine, plain = parameters(), parameters()
    opt = getattr(ft, name)(mine, **{key: tensors(values[0])})
    reference = getattr(ft, name)(plain, **{key: values[0]})
    for step, value in enumerate(values):
        if how == "replaced":
            opt.param_groups[0][key] = tensors(value)
        else:
            write(opt.param_groups[0][key], value)
        reference.param_groups[0][key] = value
        set_grads(step, mine, plain)
        opt.step()
        reference.step()
    assert_same_bits(mine, plain)


def test_lr_tensor_stays_the_object_it_was():
    lr = torch.tensor(0.1)
    params = parameters()
    opt = ft.AdamW(params, lr=lr)
    train(opt, params, range(2))
    assert opt.param_groups[0]["lr"] is lr


# -- closures, hooks, gradients --------------------------------------------------------------------


@each_class
@pytest.mark.parametrize("keyword", [False, True])
def test_closure_is_run_once_before_the_update_with_gradients_on(name, keyword):
    mine, plain = parameters(), parameters()
    opt, reference = getattr(ft, name)(mine), getattr(ft, name)(plain)
    seen = []

    def closure():
        seen.append(torch.is_grad_enabled())
        opt.zero_grad()
        loss = sum((p**2).sum() for p in mine)
        loss.backward()
        return loss

    for _ in range(2):
        expected = sum((p**2).sum() for p in plain)
        with torch.no_grad():
            loss = opt.step(closure=closure) if keyword else opt.step(closure)
            assert not torch.is_grad_enabled()
        reference.zero_grad()
        expected.backward()
        reference.step()
        assert torch.equal(loss, expected)
    assert seen == [True, True]
    assert_same_bits(mine, plain)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("cls", [torch.optim.SGD, ft.SGD])
def test_step_hooks_see_what_torch_s_see(cls, keyword):
    # Run for torch's class too, so that what is expected is what torch does.
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt, seen = cls([param], lr=0.5), []

    def hook(kind):
        def record(optimizer, args, kwargs):
            assert optimizer is opt
            seen.append((kind, args, kwargs, param[0].item()))

        return record

    def closure():
        seen.append("closure")
        return 7

    handles = [
        opt.register_step_pre_hook(hook("pre")),
        opt.register_step_post_hook(hook("post")),
        register_optimizer_step_pre_hook(hook("global pre")),
        register_optimizer_step_post_hook(hook("global post")),
    ]
    args, kwargs = ((opt,), {"closure": closure}) if keyword else ((opt, closure), {})
    try:
        assert opt.step(*args[1:], **kwargs) == 7
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [
        ("global pre", args, kwargs, 1.0),
        ("pre", args, kwargs, 1.0),
        "closure",
        ("post", args, kwargs, 0.5),
        ("global post", args, kwargs, 0.5),
    ]
    opt.step()  # the hooks are gone
    assert len(seen) == 5
    assert param[0].item() == 0.0


def test_step_pre_hook_may_replace_the_arguments():
    param = torch.nn.Parameter(torch.ones(3))
    opt = ft.SGD([param])
    opt.register_step_pre_hook(lambda opt, args, kwargs: ((args[0], lambda: 5), {}))
    assert opt.step() == 5
    assert opt.step(closure=lambda: 6) == 5


def test_subclass_may_override_step():
    class Counting(ft.SGD):
        def step(self, closure=None):
            self.count = getattr(self, "count", 0) + 1
            return super().step(closure)

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    opt = Counting([param], lr=0.25)
    opt.step()
    opt.step(closure=lambda: None)
    assert opt.count == 2
    assert torch.equal(param.detach(), torch.full((3,), 0.5))


class Own:
    """A step of one's own, to put before an optimizer's or in its place."""

    def step(self, closure=None):
        return super().step(closure)


class OwnSGD(Own, ft.SGD):
    pass


class OwnerSGD(OwnSGD):
    def step(self, closure=None):
        return super().step(closure)


def _patched_class(opt, wraps):
    class Plain(type(opt)):
        pass

    opt.__class__ = Plain
    own = Plain.step
    wrap = functools.wraps(own) if wraps else lambda function: function

    @wrap
    def step(self, *args, **kwargs):
        return own(self, *args, **kwargs)

    Plain.step = step
    return opt


def _changed(opt, cls):
    opt.__class__ = cls
    return opt


def _patched_instance(opt):
    lr_scheduler.ExponentialLR(opt, 1.0)  # which patches it first
    own = opt.step
    opt.step = lambda *args, **kwargs: own(*args, **kwargs)
    return opt


WAYS_TO_STEP = {
    "plain": lambda params: ft.SGD(params, lr=0.5),
    "subclass": lambda params: OwnSGD(params, lr=0.5),
    "subclass of a subclass": lambda params: [OwnSGD(params), OwnerSGD(params, lr=0.5)][1],
    "mixin": lambda params: type("Mixed", (Own, ft.SGD), {})(params, lr=0.5),
    "class changed": lambda params: _changed(
        ft.SGD(params, lr=0.5), type("New", (ft.SGD,), {"step": lambda self: ft.SGD.step(self)})
    ),
    "subclass changed": lambda params: _changed(
        OwnSGD(params, lr=0.5), type("New", (OwnSGD,), {"step": lambda self: OwnSGD.step(self)})
    ),
    "class patched": lambda params: _patched_class(ft.SGD(params, lr=0.5), wraps=False),
    "class patched with wraps": lambda params: _patched_class(ft.SGD(params, lr=0.5), wraps=True),
    "subclass patched": lambda params: _patched_class(OwnSGD(params, lr=0.5), wraps=False),
    "instance patched": lambda params: _patched_instance(ft.SGD(params, lr=0.5)),
}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("way", WAYS_TO_STEP)
def test_step_hooks_and_profiler_entry_come_once_however_step_is_reached(way, copied):
    param = torch.nn.Parameter(torch.ones(3))
    opt, seen = WAYS_TO_STEP[way]([param]), []
    if copied:  # without the hooks, as torch's
        opt = copy.deepcopy(opt)
        param = opt.param_groups[0]["params"][0]
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    opt.register_step_post_hook(lambda *_: seen.append("post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        for _ in range(2):
            param.grad = torch.ones(3)
            with torch.autograd.profiler.profile() as profile:
                opt.step()
            names = [event.name for event in profile.function_events]
            assert names.count(f"Optimizer.step#{type(opt).__name__}.step") == 1
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["global pre", "pre", "post", "global post"] * 2
    assert param[0].item() == 0.0


def test_step_that_raises_leaves_the_hooks_to_the_next():
    param = torch.nn.Parameter(torch.ones(3))
    opt, seen = OwnSGD([param]), []
    opt.register_step_pre_hook(lambda *_: seen.append("pre"))
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: 1 // 0)
    opt.step()
    assert seen == ["pre", "pre"]


@pytest.mark.parametrize("given", [[torch.ones(3)], torch.ones(3), 1.0])
def test_gradients_given_to_step_are_told_from_a_closure(given):
    params = parameters()
    opt = ft.AdamW(params)
    set_grads(0, params)
    rule = f"closure must be callable or None, got {type(given).__name__}: gradients are read from"
    for give in (lambda: opt.step(given), lambda: opt.step(closure=given)):
        with pytest.raises(TypeError, match=rule):
            give()
    assert_same_bits(params, parameters())


@each_class
def test_profiler_sees_the_step(name):
    params = parameters()
    opt = getattr(ft, name)(params)
    set_grads(0, params)
    with torch.autograd.profiler.profile() as profile:
        opt.step()
    assert f"Optimizer.step#{name}.step" in {event.name for event in profile.function_events}


def test_state_dict_hooks_run_as_torch_s():
    def run(cls):
        seen, params = [], parameters()
        opt = cls(params)
        train(opt, params, range(1))
        opt.register_state_dict_pre_hook(lambda o: seen.append(("pre", o is opt)))
        opt.register_state_dict_post_hook(lambda o, d: {**d, "extra": 1})
        opt.register_load_state_dict_pre_hook(
            lambda o, d: {**d, "param_groups": [{**d["param_groups"][0], "lr": 0.75}]}
        )
        opt.register_load_state_dict_post_hook(
            lambda o: seen.append(("loaded", o.param_groups[0]["lr"], len(o.state)))
        )
        saved = opt.state_dict()
        opt.load_state_dict(saved)
        kinds = {type(value) for entry in opt.state.values() for value in entry.values()}
        return seen, sorted(saved), kinds

    assert run(ft.Adam) == run(torch.optim.Adam)


def test_load_hook_sees_tensors_in_the_state_dict():
    params = parameters()
    opt = ft.Adam(params)
    train(opt, params, range(1))
    seen = []
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d["state"][0]["exp_avg"]))
    opt.load_state_dict(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    assert [type(value) for value in seen] == [torch.Tensor] * 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_drops_or_zeroes(set_to_none):
    params = parameters()
    opt = ft.SGD(params)
    set_grads(0, params)
    params[1].grad = None
    before = [p.grad for p in params]
    opt.zero_grad(set_to_none=set_to_none)
    for p, grad in zip(params, before, strict=True):
        assert p.grad is (None if set_to_none else grad)
        assert grad is None or set_to_none or not grad.any()
    opt.zero_grad()
    assert all(p.grad is None for p in params)


@each_peer
def test_missing_gradients_leave_state_and_count_alone(name):
    mine, theirs, opt, oracle = pair(name, {})
    for step in range(6):
        set_grads(step, mine, theirs)
        for i in range(len(SHAPES)):
            if step % (i + 1):
                mine[i].grad = theirs[i].grad = None
        opt.step()
        oracle.step()
    assert_close(mine, theirs)
    counts = [float(oracle.state[q].get("step", 0)) for q in theirs]
    assert [float(opt.state[p].get("step", 0)) for p in mine] == counts


def test_step_without_any_gradient_does_nothing():
    params = parameters()
    opt = ft.Adam(params)
    before = fingerprint(params)
    opt.step()
    assert fingerprint(params) == before
    assert not opt.state


@each_peer
def test_gradient_of_a_parameter_that_requires_none_is_used(name):
    mine, theirs, opt, oracle = pair(name, {})
    for params in (mine, theirs):
        params[0].requires_grad_(False)  # frozen, without a gradient
        params[1].requires_grad_(False)  # with one
    for step in range(3):
        set_grads(step, mine, theirs)
        mine[0].grad = theirs[0].grad = None
        opt.step()
        oracle.step()
    assert_close(mine, theirs)
    assert torch.equal(mine[0], parameters()[0])
    assert (mine[0] in opt.state) == (theirs[0] in oracle.state)


def test_plain_leaf_tensors_are_stepped():
    tensor = torch.ones(3)
    opt = ft.SGD([tensor], lr=0.5)
    tensor.grad = torch.ones(3)
    opt.step()
    assert tensor.tolist() == [0.5] * 3


def test_tied_parameter_is_stepped_once():
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Linear(2, 2, bias=False)
            self.two = torch.nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight

    model = Tied()
    opt = ft.SGD(model.parameters(), lr=1.0)
    before = model.one.weight.detach().clone()
    model.two(model.one(torch.ones(2))).sum().backward()
    opt.step()
    assert torch.equal(model.one.weight, before - model.one.weight.grad)
    assert model.two.weight is model.one.weight
    assert len(opt.param_groups[0]["params"]) == 1


@pytest.mark.parametrize("cls", [torch.optim.Adam, ft.Adam])
def test_duplicates_are_refused_as_by_torch(cls):
    p, q = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="more than one parameter group"):
        cls([{"params": [p]}, {"params": [q, p]}])
    with pytest.warns(UserWarning, match="duplicate parameters"):
        cls([p, q, p])
    opt = cls([p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": [p]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_duplicate_within_a_group_is_refused_by_the_step(name):
    # torch steps it twice. One sweep cannot, and must not step it once in silence.
    p = torch.nn.Parameter(torch.ones(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = getattr(ft, name)([p, p])
    p.grad = torch.ones(2)
    before = fingerprint(opt)
    with pytest.raises(ValueError, match=r"params\[0\] and params\[1\]"):
        opt.step()
    assert fingerprint(opt) == before


@pytest.mark.parametrize("cls", [torch.optim.Adam, ft.Adam])
@pytest.mark.parametrize("params", [[], torch.ones(2), [3.0], [torch.ones(2) * torch.ones(2)]])
def test_construction_refuses_what_torch_refuses(cls, params):
    if isinstance(params, list) and params and isinstance(params[0], torch.Tensor):
        params = [torch.ones(2, requires_grad=True) * 2]  # not a leaf
    with pytest.raises((TypeError, ValueError)):
        cls(params)


# -- copies ----------------------------------------------------------------------------------------


def copied(opt, how):
    """A copy of an optimizer, and its parameters."""
    if how == "deepcopy":
        other = copy.deepcopy(opt)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(opt))
    else:
        file = io.BytesIO()
        torch.save(opt, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    return other, [p for group in other.param_groups for p in group["params"]]


@each_case()
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copy_trains_on_by_itself(name, hypers, how):
    mine, plain = parameters(), parameters()
    opt, reference = getattr(ft, name)(mine, **hypers), getattr(ft, name)(plain, **hypers)
    train(opt, mine, range(3))
    train(reference, plain, range(6))
    other, others = copied(opt, how)
    assert type(other) is type(opt)
    before = fingerprint(opt)
    train(other, others, range(3, 6))
    after = fingerprint(opt)
    assert after == before  # the copy shares no memory with the original
    assert_same_bits(others, plain)
    train(opt, mine, range(3, 6))
    assert_same_bits(mine, plain)


def test_deepcopy_of_model_and_optimizer_together():
    model = torch.nn.Linear(3, 2)
    opt = ft.Adam(model.parameters(), lr=0.1)
    model(torch.ones(3)).sum().backward()
    opt.step()
    other, copied_opt = copy.deepcopy((model, opt))
    assert copied_opt.param_groups[0]["params"][0] is other.weight
    opt.step()
    assert not torch.equal(other.weight, model.weight)
    other.weight.grad, other.bias.grad = model.weight.grad, model.bias.grad
    copied_opt.step()
    assert torch.equal(other.weight, model.weight)


# -- state_dict ------------------------------------------------------------------------------------


def assert_same_layout(mine, theirs):
    """The same keys, and tensors of the same dtypes and shapes under them.

    But for what torch carries from step to step in float32, which is double here.
    """

    def layout(entry):
        carried = {"mu_product", "eta", "mu"}
        return {
            k: (torch.float64 if k in carried else v.dtype, v.shape)
            for k, v in entry.items()
            if v is not None
        }

    assert set(mine["state"]) == set(theirs["state"])
    for i, entry in theirs["state"].items():
        found = {k: (v.dtype, v.shape) for k, v in mine["state"][i].items()}
        assert found == layout(entry)
    for group, expected in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert set(group) - NEW_KEYS == set(expected) - NEW_KEYS
        for key in set(group) - {"foreach", "fused"} - NEW_KEYS:
            assert group[key] == expected[key], key


@each_case(torch_has)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_is_laid_out_as_torch_s(name, hypers, dtype):
    mine, theirs, opt, oracle = pair(name, hypers, dtype)
    for step in range(2):
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_same_layout(opt.state_dict(), oracle.state_dict())
    for i, entry in oracle.state_dict()["state"].items():
        for key, value in entry.items():
            if value is not None and key not in absent(name, hypers):
                found = opt.state_dict()["state"][i][key].to(value.dtype)
                torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


def torch_implementations(name):
    known = inspect.signature(getattr(torch.optim, name)).parameters
    return {
        "for-loop": {"foreach": False},
        "foreach": {"foreach": True},
        **({"fused": {"fused": True}} if "fused" in known else {}),
    }


def each_switch():
    return pytest.mark.parametrize(
        ("name", "hypers", "implementation"),
        [
            pytest.param(*case.values, one, id=f"{case.id}-{one}")
            for case in each_case(torch_has).args[1]
            for one in torch_implementations(case.values[0])
        ],
    )


@each_switch()
@pytest.mark.parametrize("to", ["ours", "torch's"])
def test_training_that_switches_library_midway_goes_on(name, hypers, implementation, to):
    made = {
        "ours": lambda p: getattr(ft, name)(p, **hypers),
        "torch's": lambda p: getattr(torch.optim, name)(
            p, **hypers, **torch_implementations(name)[implementation]
        ),
    }
    plain, params = parameters(), parameters()
    train(torch_optimizer(name, plain, hypers), plain, range(8))
    (begin,) = set(made) - {to}
    first, second = made[begin](params), made[to](params)
    train(first, params, range(4))
    saved = first.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    second.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    train(second, params, range(4, 8))
    assert_close(params, plain)


@each_peer
@pytest.mark.parametrize("to", ["ours", "torch's"])
def test_checkpoint_from_before_the_first_step_loads(name, to):
    plain, params = parameters(), parameters()
    train(torch_optimizer(name, plain, {}), plain, range(3))
    made = [getattr(torch.optim, name)(params), getattr(ft, name)(params)]
    first, second = made if to == "ours" else reversed(made)
    second.load_state_dict(first.state_dict())
    train(second, params, range(3))
    assert_close(params, plain)


@each_case()
def test_own_state_dict_resumes_to_the_bit(name, hypers):
    params, plain = parameters(), parameters()
    train(getattr(ft, name)(plain, **hypers), plain, range(5))
    first = getattr(ft, name)(params, **hypers)
    train(first, params, range(3))
    second = getattr(ft, name)(params)
    second.load_state_dict(state_dict=first.state_dict())
    train(second, params, range(3, 5))
    assert_same_bits(params, plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_class
def test_load_keeps_float32_state_under_short_parameters(name, dtype):
    params = parameters(dtype)
    first = getattr(ft, name)(params, **CASES[name][3])
    train(first, params, range(3))
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    second = getattr(ft, name)(others)
    second.load_state_dict(first.state_dict())
    entries = zip(first.state.values(), second.state.values(), strict=True)
    for entry, loaded in entries:
        assert {v.dtype for n, v in loaded.items() if v.ndim or n == "step"} <= {torch.float32}
        assert fingerprint(loaded) == fingerprint(entry)
    for step in range(3, 5):
        set_grads(step, params, others)
        first.step()
        second.step()
    assert {p.dtype for p in others} == {dtype}
    assert fingerprint(params) == fingerprint(others)


def test_load_of_torch_s_bfloat16_state_widens_it():
    theirs = parameters(torch.bfloat16)
    oracle = torch.optim.Adam(theirs, foreach=False)
    train(oracle, theirs, range(2))
    params = parameters(torch.bfloat16)
    opt = ft.Adam(params)
    opt.load_state_dict(oracle.state_dict())
    for p, q in zip(params, theirs, strict=True):
        assert opt.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(opt.state[p]["exp_avg"].bfloat16(), oracle.state[q]["exp_avg"])
    train(opt, params, range(2, 4))


OLD_KEYS = {
    "params", "lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "alpha",
    "rho", "lambd", "t0", "etas", "step_sizes", "lr_decay", "initial_accumulator_value",
    "centered", "amsgrad", "momentum_decay",
}  # fmt: skip


@each_case(torch_has)
def test_old_checkpoint_loads(name, hypers):
    # As torch 1.x wrote them: fewer keys in the groups, counts as Python numbers.
    mine, theirs, opt, oracle = pair(name, hypers)
    train(oracle, theirs, range(3))
    train(getattr(ft, name)(mine, **hypers), mine, range(3))
    saved = copy.deepcopy(oracle.state_dict())
    for group in saved["param_groups"]:
        for key in set(group) - OLD_KEYS:
            del group[key]
        group["initial_lr"] = 0.25
    for entry in saved["state"].values():
        for key in {"step", "mu_product", "eta", "mu"} & set(entry):
            number = float(entry[key])
            entry[key] = int(number) if key == "step" else number
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["initial_lr"] == 0.25
    train(opt, mine, range(3, 6))
    train(oracle, theirs, range(3, 6))
    assert_close(mine, theirs)
    if "step" in opt.state[mine[0]]:
        assert opt.state[mine[0]]["step"].dtype == torch.float32
    found, expected = (set(one.state_dict()["param_groups"][0]) for one in (opt, oracle))
    assert found - {"initial_lr"} - NEW_KEYS == expected - NEW_KEYS


def test_checkpoint_s_other_keys_stay_in_the_group():
    params = parameters()
    opt = ft.Adam(params)
    saved = opt.state_dict()
    saved["param_groups"][0].update(foreach=True, fused=None, initial_lr=0.1, my_own="x")
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["foreach"], group["initial_lr"], group["my_own"]) == (True, 0.1, "x")
    train(opt, params, range(1))
    assert opt.state_dict()["param_groups"][0]["my_own"] == "x"


def test_hyperparameters_that_a_checkpoint_lacks_stay():
    params = parameters()
    opt = ft.SGD(params, lr=0.25, momentum=0.5, maximize=True)
    opt.load_state_dict({"state": {}, "param_groups": [{"params": list(range(5)), "lr": 0.125}]})
    group = opt.param_groups[0]
    assert (group["lr"], group["momentum"], group["maximize"]) == (0.125, 0.5, True)


def test_momentum_buffer_of_none_begins_as_in_torch():
    mine, theirs, opt, oracle = pair("SGD", {"momentum": 0.9, "dampening": 0.5, "lr": 0.1})
    saved = oracle.state_dict()
    saved["state"] = {i: {"momentum_buffer": None} for i in range(len(SHAPES))}
    opt.load_state_dict(saved)
    oracle.load_state_dict(saved)
    for step in range(3):
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_close(mine, theirs)


@each_class
def test_loaded_state_is_a_copy(name):
    params, others = parameters(), parameters()
    hypers = CASES[name][3]
    first, second = getattr(ft, name)(params, **hypers), getattr(ft, name)(others)
    train(first, params, range(2))
    second.load_state_dict(first.state_dict())
    before = fingerprint(first)
    train(second, others, range(2, 4))
    assert fingerprint(first) == before
    before = fingerprint(second)
    train(first, params, range(2, 4))
    assert fingerprint(second) == before


def test_load_keeps_how_to_compute():
    params = parameters()
    opt = ft.Adam(params)
    saved = opt.state_dict()
    saved["param_groups"][0].update(capturable=True, differentiable=True, lr=0.5)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["capturable"], group["differentiable"], group["lr"]) == (False, False, 0.5)
    train(opt, params, range(1))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda d: d["state"][0].update(exp_avg=torch.ones(2)),
        lambda d: d["state"][4].update(exp_avg_sq=torch.ones(2, 3)),
        lambda d: d["state"][4].update(max_exp_avg_sq=torch.ones(24)),
        lambda d: d["param_groups"].append({"params": []}),
        lambda d: d["param_groups"][1]["params"].pop(),
        lambda d: d["param_groups"][1].update(lr=-1.0),
        lambda d: d["param_groups"][1].update(betas=(0.9, 2.0)),
        lambda d: d["param_groups"][0].update(eps="small"),
    ],
)
def test_load_that_raises_has_changed_nothing(spoil):
    params = parameters()
    opt = ft.Adam([{"params": params[:2]}, {"params": params[2:]}], lr=0.1, amsgrad=True)
    train(opt, params, range(2))
    good, bad = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["lr"] = 0.5
    spoil(bad)
    train(opt, params, range(2, 3))
    before, untouched = fingerprint(opt), fingerprint(bad)
    with pytest.raises((TypeError, ValueError)):
        opt.load_state_dict(bad)
    assert fingerprint(opt) == before
    assert fingerprint(bad) == untouched
    twin = copy.deepcopy(opt)
    twins = [p for group in twin.param_groups for p in group["params"]]
    set_grads(3, params, twins)
    opt.step()
    twin.step()
    assert_same_bits(params, twins)
    opt.load_state_dict(good)
    assert float(opt.state[params[0]]["step"]) == 2


def test_step_count_goes_on_past_2_to_the_24():
    # float32 holds even numbers only from there on: a count kept in it would stop.
    param = torch.nn.Parameter(torch.ones(3))
    opt = ft.Adam([param])
    param.grad = torch.ones(3)
    opt.step()
    opt.state[param]["step"] = torch.tensor(2.0**24 - 2)
    for _ in range(10):
        opt.step()
    assert float(opt.state[param]["step"]) == 2**24 + 8
    other = copy.deepcopy(opt)
    (twin,) = other.param_groups[0]["params"]
    twin.grad = torch.ones(3)  # deepcopy leaves gradients behind
    for _ in range(4):
        other.step()
    assert float(other.state[twin]["step"]) == 2**24 + 12
    opt.state[param]["step"].fill_(7)
    opt.step()
    assert float(opt.state[param]["step"]) == 8


@each_peer
def test_edited_step_count_is_honoured(name):
    mine, theirs, opt, oracle = pair(name, {})
    for step in range(6):
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
        for one, params in ((opt, mine), (oracle, theirs)):
            entry = one.state[params[step % 2]]
            if step == 2 and "step" in entry:
                entry["step"].fill_(40)
            if step == 3 and "step" in entry:
                entry["step"] = torch.tensor(1.0)
    assert_close(mine, theirs)


# -- torch.amp -------------------------------------------------------------------------------------


def scaled_training(opt, params, bad=(), *, clip=False, steps=8, value=math.inf):
    """Trains under a GradScaler, with a non-finite gradient in the steps `bad`."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales, counts = [], []
    for step in range(steps):
        set_grads(step, params)
        for p in params:
            p.grad *= scaler.scale(torch.ones(()))
        if step in bad:
            params[1].grad[5] = value
        if clip:
            scaler.unscale_(opt)
            clip_grad_norm_(params, 0.5)
        scaler.step(opt)
        scaler.update()
        scales.append(scaler.get_scale())
        counts.append([float(opt.state.get(p, {}).get("step", 0)) for p in params])
    return scales, counts


@pytest.mark.parametrize("fused", [None, True])
@each_case()
def test_scaled_steps_have_the_bits_of_unscaled_ones(name, hypers, fused):
    # A power of two scales without a rounding.
    mine, plain = parameters(), parameters()
    opt = getattr(ft, name)(mine, fused=fused, **hypers)
    scaled_training(opt, mine, steps=4)
    train(getattr(ft, name)(plain, **hypers), plain, range(4))
    assert_same_bits(mine, plain)
    assert not {"grad_scale", "found_inf"} & set(vars(opt))


@each_peer
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(
    ("bad", "value"), [((), 0.0), ((3,), math.inf), ((0,), math.nan), ((0, 1, 4), math.inf)]
)
def test_scaled_training_is_torch_s(name, fused, clip, bad, value):
    mine, theirs, opt, oracle = pair(name, {})
    opt.param_groups[0]["fused"] = fused
    expected = scaled_training(oracle, theirs, bad, clip=clip, value=value)
    assert scaled_training(opt, mine, bad, clip=clip, value=value) == expected
    assert_close(mine, theirs)


@each_class
@pytest.mark.parametrize("taken", [0, 2])
def test_non_finite_gradient_changes_nothing(name, taken):
    params = parameters()
    opt = getattr(ft, name)(params, **CASES[name][3], fused=True)
    train(opt, params, range(taken))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    set_grads(9, params)
    params[4].grad[1, 2, 3] = math.nan
    scaler.scale(torch.ones(()))
    before = fingerprint(opt)
    scaler.step(opt)
    assert fingerprint(opt) == before
    scaler.update()
    assert scaler.get_scale() == 2.0


def test_disabled_scaler_steps():
    mine, plain = parameters(), parameters()
    opt = ft.Adam(mine)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    set_grads(0, mine)
    scaler.step(opt)
    scaler.update()
    train(ft.Adam(plain), plain, range(1))
    assert_same_bits(mine, plain)


def test_autocast_model_trains():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    opt, scaler = ft.AdamW(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = (model(torch.ones(4)) - 1).square().mean()
        opt.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


# -- schedulers ------------------------------------------------------------------------------------


def restart(t):
    return 0.5 if t % 3 == 0 else 1.0


# How to make each scheduler; the table must have every class that torch has.
SCHEDULERS = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 0.9**t),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, restart),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 3, 0.5),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [2, 5], 0.5),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.25, 4),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.25, 1.0, 6),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.75),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, 8, 2.0),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 8, 0.01),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 3, 2),
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(opt, 0.01, 0.3, 3, base_momentum=0.5),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(opt, 0.3, 12),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=1),
    "SequentialLR": lambda opt: lr_scheduler.SequentialLR(
        opt,
        [lr_scheduler.LinearLR(opt, 0.1, 1.0, 4), lr_scheduler.ExponentialLR(opt, 0.75)],
        milestones=[4],
    ),
    "ChainedScheduler": lambda opt: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(opt, 0.25, 4), lr_scheduler.ExponentialLR(opt, 0.75)]
    ),
    "SWALR": lambda opt: swa_utils.SWALR(opt, swa_lr=0.05, anneal_epochs=5),
}


def test_schedulers_of_the_table_are_all_that_torch_has():
    found = {
        name
        for name, cls in [*vars(lr_scheduler).items(), *vars(swa_utils).items()]
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


DRIVEN = [("SGD", {"lr": 0.1, "momentum": 0.9}), ("Adam", {"lr": 0.1}), ("ASGD", {"lr": 0.1}),
          ("AdamW", {"lr": torch.tensor(0.1, dtype=torch.float64)})]  # fmt: skip


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("name", "hypers"), DRIVEN, ids=["SGD", "Adam", "ASGD", "AdamW, tensor"])
def test_scheduler_drives_ours_as_torch_s(scheduler, name, hypers):
    if (name, scheduler) in (("ASGD", "OneCycleLR"), ("ASGD", "CyclicLR")):
        pytest.skip("these cycle a momentum, which ASGD has not")
    mine, theirs = parameters(), parameters()  # each optimizer has an lr tensor of its own
    opt = getattr(ft, name)(mine, **copy.deepcopy(hypers))
    oracle = torch_optimizer(name, theirs, copy.deepcopy(hypers))
    rates = {}
    for one, params in ((opt, mine), (oracle, theirs)):
        made, seen = SCHEDULERS[scheduler](one), []
        for step in range(10):
            train(one, params, [step])
            made.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
            group = one.param_groups[0]
            seen.append([float(group["lr"]), group.get("momentum"), group.get("betas")])
        rates[one] = seen
    assert rates[opt] == rates[oracle]
    assert len({rate for rate, *_ in rates[opt]}) > 1
    assert_close(mine, theirs)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_scheduler_and_optimizer_resume_from_their_state_dicts(scheduler):
    metric = [1.0] if scheduler == "ReduceLROnPlateau" else []
    plain, params = parameters(), parameters()

    def run(opt, schedule, params, steps):
        for step in steps:
            train(opt, params, [step])
            schedule.step(*metric)

    opt = ft.SGD(plain, lr=0.1, momentum=0.9)
    run(opt, SCHEDULERS[scheduler](opt), plain, range(8))
    first = ft.SGD(params, lr=0.1, momentum=0.9)
    schedule = SCHEDULERS[scheduler](first)
    run(first, schedule, params, range(4))
    second = ft.SGD(params, lr=0.1, momentum=0.9)
    resumed = SCHEDULERS[scheduler](second)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(schedule.state_dict())
    run(second, resumed, params, range(4, 8))
    assert_same_bits(params, plain)


# -- frameworks ------------------------------------------------------------------------------------


def problem():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    return x, x @ torch.arange(1.0, 5.0)[:, None]


class Trainer:
    """As transformers' Trainer drives an optimizer and a scheduler that it is given."""

    def __init__(self, model, optimizers):
        self.model, (self.optimizer, self.scheduler) = model, optimizers

    def train(self, steps):
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        x, y = problem()
        losses = []
        for _ in range(steps):
            loss = (self.model(x) - y).square().mean()
            loss.backward()
            clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()
            self.scheduler.step()
            self.model.zero_grad()
            losses.append(loss.item())
        return losses


class Fit:
    """As Lightning drives a module: step with a closure, schedulers by their interval."""

    def __init__(self, module):
        found = module.configure_optimizers()
        self.module, self.optimizer = module, found["optimizer"]
        self.schedule = found["lr_scheduler"]

    def train(self, steps):
        batch, losses = problem(), []
        for _ in range(steps):

            def closure():
                loss = self.module.training_step(batch)
                self.optimizer.zero_grad()
                loss.backward()
                return loss

            losses.append(self.optimizer.step(closure=closure).item())
            if self.schedule["interval"] == "step":
                self.schedule["scheduler"].step()
        return losses


class Module(torch.nn.Module):
    def __init__(self, cls):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.cls = torch.nn.Linear(4, 1), cls

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch):
        return (self(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self):
        opt = self.cls(self.parameters(), lr=0.5)
        schedule = lr_scheduler.CosineAnnealingLR(opt, 40)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_trainer_style_loop_trains_as_with_torch(name):
    def run(package):
        model = Module(getattr(package, name))
        config = model.configure_optimizers()
        return Trainer(model, (config["optimizer"], config["lr_scheduler"]["scheduler"])).train(40)

    mine, theirs = run(ft), run(torch.optim)
    assert mine[-1] < mine[0] / 10
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
def test_lightning_style_loop_trains_as_with_torch(name):
    mine, theirs = (Fit(Module(getattr(package, name))).train(40) for package in (ft, torch.optim))
    assert mine[-1] < mine[0] / 2
    np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_neutral_checkpoint_resumes_in_the_torch_class():
    params, arrays = parameters(), [p.detach().clone() for p in parameters()]
    neutral = fs.AdamW(arrays, lr=0.1)
    for step in range(3):
        set_grads(step, params)
        neutral.step([p.grad for p in params])
    opt = ft.AdamW(params, lr=0.1)
    opt.load_state_dict(neutral.state_dict())
    with torch.no_grad():
        for p, array in zip(params, arrays, strict=True):
            p.copy_(array)
    for step in range(3, 5):
        set_grads(step, params)
        opt.step()
        neutral.step([p.grad for p in params])
    assert_same_bits(params, arrays)


def test_adamw_stays_adamw_with_the_checkpoint_of_adam():
    params = parameters()
    saved = ft.Adam(params, weight_decay=0.3).state_dict()
    for opt in (ft.AdamW(params), torch.optim.AdamW(params)):
        opt.load_state_dict(saved)
        group = opt.param_groups[0]
        assert group["weight_decay"] == 0.3
        if isinstance(opt, ft.AdamW) or not NEW_KEYS:
            assert group["decoupled_weight_decay"] is True


@pytest.mark.parametrize("fused", [None, False, True])
@pytest.mark.parametrize("module", [ft, torch.optim])
def test_scaler_leaves_gradients_and_skipping_to_the_step_only_with_fused(module, fused):
    # What trainers see: whether gradients are unscaled, and whether a skipped step was called.
    params = parameters()
    opt = module.AdamW(params, fused=fused)
    assert getattr(opt, "_step_supports_amp_scaling", False) == bool(fused)
    called, step = [], opt.step
    opt.step = lambda *args, **kwargs: (called.append(len(called)), step(*args, **kwargs))[1]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for factor in (1.0, math.inf, 1.0):
        opt.zero_grad()
        scaler.scale(sum(factor * p.abs().sum() for p in params)).backward()
        scaler.step(opt)
        if factor == 1:
            scaled = fused and module is ft  # torch's fused kernel writes to gradients
            assert params[0].grad.abs().max() == (scaler.get_scale() if scaled else 1)
        scaler.update()
    assert len(called) == (3 if fused else 2)
    assert opt.state[params[0]]["step"] == 2


@each_class
def test_amp_scaling_needs_fused_in_every_group(name):
    cls, params = getattr(ft, name), parameters()
    opt = cls(params[:2], fused=True)
    assert opt._step_supports_amp_scaling
    opt.add_param_group({"params": params[2:3]})
    assert opt._step_supports_amp_scaling
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert other._step_supports_amp_scaling
    # A checkpoint does not say how to compute.
    plain = cls([{"params": params[:2]}, {"params": params[2:3]}])
    saved = opt.state_dict(), plain.state_dict()
    for one, loaded in ((opt, saved[1]), (plain, saved[0])):
        one.load_state_dict(copy.deepcopy(loaded))
        assert one._step_supports_amp_scaling == (one is opt)
    opt.add_param_group({"params": params[3:4], "fused": False})
    assert not opt._step_supports_amp_scaling
    opt.param_groups[2]["fused"] = True
    assert opt._step_supports_amp_scaling


def test_scaler_of_several_processes_skips_where_another_found_inf(monkeypatch):
    # The other process's verdict comes through the scaler, not through our gradients.
    from torch.distributed.fsdp import sharded_grad_scaler

    class Done:
        def wait(self):
            pass

    def all_reduce(found, **_):
        found += 1
        return Done()

    monkeypatch.setattr(sharded_grad_scaler.dist, "all_reduce", all_reduce)
    params = parameters()
    opt = ft.AdamW(params)
    scaler = sharded_grad_scaler.ShardedGradScaler("cpu", init_scale=8.0)
    scaler.scale(sum(p.abs().sum() for p in params)).backward()
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 4
    assert_same_bits(params, parameters())


# Some that torch's class of the name has not, with a value that changes the step.
BEYOND = [("Rprop", "weight_decay", 0.25), ("Adam", "bias_correction", False),
          ("AdamW", "bias_correction", False), ("Adamax", "eps_divisor", 0.25),
          ("RMSprop", "eps_root", 0.25), ("RMSprop", "initial_accumulator_value", 1.0)]  # fmt: skip
each_beyond = pytest.mark.parametrize(("name", "key", "value"), BEYOND)


def test_every_hyperparameter_beyond_torch_s_is_here():
    found = {
        (name, key)
        for name in CASES
        if hasattr(torch.optim, name)
        for key in defaults(name)
        if key not in inspect.signature(getattr(torch.optim, name)).parameters
    }
    found -= {("Adam", key) for key in NEW_KEYS}
    assert found >= {(name, key) for name, key, _ in BEYOND}
    assert found == {(name, key) for name in CASES for key in getattr(fs, name)._spec.beyond_torch}


@each_beyond
@pytest.mark.parametrize("how", ["group", "add_param_group", "load", "edit"])
def test_key_that_torch_s_class_ignores_is_ignored(name, key, value, how):
    mine, theirs = parameters(), parameters()
    opts = []
    for module, params in ((ft, mine), (torch.optim, theirs)):
        given = {key: value} if how in ("group", "add_param_group") else {}
        begin = [{"params": params[:2]}] if how == "add_param_group" else params
        begin = [{"params": params, **given}] if how == "group" else begin
        opt = getattr(module, name)(begin, lr=0.1)
        if how == "add_param_group":
            opt.add_param_group({"params": params[2:], **given})
        if how == "load":  # of a torch optimizer whose groups a client made
            other = getattr(torch.optim, name)([{"params": params, key: value}], lr=0.1)
            opt.load_state_dict(other.state_dict())
        if how == "edit":
            train(opt, params, range(1))
            opt.param_groups[0][key] = value
        train(opt, params, range(1, 5))
        opts.append(opt)
    assert_close(mine, theirs)
    groups = [[dict(g, params=0) for g in opt.param_groups] for opt in opts]
    assert [g.get(key) for g in groups[0]] == [g.get(key) for g in groups[1]]


@each_beyond
def test_neutral_class_ignores_such_a_key_in_torch_s_checkpoints_alone(name, key, value):
    default = defaults(name)[key]
    for module, given, expected in (
        (torch.optim, {}, default),
        (ft, {}, default),
        (ft, {key: default}, value),
    ):
        params = parameters()
        saved = getattr(module, name)([{"params": params, key: value}], **given).state_dict()
        opt = getattr(fs, name)([p.detach().numpy() for p in params])
        opt.load_state_dict(saved)
        assert opt.param_groups[0][key] == expected
        other = getattr(fs, name)([p.detach().numpy() for p in params])
        other.load_state_dict(opt.state_dict())
        assert other.param_groups[0][key] == expected


@each_beyond
def test_key_beyond_torch_s_counts_where_the_constructor_was_given_it(name, key, value):
    default = defaults(name)[key]

    def trained(begin, steps, groups, **given):
        params = parameters()
        sets = [{"params": params[:2]}, {"params": params[2:]}]
        opt = getattr(ft, name)([{**s, **g} for s, g in zip(sets, groups, strict=True)], **given)
        begin(opt)
        train(opt, params, range(steps))
        return params, opt

    def nothing(opt):
        pass

    neutral = [torch.clone(p.detach()) for p in parameters()]
    reference = getattr(fs, name)(
        dict(zip("abcde", neutral, strict=True)),
        **{key: value},
        groups=[fs.Group(["c", "d", "e"], **{key: default})],
    )
    for step in range(4):
        set_grads(step, fed := parameters())
        reference.step(dict(zip("abcde", [p.grad for p in fed], strict=True)))
    # Over the constructor's value, which may be the default, a group's own counts.
    params, opt = trained(nothing, 4, [{key: value}, {}], **{key: default})
    assert_same_bits(params, neutral)

    # Checkpoints, ours and neutral, go on with it, whatever the new constructor was given.
    for saved in (opt.state_dict(), reference.state_dict()):
        resumed = getattr(ft, name)([{"params": params[:2]}, {"params": params[2:]}])
        resumed.load_state_dict(copy.deepcopy(saved))
        again = pickle.loads(pickle.dumps(copy.deepcopy(resumed)))
        for one in (opt, resumed, again):
            assert one._checked(one.param_groups[0])[key] == value
            assert one._checked(one.param_groups[1])[key] == default


class Listed(collections.abc.Sequence):
    """A sequence that is no list, as a configuration's."""

    def __init__(self, values):
        self.values = list(values)

    def __len__(self):
        return len(self.values)

    def __getitem__(self, i):
        return self.values[i]


# Each number as another kind of number, each pair as another kind of pair.
KINDS = {
    "list": (float, list),
    "sequence": (float, Listed),
    "array": (np.array, np.array),
    "numpy": (np.float64, lambda pair: tuple(map(np.float64, pair))),
    "numpy float32": (np.float32, lambda pair: np.array(pair, np.float32)),
    "integers": (lambda number: np.int64(number) if number == int(number) else number, list),
    "fractions": (fractions.Fraction, lambda pair: list(map(fractions.Fraction, pair))),
}


def of_kind(kind, hypers):
    number, pair = KINDS[kind]

    def other(value):
        if isinstance(value, bool):
            return np.bool_(value)
        return pair(value) if isinstance(value, tuple) else number(value)

    return {name: other(value) for name, value in hypers.items()}


def is_plain(value):
    """Whether a checkpoint may hold it for `torch.load(weights_only=True)`, and quickly read."""
    if type(value) is tuple:
        return all(map(is_plain, value))
    return value is None or type(value) in (int, float, bool, str)


def groups_of(opt):
    return [{k: v for k, v in group.items() if k != "params"} for group in opt.param_groups]


def all_hypers(name):
    """A value for each hyperparameter that a constructor takes, exact as float32."""
    found = {"lr": 0.5}
    for hypers in CASES[name]:
        found |= {k: v for k, v in hypers.items() if k not in found}
    exact = lambda value: float(np.float32(value))  # noqa: E731
    return {
        k: tuple(map(exact, v)) if isinstance(v, tuple) else exact(v) if type(v) is float else v
        for k, v in found.items()
        if k not in ("nesterov", "maximize")
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "way"),
    [
        *((name, "constructor") for name in CASES),
        *(("AdamW", way) for way in ("group", "add_param_group", "load", "edit")),
    ],
)
def test_numbers_of_other_libraries_are_python_s_in_groups(name, way, kind):
    hypers = all_hypers(name)
    other = of_kind(kind, hypers)
    mine, plain = parameters(), parameters()
    cls = getattr(ft, name)
    if way == "constructor":
        opt = cls(mine, **other)
    elif way == "group":
        opt = cls([{"params": mine, **other}], **hypers)
    elif way == "add_param_group":
        opt = cls(mine[:1], **hypers)
        opt.add_param_group({"params": mine[1:], **other})
    else:
        opt = cls(mine, **hypers)
    if way == "load":
        saved = opt.state_dict()
        saved["param_groups"][0].update(other)
        opt.load_state_dict(saved)
    train(opt, mine, range(1))
    if way == "edit":
        opt.param_groups[0].update(other)
        assert all(opt.param_groups[0][name] is value for name, value in other.items())  # as torch
    train(opt, mine, range(1, 3))
    train(cls(plain, **hypers), plain, range(3))
    assert_same_bits(mine, plain)
    neutral = getattr(fs, name)([np.ones(3)], **other).param_groups[0]
    assert all(is_plain(neutral[key]) for key in hypers)
    assert {key: neutral[key] for key in hypers} == hypers
    if way != "edit":
        assert all(is_plain(v) for group in groups_of(opt) for k, v in group.items()
                   if k != "fusedstep")  # fmt: skip
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["param_groups"][0]
    assert {key: saved[key] for key in hypers} == hypers


def test_tensors_stay_tensors_in_groups():
    rate, beta = torch.tensor(0.5), torch.tensor([0.5])
    opt = ft.AdamW(parameters(), lr=rate, betas=[beta, np.float64(0.75)])
    group = opt.param_groups[0]
    assert group["lr"] is rate
    assert group["betas"][0] is beta
    assert group["betas"][1:] == (0.75,)
    assert type(group["betas"][1]) is float


@pytest.mark.parametrize(
    "betas",
    [[0.5, 0.75], Listed([0.5, 0.75]), np.array([0.5, 0.75]), torch.tensor([0.5, 0.75]),
     [np.float64(0.5), torch.tensor(0.75)], (torch.tensor(0.5), torch.tensor(0.75))],
)  # fmt: skip
def test_edited_group_is_read_anew_only_where_its_values_changed(betas, monkeypatch):
    mine, theirs = parameters(), parameters()
    opt, oracle = ft.AdamW(mine, lr=0.1), ft.AdamW(theirs, lr=0.1)
    given = betas if not hasattr(betas, "clone") else betas.clone()
    opt.param_groups[0]["betas"] = given
    oracle.param_groups[0]["betas"] = (0.5, 0.75)
    read, checked = [], ft.AdamW._checked
    monkeypatch.setattr(
        ft.AdamW, "_checked", lambda self, group: (read.append(self), checked(self, group))[1]
    )
    train(opt, mine, range(3))
    assert len(read) == 1
    where = given.values if isinstance(given, Listed) else given
    if isinstance(where, tuple):
        where[0].fill_(0.25)
    else:
        where[0] = 0.25
    train(opt, mine, range(3, 5))
    assert len(read) == 2
    train(oracle, theirs, range(3))
    oracle.param_groups[0]["betas"] = (0.25, 0.75)
    train(oracle, theirs, range(3, 5))
    assert_same_bits(mine, theirs)


@pytest.mark.parametrize(
    ("name", "hypers"),
    [
        ("SGD", {"nesterov": 1, "momentum": 0.9}),
        ("Adam", {"amsgrad": 1}),
        ("RMSprop", {"centered": 1}),
    ],
)
def test_flags_may_be_0_and_1(name, hypers):
    mine, theirs = parameters(), parameters()
    opt = getattr(ft, name)(mine, lr=0.1, maximize=0, **hypers)
    oracle = getattr(torch.optim, name)(theirs, lr=0.1, maximize=0, **hypers)
    for step in range(3):
        set_grads(step, mine, theirs)
        opt.step()
        oracle.step()
    assert_close(mine, theirs)


def test_nesterov_lives_through_a_momentum_cycled_to_zero():
    mine, theirs = parameters(), parameters()
    for params, module in ((mine, ft), (theirs, torch.optim)):
        opt = module.SGD(params, lr=0.1, momentum=0.5, nesterov=True)
        cycle = torch.optim.lr_scheduler.CyclicLR(
            opt, 0.01, 0.1, step_size_up=2, base_momentum=0.0, max_momentum=0.5
        )
        for step in range(6):
            set_grads(step, params)
            opt.step()
            cycle.step()
    assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_integer_tensor_counts_steps(dtype):
    params = parameters()
    opt = ft.Adam(params)
    train(opt, params, range(1))
    opt.state[params[0]]["step"] = torch.tensor(5, dtype=dtype)
    train(opt, params, range(2))
    assert opt.state[params[0]]["step"] == 7
    assert opt.state[params[1]]["step"] == 3


def test_adagrad_has_its_states_from_the_start_and_can_share_them():
    params = parameters()
    opt = ft.Adagrad(params, initial_accumulator_value=0.5)
    oracle = torch.optim.Adagrad(parameters(), initial_accumulator_value=0.5)
    both = opt.state_dict()["state"].values(), oracle.state_dict()["state"].values()
    for mine, theirs in zip(*both, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    opt.share_memory()
    assert all(opt.state[p]["sum"].is_shared() for p in params)
    train(opt, params, range(1))


def test_shallow_copy_shares_the_state():
    params = parameters()
    opt = ft.Adam(params)
    other = copy.copy(opt)
    train(opt, params, range(1))
    assert other.state is opt.state
    assert other.state[params[0]]["step"] == 1


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("torch", r"fusedstep\.torch needs torch: pip install 'fusedstep\[torch\]'"),
        ("torch.optim", "no torch.optim"),
    ],
)
def test_import_without_torch_says_how_to_get_it(missing, says, monkeypatch):
    class Missing(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name == missing:
                raise ModuleNotFoundError(f"no {missing}", name=missing)

    for name in [n for n in sys.modules if n.startswith("fusedstep.torch") or n == missing]:
        monkeypatch.delitem(sys.modules, name)
    if missing == "torch.optim":
        monkeypatch.delattr(torch, "optim")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match=says) as raised:
        importlib.import_module("fusedstep.torch")
    assert raised.value.name == missing


def test_constructor_errors_name_the_class():
    with pytest.raises(TypeError, match=r"AdamW\(\) got an unexpected keyword argument 'foo'"):
        ft.AdamW(parameters(), foo=1)
    with pytest.raises(TypeError, match=r"SGD\(\) missing a required argument: 'params'"):
        ft.SGD()


def test_load_names_the_state_that_does_not_fit():
    params = parameters()
    opt = ft.Adam(params)
    train(opt, params, range(1))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][1]["exp_avg"] = torch.ones(7)
    with pytest.raises(ValueError, match=r"\['state'\]\[1\]\['exp_avg'\] must have shape"):
        opt.load_state_dict(saved)


def test_step_has_the_neutral_step_s_keywords_and_types():
    mine = dict(inspect.signature(ft.Optimizer.step).parameters)
    neutral = dict(inspect.signature(fs.Optimizer.step).parameters)
    for name in ("self", "closure"):
        del mine[name]
    for name in ("self", "grads", "loss_scale"):  # torch's GradScaler has the last
        del neutral[name]
    assert [*mine] == [*neutral]
    for name, one in mine.items():
        assert one.kind is one.KEYWORD_ONLY
        if name != "shadow":  # tensors by number or by name there
            assert one.annotation == neutral[name].annotation, name


CLASSES = pathlib.Path(__file__).parents[1] / ".ci" / "torch_classes.py"


@needs(torch.__version__.startswith("2.13."), "signatures of the torch that the source is for")
@pytest.mark.skipif(not CLASSES.exists(), reason="the sources are not there")
def test_classes_stand_in_the_source_as_they_are():
    done = subprocess.run([sys.executable, CLASSES, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_class
def test_source_of_a_class_is_found(name):
    cls = getattr(ft, name)
    source = inspect.getsource(cls)
    tree = ast.parse(source).body[0]
    assert tree.name == name
    written = tree.body[1].args
    keywords = {n for n, p in inspect.signature(cls).parameters.items() if p.kind is p.KEYWORD_ONLY}
    told = {one.arg for one in written.kwonlyargs} | ft.optimizers.How.__annotations__.keys()
    assert told == keywords
