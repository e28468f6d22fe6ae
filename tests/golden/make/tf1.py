"""Records tf.compat.v1.train: its optimizers, the rate a callable.

Needs tensorflow-cpu==2.21.0 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.tf1

Hyperparameters pass through float32: those given here are exact in it. Adam's powers of its betas
are float32 variables, so it has no float64 here.
"""

import os

from .recording import Recording, inputs, rates_for

os.environ.update(CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="2")
import tensorflow as tf

RMSPROP = {"decay": 0.625, "epsilon": 2**-7}
CASES = [
    ("GradientDescentOptimizer", {}),
    ("MomentumOptimizer", {"momentum": 0.75}),
    ("MomentumOptimizer", {"momentum": 0.75, "use_nesterov": True}),
    ("AdagradOptimizer", {"initial_accumulator_value": 0.0625}),
    ("AdadeltaOptimizer", {"rho": 0.625, "epsilon": 2**-7}),
    ("RMSPropOptimizer", RMSPROP),
    ("RMSPropOptimizer", {**RMSPROP, "centered": True}),
    ("RMSPropOptimizer", {**RMSPROP, "momentum": 0.75}),
    ("RMSPropOptimizer", {**RMSPROP, "momentum": 0.75, "centered": True}),
    ("AdamOptimizer", {"beta1": 0.75, "beta2": 0.875, "epsilon": 2**-7}),
]


def steps(optimizer, arguments, dtype):
    start, gradients = inputs(dtype)
    param = tf.Variable(start)
    rates = iter(rates_for(optimizer))
    kind = getattr(tf.compat.v1.train, optimizer)
    rule = kind(learning_rate=lambda: next(rates), **arguments)  # called once a step
    for gradient in gradients:
        rule.apply_gradients([(tf.constant(gradient), param)])
        yield param.numpy()
    assert not list(rates)


recording = Recording("tf1", tf.__version__, backend="tensorflow")
for optimizer, arguments in CASES:
    for dtype in ("float32", "float64")[: 1 if optimizer == "AdamOptimizer" else 2]:
        taken = steps(optimizer, arguments, dtype)
        recording.add(optimizer, arguments, "learning_rate", dtype, taken)
recording.write()
