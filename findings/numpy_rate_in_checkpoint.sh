#!/usr/bin/env bash
# torch 2.13.0: a learning rate that is a NumPy number makes a checkpoint that torch.load refuses.
#
# NumPy's float64 is a float, so every optimizer takes it, as lr or when a schedule written with NumPy
# sets group["lr"], and keeps it in the group. torch.save stores it, and torch.load, whose default has
# been weights_only=True since 2.6, refuses the file: found when a run is to be resumed.
#
# Seen:
#   lr=0.1: loads
#   lr=np.float64(0.1): UnpicklingError
#   group["lr"] = np.float64(0.1): UnpicklingError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import io
import pickle

import numpy as np
import torch


def loads(label, rate, edited=None):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    if edited is not None:
        opt.param_groups[0]["lr"] = edited
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    try:
        torch.load(file)
        found = "loads"
    except pickle.UnpicklingError:
        found = "UnpicklingError"
    print(f"{label}: {found}")
    return found


print("torch", torch.__version__)
assert loads("lr=0.1", 0.1) == "loads"
assert loads("lr=np.float64(0.1)", np.float64(0.1)) == "UnpicklingError", "torch has changed"
assert loads('group["lr"] = np.float64(0.1)', 0.1, np.float64(0.1)) == "UnpicklingError"
PYTHON
