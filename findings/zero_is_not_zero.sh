#!/usr/bin/env bash
# bitsandbytes 0.50.2 on the CPU: in 8 bits zero becomes a number, so that what has no gradient moves.
#
# quantize_blockwise finds the nearest code in a table that is too coarse near zero. Where a block has
# any other number, a zero in it comes back as 2.1e-5 of the block's largest, always positive, though
# the map has a code for zero; 1e-6 of the largest comes back as the same. AdamW8bit keeps its moments
# so: an element whose gradient has always been zero, beside one whose gradient is 1, has a first
# moment, and moves at every step. Elements with gradients of a thousandth of the block's largest
# go at a quarter of the speed, with a ten-thousandth at a fiftieth, since the second moment comes back
# too large. Inputs that are seldom on, as words, are such elements of a weight matrix.
#
# Seen:
#   0 comes back as 2.1250e-05
#   gradients always zero, 1000 steps of 0.001: torch moves by 0, AdamW8bit by 4.8e-03
#   gradients of 1e-3 of the largest, 300 steps: torch moves by 0.300, AdamW8bit by 0.074
#   gradients of 1e-4 of the largest, 300 steps: torch moves by 0.300, AdamW8bit by 0.006
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 bitsandbytes==0.50.2 numpy
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise


def moved(kind, gradient, steps):
    """How far the second of 4096 elements goes, beside one in 64 whose gradients are 1."""
    param = torch.nn.Parameter(torch.zeros(4096))
    opt = kind([param], lr=1e-3, weight_decay=0.0)
    param.grad = torch.full((4096,), gradient)
    param.grad[::64] = 1.0
    for _ in range(steps):
        opt.step()
    return abs(param[1].item())


print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
block = torch.zeros(256)
block[0] = 1.0
codes, state = quantize_blockwise(block, blocksize=256)
back = dequantize_blockwise(codes, state)[1].item()
print(f"0 comes back as {back:.4e}")
assert 0.0 in state.code
assert back > 2e-5, "bitsandbytes has changed"

theirs, narrow = torch.optim.AdamW, bitsandbytes.optim.AdamW8bit
a, b = moved(theirs, 0.0, 1000), moved(narrow, 0.0, 1000)
print(f"gradients always zero, 1000 steps of 0.001: torch moves by {a:.0f}, AdamW8bit by {b:.1e}")
assert a == 0 and abs(b) > 1e-3, "bitsandbytes has changed"
for gradient, least in ((1e-3, 2), (1e-4, 20)):
    a, b = moved(theirs, gradient, 300), moved(narrow, gradient, 300)
    print(f"gradients of {gradient:.0e} of the largest, 300 steps:"
          f" torch moves by {a:.3f}, AdamW8bit by {b:.3f}")
    assert a > least * b, "bitsandbytes has changed"
PYTHON
