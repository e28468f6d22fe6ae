#!/usr/bin/env bash
# Keras, scikit-learn and optax.rmsprop: a learning rate of 0 does not stop what has momentum.
#
# (Keras 3.15.1, scikit-learn 1.9.1, optax 0.2.8.) Their buffer holds steps (rate times gradient),
# not gradients, so a rate that has been set acts only on gradients to come: what is in the buffer
# is taken at the rates of its time. Frozen by a rate of 0, as at the end of a schedule or of a
# cycle, parameters go on for ten steps and more, by 9 steps' length at momentum 0.9; after a drop
# to a tenth the old rate acts as long. optax has both: its sgd stops at once, its rmsprop with
# momentum does not. The same call in torch, optax.sgd, MLX or Paddle's Momentum stops.
#
# Seen (20 steps of 0.1 with gradient 1, then 50 of rate 0; distance of the latter over that of one
# step):
#   torch SGD                0.00
#   optax sgd                0.00
#   optax rmsprop            8.95
#   keras SGD                8.95
#   keras RMSprop            8.95
#   scikit-learn MLP's SGD   8.95
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 optax==0.2.8 \
  jax==0.10.2 keras==3.15.1 scikit-learn==1.9.1 numpy
export JAX_PLATFORMS=cpu KERAS_BACKEND=jax KERAS_HOME="$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import jax.numpy as jnp
import keras
import numpy as np
import optax
import sklearn
import torch
from sklearn.neural_network._stochastic_optimizers import SGDOptimizer

RATES = [0.1] * 20 + [0.0] * 50


def of_torch():
    param = torch.nn.Parameter(torch.zeros(1))
    rule = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    for rate in RATES:
        rule.param_groups[0]["lr"] = rate
        param.grad = torch.ones(1)
        rule.step()
        yield param.item()


def of_optax(kind):
    rule = kind(jnp.array(RATES).__getitem__, momentum=0.9)
    param = jnp.zeros(1)
    state = rule.init(param)
    for _ in RATES:
        update, state = rule.update(jnp.ones(1), state, param)
        param = optax.apply_updates(param, update)
        yield float(param[0])


def of_keras(kind):
    param = keras.Variable(np.zeros(1, np.float32))
    rule = kind(learning_rate=0.1, momentum=0.9)
    rule.build([param])
    for rate in RATES:
        rule.learning_rate = rate
        rule.apply([keras.ops.ones(1)])
        yield float(param[0])


def of_sklearn():
    param = np.zeros(1)
    rule = SGDOptimizer([param], momentum=0.9, nesterov=False)
    for rate in RATES:
        rule.learning_rate = rate
        rule.update_params([param], [np.ones(1)])
        yield param[0]


print("torch", torch.__version__, "optax", optax.__version__, "keras", keras.__version__,
      "scikit-learn", sklearn.__version__)
runs = {
    "torch SGD": of_torch(),
    "optax sgd": of_optax(optax.sgd),
    "optax rmsprop": of_optax(optax.rmsprop),
    "keras SGD": of_keras(keras.optimizers.SGD),
    "keras RMSprop": of_keras(keras.optimizers.RMSprop),
    "scikit-learn MLP's SGD": of_sklearn(),
}
for name, run in runs.items():
    at = list(run)
    after = (at[-1] - at[19]) / (at[19] - at[18])
    print(f"{name:24} {abs(after):.2f}")
    stops = name in ("torch SGD", "optax sgd")
    assert abs(after) < 1e-6 if stops else after > 5, f"{name} has changed"
PYTHON
