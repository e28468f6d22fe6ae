"""What the examples that train in two processes share: a small task, its answer, a start.

Each rank sees a batch of its own. Ranks average their gradients, and so does `train_alone`, which
sees both batches: halving is exact, so that the results are the same bits.
"""

import sys
import tempfile

import torch
import torch.distributed as dist
from torch import nn

from fusedstep.torch import AdamW

RANKS = 2


def new_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))


def new_optimizer(model):
    return AdamW(model.parameters(), lr=0.01, weight_decay=0.1)


def loss_of(model, step, rank):
    generator = torch.Generator().manual_seed(RANKS * step + rank)
    x = torch.randn(64, 8, generator=generator)
    return (model(x).squeeze(1) - x.sin().sum(1)).square().mean()


def train(model, opt, steps, rank):
    for step in steps:
        opt.zero_grad()
        loss_of(model, step, rank).backward()
        opt.step()


def train_alone(steps):
    """The model that one process makes of the batches of all ranks."""
    model = new_model()
    opt = new_optimizer(model)
    for step in steps:
        opt.zero_grad()
        for rank in range(RANKS):
            (loss_of(model, step, rank) / RANKS).backward()
        opt.step()
    return model


def report(what, params, steps):
    """Says whether `params`, after so many steps, are those of one process; an error if not."""
    expected = train_alone(range(steps)).parameters()
    equal = all(torch.equal(p, e) for p, e in zip(params, expected, strict=True))
    text = f"{what}: {'equal to' if equal else 'DIFFERENT from'} one process, bit for bit"
    if not equal:
        raise SystemExit(text)
    if dist.get_rank() == 0:
        say(text)


def say(text):
    """Prints a line in one piece, so that the ranks' lines do not mix."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def start(worker, *args):
    """Runs `worker(rank, *args)` in two processes that gloo joins."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_join, (folder, worker, args), nprocs=RANKS)


def _join(rank, folder, worker, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    try:
        worker(rank, *args)
    finally:
        dist.destroy_process_group()
