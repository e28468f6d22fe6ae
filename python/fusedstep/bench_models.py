"""Measures drop-in steps on the parameter shapes of real models, beside torch's.

`measure` returns rows; `fusedstep bench --models` prints them by a `ModelTable` and stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from statistics import median
from typing import Any

from fusedstep import bench

Shapes = list[tuple[int, ...]]

OPTIMIZERS = ("adamw", "momentum", "rmsprop", "nadam", "adadelta", "lion")


def mlp() -> Shapes:
    """The weights of four layers: 64 to 128 to 128 to 128 to 80 units, 51,200 parameters."""
    return [(128, 64), (128, 128), (128, 128), (80, 128)]


def thousand() -> Shapes:
    """1,000 tensors of 1,000 elements."""
    return [(1000,)] * 1000


def resnet50() -> Shapes:
    """ResNet-50's 161 tensors (He et al. 2015, table 1), 25,557,032 parameters."""
    shapes: Shapes = []

    def convolution(outputs: int, inputs: int, size: int) -> None:
        shapes.extend([(outputs, inputs, size, size), (outputs,), (outputs,)])  # and its batch norm

    convolution(64, 3, 7)
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolution(width, inputs, 1)
            convolution(width, width, 3)
            convolution(4 * width, width, 1)
            if block == 0:
                convolution(4 * width, inputs, 1)  # the shortcut's
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt2() -> Shapes:
    """GPT-2 small's 148 tensors (Radford et al. 2019), 124,439,808 parameters."""
    d = 768
    norm: Shapes = [(d,), (d,)]
    attention: Shapes = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp: Shapes = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *((norm + attention + norm + mlp) * 12), *norm]


MODELS: dict[str, Callable[[], Shapes]] = {
    "mlp": mlp,
    "1000x1000": thousand,
    "resnet50": resnet50,
    "gpt2": gpt2,
}


@dataclass
class Row(bench.Conditions):
    """One optimizer on one model. Times are medians, ratios medians of neighbours'."""

    model: str
    optimizer: str
    tensors: int
    n: int
    plain_ms: float  # parameters as a list
    flat_ms: float  # after flatten_
    torch_ms: dict[str, float] = field(default_factory=dict)
    plain_ratio: dict[str, float] = field(default_factory=dict)  # torch's time over ours
    flat_ratio: dict[str, float] = field(default_factory=dict)
    plain_quartiles: dict[str, bench.Quartiles] = field(default_factory=dict)
    flat_quartiles: dict[str, bench.Quartiles] = field(default_factory=dict)

    @property
    def best_torch(self) -> str | None:
        """torch's fastest implementation."""
        return min(self.torch_ms, key=lambda how: self.torch_ms[how], default=None)


def check(names: Sequence[str], models: Sequence[str], rounds: int, threads: int | None) -> None:
    """Refuses what `bench.check` does, and unknown models."""
    bench.check(names, rounds, threads)
    for model in models:
        if model not in MODELS:
            raise bench.Refused(f"models must be of {', '.join(MODELS)}, got {model!r}")


def measure(
    names: Sequence[str] = OPTIMIZERS,
    models: Sequence[str] = tuple(MODELS),
    *,
    threads: int | None = None,
    isa: str | None = None,
    rounds: int = 9,
    progress: Callable[[str], None] = lambda label: None,
    each: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measures drop-in optimizers on float32 models, plain and flattened, against torch's.

    Gradients are there before the step and stay where they are, for all contenders.

    Args:
        names: of `bench.OPTIMIZERS`.
        models: of `MODELS`.
        threads: for us and for torch; by default ours.
        isa: the instruction set of ours.
        rounds: timings of each contender.
        progress: called with a label before each row.
        each: called with each row once it is there.

    Returns:
        A row for each optimizer on each model.

    Raises:
        ValueError: an unknown name, or a count that is out of range.
    """
    check(names, models, rounds, threads)
    rows = []
    with bench._settings(threads, isa, True):
        for model in models:
            for name in names:
                progress(f"{model}, {name}")
                rows.append(_row(model, name, rounds))
                each(rows[-1])
    return rows


def _row(model: str, name: str, rounds: int) -> Row:
    shapes = MODELS[model]()
    cls, kwargs = bench.OPTIMIZERS[name]
    steps = {"plain": _ours(shapes, cls, kwargs, False), "flat": _ours(shapes, cls, kwargs, True)}
    peers = _torch(shapes, cls, kwargs)
    watch = bench.Watch()
    pairs = {
        how: bench.interleave(step, peers or {"ours": step}, rounds) for how, step in steps.items()
    }
    ms = {
        how: 1e3 * median(s for pair in found.values() for s in pair.ours)
        for how, found in pairs.items()
    }
    return Row(
        **watch.conditions(),
        model=model,
        optimizer=name,
        tensors=len(shapes),
        n=sum(map(prod, shapes)),
        plain_ms=ms["plain"],
        flat_ms=ms["flat"],
        torch_ms={
            peer: 1e3 * median(s for found in pairs.values() for s in found[peer].other)
            for peer in peers
        },
        plain_ratio={peer: pairs["plain"][peer].ratio for peer in peers},
        flat_ratio={peer: pairs["flat"][peer].ratio for peer in peers},
        plain_quartiles={peer: pairs["plain"][peer].quartiles for peer in peers},
        flat_quartiles={peer: pairs["flat"][peer].quartiles for peer in peers},
    )


def _params(shapes: Shapes, gradients: bool) -> list[Any]:
    import torch

    random = torch.Generator("cpu").manual_seed(0)  # torch's own, the caller's, stays as it is
    kind = {"dtype": torch.float32, "device": "cpu"}
    params = [torch.nn.Parameter(torch.zeros(shape, **kind)) for shape in shapes]
    for param in params if gradients else []:
        param.grad = torch.randn(param.shape, generator=random, **kind)
    return params


def _ours(shapes: Shapes, cls: str, kwargs: dict[str, Any], flat: bool) -> Callable[[], Any]:
    import fusedstep.torch  # which takes seconds: after names were checked

    params = _params(shapes, True)
    if flat:
        fusedstep.torch.flatten_(params)
    step: Callable[[], Any] = getattr(fusedstep.torch, cls)(params, **kwargs).step
    return step


def _torch(shapes: Shapes, cls: str, kwargs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """The steps of torch's implementations; they may share gradients, which they only read."""
    import torch

    ways = bench.torch_ways(cls)
    gradients = [param.grad for param in _params(shapes, True)] if ways else []
    steps = {}
    for name, how in ways.items():
        params = _params(shapes, False)
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        steps[name] = getattr(torch.optim, cls)(params, **kwargs, **how).step
    return steps


class ModelTable(bench.Table):
    """Optimizers on models, their parameters as they are, "plain", and flattened, "flat"."""

    widths: tuple[int, ...] = (9, 8, 8, 8, 8, 11, 10)
    heading: Sequence[Sequence[str]] = (
        ("optimizer", "plain ms", "flat ms", "torch ms", "fastest", "torch/plain", "torch/flat"),
        ("", "", "", "", "", "quartiles", "quartiles"),
    )

    def place(self, row: Row) -> str:
        """The model, and the threads."""
        return f"{row.model}: {row.tensors:,} tensors, {row.n:,} parameters; {row.ran}"

    def body(self, row: Row) -> tuple[Sequence[Sequence[str]], list[bench.Quartiles]]:
        """A line against torch's fastest, and below it the quartiles."""
        ours = row.optimizer, bench.short(row.plain_ms, 7), bench.short(row.flat_ms, 7)
        best = row.best_torch
        if best is None:
            return [(*ours, "-", "-", "-", "-")], []
        spread = [row.plain_quartiles[best], row.flat_quartiles[best]]
        ratios = bench.times(row.plain_ratio[best]), bench.times(row.flat_ratio[best])
        first = *ours, bench.short(row.torch_ms[best], 7), best, *ratios
        return [first, ("", "", "", "", "", *map(bench.between, spread))], spread

    def notes(self) -> list[str]:
        """The columns."""
        return [
            "plain: our step on parameters as they are; flat: after flatten_; torch: the fastest of"
            " its implementations. torch/plain, torch/flat: its time over ours, above 1x ours is"
            " faster; -: torch has no such step."
        ]
