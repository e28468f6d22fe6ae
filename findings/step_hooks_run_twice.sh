#!/usr/bin/env bash
# torch 2.13.0: how often a step hook runs depends on which other optimizers the process has made.
#
# torch wraps a class's step when its first instance is made. A subclass whose step calls
# super().step() has its own wrapper, and calls the base's, which is wrapped only once somebody has
# made an instance of the base. From then on pre and post hooks, also global ones, run twice for each
# step of the subclass, those of instances that were there before included.
#
# Seen:
#   hooks in one step: 1
#   after torch.optim.SGD was made somewhere else: 2
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


class Clipped(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


print("torch", torch.__version__)
param = torch.nn.Parameter(torch.ones(1))
param.grad = torch.ones(1)
opt, seen = Clipped([param]), []
opt.register_step_pre_hook(lambda *_: seen.append(1))
opt.step()
print("hooks in one step:", len(seen))
assert len(seen) == 1
torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
seen.clear()
opt.step()
print("after torch.optim.SGD was made somewhere else:", len(seen))
assert len(seen) == 2, "torch has changed"
PYTHON
