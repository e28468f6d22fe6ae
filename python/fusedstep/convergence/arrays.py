"""Arguments that are arrays of numbers, checked."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def as_reals(name: str, value: Any) -> Array:
    """`value` as a float64 array, NaN and infinity included, or TypeError."""
    try:
        given = np.asarray(value)
    except ValueError:  # a ragged list
        given = np.asarray(None)
    if given.dtype.kind not in "iuf" and given.dtype.name != "bfloat16":
        raise TypeError(f"{name} must be an array of real numbers, got {value!r}")
    return given.astype(np.float64, copy=False)


def as_points(name: str, value: Any, n: int) -> Array:
    """`value` as points of n dimensions, float64 (..., n)."""
    points = as_reals(name, value)
    if points.ndim == 0 or points.shape[-1] != n:
        raise ValueError(f"{name} must have shape (..., {n}), got {points.shape}")
    return points


def as_finite(name: str, value: Any, ndim: tuple[int, ...]) -> Array:
    """`value` as a finite float64 array of its own, with an element, or TypeError or ValueError."""
    array = as_reals(name, value).copy()
    if array.ndim not in ndim or array.size == 0:
        wanted = " or ".join(map(str, ndim))
        unit = "dimension" if ndim == (1,) else "dimensions"
        raise ValueError(
            f"{name} must have {wanted} {unit} and an element, got shape {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {float(array[~np.isfinite(array)][0])}")
    return array
