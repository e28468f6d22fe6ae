#!/usr/bin/env bash
# optax 0.2.8: rprop takes each step one call late, and drops it if the gradient has turned since.
#
# The update that scale_by_rprop returns is made of the state before the call, not after it (it
# names the old and the new alike): the first call moves nothing, each later one applies the step of
# the call before. Where the sign of the gradient turns, the step that is due is set to zero as well
# as the one to come, so that a parameter whose gradient changes sign at every call never moves.
# torch.optim.Rprop steps at once.
#
# Seen (gradients of one parameter, and what each call adds):
#   gradients +1 +1 +1 +1: optax  0.000 -0.100 -0.120 -0.144, torch -0.100 -0.120 -0.144 -0.173
#   gradients +1 -1 +1 -1: optax  0.000  0.000  0.000  0.000, torch -0.100  0.000 -0.050  0.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 optax==0.2.8 jax==0.10.2 numpy
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import jax.numpy as jnp
import optax
import torch


def by_optax(gradients):
    param = jnp.zeros(1)
    rule = optax.rprop(0.1)
    state, moved = rule.init(param), []
    for gradient in gradients:
        update, state = rule.update(jnp.array([gradient]), state, param)
        moved.append(float(update[0]))
    return moved


def by_torch(gradients):
    param = torch.nn.Parameter(torch.zeros(1))
    rule, moved = torch.optim.Rprop([param], lr=0.1), []
    for gradient in gradients:
        before = param.item()
        param.grad = torch.tensor([gradient])
        rule.step()
        moved.append(param.item() - before)
    return moved


print("torch", torch.__version__, "optax", optax.__version__)
for gradients in ([1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0]):
    late, at_once = by_optax(gradients), by_torch(gradients)
    signs = " ".join(f"{g:+.0f}" for g in gradients)
    print(f"gradients {signs}: optax", " ".join(f"{m + 0.0:6.3f}" for m in late) + ", torch",
          " ".join(f"{m + 0.0:6.3f}" for m in at_once))
    assert late[0] == 0 and at_once[0] != 0, "optax has changed"
    if gradients[1] > 0:
        assert max(abs(a - b) for a, b in zip(late[1:], at_once)) < 1e-6
    else:
        assert not any(late), "optax has changed"
PYTHON
