#!/usr/bin/env bash
# DeepSpeed 0.19.8: the CPU's Lion moves what has no gradient, by the whole rate at each step.
#
# Lion steps by the sign of its momentum. DeepSpeedCPULion copies the sign bit instead (copysign in
# the scalar code, a mask in the AVX code), and the bit of zero is that of a positive number: where
# all gradients so far have been zero, as in the rows of an embedding whose words have not come yet,
# the parameter goes down by the rate at every step, for as long as no gradient comes.
# torch.sign(0), which the paper's and the other libraries' Lions use, is 0. Of an embedding, all
# that is rare is ruined before it is first seen.
#
# Seen (100 steps of 1e-3, gradients 1 in the first half and 0 in the second):
#   with gradients: -0.1000
#   without: -0.1000, and sign() would have left 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  torch==2.13.0 numpy ninja "setuptools<82" wheel
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check deepspeed==0.19.8
export PATH="$folder/venv/bin:$PATH" DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR="$folder/built"
"$folder/venv/bin/python" -W ignore - <<'PYTHON' | grep -v -e "Lion Optimizer #" -e "Config: alpha"
import deepspeed
import torch
from deepspeed.ops.lion import DeepSpeedCPULion

print("torch", torch.__version__, "deepspeed", deepspeed.__version__)
for size in (4096, 6):  # vectors, and the scalar rest
    param = torch.nn.Parameter(torch.zeros(size))
    opt = DeepSpeedCPULion([param], lr=1e-3)
    for _ in range(100):
        param.grad = torch.zeros(size)
        param.grad[: size // 2] = 1.0
        opt.step()
    seen, unseen = param[0].item(), param[-1].item()
    print(f"{size} elements, with gradients: {seen:.4f}")
    print(f"{size} elements, without: {unseen:.4f}, and sign() would have left 0")
    assert abs(seen + 0.1) < 1e-5
    assert abs(unseen + 0.1) < 1e-5, "DeepSpeed has changed"
PYTHON
