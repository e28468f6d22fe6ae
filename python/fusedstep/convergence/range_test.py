"""The learning-rate range test: one short run over all rates, and everything as it was after it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedstep._hypers import Hyper, check
from fusedstep.buffers import FlatBuffer, as_array
from fusedstep.optimizers import Optimizer

Array = NDArray[np.float64]

_RATE = Hyper("finite and > 0", lambda x: 0 < x < math.inf, "")


@dataclass(frozen=True, eq=False)
class RangeTest:
    """What a range test has seen; arrays hold one entry for each rate that was tried.

    Attributes:
        lrs: the rates, increasing by a constant factor, float64 (k,).
        losses: what each step returned, float64 (k,); the last may be NaN or infinite.
        smoothed: their bias-corrected running average, float64 (k,).
        steepest: the rate at which the smoothed loss falls fastest against log lr; None if it
            never falls.
        divergence: the rate at which the loss blew up; None if it never did.
    """

    lrs: Array
    losses: Array
    smoothed: Array
    steepest: float | None
    divergence: float | None

    def plot(self, ax: Any = None) -> Any:
        """Draws losses against rates, with both points; needs matplotlib. Returns the Axes."""
        if ax is None:
            try:
                import matplotlib.pyplot as plt
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    "plot needs matplotlib: pip install 'fusedstep[plot]'", name="matplotlib"
                ) from error
            ax = plt.subplots(layout="constrained")[1]
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
            low, first = float(finite.min()), float(finite[0])
            margin = max(first - low, 1e-12)
            ax.set_ylim(low - 0.1 * margin, first + 0.5 * margin)
        ax.set_xlabel("learning rate")
        ax.set_ylabel("loss")
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
            torch's (its parameters, states, counts and hyperparameters); a torch module
            (parameters and buffers); arrays, tensors, a FlatBuffer; or a list or dict of such.
        start, end: the first and the last rate; finite, 0 < start < end.
        steps: how many rates; an integer >= 2.
        smoothing: of the running average of the loss, in [0, 1); 0 is none.
        stop: ends the test where the smoothed loss exceeds `stop` times the lowest so far, or the
            loss is not finite; > 1. With losses below 0 it exceeds it by `stop - 1` times its size.

    Returns:
        A `RangeTest`. A rate some 3 to 10 times below `divergence`, or `steepest`, is a good start.

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
    start, end = check("start", start, _RATE), check("end", end, _RATE)
    if start >= end:
        raise ValueError(f"start must be < end ({end}), got {start}")
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise TypeError(f"steps must be an integer >= 2, got {steps!r}")
    if steps < 2:
        raise ValueError(f"steps must be an integer >= 2, got {steps}")
    smoothing = check("smoothing", smoothing, Hyper("in [0, 1)", lambda x: 0 <= x < 1, ""))
    stop = check("stop", stop, Hyper("finite and > 1", lambda x: 1 < x < math.inf, ""))
    restore = _keep(params, "params")

    lrs = start * (end / start) ** (np.arange(steps) / (steps - 1))
    lrs[-1] = end
    losses: list[float] = []
    smoothed: list[float] = []
    divergence = None
    average = 0.0
    try:
        for i, lr in enumerate(lrs.tolist()):
            loss = check("loss", step_fn(lr), Hyper("or NaN", lambda x: True, ""))
            losses.append(loss)
            average = smoothing * average + (1 - smoothing) * loss
            smoothed.append(average / (1 - smoothing ** (i + 1)))
            lowest = min(smoothed)
            if not math.isfinite(loss) or smoothed[-1] > lowest + (stop - 1) * abs(lowest):
                divergence = lr
                break
    finally:
        for put_back in restore:
            put_back()
    tried = lrs[: len(losses)]
    return RangeTest(
        tried, np.array(losses), np.array(smoothed), _steepest(tried, smoothed), divergence
    )


def _steepest(lrs: Array, smoothed: list[float]) -> float | None:
    """Where the smoothed loss falls fastest against log lr."""
    finite = np.isfinite(smoothed)
    values, rates = np.array(smoothed)[finite], np.log(lrs[finite])
    if values.size < 2:
        return None
    slope = np.gradient(values, rates)
    return float(np.exp(rates[slope.argmin()])) if slope.min() < 0 else None


def _keep(thing: Any, name: str) -> list[Callable[[], Any]]:
    """Functions that put `thing` back as it is now."""
    if isinstance(thing, FlatBuffer):
        thing = thing.flat
    elif isinstance(thing, Mapping):
        return [f for key, one in thing.items() for f in _keep(one, f"{name}[{key}]")]
    elif isinstance(thing, list | tuple):
        return [f for i, one in enumerate(thing) for f in _keep(one, f"{name}[{i}]")]
    if isinstance(thing, Optimizer):
        return [*_keep(thing.params, name), _keep_optimizer(thing)]
    if hasattr(thing, "load_state_dict") and hasattr(thing, "param_groups"):  # torch's
        held = [param for group in thing.param_groups for param in group["params"]]
        return [*_keep(held, name), _keep_state(thing)]
    if hasattr(thing, "load_state_dict") and hasattr(thing, "parameters"):  # a torch module
        return _keep([*thing.parameters(), *thing.buffers()], name)
    if hasattr(thing, "detach"):
        return [_keep_tensor(thing)]
    array = as_array(thing, name)
    if not array.flags.writeable:
        raise ValueError(f"{name} must be writable to be put back, got a read-only array")
    saved = array.copy()
    return [lambda: np.copyto(array, saved)]


def _keep_tensor(tensor: Any) -> Callable[[], Any]:
    held = tensor.detach()
    saved = held.clone()
    return lambda: held.copy_(saved)


def _keep_state(optimizer: Any) -> Callable[[], Any]:
    saved = copy.deepcopy(optimizer.state_dict())
    return lambda: optimizer.load_state_dict(saved)


def _keep_optimizer(optimizer: Optimizer) -> Callable[[], Any]:
    """As `_keep_state`, schedules included, which a state_dict holds as their last values."""
    hypers = [dict(group) for group in optimizer.param_groups]
    used = optimizer._used
    put_back_state = _keep_state(optimizer)

    def put_back() -> None:
        put_back_state()
        for group, values in zip(optimizer.param_groups, hypers, strict=True):
            for key, value in values.items():
                if key != "params":
                    group[key] = value
        optimizer._used = used

    return put_back
