"""The path of an optimizer over a landscape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedstep as fs
from fusedstep._arrays import as_array
from fusedstep._hypers import as_integer
from fusedstep.convergence.arrays import as_finite


def trajectory(
    opt: Callable[[NDArray[np.float64]], fs.Optimizer] | fs.Optimizer,
    landscape: Any,
    start: Any,
    steps: int,
    *,
    lookahead: bool = False,
) -> NDArray[np.float64]:
    """The points that an optimizer visits.

    Args:
        opt: makes an optimizer of the parameters, a float64 array: `lambda x: fs.Adam(x, lr=0.1)`.
            Or an optimizer whose one parameter has the shape of `start`: that parameter is set to
            `start` and stepped, and states and counts go on from where they are.
        landscape: anything with a method `gradient(x)`: a `Landscape`, a `Quadratic`, your own.
        start: the first point, an array of finite numbers (n,).
        steps: how many steps to take; an integer >= 0.
        lookahead: takes each gradient inside `opt.lookahead()`, Nesterov's original form.

    Returns:
        Start and the point after each step, float64 (steps + 1, n).

    Raises:
        TypeError, ValueError: an argument of another kind, or a parameter of another shape.

    Example:
        >>> import fusedstep as fs
        >>> from fusedstep.convergence import landscapes, trajectory
        >>> trajectory(lambda x: fs.SGD(x, lr=0.5), landscapes.ravine(condition=3), (4, 2), 3)
        array([[ 4.  ,  2.  ],
               [ 2.  , -1.  ],
               [ 1.  ,  0.5 ],
               [ 0.5 , -0.25]])
    """
    if not callable(getattr(landscape, "gradient", None)):
        raise TypeError(f"landscape must have a method gradient(x), got {landscape!r}")
    steps = as_integer("steps", steps, 0)
    if not isinstance(lookahead, bool):
        raise TypeError(f"lookahead must be True or False, got {lookahead!r}")
    point = as_finite("start", start, (1,))
    try:
        gradient = np.asarray(landscape.gradient(point))
    except ValueError as error:
        raise ValueError(f"start must be a point of the landscape: {error}") from None
    if gradient.shape != point.shape:
        raise ValueError(
            f"landscape.gradient(start) must have start's shape {point.shape}, got {gradient.shape}"
        )
    if lookahead and isinstance(opt, fs.Optimizer):
        _check_lookahead(opt)
    if isinstance(opt, fs.Optimizer):
        params = [as_array(param, "opt.params") for param in opt.params.values()]
        if len(params) != 1 or params[0].shape != point.shape:
            shapes = [param.shape for param in params]
            raise ValueError(f"opt must have one parameter of shape {point.shape}, got {shapes}")
        params[0][...] = point
        point = params[0]
    elif callable(opt):
        opt = opt(point)
        if not isinstance(opt, fs.Optimizer):
            raise TypeError(f"opt must make a fusedstep optimizer, got {opt!r}")
        made = [as_array(param, "opt.params") for param in opt.params.values()]
        if len(made) != 1 or not np.shares_memory(made[0], point):
            raise ValueError(f"opt must make an optimizer of the array it is given, got {opt!r}")
        if lookahead:
            _check_lookahead(opt)
    else:
        raise TypeError(f"opt must be an optimizer or make one of an array, got {opt!r}")

    path = np.empty((steps + 1, *point.shape))
    path[0] = point
    for t in range(steps):
        with opt.lookahead() if lookahead else contextlib.nullcontext():  # type: ignore[attr-defined]  # SGD's
            gradient = np.asarray(landscape.gradient(point.astype(np.float64)))
        opt.step(gradient.astype(point.dtype))
        path[t + 1] = point
    return path


def _check_lookahead(opt: fs.Optimizer) -> None:
    """Raises where `opt.lookahead()` would, with the parameters as they are."""
    if not isinstance(opt, fs.SGD):
        raise TypeError(f"opt must be SGD with momentum for lookahead, got {type(opt).__name__}")
    with opt.lookahead():
        pass
