#!/usr/bin/env bash
# torch 2.13.0: a distributed checkpoint is loaded without the optimizer's states, without an error,
# where gradients exist; and a tensor of another dtype is filled with the numbers of what is stored.
#
# dcp.load fills what get_state_dict returned. That makes the states of a fresh optimizer by a step
# with lr 0, but not where a parameter has a gradient: then there are none, nothing is read into
# them, and set_state_dict takes that as it is. Gradients that exist from the start, as views of one
# buffer, are such a case. And load copies from dtype to dtype: codes of 8 bits become numbers.
#
# Seen (AdamW, one step saved):
#   gradients at loading: none; the loaded steps: [1.0, 1.0]
#   gradients at loading: some; the loaded steps: []
#   uint8 [1, 200] into bfloat16: [1.0, 200.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/resume.py" <<'PYTHON'
import tempfile
import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

warnings.filterwarnings("ignore")  # that there is one process


def begin(backward):
    model = torch.nn.Linear(3, 1)
    opt = torch.optim.AdamW(model.parameters())
    if backward:
        model(torch.ones(3)).backward()
    return model, opt


print("torch", torch.__version__)
with tempfile.TemporaryDirectory() as folder:
    model, opt = begin(backward=True)
    opt.step()
    weights, states = get_state_dict(model, opt)
    dcp.save({"model": weights, "optim": states}, checkpoint_id=folder)
    for backward in (False, True):
        model, opt = begin(backward)
        weights, states = get_state_dict(model, opt)
        dcp.load({"model": weights, "optim": states}, checkpoint_id=folder)
        set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=states)
        steps = [entry["step"].item() for entry in opt.state.values()]
        print(f"gradients at loading: {'some' if backward else 'none'}; the loaded steps: {steps}")
        assert len(steps) == (0 if backward else 2), "torch has changed"
with tempfile.TemporaryDirectory() as folder:
    dcp.save({"a": torch.tensor([1, 200], dtype=torch.uint8)}, checkpoint_id=folder)
    into = {"a": torch.zeros(2, dtype=torch.bfloat16)}
    dcp.load(into, checkpoint_id=folder)
    print("uint8 [1, 200] into bfloat16:", into["a"].tolist())
    assert into["a"].tolist() == [1, 200], "torch has changed"
PYTHON
"$folder/venv/bin/python" "$folder/resume.py"
