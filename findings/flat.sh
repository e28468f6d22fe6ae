#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: of several empty parameters, files keep one.
#
# Tensors are taken for tied where device, storage address and storage size agree (id_tensor_storage
# in accelerate/utils/modeling.py), which all empty ones do: address 0, size 0. save_model and
# save_state drop all but the first, and load_state then refuses what save_state wrote.
# safetensors' own save_model, which leaves empty storages out of the comparison, writes them all.
#
# Seen:
#   save_model wrote ['a', 'w']
#   load_state: Missing key(s) in state_dict: "b"
#   safetensors wrote ['a', 'b', 'w']
#
# Exits with 0 as long as it is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 accelerate==1.15.0 safetensors==0.8.0 numpy
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import accelerate
import safetensors.torch
import torch


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.empty(0, 3))
        self.b = torch.nn.Parameter(torch.empty(0, 5))
        self.w = torch.nn.Parameter(torch.ones(2))


accelerator = accelerate.Accelerator(cpu=True)
model = accelerator.prepare(Model())

accelerator.save_model(model, "model")
written = sorted(safetensors.torch.load_file("model/model.safetensors"))
print("save_model wrote", written)

accelerator.save_state("state")
try:
    accelerator.load_state("state")
    error = "no error"
except RuntimeError as found:
    error = str(found).splitlines()[-1].strip()
print("load_state:", error)

safetensors.torch.save_model(model, "all.safetensors")
whole = sorted(safetensors.torch.load_file("all.safetensors"))
print("safetensors wrote", whole)

assert written == ["a", "w"]
assert error.startswith('Missing key(s) in state_dict: "b"')
assert whole == ["a", "b", "w"]
PYTHON
