"""optax: an optimizer's state as `init` makes it, or as orbax and flax restore it.

A state is a tuple of named tuples, one for each part of a chain, in which moments are nested as the
parameters are. It has no hyperparameters, but for those of `inject_hyperparams`, and says little of
its optimizer: those of adam, adamw, adamax, radam and nadam look the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusedstep.convert import _common
from fusedstep.convert._common import Converted

_ADAM = {"mu": "exp_avg", "nu": "exp_avg_sq"}
# What each optimizer keeps of a parameter, by optax's names, ours, and the name of its tuple.
_KEPT: dict[str, tuple[str, dict[str, str]]] = {
    "sgd": ("TraceState", {"trace": "momentum_buffer"}),
    "adagrad": ("ScaleByRssState", {"sum_of_squares": "sum"}),
    "rmsprop": (
        "ScaleByR",
        {"nu": "square_avg", "mu": "grad_avg", "trace": "momentum_buffer"},
    ),
    "adadelta": ("ScaleByAdaDeltaState", {"e_g": "square_avg", "e_x": "acc_delta"}),
    **dict.fromkeys(("adam", "adamw", "nadam", "nadamw", "radam"), ("ScaleByAdamState", _ADAM)),
    **dict.fromkeys(("adamax", "adamaxw"), ("ScaleByAdamState", {**_ADAM, "nu": "exp_inf"})),
    "amsgrad": ("ScaleByAmsgradState", {**_ADAM, "nu_max": "max_exp_avg_sq"}),
    "lion": ("ScaleByLionState", {"mu": "exp_avg"}),
}
# A field that only some arguments bring along.
_OPTIONAL = {("sgd", "trace"): "momentum", ("rmsprop", "trace"): "momentum",
             ("rmsprop", "mu"): "centered"}  # fmt: skip
_FIELDS = {field for _, kept in _KEPT.values() for field in kept}


def from_optax(
    state: Any, params: Any = None, optimizer: str | None = None, *, step: int | None = None,
    **arguments: Any,
) -> Converted:  # fmt: skip
    """The state of an optax optimizer.

    Args:
        state: what `init` and `update` return, or orbax or flax restore, also inside of `chain`,
            `inject_hyperparams`, `apply_if_finite` and `MultiSteps`.
        params: the parameters, nested as there, or by names with dots: `dense.kernel`; arrays or
            shapes (default None: as the state has them).
        optimizer: the name of the function, as "adamw" (default None: the one that has such a
            state, where there is only one).
        step: the updates taken, where the state has no count: sgd, adagrad, adadelta and rmsprop
            without a schedule (default None).
        **arguments: what the function was given, by optax's names; and, of `add_decayed_weights`,
            `weight_decay` and `decoupled_weight_decay`, which is True for one after the optimizer.

    Returns:
        The state_dict for `fs.<result.optimizer>`. Without a number as `learning_rate` it has no
        rate: your optimizer keeps its own. What clips in a chain keeps nothing: give `max_norm` to
        every step.

    Raises:
        TypeError, ValueError: the state is of another optimizer or arguments, of other parameters,
            of several optimizers, of something beside the optimizer that keeps arrays, as `ema`
            does, or between two updates of `MultiSteps`.

    Warns:
        UserWarning: neither `optimizer` nor `arguments` say what optax has defaults for, which are
            taken. `result.assumed` has them in any case.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.ones(2, np.float32)
        >>> state = ({"count": 7, "mu": {"w": w}, "nu": {"w": w}}, None)  # optax.adam(...).init
        >>> found = fs.convert.from_optax(state, {"w": w}, "adam", learning_rate=0.1, b1=0.8)
        >>> opt = fs.Adam({"w": w})
        >>> opt.load_state_dict(found)
        >>> opt.steps, opt.param_groups[0]["betas"]
        (7, (0.8, 0.999))
    """
    if isinstance(state, str | os.PathLike):
        kind = type(state).__name__
        raise TypeError(
            "state must be a state, as orbax' StandardCheckpointer().restore(path) gives it, got"
            f" {kind}"
        )
    wanted = _common.wanted(params)
    nodes = list(_nodes(state))
    found: dict[str, Any] = {}
    for _, node in nodes:
        for field in _FIELDS & node.keys():
            if field in found:
                raise ValueError(f"state must be of one optimizer, got {field} more than once")
            found[field] = node[field]
    name = _named(optimizer, found)
    one = _common.convention("optax", name)
    said = {key: _common.short(value) for _, node in nodes for key, value in _injected(node)}
    given = {**{k: v for k, v in said.items() if k in _common.arguments(one)}, **arguments}
    usual = _common.arguments(one)
    assumed = _common.unsaid("state", "optax'", usual, given, is_named=bool(optimizer))
    config = {**usual, **given}
    kept = {k: mine for k, mine in _KEPT[name][1].items() if _is_there(name, k, config)}
    if kept.keys() != found.keys():
        told = ", ".join(f"{k}={config[k]!r}" for (n, _), k in _OPTIONAL.items() if n == name)
        raise ValueError(
            f"state must have {', '.join(kept) or 'nothing'} of {name}({told}), got"
            f" {', '.join(sorted(found)) or 'nothing'}"
        )
    for kind, node in nodes:
        if kind and kept.keys() & node.keys() - {"trace"} and not kind.startswith(_KEPT[name][0]):
            raise ValueError(f"state must have a {_KEPT[name][0]} of {name}, got {kind}")
    for path, leaf in _unread(state):
        _common.check_unused(f"state: {path}", leaf, name)
    counts = [node["count"] for _, node in nodes if "count" in node]
    if step is None and not counts:
        raise ValueError(f"step must be given: this state of {name} has no count")
    steps = _common.count("step", counts[0] if step is None else step)
    trees = {field: dict(_common.leaves(found[field])) for field in kept}
    order = _common.paths_of("state", trees, wanted)
    states = _common.gathered("state", trees, kept, order, wanted)
    if name == "rmsprop":
        for entry in states.values():
            if "momentum_buffer" in entry:
                entry["momentum_buffer"] = -entry["momentum_buffer"]
    if wanted is None:
        wanted = _common.Wanted(order, [()] * len(order))
    ours = _common.called(one, given)
    if ours.name == "NAdam":
        for entry in states.values():
            entry["mu_product"] = ours.hypers["betas"][0] ** steps
    groups = [_common.group(ours, range(len(order)), wanted)]
    return _common.converted("optax", name, ours.name, groups, states, steps, assumed=assumed)


def to_optax(state_dict: Any, like: Any, *, optimizer: str | None = None) -> Any:
    """A state_dict as the state of an optax optimizer.

    Args:
        state_dict: of ours, of an optimizer whose equation optax has, with all its states.
        like: a state of the optax optimizer that is to go on, as its `init` makes it.
        optimizer: the name of our class, where `state_dict` is not one of `from_optax` and the like
            (default None).

    Returns:
        A state like `like`, with arrays of NumPy.

    Raises:
        TypeError, ValueError: optax has no such equation, or `like` is the state of another one.
    """
    mine = _common.optimizer_of(state_dict, optimizer)
    steps, entries = _common.steps_of(state_dict), _common.ordered(state_dict)
    found = {field for _, node in _nodes(like) for field in _FIELDS & node.keys()}
    names = [name for name, (_, kept) in _KEPT.items() if found <= kept.keys()]
    name, why = "", ""
    for one in names:
        try:
            name, _ = _common.equal_of("optax", mine, state_dict, one)
            break
        except ValueError as error:
            why = str(error)
    if not name:
        raise ValueError(why or f"like must be the state of one optimizer, got {sorted(found)}")
    numbers: dict[str, int] = {}
    named = {name: i for i, name in _common.names_of(state_dict).items()}
    for k, (i, _, _) in enumerate(entries):
        numbers[str(k)] = numbers.setdefault("", i)

    def filled(tree: Any, path: str, field: str) -> Any:
        if isinstance(tree, Mapping):
            return {k: filled(v, f"{path}.{k}" if path else str(k), field) for k, v in tree.items()}
        if isinstance(tree, list | tuple):
            items = [
                filled(v, f"{path}.{k}" if path else str(k), field) for k, v in enumerate(tree)
            ]
            return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
        i = named.get(path, named.get(path.replace(".", "/"), numbers.get(path)))
        if i is None:
            raise ValueError(f"like must have the parameters of state_dict, got {path!r}")
        values = _common.need(state_dict["state"].get(i, {}), _KEPT[name][1][field], i)
        if values.shape != tuple(tree.shape):
            raise ValueError(
                f"like: {field}.{path} must have shape {values.shape}, got {tree.shape}"
            )
        sign = -1 if (name, field) == ("rmsprop", "trace") else 1
        return np.asarray(sign * values, str(tree.dtype))

    def walked(tree: Any) -> Any:
        node = _fields(tree)
        if node is None:
            kind = type(tree)
            return kind(map(walked, tree)) if isinstance(tree, list | tuple) else tree
        new = {}
        for key, value in node.items():
            if key in _FIELDS:
                new[key] = filled(value, "", key)
            elif key in ("count", "gradient_step"):
                new[key] = np.asarray(steps, np.int32)
            else:
                new[key] = value if key in _LEAVES else walked(value)
        return tree._replace(**new) if hasattr(tree, "_replace") else type(tree)(new)

    return walked(like)


# What a node has that is neither a state nor has one inside.
_LEAVES = ("hyperparams", "hyperparams_states", "params", "acc_grads", "mini_step")


def _fields(tree: Any) -> dict[str, Any] | None:
    """A named tuple or a dict by its keys; None for anything else."""
    if hasattr(tree, "_asdict"):
        found: dict[str, Any] = tree._asdict()
        return found
    return {str(key): one for key, one in tree.items()} if isinstance(tree, Mapping) else None


def _nodes(tree: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """All parts of a state, each with its type's name, if it has one, and its fields."""
    node = _fields(tree)
    if node is None:
        if isinstance(tree, list | tuple):
            for one in tree:
                yield from _nodes(one)
        return
    if node.get("mini_step") is not None and _common.count("mini_step", node["mini_step"]):
        raise ValueError(
            f"state must be between two updates, got mini_step={int(node['mini_step'])}: gradients"
            " of MultiSteps that are not yet applied"
        )
    inner = [one for key, one in node.items() if key not in (*_FIELDS, *_LEAVES, "count")]
    if "gradient_step" in node:
        node["count"] = node["gradient_step"]
    for one in inner:  # before a wrapper's own count, which also has those of skipped updates
        yield from _nodes(one)
    yield "" if isinstance(tree, Mapping) else type(tree).__name__, node


def _unread(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The arrays of floats, by path, that are in no field of an optimizer's: of what is beside it.

    Single numbers are none of them, as of what logs and of what scales rates.
    """
    node = _fields(tree)
    if node is None and isinstance(tree, list | tuple):
        node = {str(i): one for i, one in enumerate(tree)}
    if node is not None:
        known = (*_FIELDS, *(name for name in _LEAVES if name != "acc_grads"))
        for key, one in node.items():
            if key not in known:
                yield from _unread(one, f"{path}.{key}" if path else key)
    elif getattr(tree, "ndim", 0) and "float" in str(getattr(tree, "dtype", "")):
        yield path, tree


def _is_there(name: str, field: str, config: Mapping[str, Any]) -> bool:
    """Whether an optimizer with these arguments has a field; momentum=0.0 has its trace too."""
    argument = config.get(_OPTIONAL.get((name, field), ""), True)
    return argument is not None and argument is not False


def _injected(node: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    found = _fields(node.get("hyperparams"))
    yield from (found or {}).items()


def _named(optimizer: str | None, found: Mapping[str, Any]) -> str:
    """The optimizer's name, or the only one that has these fields."""
    if optimizer == "rprop":
        raise ValueError(
            "optimizer must be another: optax's rprop applies each step's update in the next one,"
            " and no run of ours goes on with that"
        )
    kept = {
        name: [f for f in fields if f in found or (name, f) not in _OPTIONAL]
        for name, (_, fields) in _KEPT.items()
    }
    return _common.named(optimizer, kept, found)
