"""Nesterov's look-ahead in his method's original form, for both layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from fusedstep import _core
from fusedstep._types import Options


def refuse_inside(optimizer: Any, what: str) -> None:
    """Raises RuntimeError where other values stand in the parameters' place.

    `_ahead` says which: "ema", or True at a look-ahead point.
    """
    if optimizer._ahead:
        where = "ema" if optimizer._ahead == "ema" else "a lookahead"
        raise RuntimeError(f"{what} after {where}, not inside it")


def check(groups: Iterable[Mapping[str, float]]) -> None:
    """Raises ValueError where a look-ahead would not be Nesterov's method."""
    groups = list(groups)
    if any(group["nesterov"] for group in groups) or not any(g["momentum"] for g in groups):
        given = [f"momentum={g['momentum']}, nesterov={bool(g['nesterov'])}" for g in groups]
        raise ValueError(f"lookahead needs momentum > 0 and nesterov = False, got {given}")


def look_ahead(
    moving: Mapping[str, tuple[Any, Any, Mapping[str, float]]],
    device: Any = None,
    index: int = 0,
    stream: int = 0,
) -> None:
    """Takes each (array, momentum buffer, group) to its look-ahead point, in one sweep."""
    arrays = [array for array, *_ in moving.values()]
    buffers = [buffer for _, buffer, _ in moving.values()]
    table = _core.ArrayTable(
        "lookahead", list(moving), arrays, list(range(len(moving))), device, index
    )
    reach = [(1.0 if g["lr_in_momentum"] else g["lr"], g["momentum"]) for *_, g in moving.values()]
    rates = [[0.0, 0.0, 0.0, *factors] for factors in reach]
    table.step(buffers, rates, Options(stream=stream))
