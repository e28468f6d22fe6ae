"""`step_in_backward` beside what test_torch_flat.py says of it: edited groups, clipping."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm as old_name
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import fusedstep.torch as ft
from this_torch import needs


class Pair:
    """A model stepped in backward, and its like, stepped by an equal optimizer afterwards."""

    def __init__(self, groups_of):
        self.models = [nn.ParameterList(torch.ones(3) * (k + 1) for k in range(4)) for _ in "ab"]
        self.opts = [ft.NAdam(groups_of(list(m)), lr=0.1) for m in self.models]
        self.running = ft.step_in_backward(self.models[0], self.opts[0])

    def edit(self, how):
        for opt in self.opts:
            how(opt)

    def step(self, used=range(4)):
        """A step of both, with a part of the parameters in the loss."""
        held = {id(p) for group in self.opts[0].param_groups for p in group["params"]}
        for model, opt in zip(self.models, self.opts, strict=True):
            sum(model[k].square().sum() for k in used).backward()
            if model is self.models[0]:
                kept = [k for k in used if id(model[k]) not in held]
                assert [k for k in range(4) if model[k].grad is not None] == kept
            opt.step()
            model.zero_grad()
        for mine, theirs in zip(*self.models, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.fixture(params=["one group", "one for each"])
def pair(request):
    made = Pair(
        {
            "one group": lambda params: params,
            "one for each": lambda params: [
                {"params": [p], "lr": 0.1 / (k + 1)} for k, p in enumerate(params)
            ],
        }[request.param]
    )
    with made.running:
        yield made


def turn_round(opt):
    opt.param_groups.reverse()


def move_the_last(opt):
    last = opt.param_groups[-1]["params"].pop()
    opt.param_groups[0]["params"].insert(0, last)


def put_another_in_front(opt):
    opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 7.0})
    opt.param_groups.insert(0, opt.param_groups.pop())


def drop_the_first(opt):
    del opt.param_groups[0]["params"][0]


def drop_a_group(opt):
    del opt.param_groups[0]


def give_another_list(opt):
    group = opt.param_groups[-1]
    group["params"] = group["params"][::-1]


def give_another_group(opt):
    opt.param_groups[-1] = {**opt.param_groups[-1], "lr": 0.5}


EDITS = [turn_round, move_the_last, put_another_in_front, drop_the_first, drop_a_group]
EDITS += [give_another_list, give_another_group]


@pytest.mark.parametrize("how", EDITS)
def test_edited_groups_are_seen_by_the_next_backward(pair, how):
    pair.step()
    pair.edit(how)
    pair.step()
    pair.step()


def test_a_parameter_that_comes_back_is_stepped_though_others_were_not(pair):
    gone = []
    pair.edit(lambda opt: gone.append(opt.param_groups[0]["params"].pop(0)))
    pair.step()
    pair.edit(lambda opt: opt.param_groups[-1]["params"].append(gone.pop(0)))
    pair.step(used=[0])
    pair.step()


def test_a_group_edited_in_the_middle_of_a_backward_is_seen(pair):
    model, opt = pair.models[0], pair.opts[0]
    order = []

    def edit(param):
        order.append(param)
        if len(order) == 1:
            opt.param_groups.insert(0, {**opt.param_groups[0], "params": list(model), "lr": 2.0})
            del opt.param_groups[1:]

    for param in model:
        param.register_post_accumulate_grad_hook(edit)  # runs after the step
    before = [param.detach().clone() for param in model]
    sum(param.sum() for param in model).backward()
    moved = [(old - new).abs().max().item() for old, new in zip(before, model, strict=True)]
    assert all(param.grad is None for param in model)
    first = next(k for k, param in enumerate(model) if param is order[0])
    assert moved[first] < 0.2
    assert all(move > 1 for k, move in enumerate(moved) if k != first)


def test_what_is_refused_has_the_name_that_its_group_gives_it(pair):
    model, opt = pair.models[0], pair.opts[0]
    pair.step()
    for k, group in enumerate(opt.param_groups):
        group["param_names"] = [f"{k}.{j}" for j in range(len(group["params"]))]
    name = opt.param_groups[-1]["param_names"][-1]
    opt.state[model[3]]["exp_avg"] = torch.zeros(2)
    with pytest.raises(ValueError, match=rf"^state\[{name}\]\['exp_avg'\] must be of shape"):
        model[3].sum().backward()
    opt.state[model[3]]["exp_avg"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(TypeError, match=rf"^state\[{name}\]\['exp_avg'\] must be float32"):
        model[3].sum().backward()
    model[3].grad = None


def test_a_step_in_backward_inside_a_look_ahead_is_refused():
    model = nn.ParameterList([torch.ones(3)])
    opt = ft.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with ft.step_in_backward(model, opt):
        model[0].sum().backward()
        before = model[0].detach().clone()
        with opt.lookahead(), pytest.raises(RuntimeError, match="must come after a lookahead"):
            model[0].sum().backward()
    assert torch.equal(model[0], before)


# -- clipping, through names that were there before any guard --------------------------------------


def in_two_parts(params, limit, **how):
    params = [params] if isinstance(params, torch.Tensor) else list(params)
    norm = nn.utils.get_total_norm([p.grad for p in params if p.grad is not None], **how)
    nn.utils.clip_grads_with_norm_(params, limit, norm, **how)
    return norm


def in_two_parts_privately(params, limit, **how):
    return nn.utils.clip_grad._clip_grads_with_norm_(params, limit, torch.tensor(9.0), **how)


in_parts = needs(hasattr(nn.utils, "get_total_norm"), "clipping in two parts")


def by_module(name):
    return lambda *args, **how: getattr(nn.utils, name)(*args, **how)


def deprecated(*args, **how):
    with pytest.warns(FutureWarning, match="deprecated"):
        return old_name(*args, **how)


DOORS = {
    "norm": clip_grad_norm_,
    "norm, by module": by_module("clip_grad_norm_"),
    "norm, deprecated": deprecated,
    "two parts": pytest.param(in_two_parts, marks=in_parts),
    "two parts, private": pytest.param(in_two_parts_privately, marks=in_parts),
    "value": clip_grad_value_,
    "value, by module": by_module("clip_grad_value_"),
}


def linear():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return model, ft.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_clipping_is_refused_through_every_door(door, foreach):
    (model, opt), (other, _) = linear(), linear()
    with ft.step_in_backward(model, opt):
        model(torch.ones(3)).sum().backward()
        other(torch.ones(3)).sum().backward()
        for given in (model.parameters(), model.weight, [*other.parameters(), model.bias]):
            with pytest.raises(
                RuntimeError,
                match=r"^clip_grad_(norm|value)_ needs all gradients at once, but step",
            ):
                door(given, 0.5, foreach=foreach)
        assert torch.equal(other.weight.grad, torch.ones(2, 3))
        door(other.parameters(), 0.25, foreach=foreach)  # of which none was stepped
        assert other.weight.grad.max() <= 0.25
    model(torch.ones(3)).sum().backward()
    door(model.parameters(), 0.25, foreach=foreach)
    assert model.weight.grad.max() <= 0.25


@pytest.mark.parametrize("limit", [float("inf"), torch.tensor(float("inf"))])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_a_limit_that_clips_nothing_passes(door, limit):
    """Trainers ask for it, to log the norm."""
    (model, opt), (other, _) = linear(), linear()
    with ft.step_in_backward(model, opt):
        model(torch.ones(3)).sum().backward()
        other(torch.ones(3)).sum().backward()
        norm = door(model.parameters(), limit)
        assert norm is None or norm == 0
        norm = door([model.bias, *other.parameters()], limit)
        assert norm is None or norm == pytest.approx(8**0.5)
        assert torch.equal(other.weight.grad, torch.ones(2, 3))


@pytest.mark.parametrize("limit", [float("nan"), -float("inf"), 1e30])
def test_only_an_infinite_limit_passes(limit):
    model, opt = linear()
    with ft.step_in_backward(model, opt):
        model(torch.ones(3)).sum().backward()
        with pytest.raises(RuntimeError, match="needs all gradients at once"):
            clip_grad_norm_(model.parameters(), limit)
        with pytest.raises(RuntimeError, match="needs all gradients at once"):
            clip_grad_value_(model.parameters(), clip_value=limit)


@pytest.mark.parametrize("name", ["DistributedDataParallel", "FullyShardedDataParallel"])
@pytest.mark.parametrize("deep", [False, True])
def test_models_whose_gradients_are_reduced_later_are_refused(name, deep):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    kind = getattr(nn.parallel, name, None) or getattr(fsdp, name)
    # A wrapper that was never set up: what is asked is only which class it is of.
    wrapped = kind.__new__(kind)
    nn.Module.__init__(wrapped)
    wrapped._fsdp_wrapped_module = inner = nn.Linear(2, 2)
    model = nn.Sequential(wrapped) if deep else wrapped
    with pytest.raises(ValueError, match=f"^model must not be wrapped in {name}: it reduces"):
        ft.step_in_backward(model, ft.SGD(inner.parameters(), lr=0.1))
