"""Encodings of optimizer states in 8 bits, side by side: error, training, time.

    python bench/encodings.py -o bench/results    # writes encodings.json and encodings.md
    OPENBLAS_NUM_THREADS=1 keeps NumPy's products from sharing the cores that the runs have.

Each encoding is a few lines of bench/encodings.cpp, which this script compiles (g++ or $CXX, AVX2).
Training is that of `fusedstep demo` with the library's own steps, whose float32 states go through
the encoding and back after each one.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import shlex
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

import fusedstep as fs
from fusedstep import demo

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = "-std=c++20 -O3 -mavx2 -mfma -fno-math-errno -fno-trapping-math -shared -fPIC"
# In the order of `kEncodings`.
ENCODINGS = (
    "q8",
    "q8, rounded without bias",
    "floats, 2 bits of fraction",
    "floats, 3 bits of fraction",
    "square roots of shares",
    "shares",
    "dynamic map",
)
RULES = {"AdamW": "AdamW", "RMSprop": "RMSProp", "Lion": "Lion", "SGD+momentum": "momentum"}
POSITIVE = {"exp_avg_sq", "square_avg"}
ROUNDINGS = ("nearest", "stochastic")
DECADES = range(1, 10)  # below the block's largest gradient
EPOCHS = (10, 20, 30, 40)  # at which losses are told
IN_CACHE = 4096  # elements


class Encodings:
    """The compiled encodings."""

    def __init__(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "encodings.so"
            command = [os.environ.get("CXX", "g++"), *shlex.split(FLAGS)]
            subprocess.run([*command, str(SOURCE), "-o", str(library)], check=True)
            self._round_trips = ctypes.CDLL(str(library)).round_trips

    def round_trip(
        self, name: str, values: Any, positive: bool, rounding: str, key: int = 0, times: int = 1
    ) -> None:
        """Puts float32 values through an encoding and back, in place."""
        codes, scales = np.empty(values.size, np.uint8), np.empty(values.size // 128 + 1, "f4")
        at = [ctypes.c_void_p(array.ctypes.data) for array in (values, codes, scales)]
        self._round_trips(
            ENCODINGS.index(name), *at, values.size, positive, rounding == "stochastic",
            ctypes.c_uint32(key), times,
        )  # fmt: skip


def update(m: Any, v: Any) -> Any:
    """AdamW's first, over its rate."""
    return m.astype("f8") / 0.1 / (np.sqrt(v.astype("f8") / 0.001) + 1e-8)


def kept_updates(encodings: Encodings, gradients: Any, name: str, rounding: str) -> Any:
    """Updates by moments that were encoded, over those by float32 ones, of blocks of gradients."""
    m, v = (0.1 * gradients).astype("f4"), (0.001 * gradients**2).astype("f4")
    exact = update(m, v)
    encodings.round_trip(name, m, False, rounding)
    encodings.round_trip(name, v, True, rounding, key=v.size)
    return update(m, v) / exact


def log_uniform(low: float, high: float, blocks: int = 1000) -> Any:
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(low, high, (blocks, 256))
    return size * rng.choice([-1, 1], size.shape)


def errors(encodings: Encodings, name: str, rounding: str) -> dict[str, dict[str, float]]:
    """What one round trip does to updates, of gradients 1e-8 to 1e2, and over two decades."""
    rows = {}
    for case, decades in (("1e-8 to 1e2", (-8, 2)), ("1e-2 to 1", (-2, 0))):
        kept = kept_updates(encodings, log_uniform(*decades), name, rounding).ravel()
        error = np.abs(kept - 1)
        rows[case] = {
            "median": float(np.median(error)),
            "99 %": float(np.quantile(error, 0.99)),
            "worst": float(error.max()),
            "lost": float(np.mean(kept == 0)),
            "halved": float(np.mean(np.abs(kept) < 0.5)),
            "doubled": float(np.mean(np.abs(kept) > 2)),
        }
    return rows


def far_below(encodings: Encodings, name: str) -> list[float]:
    """What is left of updates of gradients by decades below the block's largest, medians."""
    result = []
    for decade in DECADES:
        gradients = log_uniform(-decade - 0.5, -decade + 0.5, 100)
        gradients[:, ::128] = 1.0
        kept = kept_updates(encodings, gradients, name, "nearest")
        result.append(float(np.median(kept[:, 1:128])))
    return result


def seen_rate(encodings: Encodings, name: str) -> float:
    """The mean of 1/sqrt(v) over the exact one, in the long run of second moments, as a share more.

    Of AdamW's beta2 and normal gradients, whose squares' mean is 1 to 4; float32 has 0.000.
    """
    rng = np.random.default_rng(0)
    squares = (4 ** rng.uniform(0, 1, 1280)).astype("f4")
    exact, v = squares.copy(), squares.copy()
    total = {"exact": 0.0, "ours": 0.0}
    for t in range(8000):
        new = np.float32(0.001) * squares * rng.standard_normal(1280).astype("f4") ** 2
        exact = np.float32(0.999) * exact + new
        v = np.float32(0.999) * v + new
        encodings.round_trip(name, v, True, "stochastic", t * 1_000_003 % 2**32)
        if t >= 2000:
            total["exact"] += np.mean(1 / np.sqrt(exact / squares))
            total["ours"] += np.mean(1 / np.sqrt(v / squares))
    return float(total["ours"] / total["exact"]) - 1


@functools.cache
def once() -> tuple[Encodings, demo.Digits]:
    """What each process needs."""
    fs.set_num_threads(1)
    return Encodings(), demo.Digits.load()


def train(job: tuple[str, str, str, int, int]) -> list[float]:
    """Training losses after each epoch."""
    rule, name, rounding, seed, epochs = job
    encodings, data = once()
    params = demo.init(seed)
    grads = params.zeros_like()
    opt = demo.OPTIMIZERS[RULES[rule]](params)
    rng = np.random.default_rng(100 + seed)
    losses, key = [], 0
    for _ in range(epochs):
        for chosen in demo.batches(rng, len(data.train_y), demo.BATCH):
            demo.loss_and_gradient(params, data.train_x[chosen], data.train_y[chosen], grads)
            opt.step(grads)
            for state in opt.state.values() if name else ():
                for entry, values in state.items():
                    if isinstance(values, np.ndarray) and values.ndim:
                        key += 1_000_003
                        positive = entry in POSITIVE
                        flat = values.reshape(-1)
                        encodings.round_trip(name, flat, positive, rounding, key % 2**32)
        losses.append(demo.loss_and_gradient(params, data.train_x, data.train_y, grads))
    return losses


def training(seeds: int, epochs: int) -> dict[str, dict[str, list[list[float]]]]:
    """Losses by rule and encoding, by seeds, at `EPOCHS`."""
    kinds = [("", "nearest"), *((name, how) for name in ENCODINGS for how in ROUNDINGS)]
    jobs = [(r, *kind, s, epochs) for r in RULES for kind in kinds for s in range(seeds)]
    at = [epoch for epoch in EPOCHS if epoch <= epochs] or [epochs]
    found: dict[str, dict[str, list[list[float]]]] = {rule: {} for rule in RULES}
    with ProcessPoolExecutor() as pool, np.errstate(all="ignore"):
        for (rule, name, rounding, *_), losses in zip(jobs, pool.map(train, jobs), strict=True):
            key = f"{name}, {rounding}" if name else "float32"
            found[rule].setdefault(key, []).append([losses[epoch - 1] for epoch in at])
    return found


def nanoseconds(encodings: Encodings, name: str, positive: bool, rounding: str) -> float:
    """Of encoding and decoding an element in the cache, the least of several timings."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(IN_CACHE).astype("f4")
    values = values**2 if positive else values
    best = float("inf")
    for _ in range(20):
        once = values.copy()
        begin = time.thread_time_ns()
        encodings.round_trip(name, once, positive, rounding, times=100)
        best = min(best, (time.thread_time_ns() - begin) / 100 / IN_CACHE)
    return best


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def change(losses: Sequence[float], reference: Sequence[float]) -> str:
    lost = sum(not a < 2 * b for a, b in zip(losses, reference, strict=True))
    if any(not a < 10 * b for a, b in zip(losses, reference, strict=True)):
        return f"diverges in {lost} of {len(losses)}"
    return f"{mean(losses) / mean(reference) - 1:+.1%}"


def number(x: float) -> str:
    return "0" if x == 0 else f"{x:.2f}" if 0.005 < x < 100 else f"{x:.0e}"


def markdown(result: dict[str, Any]) -> str:
    parts = [f"{result['machine']}; {result['seeds']} seeds, {result['epochs']} epochs.\n"]
    for case in ("1e-8 to 1e2", "1e-2 to 1"):
        rows = []
        for name in ENCODINGS:
            for rounding in ROUNDINGS:
                e = result["errors"][f"{name}, {rounding}"][case]
                shares = [f"{e[k]:.1%}" for k in ("lost", "halved", "doubled")]
                sizes = [number(e[k]) for k in ("median", "99 %", "worst")]
                rows.append([name, rounding, *sizes, *shares])
        head = ["encoding", "rounding", "median", "99 %", "worst", "lost", "below half", "above 2x"]
        parts.append(
            f"Error of AdamW's update, gradients {case} in a block:\n\n{table(head, rows)}"
        )
    rows = [[name, *map(number, result["far below"][name])] for name in ENCODINGS]
    head = ["encoding", *(f"1e-{decade}" for decade in DECADES)]
    parts.append(
        "What is left of the update of gradients so far below the block's largest, 1 being all:\n\n"
        + table(head, rows)
    )
    rows = [[name, f"{result['rate'][name]:+.1%}"] for name in ENCODINGS]
    parts.append(
        "By how much lr seems larger, of second moments that were rounded at random for long:\n\n"
        + table(["encoding", "lr"], rows)
    )
    for k, epoch in enumerate(result["at"]):
        columns = {
            rule: {key: [run[k] for run in runs] for key, runs in of.items()}
            for rule, of in result["training"].items()
        }
        rows = [["float32: loss", "", *(f"{mean(of['float32']):.4f}" for of in columns.values())]]
        for name in ENCODINGS:
            for rounding in ROUNDINGS:
                key = f"{name}, {rounding}"
                cells = [change(of[key], of["float32"]) for of in columns.values()]
                rows.append([name, rounding, *cells])
        parts.append(
            f"Training loss after {epoch} epochs against float32 states, means over seeds:\n\n"
            + table(["encoding", "rounding", *columns], rows)
        )
    rows = [[name, *(f"{ns:.2f}" for ns in result["ns"][name])] for name in ENCODINGS]
    head = ["encoding", *(f"{sign}, {how}" for sign in ("m", "v") for how in ROUNDINGS)]
    parts.append(f"Nanoseconds to encode and decode an element, one thread:\n\n{table(head, rows)}")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="folder for encodings.json and .md")
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=max(EPOCHS))
    args = parser.parse_args()
    encodings = Encodings()
    result: dict[str, Any] = {
        "machine": f"{fs.info()['cpu']}, AVX2, one thread",
        "seeds": args.seeds,
        "epochs": args.epochs,
        "at": [epoch for epoch in EPOCHS if epoch <= args.epochs] or [args.epochs],
        "ns": {
            name: [nanoseconds(encodings, name, v, how) for v in (False, True) for how in ROUNDINGS]
            for name in ENCODINGS
        },
        "errors": {
            f"{name}, {how}": errors(encodings, name, how)
            for name in ENCODINGS
            for how in ROUNDINGS
        },
        "rate": {name: seen_rate(encodings, name) for name in ENCODINGS},
        "far below": {name: far_below(encodings, name) for name in ENCODINGS},
    }
    result["training"] = training(args.seeds, args.epochs)
    text = markdown(result)
    print(text)
    if args.output:
        args.output.mkdir(exist_ok=True)
        (args.output / "encodings.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.output / "encodings.md").write_text(text)


if __name__ == "__main__":
    main()
