#!/usr/bin/env bash
# torch 2.13.0: ReduceLROnPlateau takes metrics below zero that get worse for better ones.
#
# With threshold_mode="rel", the default, a metric must be below best * (1 - threshold) to count as
# better (mode "min"). For a best of -10 that is -9.999, on the worse side: -9.9995 counts as better
# than -10, then -9.999 than -9.9995, and so on. A loss that rises for ever (a log-likelihood, a
# reward with its sign turned) never lowers the rate. The mode "max" has the mirror image. The
# formula is in the documentation; that it turns round below zero is not.
#
# Seen:
#   rises, loss > 0: rate 0.1 -> 0.0001, best 10
#   rises, loss < 0: rate 0.1 -> 0.1, best -9.9905
#   falls, reward < 0: rate 0.1 -> 0.1, best -10.0095
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def run(label, mode, metrics):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(opt, mode=mode, patience=5)
    for metric in metrics:
        scheduler.step(metric)
    rate = opt.param_groups[0]["lr"]
    print(f"{label}: rate 0.1 -> {rate:.1g}, best {scheduler.best:g}")
    return rate


print("torch", torch.__version__)
worse = [i * 0.0005 for i in range(20)]
above = run("rises, loss > 0", "min", [10 + one for one in worse])
below = run("rises, loss < 0", "min", [-10 + one for one in worse])
reward = run("falls, reward < 0", "max", [-10 - one for one in worse])
assert above < 0.1, "a loss above zero that rises lowers the rate"
assert below == reward == 0.1, "below zero it does not: torch has changed"
PYTHON
