"""Measures steps of fusedstep.jax beside optax's, each in a jit with donated arrays.

`measure` returns rows; `fusedstep bench --jax` prints them by a `JaxTable` and stores them.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from fusedstep import _runtime, bench, bench_models
from fusedstep.buffers import FlatBuffer

_MAX_NORM = 1.0
_BATCH = 32  # samples of the small model's training step
_CALLS = 50  # of a training step, one after the other, before the next contender's
_POOL = "tf_XLAEigen"  # what XLA calls the threads of its pool

# {name: shape}, in any nesting.
Tree = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An optimizer by the name that its function has here and in optax, and where it steps."""

    name: str
    function: str
    hypers: Mapping[str, Any] = field(default_factory=dict)
    clips: bool = False
    tree: str | None = None  # of `TREES`; else one array
    optimizer: str = ""  # of `bench.OPTIMIZERS`, where it is not the function's name


CASES = (
    *(Case(name, name) for name in ("adamw", "adam", "nadam", "amsgrad")),
    Case("clip + adamw", "adamw", clips=True),
    *(Case(name, name) for name in ("lion", "adadelta", "rmsprop", "adagrad", "adamax")),
    Case("momentum", "sgd", {"momentum": 0.9}, optimizer="momentum"),
    Case("adamw", "adamw", tree="gpt2"),
    Case("adamw", "adamw", tree="mlp"),
)

OPTIMIZERS = tuple(dict.fromkeys(case.optimizer or case.function for case in CASES))


def gpt2() -> Tree:
    """GPT-2 small as flax would have it, queries, keys and values apart: 124,439,808 numbers."""
    d, heads = 768, 12

    def dense(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Tree:
        return {"kernel": (*inputs, *outputs), "bias": outputs}

    def norm() -> Tree:
        return {"scale": (d,), "bias": (d,)}

    def block() -> Tree:
        split = (heads, d // heads)
        attention = {name: dense((d,), split) for name in ("query", "key", "value")}
        return {
            "norm_0": norm(),
            "attention": attention | {"out": dense(split, (d,))},
            "norm_1": norm(),
            "mlp_0": dense((d,), (4 * d,)),
            "mlp_1": dense((4 * d,), (d,)),
        }

    blocks = {f"block_{i}": block() for i in range(12)}
    return {"tokens": (50257, d), "places": (1024, d), **blocks, "norm": norm()}


def mlp() -> Tree:
    """The weights of a net of four layers, 51,200 numbers."""
    return {f"layer_{i}": shape for i, shape in enumerate(bench_models.mlp())}


TREES: dict[str, Callable[[], Tree]] = {"gpt2": gpt2, "mlp": mlp}


@dataclass
class Peer:
    """Another way to the same parameters."""

    ms: float
    ratio: float  # its time over ours: above 1 ours is faster
    quartiles: bench.Quartiles
    temp_bytes: int | None = None  # what its program needs beside arguments and results


@dataclass
class Ceiling:
    """The most that memory gives, and what of it our step reaches."""

    gbps: float
    share: float
    quartiles: bench.Quartiles


@dataclass
class Row(bench.Conditions):
    """One optimizer on one tree. Times are medians over rounds, ratios medians of neighbours'."""

    optimizer: str
    tree: str | None
    leaves: int
    n: int
    ms: float
    bytes_per_param: int
    gbps: float
    ceiling: Ceiling  # of a FlatBuffer, which asks for huge pages
    pages: Ceiling  # of pages as XLA's arrays have them
    temp_bytes: int
    optax: Peer
    update: Peer  # ours in optax' form: `update`, then `apply_updates`
    numpy: Peer  # ours without JAX


@dataclass
class Share:
    """What one optimizer takes of a training step."""

    us: float  # of the step
    over_us: float  # beyond the same program without an optimizer
    quartiles: bench.Quartiles  # of that, over rounds
    temp_bytes: int


@dataclass
class Overhead(bench.Conditions):
    """A small model's training step. Times are medians over rounds of medians of calls."""

    optimizer: str
    tree: str | None
    leaves: int
    n: int
    calls: int  # of each
    gradients_us: float  # of a program with neither optimizer nor state
    without_us: float  # of one that has the state as well, and hands it on
    temp_bytes: int  # of that
    fusedstep: Share
    optax: Share
    spread: bench.Quartiles  # of the time without an optimizer over ours


def check(names: Sequence[str], rounds: int, threads: int | None) -> None:
    """Refuses what `bench.check` does, and optimizers that are not measured here."""
    bench.check([], rounds, threads)
    for name in names:
        if name not in OPTIMIZERS:
            known = ", ".join(OPTIMIZERS)
            raise bench.Refused(f"optimizers must be of {known} with --jax, got {name!r}")


def chosen(names: Sequence[str], sizes: Sequence[int]) -> list[tuple[Case, int]]:
    """What is measured: every case of these optimizers, one array in each size, and its n."""
    cases = [case for case in CASES if (case.optimizer or case.function) in names]
    sized = [(case, n) for n in sizes for case in cases if case.tree is None]
    return sized + [(case, _count(TREES[case.tree]())) for case in cases if case.tree]


def measure(
    names: Sequence[str] = OPTIMIZERS,
    sizes: Sequence[int] = (1 << 24,),
    *,
    threads: int | None = None,
    isa: str | None = None,
    rounds: int = 9,
    progress: Callable[[str], None] = lambda label: None,
    each: Callable[[Any], None] = lambda row: None,
) -> list[Any]:
    """Measures float32 steps inside of jit, params and state donated, ours against optax's.

    Args:
        names: of `OPTIMIZERS`.
        sizes: numbers of elements of one array; cases on a tree have that tree's.
        threads: for us and for XLA, which keeps those that a process's first program ran with.
        isa: the instruction set of ours.
        rounds: timings of each contender.
        progress: called with a label before each row.
        each: called with each row once it is there.

    Returns:
        A `Row` for each optimizer, an `Overhead` for the training step.

    Raises:
        ValueError: an unknown name, or a size or count that is out of range, or does not fit into
            memory, or other threads than XLA has.
    """
    check(names, rounds, threads)
    todo = chosen(names, sizes)
    for case, n in todo:
        # Three contenders inside of jit, two outside, gradients, and optax's temporary arrays.
        bench.check_size(n, 4 * 5 * (1 + _states(case)) + 12 + 12)
    import jax

    rows: list[Any] = []
    with bench._settings(threads, isa, False):
        device = _begin(_runtime.num_threads())
        with jax.default_device(device):
            for case, n in todo:
                where = case.tree or f"n = {n:,}"
                progress(f"{case.name}, {where}")
                tree = TREES[case.tree]() if case.tree else {"flat": (n,)}
                make = _overhead if case.tree == "mlp" else _row
                rows.append(make(case, tree, rounds))
                gc.collect()  # programs are parts of cycles, and keep their arrays
                each(rows[-1])
    return rows


def _begin(threads: int) -> Any:
    """The CPU as JAX's device, with a pool of that many threads."""
    import jax

    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(threads)  # which XLA reads once
    try:
        (device, *_) = jax.devices("cpu")
    finally:
        if before is None:
            del os.environ["NPROC"]
        else:
            os.environ["NPROC"] = before
    found = _pool()
    if found not in (None, threads):
        raise bench.Refused(
            f"threads must be {found}, with which XLA has begun in this process, got {threads}"
        )
    return device


def _pool() -> int | None:
    """The threads of XLA's pool; None where the system does not tell."""
    try:
        names = [one.read_text().strip() for one in Path("/proc/self/task").glob("*/comm")]
    except OSError:
        return None
    return names.count(_POOL) or None


# -- trees -----------------------------------------------------------------------------------------


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    """All leaves by their paths."""
    found: dict[str, tuple[int, ...]] = {}
    for name, one in tree.items():
        if isinstance(one, dict):
            found |= {f"{name}.{rest}": shape for rest, shape in _shapes(one).items()}
        else:
            found[name] = one
    return found


def _count(tree: Tree) -> int:
    return sum(map(prod, _shapes(tree).values()))


def _map(make: Callable[[tuple[int, ...]], Any], tree: Tree) -> Tree:
    return {
        name: _map(make, one) if isinstance(one, dict) else make(one) for name, one in tree.items()
    }


# -- contenders ------------------------------------------------------------------------------------

# `(tx, grads, state, params) -> (params, state)`
Apply = Callable[[Any, Any, Any, Any], Any]


def _in_place(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    return tx.update_params(grads, state, params)


def _update(tx: Any, grads: Any, state: Any, params: Any) -> Any:
    import optax

    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def _ours(case: Case) -> Any:
    import fusedstep.jax

    clip = {"max_norm": _MAX_NORM} if case.clips else {}
    return getattr(fusedstep.jax, case.function)(1e-3, **case.hypers, **clip)


def _optax(case: Case) -> Any:
    import optax

    tx = getattr(optax, case.function)(1e-3, **case.hypers)
    return optax.chain(optax.clip_by_global_norm(_MAX_NORM), tx) if case.clips else tx


def _states(case: Case) -> int:
    """How many arrays of the parameter's size an optimizer keeps."""
    from fusedstep.conventions import optax as ours

    opt = getattr(ours, case.function)(FlatBuffer.zeros({"flat": 1}), 1e-3, **case.hypers)
    return len(opt.state["flat"])


def _donated(
    tx: Any, apply: Apply, params: Any, gradients: Callable[[Any, Any], Any], batch: Any
) -> tuple[Callable[[], Any], int]:
    """A step of `f(params, state, batch) -> (params, state)`, and the bytes that it needs beside.

    NOTE: in this order, as JAX gives donated arrays to results of their shape by order.
    """
    import jax

    def train(params: Any, state: Any, batch: Any) -> Any:
        return apply(tx, gradients(params, batch), state, params)

    program = jax.jit(train, donate_argnums=(0, 1))
    held = [params, tx.init(params)]
    temp_bytes = _temp_bytes(program, *held, batch)

    def step() -> None:
        held[:] = program(*held, batch)
        jax.block_until_ready(held)

    return step, temp_bytes


def _temp_bytes(program: Any, *arguments: Any) -> int:
    """What a jitted function needs beside arguments and results."""
    found: int = program.lower(*arguments).compile().memory_analysis().temp_size_in_bytes
    return found


def _numpy(case: Case, n: int) -> tuple[dict[str, Callable[[], Any]], int, int]:
    """Our step without JAX, ceilings on the same memory and on small pages; then the bytes that the
    step and that the ceilings move for each parameter."""
    from fusedstep.conventions import optax as ours

    params = FlatBuffer.zeros({"flat": n})
    grads = bench._filled(params.zeros_like())
    opt = getattr(ours, case.function)(params, 1e-3, **case.hypers)
    options = {"max_norm": _MAX_NORM} if case.clips else {}
    states = list(opt.state["flat"].values())
    moved = 12 + 8 * len(states)
    step = lambda: opt.step(grads, **options)  # noqa: E731
    small, *others = (
        FlatBuffer.zeros({"flat": n}, huge_pages=False) for _ in range(2 + len(states))
    )
    filled, *own = map(bench._filled, others)
    found = {
        "numpy": step,
        "ceiling": bench._ceiling(params, grads, states),
        "pages": bench._ceiling(small, filled, [one["flat"] for one in own]),
    }
    return found, moved + 4 * case.clips, moved


def _row(case: Case, tree: Tree, rounds: int) -> Row:
    import jax.numpy as jnp
    import numpy as np

    n, leaves = _count(tree), len(_shapes(tree))
    random = np.random.default_rng(0)
    block = np.abs(random.standard_normal(min(n, 1 << 16), np.float32))
    grads = _map(lambda shape: jnp.resize(block, shape), tree)

    def donated(tx: Any, apply: Apply) -> tuple[Callable[[], Any], int]:
        return _donated(tx, apply, _map(jnp.zeros, tree), lambda _, batch: batch, grads)

    ours, temp_bytes = donated(_ours(case), _in_place)
    optax, optax_bytes = donated(_optax(case), _update)
    update, update_bytes = donated(_ours(case), _update)
    plain, moved, ceiling_bytes = _numpy(case, n)
    watch = bench.Watch()
    pairs = bench.interleave(ours, {"optax": optax, "update": update, **plain}, rounds)
    ours_s = median(s for pair in pairs.values() for s in pair.ours)

    def ceiling(name: str) -> Ceiling:
        scale, (low, high) = moved / ceiling_bytes, pairs[name].quartiles
        gbps = ceiling_bytes * n / median(pairs[name].other) / 1e9
        return Ceiling(gbps, pairs[name].ratio * scale, (low * scale, high * scale))

    def peer(name: str, temp_bytes: int | None) -> Peer:
        pair = pairs[name]
        return Peer(median(pair.other) * 1e3, pair.ratio, pair.quartiles, temp_bytes)

    return Row(
        **watch.conditions(),
        optimizer=case.name,
        tree=case.tree,
        leaves=leaves,
        n=n,
        ms=ours_s * 1e3,
        bytes_per_param=moved,
        gbps=moved * n / ours_s / 1e9,
        ceiling=ceiling("ceiling"),
        pages=ceiling("pages"),
        temp_bytes=temp_bytes,
        optax=peer("optax", optax_bytes),
        update=peer("update", update_bytes),
        numpy=peer("numpy", None),
    )


# -- a training step -------------------------------------------------------------------------------


def _overhead(case: Case, tree: Tree, rounds: int) -> Overhead:
    import jax
    import jax.numpy as jnp
    import numpy as np

    shapes = list(_shapes(tree).values())
    random = np.random.default_rng(0)

    def normal(*shape: int) -> Any:
        return jnp.asarray(random.standard_normal(shape, np.float32))

    weights = {name: normal(*shape) / shape[1] ** 0.5 for name, shape in tree.items()}
    batch = normal(_BATCH, shapes[0][1]), normal(_BATCH, shapes[-1][0])

    def loss(params: Any, batch: Any) -> Any:
        x, y = batch
        *hidden, last = params.values()
        for weight in hidden:
            x = jax.nn.relu(x @ weight.T)
        return jnp.mean((x @ last.T - y) ** 2)

    gradients = jax.jit(jax.grad(loss))
    # NOTE: the state first, as JAX gives donated arrays to results of their shape by order.
    without = jax.jit(
        lambda params, state, batch: (state, jax.grad(loss)(params, batch)), donate_argnums=1
    )
    held = [_ours(case).init(weights)]
    temp_bytes = _temp_bytes(without, weights, *held, batch)

    def alone() -> None:
        jax.block_until_ready(gradients(weights, batch))

    def handed_on() -> None:
        held[0], found = without(weights, *held, batch)
        jax.block_until_ready((held, found))

    def donated(tx: Any, apply: Apply) -> tuple[Callable[[], Any], int]:
        return _donated(tx, apply, jax.tree.map(jnp.copy, weights), jax.grad(loss), batch)

    ours, ours_bytes = donated(_ours(case), _in_place)
    optax, optax_bytes = donated(_optax(case), _update)
    steps = {"gradients": alone, "without": handed_on, "fusedstep": ours, "optax": optax}
    watch = bench.Watch()
    found = _blocks(steps, rounds)

    def share(name: str, temp_bytes: int) -> Share:
        over = [b - a for a, b in zip(found["without"], found[name], strict=True)]
        low, high = np.percentile(over, (25, 75))
        quartiles = float(low), float(high)
        return Share(median(found[name]), median(over), quartiles, temp_bytes)

    return Overhead(
        **watch.conditions(),
        optimizer=case.name,
        tree=case.tree,
        leaves=len(shapes),
        n=_count(tree),
        calls=rounds * _CALLS,
        gradients_us=median(found["gradients"]),
        without_us=median(found["without"]),
        temp_bytes=temp_bytes,
        fusedstep=share("fusedstep", ours_bytes),
        optax=share("optax", optax_bytes),
        spread=bench.Pairs(found["without"], found["fusedstep"]).quartiles,
    )


def _blocks(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Microseconds of each: in every round the median of calls in a row, the first ones aside."""
    found: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for k in range(rounds):
        for name in order[k % len(order) :] + order[: k % len(order)]:
            time.sleep(bench._REST)
            step, seconds = steps[name], []
            for _ in range(_CALLS + _CALLS // 2):
                begin = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - begin)
            found[name].append(1e6 * median(seconds[-_CALLS:]))
    return found


# -- the table -------------------------------------------------------------------------------------


def _bytes(number: float) -> str:
    """In six characters, up to 999 GB."""
    for unit in ("B", "kB", "MB"):
        if number < 999.5:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.0f} GB"


_CAPTION = (
    "Every step is a jit to which parameters and states are donated; gradients come from outside."
    " bytes: moved in a step of ours for each parameter. ceil: the GB/s of a kernel that reads and"
    " writes the same streams and adds one number to each, on a FlatBuffer; share: what of it the"
    " step reaches. pages: the same on pages as XLA's arrays have them, which are small ones where"
    " the system gives huge ones only to who asks. optax: its time over ours, above 1x ours is"
    " faster. update: of ours as optax' update and apply_updates, over update_params. NumPy: of our"
    " step without JAX, on a FlatBuffer: what it lacks to 1x is XLA's part. temp: memory that the"
    " program needs beside its arguments and results, ours above optax'."
)


class JaxTable(bench.Table):
    """Optimizers against the ceiling, optax and our own other layers; then a training step."""

    widths: tuple[int, ...] = (12, 5, 5, 5, 9, 9, 9, 6, 5, 6)
    heading: Sequence[Sequence[str]] = (
        ("optimizer", "bytes", "ms", "GB/s", "share", "pages", "optax", "update", "NumPy", "temp"),
        ("", "", "", "ceil", *("quartiles" for _ in range(3)), "", "", "optax'"),
    )

    def versions(self) -> dict[str, str]:
        """Of what XLA's side is."""
        return {name: metadata.version(name) for name in ("jax", "jaxlib", "optax")}

    def place(self, row: Any) -> str:
        """The tree, and the threads."""
        if row.tree is None:
            return super().place(row)
        what = "a training step, " if isinstance(row, Overhead) else ""
        return f"{row.tree}: {what}{row.leaves} leaves, {row.n:,} parameters; {row.ran}"

    def body(self, row: Any) -> tuple[Sequence[Sequence[str]], list[bench.Quartiles]]:
        """A line of ratios, and below it what is said of them; or a table of its own."""
        if isinstance(row, Overhead):
            return self._training(row)
        peers = row.optax, row.update, row.numpy
        shown = [row.ceiling.quartiles, row.pages.quartiles, row.optax.quartiles]
        first = [
            *(row.optimizer, str(row.bytes_per_param), bench.short(row.ms, 5)),
            *(bench.short(one, 4) for one in (row.gbps, row.ceiling.share, row.pages.share)),
            *(*(bench.times(peer.ratio) for peer in peers), _bytes(row.temp_bytes)),
        ]
        second = [
            *("", "", "", bench.short(row.ceiling.gbps, 4), *map(bench.between, shown)),
            *("", "", _bytes(row.optax.temp_bytes)),
        ]
        quartiles = [*shown, row.update.quartiles, row.numpy.quartiles]
        return [first, second], quartiles

    def _training(self, row: Overhead) -> tuple[Sequence[Sequence[str]], list[bench.Quartiles]]:
        self.widths = (19, 7, 6, 13, 6)
        lines = [
            ("us of a step", "all", "over", "quartiles", "temp"),
            ("gradients alone", f"{row.gradients_us:.1f}", "", "", ""),
            ("and state handed on", f"{row.without_us:.1f}", "", "", _bytes(row.temp_bytes)),
        ]
        shares = {row.optimizer: row.fusedstep, f"optax' {row.optimizer}": row.optax}
        for name, one in shares.items():
            between = " to ".join(f"{us:.1f}" for us in one.quartiles)
            numbers = f"{one.us:.1f}", f"{one.over_us:.1f}"
            lines.append((name, *numbers, between, _bytes(one.temp_bytes)))
        return lines, [row.spread]

    def notes(self) -> list[str]:
        """The columns."""
        told = [_CAPTION] if any(isinstance(row, Row) for row in self.rows) else []
        calls = [row.calls for row in self.rows if isinstance(row, Overhead)]
        if calls:
            told.append(
                f"The training step is forward, backward and optimizer in one jit, of {_BATCH}"
                f" samples, {calls[0]} times each; over: what is beyond the same jit without an"
                " optimizer, which hands the state on, as each array of a call costs time too."
            )
        return told
