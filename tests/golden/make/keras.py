"""Records Keras: its optimizers on the TensorFlow backend, the rate assigned between steps.

Needs keras==3.15.1 tensorflow-cpu==2.21.0 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.keras

The parameters are two variables, of 5 elements and 7, so that a norm over both shows. With this
backend the hyperparameters of float64 variables pass through float32: those given here are exact in
it, and Nadam, whose own 0.96 is not, has no float64 here.
"""

import os

import numpy as np

from .recording import Recording, inputs, rates_for

os.environ.update(KERAS_BACKEND="tensorflow", CUDA_VISIBLE_DEVICES="", TF_CPP_MIN_LOG_LEVEL="2")
import keras

ADAM = {"beta_1": 0.75, "beta_2": 0.875, "epsilon": 2**-7}
RMSPROP = {"rho": 0.625, "epsilon": 2**-7}
DECAY = {"weight_decay": 3 / 32}
CASES = [
    ("SGD", {}),
    ("SGD", DECAY),
    ("SGD", {"global_clipnorm": 0.5}),
    ("SGD", {"momentum": 0.75}),
    ("SGD", {"momentum": 0.75, "nesterov": True}),
    ("SGD", {"momentum": 0.75, **DECAY}),
    ("SGD", {"momentum": 0.75, "nesterov": True, **DECAY}),
    ("Adagrad", {"initial_accumulator_value": 0.0625, "epsilon": 2**-7}),
    ("Adagrad", {"initial_accumulator_value": 0.0625, "epsilon": 2**-7, **DECAY}),
    ("RMSprop", RMSPROP),
    ("RMSprop", {**RMSPROP, "centered": True}),
    ("RMSprop", {**RMSPROP, "momentum": 0.75}),
    ("RMSprop", {**RMSPROP, "momentum": 0.75, "centered": True}),
    ("RMSprop", {**RMSPROP, "momentum": 0.75, "centered": True, **DECAY}),
    ("Adadelta", {"rho": 0.625, "epsilon": 2**-7}),
    ("Adadelta", {"rho": 0.625, "epsilon": 2**-7, **DECAY}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, "amsgrad": True}),
    ("Adam", {**ADAM, **DECAY}),
    ("Adam", {**ADAM, "global_clipnorm": 0.5}),
    ("AdamW", {**ADAM, **DECAY}),
    ("AdamW", {**ADAM, **DECAY, "amsgrad": True}),
    ("Nadam", ADAM),
    ("Nadam", {**ADAM, **DECAY}),
    ("Adamax", ADAM),
    ("Adamax", {**ADAM, **DECAY}),
    ("Lion", {"beta_1": 0.75, "beta_2": 0.875}),
    ("Lion", {"beta_1": 0.75, "beta_2": 0.875, **DECAY}),
]


def steps(optimizer, arguments, dtype):
    keras.config.set_floatx(dtype)
    start, gradients = inputs(dtype)
    params = [keras.Variable(part) for part in np.split(start, [5])]
    rule = getattr(keras.optimizers, optimizer)(**arguments)
    rule.build(params)
    for rate, gradient in zip(rates_for(optimizer), gradients, strict=True):
        rule.learning_rate = rate
        rule.apply([keras.ops.convert_to_tensor(part) for part in np.split(gradient, [5])])
        yield np.concatenate([keras.ops.convert_to_numpy(param) for param in params])


recording = Recording("keras", keras.__version__, backend="tensorflow")
for optimizer, arguments in CASES:
    for dtype in ("float32", "float64")[: 1 if optimizer == "Nadam" else 2]:
        taken = steps(optimizer, arguments, dtype)
        recording.add(optimizer, arguments, "learning_rate", dtype, taken)
recording.write()
