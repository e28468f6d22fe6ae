"""Gradient descent and momentum on quadratics, where convergence is known in closed form."""

from __future__ import annotations

import enum
import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

import fusedstep as fs
from fusedstep._hypers import FINITE, FRACTION, POSITIVE, as_steps, check
from fusedstep.convergence.arrays import Array, as_finite, as_points
from fusedstep.convergence.trajectories import trajectory


class Regime(str, enum.Enum):
    """What a step does to the error in one direction, `e <- (1 - lr*lambda) e` without momentum."""

    MONOTONE = "monotone"
    ONE_STEP = "one step"
    OSCILLATING = "oscillating"
    AT_THE_LIMIT = "at the limit"
    DIVERGING = "diverging"

    def __str__(self) -> str:
        return self.value


class MomentumOptimum(NamedTuple):
    """The heavy-ball method at its best on a quadratic."""

    lr: float
    momentum: float
    contraction: float  # of the error by each step, in the long run


class Quadratic:
    """A quadratic with one minimum, and how gradient descent finds it.

        f(x) = 1/2 x'Ax + x'b + c,   gradient Ax + b,   minimiser x* = -A^-1 b

    In the coordinates of A's eigenvectors a step of gradient descent multiplies the error x - x* by
    `1 - lr*lambda`, in each direction for itself; with momentum mu, `v <- mu*v + g, x <- x - lr*v`,
    the error follows the roots of `z^2 - (1 + mu - lr*lambda) z + mu`.

    Args:
        A: a symmetric positive definite matrix (n, n), or the diagonal (n,) of one.
        b: (n,); zeros by default.
        c: a number.

    All are copied, to float64. A matrix that is symmetric but for rounding is made symmetric.

    Raises:
        TypeError: something is not of real numbers.
        ValueError: shapes that do not fit, NaN or infinity, a matrix that is not symmetric, or one
            that is not positive definite, with its smallest eigenvalue.

    Example:
        >>> from fusedstep.convergence import Quadratic
        >>> q = Quadratic([1.0, 10.0], b=[-1.0, -10.0])
        >>> q.minimiser, q.minimum
        (array([1., 1.]), -5.5)
        >>> q.condition_number, q.largest_stable_rate, round(q.best_rate, 4)
        (10.0, 0.2, 0.1818)
        >>> [str(regime) for regime in q.regime(lr=0.15)]
        ['monotone', 'oscillating']

    Reference:
        Polyak 1964, https://doi.org/10.1016/0041-5553(64)90137-5; Goodfellow, Bengio & Courville
        2016, section 4.3; Goh 2017, https://distill.pub/2017/momentum
    """

    def __init__(self, A: Any, b: Any = None, c: float = 0.0) -> None:  # A as in f
        matrix = as_finite("A", A, (1, 2))
        n = matrix.shape[0]
        if matrix.ndim == 2:
            if matrix.shape != (n, n):
                raise ValueError(f"A must be square, got shape {matrix.shape}")
            off = float(np.abs(matrix - matrix.T).max())
            if off > 1e-10 * float(np.abs(matrix).max()):
                raise ValueError(f"A must be symmetric, got A - A' up to {off:g}")
            matrix = (matrix + matrix.T) / 2
            eigenvalues, eigenvectors = np.linalg.eigh(matrix)
        else:
            order = np.argsort(matrix, kind="stable")
            eigenvalues, eigenvectors = matrix[order], np.eye(n)[:, order]
        # An eigenvalue of a matrix is known no better than this.
        self._rounding = (4 if matrix.ndim == 1 else 8 * n) * np.finfo(float).eps
        if not eigenvalues[0] > self._rounding * eigenvalues[-1] * (matrix.ndim == 2):
            raise ValueError(
                "A must be positive definite, got a matrix whose smallest eigenvalue is"
                f" {eigenvalues[0]:g}"
            )
        shift: Array = np.zeros(n) if b is None else as_finite("b", b, (1,))
        if shift.shape != (n,):
            raise ValueError(f"b must have shape {(n,)}, got {shift.shape}")
        self.A: Array = matrix
        self.b: Array = shift
        self.c: float = check("c", c, FINITE)
        self.eigenvalues: Array = eigenvalues
        self.eigenvectors: Array = eigenvectors
        for array in (self.A, self.b, self.eigenvalues, self.eigenvectors):
            array.flags.writeable = False

    def __repr__(self) -> str:
        return f"Quadratic(n={self.n}, condition_number={self.condition_number:g})"

    # -- the function -----------------------------------------------------------------------------

    @property
    def n(self) -> int:
        """The number of dimensions."""
        return len(self.b)

    def value(self, x: Any) -> Any:
        """f at `x`, an array (..., n); a float for one point."""
        points = as_points("x", x, self.n)
        values = 0.5 * (points * self._times(points)).sum(-1) + points @ self.b + self.c
        return float(values) if values.ndim == 0 else values

    __call__ = value

    def gradient(self, x: Any) -> Array:
        """The gradient at `x`, of its shape (..., n)."""
        slope: Array = self._times(as_points("x", x, self.n)) + self.b
        return slope

    def _times(self, points: Array) -> Array:
        product: Array = points * self.A if self.A.ndim == 1 else points @ self.A
        return product

    @cached_property
    def minimiser(self) -> Array:
        """x* = -A^-1 b."""
        solved = -self.b / self.A if self.A.ndim == 1 else np.linalg.solve(self.A, -self.b)
        found: Array = np.asarray(solved, np.float64)
        found.flags.writeable = False
        return found

    @property
    def minimum(self) -> float:
        """f at the minimiser."""
        return float(self.value(self.minimiser))

    # -- gradient descent -------------------------------------------------------------------------

    @property
    def condition_number(self) -> float:
        """kappa = lambda_max / lambda_min."""
        return float(self.eigenvalues[-1] / self.eigenvalues[0])

    @property
    def optimal_rates(self) -> Array:
        """1/lambda_i for each eigenvalue: Newton's step, which ends the error in its direction."""
        rates: Array = 1 / self.eigenvalues
        return rates

    @property
    def largest_stable_rate(self) -> float:
        """2/lambda_max: gradient descent converges below it and diverges above."""
        return float(2 / self.eigenvalues[-1])

    @property
    def best_rate(self) -> float:
        """2/(lambda_min + lambda_max), where the two extreme directions contract alike."""
        return float(2 / (self.eigenvalues[0] + self.eigenvalues[-1]))

    @property
    def best_contraction(self) -> float:
        """(kappa - 1)/(kappa + 1), what each step at the best rate leaves of the error."""
        low, high = self.eigenvalues[0], self.eigenvalues[-1]
        return float((high - low) / (high + low))

    # -- and with momentum ------------------------------------------------------------------------

    @property
    def best_momentum(self) -> MomentumOptimum:
        """Polyak's `lr` and `momentum`, whose contraction has sqrt(kappa) for kappa.

        lr = 4/(sqrt(lambda_max) + sqrt(lambda_min))^2;  momentum is the contraction squared, which
        is (sqrt(kappa) - 1)/(sqrt(kappa) + 1).
        """
        low, high = map(math.sqrt, (self.eigenvalues[0], self.eigenvalues[-1]))
        contraction = (high - low) / (high + low)
        return MomentumOptimum(4 / (high + low) ** 2, contraction**2, contraction)

    def stable_rates(self, momentum: float = 0.0) -> tuple[float, float]:
        """The open interval of rates that converge: 0 to 2*(1 + momentum)/lambda_max."""
        mu = check("momentum", momentum, FRACTION)
        return 0.0, float(2 * (1 + mu) / self.eigenvalues[-1])

    def is_stable(self, lr: float, momentum: float = 0.0) -> bool:
        """Whether the error shrinks to nothing from every start."""
        return all(r not in (Regime.AT_THE_LIMIT, Regime.DIVERGING)
                   for r in self.regime(lr, momentum))  # fmt: skip

    def contraction(self, lr: float, momentum: float = 0.0) -> float:
        """What each step leaves of the error in the worst direction, in the long run.

        The largest `|1 - lr*lambda|`, with momentum the largest modulus of the roots.
        """
        return float(np.abs(self._roots(*self._checked(lr, momentum))).max())

    def regime(self, lr: float, momentum: float = 0.0) -> list[Regime]:
        """How the error in each direction goes, in the order of `eigenvalues`.

        With momentum: monotone where both roots are real and positive, oscillating where they are
        complex or negative, by their modulus at the limit (1) or diverging (above 1). A rate is on
        a boundary if it is within the rounding of the eigenvalues.

        Raises:
            TypeError, ValueError: lr is not a finite number > 0, or momentum not one in [0, 1).
        """
        rate, mu = self._checked(lr, momentum)
        reach = rate * self.eigenvalues
        limit = 2 * (1 + mu)
        slack = self._rounding * rate * self.eigenvalues[-1]
        found = []
        for one, roots in zip(reach, self._roots(rate, mu), strict=True):
            if abs(one - limit) <= slack:
                found.append(Regime.AT_THE_LIMIT)
            elif one > limit:
                found.append(Regime.DIVERGING)
            elif mu == 0 and abs(one - 1) <= slack:
                found.append(Regime.ONE_STEP)
            else:
                turns = np.any(roots.imag != 0) or np.any(roots.real < 0)
                found.append(Regime.OSCILLATING if turns else Regime.MONOTONE)
        return found

    def _checked(self, lr: float, momentum: float) -> tuple[float, float]:
        return check("lr", lr, POSITIVE), check("momentum", momentum, FRACTION)

    def _roots(self, lr: float, momentum: float) -> Any:
        """The two roots of each direction, (n, 2) complex; one of them 0 without momentum."""
        half = (1 + momentum - lr * self.eigenvalues) / 2
        if momentum == 0:
            return np.stack([2 * half, 0 * half], -1).astype(complex)
        root = np.sqrt((half**2 - momentum).astype(complex))
        return np.stack([half + root, half - root], -1)

    # -- predicted, and done ----------------------------------------------------------------------

    def predicted_error(self, x0: Any, lr: float, t: Any, momentum: float = 0.0) -> Array:
        """x_t - x* after t steps from `x0`, in closed form.

        Args:
            x0: the start, (n,); the buffer of the momentum starts at 0.
            lr: finite and > 0.
            t: the number of steps, an int >= 0 or an array of them.
            momentum: in [0, 1).

        Returns:
            An array of t's shape and a last axis of n; infinite, or where directions mix NaN, when
            the error is beyond the range of a double.

        Raises:
            TypeError, ValueError: an argument of another kind, shape or range.
        """
        rate, mu = self._checked(lr, momentum)
        start = self._start(x0)
        steps = as_steps("t", t)
        error = (start - self.minimiser) @ self.eigenvectors
        # (e, v) <- [[1 - lr*lambda, -lr*mu], [lambda, mu]] (e, v); powers of the matrix are right
        # also where its two roots are one, and an eigendecomposition has no two vectors.
        ones = np.ones(self.n)
        matrix = np.moveaxis(
            np.array(
                [[1 - rate * self.eigenvalues, -rate * mu * ones], [self.eigenvalues, mu * ones]]
            ),
            -1,
            0,
        )
        result = np.empty((*steps.shape, self.n))
        with np.errstate(over="ignore", invalid="ignore"):
            for place in np.ndindex(steps.shape):
                along = _power(matrix, int(steps[place]))[:, 0, 0] * error
                along[error == 0] = 0
                result[place] = self._turned(along)
        return result

    def _turned(self, along: Array) -> Array:
        """From the coordinates of the eigenvectors to x's."""
        if self.A.ndim == 2:
            return self.eigenvectors @ along
        result = np.empty(self.n)  # without the zeros of a product, which infinity makes NaN
        result[self.eigenvectors.argmax(0)] = along
        return result

    def simulate(self, x0: Any, lr: float, steps: int, momentum: float = 0.0) -> Array:
        """The iterates x_0 ... x_steps, (steps + 1, n), by `fusedstep.SGD` in float64."""
        rate, mu = self._checked(lr, momentum)
        return trajectory(lambda x: fs.SGD(x, lr=rate, momentum=mu), self, self._start(x0), steps)

    def _start(self, x0: Any) -> Array:
        start = as_finite("x0", x0, (1,))
        if start.shape != (self.n,):
            raise ValueError(f"x0 must have shape {(self.n,)}, got {start.shape}")
        return start


def _power(matrix: Array, t: int) -> Array:
    """The t-th power of each 2 x 2 matrix, also where one of them overflows on the way."""
    power = np.linalg.matrix_power(matrix, t)
    lost = ~np.isfinite(power).all((-1, -2))
    if lost.any():  # there, of the matrix over its spectral radius, which is put back at the end
        radius = np.abs(np.linalg.eigvals(matrix[lost])).max(-1)[:, None, None]
        power[lost] = np.linalg.matrix_power(matrix[lost] / radius, t) * radius**t
    return power
