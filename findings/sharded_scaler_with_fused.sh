#!/usr/bin/env bash
# torch 2.13.0: under ShardedGradScaler a fused optimizer steps on one rank and skips on another.
#
# ShardedGradScaler adds up over the ranks, in unscale_, who found an infinite gradient. An optimizer
# with fused=True unscales in its step, so step() does not call unscale_; the check it makes instead
# is the rank's own. The rank with the inf skips, the others step, and the replicated or sharded model
# and the ranks' loss scales differ from then on, without an error. Calling scaler.unscale_(opt)
# before the step avoids it.
#
# Seen (SGD, lr 1, gradients 1, inf on rank 0 alone):
#   fused=None: ranks [(1.0, 4.0), (1.0, 4.0)]
#   fused=True: ranks [(1.0, 4.0), (0.0, 8.0)]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/ranks.py" <<'PYTHON'
import os
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler


def train(rank, file, fused, results):
    dist.init_process_group("gloo", f"file://{file}", rank=rank, world_size=2)
    param = torch.nn.Parameter(torch.ones(()))
    opt = torch.optim.SGD([param], lr=1.0, fused=fused)
    scaler = ShardedGradScaler("cpu", init_scale=8.0, process_group=dist.group.WORLD)
    factor = float("inf") if rank == 0 else 1.0
    scaler.scale(param * factor).backward()
    scaler.step(opt)
    scaler.update()
    results[rank] = param.item(), scaler.get_scale()
    dist.barrier()
    dist.destroy_process_group()


def both(fused):
    results = mp.Manager().dict()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(train, (os.path.join(folder, "store"), fused, results), nprocs=2)
    found = [results[rank] for rank in range(2)]
    print(f"fused={fused}: ranks {found}")
    return found


if __name__ == "__main__":
    print("torch", torch.__version__)
    first, second = both(None)
    assert first == second
    first, second = both(True)
    assert first != second, "torch has changed"
PYTHON
"$folder/venv/bin/python" "$folder/ranks.py"
