#!/usr/bin/env bash
# torch 2.13.0: an AdamW with fused=True that resumes from a run without it fails under GradScaler.
#
# load_state_dict takes `fused` from the checkpoint's groups, so the step is no longer the fused one;
# that the step unscales gradients itself is noted on the optimizer at construction, and stays. The
# scaler then hands its scale to a step that cannot take it: an AssertionError at the first step, in
# a program that only turned fused on between two runs.
#
# Seen:
#   fresh: steps
#   resumed: AssertionError: Expected grad_scale and found_inf to be None
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import torch


def step(label, opt, param):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(param.sum()).backward()
    try:
        scaler.step(opt)
        found = "steps"
    except AssertionError as error:
        found = f"AssertionError: {error}"
    print(f"{label}: {found}")
    return found


print("torch", torch.__version__)
param = torch.nn.Parameter(torch.ones(3))
saved = torch.optim.AdamW([param]).state_dict()
opt = torch.optim.AdamW([param], fused=True)
assert step("fresh", opt, param) == "steps"
opt = torch.optim.AdamW([param], fused=True)
opt.load_state_dict(saved)
assert step("resumed", opt, param).startswith("AssertionError"), "torch has changed"
PYTHON
