"""Records tinygrad: its optimizers, the rate assigned between steps.

Needs tinygrad==0.14.0 numpy==2.4.6, and clang. Run from the root of the repository:
python -m tests.golden.make.tinygrad

Adam's bias corrections are float32 whatever its parameters are, so it has no float64 here.
"""

import os
from importlib.metadata import version

from .recording import RATES, Recording, inputs

os.environ["DEV"] = "CPU"
from tinygrad import Tensor
from tinygrad.helpers import Context, getenv
from tinygrad.nn import optim

ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-2}
CASES = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "weight_decay": 0.1, "nesterov": True}),
    ("SGD", {"momentum": 0.8, "weight_decay": 0.1, "classic": True}),
    ("SGD", {"momentum": 0.8, "weight_decay": 0.1, "classic": True, "nesterov": True}),
    ("Adam", ADAM),
    ("AdamW", {**ADAM, "weight_decay": 0.1}),
]


def steps(optimizer, arguments, dtype):
    os.environ["OPTIM_DTYPE"] = dtype  # of the states; float32 where it is not set
    getenv.cache_clear()
    start, gradients = inputs(dtype)
    param = Tensor(start).is_param_()
    rule = getattr(optim, optimizer)([param], lr=RATES[0], **arguments)
    with Context(TRAINING=1):
        for rate, gradient in zip(RATES, gradients, strict=True):
            rule.lr.assign(Tensor([rate], dtype=rule.lr.dtype)).realize()
            param.grad = Tensor(gradient)
            rule.step()
            yield param.numpy()


recording = Recording("tinygrad", version("tinygrad"), backend="CPU")
for optimizer, arguments in CASES:
    for dtype in ("float32", "float64")[: 1 if optimizer.startswith("Adam") else 2]:
        recording.add(optimizer, arguments, "lr", dtype, steps(optimizer, arguments, dtype))
recording.write()
