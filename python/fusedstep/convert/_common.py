"""What the converters share: parameters by name, arrays, and the state_dict that comes out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedstep import _checkpoint, optimizers
from fusedstep._arrays import as_values, is_array, to_host
from fusedstep._spec import Spec
from fusedstep.conventions import Ours

# What a state holds for one parameter, by our names.
State = dict[str, Any]


class Converted(dict[str, Any]):
    """Another library's optimizer as a state_dict, for `load_state_dict` of the class `optimizer`.

    It is that of a neutral optimizer, and `fusedstep.torch`'s classes take it too. Its groups have
    every hyperparameter, also the options that make the equation the other library's; but no `lr`
    where that is a schedule, which your optimizer has.

    Attributes:
        library: whose checkpoint it was, as "keras".
        theirs: the optimizer's name there.
        optimizer: the name of our class, in `fusedstep` and in `fusedstep.torch`.
        at_step: what every `step` is to be given, as the library clips or averages: `max_norm`,
            `clip_value`, `ema`.
        masters: the parameters themselves, where the optimizer's checkpoint has them, as in float32
            beside narrower ones; by name, or by number.
        assumed: the arguments that neither the checkpoint nor the caller said, with the library's
            defaults, which were taken.
    """

    library: str
    theirs: str
    optimizer: str
    at_step: dict[str, Any]
    masters: dict[Any, Any]
    assumed: dict[str, Any]

    @property
    def step(self) -> int:
        """The updates that were taken."""
        taken: int = self["step"]
        return taken

    @property
    def convention(self) -> dict[str, Any]:
        """The options in which the equation is not torch's, of the first group."""
        spec, group = spec_of(self.optimizer), self["param_groups"][0]
        usual = defaults(self.optimizer)
        names = [name for name in spec.beyond_torch if group.get(name) != usual.get(name)]
        return {name: group[name] for name in names if name in group}


class Wanted(NamedTuple):
    """The caller's parameters: their names, None where they have none, and shapes."""

    names: list[str] | None
    shapes: list[tuple[int, ...]]

    def label(self, i: int) -> str:
        """What errors call a parameter."""
        return repr(self.names[i]) if self.names else f"parameter {i}"


def wanted(params: Any) -> Wanted | None:
    """`params` in any of the forms that converters take; TypeError for others.

    Arrays, variables of the library, or shapes: in a dict by name, also of dicts, in a list, or as
    the pairs of torch's `named_parameters()`.
    """
    if params is None:
        return None
    if isinstance(params, Mapping):
        found = list(leaves(params))
        return Wanted([name for name, _ in found], [_shape(*one) for one in found])
    if hasattr(params, "shape"):
        return Wanted(None, [_shape("params", params)])
    if not isinstance(params, Iterable) or isinstance(params, str | bytes):
        raise TypeError(f"params must be a dict or a list of arrays, got {type(params).__name__}")
    listed: list[Any] = list(params)
    if listed and all(_is_pair(one) for one in listed):
        return Wanted([one[0] for one in listed], [_shape(*one) for one in listed])
    names = [getattr(one, "path", None) or getattr(one, "name", None) for one in listed]
    named = bool(listed) and all(isinstance(name, str) for name in names)
    shapes = [_shape(f"params[{i}]", one) for i, one in enumerate(listed)]
    return Wanted([str(name) for name in names] if named else None, shapes)


def _is_pair(one: Any) -> bool:
    return isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], str)


def leaves(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """The arrays and shapes of a tree of dicts and lists, by path: `dense.kernel`."""
    if isinstance(tree, Mapping):
        for key, one in tree.items():
            yield from leaves(one, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple) and not (tree and all(type(n) is int for n in tree)):
        for i, one in enumerate(tree):
            yield from leaves(one, f"{path}.{i}" if path else str(i))
    else:
        yield path, tree


def _shape(label: str, one: Any) -> tuple[int, ...]:
    shape = getattr(one, "shape", one)
    try:
        return tuple(int(n) for n in shape)
    except TypeError:
        kind = type(one).__name__
        raise TypeError(f"params: {label} must be an array or a shape, got {kind}") from None


def values(label: str, value: Any) -> NDArray[Any]:
    """An array of any library as NumPy's; never one that is written to."""
    if hasattr(value, "detach"):
        value = value.detach()
    if hasattr(value, "numpy") and not is_array(value):  # tinygrad's
        value = value.numpy()
    return as_values(to_host(value), label)


def array(label: str, value: Any) -> NDArray[Any]:
    """An array of any library as NumPy's, of floats."""
    found = values(label, value)
    name = found.dtype.name
    if name not in ("float16", "bfloat16", "float32", "float64"):
        raise TypeError(f"{label} must be of floats, got {name}")
    return found


def number(label: str, value: Any) -> float:
    """A scalar, also in an array of one element."""
    found = np.asarray(value if not hasattr(value, "detach") else value.detach().cpu())
    if found.size != 1:
        raise ValueError(f"{label} must be a number, got shape {found.shape}")
    return float(found.reshape(()))


def short(value: Any) -> Any:
    """A hyperparameter in a float32 as the number that it was given as, such as 0.01."""
    found = np.asarray(value)
    if found.dtype != np.float32:
        return found.item() if found.ndim == 0 else value
    return float(str(found.reshape(-1)[0])) if found.size == 1 else value


def count(label: str, value: Any) -> int:
    """A number of updates."""
    return _checkpoint.count(label, number(label, value))


def check_shapes(source: str, what: str, found: Sequence[Any], params: Wanted) -> None:
    """Raises ValueError unless there is an array, or a shape, like each parameter."""
    if len(found) != len(params.shapes):
        raise ValueError(
            f"{source} must have {what} of {len(params.shapes)} parameters, got {len(found)}"
        )
    for i, (one, shape) in enumerate(zip(found, params.shapes, strict=True)):
        found_shape = tuple(getattr(one, "shape", one))
        if found_shape != shape:
            raise ValueError(
                f"{source}: {what} of {params.label(i)} must have shape {shape}, got {found_shape}"
            )


def tensors(source: Any, whose: str) -> tuple[str, dict[str, Any]]:
    """What to call a source, and its arrays by name: of a dict, also of dicts, or of a file.

    Raises:
        TypeError, ValueError: it is neither, or the file is no whole `.safetensors` or `.npz`.
    """
    if isinstance(source, Mapping):
        return "source", dict(leaves(source))
    if not isinstance(source, str | bytes | os.PathLike):
        kind = type(source).__name__
        raise TypeError(f"source must be a path or a dict of arrays, got {kind}")
    path = os.fsdecode(source)
    label = os.path.basename(path)
    with contextlib.suppress(ImportError):
        importlib.import_module("ml_dtypes")  # by which NumPy knows bfloat16
    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
        try:
            if zipped:
                file.seek(0)
                with np.load(file, allow_pickle=False) as opened:
                    return label, {name: _known(opened[name]) for name in opened}
        except Exception as error:  # zipfile and NumPy have several
            raise ValueError(f"{label} must be a whole .npz file: {error}") from None
    try:
        safetensors = importlib.import_module("safetensors")
        with safetensors.safe_open(path, "np") as opened:
            return label, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{whose} files need {error.name}: pip install 'fusedstep[convert]'", name=error.name
        ) from error
    except Exception as error:  # a class of its own
        raise ValueError(f"{label} must be a whole .safetensors or .npz file: {error}") from None


def _known(values: NDArray[Any]) -> NDArray[Any]:
    """Values in bfloat16, of which a file of NumPy's says two bytes alone."""
    return values.view("bfloat16") if values.dtype.str == "|V2" else values


def named(optimizer: str | None, kept: Mapping[str, Any], fields: Iterable[str]) -> str:
    """The optimizer's name, or the only one that keeps these fields of a parameter."""
    found = sorted(fields)
    if optimizer is not None:
        if optimizer not in kept:
            raise ValueError(f"optimizer must be one of {', '.join(kept)}, got {optimizer!r}")
        return optimizer
    fitting = [name for name, fields in kept.items() if sorted(fields) == found]
    if len(fitting) != 1 or not found:
        raise ValueError(
            f"optimizer must be given: {', '.join(found) or 'nothing'} may be of"
            f" {', '.join(fitting) or 'none of ' + ', '.join(kept)}"
        )
    return fitting[0]


def paths_of(
    source: str, trees: Mapping[str, Mapping[str, Any]], params: Wanted | None
) -> list[str]:
    """The parameters' paths with dots, in the order of `params`, or as each field's tree has them.

    Raises:
        ValueError: they are others.
    """
    paths: list[str] = list(next(iter(trees.values()), {}))
    if not trees and params is None:
        raise ValueError(f"params must be given: {source} keeps nothing of them")
    if params is None:
        return paths
    names = params.names or [str(i) for i in range(len(params.shapes))]
    if not trees:
        return names
    if paths == [""] and len(names) == 1:
        return paths
    if {name.replace("/", ".") for name in names} == set(paths):
        return [name.replace("/", ".") for name in names]
    missing = sorted(set(names) - set(paths))[:8]
    extra = sorted(set(paths) - set(names))[:8]
    raise ValueError(f"{source} must be of params, got missing {missing}, unknown {extra}")


def gathered(
    source: str,
    trees: Mapping[str, Mapping[str, Any]],
    kept: Mapping[str, str],
    order: Sequence[str],
    params: Wanted | None,
) -> dict[int, State]:
    """The states by number, from each field's arrays by parameter; `kept` has our names.

    Raises:
        TypeError, ValueError: a parameter has another field or another shape.
    """
    states: dict[int, State] = {i: {} for i in range(len(order))}
    for field, mine in kept.items():
        tree = trees.get(field, {})
        if tree.keys() != set(order):
            missing, extra = sorted(set(order) - tree.keys()), sorted(tree.keys() - set(order))
            raise ValueError(
                f"{source} must have {field} of each parameter, got missing {missing[:8]}, unknown"
                f" {extra[:8]}"
            )
        arrays = [array(f"{source}: {field} of {path}", tree[path]) for path in order]
        if params:
            check_shapes(source, field, arrays, params)
        for i, one in enumerate(arrays):
            states[i][mine] = one
    return states


_MOST = 2**24  # powers that are multiplied up: a tenth of a second
_BLOCK = 2**8, 2**16  # of which the first and the largest array of them is
_NORMAL = {"float16": 2.0**-14}  # below it roundings are coarse, and some machines have 0


def _powers(beta: float, dtype: Any) -> Iterator[NDArray[Any]]:
    """`beta`, `beta**2`, ... in blocks, each the product of the one before, rounded to `dtype`."""
    last, size, rest = np.ones((), dtype), _BLOCK[0], _MOST
    while rest:
        block = np.full(min(size, rest), beta, dtype)
        block[0] *= last
        np.multiply.accumulate(block, dtype=block.dtype, out=block)
        yield block
        last, rest = block[-1], rest - block.size
        size = min(2 * size, _BLOCK[1])


@functools.lru_cache(maxsize=64)
def power_to(beta: float, n: int, dtype: Any) -> Any:
    """`beta**n` as an optimizer has it that multiplies it up step by step, rounded to `dtype`.

    Raises:
        ValueError: after the most products that are made it still changes, and n is more.
    """
    if n == 0:
        return np.ones((), dtype)[()]
    rest = n
    for block in _powers(beta, dtype):
        if rest <= block.size:
            return block[rest - 1]
        if block[-1] == block[-2]:  # as it does from here on
            return block[-1]
        rest -= block.size
    raise ValueError(f"step must be at most {_MOST} for powers of {beta!r}, got {n}")


def power_of(label: str, value: Any, name: str, beta: float, step: int | None) -> int | None:
    """The n of a `beta**n` that was multiplied up step by step; None where it says nothing.

    Errors of the roundings add up, to whole steps of a logarithm; done again they are the same. As
    far as numbers are normal each product is less than the one before, so that n is the only one.

    Raises:
        ValueError: it is no power of `beta`, or one of more products than are made, where the
            caller has not said `step`.
    """
    given = values(label, value).reshape(-1)[0]
    known = float(given)
    least = _NORMAL.get(given.dtype.name, 2.0**-126)
    if not 0 < given.dtype.type(beta) < 1 or not least <= known <= 1:  # constant, or vanished
        return None
    found = 0 if known == 1 else _counted(known, beta, given.dtype)
    if found is None and step is None:
        raise ValueError(
            f"step must be given: {label} must be a power of {name}={beta!r} of at most {_MOST}"
            f" updates to be counted, got {known!r}"
        )
    if found == -1:
        raise ValueError(
            f"{label} must be a power of {name}={beta!r}, got {known!r}: was {name} another?"
        )
    return found


@functools.lru_cache(maxsize=64)
def _counted(known: float, beta: float, dtype: Any) -> int | None:
    """The n of the power `known`; -1 where it is between two, None where it is beyond all."""
    is_beyond = True
    for one in dict.fromkeys((beta, float(np.float32(beta)))):  # which some take in float64 too
        before, n = dtype.type(1), 0
        for block in _powers(one, dtype):
            if block[-1] > known:
                before, n = block[-1], n + block.size
                continue
            is_beyond = False
            at = int(np.searchsorted(-block, -known))  # the first that is no larger
            near = [(n + at, block[at - 1] if at else before), (n + at + 1, block[at])]
            for count, power in near:
                if abs(float(power) / known - 1) <= 2.0**-20:
                    return count
            break
    return None if is_beyond else -1


def agreed(source: str, counts: Mapping[str, int | None], step: int | None) -> int:
    """The updates that were taken, as the caller says or all counts that are known."""
    if step is not None:
        return count("step", step)
    found = {name: n for name, n in counts.items() if n is not None}
    if not found:
        told = ", ".join(counts)
        why = f"{told} no longer say" if told else f"{source} has no count"
        raise ValueError(f"step must be given: {why}")
    if len(set(found.values())) > 1:
        told = ", ".join(f"{n} by {name}" for name, n in found.items())
        raise ValueError(f"{source} must be of one count of updates, got {told}")
    return next(iter(found.values()))


def unsaid(
    source: str, whose: str, usual: Mapping[str, Any], given: Mapping[str, Any], *, is_named: bool
) -> dict[str, Any]:
    """The arguments that nobody said, with the library's defaults.

    It warns of them where nobody named the optimizer either: who does knows whose defaults are
    meant.
    """
    assumed = {k: v for k, v in usual.items() if k not in (*given, "learning_rate", "lr")}
    if assumed and not is_named:
        told = ", ".join(f"{key}={value!r}" for key, value in assumed.items())
        warnings.warn(f"{source} does not say {told}: {whose} defaults", stacklevel=3)
    return assumed


def check_unused(label: str, value: Any, whom: str) -> None:
    """Raises ValueError for a buffer of which an optimizer makes nothing, unless it is all 0.

    One that another argument would use is the sign of a wrong argument.
    """
    found = values(label, value)
    if (found != 0).any():
        raise ValueError(
            f"{label} must be 0 of {whom}, which has no use for it, got {found[found != 0][0]}: was"
            " it of other arguments?"
        )


def spec_of(optimizer: str) -> Spec:
    """The specification of a class of ours."""
    spec: Spec = getattr(optimizers, optimizer)._spec
    return spec


def defaults(optimizer: str) -> dict[str, Any]:
    """The hyperparameters of a class of ours with their defaults."""
    spec, signature = spec_of(optimizer), inspect.signature(getattr(optimizers, optimizer))
    found = {name: p.default for name, p in signature.parameters.items() if name in spec.table}
    return {**found, **spec.fixed}


def convention(library: str, name: str) -> Any:
    """Another library's optimizer in `fusedstep.conventions`; ValueError for one that is not."""
    module = importlib.import_module(f"fusedstep.conventions.{library}")
    known = conventions(module)
    if name not in known:
        raise ValueError(f"optimizer must be one of {', '.join(known)}, got {name!r}")
    return known[name]


def conventions(module: ModuleType) -> dict[str, Any]:
    """The conventions in a module, by name."""
    return {
        name: one
        for name, one in vars(module).items()
        if hasattr(one, "ours") and one.__module__ == module.__name__
    }


def arguments(one: Any) -> dict[str, Any]:
    """The arguments of a convention with their defaults; without one they are None."""
    parameters = list(inspect.signature(one).parameters.values())[1:]
    return {
        p.name: None if p.default is p.empty else p.default
        for p in parameters
        if p.kind is not p.VAR_KEYWORD
    }


def called(one: Any, given: Mapping[str, Any]) -> Ours:
    """A convention called with arguments of which the rate may be missing, or a schedule."""
    rates = [name for name in ("learning_rate", "lr") if name in arguments(one)]
    values = dict(given)
    for name in rates:
        if values.get(name) is None or callable(values[name]) or isinstance(values[name], Mapping):
            values[name] = 1.0
    found = one.ours(**values)
    hypers = dict(found.hypers)
    if any(values[name] is not given.get(name) for name in rates):
        del hypers["lr"]
    return Ours(found.name, hypers)


def group(ours: Ours, members: Sequence[int], params: Wanted | None) -> dict[str, Any]:
    """A group of a checkpoint, with every hyperparameter but a rate that is not known."""
    spec = spec_of(ours.name)
    usual = defaults(ours.name)
    values = {**usual, **ours.hypers}
    if "lr" not in ours.hypers:
        del values["lr"]
    for name in values:
        if name not in usual:
            raise TypeError(
                f"arguments must be of the optimizer's or of {ours.name}'s, got {name!r}"
            )
    hypers = {name: spec.check(name, value) for name, value in values.items()}
    named = {"param_names": [params.names[i] for i in members]} if params and params.names else {}
    return {**hypers, "params": list(members), **named}


def converted(
    library: str,
    theirs: str,
    optimizer: str,
    groups: list[dict[str, Any]],
    states: Mapping[int, State],
    steps: int,
    *,
    at_step: Mapping[str, Any] | None = None,
    assumed: Mapping[str, Any] | None = None,
) -> Converted:
    """The checkpoint of `groups` and `states`; a state without a count has `steps`."""
    spec = spec_of(optimizer)
    entries = {
        i: {"step": steps, **state} if spec.counts_steps else dict(state)
        for i, state in states.items()
        if state
    }
    result = Converted(state=entries, param_groups=groups, step=steps)
    if any("ema" in state for state in states.values()):
        result["averages"] = steps
    result.library, result.theirs, result.optimizer = library, theirs, optimizer
    result.masters = {}
    result.at_step, result.assumed = dict(at_step or {}), dict(assumed or {})
    return result


# -- the way back ----------------------------------------------------------------------------------

_EPS = ("eps", "eps_root", "eps_divisor", "eps_norm")

# Other libraries' arguments, by our hyperparameter or a part of one.
_ARGUMENTS: dict[str, str | Callable[[Mapping[str, Any]], Any]] = {
    "learning_rate": "lr",
    **dict.fromkeys(("beta_1", "beta1", "b1"), lambda group: group["betas"][0]),
    **dict.fromkeys(("beta_2", "beta2", "b2"), lambda group: group["betas"][1]),
    **dict.fromkeys(("epsilon", "eps"), lambda group: max(group.get(name, 0.0) for name in _EPS)),
    "eps_in_sqrt": lambda group: group["eps"] == 0,
    **dict.fromkeys(("rho", "decay"), lambda group: group.get("rho", group.get("alpha"))),
    "use_nesterov": "nesterov",
    "initial_scale": "initial_accumulator_value",
    "learning_rate_range": "step_sizes",
    "classic": "lr_in_momentum",
    "adamw_mode": "decoupled_weight_decay",
}


def their_arguments(one: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with which a convention would make a group, if any would."""
    usual, found = arguments(one), {}
    for name, value in usual.items():
        source = _ARGUMENTS.get(name, name)
        if name == "eps" and "eps_root" in usual:  # which has an argument of its own
            source = "eps"
        found[name] = source(group) if callable(source) else group.get(source, value)
    return found


def equal_of(
    library: str,
    optimizer: str,
    state_dict: Any,
    name: str | None = None,
    of_group: Sequence[str] | None = (),
) -> tuple[str, dict[str, Any]]:
    """The library's optimizer, and its arguments, whose equation a checkpoint has.

    Args:
        library: of `fusedstep.conventions`.
        optimizer: the name of our class.
        state_dict: of ours.
        name: the library's optimizer, if it must be that one.
        of_group: arguments that the library has by group, None for all; others must be the same in
            all groups, but for weight decay, which may be masked in some.

    Raises:
        ValueError: none has; the message has what differs from the nearest.
    """
    usual = defaults(optimizer)  # which a group may leave out
    groups = [{**usual, **own} for own in state_dict["param_groups"]]
    module = importlib.import_module(f"fusedstep.conventions.{library}")
    known = conventions(module)
    if name is not None:
        known = {name: convention(library, name)}
    nearest: tuple[int, str] | None = None
    for label, one in known.items():
        differing: dict[str, str] = {}
        for own in groups:
            made = _made(one, own)
            if made is None or made.name not in _SAME.get(optimizer, (optimizer,)):
                break
            theirs = {**defaults(made.name), **made.hypers}
            ignored = ["lr", "initial_accumulator_value"]  # which begins a run
            if not own.get("weight_decay"):
                ignored.append("decoupled_weight_decay")
            differing |= {
                key: f"{key}={theirs[key]!r}, not {own[key]!r}"
                for key in theirs
                if key in own and own[key] != theirs[key] and key not in ignored
            }
        else:
            if not differing:
                return label, _agreed_arguments(library, one, groups, of_group)
            why = f"{library}.{label} has {', '.join(differing.values())}"
            if nearest is None or len(differing) < nearest[0]:
                nearest = len(differing), why
    found = nearest[1] if nearest else f"it has no {optimizer}"
    raise ValueError(f"state_dict must be of an equation that {library} has: {found}")


def _agreed_arguments(
    library: str, one: Any, groups: Sequence[Mapping[str, Any]], of_group: Sequence[str] | None
) -> dict[str, Any]:
    """The arguments of all groups; ValueError where they differ."""
    every = [their_arguments(one, own) for own in groups]
    if of_group is None:
        return every[0]
    for name, value in every[0].items():
        for k, arguments in enumerate(every):
            other = arguments[name]
            masked = name == "weight_decay" and not (other and value)
            if other != value and not masked and name not in of_group:
                raise ValueError(
                    f"state_dict['param_groups'][{k}] must have {name}={value!r} as the first, got"
                    f" {other!r}: {library} has no groups, so convert each by itself"
                )
    return every[0]


# Adam with decoupled decay is AdamW.
_SAME = {"Adam": ("Adam", "AdamW"), "AdamW": ("Adam", "AdamW")}


def _made(one: Any, group: Mapping[str, Any]) -> Ours | None:
    try:
        return called(one, their_arguments(one, group))
    except (TypeError, ValueError, KeyError):
        return None


def optimizer_of(state_dict: Any, optimizer: str | None) -> str:
    """The class of ours that a checkpoint is of: as it says, or as the caller does."""
    _checkpoint.parts(state_dict)  # or its error
    found = optimizer or getattr(state_dict, "optimizer", None)
    if found is None:
        raise TypeError("optimizer must name our class, as 'AdamW': a state_dict does not say it")
    if found not in optimizers.NAMES:
        raise ValueError(f"optimizer must be one of {', '.join(optimizers.NAMES)}, got {found!r}")
    return str(found)


def ordered(state_dict: Any) -> list[tuple[Any, State, Mapping[str, Any]]]:
    """Each parameter of a checkpoint in order: its number, state and group."""
    entries, groups = _checkpoint.parts(state_dict)
    found: list[tuple[Any, State, Mapping[str, Any]]] = []
    found += [(i, dict(entries.get(i, {})), own) for own in groups for i in own["params"]]
    return (
        sorted(found, key=lambda one: one[0]) if all(type(i) is int for i, *_ in found) else found
    )


def names_of(state_dict: Any) -> dict[Any, str]:
    """The parameters' names by number, as far as they have any."""
    return {
        i: name
        for own in state_dict["param_groups"]
        for name, i in zip(own.get("param_names", ()), own["params"], strict=False)
    }


def steps_of(state_dict: Any) -> int:
    """The updates that a checkpoint's optimizer took."""
    if "step" in state_dict:
        return count("state_dict['step']", state_dict["step"])
    found = [count("step", one["step"]) for one in state_dict["state"].values() if "step" in one]
    return max(found, default=0)


def need(state: State, name: str, i: Any) -> NDArray[Any]:
    """A parameter's state; ValueError where it has none, or one in 8 bits."""
    if state.get(name) is None:
        raise ValueError(f"state_dict['state'][{i!r}] must have {name!r}, got {sorted(state)}")
    if f"{name}_exponents" in state:
        raise ValueError(
            f"state_dict['state'][{i!r}][{name!r}] must be of floats, got q8:"
            " optimizer.state_dict(state_dtype='float32') has them so"
        )
    return array(name, state[name])
