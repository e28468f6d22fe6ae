"""Arrays plus a multiple of others, in place and in one pass, for both layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusedstep import _core
from fusedstep._hypers import FINITE, as_number
from fusedstep._types import Options


def add(
    into: Mapping[Any, Any],
    others: Sequence[Any],
    scale: Any,
    called: str,
    device: Any = None,
    index: int = 0,
    stream: int = 0,
) -> None:
    """`fma(scale, other, one)` for each of `into`, all of them or none; None adds nothing.

    `called` is what errors call `into`; `others` they call other.
    """
    factor = as_number("scale", scale, FINITE)
    names = list(map(str, into))
    if len(others) != len(names):
        raise ValueError(f"other must have {len(names)} arrays, got {len(others)}")
    try:
        # The rule p - lr * momentum * g, as it has one rounding.
        table = _core.ArrayTable(
            "lookahead", names, list(into.values()), [0] * len(names), device, index
        )
        table.step(others, [[0.0, 0.0, 0.0, -factor, 1.0]], Options(stream=stream))
    except (TypeError, ValueError) as error:
        text = str(error).replace("params[", f"{called}[").replace("grads[", "other[")
        raise type(error)(text) from None
