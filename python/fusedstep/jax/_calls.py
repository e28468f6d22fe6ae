"""The engine's stages as calls inside XLA's programs: measure, prepare, sweep.

Each is a function of arrays. Counts, what a rule carries, and rows of scalars are arrays too, so
that a program keeps nothing between two calls, and may be cached, batched and run anywhere on the
CPU.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedstep import _core
from fusedstep._hypers import HYPERS, at_step
from fusedstep.schedules import Schedule, from_dict

FORMATS = {name: number for number, name in enumerate(_core.stream_formats())}


def _module() -> Any:
    """`fusedstep._jax`, its functions registered with XLA."""
    try:
        module = importlib.import_module("fusedstep._jax")
    except ImportError as error:
        raise ImportError(
            "fusedstep.jax needs fusedstep._jax, which this build has not: install fusedstep from"
            " source where jaxlib is, as FUSEDSTEP_JAX=1 pip install 'fusedstep[jax]'"
            f" --no-binary fusedstep ({error})"
        ) from error
    built, found = module.FFI_VERSION, _ffi_version()
    if built[0] != found[0] or built[1] > found[1]:
        version = importlib.import_module("jaxlib.version").__version__
        raise ImportError(
            "jaxlib must speak XLA's FFI {}.{} or a later {}.x, for which this fusedstep._jax was"
            " built, got jaxlib {} with {}.{}".format(*built, built[0], version, *found)
        )
    module.use(_core.stages(), _values)
    targets = module.targets()
    elsewhere = targets.pop("elsewhere")
    for name, handler in targets.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
        for platform in ("CUDA", "ROCM"):  # where a call must say what is wrong
            jax.ffi.register_ffi_target(name, elsewhere, platform=platform)
    return module


def _ffi_version() -> tuple[int, int]:
    """That of jaxlib's FFI, by its header: nothing else tells before it refuses to start at all."""
    text = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text()
    major, minor = re.findall(r"#define XLA_FFI_API_M(?:AJOR|INOR) (\d+)", text)
    return int(major), int(minor)


# -- schedules -------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _schedules(text: str) -> tuple[tuple[str, Schedule], ...]:
    return tuple((name, from_dict(one)) for name, one in json.loads(text))


def _values(text: str, t: int) -> list[float]:
    """The schedules of a text at step t, checked as ever: called by XLA's threads."""
    return [
        at_step(name, schedule, t, HYPERS[name.split("[")[0]]) if name else schedule(t)
        for name, schedule in _schedules(text)
    ]


def text_of(schedules: Iterable[tuple[str, Schedule]]) -> str:
    """Schedules and what they stand for as a part of a program: any process reads them back."""
    return json.dumps([(name, schedule.to_dict()) for name, schedule in schedules])


def scheduled(schedule: Schedule, count: Any) -> Any:
    """The value of one of our schedules at a traced step: to the bit, before it is rounded."""
    if not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"t must be an int or an array of ints, got {jax.typeof(count)}")
    count = count.astype(jnp.int64 if jax.config.jax_enable_x64 else jnp.int32)
    result = like(count, dtype=floating())
    call = jax.ffi.ffi_call("fusedstep_schedule", result, vmap_method="broadcast_all")
    return call(count, text=text_of([("", schedule)]))


# -- what varies between the devices of a shard_map ------------------------------------------------


def varying(*arrays: Any) -> frozenset[str]:
    """The axes of a `shard_map` over which any of the arrays varies."""
    return frozenset().union(*(_axes_of(jax.typeof(array)) for array in arrays))


def _axes_of(kind: Any) -> frozenset[str]:
    axes: frozenset[str] = getattr(kind, "vma", frozenset())  # its name until JAX 0.10
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else axes


def varied(array: Any, axes: frozenset[str]) -> Any:
    """The same array, as one that varies over the axes."""
    missing = tuple(sorted(axes - varying(array)))
    if not missing:
        return array
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(array, missing, to="varying")
    return jax.lax.pvary(array, missing)  # its name until JAX 0.8


def like(array: Any, shape: Sequence[int] | None = None, dtype: Any = None) -> Any:
    """The shape and dtype of a result that varies as an array does."""
    kind = jax.typeof(array)
    shape = kind.shape if shape is None else tuple(shape)
    axes: dict[str, Any] = {}
    if hasattr(kind, "manual_axis_type"):
        if kind.manual_axis_type.varying:
            each = jax.sharding.PartitionSpec(*[None] * len(shape))
            whole = jax.sharding.NamedSharding(kind.sharding.mesh, each)
            axes = {"manual_axis_type": kind.manual_axis_type, "sharding": whole}
    elif getattr(kind, "vma", None):
        axes = {"vma": kind.vma}
    return jax.ShapeDtypeStruct(shape, kind.dtype if dtype is None else dtype, **axes)


def floating() -> Any:
    """The widest float that JAX has now."""
    return jnp.float64 if jax.config.jax_enable_x64 else jnp.float32


# -- the stages ------------------------------------------------------------------------------------


def _call(target: str, results: Any, operands: Sequence[Any], **how: Any) -> Any:
    """One call, of which a derivative is refused."""
    aliases = how.pop("aliases", None)

    @jax.custom_jvp
    def called(*operands: Any) -> Any:
        call = jax.ffi.ffi_call(
            target, results, vmap_method="broadcast_all", input_output_aliases=aliases
        )
        return call(*operands, **how)

    @called.defjvp
    def refuse(primals: Any, tangents: Any) -> Any:
        raise TypeError(
            "a step of fusedstep.jax has no derivative: differentiate the loss, not the update, or"
            " stop_gradient what goes into it"
        )

    return called(*operands)


class Numbers(NamedTuple):
    """A rule's hyperparameters and a step's options as `prepare` reads them."""

    rule: str
    groups: Sequence[float]  # of each group: maximize, decoupled, weight_decay, the rule's own
    options: Sequence[float]  # factor, max_norm, clip_value, ema_decay
    traced_at: Sequence[int]  # the places in the two above that arrays have the values of
    scheduled_at: Sequence[int]  # and those that schedules have
    schedules: str
    seed: int
    measure: bool
    skip_nonfinite: bool


def measure(count: Any, grads: Sequence[Any], formats: Sequence[Sequence[int]]) -> Any:
    """The sum of all gradients' squares, and whether they are finite: four words."""
    return _call(
        "fusedstep_measure",
        like(count, (4,), jnp.uint32),
        [count, *grads],
        formats=np.array(formats, np.int32).ravel(),
        sizes=np.array([grad.size for grad in grads], np.int64),
    )


def prepare(numbers: Numbers, count: Any, carry: Any, traced: Any, total: Any) -> Any:
    """The count and what is carried after the step, its rows, its flags, the gradients' norm."""
    width = 3 + len(_core.rules()[numbers.rule][0])
    rows = (len(numbers.groups) // width, MODULE.ROW_WORDS)
    results = (
        like(count),
        like(carry),
        like(count, rows, jnp.uint32),
        like(count, (2,), jnp.int32),
        like(count, (), floating()),
    )
    return _call(
        "fusedstep_prepare",
        results,
        [count, carry, traced, total],
        rule=numbers.rule,
        groups=np.array(numbers.groups, np.float64),
        traced_at=np.array(numbers.traced_at, np.int32),
        scheduled_at=np.array(numbers.scheduled_at, np.int32),
        schedules=numbers.schedules,
        numbers=np.array(numbers.options, np.float64),
        switches=np.array([numbers.seed, numbers.measure, numbers.skip_nonfinite], np.int64),
    )


class Leaf(NamedTuple):
    """One parameter's streams, in the core's order, and what is to be known of them."""

    arrays: Sequence[Any]  # those there are, what lies beside one after it
    is_read: Sequence[bool]  # of `arrays`: the gradient
    formats: Sequence[int]  # of all streams there may be; 0: none
    group: int = 0


def sweep(
    rule: str, flags: Any, rows: Any, leaves: Sequence[Leaf], stochastic: Sequence[int], apart: bool
) -> list[list[Any]]:
    """The new arrays of each leaf, but for its gradient, in the memory of the old ones.

    With `apart`, the parameter's is what is to be added to it, in the gradient's memory.
    """
    operands, results = [flags, rows], list[Any]()
    aliases: dict[int, int] = {}
    for leaf in leaves:
        for k, (array, is_read) in enumerate(zip(leaf.arrays, leaf.is_read, strict=True)):
            if not is_read:
                # What is added to a parameter may lie where its gradient did, which nothing needs
                # any more: memory that is new in each step would cost more than the step.
                at = leaf.is_read.index(True) if apart and not k else k
                if leaf.arrays[at].dtype == array.dtype:
                    aliases[len(operands) + at - k] = len(results)
                results.append(like(array))
            operands.append(array)
    found = iter(
        _call(
            "fusedstep_sweep",
            tuple(results),
            operands,
            aliases=aliases,
            rule=rule,
            formats=np.array([leaf.formats for leaf in leaves], np.int32).ravel(),
            sizes=np.array([leaf.arrays[0].size for leaf in leaves], np.int64),
            group_of=np.array([leaf.group for leaf in leaves], np.int32),
            stochastic=np.array(stochastic, np.int32),
            form="apart" if apart else "in place",
        )
    )
    return [[next(found) for read in leaf.is_read if not read] for leaf in leaves]


MODULE: Any = _module()
STREAMS: int = MODULE.STREAMS
