"""States of fusedstep.jax as checkpoints of the NumPy layer, and back."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from fusedstep import optimizers
from fusedstep._groups import Group
from fusedstep._optimizer import Optimizer

if TYPE_CHECKING:
    from fusedstep.jax._transformation import Recipe


def names_of(params: Any) -> list[str]:
    """The parameters' names: their paths, joined by dots."""
    found, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") or "0" for path, _ in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"params must differ in their paths with dots, got {sorted(twice)} twice")
    return names


def twin(recipe: Recipe, params: Any, decays: list[bool]) -> Optimizer:
    """The NumPy layer's optimizer of the same arguments, over copies of the parameters."""
    names = names_of(params)
    arrays = dict(zip(names, map(np.array, jax.tree_util.tree_leaves(params)), strict=True))
    hypers = {name: _plain(name, value) for name, value in recipe.hypers.items()}
    spared = [name for name, decay in zip(names, decays, strict=True) if not decay]
    groups = [Group(list(map(glob.escape, spared)), weight_decay=0.0)] if spared else []
    cls: Any = getattr(optimizers, recipe.name)
    made: Optimizer = cls(arrays, groups=groups, **hypers, **recipe.storage.how)
    return made


def _plain(name: str, value: Any) -> Any:
    """A hyperparameter as the NumPy layer takes it."""
    if isinstance(value, tuple):
        return tuple(_plain(f"{name}[{i}]", part) for i, part in enumerate(value))
    if not hasattr(value, "value"):
        return value
    if isinstance(value.value, jax.core.Tracer):
        raise TypeError(f"{name} must be a number outside of a program, got {value.value}")
    return float(value.value)


def state_dict(recipe: Recipe, state: Any, params: Any, decays: list[bool]) -> dict[str, Any]:
    """`Transformation.state_dict`."""
    opt = twin(recipe, params, decays)
    leaves = range(len(opt._names))
    columns = {
        key: jax.tree_util.tree_structure(params).flatten_up_to(tree)
        for key, tree in state.arrays.items()
        if key != "shadow"  # the parameters again
    }
    wanted = [(key, i) for key, one in columns.items() for i in leaves if one[i] is not None]
    states = opt._extended(opt._no_states(), wanted, opt._groups)
    for key, i in wanted:
        states[key][i][...] = np.asarray(columns[key][i])
    count = int(state.count)
    carried = np.asarray(state.carry).view(np.float64)
    clock = (count, float(carried[0]), float(carried[1]))
    averages = count if recipe.averages else 0
    opt._table.load(states, [clock] * len(leaves), count, [], [], averages)
    return opt.state_dict()


def load(recipe: Recipe, params: Any, saved: Mapping[str, Any], decays: list[bool]) -> Any:
    """The count, what is carried and the arrays of a state, of `Transformation.load_state_dict`."""
    opt = twin(recipe, params, decays)
    opt.load_state_dict(saved)
    clocks = set(opt._table.clocks())
    if len(clocks) > 1:
        counts = ", ".join(str(count) for count, *_ in sorted(clocks))
        raise ValueError(
            "state_dict must have one count of steps for all parameters, got"
            f" {counts}: an optimizer of JAX has one"
        )
    count, *carried = clocks.pop() if clocks else (0, 0.0, 0.0)
    if not recipe.spec.counts_steps:  # torch's has no count in its state
        count = max(count, opt.steps)
    columns = {
        key: [None if array is None else jnp.array(array) for array in one]
        for key, one in opt._states.items()
    }
    return count, jnp.array(np.array(carried).view(np.uint32)), columns
