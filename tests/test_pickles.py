"""Pickles of 0.1.0 load and step on to the same bits, wherever what they name has moved since.

`python tests/test_pickles.py` made data/pickles-0.1.0.json with the version that the name has.
"""

import base64
import copy
import json
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from fusedstep import _gpu
from fusedstep import schedules as S

FILE = Path(__file__).parent / "data" / "pickles-0.1.0.json"
OPTIMIZERS = (fs.Optimizer, ft.Optimizer)
SHAPES = {"w": (2, 3), "b": (5,)}


def values(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def neutral(cls, params, **hypers):
    return step_on(cls(params, **hypers), 3)


def layer(cls, **hypers):
    params = [torch.nn.Parameter(torch.from_numpy(value)) for value in values(0).values()]
    return step_on(cls(params, **hypers), 3)


def packed():
    return fs.FlatBuffer.pack(values(0))


def groups_of():
    return [fs.Group(["b*"], weight_decay=0.0, lr=S.Linear(0.1, total=9))]


class OnGpu:
    """What pickles as an array in a GPU's memory does."""

    def __reduce__(self):
        return _gpu._restored, (np.ones(3, np.float32), 0)


# What is pickled, each after a few steps.
MAKERS = {
    "list": lambda: neutral(fs.Adam, list(values(0).values()), amsgrad=True),
    "dict": lambda: neutral(fs.SGD, values(0), momentum=0.9, nesterov=True),
    "float64": lambda: neutral(fs.NAdam, values(0, np.float64), lr=0.1),
    "numbers": lambda: neutral(fs.ASGD, values(0), lr=0.1, t0=1.0),
    "buffer": lambda: neutral(fs.RMSprop, packed(), momentum=S.Step(0.9, every=2, factor=0.5)),
    "groups": lambda: neutral(
        fs.AdamW, values(0), lr=S.Cosine(0.3, total=9).warmup(2),
        betas=(S.Linear(0.9, end=0.8, total=5), 0.99), groups=groups_of(),
    ),
    "plateau": lambda: neutral(fs.Lion, values(0), lr=S.ReduceOnPlateau(0.1)),
    "torch AdamW": lambda: layer(ft.AdamW, lr=0.1, amsgrad=True),
    "torch SGD": lambda: layer(ft.SGD, lr=0.1, momentum=0.9),
    "torch ASGD": lambda: layer(ft.ASGD, lr=0.1, t0=1.0),
    "FlatBuffer": packed,
    "state_dict": lambda: MAKERS["groups"]().state_dict(),
    "param_groups": lambda: MAKERS["groups"]().param_groups,
    "Group": lambda: groups_of()[0],
    "StepReport": lambda: fs.StepReport(3, 0.1, 11),
    "on a GPU": OnGpu,
}  # fmt: skip


def step_on(opt, n=2):
    for seed in range(10, 10 + n):
        grads = values(seed, np.float64)
        if isinstance(opt, ft.Optimizer):
            (group,) = opt.param_groups
            for param, grad in zip(group["params"], grads.values(), strict=True):
                param.grad = torch.from_numpy(grad).to(param.dtype)
            opt.step()
        else:
            dtype = next(iter(opt.params.values())).dtype
            grads = {name: grad.astype(dtype) for name, grad in grads.items()}
            opt.step(grads if opt.params.keys() == grads.keys() else list(grads.values()))
    return opt


def arrays_of(thing):
    """Every number in it, in order."""
    if isinstance(thing, ft.Optimizer):
        return arrays_of([*thing.param_groups[0]["params"], thing.state_dict()["state"]])
    if isinstance(thing, fs.Optimizer):
        return arrays_of([*thing.params.values(), thing.state_dict()])
    if isinstance(thing, dict | fs.FlatBuffer):
        return arrays_of([thing[key] for key in sorted(thing, key=str)])
    if isinstance(thing, list | tuple):
        return [array for value in thing for array in arrays_of(value)]
    if isinstance(thing, torch.Tensor):
        return [thing.detach().numpy()]
    return [np.asarray(thing)] if isinstance(thing, np.ndarray | float | int) else []


def bits(thing):
    return base64.b64encode(zlib.compress(b"".join(a.tobytes() for a in arrays_of(thing)))).decode()


def reached(thing):
    """What it says of itself, its bits, and those after two more steps."""
    found = [repr(thing), bits(thing)]
    return [*found, bits(step_on(thing))] if isinstance(thing, OPTIMIZERS) else found


if __name__ == "__main__":
    made = {}
    for name, maker in MAKERS.items():
        pickled = pickle.dumps(maker())
        expected = [] if maker is OnGpu else reached(pickle.loads(pickled))
        made[name] = [base64.b64encode(zlib.compress(pickled)).decode(), *expected]
    FILE.write_text(json.dumps(made, indent=1) + "\n")


def pickled(name):
    text, *expected = json.loads(FILE.read_text())[name]
    return zlib.decompress(base64.b64decode(text)), expected


each = pytest.mark.parametrize("name", [name for name in MAKERS if name != "on a GPU"])


@each
def test_pickle_loads_and_steps_on(name):
    found, expected = pickled(name)
    assert reached(pickle.loads(found)) == expected


@each
def test_pickle_of_a_pickle_s_deep_copy_steps_on(name):
    found, expected = pickled(name)
    again = pickle.dumps(copy.deepcopy(pickle.loads(found)))
    assert reached(pickle.loads(again)) == expected
    # What is written now names no private module but those that were there.
    private = b"_optimizer _groups _checkpoint _spec _types _layout".split()
    assert not any(b"fusedstep." + module in again for module in private)


def test_checkpoint_of_a_pickle_is_taken():
    opt = MAKERS["groups"]()
    opt.load_state_dict(pickle.loads(pickled("state_dict")[0]))
    assert bits(step_on(opt)) == pickled("groups")[1][-1]


def test_array_on_a_gpu_is_found():
    if _gpu.module() is None:
        with pytest.raises(ValueError, match="no CUDA"):
            pickle.loads(pickled("on a GPU")[0])
    else:
        assert "_restored" in vars(_gpu)
