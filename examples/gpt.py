"""Trains a byte-level GPT on Python's own standard library, by torch's AdamW and by fusedstep's.

    python -m pip install '.[demo,torch]'
    python examples/gpt.py [--flatten | --step-in-backward]

Two models start from the same seed and see the same batches. Their losses are printed side by side
and must agree to float32 rounding; below them, how fast each went and what the optimizer took.
"""

import argparse
import sysconfig
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from fusedstep.torch import AdamW, flatten_, step_in_backward

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 16, 128, 4, 3
# The two AdamW round differently, by 6e-8 each time, and training magnifies it from step to step.
TOLERANCE = 1e-5


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)), nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.bytes.weight  # tied
        nn.init.normal_(self.bytes.weight, std=0.02)

    def forward(self, x):
        return self.head(self.blocks(self.bytes(x) + self.places.weight))


class Run:
    """One model, its optimizer, and what became of them."""

    def __init__(self, optimizer, flatten=False, in_backward=False, **options):
        torch.manual_seed(0)
        self.model = GPT()
        if flatten:
            flatten_(self.model)
        self.opt = optimizer(self.model.parameters(), lr=3e-3, weight_decay=0.1, **options)
        if in_backward:
            step_in_backward(self.model, self.opt)
        self.warmup = torch.optim.lr_scheduler.LinearLR(self.opt, 0.1, total_iters=10)
        self.losses, self.seconds, self.stepping = [], 0.0, 0.0

    def train(self, x, y):
        begin = time.perf_counter()
        self.opt.zero_grad()
        loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
        loss.backward()
        before = time.perf_counter()
        self.opt.step()  # after step_in_backward there is nothing left to do
        self.stepping += time.perf_counter() - before
        self.warmup.step()
        self.seconds += time.perf_counter() - begin
        self.losses.append(loss.item())


def batches(steps):
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    source = b"".join(file.read_bytes() for file in files)[: 2**22]
    data = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        start = torch.randint(len(data) - CONTEXT, (BATCH, 1), generator=generator)
        text = data[start + torch.arange(CONTEXT + 1)]
        yield text[:, :-1], text[:, 1:]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--flatten", action="store_true", help="parameters in one flat buffer")
    how.add_argument("--step-in-backward", action="store_true", help="no gradients after backward")
    args = parser.parse_args()

    theirs = Run(torch.optim.AdamW, fused=True)
    ours = Run(AdamW, args.flatten, args.step_in_backward)
    for x, y in batches(args.steps):
        theirs.train(x, y)
        ours.train(x, y)

    table = Table("step", "loss by torch", "by fusedstep", "difference")
    for step in range(0, args.steps, max(1, args.steps // 10)):
        a, b = theirs.losses[step], ours.losses[step]
        table.add_row(str(step), f"{a:.6f}", f"{b:.6f}", f"{b - a:+.1e}")
    Console().print(table)
    for name, run in (("torch", theirs), ("fusedstep", ours)):
        share = f"{run.stepping / run.seconds:.1%} of it in the optimizer's step"
        if run is ours and args.step_in_backward:
            share = "the optimizer's steps are part of backward"
        print(f"{name}: {args.steps * BATCH * CONTEXT / run.seconds:,.0f} tokens/s, {share}")
    pairs = zip(theirs.losses, ours.losses, strict=True)
    worst = max(abs(a - b) / a for a, b in pairs)
    agree = worst <= TOLERANCE
    verdict = "agree to float32 rounding" if agree else "DO NOT AGREE"
    print(f"the losses {verdict}: largest relative difference {worst:.0e}")
    raise SystemExit(not agree)


if __name__ == "__main__":
    main()
