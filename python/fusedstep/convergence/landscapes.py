"""Small functions of two variables with known facts, to watch optimizers on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusedstep._hypers import FINITE, POSITIVE, check
from fusedstep._plot import as_axes, new_axes
from fusedstep.convergence.arrays import Array, as_points
from fusedstep.convergence.drawing import draw_contours

__all__ = [
    "ALL",
    "Landscape",
    "beale",
    "plateau",
    "ravine",
    "rosenbrock",
    "saddle",
    "two_minima",
]


def __dir__() -> list[str]:
    return sorted(__all__)


_Function = Callable[[Array, Array], Array]
_Gradient = Callable[[Array, Array], tuple[Array, Array]]
Point = tuple[float, float]


@dataclass(frozen=True)
class Landscape:
    """A function of two variables, its gradient, and what is known of it.

    `value(x)` and `gradient(x)` take points (..., 2), and `landscape(x)` is the value.

    Attributes:
        name: what it is called.
        start: a point to start from that shows what is hard about it.
        minima: all local minima, the lowest first.
        xlim, ylim: a window that shows start and minima.
        facts: what is hard about it, in a sentence or two.
        f, df: the function and its two derivatives, each of arrays x and y.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> valley = landscapes.rosenbrock()
        >>> valley.minima, valley.value([1.0, 1.0]), valley.gradient([0.0, 0.0])
        (((1.0, 1.0),), 0.0, array([-2.,  0.]))
    """

    name: str
    start: Point
    minima: tuple[Point, ...]
    xlim: Point
    ylim: Point
    facts: str
    f: _Function = field(repr=False)
    df: _Gradient = field(repr=False)

    def value(self, x: Any) -> Any:
        """The function at `x`, an array (..., 2); a float for one point."""
        values = np.asarray(self.f(*_split(x)))
        return float(values) if values.ndim == 0 else values

    __call__ = value

    def gradient(self, x: Any) -> Array:
        """The gradient at `x`, of its shape (..., 2)."""
        return np.stack(np.broadcast_arrays(*self.df(*_split(x))), -1)

    def plot(self, ax: Any = None) -> Any:
        """Draws level lines in the landscape's window, closer where it is low, and stars at minima.

        Args:
            ax: the matplotlib Axes to draw on; new ones by default. The `plot` of a trajectory
                then draws its path on them.

        Returns:
            The Axes.

        Raises:
            TypeError: ax is no Axes.
            ModuleNotFoundError: matplotlib is not installed.

        Example:
            >>> from fusedstep.convergence import landscapes
            >>> ax = landscapes.rosenbrock().plot()
            >>> ax.get_title(), [float(x) for x in ax.get_xlim()]
            ('Rosenbrock', [-2.0, 2.0])
        """
        if ax is None:
            ax = new_axes()
            ax.set_title(self.name)
        draw_contours(as_axes(ax), self, self.xlim, self.ylim)
        return ax


def _split(x: Any) -> tuple[Array, Array]:
    points = as_points("x", x, 2)
    return points[..., 0], points[..., 1]


def ravine(condition: float = 50.0) -> Landscape:
    """A long narrow valley: `f = (x^2 + condition * y^2) / 2`.

    Curvature 1 along x and `condition` along y: gradient descent diverges from a rate of
    `2/condition` on, and below it crawls along x.

    Args:
        condition: the curvature across; finite and > 0.

    Raises:
        TypeError, ValueError: condition is not such a number.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> landscapes.ravine(condition=10).gradient([1.0, 1.0])
        array([ 1., 10.])
    """
    kappa = check("condition", condition, POSITIVE)
    return Landscape(
        "ravine", (-10.0, 1.0), ((0.0, 0.0),), (-11.0, 3.0), (-2.0, 2.0),
        f"A quadratic {kappa:g} times as curved across as along.",
        lambda x, y: (x**2 + kappa * y**2) / 2,
        lambda x, y: (x, kappa * y),
    )  # fmt: skip


def saddle() -> Landscape:
    """A saddle between two minima: `f = x^2/2 - y^2/2 + y^4/4`.

    The gradient vanishes at the origin, which is a minimum along x and a maximum along y; the
    minima are (0, 1) and (0, -1), of value -1/4.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> landscapes.saddle().value([[0.0, 0.0], [0.0, 1.0]])
        array([ 0.  , -0.25])
    """
    return Landscape(
        "saddle", (-1.5, 1e-3), ((0.0, 1.0), (0.0, -1.0)), (-2.0, 2.0), (-1.75, 1.75),
        "A saddle at the origin, minima at (0, 1) and (0, -1).",
        lambda x, y: x**2 / 2 - y**2 / 2 + y**4 / 4,
        lambda x, y: (x, y**3 - y),
    )  # fmt: skip


def two_minima() -> Landscape:
    """A local minimum beside the global one: `f = x^4/4 - x^3/15 - x^2/2 + x/5 + y^2/2`.

    `df/dx = (x + 1)(x - 1/5)(x - 1)`: the global minimum is (-1, 0), of value -23/60, a local one
    (1, 0), of value -7/60, and a saddle (1/5, 0) lies between.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> landscapes.two_minima().value([[-1.0, 0.0], [1.0, 0.0]]).round(4)
        array([-0.3833, -0.1167])
    """
    return Landscape(
        "two minima", (1.6, 1.2), ((-1.0, 0.0), (1.0, 0.0)), (-2.0, 2.0), (-1.5, 1.5),
        "The global minimum at (-1, 0), a local one at (1, 0), a saddle at (0.2, 0).",
        lambda x, y: x**4 / 4 - x**3 / 15 - x**2 / 2 + x / 5 + y**2 / 2,
        lambda x, y: ((x + 1) * (x - 0.2) * (x - 1), y),
    )  # fmt: skip


def rosenbrock(a: float = 1.0, b: float = 100.0) -> Landscape:
    """Rosenbrock's banana: `f = (a - x)^2 + b * (y - x^2)^2`, minimum 0 at (a, a^2).

    A bent valley, flat along its floor and steep across.

    Args:
        a: where the minimum is, x = a; finite.
        b: how steep the walls are; finite and > 0.

    Raises:
        TypeError, ValueError: an argument is not such a number.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> round(landscapes.rosenbrock(a=1, b=100).value([-1.2, 1.0]), 4)
        24.2

    Reference:
        Rosenbrock 1960, https://doi.org/10.1093/comjnl/3.3.175
    """
    a = check("a", a, FINITE)
    b = check("b", b, POSITIVE)
    return Landscape(
        "Rosenbrock", (-1.2, 1.0), ((a, a * a),),
        (min(-2.0, a - 1), max(2.0, a + 1)), (-1.0, max(3.0, a * a + 2)),
        f"A bent valley whose floor leads to the minimum at ({a:g}, {a * a:g}).",
        lambda x, y: (a - x) ** 2 + b * (y - x**2) ** 2,
        lambda x, y: (-2 * (a - x) - 4 * b * x * (y - x**2), 2 * b * (y - x**2)),
    )  # fmt: skip


def beale() -> Landscape:
    """Beale's function: `f = (3/2 - x + xy)^2 + (9/4 - x + xy^2)^2 + (21/8 - x + xy^3)^2`.

    The minimum is 0 at (3, 1/2); almost flat around it, steep at the corners.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> landscapes.beale().value([0.0, 0.0])
        14.203125

    Reference:
        Beale 1958, On an iterative method of finding a local minimum of a function of more than one
        variable, Princeton University
    """
    constants = (1.5, 2.25, 2.625)

    def value(x: Array, y: Array) -> Array:
        rests = [c - x + x * y**k for k, c in enumerate(constants, 1)]
        total: Array = np.sum(np.square(rests), axis=0)
        return total

    def gradient(x: Array, y: Array) -> tuple[Array, Array]:
        gx, gy = np.zeros_like(x), np.zeros_like(x)
        for k, c in enumerate(constants, 1):
            rest = 2 * (c - x + x * y**k)
            gx, gy = gx + rest * (y**k - 1), gy + rest * k * x * y ** (k - 1)
        return gx, gy

    return Landscape(
        "Beale", (1.0, 1.5), ((3.0, 0.5),), (-0.5, 4.5), (-1.0, 2.0),
        "Steep at the corners, almost flat around the minimum at (3, 0.5).",
        value, gradient,
    )  # fmt: skip


def plateau() -> Landscape:
    """A pit in a plain: `f = 1 - exp(-(x^2 + y^2)/2)`, minimum 0 at the origin.

    Away from the pit the gradient is next to nothing, and no rate that is stable in the pit gets
    there soon; methods that divide by the gradient's size do.

    Example:
        >>> from fusedstep.convergence import landscapes
        >>> landscapes.plateau().value([[0.0, 0.0], [9.0, 0.0]])
        array([0., 1.])
    """

    def pit(x: Array, y: Array) -> Array:
        return np.exp(-(x**2 + y**2) / 2)

    return Landscape(
        "plateau", (-3.0, 2.0), ((0.0, 0.0),), (-4.0, 2.0), (-2.5, 3.0),
        "A pit in a plain: at the start the gradient is 0.005 long.",
        lambda x, y: 1 - pit(x, y),
        lambda x, y: (x * pit(x, y), y * pit(x, y)),
    )  # fmt: skip


ALL = (ravine(), saddle(), two_minima(), rosenbrock(), beale(), plateau())
