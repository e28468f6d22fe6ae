"""Nesterov's look-ahead in his method's original form, for both layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fusedstep._types import Array


def check(groups: Iterable[Mapping[str, float]]) -> None:
    """Raises ValueError where a look-ahead would not be Nesterov's method."""
    groups = list(groups)
    if any(group["nesterov"] for group in groups) or not any(g["momentum"] for g in groups):
        given = [f"momentum={g['momentum']}, nesterov={bool(g['nesterov'])}" for g in groups]
        raise ValueError(f"lookahead needs momentum > 0 and nesterov = False, got {given}")


def step_along(sgd: Any, moving: Iterable[tuple[Any, Any, float]]) -> None:
    """Takes each (array, direction, rate) to array - rate * direction, by a step of plain `sgd`."""
    together: dict[float, tuple[list[Any], list[Any]]] = {}
    for array, direction, rate in moving:
        arrays, directions = together.setdefault(rate, ([], []))
        arrays.append(array)
        directions.append(direction)
    for rate, (arrays, directions) in together.items():
        sgd(arrays, lr=rate).step(directions)


def look_ahead(sgd: Any, moving: Sequence[tuple[Array, Array, float]]) -> None:
    """Takes each array to its look-ahead point, in the type that steps compute in."""
    wide = [(np.asarray(array, along.dtype), along, reach) for array, along, reach in moving]
    step_along(sgd, wide)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity and NaN as in a step
        for (array, *_), (moved, *_) in zip(moving, wide, strict=True):
            np.copyto(array, moved, casting="same_kind")
