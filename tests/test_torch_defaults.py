"""torch's default device and dtype are the user's: nothing that we make depends on them."""

import copy
import sys

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES
from fusedstep import convergence

SHAPES = [(3, 5), (70,), (), (0, 3), (2, 3, 4)]
KIND = {"dtype": torch.float32, "device": "cpu"}
each_class = pytest.mark.parametrize("name", CASES)


class Unnamed(TorchFunctionMode):
    """Collects our calls that leave the device or the dtype of a new tensor to torch."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        caller = sys._getframe(1)
        ours = caller.f_globals.get("__name__", "").startswith("fusedstep")
        if ours and func in _device_constructors() and not {"device", "dtype"} <= kwargs.keys():
            self.found.append((func.__name__, caller.f_code.co_name, caller.f_lineno))
        return func(*args, **kwargs)


def parameters(strided=False):
    rng = np.random.default_rng(3)
    made = [torch.tensor(rng.uniform(0.5, 2, s), **KIND) for s in SHAPES]
    if strided:  # every second element: stepped through a dense copy
        made = [t.unsqueeze(-1).repeat_interleave(2, -1)[..., 0] for t in made]
    return [torch.nn.Parameter(t) for t in made]


GRADIENTS = [
    [
        torch.tensor(np.random.default_rng(9 + k).normal(0, 1, s), dtype=torch.float32)
        for s in SHAPES
    ]
    for k in range(6)
]
SKIPPED = [torch.full(s, torch.inf, dtype=torch.float32) for s in SHAPES]


def all_that_makes_tensors(name, fused, strided):
    """The optimizer after every call that makes tensors, and the norms on the way."""
    params = parameters(strided)
    if not strided:
        ft.flatten_(params)
    opt = getattr(ft, name)(params, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones((), **KIND))
    norms = []
    for step, asked in enumerate(({}, {"max_norm": 0.5}, {"skip_nonfinite": True}, {}, {}, {})):
        for grads in (GRADIENTS[step], SKIPPED):
            for p, g in zip(params, grads, strict=True):
                if strided:
                    p.grad = g.clone()
                else:
                    p.grad.copy_(g)
            if step < 3:
                if grads is not SKIPPED or "skip_nonfinite" in asked:
                    opt.step(**asked)
            else:
                scaler.step(opt)
                scaler.update()
            norms.append(None if opt.grad_norm is None else opt.grad_norm.clone())
        if step == 3:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    if name == "SGD":
        opt.param_groups[0]["momentum"] = 0.9
        opt.step(skip_nonfinite=True)
        with opt.lookahead():
            pass
    norms.append(opt.grad_norm)
    return opt, norms


@pytest.mark.parametrize("strided", [False, True])
@each_class
def test_default_device_and_dtype_change_nothing(name, strided):
    fused, dtype = (True, None)[strided], (torch.float32, torch.float64)[strided]
    expected, expected_norms = all_that_makes_tensors(name, fused, strided)
    mode = Unnamed()
    torch.set_default_dtype(dtype)
    try:
        with mode, torch.device("meta"):
            opt, norms = all_that_makes_tensors(name, fused, strided)
    finally:
        torch.set_default_dtype(torch.float32)
    assert not mode.found
    for one, other in zip(norms, expected_norms, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    groups = opt.param_groups[0]["params"], expected.param_groups[0]["params"]
    for p, q in zip(*groups, strict=True):
        assert torch.equal(p.detach(), q.detach())
        assert opt.state[p].keys() == expected.state[q].keys()
        for key, value in opt.state[p].items():
            other = expected.state[q][key]
            assert value.device == other.device
            kept = dtype if key == "step" else other.dtype  # counts have torch's default
            assert value.dtype == kept
            torch.testing.assert_close(value.to(other.dtype), other, rtol=1e-6, atol=0)


def test_curvature_and_neutral_checkpoints_of_tensors_name_the_device():
    w = torch.nn.Parameter(torch.ones(3))
    scales = torch.tensor([1.0, 2.0, 4.0])
    with Unnamed() as mode, torch.device("meta"):
        found = convergence.curvature(lambda _: (scales * w**2).sum() / 2, w)
        opt = fs.NAdam(w)
        opt.step(scales)
        saved = opt.state_dict()["state"][0]
    assert found.largest == pytest.approx(4)
    assert {value.device.type for value in saved.values()} == {"cpu"}
    assert [name for name, function, _ in mode.found if function != "state_dict"] == []
