"""Twenty steps of every optimizer beside torch.optim's for-loop implementation, from nothing."""

import inspect

import numpy as np
import pytest
import torch

from cases import WITHOUT_PEER, each_case, make

STEPS = 20
SKIPPED = 4  # the second tensor has no gradient in this step
SHAPES = [(3, 5), (70,), (), (2, 3, 4)]

# float32: each side rounds a few times per step and 6e-8 each time; large rates and divisions by
# small roots magnify that. float64 is the same with 1e-16, and tells a wrong digit from a rounding.
TOLERANCES = {np.float32: {"rtol": 1e-5, "atol": 5e-6}, np.float64: {"rtol": 1e-12, "atol": 1e-12}}


def parameters_of(name):
    cls = getattr(torch.optim, name, None)
    return inspect.signature(cls).parameters if cls else {}


def torch_has(name, hypers):
    """Whether torch can express a case: the class and all its arguments."""
    return set(hypers) <= set(parameters_of(name)) and hasattr(torch.optim, name)


def torch_optimizer(name, params, hypers):
    # The for-loop, the plainest of torch's implementations; its fused ones are what others copy
    # and its fused SGD leaves blocks of bfloat16 as they are.
    plain = {key: False for key in ("foreach", "fused") if key in parameters_of(name)}
    return getattr(torch.optim, name)(params, **hypers, **plain)


@pytest.mark.usefixtures("_double_scalars")
@pytest.mark.parametrize("dtype", TOLERANCES)
@each_case(torch_has)
def test_steps_match_torch(name, hypers, dtype):
    rng = np.random.default_rng(11)
    mine = [np.asarray(rng.uniform(0.5, 2, shape), dtype) for shape in SHAPES]
    theirs = [torch.tensor(array, requires_grad=True) for array in mine]
    opt, oracle = make(name, mine, hypers), torch_optimizer(name, theirs, hypers)
    for step in range(STEPS):
        grads = [np.asarray(rng.normal(size=shape), dtype) for shape in SHAPES]
        if step == SKIPPED:
            grads[1] = None
        for p, g in zip(theirs, grads, strict=True):
            p.grad = None if g is None else torch.tensor(g)
        opt.step(grads)
        oracle.step()
    for i, (p, want) in enumerate(zip(mine, theirs, strict=True)):
        np.testing.assert_allclose(p, want.detach().numpy(), **TOLERANCES[dtype], err_msg=f"{i}")
    saved = opt.state_dict(state_dtype="float32")["state"]
    expected = oracle.state_dict()["state"]
    for i, entry in expected.items():
        entry = {key: value for key, value in entry.items() if value is not None}
        assert set(saved.get(i, {})) == set(entry)
        for key, value in entry.items():
            if key == "exp_avg" and name in ("Adam", "AdamW") and hypers.get("betas", (1,))[0] == 0:
                continue  # there is none: torch has the last gradient
            np.testing.assert_allclose(
                saved[i][key], np.asarray(value), **TOLERANCES[dtype], err_msg=f"{i} {key}"
            )


def test_torch_has_all_but_the_listed_ones():
    # Guards the selection above: a signature that torch renamed would silently drop its cases.
    taken = {p.values[0] for p in each_case(torch_has).args[1]}
    every = {p.values[0] for p in each_case().args[1]}
    assert every - taken == WITHOUT_PEER
