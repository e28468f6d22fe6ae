"""Records optax: each transformation under a schedule of the rate, and in float64 too.

Needs optax==0.2.8 jax==0.10.2 numpy==2.4.6. Run from the root of the repository:
python -m tests.golden.make.optax
"""

from itertools import product

import jax
import jax.numpy as jnp
import optax

from .recording import Recording, inputs, rates_for

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)

ADAM = {"b1": 0.8, "b2": 0.9, "eps": 1e-2}
RMSPROP = {"decay": 0.8, "eps": 1e-2}
DECAY = {"weight_decay": 0.1}
CASES = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.8}),
    ("sgd", {"momentum": 0.8, "nesterov": True}),
    ("adagrad", {"initial_accumulator_value": 0.05, "eps": 1e-2}),
    ("rmsprop", RMSPROP),
    ("rmsprop", {**RMSPROP, "eps_in_sqrt": False}),
    ("rmsprop", {**RMSPROP, "initial_scale": 0.5}),
    ("rmsprop", {**RMSPROP, "centered": True}),
    ("rmsprop", {**RMSPROP, "centered": True, "eps_in_sqrt": False}),
    ("rmsprop", {**RMSPROP, "momentum": 0.7}),
    ("rmsprop", {**RMSPROP, "momentum": 0.7, "nesterov": True}),
    ("rmsprop", {**RMSPROP, "centered": True, "momentum": 0.7, "nesterov": True}),
    ("rmsprop", {**RMSPROP, "eps_in_sqrt": False, "centered": True, "momentum": 0.7}),
    ("rmsprop", {**RMSPROP, "bias_correction": True}),
    ("rmsprop", {**RMSPROP, "bias_correction": True, "eps_in_sqrt": False}),
    ("adadelta", {"rho": 0.8, "eps": 1e-2}),
    ("adadelta", {"rho": 0.8, "eps": 1e-2, **DECAY}),
    ("adam", ADAM),
    ("adam", {**ADAM, "eps_root": 1e-3}),
    ("adam", {**ADAM, "nesterov": True}),
    ("adam", {**ADAM, "eps_root": 1e-3, "nesterov": True}),
    ("adamw", {**ADAM, **DECAY}),
    ("adamw", {**ADAM, "eps_root": 1e-3, **DECAY}),
    ("adamw", {**ADAM, **DECAY, "nesterov": True}),
    ("amsgrad", ADAM),
    ("amsgrad", {**ADAM, "eps_root": 1e-3}),
    ("nadam", ADAM),
    ("nadam", {**ADAM, "eps_root": 1e-3}),
    ("nadamw", {**ADAM, **DECAY}),
    ("adamax", ADAM),
    ("adamaxw", {**ADAM, **DECAY}),
    ("radam", ADAM),
    ("radam", {**ADAM, "eps_root": 1e-3}),
    ("radam", {**ADAM, "threshold": 9.0}),
    ("lion", {"b1": 0.8, "b2": 0.9, **DECAY}),
    ("sign_sgd", {}),
    ("signum", {"beta": 0.8}),
]
# What optax has no argument for is chained: before the rule, or between it and the rate.
CHAINED = [
    ("adamw", {**ADAM, **DECAY}, {"clip_by_global_norm": {"max_norm": 0.5}}),
    ("sgd", {"momentum": 0.8}, {"clip_by_global_norm": {"max_norm": 0.5}}),
    ("sgd", {"momentum": 0.8, "nesterov": True}, {"add_decayed_weights": DECAY}),
    ("rmsprop", RMSPROP, {"add_decayed_weights": DECAY}),
]


def schedule(optimizer):
    return jnp.asarray(rates_for(optimizer), jnp.float64).__getitem__


def steps(transformation, dtype):
    start, gradients = inputs(dtype)
    params = jnp.asarray(start)
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        yield params


recording = Recording("optax", optax.__version__)
for (optimizer, arguments), dtype in product(CASES, ("float32", "float64")):
    transformation = getattr(optax, optimizer)(schedule(optimizer), **arguments)
    recording.add(optimizer, arguments, "learning_rate", dtype, steps(transformation, dtype))
for (optimizer, arguments, before), dtype in product(CHAINED, ("float32", "float64")):
    first = [getattr(optax, name)(**given) for name, given in before.items()]
    transformation = optax.chain(
        *first, getattr(optax, optimizer)(schedule(optimizer), **arguments)
    )
    recording.add(
        optimizer, arguments, "learning_rate", dtype, steps(transformation, dtype), before=before
    )
for dtype in ("float32", "float64"):
    transformation = optax.chain(  # SGDW: decay after the momentum
        optax.trace(0.8, nesterov=True),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(schedule("trace")),
    )
    arguments, between = {"decay": 0.8, "nesterov": True}, {"add_decayed_weights": DECAY}
    recording.add(
        "trace", arguments, "learning_rate", dtype, steps(transformation, dtype), between=between
    )
    arguments = {"eta_minus": 0.5, "eta_plus": 1.2, "min_step_size": 1e-3, "max_step_size": 0.1}
    rates = rates_for("rprop")[:1] * 20  # it takes no schedule, and is a step late
    transformation = optax.rprop(rates[0], **arguments)
    recording.add("rprop", arguments, "learning_rate", dtype, steps(transformation, dtype), rates)
recording.write()
