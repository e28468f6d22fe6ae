"""Records DeepSpeed's CPU optimizers, the rate set in their groups.

Needs deepspeed==0.19.8 torch==2.13.0 ninja numpy==2.4.6 and a C++ compiler. Run from the root of
the repository: python -m tests.golden.make.deepspeed

Its Lion takes the sign bit for the sign: what has had no gradient yet moves down by the whole rate.
Such elements are listed in `except`, as no other Lion agrees on them.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
import deepspeed
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.lion import DeepSpeedCPULion

from .recording import RATES, Recording, inputs

ADAM = {"betas": [0.8, 0.9], "eps": 1e-2, "weight_decay": 0.1}
CASES = [
    (DeepSpeedCPUAdam, {**ADAM, "adamw_mode": True}),
    (DeepSpeedCPUAdam, {**ADAM, "adamw_mode": False}),
    (DeepSpeedCPUAdam, {**ADAM, "adamw_mode": True, "bias_correction": False}),
    (DeepSpeedCPUAdagrad, {"eps": 1e-2, "weight_decay": 0.1}),
    (DeepSpeedCPULion, {"betas": [0.8, 0.9], "weight_decay": 0.1}),
]


def steps(kind, arguments):
    start, gradients = inputs("float32")
    param = torch.nn.Parameter(torch.tensor(start))
    rule = kind([param], lr=RATES[0], **arguments)
    for rate, gradient in zip(RATES, gradients, strict=True):
        rule.param_groups[0]["lr"] = rate
        param.grad = torch.tensor(gradient)
        rule.step()
        yield param.detach().numpy().copy()


without_gradient = (inputs("float32")[1][0] == 0).nonzero()[0].tolist()
recording = Recording("deepspeed", deepspeed.__version__, backend="cpu")
for kind, arguments in CASES:
    more = {"except": without_gradient} if kind is DeepSpeedCPULion else {}
    recording.add(kind.__name__, arguments, "lr", "float32", steps(kind, arguments), **more)
recording.write()
