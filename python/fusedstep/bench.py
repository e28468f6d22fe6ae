"""Measures a step against the memory ceiling and against torch, side by side in one process.

`measure` returns rows; `fusedstep bench` prints them as they come by a `Table`, stores and draws
them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

NO_TORCH = "torch is not installed, so nothing of it was measured: pip install 'fusedstep[torch]'"

_SETTLE = 2e-3  # seconds that one timing lasts at least, by repeating short steps
_APART = 1.25  # quartiles of a ratio that are further apart than this are remarked on
_REST = 1e-2  # seconds before each timing: torch's OpenMP threads spin for a while after their work


Quartiles = tuple[float, float]  # the first and the third


class Refused(ValueError):
    """An argument with which nothing is measured."""


@dataclass
class Peer:
    """Another implementation of the same step."""

    ms: float
    ratio: float  # its time over ours: above 1 we are faster
    quartiles: Quartiles
    compile_s: float | None = None


@dataclass(kw_only=True)
class Conditions:
    """What a row was measured under."""

    threads: int  # asked for
    threads_used: int  # the most that took part in one of our sweeps
    cores_free: float | None  # of this process's, on average; None where the system does not tell
    isa: str

    @property
    def ran(self) -> str:
        """How many threads there really were, in words."""
        if self.threads == 1:
            return "1 thread"
        return f"{self.threads_used} of {self.threads} threads ran"

    def remark(self, quartiles: Sequence[Quartiles]) -> list[str]:
        """A line on what disturbed the row, if anything did, by the quartiles of its ratios."""
        told = []
        if self.cores_free is not None and self.cores_free < self.threads - 0.25:
            told.append(f"{self.cores_free:.1f} cores free for {self.threads} threads")
        apart = max((high / low for low, high in quartiles), default=1.0)
        if apart > _APART:
            told.append(f"quartiles {times(apart)} apart")
        return [f"  ! busy: {', '.join(told)}"] if told else []


class Watch:
    """Tells the conditions from its making on."""

    def __init__(self) -> None:
        self._begin = _clocks()
        _core.take_threads_used()

    def conditions(self) -> dict[str, Any]:
        """The fields of `Conditions`."""
        free = None
        if (now := _clocks()) and self._begin:
            _, wall, own, everybody = (b - a for a, b in zip(self._begin, now, strict=True))
            free = now[0] - max(everybody - own, 0.0) / wall
        return {
            "threads": _runtime.num_threads(),
            "threads_used": max(1, _core.take_threads_used()),
            "cores_free": free,
            "isa": _runtime.isa(),
        }


def _clocks() -> tuple[float, ...] | None:
    """The cores that this process may use, and seconds: of the clock, its own on all of them, and
    everybody's on these; None where the system does not tell."""
    try:
        cores = {f"cpu{i}" for i in os.sched_getaffinity(0)}
        with open("/proc/stat") as file:
            ticks = [line.split() for line in file if line.split(" ", 1)[0] in cores]
    except (AttributeError, OSError):
        return None
    # All but idle and iowait; guests' time is in the users' too.
    busy = sum(int(n) for words in ticks for n in (*words[1:4], *words[6:9]))
    return (len(cores), time.perf_counter(), time.process_time(), busy / os.sysconf("SC_CLK_TCK"))


@dataclass
class Row(Conditions):
    """One optimizer at one size. Times are medians over rounds, ratios medians of neighbours'."""

    optimizer: str
    n: int
    dtype: str
    ms: float
    bytes_per_param: int
    gbps: float
    ceiling_gbps: float
    share_of_ceiling: float
    share_quartiles: Quartiles
    mparams_per_s: float
    torch: dict[str, Peer] = field(default_factory=dict)

    @property
    def quartiles(self) -> list[Quartiles]:
        """Those of all ratios."""
        return [self.share_quartiles, *(peer.quartiles for peer in self.torch.values())]

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
    def ratios(self) -> list[float]:
        """Their time over ours in each round."""
        return [b / a for a, b in zip(self.ours, self.other, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return median(self.ratios)

    @property
    def quartiles(self) -> Quartiles:
        """The first and the third of the ratios."""
        low, high = np.percentile(self.ratios, (25, 75))
        return float(low), float(high)


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
        least = math.inf  # of three: a disturbed one would have a short call timed once, and cold
        for _ in range(3):
            begin = time.perf_counter()
            run()
            least = min(least, time.perf_counter() - begin)
        calls[run] = max(1, int(_SETTLE / max(least, 1e-7)))
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


def check(names: Sequence[str], rounds: int, threads: int | None) -> None:
    """Refuses a name that is not of `OPTIMIZERS`, no rounds, and threads out of range."""
    for name in names:
        if name not in OPTIMIZERS:
            raise Refused(f"optimizers must be of {', '.join(OPTIMIZERS)}, got {name!r}")
    if rounds < 1:
        raise Refused(f"rounds must be >= 1, got {rounds}")
    if threads is not None and not 1 <= threads <= _core.MAX_THREADS:
        raise Refused(f"threads must be from 1 to {_core.MAX_THREADS}, got {threads}")


def check_size(n: int, bytes_per_param: int) -> None:
    """Refuses a size below 1, and one that this machine's memory does not hold."""
    if n < 1:
        raise Refused(f"n must be >= 1, got {n}")
    needed, memory = float(n) * bytes_per_param, math.inf
    if hasattr(os, "sysconf"):  # Windows has none
        memory = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    if needed > memory:
        raise Refused(
            f"n must fit into memory, {memory / 1e9:.3g} GB: got {n:.6g}, which takes"
            f" {needed / 1e9:.3g} GB"
        )


def check_sizes(
    names: Sequence[str],
    sizes: Sequence[int],
    dtype: str = "float32",
    grad_dtype: str = "float32",
    torch: bool | None = None,
) -> None:
    """Refuses sizes at which one of the optimizers would not fit, torch's beside ours."""
    for cls, kwargs in (OPTIMIZERS[name] for name in names):
        params = FlatBuffer.zeros({"flat": 1}, as_dtype(dtype))
        states = getattr(optimizers, cls)(params, **kwargs).state["flat"].values()
        kept = params.dtype.itemsize + sum(state.dtype.itemsize for state in states)
        theirs = len(torch_ways(cls)) if (has_torch() if torch is None else torch) else 0
        gradients = as_dtype(grad_dtype).itemsize * (2 if theirs else 1)
        for n in sizes:
            check_size(n, kept * (1 + theirs) + gradients)


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
    each: Callable[[Row], None] = lambda row: None,
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
        each: called with each row once it is there.

    Raises:
        ValueError: an unknown name, or a size or count that is out of range, or does not fit into
            memory.
    """
    check(names, rounds, threads)
    grad_dtype = grad_dtype or dtype
    as_dtype(dtype)
    as_dtype(grad_dtype, "grad_dtype")
    with_torch = (has_torch() if torch is None else torch) and grad_dtype == dtype
    check_sizes(names, sizes, dtype, grad_dtype, with_torch)
    rows = []
    with _settings(threads, isa, with_torch):
        for name in names:
            for n in sizes:
                progress(f"{name}, n = {n:,}")
                cls, kwargs = OPTIMIZERS[name]
                rows.append(
                    _row(name, cls, kwargs, n, dtype, grad_dtype, rounds, with_torch, compiled)
                )
                each(rows[-1])
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
    watch = Watch()
    pairs = interleave(ours["step"], {"ceiling": ours["ceiling"], **peers}, rounds)
    ours_s = median(s for pair in pairs.values() for s in pair.ours)
    return Row(
        **watch.conditions(),
        optimizer=name,
        n=n,
        dtype=dtype if grad_dtype == dtype else f"{dtype}/{grad_dtype}",
        ms=ours_s * 1e3,
        bytes_per_param=moved,
        gbps=moved * n / ours_s / 1e9,
        ceiling_gbps=moved * n / median(pairs["ceiling"].other) / 1e9,
        share_of_ceiling=pairs["ceiling"].ratio,
        share_quartiles=pairs["ceiling"].quartiles,
        mparams_per_s=n / ours_s / 1e6,
        torch={
            peer: Peer(
                median(pairs[peer].other) * 1e3,
                pairs[peer].ratio,
                pairs[peer].quartiles,
                seconds if peer == "compile" else None,
            )
            for peer in peers
        },
    )


def as_json(rows: Sequence[Any], versions: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Rows with the machine they were measured on, ready for `json.dump`."""
    machine = {**_runtime.info(), **(versions or {})}
    return {"machine": machine, "rows": [asdict(row) for row in rows]}


def short(number: float, width: int) -> str:
    """With as many places, up to four, as that many characters have room for."""
    for places in range(min(4, width - 2), -1, -1):
        text = f"{number:.{places}f}"
        if len(text) <= width:
            break
    return text


def times(ratio: float) -> str:
    """A ratio in five characters, up to 9999."""
    return f"{short(ratio, 4)}x"


def between(quartiles: Quartiles) -> str:
    """In nine characters, up to 9999."""
    return "-".join(short(ratio, 4) for ratio in quartiles)


class Table:
    """Rows as text of at most 80 characters a line, each printed as it comes."""

    widths: tuple[int, ...]
    heading: Sequence[Sequence[str]]  # its lines, of a cell for each column
    above = ""  # that, of the last columns

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def dtype(self, row: Any) -> str:
        """What the title says of the streams."""
        return "float32"

    def versions(self) -> dict[str, str]:
        """Of the libraries that rows are measured beside, if torch is not among them."""
        return {}

    def place(self, row: Any) -> str:
        """What a line of its own says before all rows that have it in common."""
        return f"n = {row.n:,}: {row.ran}"

    def body(self, row: Any) -> tuple[Sequence[Sequence[str]], list[Quartiles]]:
        """Lines of cells, and the quartiles of all ratios."""
        raise NotImplementedError

    def line(self, cells: Sequence[str]) -> str:
        """The first cell to the left, the others to the right."""
        left, *rest = zip(cells, self.widths, strict=True)
        return " ".join([f"{left[0]:{left[1]}}", *(f"{c:>{w}}" for c, w in rest)]).rstrip()

    def add(self, row: Any) -> None:
        """Prints a row."""
        lines = []
        if not self.rows:
            heading = title([row], self.dtype(row), self.versions())
            lines += [*textwrap.wrap(heading, 80), ""]
            width = sum(self.widths) + len(self.widths) - 1
            lines += [f"{self.above:>{width}}"] if self.above else []
            lines += [*map(self.line, self.heading), "-" * width]
        if not self.rows or self.place(row) != self.place(self.rows[-1]):
            lines.append(self.place(row))
        cells, quartiles = self.body(row)
        lines += [*map(self.line, cells), *row.remark(quartiles)]
        self.rows.append(row)
        print("\n".join(lines), flush=True)

    def notes(self) -> list[str]:
        """What explains the table, a paragraph each."""
        return []

    def close(self) -> None:
        """Prints the notes."""
        notes = [
            *self.notes(),
            "Each ratio is the median over rounds of runs next to each other; half of the rounds"
            " lie between its quartiles. ! marks a row that was disturbed: other programs left"
            f" fewer cores than threads, or quartiles are more than {_APART}x apart.",
        ]
        if not has_torch() and not self.versions():
            notes.append(NO_TORCH)
        print("\n" + "\n".join(line for note in notes for line in textwrap.wrap(note, 80)))


class BufferTable(Table):
    """Optimizers against the ceiling and torch's implementations."""

    def __init__(self, torch: bool, compiled: bool) -> None:
        super().__init__()
        self.peers: list[str] = ["for-loop", "foreach", "fused"] if torch else []
        self.peers += ["compile"] * compiled
        self.above = "torch's time over ours" if torch else ""
        self.widths: tuple[int, ...] = (9, 5, 6, 7, 9, *(9 for _ in self.peers))
        self.heading: Sequence[Sequence[str]] = (
            ("optimizer", "bytes", "ms", "GB/s", "share", *self.peers),
            ("", "", "", "ceiling", *("quartiles" for _ in ("share", *self.peers))),
        )

    def dtype(self, row: Row) -> str:
        """Of parameters, and of gradients if it is another."""
        return row.dtype

    def body(self, row: Row) -> tuple[Sequence[Sequence[str]], list[Quartiles]]:
        """A line of ratios, and below it what is said of them."""
        peers = [row.torch.get(peer) for peer in self.peers]
        first = [
            *(row.optimizer, str(row.bytes_per_param), short(row.ms, 6), short(row.gbps, 4)),
            *(
                short(row.share_of_ceiling, 4),
                *(times(peer.ratio) if peer else "-" for peer in peers),
            ),
        ]
        second = [
            *("", "", "", short(row.ceiling_gbps, 4), between(row.share_quartiles)),
            *(between(peer.quartiles) if peer else "" for peer in peers),
        ]
        return [first, second], row.quartiles

    def notes(self) -> list[str]:
        """The columns, and what torch has not or was long in compiling."""
        told = [
            "bytes: moved in a step for each parameter. ceiling: the GB/s of a kernel that reads"
            " and writes the same streams and adds one number to each, the most that this memory"
            " (of a small n, this cache) gives; share: what of it the step reaches."
        ]
        if self.peers:
            told[0] += " Above 1x ours is faster; -: torch has no such step."
        if "/" in self.rows[0].dtype:
            told.append("torch is left out: its gradients have the type of their parameters.")
        if seconds := [
            row.torch["compile"].compile_s for row in self.rows if "compile" in row.torch
        ]:
            told.append(f"torch.compile took {min(seconds):.0f} to {max(seconds):.0f} s.")
        return told


def title(rows: Sequence[Any], dtype: str, versions: Mapping[str, str] | None = None) -> str:
    """The machine and settings of rows, in a line."""
    machine = _runtime.info()
    beside = versions or {"torch": machine["torch"] or "not installed"}
    return ", ".join(
        [
            *(dtype, f"{rows[0].threads} threads", rows[0].isa, machine["cpu"]),
            *(f"{name} {version}" for name, version in beside.items()),
        ]
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
        axes.set_yscale("log")  # torch's for-loop may be a hundredth of ours
        axes.grid(alpha=0.3)
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    grid[0][0].legend(fontsize=8)
    figure.supxlabel("elements in the buffer")
    figure.supylabel("GB/s of the step's own traffic")
    figure.suptitle(title(rows, rows[0].dtype), fontsize=10)
    figure.savefig(path, dpi=130)
