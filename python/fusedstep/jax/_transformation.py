"""An optimizer as a pair of pure functions, `init` and `update_params`, over trees of arrays."""

from __future__ import annotations

import importlib.util
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusedstep import _storage, optimizers
from fusedstep._arrays import as_float
from fusedstep._hypers import ABOVE_0, AT_LEAST_0, POSITIVE, SHARE, as_number, check_flags
from fusedstep._spec import Spec
from fusedstep._storage import EMA, Form, Kept, Storage, Stored
from fusedstep.conventions import Ours
from fusedstep.jax import _calls, _checkpoints
from fusedstep.schedules import ReduceOnPlateau, Schedule

if TYPE_CHECKING or importlib.util.find_spec("optax") is None:

    class _Pair(NamedTuple):
        """What optax' combinators know an optimizer by, where there are none."""

        init: Callable[..., Any]
        update: Callable[..., Any]

else:
    from optax import GradientTransformationExtraArgs as _Pair


_DTYPES = ("float32", "float64", "bfloat16", "float16")
_MOST_LEAVES = 128  # of a call: XLA compiles one with many aliases in cubic time
SHADOW = "shadow"  # the key of the parameters' copies among a state's arrays


class State(NamedTuple):
    """What an optimizer keeps between two steps, a tree of arrays.

    Attributes:
        count: the steps taken, int32, or int64 where JAX has 64 bits: optax's name and type. A step
            that was skipped does not count.
        carry: what the rule carries beside it, two float64 as four uint32, as NAdam's product of
            momenta.
        arrays: by torch's names (`exp_avg`, `exp_avg_sq`, `ema`, ...) trees like the parameters',
            and `shadow`.
        grad_norm: of all gradients before the last step, where a step measures it (`max_norm`,
            `skip_nonfinite`, `norms`); else None.
    """

    count: Any
    carry: Any
    arrays: dict[str, Any]
    grad_norm: Any = None


class _Traced(float):
    """A hyperparameter that only the running program knows; for rules about it, a number."""

    value: Any

    def __new__(cls, value: Any) -> _Traced:
        self = super().__new__(cls, 0.5)
        self.value = value
        return self

    def __repr__(self) -> str:
        return str(self.value)


def standing_in(value: Any) -> Any:
    """An argument in which arrays of JAX are `_Traced`."""
    if isinstance(value, tuple):
        return tuple(map(standing_in, value))
    if not isinstance(value, jax.Array):
        return value
    if not _is_number(value):
        raise TypeError(f"a hyperparameter must be a number, got an array {jax.typeof(value)}")
    return _Traced(value)


def _is_number(value: Any) -> bool:
    """Whether it is an array of JAX that is one number."""
    is_array = isinstance(value, jax.Array)
    return is_array and not value.ndim and jnp.issubdtype(value.dtype, jnp.number)


class Options(NamedTuple):
    """What a step does beside its rule: keywords of every function that makes an optimizer."""

    max_norm: Any = None
    clip_value: Any = None
    skip_nonfinite: bool = False
    norms: bool = False
    ema: Any = None
    shadow: str | None = None
    mask: Any = None
    mu_dtype: Any = None

    @property
    def measures(self) -> bool:
        """Whether the gradients' norm is taken."""
        return self.max_norm is not None or self.skip_nonfinite or self.norms

    def checked(self) -> Options:
        """The same with floats for numbers, or TypeError or ValueError."""
        check_flags(skip_nonfinite=self.skip_nonfinite, norms=self.norms)
        if self.shadow not in (None, *_DTYPES):
            raise ValueError(
                f"shadow must be None, {', '.join(map(repr, _DTYPES))}, got {self.shadow!r}"
            )
        rules = {"max_norm": AT_LEAST_0, "clip_value": ABOVE_0, "ema": SHARE}
        found: dict[str, Any] = {
            name: as_number(name, value, rule)
            for name, rule in rules.items()
            if (value := getattr(self, name)) is not None and not isinstance(value, _Traced)
        }
        return self._replace(**found)


def _name_of(dtype: Any) -> str:
    try:
        return str(jnp.dtype(dtype).name)
    except TypeError:
        raise TypeError(f"mu_dtype must be a dtype, got {dtype!r}") from None


def _factor(scale: Any) -> Any:
    """What gradients of a loss that was multiplied by this are multiplied by."""
    if isinstance(scale, _Traced):
        return _Traced(1 / jnp.asarray(scale.value, _calls.floating()))
    factor = 1 / as_number("loss_scale", scale, POSITIVE)
    if math.isinf(factor):
        raise ValueError(f"loss_scale must have a finite inverse, got {scale!r}")
    return factor


class Recipe:
    """An optimizer of ours with all of its arguments, but no parameters yet."""

    def __init__(self, ours: Ours, options: Options) -> None:
        self.name: str = ours.name
        self.options: Options = options.checked()
        cls: Any = getattr(optimizers, ours.name)
        self.spec: Spec = cls._spec
        given = dict(ours.hypers)
        how = {name: given.pop(name) for name in _storage.HOW if name in given}
        how = {name: value for name, value in how.items() if value is not None}
        mu_dtype = options.mu_dtype
        if mu_dtype is not None:
            if how.get("state_dtype") is not None:
                raise ValueError("mu_dtype must be None beside state_dtype, which says it by name")
            first = self.spec.states[0]
            how["state_dtype"] = {first: _name_of(mu_dtype)}
            how.setdefault("state_rounding", "nearest")
        self.storage: Storage = Storage(self.spec, how)  # type: ignore[arg-type]
        signature = inspect.signature(cls)
        known = [n for n in signature.parameters if n in self.spec.table]
        for name in given:
            if name not in known:
                raise TypeError(
                    f"{name} must be an argument of {ours.name}, which are {', '.join(known)}"
                )
        self.defaults = {name: signature.parameters[name].default for name in known}
        self.hypers: dict[str, Any] = {**self.defaults, **given}
        self._read()

    def _read(self) -> None:
        """Checks hyperparameters; finds what stands for numbers, by place in the core's group."""
        self.dynamic: dict[int, Any] = {}  # arrays, functions of the count
        self.schedules: dict[int, tuple[str, Schedule]] = {}
        order = self.spec.order

        def plain(name: str, part: str, value: Any, default: Any) -> Any:
            place = order.index(part)
            if isinstance(value, ReduceOnPlateau):
                raise TypeError(
                    f"{name} must be a function of the step inside of a program, got {value!r},"
                    " which has a state: give its rate to optax.inject_hyperparams"
                )
            if isinstance(value, Schedule):
                self.schedules[place] = (name, value)
            elif isinstance(value, _Traced) or callable(value):
                self.dynamic[place] = value
            else:
                return value
            return default or 0.5  # what it may be; a momentum of 0 would have no buffer

        values: dict[str, Any] = {}
        for name, value in self.hypers.items():
            parts, default = self.spec.parts.get(name), self.defaults[name]
            if parts and isinstance(value, tuple) and len(value) == len(parts):
                each = zip(parts, value, default, strict=True)
                values[name] = tuple(plain(f"{name}[{i}]", *p) for i, p in enumerate(each))
            else:
                values[name] = value if name not in order else plain(name, name, value, default)
        checked = {name: self.spec.check(name, value) for name, value in values.items()}
        self.spec.check_together(checked)
        self.native: list[float] = self.spec.native(checked)
        self.uses: list[str] = self.spec.uses(self.native)
        self.storage.check_exact(self.native, ["float32"])

    def first(self, key: str) -> Any:
        """What a new state is filled with."""
        value: Any = self.spec.initial.get(key, 0.0)
        if isinstance(value, str):
            value = self.hypers[value]
            value = value.value if isinstance(value, _Traced) else value
            value = value(0) if callable(value) else value
        return value

    @property
    def averages(self) -> bool:
        """Whether a moving average of the parameters is kept."""
        return self.options.ema is not None

    def streams(self, form: Form) -> list[tuple[str, Any]]:
        """What a parameter has of its own, by key, in the order of the core's streams."""
        found = [(name, form.states[name]) for name in self.uses]
        found += [(EMA, form.ema)] if self.averages else []
        return [*found, (SHADOW, Kept(self.options.shadow))] if self.options.shadow else found

    def no_columns(self, leaves: Sequence[Any]) -> dict[str, list[Any]]:
        """The keys of a state's arrays without any, where a tree without leaves names none.

        `optax.tree.map_params` asks a state of such a tree where parameters' trees lie in it.
        """
        if leaves:
            return {}
        exact = self.storage.how["rounding"] == "nearest"
        form = self.storage.of("float32" if exact else "bfloat16")
        keys = [key for name, kept in self.streams(form) for key in (name, kept.beside)]
        return {key: [] for key in (*keys, form.param.beside) if key}

    def placed(self, form: Form) -> dict[int, Kept]:
        """What is written of a parameter, by its place among the core's streams."""
        found = {0: form.param}
        found |= {2 + self.spec.states.index(name): form.states[name] for name in self.uses}
        found |= {_calls.STREAMS - 2: form.ema} if self.averages else {}
        shadow = self.options.shadow
        return {**found, _calls.STREAMS - 1: Kept(shadow)} if shadow else found

    @property
    def stochastic(self) -> list[int]:
        """Of each stream, whether it is rounded at random where its format is narrow."""
        found = self.placed(self.storage.of("bfloat16"))
        return [int(k in found and found[k].random) for k in range(_calls.STREAMS)]

    def numbers(
        self, count: Any, masked: bool, loss_scale: Any = 1.0
    ) -> tuple[_calls.Numbers, Any]:
        """What `prepare` reads, and the array of what only the program knows."""
        opts, order = self.options, self.spec.order
        groups = list(self.native)
        decay = order.index("weight_decay")
        if masked:
            groups += [0.0 if i == decay else x for i, x in enumerate(self.native)]
        numbers = [1.0, math.inf, math.inf, 0.0]
        traced: list[tuple[str, int, Any]] = []
        scheduled: list[tuple[int, tuple[str, Schedule]]] = []
        for group in range(1 + masked):
            at = group * len(self.native)
            left = {decay} if group else set()
            traced += [(order[i], at + i, v) for i, v in self.dynamic.items() if i not in left]
            scheduled += [(at + i, v) for i, v in self.schedules.items() if i not in left]
        factor = _factor(standing_in(loss_scale))
        for i, value in enumerate((factor, opts.max_norm, opts.clip_value, opts.ema)):
            if isinstance(value, _Traced):
                traced.append(("", len(groups) + i, value))
            elif value is not None:
                numbers[i] = value
        dtype = _calls.floating()

        def now(name: str, value: Any) -> Any:
            if not isinstance(value, _Traced):
                found = value(count)
                if as_float(found) is None and not _is_number(found):
                    what = jax.typeof(found) if isinstance(found, jax.Array) else repr(found)
                    raise TypeError(f"{name} must be a number at each step, got {what}")
                return jnp.asarray(found, dtype)
            return jnp.asarray(value.value, dtype)

        values = (
            jnp.stack([now(name, v) for name, _, v in traced]) if traced else jnp.zeros(0, dtype)
        )
        return (
            _calls.Numbers(
                self.spec.rule,
                groups,
                numbers,
                [place for _, place, _ in traced],
                [place for place, _ in scheduled],
                _calls.text_of(one for _, one in scheduled),
                self.storage.seed,
                opts.measures,
                opts.skip_nonfinite,
            ),
            values,
        )


# -- trees -----------------------------------------------------------------------------------------


def _label(what: str, path: Any) -> str:
    return what + jax.tree_util.keystr(path)


def _leaves(tree: Any, what: str) -> tuple[list[tuple[str, Any]], Any]:
    """The arrays of a tree with their labels, checked, and its structure."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for path, leaf in found:
        label = _label(what, path)
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            if as_float(leaf) is None:
                raise TypeError(f"{label} must be an array, got {type(leaf).__name__}")
            leaf = jnp.asarray(leaf)
        if str(leaf.dtype) not in _DTYPES:
            raise TypeError(f"{label} must be {', '.join(_DTYPES)}, got {leaf.dtype}")
        if not isinstance(leaf, jax.Array):  # of NumPy: its float64 is float32 without 64 bits
            leaf = jnp.asarray(leaf)
        if isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer):
            platforms = {device.platform for device in leaf.devices()}
            if platforms != {"cpu"}:
                raise ValueError(
                    f"{label} must be on a CPU device, got one on {', '.join(sorted(platforms))}:"
                    " fusedstep.jax steps on the CPU"
                )
        leaves.append((label, leaf))
    return leaves, structure


def _check_structure(what: str, found: Any, wanted: Any, like: str = "params") -> None:
    if found == wanted:
        return
    raise ValueError(f"{what} must have the structure of {like}, {wanted}, got {found}")


def _check_leaf(label: str, leaf: Any, shape: tuple[int, ...], dtype: str | None = None) -> None:
    if tuple(leaf.shape) != shape:
        raise ValueError(f"{label} must have the shape {shape}, got {tuple(leaf.shape)}")
    if dtype is not None and str(leaf.dtype) != dtype:
        raise ValueError(f"{label} must be {dtype}, got {leaf.dtype}")


@jax.tree_util.register_pytree_node_class
class _StateFirst(tuple):  # type: ignore[type-arg]
    """(params, state), whose arrays come in the order state, params.

    NOTE: jit gives donated arguments to results of their shape in the order in which both come, not
    to what they become: were it (state, params) -> (params, state), the moments' memory would go to
    the parameters, and XLA would copy all of it there and back.
    """

    def tree_flatten(self) -> tuple[tuple[Any, Any], None]:
        return (self[1], self[0]), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[Any, Any]) -> _StateFirst:
        return cls((children[1], children[0]))


def _is_whole_program(grads: Any, state: Any, params: Any, count: Any) -> bool:
    """Whether all are arguments of the jit that is being traced, the state before params.

    Of a jit, as only there something is donated, and a branch of `cond`, which may see arguments of
    the jit around it, must return what the other does, of the same type. Gradients that a program
    has computed tell of more that may look at the result. `count` is of this trace.
    """

    def places(tree: Any) -> list[int]:
        own = [x for x in jax.tree_util.tree_leaves(tree) if x._trace is count._trace]
        if hasattr(frame, "tracer_to_var"):  # until JAX 0.6
            return [frame.invars.index(frame.tracer_to_var[id(leaf)]) for leaf in own]
        return [frame.invars.index(leaf.val) for leaf in own]

    try:  # JAX has no public word for it; without an answer results are right, and copied
        frame = count._trace.frame
        its_own = frame.debug_info.traced_for == "jit"
        ordered = max(places(state.arrays)) < min(places(params))
        return its_own and ordered and len(places(grads)) > 0
    except (AttributeError, KeyError, ValueError):
        return False


class Transformation(_Pair):
    """An optimizer: `init`, `update_params`, and as optax has it `update`.

        params, state = tx.update_params(grads, state, params)          in place, under donation
        updates, state = tx.update(grads, state, params)                optax' form

    Made by `fusedstep.jax.adamw` and its fellows. It is an `optax.GradientTransformationExtraArgs`
    where optax is installed, so that `optax.chain`, `optax.masked`, `optax.inject_hyperparams`,
    `flax.training.train_state.TrainState`, ... take it.
    """

    _recipe: Recipe

    @classmethod
    def _of(cls, recipe: Recipe) -> Transformation:
        self = cls(_Init(recipe), _Update(recipe))
        self._recipe = recipe
        return self

    def update_params(
        self, grads: Any, state: State, params: Any, *, loss_scale: Any = 1.0
    ) -> tuple[Any, State]:
        """One step, in one sweep over memory.

        Under `jax.jit(..., donate_argnums=...)` of params and state they are updated where they
        lie; without donation XLA copies them first, so that what you hold never changes.

        Args:
            grads: a tree like the parameters', each leaf of its parameter's shape, and float32,
                float64, bfloat16 or float16, whatever the parameter is.
            state: from `init`, or the step before.
            params: what the state was made for.
            loss_scale: what the loss was multiplied by; the gradients are divided by it first. A
                number that is finite and > 0, or an array of JAX (default 1).

        Returns:
            The new parameters and the new state.

        Raises:
            TypeError, ValueError: a tree of another structure, a leaf of another shape or dtype, or
                one that is not on the CPU.
        """
        stepped = _step(self._recipe, grads, state, params, loss_scale)
        whole = _is_whole_program(grads, state, params, stepped[1].count)
        return _StateFirst(stepped) if whole else stepped

    def state_dict(self, state: State, params: Any) -> dict[str, Any]:
        """The state as `fusedstep`'s optimizers save it, which they, and torch's, load.

        Args:
            state: from `init` or a step, outside of a program.
            params: its parameters, which are called by their paths: `dense.kernel`.

        Returns:
            `state_dict()` of the class of the same arguments over these parameters. Its arrays are
            copies.

        Example:
            >>> import fusedstep as fs, fusedstep.jax, jax.numpy as jnp, numpy as np
            >>> params = {"w": jnp.ones(2)}
            >>> tx = fs.jax.adam(0.1)
            >>> params, state = tx.update_params(params, tx.init(params), params)
            >>> opt = fs.Adam({"w": np.array(params["w"])})
            >>> opt.load_state_dict(tx.state_dict(state, params))
            >>> opt.steps
            1
        """
        self._check_outside(state, params)
        return _checkpoints.state_dict(self._recipe, state, params, self._decays(params))

    def load_state_dict(self, state_dict: Mapping[str, Any], params: Any) -> State:
        """The state of a checkpoint of `fusedstep`'s optimizers, or of torch's.

        Args:
            state_dict: of an optimizer over parameters of these names, or in their order.
            params: the parameters that the state is for.

        Returns:
            A new state, with the hyperparameters of this optimizer and not of the checkpoint.

        Raises:
            TypeError, ValueError: a key, count, shape, dtype or value does not fit; or the
                parameters have had different numbers of steps.
        """
        self._check_outside(params)
        recipe = self._recipe
        count, carry, found = _checkpoints.load(recipe, params, state_dict, self._decays(params))
        fresh = self.init(params)
        structure = jax.tree_util.tree_structure(params)
        arrays = {
            key: structure.unflatten(
                [
                    new if loaded is None else loaded
                    for new, loaded in zip(
                        structure.flatten_up_to(tree),
                        found.get(key, [None] * structure.num_leaves),  # no shadow is saved
                        strict=True,
                    )
                ]
            )
            for key, tree in fresh.arrays.items()
        }
        return fresh._replace(
            count=jnp.asarray(count, fresh.count.dtype), carry=carry, arrays=arrays
        )

    def _decays(self, params: Any) -> list[bool]:
        """Of each parameter, whether its weight decays."""
        structure = jax.tree_util.tree_structure(params)
        group_of = _groups(self._recipe.options.mask, params, structure)
        return [not group for group in group_of or [0] * structure.num_leaves]

    def _check_outside(self, *trees: Any) -> None:
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree_util.tree_leaves(trees)):
            raise TypeError("checkpoints are made outside of a program, got traced arrays")

    def __deepcopy__(self, memo: Any) -> Transformation:
        return self  # nothing in it changes

    def __repr__(self) -> str:
        recipe = self._recipe
        hypers = ", ".join(f"{name}={value!r}" for name, value in recipe.hypers.items())
        return f"fusedstep.jax {recipe.name}({hypers})"


class _Init:
    """`init(params)`: the state before the first step."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __call__(self, params: Any) -> State:
        recipe = self._recipe
        leaves, structure = _leaves(params, "params")
        recipe.storage.check_params((label, str(leaf.dtype)) for label, leaf in leaves)
        forms = [recipe.storage.of(str(leaf.dtype)) for _, leaf in leaves]
        recipe.storage.check_exact(recipe.native, {str(leaf.dtype) for _, leaf in leaves})
        columns: dict[str, list[Any]] = recipe.no_columns(leaves)
        for i, ((_, leaf), form) in enumerate(zip(leaves, forms, strict=True)):
            for key, array in _new(recipe, form, leaf).items():
                columns.setdefault(key, [None] * len(leaves))[i] = array
        arrays = {key: jax.tree_util.tree_unflatten(structure, one) for key, one in columns.items()}
        return State(
            jnp.zeros([], jnp.int64 if jax.config.jax_enable_x64 else jnp.int32),
            jnp.zeros(4, jnp.uint32),
            arrays,
            jnp.zeros([], _calls.floating()) if recipe.options.measures else None,
        )


def _new(recipe: Recipe, form: Form, leaf: Any) -> dict[str, Any]:
    """The arrays in the state of a new parameter."""
    shape = tuple(leaf.shape)
    found: dict[str, Any] = {}
    for key, kept in recipe.streams(form):
        if key in (EMA, SHADOW):
            found[key] = jnp.array(leaf, kept.dtype, copy=True)
            continue
        value = recipe.first(key)
        if kept.beside and value:
            # All elements are one number: what one block of it looks like.
            block = (np.zeros(kept.beside_shape((1,)), np.uint8), np.zeros(1, np.uint8))
            _storage.convert(
                Stored(np.full(1, float(value)), "float64"), Stored(block[1], kept.format, block[0])
            )
            found[key] = jnp.full(shape, block[1][0], kept.dtype)
            found[kept.beside] = jnp.full(kept.beside_shape(shape), block[0][0], kept.beside_dtype)
            continue
        found[key] = jnp.full_like(leaf, value, kept.dtype)  # sharded as the parameter is
        if kept.beside:
            found[kept.beside] = jnp.zeros(kept.beside_shape(shape), kept.beside_dtype)
    if form.param.beside:
        found[form.param.beside] = jnp.zeros_like(leaf, form.param.beside_dtype)
    return found


class _Update:
    """`update(grads, state, params)`: what optax adds to the parameters, and the new state."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    def __call__(
        self,
        updates: Any,
        state: State,
        params: Any = None,
        *,
        loss_scale: Any = 1.0,
        **extra_args: Any,
    ) -> tuple[Any, State]:
        if params is None:
            raise ValueError("params must be given to update, got None")
        rounding = self._recipe.storage.how["rounding"]
        if rounding != "nearest":
            raise ValueError(
                "rounding must be 'nearest' in update, whose result is added by optax, got"
                f" {rounding!r}: use update_params"
            )
        return _step(self._recipe, updates, state, params, loss_scale, apart=True)


def _groups(mask: Any, params: Any, structure: Any) -> list[int] | None:
    """For each leaf 0 where its weight decays and 1 where not; None without a mask."""
    if mask is None:
        return None
    found = mask(params) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda on, part: jax.tree.map(lambda _: on, part), found, params)
    except ValueError as error:
        raise ValueError(f"mask must have the structure of params: {error}") from None
    chosen, own = jax.tree_util.tree_flatten(spread)
    _check_structure("mask", own, structure)
    for one in chosen:
        if not isinstance(one, bool | np.bool_):
            raise TypeError(f"mask must have True or False at each leaf, got {one!r}")
    return [0 if one else 1 for one in chosen]


def _step(
    recipe: Recipe, grads: Any, state: State, params: Any, loss_scale: Any = 1.0,
    apart: bool = False,
) -> Any:  # fmt: skip
    leaves, structure = _leaves(params, "params")
    slopes, own = _leaves(grads, "grads")
    _check_structure("grads", own, structure)
    if not isinstance(state, State):
        raise TypeError(f"state must be a State, as init makes it, got {type(state).__name__}")
    state = state._replace(**_clock(state))
    for (label, leaf), (_, slope) in zip(leaves, slopes, strict=True):
        _check_leaf(label.replace("params", "grads", 1), slope, tuple(leaf.shape))
    forms = [recipe.storage.of(str(leaf.dtype)) for _, leaf in leaves]
    columns = _columns(recipe, state, leaves, forms, structure)
    group_of = _groups(recipe.options.mask, params, structure)
    gradients = [slope for _, slope in slopes]

    total = jnp.zeros(4, jnp.uint32)
    if recipe.options.measures:
        if axes := sorted(_calls.varying(*gradients)):
            raise ValueError(
                "max_norm, skip_nonfinite and norms need gradients that all devices of a shard_map"
                f" have whole, got ones that vary over {', '.join(map(repr, axes))}: take them"
                " through jax.lax.pmean or psum first, or clip outside of it"
            )
        formats = [_formats(recipe, *pair) for pair in zip(forms, gradients, strict=True)]
        total = _calls.measure(state.count, gradients, formats)
    numbers, traced = recipe.numbers(state.count, group_of is not None, loss_scale)
    count, carry, rows, flags, norm = _calls.prepare(
        numbers, state.count, state.carry, traced, total
    )

    streams = [
        _leaf(recipe, form, leaf, gradient, {key: one[i] for key, one in columns.items()})
        for i, (form, (_, leaf), gradient) in enumerate(zip(forms, leaves, gradients, strict=True))
    ]
    # One call for all leaves; under shard_map one for those that vary over the same axes.
    together: dict[frozenset[str], list[int]] = {}
    for i, (found, _) in enumerate(streams):
        together.setdefault(_calls.varying(*found.arrays, flags, rows), []).append(i)
    new_params: list[Any] = [None] * len(leaves)
    calls = [
        (over, every[at : at + _MOST_LEAVES])
        for over, every in together.items()
        for at in range(0, len(every), _MOST_LEAVES)
    ]
    for over, indices in calls:
        results = _calls.sweep(
            recipe.spec.rule,
            _calls.varied(flags, over),
            _calls.varied(rows, over),
            [
                streams[i][0]._replace(
                    arrays=[_calls.varied(array, over) for array in streams[i][0].arrays],
                    group=group_of[i] if group_of else 0,
                )
                for i in indices
            ],
            recipe.stochastic,
            apart,
        )
        for i, (param, *others) in zip(indices, results, strict=True):
            new_params[i] = param
            for key, array in zip(streams[i][1], others, strict=True):
                columns[key][i] = array
    new_state = State(
        count,
        carry,
        {key: jax.tree_util.tree_unflatten(structure, one) for key, one in columns.items()},
        norm if recipe.options.measures else None,
    )
    return jax.tree_util.tree_unflatten(structure, new_params), new_state


def _leaf(
    recipe: Recipe, form: Form, param: Any, gradient: Any, state: dict[str, Any]
) -> tuple[_calls.Leaf, list[str]]:
    """A parameter's streams, and the keys of those that are written and in its state."""
    arrays, keys = [param], []
    if form.param.beside:
        arrays.append(state[form.param.beside])
        keys.append(form.param.beside)
    is_read = [False] * len(arrays) + [True]
    arrays.append(gradient)
    for key, kept in recipe.streams(form):
        keys += [key, kept.beside] if kept.beside else [key]
    arrays += [state[key] for key in keys[len(arrays) - 2 :]]
    is_read += [False] * (len(arrays) - len(is_read))
    return _calls.Leaf(arrays, is_read, _formats(recipe, form, gradient)), keys


def _clock(state: State) -> dict[str, Any]:
    """The state's count and what is carried beside it, checked: the core reads them as they lie."""
    found = {}
    for name, shape, dtypes in (("count", (), ("int32", "int64")), ("carry", (4,), ("uint32",))):
        label, value = f"state.{name}", jnp.asarray(getattr(state, name))
        _check_leaf(label, value, shape)
        if str(value.dtype) not in dtypes:
            raise ValueError(f"{label} must be {' or '.join(dtypes)}, got {value.dtype}")
        found[name] = value
    return found


def _columns(
    recipe: Recipe, state: State, leaves: Any, forms: Any, structure: Any
) -> dict[str, list[Any]]:
    """The state's arrays by key, one for each leaf, checked."""
    wanted: dict[str, list[Any]] = recipe.no_columns(leaves)
    for i, ((_, leaf), form) in enumerate(zip(leaves, forms, strict=True)):
        shape = tuple(leaf.shape)
        kept = dict(recipe.streams(form))
        own = {key: (shape, one.dtype) for key, one in kept.items()}
        for one in (*kept.values(), form.param):
            if one.beside:
                own[one.beside] = (one.beside_shape(shape), one.beside_dtype)
        for key, what in own.items():
            wanted.setdefault(key, [None] * len(leaves))[i] = what
    if state.arrays.keys() != wanted.keys():
        raise ValueError(
            f"state must have the arrays {', '.join(sorted(wanted)) or 'none'}, got"
            f" {', '.join(sorted(state.arrays)) or 'none'}"
        )
    columns = {}
    for key, expected in wanted.items():
        try:
            found = structure.flatten_up_to(state.arrays[key])
        except ValueError as error:
            raise ValueError(
                f"state.arrays[{key!r}] must have the structure of params: {error}"
            ) from None
        for (label, _), array, what in zip(leaves, found, expected, strict=True):
            if what is not None:
                label = label.replace("params", f"state.arrays[{key!r}]", 1)
                if not hasattr(array, "shape"):
                    raise TypeError(f"{label} must be an array, got {type(array).__name__}")
                _check_leaf(label, array, what[0], what[1])
        columns[key] = list(found)
    return columns


def _formats(recipe: Recipe, form: Form, gradient: Any) -> list[int]:
    """The formats of a parameter's streams, by the core's numbers."""
    found = recipe.placed(form)
    names = {place: kept.format for place, kept in found.items()} | {1: str(gradient.dtype)}
    return [_calls.FORMATS[names.get(place, "none")] for place in range(_calls.STREAMS)]
