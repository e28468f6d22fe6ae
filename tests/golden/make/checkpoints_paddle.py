"""Records Paddle's optimizers half way, and a state in a file of `paddle.save`.

Needs paddlepaddle==3.3.1 numpy==2.4.6
Run from the root: python -m tests.golden.make.checkpoints_paddle
"""

import paddle

from . import halfway

paddle.set_device("cpu")

ADAM = {"beta1": 0.8, "beta2": 0.9, "epsilon": 1e-2}
RMSPROP = {"rho": 0.8, "epsilon": 1e-2}
DECAY = {"weight_decay": 0.1}
CASES = [
    ("SGD", DECAY, None),
    ("Momentum", {"momentum": 0.8, "use_nesterov": True, **DECAY}, None),
    ("Adagrad", {"epsilon": 1e-2, "initial_accumulator_value": 0.2}, None),
    ("RMSProp", RMSPROP, None),
    ("RMSProp", {**RMSPROP, "momentum": 0.7, "centered": True}, None),
    ("Adadelta", {"rho": 0.8, "epsilon": 1e-2}, None),
    ("Adam", {**ADAM, **DECAY}, None),
    ("Adam", {**ADAM, "amsgrad": True}, None),
    ("AdamW", {**ADAM, **DECAY}, "AdamW.pdopt"),
    ("Adamax", ADAM, None),
    ("NAdam", {**ADAM, "momentum_decay": 0.02}, None),
    ("RAdam", ADAM, None),
    ("Rprop", {"learning_rate_range": [1e-3, 0.1]}, None),
    ("ASGD", {"batch_num": 1}, None),
]


def record(name, arguments, file):
    params = {}
    for key, one in halfway.start().items():
        params[key] = paddle.create_parameter(one.shape, "float32")
        params[key].set_value(one)
    opt = getattr(paddle.optimizer, name)(
        halfway.rate(0), parameters=list(params.values()), **arguments
    )

    def step(t):
        opt.set_lr(halfway.rate(t))
        for key, one in halfway.gradients(t).items():
            params[key].grad = paddle.to_tensor(one)
        opt.step()
        opt.clear_grad()

    def save():
        state = opt.state_dict()
        if file:
            path = halfway.FOLDER / "paddle" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            paddle.save(state, str(path))
        return {
            "file": file,
            "names": {key: one.name for key, one in params.items()},
            "arrays": halfway.stored({key: one.numpy() for key, one in state.items()}),
        }

    case = halfway.run(step, lambda: {key: p.numpy().copy() for key, p in params.items()}, save)
    return {"optimizer": name, "arguments": arguments, "rates": halfway.rates(), **case}


if __name__ == "__main__":
    halfway.write("paddle", paddle.__version__, [record(*case) for case in CASES])
