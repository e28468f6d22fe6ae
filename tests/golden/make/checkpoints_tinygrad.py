"""Records tinygrad's optimizers half way, in float32, and a state in a file of tinygrad.

Needs tinygrad==0.14.0 numpy==2.4.6, and clang
Run from the root: python -m tests.golden.make.checkpoints_tinygrad
"""

import os
from importlib.metadata import version

from . import halfway

os.environ["DEV"] = "CPU"
from tinygrad import Tensor
from tinygrad.helpers import Context
from tinygrad.nn import optim
from tinygrad.nn.state import get_state_dict, safe_save

ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-2}
SGD = {"momentum": 0.8, "weight_decay": 0.1}
CASES = [
    ("SGD", {}, False, None),
    ("SGD", {**SGD, "nesterov": True}, True, None),
    ("SGD", {**SGD, "classic": True}, False, None),
    ("Adam", ADAM, False, None),
    ("AdamW", {**ADAM, "weight_decay": 0.1}, False, "AdamW.safetensors"),
    ("AdamW", {**ADAM, "weight_decay": 0.1}, True, None),
]


def record(name, arguments, fused, file):
    params = {key: Tensor(one).is_param_() for key, one in halfway.start().items()}
    opt = getattr(optim, name)(list(params.values()), halfway.rate(0), fused=fused, **arguments)

    def step(t):
        opt.lr.assign(Tensor([halfway.rate(t)])).realize()
        for key, one in halfway.gradients(t).items():
            params[key].grad = Tensor(one)
        with Context(TRAINING=1):
            opt.step()

    def save():
        state = get_state_dict(opt)
        if file:
            path = halfway.FOLDER / "tinygrad" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            safe_save(state, str(path))
        stored = halfway.stored({key: one.numpy() for key, one in state.items()})
        return {"fused": fused, "file": file, "arrays": stored}

    case = halfway.run(step, lambda: {key: p.numpy() for key, p in params.items()}, save)
    return {"optimizer": name, "arguments": arguments, "rates": halfway.rates(), **case}


if __name__ == "__main__":
    halfway.write("tinygrad", version("tinygrad"), [record(*case) for case in CASES])
