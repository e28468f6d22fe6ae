"""The learning-rate range test: one short run over all rates, and everything as it was after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from fusedstep._arrays import as_array, is_array, name_params
from fusedstep._hypers import ANY, FRACTION, POSITIVE, Hyper, as_integer, check
from fusedstep._optimizer import Optimizer
from fusedstep._plot import as_axes, new_axes
from fusedstep.buffers import FlatBuffer
from fusedstep.convergence.arrays import Array


@dataclass(frozen=True, eq=False, repr=False)
class RangeTest:
    """What a range test has seen; arrays hold one entry for each rate that was tried.

        slope_i = sum_j w_ij (j - m_i) l_j / sum_j w_ij (j - m_i)^2     m_i the mean of j under w_i
        w_ij    = smoothing^(2 (|j - i| - 1)),  1 at i itself           l_j the losses

    The slope of the straight line that fits the losses around the i-th rate best: it looks as far
    ahead as back, and so lags behind by nothing, which the running average does by some
    smoothing/(1 - smoothing) steps.

    Attributes:
        lrs: the rates, increasing by a constant factor, float64 (k,).
        losses: what each step returned, float64 (k,); the last may be NaN or infinite.
        smoothed: their bias-corrected running average, float64 (k,).
        steepest: the rate at which the loss falls fastest against log lr, where the slope above is
            least, of those below `divergence`; None if it never falls.
        divergence: the rate from which on the loss rose until it blew up, each above the mean of
            the three before it; None if it never blew up.

    Example:
        >>> import numpy as np
        >>> from fusedstep.convergence import lr_range_test
        >>> fall = lambda lr: 1 / (1 + 10 * lr)  # falls fastest against log lr at 0.1
        >>> lr_range_test(fall, np.zeros(1), start=1e-4, end=100.0, steps=121)
        RangeTest of 121 rates, 0.0001 to 100, of losses 0.999 to 0.000999
          steepest    0.1   where the loss falls fastest
          divergence  none  the loss never blew up
    """

    lrs: Array
    losses: Array
    smoothed: Array
    steepest: float | None
    divergence: float | None

    def __repr__(self) -> str:
        """Three lines: what was tried, and both points."""
        ends = [f"{values[0]:.3g} to {values[-1]:.3g}" for values in (self.lrs, self.losses)]
        points = [
            ("steepest", self.steepest, "where the loss falls fastest", "the loss never falls"),
            ("divergence", self.divergence, "from where on it blew up", "the loss never blew up"),
        ]
        told = [
            f"  {name:10}  {'none' if rate is None else f'{rate:.2g}':4}  "
            + (missing if rate is None else found)
            for name, rate, found, missing in points
        ]
        rates = "1 rate" if self.lrs.size == 1 else f"{self.lrs.size} rates"
        return "\n".join([f"RangeTest of {rates}, {ends[0]}, of losses {ends[1]}", *told])

    def plot(self, ax: Any = None) -> Any:
        """Draws losses against rates, with both points; needs matplotlib. Returns the Axes."""
        ax = new_axes() if ax is None else as_axes(ax)
        ax.semilogx(self.lrs, self.losses, ".", color="0.7", label="loss of each step")
        ax.semilogx(self.lrs, self.smoothed, lw=2, label="smoothed")
        for rate, style, what in (
            (self.steepest, "--", "steepest"),
            (self.divergence, ":", "diverges"),
        ):
            if rate is not None:
                ax.axvline(rate, color="0.3", ls=style, label=f"{what} at {rate:.2g}")
        finite = self.smoothed[np.isfinite(self.smoothed)]
        if finite.size:  # the blow-up would flatten all else
            low, first = float(self.losses[np.isfinite(self.losses)].min()), float(finite[0])
            margin = max(first - low, 1e-12)
            ax.set_ylim(low - 0.1 * margin, first + 0.5 * margin)
        ax.set(xlabel="learning rate", ylabel="loss")
        ax.legend()
        return ax


def lr_range_test(
    step_fn: Callable[[float], Any],
    params: Any,
    *,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.9,
    stop: float = 4.0,
) -> RangeTest:
    """Trains with a rate that grows by a constant factor, and watches where the loss blows up.

        lr_i = start * (end/start)^(i/(steps-1)),   i = 0 ... steps-1

    Args:
        step_fn: `step_fn(lr)` takes one training step at the rate, on a batch of its own, and
            returns the loss, a number.
        params: what is put back afterwards, bit for bit: an optimizer, ours, `fusedstep.torch`'s or
            torch's (its parameters, their gradients, states, counts, hyperparameters and what a
            `ReduceOnPlateau` knows); a torch module (parameters, gradients and buffers); arrays,
            tensors, a FlatBuffer; or a list or dict of such. Nothing else is: data loaders and
            random generators go on from where they are.
        start, end: the first and the last rate; finite, 0 < start < end.
        steps: how many rates; an integer >= 2. Their number decides how finely the points are
            found: ten for each factor of 10 is little, a hundred plenty.
        smoothing: of the running average of the loss, and of its slope, which is centred (see
            `RangeTest`); in [0, 1); 0 is none.
        stop: ends the test where the smoothed loss exceeds `stop` times the lowest so far, or the
            loss is not finite; > 1. With losses below 0 it exceeds it by `stop - 1` times its size.

    Returns:
        A `RangeTest`. `steepest`, or a rate some 3 to 10 times below `divergence`, is a good start;
        nearer to 10 where there is little noise: too large a rate shows late then, as a direction
        that has come to rest must first grow again.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range. What `step_fn` raises is
            passed on. Everything is put back then, too.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> from fusedstep.convergence import lr_range_test
        >>> x = np.array([1.0, 1.0])
        >>> opt = fs.SGD(x, lr=0.1)
        >>> def step(lr):
        ...     opt.param_groups[0]["lr"] = lr
        ...     loss = 0.5 * float(x @ x)
        ...     _ = opt.step(x.copy())
        ...     return loss
        >>> found = lr_range_test(step, opt, start=0.01, end=100.0)
        >>> found.divergence > 2  # 2/lambda_max
        True
        >>> x, opt.steps, opt.param_groups[0]["lr"]
        (array([1., 1.]), 0, 0.1)

    Reference:
        Smith 2017, section 3.3, https://arxiv.org/abs/1506.01186
    """
    if not callable(step_fn):
        raise TypeError(f"step_fn must be callable, got {step_fn!r}")
    start, end = check("start", start, POSITIVE), check("end", end, POSITIVE)
    if start >= end:
        raise ValueError(f"start must be < end ({end}), got {start}")
    steps = as_integer("steps", steps, 2)
    smoothing = check("smoothing", smoothing, FRACTION)
    stop = check("stop", stop, Hyper("finite and > 1", lambda x: 1 < x < math.inf, ""))
    restore = _keep(params, "params")
    if not restore:
        raise ValueError("params must have something to put back, got none")

    lrs = np.geomspace(start, end, steps)
    losses: list[float] = []
    smoothed: list[float] = []
    blew_up = False
    average = 0.0
    try:
        for i, lr in enumerate(lrs.tolist()):
            loss = check("step_fn(lr)", step_fn(lr), ANY)
            losses.append(loss)
            # The bias-corrected running average, in a form that a constant loss does not move.
            average += (1 - smoothing) / (1 - smoothing ** (i + 1)) * (loss - average)
            smoothed.append(average)
            lowest = min(smoothed)
            if not math.isfinite(loss) or smoothed[-1] > lowest + (stop - 1) * abs(lowest):
                blew_up = True
                break
    finally:
        _put_back(restore)
    tried = lrs[: len(losses)]
    turn = _turn(losses) if blew_up else None
    steepest = _steepest(losses[:turn], smoothing)
    return RangeTest(
        tried,
        np.array(losses),
        np.array(smoothed),
        None if steepest is None else float(tried[steepest]),
        None if turn is None else float(tried[turn]),
    )


def _turn(losses: list[float]) -> int:
    """The place from which on the loss rises: the averages that stop the test come too late."""
    last = len(losses) - 1
    while last > 1:
        before = losses[max(last - 4, 0) : last - 1]
        if losses[last - 1] <= sum(one / len(before) for one in before):
            break
        last -= 1
    return last


def _steepest(losses: list[float], smoothing: float) -> int | None:
    """Where the straight line that fits the finite losses around a place best falls fastest."""
    if not any(later < before for before, later in pairwise(losses)):
        return None  # what rounding makes of equal ones is no fall
    size = max(map(abs, losses)) or 1.0
    y = np.array(losses) / size  # of which no square overflows
    # One sum over j for each i is a convolution. Squared, the weights of both sides together
    # average over as many losses as the running average does over those of its one.
    far = max(len(losses) - 1, 1)
    k = np.arange(-far, far + 1)
    weight = (smoothing**2) ** np.maximum(np.abs(k) - 1.0, 0.0)
    here = slice(far, far + len(losses))
    ones = np.ones(len(losses))

    def total(values: Array, power: int) -> Array:
        """The weighted sum of (j - i)^power * values_j, for each i."""
        return np.convolve(values, (weight * k**power)[::-1])[here]

    w, wk, wkk, wy, wky = (total(*one) for one in ((ones, 0), (ones, 1), (ones, 2), (y, 0), (y, 1)))
    slope = (wky - wk / w * wy) / (wkk - wk**2 / w)
    return int(slope.argmin()) if slope.min() < 0 else None


# -- what is put back -----------------------------------------------------------------------------


def _keep(thing: Any, name: str) -> list[Callable[[], Any]]:
    """Functions that put `thing` back as it is now, in place."""
    if isinstance(thing, FlatBuffer):
        thing = thing.flat
    elif isinstance(thing, Optimizer):
        return [*_keep(thing.params, name), thing._keep()]
    elif hasattr(thing, "param_groups") and hasattr(thing, "state"):  # torch's
        return [*_keep_groups(thing), *_keep_nested(thing.state)]
    elif hasattr(thing, "named_buffers") and hasattr(thing, "modules"):  # a torch module
        held = [h for m in thing.modules() for h in (m._parameters, m._buffers)]
        return [f for one in held for f in _keep_nested(one)]
    elif isinstance(thing, Iterable) and not (isinstance(thing, str | bytes) or is_array(thing)):
        named = name_params(thing)
        return [f for key, one in named.items() for f in _keep(one, f"{name}[{key}]")]
    if hasattr(thing, "detach"):
        return _keep_tensor(thing)
    array = as_array(thing, name)
    if array.size == 0:
        return []
    if not array.flags.writeable:
        raise ValueError(f"{name} must be writable to be put back, got a read-only array")
    saved = array.copy()
    return [lambda: np.copyto(array, saved)]


def _put_back(restore: list[Callable[[], Any]]) -> None:
    """Calls them all; raises the first error afterwards."""
    errors = []
    for one in restore:
        try:
            one()
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _keep_tensor(tensor: Any) -> list[Callable[[], Any]]:
    """The memory of a tensor, its values, and those of its gradient."""
    held, saved = tensor.detach(), tensor.detach().clone()
    has_grad = tensor.is_leaf and tensor.requires_grad
    grad = tensor.grad if has_grad else None
    is_expanded = any(n > 1 and not step for n, step in zip(held.shape, held.stride(), strict=True))

    def put_back() -> None:
        if tensor.data_ptr() != held.data_ptr() or tensor.dtype != held.dtype:
            if has_grad:
                tensor.grad = None  # which may be of another type
            tensor.data = held
        if not is_expanded:  # one in which nothing can be written
            held.copy_(saved)
        if has_grad:
            tensor.grad = grad

    return [*([] if grad is None else _keep_tensor(grad)), put_back]


def _keep_groups(optimizer: Any) -> list[Callable[[], Any]]:
    groups = optimizer.param_groups
    kept = _keep([param for group in groups for param in group["params"]], "params")
    return kept + [f for group in groups for f in _keep_nested(group, {"params"})]


def _keep_nested(held: Any, without: Set[str] = frozenset()) -> list[Callable[[], Any]]:
    """A dict of tensors, numbers, dicts of them: the same objects; of all else, copies."""
    before = {key: value for key, value in held.items() if key not in without}
    kept: list[Callable[[], Any]] = []
    for key, value in before.items():
        if isinstance(value, dict):
            kept += _keep_nested(value)
        elif hasattr(value, "detach"):
            kept += _keep_tensor(value)
        elif not isinstance(value, int | float | str | tuple | type(None)):
            before[key] = copy.deepcopy(value)

    def put_back() -> None:
        for key in [key for key in held if key not in before and key not in without]:
            del held[key]
        held.update(before)

    return [put_back, *kept]
