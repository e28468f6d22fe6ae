"""Measures all of a training step in one sweep, and narrow streams, beside what others do for it.

`measure` returns rows; `fusedstep bench --step` prints them by a `StepTable` and stores them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from statistics import median
from typing import Any

from fusedstep import bench
from fusedstep._arrays import as_dtype
from fusedstep.buffers import FlatBuffer
from fusedstep.optimizers import AdamW

_DECAY = 0.999  # of the averages
_NAME = 34  # characters of the longest name, so that a table has 80


@dataclass(frozen=True)
class Mode:
    """What a step of AdamW does beside the update, and the formats of its streams."""

    name: str
    step: Mapping[str, Any] = field(default_factory=dict)  # its options, but for the shadow
    shadow: bool = False
    param: str = "float32"
    grad: str = "float32"
    how: Mapping[str, Any] = field(default_factory=dict)  # options of the constructor


@dataclass(frozen=True)
class Case:
    """A mode and what it is measured against: the plain one, torch's calls, or libraries."""

    mode: Mode
    peers: tuple[str, ...]
    where: str = ""  # other than with the size and threads asked for


@dataclass
class Contender:
    """A step to measure. Bytes are per parameter, None where they are not known."""

    step: Callable[[], Any]
    bytes_per_param: float | None
    state_bytes: float  # of memory that the two moments take


@dataclass
class Peer:
    """Another step with the same result."""

    ms: float
    ratio: float  # its time over ours: above 1 ours is faster
    quartiles: bench.Quartiles
    bytes_per_param: float | None
    state_bytes: float
    version: str | None = None


@dataclass
class Row(bench.Conditions):
    """One mode. Times are medians over rounds, ratios medians of neighbours'."""

    mode: str
    n: int
    ms: float
    bytes_per_param: float
    state_bytes: float
    gbps: float
    ceiling_gbps: float
    share_of_ceiling: float
    share_quartiles: bench.Quartiles
    peers: dict[str, Peer] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)  # peers, and why they are left out


_CLIP: dict[str, Any] = {"max_norm": 1.0}
_EMA: dict[str, Any] = {"ema": _DECAY}
_ZERO: dict[str, Any] = {"zero_grad": True}
_SPLIT: dict[str, Any] = {"rounding": "split"}
_Q8_STATES: dict[str, Any] = {"state_dtype": "q8"}
_PLAIN = Mode("AdamW")
_Q8 = Mode("AdamW, q8 states", how=_Q8_STATES)
_BF16 = "bfloat16"

CASES = (
    Case(_PLAIN, ("torch fused",)),
    Case(Mode("clip + AdamW", _CLIP), ("torch fused", "AdamW")),
    Case(Mode("AdamW + EMA", _EMA), ("AdamW",)),
    Case(Mode("AdamW + shadow", shadow=True), ("AdamW",)),
    Case(Mode("AdamW + zero", _ZERO), ("AdamW",)),
    Case(
        Mode("clip + AdamW + EMA + shadow + zero", _CLIP | _EMA | _ZERO, shadow=True),
        ("torch fused", "torch default"),
    ),
    Case(Mode("AdamW, bf16 states", how={"state_dtype": _BF16}), ("AdamW",)),
    Case(_Q8, ("AdamW",)),
    Case(Mode("bf16 split", param=_BF16, how=_SPLIT), ("AdamW",)),
    Case(Mode("bf16 split, bf16 gradients", param=_BF16, grad=_BF16, how=_SPLIT), ("AdamW",)),
    Case(
        Mode("bf16 split, bf16 grads, q8 states", {}, False, _BF16, _BF16, _SPLIT | _Q8_STATES),
        ("torch fused",),
    ),
    Case(_Q8, ("AdamW",), where="in cache"),
    Case(_PLAIN, ("DeepSpeed CPUAdam", "bitsandbytes AdamW"), where="libraries"),
    Case(
        _Q8,
        ("torchao AdamWFp8", "torchao AdamW8bit", "bitsandbytes AdamW8bit"),
        where="libraries",
    ),
)


def _ours(mode: Mode, n: int) -> tuple[Contender, list[Any]]:
    """Our step, and its streams, the shadow aside."""
    params = FlatBuffer.zeros({"flat": n}, as_dtype(mode.param))
    grads = bench._filled(params.zeros_like(as_dtype(mode.grad)))
    options = dict(mode.step)
    if mode.shadow:
        options["shadow"] = params.zeros_like(as_dtype(_BF16))
    opt = AdamW(params, **mode.how)
    opt.step(grads, **options)  # from here on all states are there
    states = dict(opt.state["flat"])
    passes = 1 + ("max_norm" in options) + ("zero_grad" in options)
    moved: float = 2 * params.dtype.itemsize + passes * grads.dtype.itemsize + 2 * mode.shadow
    moved += sum(2 * state.nbytes for state in states.values()) / n
    moments = sum(state.nbytes for name, state in states.items() if name.startswith("exp_avg"))
    ours = Contender(lambda: opt.step(grads, **options), moved, moments / n)
    return ours, [params, grads, *states.values()]


def _ceiling(streams: list[Any], n: int) -> tuple[Callable[[], Any], float]:
    """The ceiling's step and its bytes a parameter: on the same streams if all of them are float32,
    as many of them as it takes, else on AdamW's four in float32."""
    params, grads, *states = streams
    if any(stream.dtype.name != "float32" for stream in streams):
        params = FlatBuffer.zeros({"flat": n})
        grads = bench._filled(params.zeros_like())
        states = [params.zeros_like()["flat"] for _ in range(2)]
    states = states[:3]
    return bench._ceiling(params, grads, states), 12 + 8 * len(states)


def torch_steps(
    mode: Mode, n: int, names: Sequence[str], device: Any = "cpu"
) -> dict[str, Contender]:
    """What a mode does, as torch's calls, each a sweep or several; all on the same tensors."""
    import torch

    param = _torch_param(n, device)
    ema = param.detach().clone() if "ema" in mode.step else None
    shadow = torch.empty(n, dtype=torch.bfloat16, device=device) if mode.shadow else None
    clips, zeroes = "max_norm" in mode.step, "zero_grad" in mode.step

    def calls(**how: bool) -> Callable[[], None]:
        opt = torch.optim.AdamW([param], **how)

        def step() -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_([param], mode.step["max_norm"])
            opt.step()
            with torch.no_grad():
                if ema is not None:
                    torch._foreach_lerp_([ema], [param], 1 - _DECAY)
                if shadow is not None:
                    torch._foreach_copy_([shadow], [param])
            if zeroes:
                opt.zero_grad(set_to_none=False)

        return step

    # A norm reads gradients, scaling reads and writes them.
    moved = 28 + 12 * clips + 12 * (ema is not None) + 6 * mode.shadow + 4 * zeroes
    ways: dict[str, tuple[dict[str, bool], float | None]] = {
        "torch fused": ({"fused": True}, moved),
        "torch default": ({}, None),
    }
    return {
        name: Contender(calls(**how), total, 8)
        for name, (how, total) in ways.items()
        if name in names
    }


def _torch_param(n: int, device: Any = "cpu") -> Any:
    """A float32 parameter with a gradient. torch's random numbers, the caller's, are left alone."""
    import torch

    param = torch.nn.Parameter(torch.zeros(n, dtype=torch.float32, device=device))
    random = torch.Generator(device).manual_seed(0)
    param.grad = torch.rand(n, generator=random, dtype=torch.float32, device=device)
    return param


@dataclass(frozen=True)
class Library:
    """AdamW of another library, over torch's tensors."""

    package: str
    module: str
    cls: str
    bytes_per_param: float | None = None


LIBRARIES = {
    "DeepSpeed CPUAdam": Library("deepspeed", "deepspeed.ops.adam", "DeepSpeedCPUAdam", 28),
    "bitsandbytes AdamW": Library("bitsandbytes", "bitsandbytes.optim", "AdamW"),
    "bitsandbytes AdamW8bit": Library("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    "torchao AdamW8bit": Library("torchao", "torchao.optim", "AdamW8bit"),
    "torchao AdamWFp8": Library("torchao", "torchao.optim", "AdamWFp8"),
}


def _library(library: Library, n: int) -> Contender:
    with _silent():
        param = _torch_param(n)
        opt = getattr(importlib.import_module(library.module), library.cls)([param])
        opt.step()  # which compiles what some of them compile
        opt.step()
    states = sum(_torch_bytes(state) for state in opt.state[param].values())
    return Contender(opt.step, library.bytes_per_param, states / n)


def _torch_bytes(state: Any) -> int:
    """The memory of a state, those that a tensor of several is made of included."""
    if hasattr(state, "__tensor_flatten__"):
        return sum(_torch_bytes(getattr(state, name)) for name in state.__tensor_flatten__()[0])
    return state.numel() * state.itemsize if getattr(state, "ndim", 0) else 0


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what libraries log and warn of as they look for GPUs and compile."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def measure(
    n: int = 1 << 26,
    *,
    threads: int | None = None,
    isa: str | None = None,
    rounds: int = 9,
    torch: bool | None = None,
    progress: Callable[[str], None] = lambda label: None,
    each: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Measures every case of `CASES`, each against the ceiling and its peers.

    Args:
        n: elements of the one flat buffer; a quarter of them beside other libraries, some of which
            are slow, and 2^14 in cache, with one thread.
        threads: for us and for the others; by default ours.
        isa: the instruction set of ours.
        rounds: timings of each contender.
        torch: whether to measure torch and libraries on top of it; by default if it is installed.
        progress: called with a label before each row.
        each: called with each row once it is there.

    Raises:
        ValueError: a count that is out of range, or does not fit into memory.
    """
    bench.check([], rounds, threads)
    with_torch = bench.has_torch() if torch is None else torch
    bench.check_size(n, 48 if with_torch else 32)  # steps of AdamW beside each other
    rows = []
    for case in CASES:
        progress(case.mode.name)
        size = {"": n, "in cache": min(n, 1 << 14), "libraries": max(n // 4, 1)}[case.where]
        used = 1 if case.where == "in cache" else threads
        with bench._settings(used, isa, with_torch):
            rows.append(_row(case, size, rounds, with_torch))
        each(rows[-1])
    return rows


def _row(case: Case, n: int, rounds: int, with_torch: bool) -> Row:
    ours, streams = _ours(case.mode, n)
    ceiling, ceiling_bytes = _ceiling(streams, n)
    found: dict[str, Contender] = {}
    versions, skipped = {}, {}
    if "AdamW" in case.peers:
        found["AdamW"] = _ours(_PLAIN, n)[0]
    if with_torch:
        found |= torch_steps(case.mode, n, case.peers)
    for name in case.peers:
        if name not in LIBRARIES:
            continue
        try:
            versions[name] = metadata.version(LIBRARIES[name].package)
            found[name] = _library(LIBRARIES[name], n)
        except metadata.PackageNotFoundError:
            skipped[name] = "not installed"
        except Exception as error:  # whatever a library raises where it cannot run
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    steps = {name: one.step for name, one in found.items()}
    watch = bench.Watch()
    pairs = bench.interleave(ours.step, {"the ceiling": ceiling, **steps}, rounds)
    ours_s = median(s for pair in pairs.values() for s in pair.ours)
    moved = ours.bytes_per_param or 0.0
    scale = moved / ceiling_bytes
    low, high = pairs["the ceiling"].quartiles
    return Row(
        **watch.conditions(),
        mode=case.mode.name,
        n=n,
        ms=ours_s * 1e3,
        bytes_per_param=moved,
        state_bytes=ours.state_bytes,
        gbps=moved * n / ours_s / 1e9,
        ceiling_gbps=ceiling_bytes * n / median(pairs["the ceiling"].other) / 1e9,
        share_of_ceiling=pairs["the ceiling"].ratio * scale,
        share_quartiles=(low * scale, high * scale),
        peers={
            name: Peer(
                median(pairs[name].other) * 1e3,
                pairs[name].ratio,
                pairs[name].quartiles,
                one.bytes_per_param,
                one.state_bytes,
                versions.get(name),
            )
            for name, one in found.items()
        },
        skipped=skipped,
    )


_CAPTION = (
    "bytes: moved in a step for each parameter; state: kept of the two moments. share: of the"
    " bandwidth of the ceiling, which adds one number to each of as many float32 streams, the most"
    " that this memory gives. time: the other's over ours, above 1x ours is faster; by bytes: what"
    " it would be if only bytes counted. torch does the same by clip_grad_norm_, AdamW.step,"
    " _foreach_lerp_, _foreach_copy_ and zero_grad."
)


class StepTable(bench.Table):
    """Modes, each above what it is measured against."""

    widths: tuple[int, ...] = (_NAME, 5, 5, 5, 5, 5, 5, 9)
    heading: Sequence[Sequence[str]] = (
        ("", "", "", "", "", "by", "", ""),
        ("", "bytes", "state", "ms", "share", "bytes", "time", "quartiles"),
    )

    def body(self, row: Row) -> tuple[Sequence[Sequence[str]], list[bench.Quartiles]]:
        """A line for ours, and one for each of the others."""
        share = bench.short(row.share_of_ceiling, 4)
        ours = self._cells(row.mode, row)
        lines = [(*ours, share, "", "", bench.between(row.share_quartiles))]
        for name, peer in row.peers.items():
            moved = peer.bytes_per_param
            by_bytes = "" if moved is None else bench.times(moved / row.bytes_per_param)
            ratio = bench.times(peer.ratio), bench.between(peer.quartiles)
            lines.append((*self._cells(f"  {name}", peer), "", by_bytes, *ratio))
        return lines, [row.share_quartiles, *(peer.quartiles for peer in row.peers.values())]

    def _cells(self, name: str, one: Row | Peer) -> tuple[str, ...]:
        state = f"{one.state_bytes:.2f}"
        return name, _bytes(one.bytes_per_param), state, bench.short(one.ms, 5)

    def notes(self) -> list[str]:
        """The columns, the libraries' versions, and which are left out, and why."""
        peers = [item for row in self.rows for item in row.peers.items()]
        skipped = {f"{name} ({why})" for row in self.rows for name, why in row.skipped.items()}
        versions = {f"{name} {peer.version}" for name, peer in peers if peer.version}
        told = (("Versions", versions), ("Left out", skipped))
        return [_CAPTION, *(f"{label}: {', '.join(sorted(of))}." for label, of in told if of)]

    def close(self) -> None:
        """Prints the notes, and what bytes alone say of each mode at other speeds of memory."""
        super().close()
        speeds = (100, 300, 600)
        print("\nA projection from bytes alone, nothing measured: ms of a step, 10^9 parameters\n")
        self.widths = (_NAME, 5, *(8 for _ in speeds))
        print(self.line(("", "bytes", *(f"{gbps} GB/s" for gbps in speeds))))
        told = set()
        for row in self.rows:
            peers = {name: peer.bytes_per_param for name, peer in row.peers.items()}
            ours = {row.mode: row.bytes_per_param} if row.mode not in told else {}
            others = {f"  {name}": peers[name] for name in peers if name.startswith("torch")}
            told.add(row.mode)
            for name, moved in {**ours, **others}.items():
                if moved is not None:
                    ms = (f"{1e3 * moved / gbps:.1f}" for gbps in speeds)
                    print(self.line((name, _bytes(moved), *ms)))


def _bytes(moved: float | None) -> str:
    return "" if moved is None else f"{moved:.4g}"
