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
