"""The path of an optimizer over a landscape."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fusedstep as fs
from fusedstep._arrays import as_array
from fusedstep._hypers import as_integer
from fusedstep._plot import as_axes, new_axes
from fusedstep.convergence import drawing
from fusedstep.convergence.arrays import as_finite


class Trajectory(np.ndarray[Any, np.dtype[np.float64]]):
    """The points that an optimizer visits, a float64 array (steps + 1, n), which can draw itself.

        path[0] = start,   path[t] = the point after step t

    `trajectory` makes them. A slice of steps is one, too; what is computed from one is a plain
    array.

    Attributes:
        landscape: what it leads over; None in a copy by pickle, as functions need not have one.
        label: what pictures call it: the optimizer's name and rate.

    Example:
        >>> import fusedstep as fs
        >>> from fusedstep.convergence import landscapes, trajectory
        >>> valley = landscapes.ravine()
        >>> plain = trajectory(lambda x: fs.SGD(x, lr=0.038), valley, valley.start, 40)
        >>> adam = trajectory(lambda x: fs.Adam(x, lr=0.3), valley, valley.start, 40)
        >>> ax = plain.plot()
        >>> ax = adam.plot(ax)  # on the same picture; plain.plot(others=[adam]) is the same
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['SGD, lr 0.038', 'Adam, lr 0.3']
    """

    landscape: Any
    label: str

    def __array_finalize__(self, obj: Any) -> None:
        self.landscape = getattr(obj, "landscape", None)
        self.label = getattr(obj, "label", "")

    def __array_wrap__(self, array: Any, context: Any = None, return_scalar: bool = False) -> Any:
        return np.asarray(array)[()] if np.ndim(array) == 0 else np.asarray(array)

    def __repr__(self) -> str:
        return repr(np.asarray(self))

    def plot(self, ax: Any = None, *, others: Sequence[Trajectory] = (), **line: Any) -> Any:
        """Draws the path on the level lines of its landscape, a mark for each step.

        Args:
            ax: the matplotlib Axes to draw on; new ones by default. Where they hold something, a
                landscape or another path, only the path is added.
            others: trajectories to draw beside it, each in a colour of its own.
            **line: as `Axes.plot` takes them: `color`, `label`, `marker`, ... Of all of the paths.

        Returns:
            The Axes.

        Raises:
            TypeError, ValueError: ax is no Axes, or one of the paths none of points of a plane.
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> import fusedstep as fs
            >>> from fusedstep.convergence import landscapes, trajectory
            >>> bowl = landscapes.saddle()
            >>> path = trajectory(lambda x: fs.Adam(x, lr=0.1), bowl, bowl.start, steps=60)
            >>> len(path.plot().lines[-1].get_xdata())
            61
        """
        paths = self._together(others)
        if ax is None:
            ax = new_axes()
            ax.set_title(getattr(self.landscape, "name", ""))
        drawing.draw_paths(as_axes(ax), self.landscape, paths, **line)
        return ax

    def animate(
        self, path: str | PathLike[str], *, others: Sequence[Trajectory] = (), fps: int = 10
    ) -> Path:
        """Saves a film of the path as it grows, step by step; of a long one, 200 of its steps.

        Each frame is a picture, for which a GIF takes an eighth of a second of one core: 8 s for 60
        steps, 25 s for 200 and more.

        Args:
            path: a file that ends in .gif, or in .mp4, for which ffmpeg must be installed.
            others: trajectories that grow beside it.
            fps: frames per second, an integer >= 1.

        Returns:
            The file's path.

        Raises:
            TypeError, ValueError: an argument of another kind or out of range, another ending.
            FileNotFoundError: there is no such folder.
            RuntimeError: an .mp4 without ffmpeg.
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> import tempfile, fusedstep as fs
            >>> from fusedstep.convergence import landscapes, trajectory
            >>> valley = landscapes.ravine()
            >>> path = trajectory(lambda x: fs.Adam(x, lr=0.3), valley, valley.start, steps=3)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     path.animate(f"{folder}/adam.gif").name
            'adam.gif'
        """
        paths = self._together(others)
        fps = as_integer("fps", fps, 1)
        if not isinstance(path, str | PathLike):
            raise TypeError(f"path must be a path, got {path!r}")
        file = Path(path)
        if file.suffix not in (".gif", ".mp4"):
            raise ValueError(f"path must end in .gif or .mp4, got {str(path)!r}")
        if not file.parent.is_dir():
            raise FileNotFoundError(f"path must be in a folder that exists, got {str(path)!r}")
        drawing.animate(file, self.landscape, paths, fps)
        return file

    def _together(self, others: Any) -> list[Trajectory]:
        """This path and others, or TypeError or ValueError for what cannot be drawn."""
        if isinstance(others, np.ndarray) or not isinstance(others, Sequence):
            raise TypeError(f"others must be a sequence of trajectories, got {others!r}")
        named = {"trajectory": self, **{f"others[{i}]": one for i, one in enumerate(others)}}
        for name, one in named.items():
            if not isinstance(one, Trajectory):
                raise TypeError(f"{name} must be a trajectory, got {type(one).__name__}")
            if one.ndim != 2 or one.shape[1] != 2 or not len(one):
                shape = one.shape
                raise ValueError(f"{name} must have shape (steps + 1, 2) to be drawn, got {shape}")
        return [self, *others]


def _label(opt: fs.Optimizer) -> str:
    """An optimizer in a few words: its name, and what numbers it goes by."""
    told = [type(opt).__name__]
    group = opt.param_groups[0]
    for name in ("lr", "momentum"):
        value = group.get(name)
        if isinstance(value, float | int) and value:
            known = "Nesterov" if name == "momentum" and group.get("nesterov") else name
            told.append(f"{known} {value:g}")
    return ", ".join(told)


def trajectory(
    opt: Callable[[NDArray[np.float64]], fs.Optimizer] | fs.Optimizer,
    landscape: Any,
    start: Any,
    steps: int,
    *,
    lookahead: bool = False,
) -> Trajectory:
    """The points that an optimizer visits.

        path[0] = start,   path[t] = the point after step t

    Args:
        opt: makes an optimizer of the parameters, a float64 array: `lambda x: fs.Adam(x, lr=0.1)`.
            Or an optimizer whose one parameter has the shape of `start`: that parameter is set to
            `start` and stepped, and states and counts go on from where they are.
        landscape: anything with a method `gradient(x)`: a `Landscape`, a `Quadratic`, your own.
        start: the first point, an array of finite numbers (n,).
        steps: how many steps to take; an integer >= 0.
        lookahead: takes each gradient inside `opt.lookahead()`, Nesterov's original form.

    Returns:
        Start and the point after each step, float64 (steps + 1, n): an array with methods `plot`
        and `animate`.

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
    found = path.view(Trajectory)
    found.landscape, found.label = landscape, _label(opt)
    return found


def _check_lookahead(opt: fs.Optimizer) -> None:
    """Raises where `opt.lookahead()` would, with the parameters as they are."""
    if not isinstance(opt, fs.SGD):
        raise TypeError(f"opt must be SGD with momentum for lookahead, got {type(opt).__name__}")
    with opt.lookahead():
        pass
