"""Records PaddlePaddle: its optimizers, the rate set between steps by `set_lr`.

Needs paddlepaddle==3.3.1 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.paddle

Most kernels take hyperparameters as float32: those given here are exact in it.
"""

from itertools import product

import paddle

from .recording import Recording, inputs, rates_for

paddle.set_device("cpu")

ADAM = {"beta1": 0.75, "beta2": 0.875, "epsilon": 2**-7}
RMSPROP = {"rho": 0.625, "epsilon": 2**-7}
DECAY = {"weight_decay": 3 / 32}
CLIP = {"grad_clip": {"ClipGradByGlobalNorm": {"clip_norm": 0.5}}}
CASES = [
    ("SGD", {}),
    ("SGD", DECAY),
    ("SGD", {**DECAY, **CLIP}),
    ("Momentum", {"momentum": 0.75}),
    ("Momentum", {"momentum": 0.75, **DECAY}),
    ("Momentum", {"momentum": 0.75, "use_nesterov": True, **DECAY}),
    ("Adagrad", {"epsilon": 2**-7, "initial_accumulator_value": 0.0625}),
    ("Adagrad", {"epsilon": 2**-7, **DECAY}),
    ("RMSProp", RMSPROP),
    ("RMSProp", {**RMSPROP, "centered": True}),
    ("RMSProp", {**RMSPROP, "momentum": 0.75, **DECAY}),
    ("RMSProp", {**RMSPROP, "momentum": 0.75, "centered": True}),
    ("Adadelta", {"rho": 0.625, "epsilon": 2**-7, **DECAY}),
    ("Adam", ADAM),
    ("Adam", {**ADAM, **DECAY}),
    ("Adam", {**ADAM, "amsgrad": True}),
    ("Adam", {**ADAM, **DECAY, **CLIP}),
    ("AdamW", {**ADAM, **DECAY}),
    ("AdamW", {**ADAM, **DECAY, "amsgrad": True}),
    ("Adamax", ADAM),
    ("Adamax", {**ADAM, **DECAY}),
    ("NAdam", {**ADAM, "momentum_decay": 0.0625}),
    ("NAdam", {**ADAM, "momentum_decay": 0.0625, **DECAY}),
    ("RAdam", ADAM),
    ("RAdam", {**ADAM, **DECAY}),
    ("Rprop", {"learning_rate_range": [2**-10, 0.125], "etas": [0.375, 1.25]}),
    ("ASGD", {"batch_num": 1, **DECAY}),
]


def steps(optimizer, arguments, dtype):
    start, gradients = inputs(dtype)
    param = paddle.create_parameter(start.shape, dtype)
    param.set_value(start)
    rates = rates_for(optimizer)
    given = dict(arguments)
    if "grad_clip" in given:
        ((name, of_clip),) = given["grad_clip"].items()
        given["grad_clip"] = getattr(paddle.nn, name)(**of_clip)
    rule = getattr(paddle.optimizer, optimizer)(rates[0], parameters=[param], **given)
    for rate, gradient in zip(rates, gradients, strict=True):
        rule.set_lr(rate)
        param.grad = paddle.to_tensor(gradient)
        rule.step()
        rule.clear_grad()
        yield param.numpy().copy()


recording = Recording("paddle", paddle.__version__, backend="cpu")
for (optimizer, arguments), dtype in product(CASES, ("float32", "float64")):
    taken = steps(optimizer, arguments, dtype)
    recording.add(optimizer, arguments, "learning_rate", dtype, taken)
recording.write()
