#!/usr/bin/env bash
# DeepSpeed 0.19.8: in bfloat16 without ZeRO, the optimizer takes a step before the first.
#
# To make the optimizer's states, DeepSpeed steps it once over gradients of zero as the engine is
# initialized. What does not come from the gradient is done for good: the master weights decay by
# the first rate, also where a schedule would warm it up, and Adam's count, and with it the bias
# correction, is one too far in all that follows. (FP16_UnfusedOptimizer; ZeRO 1 and 2 do not.)
#
# Seen (AdamW, rate 0.1, decay 0.1):
#   a weight of 1 is 0.9900 in float32 after initialize, steps taken: 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy ninja "setuptools<82" wheel
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8
export PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/built"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT=29618
"$folder/venv/bin/python" -W ignore - 2> "$folder/errors" <<'PYTHON' | grep -e "^torch" -e "^a weight"
import deepspeed
import torch

deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
model = torch.nn.ParameterDict({"w": torch.ones(4)})
_, opt, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    config={"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}},
)
master = opt.param_groups[0]["params"][0]
taken = int(opt.optimizer.state[master]["step"])
print("torch", torch.__version__, "deepspeed", deepspeed.__version__)
print(f"a weight of 1 is {master[0].item():.4f} in float32 after initialize, steps taken: {taken}")
assert taken == 1, "DeepSpeed has changed"
assert abs(master[0].item() - 0.99) < 1e-6
PYTHON
