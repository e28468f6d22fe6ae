"""Training with narrow states and 16-bit parameters beside training in float32: final losses.

    python bench/parity.py -o bench/results    # writes parity.json and parity.md
    python bench/parity.py --seeds 1 --steps 20 --epochs 2    # a look

Two models by `fusedstep.torch`: the perceptron of `fusedstep demo` on handwritten digits, whose
loss is that over all training images after the last epoch, and the byte-level GPT of
examples/gpt.py, smaller, whose loss is the mean over the last quarter of the steps. Seeds
choose the initial weights and the batches. 16-bit parameters are cast to float32 for the forward
pass, so that only how they are stored differs; their gradients are bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import fusedstep as fs
import fusedstep.torch as ft
from fusedstep import demo

# Hyperparameters on the digits, as the demo has them, and of the GPT.
RULES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "AdamW": (
        ft.AdamW,
        {"lr": 3e-3, "weight_decay": 0.05},
        {"lr": 3e-3, "weight_decay": 0.1},
    ),
    "RMSprop": (ft.RMSprop, {"lr": 2e-3}, {"lr": 1e-3}),
    "Lion": (ft.Lion, {"lr": 5e-4, "weight_decay": 0.1}, {"lr": 1e-3, "weight_decay": 0.1}),
    "SGD+momentum": (ft.SGD, {"lr": 0.05, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.9}),
}
# By name: the parameters' type, and how the optimizer is told to keep things.
WAYS: dict[str, tuple[torch.dtype, dict[str, str]]] = {
    "float32": (torch.float32, {}),
    "bfloat16 states": (torch.float32, {"state_dtype": "bfloat16"}),
    "q8 states": (torch.float32, {"state_dtype": "q8"}),
    **{
        f"bfloat16 parameters, {rounding}": (torch.bfloat16, {"rounding": rounding})
        for rounding in ("nearest", "stochastic", "kahan", "split")
    },
    "split and q8 states": (torch.bfloat16, {"rounding": "split", "state_dtype": "q8"}),
}
MODELS = ("digits", "GPT")
ASKED = 0.01  # of float32's loss
SMALLER = {"WIDTH": 64, "LAYERS": 2}  # the GPT, so that there is time for enough steps to learn


class Training:
    """A model with an optimizer, in one of the ways."""

    def __init__(self, model: nn.Module, rule: str, way: str, seed: int, on: str) -> None:
        make, *hypers = RULES[rule]
        dtype, how = WAYS[way]
        self.model = model.to(dtype)
        self.opt = make(
            model.parameters(), **hypers[MODELS.index(on)], **how, **({"seed": seed} if how else {})
        )

    def loss(self, x: Any, y: Any) -> Any:
        wide = {name: p.float() for name, p in self.model.named_parameters()}
        return cross_entropy(functional_call(self.model, wide, x).flatten(0, -2), y.flatten())

    def step(self, x: Any, y: Any) -> float:
        self.opt.zero_grad()
        loss = self.loss(x, y)
        loss.backward()
        self.opt.step()
        return loss.item()


@functools.cache
def example() -> Any:
    """examples/gpt.py as a module."""
    path = Path(__file__).parents[1] / "examples" / "gpt.py"
    spec = importlib.util.spec_from_file_location("gpt", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(SMALLER)
    return module


def digits(rule: str, way: str, seed: int, epochs: int) -> float:
    data = demo.Digits.load()
    x, y = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    model = nn.Sequential(nn.Linear(64, demo.HIDDEN), nn.ReLU(), nn.Linear(demo.HIDDEN, 10))
    weights = demo.init(seed)
    with torch.no_grad():
        for layer, k in ((model[0], "1"), (model[2], "2")):
            layer.weight.copy_(torch.from_numpy(weights["w" + k]).T)
            layer.bias.zero_()
    training = Training(model, rule, way, seed, "digits")
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for chosen in demo.batches(rng, len(y), demo.BATCH):
            training.step(x[chosen], y[chosen])
    with torch.no_grad():
        return training.loss(x, y).item()


def gpt(rule: str, way: str, seed: int, steps: int) -> float:
    torch.manual_seed(seed)
    training = Training(example().GPT(), rule, way, seed, "GPT")
    warmup = torch.optim.lr_scheduler.LinearLR(training.opt, 0.1, total_iters=10)
    losses = []
    for x, y in itertools.islice(example().batches((seed + 1) * steps), seed * steps, None):
        losses.append(training.step(x, y))
        warmup.step()
    return mean(losses[-max(1, steps // 4) :])


def run(job: tuple[str, str, str, int, int]) -> float:
    """The final loss of one training."""
    on, *rest = job
    torch.set_num_threads(1)
    fs.set_num_threads(1)
    return {"digits": digits, "GPT": gpt}[on](*rest)


def table(result: dict[str, Any], on: str) -> str:
    """A model's losses as Markdown: float32's, then the ratios to it, with misses in bold."""
    losses = result["losses"][on]
    lines = [["", *RULES], ["---"] * (1 + len(RULES))]
    for way in losses:
        cells = []
        for rule, of in losses[way].items():
            ratio = mean(of) / mean(losses["float32"][rule]) - 1
            kept = f"{ratio:+.2%}" if abs(ratio) <= ASKED else f"**{ratio:+.2%}**"
            spread = (
                f"{mean(of):.5f} ± {stdev(of) / mean(of):.1%}" if len(of) > 1 else f"{of[0]:.5f}"
            )
            cells.append(spread if way == "float32" else kept)
        lines.append([way, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def markdown(result: dict[str, Any]) -> str:
    return (
        f"`{result['command']}`: {result['seconds']:.0f} s on {result['machine']}. Means over"
        f" {result['seeds']} seeds, against float32's in the first row, beside which is their"
        f" spread; bold: more than {ASKED:.0%}.\n\n"
        f"Digits, {result['epochs']} epochs:\n\n{table(result, 'digits')}\n"
        f"GPT, {result['steps']} steps:\n\n{table(result, 'GPT')}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="folder for parity.json and parity.md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=demo.EPOCHS, help="on the digits")
    parser.add_argument("--steps", type=int, default=100, help="of the GPT")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    ways = list(dict.fromkeys(["float32", *args.ways]))
    keys = list(itertools.product(MODELS, ways, RULES, range(args.seeds)))
    lengths = {"digits": args.epochs, "GPT": args.steps}
    jobs = [(on, rule, way, seed, lengths[on]) for on, way, rule, seed in keys]
    losses: dict[str, Any] = {
        on: {way: {rule: [] for rule in RULES} for way in ways} for on in MODELS
    }
    begin = time.monotonic()
    with ProcessPoolExecutor() as pool:
        for (on, way, rule, _), loss in zip(keys, pool.map(run, jobs), strict=True):
            losses[on][way][rule].append(loss)
    result = {
        "command": "python bench/parity.py",
        "machine": f"{os.cpu_count()} cores, {fs.info()['cpu']}, {fs.isa()}",
        "seconds": time.monotonic() - begin,
        "seeds": args.seeds,
        "epochs": args.epochs,
        "steps": args.steps,
        "losses": losses,
    }
    text = markdown(result)
    print(text)
    if args.output:
        args.output.mkdir(exist_ok=True)
        (args.output / "parity.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.output / "parity.md").write_text(text)


if __name__ == "__main__":
    main()
