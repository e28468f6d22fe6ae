"""The demo: a small network in plain NumPy, trained with every optimizer on handwritten digits.

Forward and backward pass are NumPy; parameters and gradients are `FlatBuffer`s, so each update is
one sweep.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep import bench
from fusedstep._hypers import as_integer
from fusedstep._plot import canvas
from fusedstep._types import Array

# What is trained, with a learning rate that suits it here; names as in the lecture.
OPTIMIZERS: dict[str, Callable[[fs.FlatBuffer], fs.Optimizer]] = {
    "SGD": lambda p: fs.SGD(p, lr=0.1),
    "momentum": lambda p: fs.SGD(p, lr=0.05, momentum=0.9),
    "Nesterov": lambda p: fs.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Lion": lambda p: fs.Lion(p, lr=5e-4, weight_decay=0.1),
    "AdaGrad": lambda p: fs.Adagrad(p, lr=0.02),
    "RMSProp": lambda p: fs.RMSprop(p, lr=2e-3),
    "AdaDelta": lambda p: fs.Adadelta(p, lr=1.0),
    "Adam": lambda p: fs.Adam(p, lr=3e-3),
    "AdamW": lambda p: fs.AdamW(p, lr=3e-3, weight_decay=0.05),
    "AMSGrad": lambda p: fs.Adam(p, lr=3e-3, amsgrad=True),
    "AdaMax": lambda p: fs.Adamax(p, lr=5e-3),
    "Nadam": lambda p: fs.NAdam(p, lr=3e-3),
    "RAdam": lambda p: fs.RAdam(p, lr=3e-3),
    "ASGD": lambda p: fs.ASGD(p, lr=0.1),
    "Rprop, full batch": lambda p: fs.Rprop(p, lr=1e-3),
}

EPOCHS = 40
BATCH = 64
HIDDEN = 128


@dataclass
class Result:
    """How one training run went."""

    name: str
    losses: list[float]  # training loss before the first epoch and after each
    accuracy: float  # on the test images, 0 to 1
    ms_per_step: float  # of the optimizer alone


@dataclass
class Digits:
    """scikit-learn's handwritten digits: 1,797 images of 8x8, split 3 to 1."""

    train_x: Array
    train_y: Array
    test_x: Array
    test_y: Array

    @classmethod
    def load(cls) -> Digits:
        """The data set, pixels scaled to [0, 1]; the same split every time."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        x, y = load_digits(return_X_y=True)
        x = (x / 16).astype(np.float32)
        train_x, test_x, train_y, test_y = train_test_split(
            x, y, test_size=0.25, random_state=0, stratify=y
        )
        return cls(train_x, train_y, test_x, test_y)


def init(seed: int = 0) -> fs.FlatBuffer:
    """Parameters of a 64-128-10 perceptron (He et al. 2015)."""
    rng = np.random.default_rng(seed)
    w1 = rng.standard_normal((64, HIDDEN), dtype=np.float32) * np.float32(np.sqrt(2 / 64))
    w2 = rng.standard_normal((HIDDEN, 10), dtype=np.float32) * np.float32(np.sqrt(2 / HIDDEN))
    b1, b2 = np.zeros(HIDDEN, np.float32), np.zeros(10, np.float32)
    return fs.FlatBuffer.pack({"w1": w1, "b1": b1, "w2": w2, "b2": b2})


def logits(p: fs.FlatBuffer, x: Array) -> tuple[Array, Array]:
    """The network's output and its hidden layer."""
    hidden = np.maximum(x @ p["w1"] + p["b1"], 0)
    return hidden @ p["w2"] + p["b2"], hidden


def loss_and_gradient(p: fs.FlatBuffer, x: Array, y: Array, grads: fs.FlatBuffer) -> float:
    """Mean cross-entropy; writes its gradient into `grads`."""
    out, hidden = logits(p, x)
    out -= out.max(axis=1, keepdims=True)
    probability = np.exp(out)
    probability /= probability.sum(axis=1, keepdims=True)
    rows = np.arange(len(y))
    loss = float(-np.log(np.maximum(probability[rows, y], 1e-12)).mean())
    probability[rows, y] -= 1
    probability /= len(y)
    np.matmul(hidden.T, probability, out=grads["w2"])
    probability.sum(axis=0, out=grads["b2"])
    back = probability @ p["w2"].T
    back[hidden <= 0] = 0
    np.matmul(x.T, back, out=grads["w1"])
    back.sum(axis=0, out=grads["b1"])
    return loss


@contextlib.contextmanager
def one_blas_thread() -> Iterator[None]:
    """With one thread for NumPy's and SciPy's matrix products.

    On matrices as small as these several wait for each other, busily: beside another program that
    takes forty times as long.
    """
    import scipy.linalg  # noqa: F401  # it brings a BLAS of its own, which then is found too
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


@one_blas_thread()
def train(
    name: str, data: Digits, epochs: int = EPOCHS, tick: Callable[[], None] = lambda: None
) -> Result:
    """Trains the network from the same start with one optimizer."""
    params = init()
    grads = params.zeros_like()
    opt = OPTIMIZERS[name](params)
    rng = np.random.default_rng(1)
    batch = len(data.train_y) if "full batch" in name else BATCH
    losses = [loss_and_gradient(params, data.train_x, data.train_y, grads)]
    in_step = 0.0
    for _ in range(as_integer("epochs", epochs, 0)):
        for chosen in batches(rng, len(data.train_y), batch):
            loss_and_gradient(params, data.train_x[chosen], data.train_y[chosen], grads)
            begin = time.perf_counter()
            opt.step(grads)
            in_step += time.perf_counter() - begin
        losses.append(loss_and_gradient(params, data.train_x, data.train_y, grads))
        tick()
    predicted = logits(params, data.test_x)[0].argmax(axis=1)
    accuracy = float((predicted == data.test_y).mean())
    return Result(name, losses, accuracy, in_step / opt.steps * 1e3)


def batches(rng: np.random.Generator, n: int, size: int) -> Iterator[Array]:
    """Indices of all batches of one epoch, in random order; what is left over is left out."""
    order = rng.permutation(n)
    for at in range(0, n - n % size, size):
        yield order[at : at + size]


def table(results: list[Result]) -> Any:
    """Results as a rich table."""
    from rich.table import Table

    result = Table(title="handwritten digits, 64-128-10 perceptron", title_justify="left")
    result.add_column("optimizer")
    for heading in ("training loss", "test accuracy", "ms per step"):
        result.add_column(heading, justify="right")
    for r in results:
        result.add_row(r.name, f"{r.losses[-1]:.2e}", f"{r.accuracy:.1%}", f"{r.ms_per_step:.4f}")
    return result


def plot(results: list[Result], path: str) -> None:
    """Draws the loss curves into one PNG."""
    from matplotlib import color_sequences

    figure, axes = canvas((9, 5.5))
    colors = color_sequences["tab10"]
    ordered = sorted(results, key=lambda r: -r.losses[-1])  # the legend runs as the curves end
    for i, r in enumerate(ordered):
        # Of neighbours, which may be all but equal, the upper is broken and thin, the lower wide.
        style = (("-", "--"), ("-.", ":"))[i >= 10][i % 2]
        lr = OPTIMIZERS[r.name](init()).param_groups[0]["lr"]
        axes.plot(r.losses, style, lw=1.4 if i % 2 else 3, color=colors[i % 10],
                  label=f"{r.name}, lr {lr:g}: {r.accuracy:.1%}")  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss (cross-entropy)")
    axes.set_title("One network, one start, one optimizer per curve: handwritten digits")
    axes.grid(alpha=0.3)
    axes.legend(title="optimizer, rate: test accuracy", bbox_to_anchor=(1.01, 1), loc="upper left")
    figure.savefig(path, dpi=130)


def speed_table(rows: list[Any]) -> Any:
    """The short benchmark's rows as a rich table."""
    from rich.table import Table
    from rich.text import Text

    result = Table(title=f"one flat buffer of {rows[0].n:,} float32 parameters",
                   title_justify="left", caption_justify="left")  # fmt: skip
    result.add_column("optimizer")
    for heading in ("million/s", "GB/s", "of ceiling", "torch's fastest / ours"):
        result.add_column(heading, justify="right")
    for row in rows:
        best = row.best_torch
        result.add_row(
            row.optimizer,
            f"{row.mparams_per_s:,.0f}",
            f"{row.gbps:.1f}",
            f"{row.share_of_ceiling:.0%}",
            f"{best[1].ratio:.2f}x ({best[0]})" if best else "-",
        )
    busy = [row.optimizer for row in rows if row.remark(row.quartiles)]
    told = ["ceiling: a kernel that reads and writes the same streams and adds one number to each."]
    if busy:
        told.append(f"Disturbed, as fusedstep bench explains: {', '.join(busy)}.")
    if not bench.has_torch():
        told.append(bench.NO_TORCH)
    # No str, of which rich would take `[torch]` for markup and leave it out.
    result.caption = Text("\n".join(told), "table.caption")
    return result
