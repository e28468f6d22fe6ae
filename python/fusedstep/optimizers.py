"""The optimizers, each a small class: its arguments, its equation in words, its specification.

From simple to complex. What they share is `Optimizer`; what a step does is in csrc/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fusedstep import _lookahead
from fusedstep._arrays import as_array
from fusedstep._groups import Group, ParamGroup
from fusedstep._hypers import FINITE, HYPERS
from fusedstep._optimizer import Optimizer, StepReport, given
from fusedstep._spec import Spec
from fusedstep._storage import decoded
from fusedstep._types import Betas, How, Pair, Params, Rate, Unpack

for _public in (Group, Optimizer, ParamGroup, StepReport):  # where pickles look for them
    _public.__module__ = __name__


def _check_nesterov(group: Mapping[str, Any]) -> None:
    dampened = group["dampening"] != 0 and not group["dampened_nesterov"]
    if group["nesterov"] and (group["momentum"] <= 0 or dampened):
        raise ValueError(
            "nesterov needs momentum > 0 and dampening = 0, got"
            f" momentum={group['momentum']}, dampening={group['dampening']}"
        )


def _check_momentum(group: Mapping[str, Any]) -> None:
    if group["nesterov"] and group["momentum"] <= 0:
        raise ValueError(f"nesterov needs momentum > 0, got momentum={group['momentum']}")


def _check_adam(group: Mapping[str, Any]) -> None:
    decoupled = group.get("decoupled_weight_decay", True)  # AdamW's always is
    if group["decay_after"] and group["weight_decay"] != 0 and not decoupled:
        raise ValueError("decay_after needs decoupled_weight_decay = True, got False")


class SGD(Optimizer):
    """Stochastic gradient descent, plain, with momentum, or Nesterov's.

        b = g                                   at the first update, then
        b = momentum * b + (1 - dampening) * g
        p = p - lr * b                          plain: g for b; nesterov: g + momentum*b for b

    With `lr_in_momentum` the rate stands in the buffer, so that a change of it does not touch what
    is there: `b = momentum * b + lr * g`, `p = p - b`.

    Use:
        vision models and convex problems, mostly with momentum 0.9 and a schedule. The
        least state, and the rate that needs the most tuning: `fusedstep.convergence` says
        what it may be.

    Args: see below

    State:
        None, or with momentum `momentum_buffer`, 4 bytes per element (8 for float64). A float32
        step moves 12 bytes per element, 20 with momentum.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.SGD(w, lr=0.5, momentum=0.9).step(np.array([1.0, -2.0], np.float32))
        StepReport(step=1, lr=0.5, elements=2)
        >>> w
        array([0.5, 3. ], dtype=float32)

    Reference:
        Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html

    Differs from:
        Keras, whose rate is in the momentum; `fusedstep.conventions` says what is where. From
        the original Nesterov method, which takes the gradient at the look-ahead point: this is the
        same method after a change of variables, as in torch; but not with weight_decay, which
        `nesterov` takes at the look-ahead point too, and `lookahead` at p.
    """

    _spec = Spec(
        "sgd",
        beyond_torch=(
            *("decoupled_weight_decay", "lr_in_momentum", "dampen_first", "dampened_nesterov"),
        ),
        counts_steps=False,
        check_together=_check_nesterov,
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-3, momentum: Rate = 0.0, dampening: float = 0.0,
        weight_decay: Rate = 0.0, nesterov: bool = False, *, maximize: bool = False,
        decoupled_weight_decay: bool = False, lr_in_momentum: bool = False,
        dampen_first: bool = False, dampened_nesterov: bool = False,
        groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        """Nesterov's method in its original form: `with opt.lookahead(): g = grad(params)`.

        Inside, the parameters stand at the look-ahead point p - lr * momentum * b, where momentum
        alone would take them, to the bit where a plain step along b would; afterwards they are what
        they were, to the bit. The step that follows takes the gradient found there, and
        weight_decay at p. Keeps a copy of the parameters meanwhile.

        Raises:
            ValueError: there is no momentum, or `nesterov` is on, which is the other form; or the
                parameters are on a GPU, where `fusedstep.torch.SGD` looks ahead.
            RuntimeError: a step, or another look-ahead, inside.

        Example:
            >>> import numpy as np, fusedstep as fs
            >>> w = np.array([1.0], np.float32)
            >>> opt = fs.SGD(w, lr=0.5, momentum=0.5)
            >>> for _ in range(2):
            ...     with opt.lookahead():
            ...         g = w.copy()  # the gradient of w^2/2 at the look-ahead point
            ...     _ = opt.step(g)
            >>> w
            array([0.125], dtype=float32)

        Reference:
            Nesterov 1983; Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13.html
        """
        natives = self._current()
        numbers = list(map(self._spec.numbers, natives))
        _lookahead.check(numbers)
        arrays = [as_array(p, f"params[{key}]") for key, p in self._params.items()]
        moving = []
        for i, buffer in enumerate(self._states["momentum_buffer"]):
            if buffer is not None:
                stored = self._stored(self._states, "momentum_buffer", i)
                moving.append((i, decoded(stored) if stored.beside is not None else buffer))
        saved = [(arrays[i], arrays[i].copy()) for i, _ in moving]
        announced = [i for i, _ in moving if i in self._versioned]
        try:
            _lookahead.look_ahead(
                {self._names[i]: (arrays[i], b, numbers[self._group_of[i]]) for i, b in moving}
            )
            self._announce(announced)
            self._ahead = True
            yield
        finally:
            self._ahead = False
            for array, values in saved:
                np.copyto(array, values)
            self._announce(announced)


class Lion(Optimizer):
    """Lion: steps of one size along the sign of an interpolated momentum.

        p = p * (1 - lr * weight_decay)
        p = p - lr * sign(beta1 * m + (1 - beta1) * g)      sign(0) = 0
        m = beta2 * m + (1 - beta2) * g

    Use:
        large models, where half of Adam's state counts. lr 3 to 10 times below AdamW's, and
        weight_decay as many times above.

    Args: see below

    State:
        `exp_avg`, 4 bytes per element (8 for float64). A float32 step moves 20 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Lion(w, lr=0.25).step(np.array([0.01, -70.0], np.float32)).step
        1
        >>> w
        array([0.75, 2.25], dtype=float32)

    Reference:
        Chen et al. 2023, algorithm 2, https://arxiv.org/abs/2302.06675

    Differs from:
        coupled weight decay elsewhere: Lion's is decoupled, as in its paper. `sign(NaN)` is 0, as
        in torch: a NaN gradient shows in the momentum, not in the parameter.
    """

    _spec = Spec("lion", fixed={"decoupled_weight_decay": True})

    def __init__(
        self, params: Params, lr: Rate = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: Rate = 0.0,
        *, maximize: bool = False, groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class Adagrad(Optimizer):
    """Adagrad: each element's rate falls with the sum of its squared gradients.

        s = s + g^2
        p = p - lr / (1 + (t-1) * lr_decay) * g / (sqrt(s + eps_root) + eps)

    Use:
        sparse features, such as words: a rare one keeps its large steps. The rate only ever
        falls, so that long runs on deep networks stall.

    Args: see below

    State:
        `sum`, 4 bytes per element (8 for float64). A float32 step moves 20 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adagrad(w, lr=0.5).step(np.array([4.0, -0.5], np.float32)).step
        1
        >>> w
        array([0.5, 2.5], dtype=float32)

    Reference:
        Duchi, Hazan, Singer 2011, https://jmlr.org/papers/v12/duchi11a.html

    Differs from:
        Keras, where s starts at 0.1, eps is 1e-7 and under the root, and lr is 1e-3. Not from
        torch.
    """

    _spec = Spec(
        "adagrad",
        beyond_torch=("decoupled_weight_decay", "eps_root"),
        initial={"sum": "initial_accumulator_value"},
        begins_at_once=True,
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-2, lr_decay: float = 0.0, weight_decay: Rate = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10, *, maximize: bool = False,
        decoupled_weight_decay: bool = False, eps_root: float = 0.0,
        groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class RMSprop(Optimizer):
    """RMSprop: each element's gradient divided by a running root mean square.

        v = alpha * v + (1 - alpha) * g^2
        d = sqrt(v + eps_root) + eps            centered: v - m^2 for v, where
                                                m = alpha * m + (1 - alpha) * g
        p = p - lr * g / d                      momentum: p - lr * b, b = momentum * b + g / d
                                                nesterov: p - lr * (g / d + momentum * b)

    With `lr_in_momentum` the rate stands in the buffer: `b = momentum * b + lr * g / d`,
    `p = p - b`. With `bias_correction` v and m are divided by `1 - alpha^t` in d.

    Use:
        recurrent networks and reinforcement learning, where gradients change their scale:
        Adagrad with a memory that fades.

    Args: see below

    State:
        `square_avg`, `momentum_buffer` with momentum, `grad_avg` when centered, 4 bytes per element
        each (8 for float64). A float32 step moves 20 bytes per element, and 8 more for each option.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.RMSprop(w, lr=0.5, alpha=0.75).step(np.array([4.0, -0.5], np.float32)).step
        1
        >>> w
        array([0., 3.], dtype=float32)

    Reference:
        Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, https://arxiv.org/abs/1308.0850

    Differs from:
        torch where rounding leaves `v` just below `m^2`: the root is taken of 0, not of a negative
        number, so a constant gradient cannot turn a parameter into NaN.
    """

    _spec = Spec(
        "rmsprop",
        hypers={
            "nesterov": HYPERS["nesterov"]._replace(
                doc="steps along the look-ahead gradient; needs momentum > 0"
            ),
            "initial_accumulator_value": HYPERS["initial_accumulator_value"]._replace(
                doc="the mean square to begin with"
            ),
        },
        beyond_torch=(
            *("decoupled_weight_decay", "eps_root", "bias_correction", "nesterov"),
            *("lr_in_momentum", "initial_accumulator_value"),
        ),
        initial={"square_avg": "initial_accumulator_value"},
        check_together=_check_momentum,
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-2, alpha: float = 0.99, eps: float = 1e-8,
        weight_decay: Rate = 0.0, momentum: Rate = 0.0, centered: bool = False, *,
        maximize: bool = False, decoupled_weight_decay: bool = False, eps_root: float = 0.0,
        bias_correction: bool = False, nesterov: bool = False, lr_in_momentum: bool = False,
        initial_accumulator_value: float = 0.0, groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class Adadelta(Optimizer):
    """Adadelta: steps in the units of the parameter, from running averages of g^2 and of d^2.

        s = rho * s + (1 - rho) * g^2
        d = sqrt(a + eps) / sqrt(s + eps) * g
        a = rho * a + (1 - rho) * d^2
        p = p - lr * d

    Use:
        problems where no rate is to be chosen. Slow at first, as steps begin near
        `sqrt(eps)`.

    Args: see below

    State:
        `square_avg` and `acc_delta`, 4 bytes per element each (8 for float64). A float32 step moves
        28 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adadelta(w, rho=0.75, eps=0.25).step(np.array([1.0, 0.0], np.float32)).step
        1
        >>> w
        array([0.29289323, 2.        ], dtype=float32)

    Reference:
        Zeiler 2012, algorithm 1, https://arxiv.org/abs/1212.5701

    Differs from:
        the paper, which has no lr, as if it were 1, and rho 0.95 in its experiments. From Keras,
        whose lr is 1e-3, for a thousandth of these steps, and rho 0.95. Not from torch.
    """

    _spec = Spec("adadelta", beyond_torch=("decoupled_weight_decay",))

    def __init__(
        self, params: Params, lr: Rate = 1.0, rho: float = 0.9, eps: float = 1e-6,
        weight_decay: Rate = 0.0, *, maximize: bool = False, decoupled_weight_decay: bool = False,
        groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


# Adam's options that torch's classes have not.
_ADAM = ("bias_correction", "eps_root", "eps_hat", "amsgrad_corrected", "decay_after")


class Adam(Optimizer):
    """Adam: a running mean of the gradient over a running root mean square.

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2       amsgrad: vmax = max(vmax, v), used for v below
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t) + eps_root) + eps)

    With `bias_correction=False` both `1 - beta^t` are 1: `p - lr * m / (sqrt(v) + eps)`. With
    `eps_hat` the denominator is `(sqrt(v) + eps) / sqrt(1 - beta2^t)`. With `amsgrad_corrected`
    the maximum is taken of `v / (1 - beta2^t)`. With `decay_after` decoupled weight decay shrinks
    the new p, not the old.

    Use:
        most networks, with little tuning. With weight decay prefer `AdamW`; amsgrad where
        rare large gradients carry the information, as it does not forget them.

    Args: see below

    State:
        `exp_avg`, `exp_avg_sq`, and with amsgrad `max_exp_avg_sq`, 4 bytes per element each (8 for
        float64). A float32 step moves 28 bytes per element, 36 with amsgrad. With `betas[0] = 0`
        there is no `exp_avg`, and it moves 8 less; one that begins later begins as the gradient.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adam(w, lr=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w
        array([0.5, 2.5], dtype=float32)

    Reference:
        Kingma & Ba 2015, algorithm 1, https://arxiv.org/abs/1412.6980; AMSGrad: Reddi et al. 2018,
        https://arxiv.org/abs/1904.09237

    Differs from:
        torch, which has none of the last five of its options. AMSGrad's maximum is taken of the
        uncorrected v, as in torch and in its paper; optax corrects first. Keras and TensorFlow
        have eps beside the uncorrected root: `fusedstep.conventions` says who has what.
    """

    _spec = Spec(
        "adam",
        beyond_torch=_ADAM,
        always=("bias_correction",),
        late="exp_avg",
        check_together=_check_adam,
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: Rate = 0.0, amsgrad: bool = False, *, maximize: bool = False,
        decoupled_weight_decay: bool = False, bias_correction: bool = True,
        eps_root: float = 0.0, eps_hat: bool = False, amsgrad_corrected: bool = False,
        decay_after: bool = False, groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class AdamW(Optimizer):
    """AdamW: Adam whose weight decay shrinks the parameter instead of joining the gradient.

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2       amsgrad: vmax = max(vmax, v), used for v below
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t) + eps_root) + eps)

    With `decay_after` the new p is shrunk, not the old. All other options are `Adam`'s.

    Use:
        transformers, and wherever weight decay should not depend on the gradients' scale.

    Args: see below

    State:
        As `Adam`: `exp_avg`, `exp_avg_sq`, and with amsgrad `max_exp_avg_sq`, 4 bytes per element
        each (8 for float64). A float32 step moves 28 bytes per element, 36 with amsgrad, 8 less
        with `betas[0] = 0`.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.AdamW(w, lr=0.5, weight_decay=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w.round(3)
        array([0.25, 2.  ], dtype=float32)

    Reference:
        Loshchilov & Hutter 2019, https://arxiv.org/abs/1711.05101

    Differs from:
        the paper, where the decay is scaled by the schedule alone: as in torch it is scaled by lr.
    """

    _spec = Spec(
        "adam",
        fixed={"decoupled_weight_decay": True},
        beyond_torch=_ADAM,
        always=("bias_correction",),
        late="exp_avg",
        check_together=_check_adam,
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: Rate = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
        bias_correction: bool = True, eps_root: float = 0.0, eps_hat: bool = False,
        amsgrad_corrected: bool = False, decay_after: bool = False,
        groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class Adamax(Optimizer):
    """Adamax: Adam with the largest recent gradient in place of the root mean square.

        m = beta1 * m + (1 - beta1) * g
        u = max(beta2 * u, |g| + eps)
        p = p - lr / (1 - beta1^t) * m / u

    With `eps_norm` and `eps_divisor` it is `u = max(beta2 * u + eps_norm, |g| + eps)` and
    `m / (u + eps_divisor)`; with `bias_correction=False` `1 - beta1^t` is 1.

    Use:
        gradients with outliers, as of embeddings: the largest of late, not the mean square,
        sets the scale.

    Args: see below

    State:
        `exp_avg` and `exp_inf`, 4 bytes per element each (8 for float64). A float32 step moves 28
        bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.Adamax(w, lr=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w
        array([0.5, 2.5], dtype=float32)

    Reference:
        Kingma & Ba 2015, algorithm 2, https://arxiv.org/abs/1412.6980

    Differs from:
        the paper, which has no eps; beside the gradient as in torch. Keras and MLX have it in the
        divisor, Paddle beside the norm, and MLX corrects no bias. A NaN leaves `u` with the next
        number, but never `m`.
    """

    _spec = Spec(
        "adamax",
        beyond_torch=("decoupled_weight_decay", "eps_norm", "eps_divisor", "bias_correction"),
    )

    def __init__(
        self, params: Params, lr: Rate = 2e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: Rate = 0.0, *, maximize: bool = False, decoupled_weight_decay: bool = False,
        eps_norm: float = 0.0, eps_divisor: float = 0.0, bias_correction: bool = True,
        groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class NAdam(Optimizer):
    """NAdam: Adam with Nesterov's look-ahead in the running mean.

        mu_t = beta1 * (1 - 0.96^(t * momentum_decay) / 2);  P_t = mu_1 * ... * mu_t
        m, v as Adam;  d = sqrt(v / (1 - beta2^t) + eps_root) + eps
        p = p - lr * (1 - mu_t) / (1 - P_t) * g/d - lr * mu_(t+1) / (1 - P_t * mu_(t+1)) * m/d

    Use:
        problems that Adam suits, where its momentum answers a turn of the gradient too
        late.

    Args: see below

    State:
        `exp_avg` and `exp_avg_sq`, 4 bytes per element each (8 for float64), and one number
        `mu_product`. A float32 step moves 28 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.NAdam(w, lr=0.5).step(np.array([4.0, -0.25], np.float32)).step
        1
        >>> w.round(3)
        array([0.472, 2.528], dtype=float32)

    Reference:
        Dozat 2016, https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ

    Differs from:
        the paper, whose m decays by mu_t: by beta1 here, as in torch and Keras. In Keras
        momentum_decay is 1: its momentum has warmed up after a hundred steps, this one after some
        twenty thousand. In optax it is infinite: mu is beta1 from the start.
    """

    _spec = Spec(
        "nadam", beyond_torch=("eps_root",), carried=("mu_product",), initial={"mu_product": 1.0}
    )

    def __init__(
        self, params: Params, lr: Rate = 2e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: Rate = 0.0, momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False, *, maximize: bool = False,
        eps_root: float = 0.0, groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class RAdam(Optimizer):
    """RAdam: Adam that leaves out the denominator until its variance is known well enough.

        m, v as Adam;  rinf = 2 / (1 - beta2) - 1;  r_t = rinf - 2 * t * beta2^t / (1 - beta2^t)
        r_t > threshold:
                  r = sqrt((r_t-4) * (r_t-2) * rinf / ((rinf-4) * (rinf-2) * r_t))
                  p = p - lr / (1 - beta1^t) * r * sqrt(1 - beta2^t) * m / (sqrt(v) + eps)
        else:     p = p - lr / (1 - beta1^t) * m

    With `eps_hat=False` the divisor is that of Adam, `sqrt(v / (1 - beta2^t) + eps_root) + eps`.

    Use:
        Adam without a warm-up to tune: it steps by momentum alone while the denominator is
        a guess.

    Args: see below

    State:
        `exp_avg` and `exp_avg_sq`, 4 bytes per element each (8 for float64). A float32 step moves
        28 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.RAdam(w, lr=0.5).step(np.array([4.0, -1.0], np.float32)).step
        1
        >>> w
        array([-1. ,  2.5], dtype=float32)

    Reference:
        Liu et al. 2020, algorithm 2, https://arxiv.org/abs/1908.03265

    Differs from:
        the paper, which divides from r_t > 4 on and has no eps: 5 as in torch and in its authors'
        code. In optax eps stands beside the corrected root.
    """

    _spec = Spec("radam", beyond_torch=("eps_root", "eps_hat", "threshold"))

    def __init__(
        self, params: Params, lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: Rate = 0.0, decoupled_weight_decay: bool = False, *, maximize: bool = False,
        eps_root: float = 0.0, eps_hat: bool = True, threshold: float = 5.0,
        groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class ASGD(Optimizer):
    """Averaged SGD: SGD with a falling rate, and the average of the late parameters beside it.

        p = p * (1 - lambd * eta);  p = p - eta * g
        ax = ax + mu * (p - ax)                 ax = p while mu is 1
        eta = lr / (1 + lambd * lr * t)^alpha;  mu = 1 / max(1, t - t0)     for the next step

    The first step has eta = lr and mu = 1. The average is `opt.state[name]["ax"]`.

    Use:
        convex problems with noisy gradients, of which the average lies closer to the
        minimum than the last parameters do.

    Args: see below

    State:
        `ax`, 4 bytes per element (8 for float64), and the numbers `eta` and `mu`. A float32 step
        moves 20 bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> fs.ASGD(w, lr=0.5, lambd=0.0).step(np.array([1.0, -2.0], np.float32)).step
        1
        >>> w
        array([0.5, 3. ], dtype=float32)

    Reference:
        Polyak & Juditsky 1992, https://doi.org/10.1137/0330046

    Differs from:
        the paper, which averages from the start: here from update t0 on, as in torch, so that the
        default leaves `ax = p` for a million updates. torch rounds eta and mu to float32.
    """

    _spec = Spec(
        "asgd",
        hypers={"alpha": FINITE._replace(doc="power by which eta falls")},
        beyond_torch=("decoupled_weight_decay",),
        carried=("eta", "mu"),
        initial={"eta": "lr", "mu": 1.0},
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-2, lambd: float = 1e-4, alpha: float = 0.75,
        t0: float = 1e6, weight_decay: Rate = 0.0, *, maximize: bool = False,
        decoupled_weight_decay: bool = False, groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


class Rprop(Optimizer):
    """Rprop: each element's step grows while its gradient keeps its sign and shrinks when it turns.

        s = sign(g * prev);  D = clamp(D * (etas[1] if s > 0, etas[0] if s < 0, else 1), step_sizes)
        g = 0 where s < 0;   p = p - sign(g) * D;   prev = g

    D starts at the lr of the first update.

    Use:
        full batches. It looks at signs alone, which the noise of mini-batches turns.

    Args: see below

    State:
        `prev` and `step_size`, 4 bytes per element each (8 for float64). A float32 step moves 28
        bytes per element.

    Example:
        >>> import numpy as np, fusedstep as fs
        >>> w = np.array([1.0, 2.0], np.float32)
        >>> opt = fs.Rprop(w, lr=0.5, etas=(0.5, 2.0))
        >>> opt.step(np.array([0.1, -9.0], np.float32)).step
        1
        >>> opt.step(np.array([0.1, 9.0], np.float32)).step
        2
        >>> w
        array([-0.5,  2.5], dtype=float32)

    Reference:
        Riedmiller & Braun 1993, https://doi.org/10.1109/ICNN.1993.298623, without backtracking

    Differs from:
        torch, which has no weight decay here. As in torch a NaN gradient counts as no sign.
    """

    _spec = Spec(
        "rprop",
        beyond_torch=("weight_decay", "decoupled_weight_decay"),
        always=("weight_decay",),
    )

    def __init__(
        self, params: Params, lr: Rate = 1e-2, etas: Pair = (0.5, 1.2),
        step_sizes: Pair = (1e-6, 50.0), *, weight_decay: Rate = 0.0, maximize: bool = False,
        decoupled_weight_decay: bool = False, groups: Iterable[Group] = (), **how: Unpack[How],
    ) -> None:  # fmt: skip
        super().__init__(**given(locals()))


NAMES = [cls.__name__ for cls in Optimizer.__subclasses__()]
