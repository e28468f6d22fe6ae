#!/usr/bin/env bash
# torch 2.13.0: with lr given as a tensor, schedulers with a function for each parameter group give
# every group the last group's rate.
#
# The optimizer's default `lr` is one tensor, which all groups that name no other share. Schedulers
# write to it in place (as compiled and captured steps need), once for each group: the last one wins,
# and nothing is said. With lr as a float each group has its own rate.
#
# Seen:
#   lr=0.1: rates 0.1, 0.01
#   lr=tensor(0.1): rates 0.01, 0.01
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def rates(lr):
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))]} for _ in range(2)]
    opt = torch.optim.AdamW(groups, lr=lr)
    torch.optim.lr_scheduler.LambdaLR(opt, [lambda t: 1.0, lambda t: 0.1])
    found = [float(group["lr"]) for group in opt.param_groups]
    print("lr=0.1:" if isinstance(lr, float) else "lr=tensor(0.1):", end=" ")
    print("rates " + ", ".join(f"{one:.3g}" for one in found))
    return found


print("torch", torch.__version__)
alone, shared = rates(0.1), rates(torch.tensor(0.1))
assert alone == [0.1, 0.1 * 0.1], "numbers: each group has its own rate"
assert shared[0] == shared[1], "one tensor: torch has changed"
PYTHON
