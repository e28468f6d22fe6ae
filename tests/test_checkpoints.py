"""What a checkpoint holds, and that a run which resumes from it goes on as if never stopped."""

import copy
import functools

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_class = pytest.mark.parametrize("name", list(CASES))


@functools.cache
def tensors(seed):
    """One small tensor of each dtype."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(9, generator=draw, dtype=torch.float64).to(d) for d in DTYPES]


class Neutral:
    """A neutral optimizer over tensors; `Torch` is the same for a class of fusedstep.torch."""

    def __init__(self, name, hypers, values):
        self.params = [value.clone() for value in values]
        self.opt = getattr(fs, name)(self.params, **hypers)

    def step(self, grads):
        self.opt.step(grads)


class Torch:
    def __init__(self, name, hypers, values):
        self.params = [torch.nn.Parameter(value.clone()) for value in values]
        self.opt = getattr(ft, name)(self.params, **hypers)

    def step(self, grads):
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.opt.step()


each_layer = pytest.mark.parametrize("layer", [Neutral, Torch])


def bits(value):
    """A tree of tensors, arrays and numbers, with dtype and bytes of each."""
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, list):
        return [bits(one) for one in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tobytes()
    return value


def moment(run):
    """What a run is made of: the values of parameters, and a copy of the state."""
    return [p.detach().clone() for p in run.params], copy.deepcopy(run.opt.state_dict())


def resumed(layer, name, hypers, values, saved):
    run = layer(name, hypers, values)
    run.opt.load_state_dict(saved)
    return run


@each_layer
@each_class
def test_a_run_resumes_to_the_bit_at_every_step(layer, name):
    hypers = max(CASES[name], key=len)
    straight = layer(name, hypers, tensors(0))
    before = None
    for t in range(40):
        straight.step(tensors(1 + t % 7))
        after = moment(straight)
        if before:
            again = resumed(layer, name, hypers, *before)
            again.step(tensors(1 + t % 7))
            assert bits(list(moment(again))) == bits(list(after)), f"step {t + 1}"
        before = after


@each_layer
def test_a_step_count_past_2_to_the_24_is_stored_whole(layer):
    run = layer("RAdam", {}, tensors(0))
    run.step(tensors(1))
    saved = copy.deepcopy(run.opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(2.0**24 - 1)
    saved["step"] = 2**24 - 1
    run.opt.load_state_dict(saved)
    for count in range(2**24, 2**24 + 4):
        values, saved = moment(run)
        again = resumed(layer, "RAdam", {}, values, saved)
        for one in (run, again):
            one.step(tensors(2))
        assert bits(list(moment(again))) == bits(list(moment(run)))
        entries = run.opt.state_dict()["state"].values()
        assert {int(entry["step"]) for entry in entries} == {count}


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_float32_counts_put_into_the_state_are_used_as_they_are(name):
    # As torch keeps them. What the state then shows is what the next step uses.
    run = Torch(name, {}, tensors(0))
    run.step(tensors(1))
    for entry in run.opt.state.values():
        for key in {"mu_product", "eta", "mu"} & set(entry):
            entry[key] = entry[key].float()
    twin = resumed(Torch, name, {}, *moment(run))
    for seed in (2, 3):
        run.step(tensors(seed))
        twin.step(tensors(seed))
    assert bits(list(moment(twin))) == bits(list(moment(run)))


# -- states that begin later than the first step --------------------------------------------------

LATE = {
    "momentum_buffer": ("RMSprop", {"lr": 0.1}, {"momentum": 0.9}),
    "momentum_buffer of SGD": ("SGD", {"lr": 0.1}, {"momentum": 0.9, "dampening": 0.5}),
    "grad_avg": ("RMSprop", {"lr": 0.1}, {"centered": True}),
    "max_exp_avg_sq": ("AdamW", {"lr": 0.1}, {"amsgrad": True}),
}


@each_layer
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("late", LATE)
def test_a_run_resumes_where_a_state_begins_late(layer, at, late):
    name, hypers, edit = LATE[late]
    straight = layer(name, hypers, tensors(0))
    for t in range(at):
        straight.step(tensors(1 + t))
        if t == 1:
            straight.opt.param_groups[0].update(edit)
    again = resumed(layer, name, hypers, *moment(straight))
    for t in range(at, 6):
        for run in (straight, again):
            run.step(tensors(1 + t))
            if t == 1:
                run.opt.param_groups[0].update(edit)
    assert bits(list(moment(again))) == bits(list(moment(straight)))


@pytest.mark.parametrize("name", ["RMSprop", "SGD"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_run_resumes_before_its_scheduled_momentum_begins(name, at):
    hypers = {"lr": 0.1, "momentum": lambda t: 0.0 if t < 2 else 0.9}
    straight = Neutral(name, hypers, tensors(0))
    for t in range(at):
        straight.step(tensors(1 + t))
    again = resumed(Neutral, name, hypers, *moment(straight))
    for t in range(at, 6):
        for run in (straight, again):
            run.step(tensors(1 + t))
    assert bits(list(moment(again))) == bits(list(moment(straight)))


# -- names ----------------------------------------------------------------------------------------


def named(order, cls=fs.Adam, **hypers):
    """An optimizer of parameters of one shape, each stepped by gradients of its own."""
    arrays = {name: np.ones(3, np.float32) for name in order}
    opt = cls(arrays, **hypers)
    opt.step({name: np.full(3, ord(name[0]), np.float32) for name in order})
    return opt


def moments_of(opt):
    return {str(name): entry["exp_avg"].tolist() for name, entry in opt.state.items()}


def test_a_checkpoint_goes_by_names():
    saved = named(["enc", "dec", "out"])
    other = fs.Adam({name: np.ones(3, np.float32) for name in ("out", "enc", "dec")})
    other.load_state_dict(saved.state_dict())
    assert moments_of(other) == moments_of(saved)
    assert saved.state_dict()["param_groups"][0]["param_names"] == ["enc", "dec", "out"]


def test_a_checkpoint_s_groups_go_by_the_names_in_them():
    groups = [fs.Group("e*", lr=0.5), fs.Group("d*", lr=0.25)]
    saved = named(["enc", "dec", "out"], groups=groups, lr=fs.schedules.Linear(0.125, total=9))
    other = named(["dec", "out", "enc"], groups=groups[::-1], lr=fs.schedules.Linear(0.125, 9))
    other.load_state_dict(saved.state_dict())
    assert moments_of(other) == moments_of(saved)
    assert [group["lr"] for group in other.param_groups][1:] == [0.25, 0.5]
    again = named(["enc", "dec", "out"], groups=groups[:1])
    with pytest.raises(ValueError, match=r"\['dec', 'out'\] as one group, got groups \[\['out'\]"):
        again.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["enc", "head"], r"names of params, got missing \['head'\], unknown \['dec'\]"),
        (["enc"], r"names of params, got missing \[\], unknown \['dec'\]"),
        (["enc", "dec", "out"], r"names of params, got missing \['out'\], unknown \[\]"),
    ],
)
def test_a_checkpoint_of_other_names_is_refused(names, message):
    opt = named(names)
    before = bits(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(named(["enc", "dec"]).state_dict())
    assert bits(opt.state_dict()) == before


def test_a_checkpoint_without_names_goes_by_position():
    saved = named(["enc", "dec"]).state_dict()
    listed = fs.Adam([np.ones(3, np.float32) for _ in range(2)])
    listed.load_state_dict(saved)
    assert moments_of(listed) == {"0": moments_of(named(["enc"]))["enc"],
                                  "1": moments_of(named(["dec"]))["dec"]}  # fmt: skip
    assert "param_names" not in listed.state_dict()["param_groups"][0]
    other = named(["dec", "enc"])
    other.load_state_dict(listed.state_dict())
    assert moments_of(other)["dec"] == moments_of(listed)["0"]


def test_a_group_keeps_a_checkpoint_s_other_keys():
    param = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.Adam([{"params": [param], "name": "head", "note": [1]}])
    saved = theirs.state_dict()
    opt = fs.Adam([torch.ones(3)])
    opt.load_state_dict(saved)
    saved["param_groups"][0]["note"].append(2)
    for found in (opt, copy.deepcopy(opt), copy.copy(opt)):
        assert found.param_groups[0]["name"] == "head"
        assert found.state_dict()["param_groups"][0]["note"] == [1]
    with pytest.raises(ValueError, match="hyperparameter must be one of"):
        opt.param_groups[0]["nmae"] = 1
