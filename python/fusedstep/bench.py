"""Measures a step against the memory ceiling and against torch, side by side in one process.

`measure` returns rows; `fusedstep bench` prints, stores and draws them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from fusedstep import _core, _runtime, optimizers
from fusedstep._arrays import as_dtype
from fusedstep._plot import canvas
from fusedstep.buffers import FlatBuffer

# What is measured of an optimizer, by name, with its arguments: one row with none, but for these.
_ROWS: dict[str, dict[str, dict[str, Any]]] = {
    "SGD": {
        "sgd": {"lr": 1e-3},
        "momentum": {"lr": 1e-3, "momentum": 0.9},
        "nesterov": {"lr": 1e-3, "momentum": 0.9, "nesterov": True},
    },
    "Adam": {"adam": {}, "amsgrad": {"amsgrad": True}},
}

# A name, the class (torch's has the same name), and its arguments.
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    name: (cls, hypers)
    for cls in optimizers.NAMES
    for name, hypers in _ROWS.get(cls, {cls.lower(): {}}).items()
}

_SETTLE = 2e-3  # seconds that one timing lasts at least, by repeating short steps
_REST = 1e-2  # seconds before each timing: torch's OpenMP threads spin for a while after their work


@dataclass
class Peer:
    """Another implementation of the same step."""

    ms: float
    ratio: float  # its time over ours: above 1 we are faster
    compile_s: float | None = None


@dataclass
class Row:
    """One optimizer at one size. Times are medians over rounds, ratios medians of neighbours'."""

    optimizer: str
    n: int
    dtype: str
    threads: int
    isa: str
    ms: float
    bytes_per_param: int
    gbps: float
    ceiling_gbps: float
    share_of_ceiling: float
    mparams_per_s: float
    torch: dict[str, Peer] = field(default_factory=dict)

    @property
    def best_torch(self) -> tuple[str, Peer] | None:
        """torch's fastest implementation, compiled ones aside."""
        peers = {k: p for k, p in self.torch.items() if k != "compile"}
        return min(peers.items(), key=lambda item: item[1].ms) if peers else None


def has_torch() -> bool:
    """Whether torch can be imported."""
    import importlib.util

    return importlib.util.find_spec("torch") is not None


@dataclass
class Pairs:
    """Seconds per call of a contender and of ours, measured next to each other in each round."""

    other: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """The median of their time over ours."""
        return median(b / a for a, b in zip(self.ours, self.other, strict=True))


def interleave(
    ours: Callable[[], Any], others: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, Pairs]:
    """Times each of `others` next to `ours`, all of them in every round, taking turns to go first.

    The machine's speed drifts within seconds; a ratio of neighbours is free of that, and the median
    over rounds free of the odd disturbance. Short calls are repeated to last 2 ms, after half as
    many that are not timed.
    """
    calls: dict[Callable[[], Any], int] = {}

    def seconds(run: Callable[[], Any]) -> float:
        time.sleep(_REST)
        for _ in range(calls[run] // 2):  # its data comes back into the caches
            run()
        begin = time.perf_counter()
        for _ in range(calls[run]):
            run()
        return (time.perf_counter() - begin) / calls[run]

    for run in (ours, *others.values()):
        run()  # first touch, caches, lazy state
        begin = time.perf_counter()
        run()
        calls[run] = max(1, int(_SETTLE / max(time.perf_counter() - begin, 1e-7)))
    pairs = {name: Pairs() for name in others}
    for k in range(rounds):
        for name, run in others.items():
            if k % 2:
                pairs[name].other.append(seconds(run))
            pairs[name].ours.append(seconds(ours))
            if not k % 2:
                pairs[name].other.append(seconds(run))
    return pairs


def _filled(buffer: FlatBuffer) -> FlatBuffer:
    """Positive numbers, so that the ceiling's sums leave valid second moments behind."""
    flat, n = buffer["flat"], buffer.n
    block = np.abs(np.random.default_rng(0).standard_normal(min(n, 1 << 16)))
    for at in range(0, n, block.size):
        flat[at : at + block.size] = block[: n - at]
    return buffer


def _ceiling(
    params: FlatBuffer, grads: FlatBuffer, states: Sequence[Any]
) -> Callable[[], tuple[int, int]]:
    """The least that a step over these streams can do: one addition for each that is written."""
    table = _core.ArrayTable("ceiling", ["flat"], [params["flat"]], [0])
    streams = {
        name: [states[i] if i < len(states) else None] for i, name in enumerate(table.states)
    }
    table.load(streams, [(0, 0.0, 0.0)], 0, [], [])
    group = [[0.0, 0.0, 0.0, float(len(states))]]
    return lambda: table.step_flat(grads.flat, [0], group)


def _ours(cls: str, kwargs: dict[str, Any], n: int, dtype: str, grad_dtype: str) -> dict[str, Any]:
    """Our step, its bytes and the ceiling: on the same memory, or, as the ceiling takes no mix of
    dtypes as it lies and no more than three states, on float32 streams of as many bytes."""
    params = FlatBuffer.zeros({"flat": n}, as_dtype(dtype))
    grads = _filled(params.zeros_like(as_dtype(grad_dtype)))
    opt = getattr(optimizers, cls)(params, **kwargs)
    states = list(opt.state["flat"].values())
    moved = 2 * params.dtype.itemsize + grads.dtype.itemsize
    moved += sum(2 * s.dtype.itemsize for s in states)
    same = params, grads, states
    most = min(len(states), len(_core.rules()["ceiling"][1]))
    if dtype != grad_dtype or most < len(states):
        other = FlatBuffer.zeros({"flat": n * moved // (12 + 8 * most)})
        alike = [other.zeros_like()["flat"] for _ in range(most)]
        same = other, _filled(other.zeros_like()), alike
    return {"step": lambda: opt.step(grads), "ceiling": _ceiling(*same), "bytes": moved}


def torch_ways(cls: str) -> dict[str, dict[str, bool]]:
    """What asks a class of torch's for each of its implementations; none if there is no class."""
    import torch

    make = getattr(torch.optim, cls, None)
    if make is None:
        return {}
    has_fused = "fused" in inspect.signature(make).parameters
    plain = {"foreach": False, "fused": False} if has_fused else {"foreach": False}
    ways = {"for-loop": plain, "foreach": {"foreach": True}}
    return {**ways, "fused": {"fused": True}} if has_fused else ways


def _torch(
    cls: str, kwargs: dict[str, Any], n: int, dtype: str, compiled: bool
) -> tuple[dict[str, Callable[[], Any]], float | None]:
    """Every implementation that torch has of this optimizer, and the time one took to compile."""
    import torch

    ways = torch_ways(cls)
    if not ways:
        return {}, None
    random = torch.Generator("cpu").manual_seed(0)  # torch's own, the caller's, stays as it is
    gradient = torch.randn(n, dtype=torch.float32, device="cpu", generator=random)
    gradient = gradient.abs_().to(getattr(torch, dtype))

    def stepper(**how: bool) -> Callable[[], Any]:
        param = torch.nn.Parameter(torch.zeros(n, dtype=gradient.dtype, device="cpu"))
        param.grad = gradient
        step: Callable[[], Any] = getattr(torch.optim, cls)([param], **kwargs, **how).step
        return step

    steps = {name: stepper(**how) for name, how in ways.items()}
    seconds = None
    if compiled:
        torch.compiler.reset()  # a compiler that met many optimizers before gives up on new ones
        steps["compile"] = torch.compile(stepper(**ways["for-loop"]))
        with _quiet("torch._dynamo"):  # it remarks on the profiler
            begin = time.perf_counter()
            for _ in range(3):  # the first steps specialize on state that does not exist before
                steps["compile"]()
            seconds = time.perf_counter() - begin
    return steps, seconds


@contextlib.contextmanager
def _settings(threads: int | None, isa: str | None, torch: bool) -> Iterator[None]:
    """Threads, torch's too, and instruction set as asked for; afterwards as they were."""
    with contextlib.ExitStack() as back:
        back.callback(_runtime.set_num_threads, _runtime.num_threads())
        back.callback(_runtime.set_isa, _runtime.isa())
        if threads is not None:
            _runtime.set_num_threads(threads)
        if isa is not None:
            _runtime.set_isa(isa)
        if torch:
            back.enter_context(torch_threads(_runtime.num_threads()))
        yield


@contextlib.contextmanager
def torch_threads(n: int) -> Iterator[None]:
    """torch with n threads, and afterwards with as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Without a logger's warnings."""
    found = logging.getLogger(logger)
    before = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(before)


def check(names: Sequence[str], rounds: int) -> None:
    """Raises ValueError for a name that is not of `OPTIMIZERS`, or no rounds."""
    for name in names:
        if name not in OPTIMIZERS:
            raise ValueError(f"optimizers must be of {', '.join(OPTIMIZERS)}, got {name!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be >= 1, got {rounds}")


def measure(
    names: Sequence[str] = tuple(OPTIMIZERS),
    sizes: Sequence[int] = (1 << 24,),
    *,
    dtype: str = "float32",
    grad_dtype: str | None = None,
    threads: int | None = None,
    isa: str | None = None,
    rounds: int = 9,
    torch: bool | None = None,
    compiled: bool = False,
    progress: Callable[[str], None] = lambda label: None,
) -> list[Row]:
    """Measures optimizers at sizes, each against the ceiling and torch's implementations.

    Args:
        names: of `OPTIMIZERS`.
        sizes: numbers of elements of the one flat buffer.
        dtype: of parameters and gradients.
        grad_dtype: of gradients, if it is another; torch is left out then.
        threads: for us and for torch; by default ours.
        isa: the instruction set of ours.
        rounds: timings of each contender.
        torch: whether to measure torch; by default if it is installed.
        compiled: whether to measure `torch.compile` of the for-loop step too.
        progress: called with a label before each row.

    Raises:
        ValueError: an unknown name, or a size or count below 1.
    """
    check(names, rounds)
    for n in sizes:
        if n < 1:
            raise ValueError(f"n must be >= 1, got {n}")
    grad_dtype = grad_dtype or dtype
    as_dtype(dtype)
    as_dtype(grad_dtype, "grad_dtype")
    with_torch = (has_torch() if torch is None else torch) and grad_dtype == dtype
    rows = []
    with _settings(threads, isa, with_torch):
        for name in names:
            for n in sizes:
                progress(f"{name}, n = {n:,}")
                cls, kwargs = OPTIMIZERS[name]
                rows.append(
                    _row(name, cls, kwargs, n, dtype, grad_dtype, rounds, with_torch, compiled)
                )
    return rows


def _row(
    name: str,
    cls: str,
    kwargs: dict[str, Any],
    n: int,
    dtype: str,
    grad_dtype: str,
    rounds: int,
    with_torch: bool,
    compiled: bool,
) -> Row:
    ours = _ours(cls, kwargs, n, dtype, grad_dtype)
    moved = ours["bytes"]
    peers, seconds = _torch(cls, kwargs, n, dtype, compiled) if with_torch else ({}, None)
    pairs = interleave(ours["step"], {"ceiling": ours["ceiling"], **peers}, rounds)
    ours_s = median(s for pair in pairs.values() for s in pair.ours)
    return Row(
        optimizer=name,
        n=n,
        dtype=dtype if grad_dtype == dtype else f"{dtype}/{grad_dtype}",
        threads=_runtime.num_threads(),
        isa=_runtime.isa(),
        ms=ours_s * 1e3,
        bytes_per_param=moved,
        gbps=moved * n / ours_s / 1e9,
        ceiling_gbps=moved * n / median(pairs["ceiling"].other) / 1e9,
        share_of_ceiling=pairs["ceiling"].ratio,
        mparams_per_s=n / ours_s / 1e6,
        torch={
            peer: Peer(
                median(pairs[peer].other) * 1e3,
                pairs[peer].ratio,
                seconds if peer == "compile" else None,
            )
            for peer in peers
        },
    )


def as_json(rows: Sequence[Any]) -> dict[str, Any]:
    """Rows with the machine they were measured on, ready for `json.dump`."""
    return {"machine": _runtime.info(), "rows": [asdict(row) for row in rows]}


def table(rows: Sequence[Row]) -> Any:
    """Rows as a rich table."""
    from rich.table import Table

    result = Table(title=title(rows, rows[0].dtype), title_justify="left", caption_justify="left")
    result.caption = (
        "x: torch's time over ours, above 1 we are faster. ceiling: the same streams on the same"
        " memory with one addition each."
    )
    result.add_column("optimizer")
    for heading in ("n", "ms", "B/param", "GB/s", "ceiling", "share"):
        result.add_column(heading, justify="right")
    every = ("for-loop", "foreach", "fused", "compile")
    peers = [peer for peer in every if any(peer in row.torch for row in rows)]
    for peer in peers:
        result.add_column(f"torch {peer}", justify="right")
    for row in rows:
        cells = [_peer_cell(row.torch.get(peer)) for peer in peers]
        result.add_row(
            row.optimizer,
            f"{row.n:,}",
            f"{row.ms:.4g}",
            str(row.bytes_per_param),
            f"{row.gbps:.1f}",
            f"{row.ceiling_gbps:.1f}",
            f"{row.share_of_ceiling:.2f}",
            *cells,
        )
    return result


def _peer_cell(peer: Peer | None) -> str:
    if peer is None:
        return "-"
    compiled = f" ({peer.compile_s:.0f} s to compile)" if peer.compile_s is not None else ""
    return f"{peer.ratio:.2f}x{compiled}"


def title(rows: Sequence[Any], dtype: str) -> str:
    """The machine and settings of rows, in a line."""
    machine = _runtime.info()
    return (
        f"{dtype}, {rows[0].threads} threads, {rows[0].isa}, {machine['cpu']},"
        f" torch {machine['torch'] or 'not installed'}"
    )


def plot(rows: Sequence[Row], path: str) -> None:
    """Draws GB/s against n for each optimizer: ours, the ceiling, and torch's fastest."""
    names = list(dict.fromkeys(row.optimizer for row in rows))
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    size = 3.4 * columns + 0.6, 2.7 * lines + 0.9
    figure, grid = canvas(size, lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        mine = [row for row in rows if row.optimizer == name]
        n = [row.n for row in mine]
        axes.plot(n, [r.ceiling_gbps for r in mine], "--", color="0.45", label="ceiling")
        axes.plot(n, [r.gbps for r in mine], "o-", ms=4, color="tab:blue", label="fusedstep")
        best = [(r.n, r.best_torch[1].ms) for r in mine if r.best_torch]
        if best:
            moved = mine[0].bytes_per_param
            rates = [moved * size / ms / 1e6 for size, ms in best]
            axes.plot([size for size, _ in best], rates, "s-", ms=4, color="tab:orange",
                      label="torch, fastest")  # fmt: skip
        axes.set_title(name, fontsize=10)
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
    grid[0][0].set_ylim(bottom=0)  # shared, so after all is drawn
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    grid[0][0].legend(fontsize=8)
    figure.supxlabel("elements in the buffer")
    figure.supylabel("GB/s of the step's own traffic")
    figure.suptitle(title(rows, rows[0].dtype), fontsize=10)
    figure.savefig(path, dpi=130)
