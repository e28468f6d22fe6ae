"""What a step costs on a GPU: beside a copy of memory, beside torch.optim, and in a trace.

python bench/gpu.py -o bench/results    # writes gpu-<card>.json and gpu-<card>.md
python bench/gpu.py --small             # each rule on a few odd tensors, for compute-sanitizer
python bench/gpu.py --device cpu --n 2^16 --rounds 2    # a dry run of this script, no figures

How it measures. Contenders run in every round, next to each other, and take turns to go first;
figures are medians over rounds, ratios medians of neighbours'. GPU time is between two CUDA events
behind a kernel that keeps the GPU busy while the host submits, so that it is the GPU's own. Wall
time is of a loop of steps that one synchronize ends. A contender's time is the longer of the two.
Where all that a step touches would stay in the L2 cache, copies of it take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import torch

import fusedstep as fs
import fusedstep.torch as ft
from fusedstep.bench import OPTIMIZERS
from fusedstep.bench_models import MODELS, Shapes
from fusedstep.bench_step import CASES, Mode, torch_steps

Step = Callable[[], Any]

FUSED = ("adamw", "adam", "sgd", "momentum", "adagrad")  # torch has a fused kernel
FOREACH = ("rmsprop", "nadam", "adamax", "adadelta", "radam")  # torch has none
ONE, GPT2, THOUSAND = "one tensor", "GPT-2 small", "1,000 x 1,000"
ASKED_FUSED = {ONE: 1.0, GPT2: 1.1, THOUSAND: 1.3}  # torch's time over ours
ASKED_FOREACH = 2.0
ASKED_SHARE, ASKED_SHARE_ADAMW = 0.90, 0.92  # of a copy's bandwidth
ASKED_KERNELS = 2  # of a step with clipping

WARM_UP = 8  # steps: lazy states, code to load, and RAdam's first five, which are a simpler rule
GPU_SECONDS = 4e-3  # that one GPU timing lasts at least, by repeating short steps
WALL_SECONDS = 2e-2  # likewise a wall timing, whose one synchronize must not count
QUEUED = 16  # steps at most behind one busy kernel: the queue holds some 1,000 launches


# -- clocks ----------------------------------------------------------------------------------------


class Gpu:
    """Times by CUDA events, on the current stream."""

    dry = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        found = torch.cuda.get_device_properties(self.device)
        self.name = found.name
        self.l2 = found.L2_cache_size
        self.synchronize = torch.cuda.synchronize

    def gpu_seconds(self, run: Step, calls: int, host_seconds: float) -> float:
        """Seconds on the GPU for each of `calls` calls, which the host submits ahead."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Cycles of a clock of at most 2 GHz; as long as the host needs, and some.
        torch.cuda._sleep(int(2e9 * min(1.5 * host_seconds * calls + 1e-4, 0.2)))
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


class Dry:
    """Times a dry run on the CPU: exercises this script, measures nothing that is asked for."""

    dry = True
    name = "dry run on the CPU"
    l2 = 1 << 16

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def synchronize(self) -> None:
        """There is nothing to wait for."""

    def gpu_seconds(self, run: Step, calls: int, host_seconds: float) -> float:
        """Seconds for each of `calls` calls."""
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - begin) / calls


Clock = Gpu | Dry


@dataclass
class Times:
    """Seconds per call of one contender, one entry for each round."""

    gpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def longer(self) -> list[float]:
        """Each round's longer one of GPU and wall time."""
        return [max(pair) for pair in zip(self.gpu, self.wall, strict=True)]


class Contender:
    """A step, with how often to repeat it in one timing, found while it warms up."""

    def __init__(self, clock: Clock, step: Step, warm_up: int = WARM_UP) -> None:
        self.clock, self.step, self.times = clock, step, Times()
        for _ in range(warm_up):
            step()
        clock.synchronize()
        begin = time.perf_counter()
        step()
        self.host = time.perf_counter() - begin  # what the host takes to submit one
        clock.synchronize()
        whole = max(time.perf_counter() - begin, 1e-7)
        self.wall_calls = max(3, min(2000, math.ceil(WALL_SECONDS / whole)))
        self.gpu_calls = max(1, min(QUEUED, math.ceil(GPU_SECONDS / whole)))

    def measure(self, wall: bool) -> None:
        """Adds one timing of each kind."""
        self.clock.synchronize()
        seconds = self.clock.gpu_seconds(self.step, self.gpu_calls, self.host)
        self.times.gpu.append(seconds)
        if not wall:
            return
        self.clock.synchronize()
        begin = time.perf_counter()
        for _ in range(self.wall_calls):
            self.step()
        self.clock.synchronize()
        self.times.wall.append((time.perf_counter() - begin) / self.wall_calls)


def rounds_of(contenders: Sequence[Contender], rounds: int, wall: bool) -> None:
    """Measures all contenders in each round; they take turns to go first."""
    for k in range(rounds):
        for contender in contenders if k % 2 == 0 else reversed(contenders):
            contender.measure(wall)


def ratio(others: Sequence[float], ours: Sequence[float]) -> float:
    """The median over rounds of their time over ours."""
    return median(b / a for a, b in zip(ours, others, strict=True))


# -- what is measured ------------------------------------------------------------------------------


@dataclass
class Sweep:
    """One rule over one large tensor, beside a copy of memory."""

    rule: str
    dtype: str
    n: int
    ms: float
    bytes_per_param: int
    gbps: float
    copy_gbps: float  # bytes read and written
    share: float  # of the copy's bandwidth, the median over rounds


@dataclass
class Versus:
    """A step of ours and one of torch. Ratios are torch's time over ours: above 1 we are faster."""

    what: str
    rule: str
    layout: str
    dtype: str
    tensors: int
    n: int
    sets: int  # copies that take turns
    peer: str
    ours_gpu_ms: float
    peer_gpu_ms: float
    ours_wall_ms: float
    peer_wall_ms: float
    gpu_ratio: float
    wall_ratio: float
    ratio: float  # of the longer ones
    note: str = ""


@dataclass
class Piece:
    """AdamW on one large tensor, where a step does more than update or streams are narrow."""

    mode: str
    n: int
    ms: float
    bytes_per_param: float
    gbps: float
    share: float  # of the copy's bandwidth, the median over rounds
    plain: float  # plain float32 AdamW's time over this one's
    peer: float | None  # torch's, which does the same by its fused step and further calls


@dataclass
class Trace:
    """What the profiler saw of one step on GPT-2 small's shapes."""

    what: str
    kernels: int
    copies: list[str]  # on the GPU, by kind
    syncs: list[str]  # calls that make the host wait
    reads: list[str]  # torch's reads of a tensor's value, which on a GPU come with such a call
    launches: int  # calls of the runtime and the driver that launch kernels
    kernel_names: list[str]


@dataclass
class Failure:
    """A part that raised; the others go on."""

    part: str
    error: str
    details: str


@dataclass
class Asked:
    """A line of the summary."""

    asked: str
    measured: str
    met: bool | None  # None: not measured


@dataclass
class Results:
    """All figures of a run and the machine that they are from."""

    machine: dict[str, Any]
    sweeps: list[Sweep] = field(default_factory=list)
    versus: list[Versus] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    traces: list[Trace] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0


def _first_line(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def machine(clock: Clock) -> dict[str, Any]:
    """The card and the versions that figures depend on."""
    nvcc = _first_line(["sh", "-c", "nvcc --version | grep -o 'release [0-9.]*'"])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = {}
    for package in ("torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "card": clock.name,
        "dry_run": clock.dry,
        "driver": None if clock.dry else _first_line(query),
        "cuda": torch.version.cuda,
        "nvcc": nvcc and nvcc.removeprefix("release "),
        **versions,
        "fusedstep": fs.info(),
    }


# -- building contenders ---------------------------------------------------------------------------


def states_of(opt: torch.optim.Optimizer, param: torch.Tensor) -> list[torch.Tensor]:
    """The states that are as large as the parameter: streams of the step."""
    return [
        value
        for value in opt.state[param].values()
        if isinstance(value, torch.Tensor) and value.shape == param.shape and value.dim()
    ]


def bytes_per_param(opt: torch.optim.Optimizer, param: torch.Tensor) -> int:
    """Each stream once, and once more where it is written."""
    grad = param.grad
    assert grad is not None
    states = sum(state.element_size() for state in states_of(opt, param))
    return 2 * param.element_size() + grad.element_size() + 2 * states


def moved_by(mode: Mode, opt: torch.optim.Optimizer, param: torch.Tensor) -> float:
    """Bytes per parameter of a mode: each array where it is read and where it is written."""
    assert param.grad is not None
    passes = 1 + ("max_norm" in mode.step) + ("zero_grad" in mode.step)
    moved: float = 2 * param.itemsize + passes * param.grad.itemsize + 2 * mode.shadow
    kept = [value for value in opt.state[param].values() if isinstance(value, torch.Tensor)]
    return moved + sum(2 * value.nbytes for value in kept if value.dim()) / param.numel()


def parameters(
    shapes: Shapes, dtype: torch.dtype, device: torch.device
) -> list[torch.nn.Parameter]:
    """Small random parameters, whose gradients are random and stay where they are."""
    params = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, device=device, dtype=dtype).mul_(0.02))
        param.grad = torch.randn(shape, device=device, dtype=dtype)
        params.append(param)
    return params


def same_gradients(params: Sequence[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """Parameters of their own over the same gradients, which a step only reads."""
    copies = []
    for param in params:
        copy = torch.nn.Parameter(param.detach().clone())
        copy.grad = param.grad
        copies.append(copy)
    return copies


def in_turn(steps: Sequence[Step]) -> Step:
    """A step that runs each of `steps` in turn, so that none finds its data in the cache."""
    if len(steps) == 1:
        return steps[0]
    turn = itertools.cycle(steps)
    return lambda: next(turn)()


def sets_for(moved: int, clock: Clock) -> int:
    """Copies of what a step touches that together are more than four times the L2 cache."""
    return 1 if moved > 4 * clock.l2 else max(3, math.ceil(4 * clock.l2 / moved))


def torch_accepts(name: str, flag: str) -> bool:
    """Whether torch's class of this rule has an argument."""
    cls = getattr(torch.optim, OPTIMIZERS[name][0])
    return flag in inspect.signature(cls).parameters


def torch_optimizer(name: str, params: Any, how: str, **more: Any) -> torch.optim.Optimizer:
    """torch's optimizer of a rule in one of its implementations."""
    cls, kwargs = OPTIMIZERS[name]
    return getattr(torch.optim, cls)(params, **{**kwargs, **more}, **{how: True})


def our_optimizer(name: str, params: Any, **more: Any) -> torch.optim.Optimizer:
    """Ours, the same arguments."""
    cls, kwargs = OPTIMIZERS[name]
    return getattr(ft, cls)(params, **{**kwargs, **more})


def best_how(name: str, device: torch.device) -> tuple[str, str]:
    """torch's best implementation of a rule on a device, and why it is not the fused one."""
    if not torch_accepts(name, "fused"):
        return "foreach", ""
    param = parameters([(4,)], torch.float32, device)
    try:
        torch_optimizer(name, param, "fused").step()
    except RuntimeError as error:
        return "foreach", f"torch {torch.__version__} refuses fused here: {str(error)[:90]}"
    return "fused", ""


def captured(opt: torch.optim.Optimizer, step: Step) -> Step:
    """A step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a first step makes must be there before the capture
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()

    def replay(opt: torch.optim.Optimizer = opt) -> None:  # which keeps what the graph points to
        graph.replay()

    return replay


# -- figures ---------------------------------------------------------------------------------------


class Bench:
    """Measures, and keeps what it has measured."""

    def __init__(self, clock: Clock, n: int, rounds: int, budget: float) -> None:
        self.clock, self.n, self.rounds = clock, n, rounds
        self.begin = time.perf_counter()
        self.deadline = self.begin + budget
        self.results = Results(machine(clock))
        self.hows: dict[str, tuple[str, str]] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Keeps what raises inside from ending the others, and gives the memory back."""
        begin = time.perf_counter()
        state = ""
        try:
            yield
        except Exception as error:
            state = f"  FAILED: {type(error).__name__}: {str(error)[:200]}"
            details = traceback.format_exc()
            self.results.failures.append(
                Failure(name, f"{type(error).__name__}: {error}"[:500], details[-4000:])
            )
        if not self.clock.dry:
            with contextlib.suppress(RuntimeError):  # after an error that CUDA keeps repeating
                torch.cuda.empty_cache()
        print(f"{time.perf_counter() - self.begin:6.1f} s  {name}"
              f" ({time.perf_counter() - begin:.1f} s){state}", flush=True)  # fmt: skip

    def late(self, name: str) -> bool:
        """Whether there is no time left, in which case the part is named as left out."""
        if time.perf_counter() < self.deadline:
            return False
        self.results.left_out.append(name)
        return True

    @functools.cached_property
    def copy(self) -> Step:
        """A copy of 2^30 bytes, within the device: the speed of memory."""
        n = min(1 << 28, 2 * self.n)
        source = torch.ones(n, device=self.clock.device)
        target = torch.empty_like(source)
        self.copied = 2 * 4 * n
        return lambda: target.copy_(source)

    def sweep(self, name: str, dtype: torch.dtype = torch.float32) -> None:
        """One rule over one tensor of n elements."""
        params = parameters([(self.n,)], dtype, self.clock.device)
        opt = our_optimizer(name, params)
        ours, copy = Contender(self.clock, opt.step), Contender(self.clock, self.copy)
        moved = bytes_per_param(opt, params[0])
        rounds_of([ours, copy], self.rounds, wall=False)
        seconds, copying = median(ours.times.gpu), median(copy.times.gpu)
        share = ratio(copy.times.gpu, ours.times.gpu) * moved * self.n / self.copied
        row = Sweep(
            rule=name,
            dtype=str(dtype).removeprefix("torch."),
            n=self.n,
            ms=1e3 * seconds,
            bytes_per_param=moved,
            gbps=moved * self.n / seconds / 1e9,
            copy_gbps=self.copied / copying / 1e9,
            share=share,
        )
        self.results.sweeps.append(row)
        print(f"          {row.gbps:7.0f} GB/s, {row.share:.3f} of a copy's", flush=True)

    def piece(self, mode: Mode, peer: str | None) -> None:
        """A mode beside the copy, plain AdamW and torch's calls for the same."""
        (plain_param,) = parameters([(self.n,)], torch.float32, self.clock.device)
        (param,) = parameters([(self.n,)], getattr(torch, mode.param), self.clock.device)
        if mode.grad != mode.param:
            param.grad, param.grad_dtype = None, getattr(torch, mode.grad)
            param.grad = torch.randn(self.n, device=self.clock.device, dtype=param.grad_dtype)
        options = dict(mode.step)
        if mode.shadow:
            options["shadow"] = [torch.empty_like(param, dtype=torch.bfloat16)]
        opt = ft.AdamW([param], **mode.how)
        steps = [
            functools.partial(opt.step, **options),
            self.copy,
            our_optimizer("adamw", [plain_param]).step,
        ]
        if peer:
            steps.append(torch_steps(mode, self.n, [peer], self.clock.device)[peer].step)
        contenders = [Contender(self.clock, step) for step in steps]
        rounds_of(contenders, self.rounds, wall=False)
        ours, copy, plain, *others = (contender.times.gpu for contender in contenders)
        moved, seconds = moved_by(mode, opt, param), median(ours)
        row = Piece(
            mode=mode.name,
            n=self.n,
            ms=1e3 * seconds,
            bytes_per_param=moved,
            gbps=moved * self.n / seconds / 1e9,
            share=ratio(copy, ours) * moved * self.n / self.copied,
            plain=ratio(plain, ours),
            peer=ratio(others[0], ours) if others else None,
        )
        self.results.pieces.append(row)
        print(f"          {row.gbps:7.0f} GB/s, {row.share:.3f} of a copy's", flush=True)

    def shapes(self, layout: str) -> Shapes:
        """The shapes of a layout."""
        if layout == ONE:
            return [(self.n,)]
        shapes = MODELS["gpt2" if layout == GPT2 else "1000x1000"]()
        if self.clock.dry:  # the same number of tensors
            return [tuple(min(size, 40) for size in shape) for shape in shapes]
        return shapes

    def versus(
        self,
        name: str,
        layout: str,
        *,
        what: str = "step",
        flat: bool = False,
        clip: bool = False,
        graph: bool = False,
        dtype: torch.dtype = torch.float32,
        note: str = "",
    ) -> None:
        """A step of ours beside torch's best."""
        if name not in self.hows:
            self.hows[name] = best_how(name, self.clock.device)
        how, why = self.hows[name]
        shapes = self.shapes(layout)
        n = sum(map(prod, shapes))
        more = {"capturable": True} if graph else {}
        ours: list[Step] = []
        theirs: list[Step] = []
        sets = 1
        while len(ours) < sets:
            params = parameters(shapes, dtype, self.clock.device)
            copies = same_gradients(params)
            # torch's clipping scales the gradients; ours reads gradients of its own.
            for copy in copies if clip else []:
                copy.grad = copy.grad.clone()
            if flat:
                ft.flatten_(params)
            mine = our_optimizer(name, params, **more)
            peer = torch_optimizer(name, copies, how, **more)
            if not ours:  # the states, which the first step makes, say what a step touches
                mine.step()
                sets = sets_for(bytes_per_param(mine, params[0]) * n, self.clock)
            ours.append(self._our_step(mine, clip, graph))
            theirs.append(self._their_step(peer, copies, clip, graph))
        # Each of the sets is warmed up: all of them make their states in the first step.
        contenders = [
            Contender(self.clock, in_turn(steps), warm_up=WARM_UP * sets)
            for steps in (ours, theirs)
        ]
        rounds_of(contenders, self.rounds, wall=True)
        found, beside = (contender.times for contender in contenders)
        row = Versus(
            what=what,
            rule=name,
            layout=layout,
            dtype=str(dtype).removeprefix("torch."),
            tensors=len(shapes),
            n=n,
            sets=sets,
            peer=f"clip_grad_norm_ + {how}" if clip else how,
            ours_gpu_ms=1e3 * median(found.gpu),
            peer_gpu_ms=1e3 * median(beside.gpu),
            ours_wall_ms=1e3 * median(found.wall),
            peer_wall_ms=1e3 * median(beside.wall),
            gpu_ratio=ratio(beside.gpu, found.gpu),
            wall_ratio=ratio(beside.wall, found.wall),
            ratio=ratio(beside.longer, found.longer),
            note="; ".join(filter(None, [note, why])),
        )
        self.results.versus.append(row)
        print(f"          {row.ratio:.2f}x against {row.peer}", flush=True)

    @staticmethod
    def _our_step(opt: Any, clip: bool, graph: bool) -> Step:
        step = functools.partial(opt.step, max_norm=1.0) if clip else opt.step
        return captured(opt, step) if graph else step

    @staticmethod
    def _their_step(opt: Any, params: Any, clip: bool, graph: bool) -> Step:
        def clipped() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()

        step = clipped if clip else opt.step
        return captured(opt, step) if graph else step

    def trace(self, what: str, ours: bool, clip: bool) -> None:
        """One step under the profiler, GPT-2 small's shapes."""
        params = parameters(self.shapes(GPT2), torch.float32, self.clock.device)
        opt = our_optimizer("adamw", params) if ours else torch_optimizer("adamw", params, "fused")
        step = (
            self._our_step(opt, clip, False) if ours else self._their_step(opt, params, clip, False)
        )
        for _ in range(3):
            step()
        self.clock.synchronize()
        profile(lambda: torch.ones(1, device=self.clock.device), self.clock)  # loads the profiler
        found = profile(step, self.clock)
        self.results.traces.append(read_trace(found, what))


# Those of `fusedstep bench --step`, and the ways of rounding that it leaves out.
MODES: list[tuple[Mode, str | None]] = [
    (case.mode, "torch fused" if "torch fused" in case.peers else None)
    for case in CASES
    if not case.where
]
MODES += [
    (
        Mode("AdamW, q8 states to nearest", how={"state_dtype": "q8", "state_rounding": "nearest"}),
        None,
    ),
    (
        Mode(
            "bf16 kahan, bf16 gradients",
            param="bfloat16",
            grad="bfloat16",
            how={"rounding": "kahan"},
        ),
        None,
    ),
    (
        Mode(
            "bf16 stochastic, bf16 grads",
            param="bfloat16",
            grad="bfloat16",
            how={"rounding": "stochastic"},
        ),
        None,
    ),
]

MARK = "the measured step"
# Calls of CUDA that make the host wait, or may.
WAITS = re.compile(
    r"(cuda|cu)(Device|Stream|Event|Ctx)Synchronize(_ptsz|_v\d+)?|cuda(Memcpy|Memset)(_ptds|_v\d+)?"
    r"|cuMemcpy(HtoD|DtoH|DtoD)?(_v2)?(_ptds)?|cu(da)?(Malloc|MemAlloc|Free|MemFree)(_v2)?"
)


READS = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def profile(step: Step, clock: Clock) -> list[dict[str, Any]]:
    """The events of one call, as the profiler's own trace file has them."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not clock.dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # remarks on the profiler's own options
        with torch.profiler.profile(activities=activities) as found:
            with torch.profiler.record_function(MARK):
                step()
            clock.synchronize()  # outside of the mark: not the step's
        path = Path(folder, "trace.json")
        found.export_chrome_trace(str(path))
        with path.open() as file:
            events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def read_trace(events: Sequence[dict[str, Any]], what: str) -> Trace:
    """What a trace says of the one step in it."""
    events = [e for e in events if e.get("ph") == "X"]
    marks = [e for e in events if e["name"] == MARK and e.get("cat") == "user_annotation"]
    if len(marks) != 1:
        raise RuntimeError(f"the trace must have {MARK!r} once, got it {len(marks)} times")
    begin, end = marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]

    def kind(*categories: str) -> list[dict[str, Any]]:
        return [e for e in events if e.get("cat") in categories]

    host = [e for e in kind("cuda_runtime", "cuda_driver", "cpu_op") if begin <= e["ts"] <= end]
    kernels = [e["name"] for e in kind("kernel")]
    return Trace(
        what=what,
        kernels=len(kernels),
        copies=sorted(e["name"] for e in kind("gpu_memcpy", "gpu_memset")),
        syncs=sorted(e["name"] for e in host if WAITS.fullmatch(e["name"])),
        reads=sorted(e["name"] for e in host if e["name"] in READS),
        launches=sum("Launch" in e["name"] for e in host),
        kernel_names=[name[:120] for name in kernels[:40]],
    )


# -- the summary -----------------------------------------------------------------------------------


def _share_lines(sweeps: Sequence[Sweep]) -> list[Asked]:
    rows = [row for row in sweeps if row.dtype == "float32"]
    adamw = [row for row in rows if row.rule == "adamw"]
    lines = []
    text = f"AdamW, one tensor, float32: >= {ASKED_SHARE_ADAMW:.2f} of a copy's bandwidth"
    if adamw:
        row = adamw[0]
        measured = f"{row.share:.3f} ({row.gbps:.0f} of {row.copy_gbps:.0f} GB/s, n = {row.n:,})"
        lines.append(Asked(text, measured, row.share >= ASKED_SHARE_ADAMW))
    else:
        lines.append(Asked(text, "-", None))
    text = f"each of {len(OPTIMIZERS)} rules, one tensor, float32: >= {ASKED_SHARE:.2f}"
    if rows:
        least = min(rows, key=lambda row: row.share)
        measured = f"{least.share:.3f} at least, {least.rule}'s; {len(rows)} rules"
        enough = least.share >= ASKED_SHARE
        lines.append(Asked(text, measured, enough if len(rows) == len(OPTIMIZERS) else None))
    else:
        lines.append(Asked(text, "-", None))
    return lines


def _ratio_line(rows: Sequence[Versus], names: Sequence[str], layout: str, least: float) -> Asked:
    how = "fused" if names is FUSED else "foreach"
    text = f"{layout}, {', '.join(names)}: torch's {how} / ours >= {least:.1f}"
    found = [
        row
        for row in rows
        if (row.what, row.layout, row.dtype) == ("step", layout, "float32") and row.rule in names
    ]
    if not found:
        return Asked(text, "-", None)
    measured = ", ".join(
        f"{row.ratio:.2f}" + (f" ({row.peer})" if row.peer != how else "") for row in found
    )
    met = all(row.ratio >= least for row in found)
    if len(found) < len(names):
        missing = [name for name in names if name not in {row.rule for row in found}]
        measured += f"; not measured: {', '.join(missing)}"
        return Asked(text, measured, False if not met else None)
    return Asked(text, measured, met)


def _counted(names: Sequence[str]) -> str:
    """Names, each once, with how often it is there; the most frequent ones."""
    found = Counter(names).most_common(4)
    return ", ".join(f"{n} x {name}" if n > 1 else name for name, n in found) or "none"


def summary(results: Results) -> list[Asked]:
    """What was asked for, beside what was measured."""
    lines = _share_lines(results.sweeps)
    for layout, least in ASKED_FUSED.items():
        lines.append(_ratio_line(results.versus, FUSED, layout, least))
    for layout in ASKED_FUSED:
        lines.append(_ratio_line(results.versus, FOREACH, layout, ASKED_FOREACH))
    traces = [trace for trace in results.traces if trace.what == CLIPPED]
    for text, measure, met in (
        ("GPT-2 small, AdamW with clipping: the host waits 0 times in a step",
         lambda t: f"{len(t.syncs)}; waits: {_counted(t.syncs)}; reads: {_counted(t.reads)}",
         lambda t: not t.syncs),
        (f"GPT-2 small, AdamW with clipping: <= {ASKED_KERNELS} kernels",
         lambda t: f"{t.kernels}, copies {len(t.copies)}",
         lambda t: 0 < t.kernels <= ASKED_KERNELS),
    ):  # fmt: skip
        lines.append(Asked(text, measure(traces[0]), met(traces[0])) if traces
                     else Asked(text, "-", None))  # fmt: skip
    return lines


CLIPPED = "ours, AdamW with clipping"
_WORDS = {True: "yes", False: "**no**", None: "not measured"}


def _table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "/") for c in r) + " |" for r in lines)


def markdown(results: Results) -> str:
    """The results as a page."""
    m = results.machine
    facts = [f"driver {m['driver']}", f"CUDA {m['cuda']} (torch), {m['nvcc']} (nvcc)"]
    facts += [f"torch {m.get('torch')}", f"fusedstep {m['fusedstep']['version']}"]
    parts = [f"# {m['card']}", ", ".join(facts) + f". `{m['command']}`, {results.seconds:.0f} s."]
    if m["dry_run"]:
        parts.append("**A dry run on the CPU: it exercises the script. None of this is a figure.**")
    lines = [(a.asked, a.measured, _WORDS[a.met]) for a in summary(results)]
    parts += ["## What was asked", _table(["asked", "measured", "met?"], lines)]
    if results.sweeps:
        rows = [
            (s.rule, s.dtype, f"{s.n:,}", s.bytes_per_param, f"{s.ms:.3f}", f"{s.gbps:.0f}",
             f"{s.copy_gbps:.0f}", f"{s.share:.3f}")
            for s in results.sweeps
        ]  # fmt: skip
        headings = ["rule", "dtype", "n", "bytes/param", "ms", "GB/s", "copy, GB/s", "share"]
        parts += ["## Beside a copy of memory", _table(headings, rows)]
    if results.versus:
        rows = [
            (v.what, v.rule, v.layout, v.dtype, v.peer,
             f"{v.ours_gpu_ms:.3f} / {v.ours_wall_ms:.3f}",
             f"{v.peer_gpu_ms:.3f} / {v.peer_wall_ms:.3f}", f"{v.gpu_ratio:.2f}x",
             f"{v.wall_ratio:.2f}x", f"{v.ratio:.2f}x", v.note or "-")
            for v in results.versus
        ]  # fmt: skip
        headings = ["what", "rule", "tensors", "dtype", "torch's", "ours, ms GPU / wall",
                    "torch's, ms GPU / wall", "GPU", "wall", "ratio", "note"]  # fmt: skip
        text = "Ratios: torch's time over ours. The last is of the longer of GPU and wall time."
        parts += ["## Beside torch.optim", text, _table(headings, rows)]
    if results.pieces:
        rows = [
            (p.mode, f"{p.bytes_per_param:.2f}", f"{p.ms:.3f}", f"{p.gbps:.0f}", f"{p.share:.3f}",
             f"{p.plain:.2f}x", f"{p.peer:.2f}x" if p.peer else "-")
            for p in results.pieces
        ]  # fmt: skip
        headings = ["AdamW", "bytes/param", "ms", "GB/s", "share", "plain's", "torch's"]
        text = (
            "One tensor. The last two: plain float32 AdamW's time over this one's, and torch's for"
            " the same by clip_grad_norm_, fused AdamW, _foreach_lerp_, _foreach_copy_, zero_grad."
        )
        parts += ["## All of a step in one sweep, and narrow streams", text, _table(headings, rows)]
    if results.traces:
        rows = [
            (t.what, t.kernels, t.launches, _counted(t.copies), _counted(t.syncs),
             _counted(t.reads), _counted(t.kernel_names))
            for t in results.traces
        ]  # fmt: skip
        headings = ["step", "kernels", "launches", "copies", "host waits", "reads of values",
                    "kernels' names"]  # fmt: skip
        parts += ["## In a trace: GPT-2 small's 148 tensors", _table(headings, rows)]
    if results.left_out:
        parts.append("Left out (no time left, or as it says): " + "; ".join(results.left_out) + ".")
    for failure in results.failures:
        parts.append(f"Failed: {failure.part}: `{failure.error}`")
    return "\n\n".join(parts) + "\n"


def write(results: Results, folder: Path) -> Path:
    """Writes the figures, and returns the page's path."""
    slug = "dry-run" if results.machine["dry_run"] else results.machine["card"]
    slug = re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**asdict(results), "asked": [asdict(line) for line in summary(results)]}
    (folder / f"gpu-{slug}.json").write_text(json.dumps(whole, indent=1, default=str) + "\n")
    page = folder / f"gpu-{slug}.md"
    page.write_text(markdown(results))
    return page


def show(page: str) -> None:
    """Prints a page, as tables where rich is there to draw them on a terminal."""
    if sys.stdout.isatty() and importlib.util.find_spec("rich"):
        from rich.console import Console
        from rich.markdown import Markdown

        Console().print(Markdown(page))
    else:
        print(page)


# -- for compute-sanitizer -------------------------------------------------------------------------


SMALL = (1, 7, 33, 257, 2049, 4099)  # below, at and above what a thread and a block take


def small(device: torch.device) -> int:
    """Steps each rule, with and without clipping, over unaligned tensors with nothing behind them.

    Compares with the CPU to the bit, so that what the sanitizer looked at did what it should.
    Returns the number of rules and types that failed.
    """
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (name, dtype, {})
        for name in OPTIMIZERS
        for dtype in ("float32", "float64", "bfloat16", "float16")
    ]
    cases += [("adamw", mode.param, dict(mode.how)) for mode, _ in MODES if mode.how]
    failed = 0
    for name, dtype, how in cases:
        label = ", ".join([name, dtype, *map(str, how.values())])
        try:
            got, want = (_small_steps(name, dtype, how, place) for place in (device, None))
            wrong = {len(a) for a, b in zip(got, want, strict=True) if not a.equal(b)}
            problem = f"differs from the CPU's at lengths {sorted(wrong)}" if wrong else ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            failed += 1
            print(f"FAILED {label}: {problem}", flush=True)
        else:
            print(f"ok {label}", flush=True)
    return failed


def _small_steps(
    name: str, dtype: str, how: dict[str, Any], device: torch.device | None
) -> list[torch.Tensor]:
    """Parameters and averages after four steps, plain, clipped, and with all that a step can do
    beside; on the CPU without a device."""
    generator = torch.Generator().manual_seed(3)
    params = []
    for n in SMALL:
        values = [torch.randn(n, generator=generator).to(getattr(torch, dtype)) for _ in range(2)]
        # Made on the CPU and copied: under the sanitizer each kernel of torch's costs time.
        param, grad = (_one_in(value, device) for value in values)
        params.append(torch.nn.Parameter(param))
        params[-1].grad = grad
    opt = our_optimizer(name, params, **how)
    copies = [_one_in(torch.zeros(n, dtype=torch.float16), device) for n in SMALL]
    opt.step()
    opt.step(max_norm=0.5)
    opt.step(max_norm=1e9, skip_nonfinite=True)
    opt.step(ema=0.9, shadow=copies, zero_grad=True, clip_value=0.3)
    written = [*params, *copies, *(param.grad for param in params)]
    written += [opt.state[param]["ema"] for param in params]
    return [array.detach().cpu() for array in written]


def _one_in(values: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    """The values one element into an allocation that ends with them."""
    memory = torch.empty(values.numel() + 1, dtype=values.dtype, device=device or "cpu")
    memory[1:].copy_(values)
    return memory[1:]


# -- the command -----------------------------------------------------------------------------------


def _count(text: str) -> int:
    base, caret, power = text.partition("^")
    try:
        number = int(base) ** int(power) if caret else int(float(text))
    except (ValueError, OverflowError):
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1 (1000, 1e6, 2^27), got {text!r}")
    return number


def figures(bench: Bench) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Every figure: its part, its name, and what measures it. What is asked for comes first."""
    for name in OPTIMIZERS:
        yield "sweep", f"sweep: {name}", functools.partial(bench.sweep, name)
    for layout in (THOUSAND, GPT2, ONE):
        for name in (*FUSED, *FOREACH):
            run = functools.partial(bench.versus, name, layout)
            yield "versus", f"{layout}: {name}", run
    for what, layouts, options in (
        ("clipped step", (GPT2, THOUSAND), {"clip": True}),
        ("step after flatten_", (GPT2, THOUSAND), {"flat": True}),
        ("clipped step after flatten_", (GPT2,), {"flat": True, "clip": True}),
        ("graph replay", (GPT2, THOUSAND), {"graph": True}),
        ("clipped graph replay", (GPT2,), {"graph": True, "clip": True}),
        ("step", (ONE, GPT2), {
            "dtype": torch.bfloat16,
            "note": "ours keeps float32 moments, 22 bytes per parameter, torch bfloat16, 14",
        }),
    ):  # fmt: skip
        for layout in layouts:
            run = functools.partial(bench.versus, "adamw", layout, what=what, **options)
            kind = "bfloat16 " if "dtype" in options else ""
            yield "extra", f"{layout}: adamw, {kind}{what}", run
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        run = functools.partial(bench.sweep, "adamw", dtype)
        yield "extra", f"sweep: adamw, {str(dtype).removeprefix('torch.')}", run
    for mode, peer in MODES:
        yield "piece", f"piece: {mode.name}", functools.partial(bench.piece, mode, peer)
    for what, ours, clip in (  # last: the profiler, once loaded, may slow down what follows
        (CLIPPED, True, True),
        ("ours, AdamW", True, False),
        ("torch, clip_grad_norm_ + fused AdamW", False, True),
    ):
        run = functools.partial(bench.trace, what, ours=ours, clip=clip)
        yield "trace", f"trace: {what}", run


def main() -> int:
    """Measures all figures; 1 if a part of them failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results",
                        help="the folder to write into (bench/results)")  # fmt: skip
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda",
                        help="cpu: a dry run of this script")  # fmt: skip
    parser.add_argument("--n", type=_count, default=1 << 27,
                        help="elements of the one tensor (2^27)")  # fmt: skip
    parser.add_argument("--rounds", type=_count, default=9, help="timings of each (%(default)s)")
    parser.add_argument("--budget", type=float, default=225.0, metavar="SECONDS",
                        help="begin no figure after as many (%(default)s)")  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=["sweep", "versus", "piece", "extra", "trace"],
                        help="parts (all)")  # fmt: skip
    parser.add_argument("--small", action="store_true",
                        help="step each rule on small tensors, for compute-sanitizer")  # fmt: skip
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("bench/gpu.py: torch finds no CUDA device; --device cpu is a dry run",
              file=sys.stderr)  # fmt: skip
        return 2
    if args.small:
        return 1 if small(torch.device(args.device)) else 0

    torch.manual_seed(0)
    clock = Gpu() if args.device == "cuda" else Dry()
    bench = Bench(clock, args.n, args.rounds, args.budget)
    shown = dict(vars(args), n=f"{args.n}")
    options = [f"--{key}={shown[key]}" for key in ("device", "n", "rounds")]
    bench.results.machine["command"] = shlex.join(["python", "bench/gpu.py", *options])
    print(f"{clock.name}, torch {torch.__version__}, fusedstep {fs.__version__}", flush=True)
    for part, name, run in figures(bench):
        if args.only and part not in args.only:
            continue
        if part != "trace" and bench.late(name):  # traces take no time
            continue
        if clock.dry and "graph" in name:
            bench.results.left_out.append(f"{name} (needs CUDA)")
            continue
        with bench.part(name):
            run()
        bench.results.seconds = time.perf_counter() - bench.begin
        write(bench.results, args.output)  # after each, so that a time limit takes only the rest
    page = write(bench.results, args.output)
    show(page.read_text())
    print(f"written: {page} and {page.with_suffix('.json').name}")
    return 1 if bench.results.failures or (bench.results.left_out and not clock.dry) else 0


if __name__ == "__main__":
    sys.exit(main())
