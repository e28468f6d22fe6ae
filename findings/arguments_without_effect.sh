#!/usr/bin/env bash
# bitsandbytes 0.50.2: four of the optimizers' arguments change nothing, and Adam is AdamW.
#
# The constructors take torch's arguments and document what they do. On the CPU, in 32 bits, SGD
# with nesterov or with dampening is bit for bit SGD without, as are RMSprop with momentum (which
# has no memory for one) and Adam with amsgrad; nothing warns. weight_decay of Adam, which is in the
# gradient in torch, decays the parameters themselves: Adam(weight_decay=d) is
# AdamW(weight_decay=d).
#
# Seen:
#   SGD nesterov=True: differs from the call without by 0, in torch by 1.4e-02
#   SGD dampening=0.5: differs from the call without by 0, in torch by 9.0e-02
#   RMSprop momentum=0.9: differs from the call without by 0, in torch by 1.6e+00
#   Adam amsgrad=True: differs from the call without by 0, in torch by 6.8e-03
#   Adam weight_decay=0.1: differs from AdamW by 0, in torch by 6.3e-02
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 bitsandbytes==0.50.2 numpy
export TORCHDYNAMO_DISABLE=1 # the same numbers, without a minute of compiling
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import bitsandbytes
import torch


def after(kind, **arguments):
    """The parameters after 10 steps whose gradients shrink."""
    torch.manual_seed(1)
    param = torch.nn.Parameter(torch.ones(64))
    opt = kind([param], lr=1e-2, **arguments)
    for t in range(10):
        param.grad = torch.randn(64) * 0.7**t
        opt.step()
    return param.detach()


print("torch", torch.__version__, "bitsandbytes", bitsandbytes.__version__)
CASES = [
    ("SGD", {"momentum": 0.9}, "nesterov", True),
    ("SGD", {"momentum": 0.9}, "dampening", 0.5),
    ("RMSprop", {}, "momentum", 0.9),
    ("Adam", {"betas": (0.8, 0.9)}, "amsgrad", True),
]
for name, given, argument, value in CASES:
    theirs, ours = getattr(bitsandbytes.optim, name), getattr(torch.optim, name)
    changed = [
        (after(kind, **given, **{argument: value}) - after(kind, **given)).abs().max().item()
        for kind in (theirs, ours)
    ]
    print(f"{name} {argument}={value}: differs from the call without by {changed[0]:.0f},"
          f" in torch by {changed[1]:.1e}")
    assert changed[1] > 1e-3
    assert changed[0] == 0, "bitsandbytes has changed"
changed = [
    (after(of.Adam, weight_decay=0.1) - after(of.AdamW, weight_decay=0.1)).abs().max().item()
    for of in (bitsandbytes.optim, torch.optim)
]
print(f"Adam weight_decay=0.1: differs from AdamW by {changed[0]:.0f},"
      f" in torch by {changed[1]:.1e}")
assert changed[1] > 1e-3
assert changed[0] == 0, "bitsandbytes has changed"
PYTHON
