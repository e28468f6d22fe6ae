"""Records Keras' optimizers half way, as files and as what `save_own_variables` stores.

Needs keras==3.15.1 tensorflow-cpu==2.21.0
Run from the root: python -m tests.golden.make.checkpoints_keras
"""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import keras
import numpy as np

from . import halfway

ADAM = {"beta_1": 0.8, "beta_2": 0.9, "epsilon": 1e-2}
CASES = [
    ("SGD", {"momentum": 0.8, "weight_decay": 0.1}, "SGD.weights.h5"),
    ("SGD", {"momentum": 0.8, "nesterov": True}, None),
    ("SGD", {"weight_decay": 0.1}, None),
    ("RMSprop", {"rho": 0.8, "epsilon": 1e-2, "momentum": 0.7, "centered": True}, None),
    ("RMSprop", {"rho": 0.8, "epsilon": 1e-2, "weight_decay": 0.1}, None),
    ("Adagrad", {"initial_accumulator_value": 0.2, "epsilon": 1e-2, "weight_decay": 0.1}, None),
    ("Adadelta", {"rho": 0.8, "epsilon": 1e-2, "weight_decay": 0.1}, None),
    ("Adam", {**ADAM, "weight_decay": 0.1}, None),
    ("Adam", {**ADAM, "amsgrad": True}, "Adam.keras"),
    ("AdamW", {**ADAM, "weight_decay": 0.1}, "AdamW.keras"),
    ("AdamW", {**ADAM, "use_ema": True, "ema_momentum": 0.9}, None),
    ("Adam", {**ADAM, "global_clipnorm": 0.5}, None),
    ("Adam", {**ADAM, "clipvalue": 0.1}, None),
    ("Adamax", {**ADAM, "weight_decay": 0.1}, None),
    ("Nadam", {**ADAM, "weight_decay": 0.1}, None),
    ("Lion", {"beta_1": 0.8, "beta_2": 0.9, "weight_decay": 0.1}, None),
]


class Model(keras.Model):
    """Two variables, so that a file has a model's optimizer."""

    def __init__(self, **how):
        super().__init__(**how)
        shapes = halfway.SHAPES.items()
        self.own = [self.add_weight(shape=shape, name=name) for name, shape in shapes]
        self.built = True

    def call(self, x):
        return x


class Table(keras.optimizers.schedules.LearningRateSchedule):
    """The changing rate as a schedule."""

    def __call__(self, step):
        return keras.ops.take(np.array([halfway.rate(t) for t in range(21)], np.float32), step)

    def get_config(self):
        return {}


def record(name, arguments, file, scheduled=False):
    model = Model(name="model")
    variables = model.own
    for variable, values in zip(variables, halfway.start().values(), strict=True):
        variable.assign(values)
    rate = Table() if scheduled else halfway.rate(0)
    opt = getattr(keras.optimizers, name)(learning_rate=rate, **arguments)
    model.compile(optimizer=opt, loss="mse")
    opt.build(variables)

    def step(t):
        if not scheduled:
            opt.learning_rate = halfway.rate(t)
        opt.apply(list(halfway.gradients(t).values()), variables)

    def read():
        return dict(zip(halfway.SHAPES, [v.numpy() for v in variables], strict=True))

    def save():
        store = {}
        opt.save_own_variables(store)
        if file:
            path = halfway.FOLDER / "keras" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            model.save(path) if file.endswith(".keras") else model.save_weights(path)
        numbers = halfway.plain(store)
        shapes = {key: np.shape(one) for key, one in store.items()}
        return {"file": file, "store": {k: [shapes[k], numbers[k]] for k in store}}

    case = halfway.run(step, read, save)
    return {
        "optimizer": name,
        "arguments": arguments,
        "scheduled": scheduled,
        "rates": halfway.rates(),
        **case,
    }


if __name__ == "__main__":
    recorded = [record(*case) for case in CASES]
    recorded.append(record("Adam", ADAM, None, scheduled=True))
    halfway.write("keras", keras.__version__, recorded)
