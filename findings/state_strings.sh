#!/usr/bin/env bash
# torch 2.13.0: load_state_dict turns a string in an optimizer's state into the text of a generator.
#
# Optimizer._cast (torch/optim/optimizer.py) rebuilds every iterable value as
# type(value)(generator): right for lists and tuples, but str(generator) is the generator's repr, and
# a NumPy array raises TypeError. torch.save, torch.load and deepcopy keep both as they are.
#
# Seen:
#   str: before 'frozen', after '<generator object Optimizer.load_state_dict.<locals>._cast.<loca...'
#   ndarray: TypeError
#
# Exits with 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import copy

import numpy as np
import torch


def loaded(note):
    """What a note in the state is after the optimizer has loaded its own checkpoint."""
    param = torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([param], lr=0.1)
    opt.state[param]["note"] = note
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    return opt.state[param]["note"]


after = loaded("frozen")
print(f"str: before 'frozen', after '{after[:64]}...'")
assert after.startswith("<generator object")
try:
    found = repr(loaded(np.ones(2)))
except TypeError:
    found = "TypeError"
print("ndarray:", found)
assert found == "TypeError"
PYTHON
