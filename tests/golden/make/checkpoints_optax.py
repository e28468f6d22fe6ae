"""Records the states of optax's optimizers half way, in float32, under a schedule and without.

Needs optax==0.2.8 jax==0.10.2
Run from the root: python -m tests.golden.make.checkpoints_optax
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from . import halfway

ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-2}
CASES = [
    ("sgd", {"momentum": 0.8}),
    ("sgd", {"momentum": 0.8, "nesterov": True}),
    ("sgd", {}),
    ("adagrad", {"initial_accumulator_value": 0.2, "eps": 1e-2}),
    ("rmsprop", {"decay": 0.8, "eps": 1e-2}),
    ("rmsprop", {"decay": 0.8, "eps": 1e-2, "momentum": 0.7, "nesterov": True}),
    ("rmsprop", {"decay": 0.8, "eps": 1e-2, "momentum": 0.7, "centered": True}),
    ("rmsprop", {"decay": 0.8, "eps": 1e-2, "eps_in_sqrt": False, "bias_correction": True}),
    ("adadelta", {"rho": 0.8, "eps": 1e-2, "weight_decay": 0.1}),
    ("adam", {**ADAM, "eps_root": 1e-3}),
    ("adamw", {**ADAM, "weight_decay": 0.1}),
    ("nadam", ADAM),
    ("nadamw", {**ADAM, "weight_decay": 0.1}),
    ("amsgrad", ADAM),
    ("adamax", ADAM),
    ("adamaxw", {**ADAM, "weight_decay": 0.1}),
    ("radam", ADAM),
    ("lion", {"b1": 0.8, "b2": 0.9, "weight_decay": 0.1}),
]


def tree(value):
    """A state as orbax restores it: lists and dicts, None for what is empty."""
    if hasattr(value, "_asdict"):
        return {key: tree(one) for key, one in value._asdict().items()} or None
    if isinstance(value, tuple):
        return [tree(one) for one in value]
    if isinstance(value, dict):
        return {key: tree(one) for key, one in value.items()}
    plain = halfway.plain({"": np.asarray(value)})[""]
    return plain if np.ndim(value) else plain[0]


def record(name, arguments, how):
    table = jnp.array([halfway.rate(t) for t in range(halfway.STEPS + 1)], jnp.float32)
    make = getattr(optax, name)
    if how == "injected":
        opt = optax.inject_hyperparams(make)(learning_rate=halfway.rate(0), **arguments)
    else:
        rate = (lambda t: table[t]) if how == "scheduled" else halfway.rate(0)
        opt = make(rate, **arguments)
    params = jax.tree.map(jnp.asarray, halfway.start())
    at = {"params": params, "state": opt.init(params)}

    def step(t):
        if how == "injected":
            at["state"].hyperparams["learning_rate"] = table[t]
        updates, at["state"] = opt.update(halfway.gradients(t), at["state"], at["params"])
        at["params"] = optax.apply_updates(at["params"], updates)

    case = halfway.run(
        step,
        lambda: {key: np.asarray(one) for key, one in at["params"].items()},
        lambda: {"state": tree(at["state"])},
    )
    return {
        "optimizer": name,
        "arguments": arguments,
        "how": how,
        "rates": halfway.rates(how != "constant"),
        **case,
    }


if __name__ == "__main__":
    recorded = [record(*case, "scheduled") for case in CASES]
    recorded += [record("adamw", ADAM, "injected"), record("rmsprop", {}, "constant")]
    halfway.write("optax", optax.__version__, recorded)
