"""Records bitsandbytes: its 32-bit optimizers on the CPU, the rate set in their groups.

Needs bitsandbytes==0.50.2 torch==2.13.0 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.bitsandbytes

Some arguments change nothing there (momentum of RMSprop, amsgrad, nesterov, dampening); the cases
that give them show it.
"""

import os
from importlib.metadata import version

from .recording import RATES, Recording, inputs

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing to compile for 12 elements
import bitsandbytes
import torch

ADAM = {"betas": [0.8, 0.9], "eps": 1e-2}
RMSPROP = {"alpha": 0.8, "eps": 1e-2}
DECAY = {"weight_decay": 0.1}
CASES = [
    ("SGD", {"momentum": 0.8}),
    ("SGD", {"momentum": 0.8, **DECAY}),
    ("SGD", {"momentum": 0.8, **DECAY, "nesterov": True}),
    ("SGD", {"momentum": 0.8, **DECAY, "dampening": 0.3}),
    ("Adagrad", {"eps": 1e-2}),
    ("Adagrad", {"eps": 1e-2, **DECAY}),
    ("RMSprop", RMSPROP),
    ("RMSprop", {**RMSPROP, **DECAY}),
    ("RMSprop", {**RMSPROP, **DECAY, "momentum": 0.7}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, **DECAY}),
    ("Adam", {**ADAM, "amsgrad": True}),
    ("AdamW", {**ADAM, **DECAY}),
    ("Lion", {"betas": [0.8, 0.9], **DECAY}),
]


def steps(optimizer, arguments):
    start, gradients = inputs("float32")
    param = torch.nn.Parameter(torch.tensor(start))
    rule = getattr(bitsandbytes.optim, optimizer)([param], lr=RATES[0], **arguments)
    for rate, gradient in zip(RATES, gradients, strict=True):
        rule.param_groups[0]["lr"] = rate
        param.grad = torch.tensor(gradient)
        rule.step()
        yield param.detach().numpy().copy()


recording = Recording("bitsandbytes", version("bitsandbytes"), backend="cpu")
for optimizer, arguments in CASES:
    recording.add(optimizer, arguments, "lr", "float32", steps(optimizer, arguments))
recording.write()
