#!/usr/bin/env bash
# optax 0.2.8: the global norm of 16-bit gradients is summed in 16 bits: clipping lets 1.6 times the
# norm through, or sets every gradient to zero.
#
# optax.tree.norm, which clip_by_global_norm takes, squares in the gradients' type and adds the
# leaves' sums in it. A bfloat16 has 8 bits: a leaf whose square is less than 1/512 of the sum so
# far is not added at all, so that of many leaves the norm stays too small. A float16 ends at
# 65504: from norm 256 on the sum is infinite, each gradient is divided by it, and the step moves
# nothing where the gradient was largest, without a word. torch.nn.utils.clip_grad_norm_ takes each
# tensor's norm first, and the norm of these, of which neither comes.
#
# Seen (1 leaf of 4096 ones and 400 of 16, whose norm is 102.4; and 1000 tens, whose norm is 316.2):
#   float32: the norm of many leaves 102.4, clipped to 1: 1.00; of tens 316.2, clipped to 1: 1.00
#   bfloat16: the norm of many leaves 64.0, clipped to 1: 1.60; of tens 316.0, clipped to 1: 1.00
#   float16: the norm of many leaves 102.4, clipped to 1: 1.00; of tens inf, clipped to 1: 0.00
#   torch bfloat16: clipped to 1: 1.00, 1.00
#   torch float16: clipped to 1: 1.00, 1.00
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 jax==0.10.2 jaxlib==0.10.2 optax==0.2.8 numpy
JAX_PLATFORMS=cpu "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

MANY = [np.ones(4096), *(np.ones(16) for _ in range(400))]
TENS = [np.full(1000, 10.0)]
CLIP = optax.clip_by_global_norm(1.0)


def length(arrays):
    """The true norm."""
    return float(np.sqrt(sum((np.asarray(one, np.float64) ** 2).sum() for one in arrays)))


def by_optax(arrays, dtype):
    grads = [jnp.asarray(one, dtype) for one in arrays]
    clipped = jax.jit(lambda grads: CLIP.update(grads, CLIP.init(grads))[0])(grads)
    return float(jax.jit(optax.tree.norm)(grads)), length(clipped)


def by_torch(arrays, dtype):
    params = [torch.nn.Parameter(torch.zeros(one.size, dtype=dtype)) for one in arrays]
    for param, one in zip(params, arrays):
        param.grad = torch.tensor(one, dtype=dtype)
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    return length([param.grad.double().numpy() for param in params])


print("jax", jax.__version__, "optax", optax.__version__, "torch", torch.__version__)
seen = {}
for dtype in ("float32", "bfloat16", "float16"):
    norm, clipped = by_optax(MANY, dtype)
    tens, tens_clipped = by_optax(TENS, dtype)
    print(
        f"{dtype}: the norm of many leaves {norm:.1f}, clipped to 1: {clipped:.2f};"
        f" of tens {tens:.1f}, clipped to 1: {tens_clipped:.2f}"
    )
    seen[dtype] = clipped, tens_clipped
for dtype in (torch.bfloat16, torch.float16):
    found = by_torch(MANY, dtype), by_torch(TENS, dtype)
    print(f"{str(dtype).replace('.', ' ')}: clipped to 1:", ", ".join(f"{x:.2f}" for x in found))
    assert all(abs(one - 1) < 0.02 for one in found)
assert all(abs(one - 1) < 1e-3 for one in seen["float32"])
assert seen["bfloat16"][0] > 1.5, "optax has changed"
assert seen["float16"][1] == 0, "optax has changed"
PYTHON
