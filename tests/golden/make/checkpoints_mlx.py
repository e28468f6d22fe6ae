"""Records MLX' optimizers half way, in float32, and their states in files of MLX.

Needs mlx[cpu]==0.32.4 numpy==2.4.6
Run from the root: python -m tests.golden.make.checkpoints_mlx
"""

from importlib.metadata import version

import mlx.core as mx
import numpy as np
from mlx import optimizers
from mlx.utils import tree_flatten

from . import halfway

mx.set_default_device(mx.cpu)

ADAM = {"betas": [0.8, 0.9], "eps": 1e-2}
CASES = [
    ("SGD", {}, None),
    ("SGD", {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1}, None),
    ("SGD", {"momentum": 0.8, "nesterov": True}, "SGD.npz"),
    ("RMSprop", {"alpha": 0.8, "eps": 1e-2}, None),
    ("Adagrad", {"eps": 1e-2}, None),
    ("AdaDelta", {"rho": 0.8, "eps": 1e-2}, None),
    ("Adam", ADAM, None),
    ("Adam", {**ADAM, "bias_correction": True}, None),
    ("AdamW", {**ADAM, "weight_decay": 0.1}, "AdamW.safetensors"),
    ("Adamax", ADAM, None),
    ("Lion", {"betas": [0.8, 0.9], "weight_decay": 0.1}, None),
]


def record(name, arguments, file):
    opt = getattr(optimizers, name)(halfway.rate(0), **arguments)
    at = {"params": {key: mx.array(one) for key, one in halfway.start().items()}}

    def step(t):
        opt.learning_rate = halfway.rate(t)
        grads = {key: mx.array(one) for key, one in halfway.gradients(t).items()}
        at["params"] = opt.apply_gradients(grads, at["params"])
        mx.eval(at["params"], opt.state)

    def save():
        state = dict(tree_flatten(opt.state))
        if file:
            path = halfway.FOLDER / "mlx" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".npz":
                mx.savez(str(path), **state)
            else:
                mx.save_safetensors(str(path), state)
        stored = halfway.stored({key: np.array(one) for key, one in state.items()})
        return {"file": file, "arrays": stored}

    case = halfway.run(step, lambda: {k: np.array(p) for k, p in at["params"].items()}, save)
    return {"optimizer": name, "arguments": arguments, "rates": halfway.rates(), **case}


if __name__ == "__main__":
    halfway.write("mlx", version("mlx"), [record(*case) for case in CASES])
