"""Records MLX: each optimizer with a callable as its rate, on the CPU.

Needs mlx[cpu]==0.32.4 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.mlx

Bias corrections are float32 whatever the parameters are, so with them there is no float64 here.
"""

from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx import optimizers

from .recording import Recording, inputs, rates_for

mx.set_default_device(mx.cpu)  # float64 is not for its GPUs

ADAM = {"betas": [0.8, 0.9], "eps": 1e-2}
CASES = [
    ("SGD", {}),
    ("SGD", {"weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8}),
    ("SGD", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1}),
    ("RMSprop", {"alpha": 0.8, "eps": 1e-2}),
    ("Adagrad", {"eps": 1e-2}),
    ("AdaDelta", {"rho": 0.8, "eps": 1e-2}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, "bias_correction": True}),
    ("AdamW", {**ADAM, "weight_decay": 0.1}),
    ("AdamW", {**ADAM, "weight_decay": 0.1, "bias_correction": True}),
    ("Adamax", ADAM),
    ("Lion", {"betas": [0.8, 0.9], "weight_decay": 0.1}),
]


def steps(optimizer, dtype):
    start, gradients = inputs(dtype)
    params = {"w": mx.array(start, dtype=getattr(mx, dtype))}
    for gradient in gradients:
        gradient = {"w": mx.array(gradient, dtype=getattr(mx, dtype))}
        params = optimizer.apply_gradients(gradient, params)
        mx.eval(params, optimizer.state)
        yield np.array(params["w"])


recording = Recording("mlx", version("mlx"), backend="cpu")
for optimizer, arguments in CASES:
    for dtype in ("float32", "float64")[: 1 if "bias_correction" in arguments else 2]:
        rates = mx.array(rates_for(optimizer))
        rule = getattr(optimizers, optimizer)(rates.__getitem__, **arguments)
        recording.add(optimizer, arguments, "learning_rate", dtype, steps(rule, dtype))
recording.write()
