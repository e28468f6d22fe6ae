"""Optimizers for JAX: a step is one sweep over memory inside of `jit`, on the CPU.

    tx = fusedstep.jax.adamw(1e-3, weight_decay=0.1, max_norm=1.0)
    state = tx.init(params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state, batch):
        grads = jax.grad(loss)(params, batch)
        return tx.update_params(grads, state, params)

XLA has no loop on the CPU that writes several arrays, so that what optax computes is a loop for
each moment and one for the parameters: in AdamW 40 bytes for each, of which one call needs 28.
Names, defaults and numbers are optax's; results are those of fusedstep's other layers, to the bit.

Every optimizer takes, beside optax's arguments:

    max_norm=None           clips all gradients together to this norm, `g * min(1, max_norm/norm)`
    clip_value=None         clips each element
    skip_nonfinite=False    a gradient that is not finite changes nothing at all
    norms=False             measures the norm, `state.grad_norm`, which the two above do too
    ema=None                a moving average of the parameters, `state.arrays["ema"]`
    shadow=None             a copy of the parameters in another dtype, `state.arrays["shadow"]`
    mask=None               a tree of bools, or a function of the parameters to one: which of them
                            decay
    mu_dtype=None           the first moment's dtype: "bfloat16"
    rounding, state_dtype, state_rounding, seed, ema_dtype      as every class of fusedstep has them

docs/jax.md says what transforms, what it costs and how checkpoints go from one to the other.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from fusedstep import optimizers
from fusedstep._storage import HOW
from fusedstep._types import How, Rate
from fusedstep.conventions import Ours
from fusedstep.conventions import optax as _optax
from fusedstep.jax._transformation import Options, Recipe, State, Transformation, standing_in

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack
else:  # for those who ask for hints: what can be subscripted
    Unpack = type

for _public in (State, Transformation):  # where pickles look for them
    _public.__module__ = __name__

F = TypeVar("F", bound=Callable[..., Transformation])


class Keywords(How, total=False):
    """What every optimizer takes beside its own arguments; see above."""

    max_norm: Any
    clip_value: Any
    skip_nonfinite: bool
    norms: bool
    ema: Any
    shadow: str | None
    mask: Any
    mu_dtype: Any


def _made(convention: Any, arguments: dict[str, Any]) -> Transformation:
    """The optimizer of a function's arguments, as `locals()` has them."""
    given = {**arguments, **arguments["keywords"]}
    del given["keywords"]
    given = {name: standing_in(value) for name, value in given.items()}
    options = Options(**{name: given.pop(name) for name in Options._fields if name in given})
    return Transformation._of(Recipe(convention.ours(**given), options))


def _listed(function: F) -> F:
    """The function, whose signature lists its keywords: optax.inject_hyperparams reads it."""
    defaults = {**Options._field_defaults, **dict.fromkeys(HOW)}  # None: each one's own
    signature = inspect.signature(function)
    *own, last = signature.parameters.values()
    own += [
        last.replace(name=name, kind=last.KEYWORD_ONLY, default=value, annotation=last.empty)
        for name, value in defaults.items()
    ]
    function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return function


# Written by .ci/jax_functions.py:

__all__ = [
    "Keywords",
    "State",
    "Transformation",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "amsgrad",
    "by_name",
    "lion",
    "nadam",
    "nadamw",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sign_sgd",
    "signum",
]


@_listed
def adadelta(
    learning_rate: Rate,
    rho: float = 0.9,
    eps: float = 1e-06,
    weight_decay: Rate = 0.0,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Adadelta: eps under both roots, weight decay in the gradient.

    NOTE: optax 0.2.8 may be given no rate, or None, and then goes up instead of down
    (`findings/rate_left_out_climbs.sh`). The rate must be a number or a schedule here; the paper's
    is 1.
    """
    return _made(_optax.adadelta, locals())


@_listed
def adagrad(
    learning_rate: Rate,
    initial_accumulator_value: float = 0.1,
    eps: float = 1e-07,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """`p = p - lr * g / sqrt(s + eps)`, and s begins with 0.1."""
    return _made(_optax.adagrad, locals())


@_listed
def adam(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    *,
    nesterov: bool = False,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Adam, or with nesterov our NAdam whose momentum is b1 from the start."""
    return _made(_optax.adam, locals())


@_listed
def adamax(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Adamax."""
    return _made(_optax.adamax, locals())


@_listed
def adamaxw(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    weight_decay: Rate = 0.0001,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Adamax with decoupled weight decay."""
    return _made(_optax.adamaxw, locals())


@_listed
def adamw(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    *,
    weight_decay: Rate = 0.0001,
    nesterov: bool = False,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our AdamW, or with nesterov our NAdam, decoupled."""
    return _made(_optax.adamw, locals())


@_listed
def amsgrad(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    *,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Adam with amsgrad, which takes the largest of the corrected second moments.

    Raises:
        ValueError: one moment is to be corrected and the other is not.
    """
    return _made(_optax.amsgrad, locals())


@_listed
def lion(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.99,
    *,
    weight_decay: Rate = 0.001,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Lion."""
    return _made(_optax.lion, locals())


@_listed
def nadam(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    *,
    nesterov: bool = True,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our NAdam whose momentum is b1 from the start."""
    return _made(_optax.nadam, locals())


@_listed
def nadamw(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    *,
    weight_decay: Rate = 0.0001,
    nesterov: bool = True,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our NAdam, decoupled, whose momentum is b1 from the start."""
    return _made(_optax.nadamw, locals())


@_listed
def radam(
    learning_rate: Rate,
    b1: Rate = 0.9,
    b2: Rate = 0.999,
    eps: float = 1e-08,
    eps_root: float = 0.0,
    threshold: float = 5.0,
    *,
    nesterov: bool = False,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our RAdam with eps beside the corrected root. Theirs rectifies at the threshold too.

    Raises:
        ValueError: it is to be Nesterov's. Ours is not.
    """
    return _made(_optax.radam, locals())


@_listed
def rmsprop(
    learning_rate: Rate,
    decay: float = 0.9,
    eps: float = 1e-08,
    initial_scale: float = 0.0,
    eps_in_sqrt: bool = True,
    centered: bool = False,
    momentum: Rate | None = None,
    nesterov: bool = False,
    bias_correction: bool = False,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """`u = lr * g / sqrt(v + eps)`, eps outside without `eps_in_sqrt`; with momentum
    `b = momentum*b + u; p = p - b`, or nesterov `p = p - (u + momentum*b)`.

    Their trace is -b.
    """
    return _made(_optax.rmsprop, locals())


@_listed
def rprop(
    learning_rate: float,
    eta_minus: float = 0.5,
    eta_plus: float = 1.2,
    min_step_size: float = 1e-06,
    max_step_size: float = 50.0,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our Rprop, which is that of the paper.

    NOTE: optax 0.2.8 applies the previous step's update, so that it is a step late; its own request
    1725 mends that. These are the steps that it means to take.
    """
    return _made(_optax.rprop, locals())


@_listed
def sgd(
    learning_rate: Rate,
    momentum: Rate | None = None,
    nesterov: bool = False,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """Our SGD. Without momentum nesterov means nothing, as there."""
    return _made(_optax.sgd, locals())


@_listed
def sign_sgd(
    learning_rate: Rate,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """`p = p - lr * sign(g)`: our Lion, whose moving average is the gradient."""
    return _made(_optax.sign_sgd, locals())


@_listed
def signum(
    learning_rate: Rate,
    beta: Rate = 0.9,
    **keywords: Unpack[Keywords],
) -> Transformation:
    """`m = beta*m + (1-beta)*g; p = p - lr * sign(m)`: our Lion, of one decay."""
    return _made(_optax.signum, locals())


# End of what it writes.
class _Named:
    """One of our classes, in place of a convention."""

    def __init__(self, name: str) -> None:
        self._name = name

    def ours(self, **hypers: Any) -> Ours:
        return Ours(self._name, hypers)


def by_name(name: str, **hypers: Any) -> Transformation:
    """Any optimizer of fusedstep, by its class's name and arguments: `by_name("ASGD", lr=0.1)`.

    Args:
        name: one of `fusedstep`'s classes.
        **hypers: its arguments, with their names and defaults, and those that all functions here
            take.

    Raises:
        TypeError, ValueError: there is no such optimizer, or an argument is not its own.
    """
    if name not in optimizers.NAMES:
        known = ", ".join(optimizers.NAMES)
        raise ValueError(f"name must be one of {known}, got {name!r}")
    return _made(_Named(name), {"keywords": hypers})


def __dir__() -> list[str]:
    return sorted(__all__)
