#!/usr/bin/env bash
# DeepSpeed 0.19.8: under round_robin_gradients the master weights have other parameters' names.
#
# ZeRO 1 and 2 lay a group's parameters side by side and cut the row into one part for each rank.
# round_robin_gradients deals them out to the ranks first, so that the row is in another order;
# param_slice_mappings, the places of parameters in the parts, are computed in the order before.
# With two ranks and three parameters or more, what safe_get_full_fp32_param gives of one is pieces
# of others; by the source the same places serve safe_set_full_fp32_param, the states so read, and
# ds_to_universal. Training itself is right, and so is zero_to_fp32.py, which goes by param_shapes.
# With parameter_alignment, where that pads anything, the places are right too.
#
# Seen (parameter p2 has two elements 2, and so on):
#   p1: [1.0], in ZeRO's masters [1.0]
#   p2: [2.0, 2.0], in ZeRO's masters [3.0, 3.0]
#   p3: [3.0, 3.0, 3.0], in ZeRO's masters [3.0, 5.0, 5.0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy ninja "setuptools<82" wheel
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8
export PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/built"
export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29617
cat > "$folder/run.py" <<'PYTHON'
import os

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param

deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
model = torch.nn.ParameterDict({f"p{n}": torch.full((n,), float(n)) for n in range(1, 6)})
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "round_robin_gradients": True},
    },
)
differing = []
for name, p in model.items():
    master = safe_get_full_fp32_param(p)  # of all ranks together
    differing.append(not torch.equal(master, p.detach()))
    if os.environ["RANK"] == "0":
        print(f"{name}: {p.tolist()}, in ZeRO's masters {master.tolist()}")
if os.environ["RANK"] == "0":
    print("torch", torch.__version__, "deepspeed", deepspeed.__version__)
assert any(differing), "DeepSpeed has changed"
PYTHON
RANK=1 LOCAL_RANK=1 "$folder/venv/bin/python" -W ignore "$folder/run.py" > "$folder/log" 2>&1 &
RANK=0 LOCAL_RANK=0 "$folder/venv/bin/python" -W ignore "$folder/run.py" 2> "$folder/errors" |
  grep -e "masters" -e "^torch"
wait "$!"
