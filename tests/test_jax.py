"""Optimizers of fusedstep.jax: the NumPy layer's bits, memory in place, what is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import pathlib
import pickle
import re
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from cases import CASES, each_case
from optional import optional

jax = optional("jax")
fj = optional("fusedstep.jax")
enable_x64 = (
    jax.enable_x64 if hasattr(jax, "enable_x64") else optional("jax.experimental").enable_x64
)

jnp = jax.numpy
by_name = fj.by_name

SHAPES = {"a": (), "b": (0,), "c": (1,), "d": (7, 9), "e": (3001,), "f": (33, 5)}
BF16, F16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
MIXED = [F16, F32, F32, BF16]


def arrays(seed, dtypes, mixed=()):
    """A dict in JAX's order, of all shapes in all dtypes; or in `mixed` ones under these keys."""
    rng = np.random.default_rng(seed)
    found = {}
    for i, dtype in enumerate(sorted(dtypes, key=lambda dtype: dtype.name)):
        for j, (key, shape) in enumerate(SHAPES.items()):
            values = rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 2, shape)
            own = mixed[(i + j) % len(mixed)] if mixed else dtype
            found[f"{dtype.name}.{key}"] = np.array(values, own)
    return found


def denormal(grads):
    """The same with numbers among them that XLA by itself takes for zero."""
    for g in grads.values():
        g.reshape(-1)[1::7] *= g.dtype.type(float(np.finfo(np.float32).tiny) / 8)
    return grads


def on_device(tree):
    return jax.tree.map(jnp.array, tree)


def bits(tree):
    return {key: (np.asarray(a).dtype, np.asarray(a).tobytes()) for key, a in tree.items()}


def same(opt, params, state, theirs):
    """Asserts that parameters, all states and the count are those of a neutral optimizer."""
    assert int(state.count) == opt.steps
    assert bits(params) == bits(theirs)
    found = {key: {} for key in theirs}
    for key, tree in state.arrays.items():
        for name, array in tree.items():
            if array is not None and (key != "ema" or opt.steps):  # which begins with a step there
                found[name][key] = array
    for name, own in opt.state.items():
        own = {key: array for key, array in own.items() if key != "step"}
        assert found[name].keys() == own.keys(), name
        assert bits(found[name]) == bits(own), name


def side_by_side(name, hypers, options, how, dtypes, steps=4, nan_at=None, mixed=()):
    """Takes the same steps in both layers and compares them after each.

    `options` is what `step` takes there and the optimizer here.
    """
    theirs = arrays(0, dtypes)
    params = on_device(theirs)
    opt = getattr(fs, name)(theirs, **hypers, **how)
    tx = by_name(name, **hypers, **options, **how)
    state = tx.init(params)
    step = jax.jit(tx.update_params)
    same(opt, params, state, theirs)
    for t in range(steps):
        grads = denormal(arrays(10 + t, dtypes, mixed))
        if t == nan_at:
            grads[list(grads)[4]][17] = np.nan
        opt.step(grads, **options)
        params, state = step(on_device(grads), state, params)
        same(opt, params, state, theirs)
        if options.get("max_norm") is not None or options.get("norms"):
            ours = np.asarray(state.grad_norm)
            assert ours.tobytes() == np.asarray(opt.grad_norm, ours.dtype).tobytes()
    assert step._cache_size() == 1
    return opt


# -- the bits of the NumPy layer -------------------------------------------------------------------

FULL = {"max_norm": 3.0, "clip_value": 0.05, "skip_nonfinite": True, "ema": 0.75}


@each_case()
def test_steps_have_the_bits_of_the_numpy_layer(name, hypers):
    side_by_side(name, hypers, {}, {}, [F32, BF16, F16], steps=3)


@pytest.mark.parametrize("name", CASES)
def test_options_have_the_bits_of_the_numpy_layer(name):
    opt = side_by_side(name, CASES[name][1], FULL, {}, [F32, BF16, F16], nan_at=0, mixed=MIXED)
    assert opt.steps == 3


@pytest.mark.parametrize("name", CASES)
def test_float64_has_the_bits_of_the_numpy_layer(name):
    with enable_x64(True):
        side_by_side(name, CASES[name][1], {}, {}, [F64, F32], steps=2)
        options = {**FULL, "skip_nonfinite": False, "ema": 0.3, "norms": True}
        side_by_side(name, CASES[name][-2], options, {}, [F64, F32, BF16], mixed=[F32, F64, F16])


@pytest.mark.parametrize(
    "options",
    [
        {"max_norm": 1.0},
        {"max_norm": 0.0},
        {"clip_value": 0.1},
        {"skip_nonfinite": True},
        {"norms": True},
        {"ema": 1.0},
    ],
    ids=str,
)
def test_each_option_by_itself(options):
    side_by_side("AdamW", {"lr": 0.1}, options, {}, [F32], nan_at=2)


def test_bits_are_those_of_each_instruction_set(isa):
    side_by_side("AdamW", {"lr": 0.1}, FULL, {}, [F32, BF16], nan_at=1)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "NAdam"])
@pytest.mark.parametrize(
    "how",
    [
        {"state_dtype": "bfloat16", "seed": 3},
        {"state_dtype": "bfloat16", "state_rounding": "nearest"},
        {"state_dtype": "q8", "seed": 2**62 + 1},
        {"state_dtype": "q8", "state_rounding": "nearest"},
        {"ema_dtype": "bfloat16", "seed": 5},
        {"ema_dtype": "parameter"},
        {"rounding": "stochastic", "seed": 7},
        {"rounding": "kahan"},
        {"rounding": "split", "state_dtype": "q8", "seed": 1},
        {"rounding": "split", "ema_dtype": "parameter"},
    ],
    ids=str,
)
def test_narrow_formats_have_the_bits_of_the_numpy_layer(name, how):
    hypers = {"lr": 0.1, **({"momentum": 0.9} if name in ("SGD", "RMSprop") else {})}
    dtypes = [BF16] if "rounding" in how else [BF16, F32]
    options = {"ema": 0.9} if "ema_dtype" in how else {"max_norm": 1.0}
    side_by_side(name, hypers, options, how, dtypes, steps=3, mixed=MIXED)


def test_formats_by_state_and_initial_values_that_are_not_zero():
    how = {"state_dtype": {"exp_avg": "bfloat16", "exp_avg_sq": "q8"}, "seed": 4}
    side_by_side("Adam", {"lr": 0.1}, {}, how, [F32], steps=2)
    hypers = {"lr": 0.1, "initial_accumulator_value": 0.1}
    side_by_side("Adagrad", hypers, {}, {"state_dtype": "q8"}, [F32], steps=2)
    side_by_side("RMSprop", hypers, {}, {"state_dtype": "bfloat16"}, [F32], steps=2)


def test_mu_dtype_is_the_first_moment():
    params = {"w": jnp.ones(5)}
    tx = fj.adamw(0.1, mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    assert state.arrays["exp_avg"]["w"].dtype == BF16
    assert state.arrays["exp_avg_sq"]["w"].dtype == F32
    theirs = {"w": np.ones(5, np.float32)}
    how = {"state_dtype": {"exp_avg": "bfloat16"}, "state_rounding": "nearest"}
    opt = fs.AdamW(theirs, lr=0.1, weight_decay=1e-4, **how)
    grads = {"w": np.linspace(-1, 1, 5, dtype=np.float32)}
    for _ in range(3):
        params, state = tx.update_params(grads, state, params)
        opt.step(grads)
    same(opt, params, state, theirs)
    with pytest.raises(ValueError, match="mu_dtype must be None beside state_dtype"):
        fj.adamw(0.1, mu_dtype="bfloat16", state_dtype="q8")


def test_skipped_steps_change_nothing_but_the_norm():
    tx = fj.adamw(0.1, skip_nonfinite=True, ema=0.9, state_dtype="q8")
    params = {"w": jnp.linspace(-1, 1, 100), "b": jnp.ones(())}
    state = tx.init(params)
    step = jax.jit(tx.update_params)
    grads = jax.tree.map(jnp.ones_like, params)
    bad = {**grads, "b": jnp.asarray(jnp.inf)}
    for _ in range(2):  # before the first step, and after it
        again = step(bad, state, params)
        jax.tree.map(np.testing.assert_array_equal, again[0], params)
        jax.tree.map(np.testing.assert_array_equal, again[1]._replace(grad_norm=0),
                     state._replace(grad_norm=0))  # fmt: skip
        assert again[1].grad_norm == jnp.inf
        params, state = step(grads, *again[::-1])
    assert state.count == 2


@pytest.mark.parametrize("shadow", ["bfloat16", "float16", "float32"])
def test_a_copy_and_a_loss_scale_have_the_bits_of_the_numpy_layer(shadow):
    theirs = arrays(0, [F32, BF16])
    tx = fj.sgd(0.1, shadow=shadow, skip_nonfinite=True)  # Adam would not see a scale
    opt = fs.conventions.optax.sgd(theirs, 0.1)
    params = on_device(theirs)
    state = tx.init(params)
    assert {str(one.dtype) for one in state.arrays["shadow"].values()} == {shadow}
    copies = {key: np.array(one) for key, one in state.arrays["shadow"].items()}
    step = jax.jit(lambda g, p, s, scale: tx.update_params(g, s, p, loss_scale=scale))
    for t, scale in enumerate((1.0, 1024.0, 0.25)):
        grads = arrays(10 + t, [F32, BF16])
        if t == 1:
            grads[list(grads)[4]][17] = np.inf
        opt.step(grads, loss_scale=scale, skip_nonfinite=True, shadow=copies)
        params, state = step(on_device(grads), params, state, scale)
        assert bits(params) == bits(theirs)
        assert bits(state.arrays["shadow"]) == bits(copies)
    assert (state.count, step._cache_size()) == (2, 1)
    fixed = tx.update_params(on_device(grads), state, params, loss_scale=8)
    traced = step(on_device(grads), params, state, 8.0)
    assert bits(fixed[0]) == bits(traced[0])
    # The copy is not saved, and made anew.
    again = tx.load_state_dict(tx.state_dict(state, params), params)
    assert bits(again.arrays["shadow"]) == bits(state.arrays["shadow"])


def test_wrong_copies_and_scales_are_refused():
    with pytest.raises(ValueError, match=r"shadow must be None, 'float32', .* got 'int8'"):
        fj.adamw(0.1, shadow="int8")
    tx, params = fj.adamw(0.1), {"w": jnp.ones(3)}
    for scale, error in ((0.0, "loss_scale must be finite and > 0, got 0.0"),
                         (1e-320, "loss_scale must have a finite inverse")):  # fmt: skip
        with pytest.raises(ValueError, match=error):
            tx.update_params(params, tx.init(params), params, loss_scale=scale)


def test_the_count_stays_at_the_largest_integer():
    tx = fj.adamw(0.1)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)._replace(count=jnp.asarray(2**31 - 2, jnp.int32))
    step = jax.jit(tx.update_params)
    for _ in range(3):
        params, state = step(params, state, params)
    assert state.count == 2**31 - 1
    assert np.isfinite(params["w"]).all()


# -- trees -----------------------------------------------------------------------------------------


def test_trees_of_every_shape():
    def one(k):
        return jnp.linspace(0.5, 1.5, k)

    nested = {"z": {"kernel": one(4), "bias": None}, "a": [one(1), (one(2), one(3))], "n": {}}
    nested["s"] = jnp.float32(2)
    tx = fj.adam(0.1, max_norm=1.0)
    flat, structure = jax.tree.flatten(nested)
    step = jax.jit(lambda g, s, p: tuple(tx.update_params(g, s, p)))
    params, state = step(nested, tx.init(nested), nested)
    expected, apart = step(flat, tx.init(flat), flat)
    assert jax.tree.structure(params) == structure
    assert jax.tree.structure(state.arrays["exp_avg"]) == structure
    for found, wanted in zip(jax.tree.leaves((params, state)), jax.tree.leaves((expected, apart)),
                             strict=True):  # fmt: skip
        assert np.array_equal(found, wanted)
    # One leaf, none, and numbers that are no arrays.
    alone, _ = jax.jit(tx.update_params)(one(4), tx.init(one(4)), one(4))
    assert alone.shape == (4,)
    for empty in ({}, [], None, {"a": None}, {"a": jnp.zeros((0, 3))}):
        made, state = jax.jit(tx.update_params)(empty, tx.init(empty), empty)
        assert jax.tree.structure(made) == jax.tree.structure(empty)
        assert (state.count, state.grad_norm) == (1, 0)
    made, _ = tx.update_params({"a": 1.0}, tx.init({"a": 1.0}), {"a": 1.0})
    assert float(made["a"]) == pytest.approx(0.9)


def test_equinox_modules():
    eqx = pytest.importorskip("equinox")

    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = fj.adamw(0.01, max_norm=1.0)
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def train(params, state, x):
        def loss(params):
            return jnp.square(jax.vmap(eqx.combine(params, static))(x)).mean()

        value, grads = eqx.filter_value_and_grad(loss)(params)
        params, state = tx.update_params(grads, state, params)
        return value, params, state

    x = jnp.ones((4, 3))
    losses = []
    for _ in range(5):
        value, params, state = train(params, state, x)
        losses.append(float(value))
    assert losses[-1] < losses[0] / 2


# -- memory ----------------------------------------------------------------------------------------


def pointers(tree):
    return [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)]


def three(scale=1.0):
    return {
        k: scale * jax.random.normal(jax.random.key(i), (256, 128)) for i, k in enumerate("abc")
    }


def plain_order(tx):
    def train(params, state, grads):
        return tx.update_params(grads, state, params)

    return jax.jit(train, donate_argnums=(0, 1)), lambda g, s, p: (p, s, g)


def own_order(tx):
    return jax.jit(tx.update_params, donate_argnums=(1, 2)), lambda g, s, p: (g, s, p)


def state_first(tx):
    def train(state, params, grads):
        params, state = tx.update_params(grads, state, params)
        return state, params

    return jax.jit(train, donate_argnums=(0, 1)), lambda g, s, p: (s, p, g)


@pytest.mark.parametrize("order", [plain_order, own_order, state_first])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"max_norm": 1.0, "ema": 0.9, "skip_nonfinite": True},
        {"state_dtype": "q8"},
        {"mu_dtype": "bfloat16", "mask": {"a": True, "b": False, "c": True}},
    ],
    ids=str,
)
def test_donated_memory_is_updated_where_it_lies(order, kwargs):
    tx = fj.adamw(0.1, **kwargs)
    params, grads = three(), three(0.1)
    state = tx.init(params)
    expected = jax.jit(tx.update_params)(grads, state, params)
    expected = jax.tree.map(np.array, tuple(expected))
    program, given = order(tx)
    args = given(grads, state, params)
    memory = program.lower(*args).compile().memory_analysis()
    leaf = params["a"].nbytes
    assert memory.temp_size_in_bytes < leaf / 4
    before = {"p": pointers(params), "s": pointers(state.arrays)}
    found = program(*args)
    new_params, new_state = found if isinstance(found[1], fj.State) else found[::-1]
    assert pointers(new_params) == before["p"]
    assert pointers(new_state.arrays) == before["s"]
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state.arrays)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(grads))
    jax.tree.map(np.testing.assert_array_equal, new_params, expected[0])
    jax.tree.map(np.testing.assert_array_equal, new_state.arrays, expected[1].arrays)


@pytest.mark.parametrize("sees", ["operands", "arguments of the jit around it"])
def test_a_branch_returns_what_another_does(sees):
    tx = fj.adam(0.1)
    params = {"w": jnp.ones(3)}

    def step(state, params):
        return tx.update_params(params, state, params)

    def skip(state, params):
        return params, state

    @jax.jit
    def program(on, state, params):
        if sees == "operands":
            return jax.lax.cond(on, step, skip, state, params)
        return jax.lax.cond(on, lambda: step(state, params), lambda: skip(state, params))

    state = tx.init(params)
    assert [program(on, state, params)[1].count for on in (True, False)] == [1, 0]


@pytest.mark.parametrize("program", ["jit", "eager", "closure", "donated twin"])
def test_what_others_hold_stays_as_it_is(program):
    tx = fj.adamw(0.1)
    source = {k: np.linspace(-1, 1, 4096, dtype=np.float32).reshape(64, 64) for k in "ab"}
    params = jax.tree.map(jnp.asarray, source)  # the memory of NumPy's arrays, where it is aligned
    held = {
        "source": source,
        "moved": jax.tree.map(lambda x: jax.device_put(x, jax.devices()[0]), params),
        "seen": jax.tree.map(np.asarray, params),
        "flat": jax.tree.map(lambda x: x.reshape(-1), params),
        "params": params,
    }
    state = tx.init(params)
    held["state"] = state
    grads = jax.tree.map(lambda x: x + 1, params)
    held["grads"] = grads
    before = jax.tree.map(lambda x: np.array(x, copy=True), held)
    if program == "jit":
        made = jax.jit(tx.update_params)(grads, state, params)
    elif program == "eager":
        made = tx.update_params(grads, state, params)
    elif program == "closure":
        made = jax.jit(lambda: tuple(tx.update_params(grads, state, params)))()
    else:  # copies are donated, which may not be the memory of what they are copies of
        copies = jax.tree.map(lambda x: jnp.array(x, copy=True), (state, params))
        made = jax.jit(tx.update_params, donate_argnums=(1, 2))(grads, *copies)
    jax.block_until_ready(tuple(made))
    jax.tree.map(np.testing.assert_array_equal, held, before)
    assert not np.array_equal(made[0]["a"], before["params"]["a"])
    once = jax.jit(tx.update_params)(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, tuple(made), tuple(once))


def test_one_array_in_several_places():
    x = jnp.linspace(0.5, 2, 1000)
    params = {"a": x, "b": x}
    tx = fj.adam(0.1)
    state = tx.init(params)
    state = state._replace(arrays=dict.fromkeys(state.arrays, params))
    before = np.array(x)
    copies = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, state, params))
    wanted = tx.update_params(*copies)

    @jax.jit
    def inside(x):
        tree = {"a": x, "b": x}
        own = state._replace(arrays=dict.fromkeys(state.arrays, tree))
        return (*tx.update_params(tree, own, tree), x)

    for found in (
        tx.update_params(params, state, params),
        jax.jit(tx.update_params)(params, state, params),
        inside(x)[:2],
    ):
        jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(wanted))
    assert np.array_equal(x, before)
    assert np.array_equal(inside(x)[2], before)
    # Gradients that are donated parameters too; moments which are one array.
    step = jax.jit(lambda p, s: tuple(tx.update_params(p, s, p)), donate_argnums=(0, 1))
    found = step(copies[0], tx.init(copies[0]))
    wanted = tx.update_params(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, found, tuple(wanted))


def test_arrays_of_numpy_that_lie_anywhere():
    tx = fj.adamw(0.1)
    memory = np.linspace(-1, 1, 4 * 1001, dtype=np.float32)
    views = {"off": memory[1:1000], "stride": memory[1001:2001:3], "back": memory[::-1][:50]}
    before = memory.copy()
    state = tx.init(views)
    made, state = tx.update_params(views, state, views)
    wanted, _ = tx.update_params(*on_device((views, tx.init(views), views)))
    jax.tree.map(np.testing.assert_array_equal, made, wanted)
    assert np.array_equal(memory, before)
    assert np.array_equal(tx.init(views).arrays["exp_avg"]["off"], np.zeros(999))


def test_narrower_types_of_jax_are_taken_for_numpys_own():
    # Without 64 bits JAX reads NumPy's float64 as float32, wherever it is given.
    tx = fj.adam(0.1, max_norm=1.0)
    wide = {"w": np.linspace(-1, 1, 9)}
    params = on_device(wide)
    wanted, _ = tx.update_params(params, tx.init(params), params)
    for found, _ in (
        tx.update_params(wide, tx.init(wide), wide),
        tx.update_params(wide, tx.init(params), params),
        jax.jit(lambda s, p: tx.update_params(wide, s, p))(tx.init(params), params),
    ):
        assert found["w"].dtype == F32
        assert np.array_equal(found["w"], wanted["w"])


# -- what is refused -------------------------------------------------------------------------------

P = {"w": np.ones(3, np.float32), "b": np.ones((), np.float32)}


@functools.cache
def adamw():
    return fj.adamw(0.1)


def step_with(grads=P, params=P, tx=None, **state):
    tx = tx or adamw()
    return tx.update_params(grads, tx.init(P)._replace(**state), params)


def state_of(params):
    return adamw().init(params)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: step_with({"w": P["w"]}), ValueError, "grads must have the structure of params, "),
        (lambda: step_with([P["w"], P["b"]]), ValueError, "grads must have the structure of param"),
        (lambda: step_with({**P, "b": None}), ValueError, "grads must have the structure of param"),
        (
            lambda: step_with({**P, "w": np.ones(4, np.float32)}),
            ValueError,
            "grads['w'] must have the shape (3,), got (4,)",
        ),
        (
            lambda: step_with({**P, "w": np.ones((3, 1), np.float32)}),
            ValueError,
            "grads['w'] must have the shape (3,), got (3, 1)",
        ),
        (
            lambda: step_with({**P, "w": np.ones(3, np.int32)}),
            TypeError,
            "grads['w'] must be float32, float64, bfloat16, float16, got int32",
        ),
        (
            lambda: step_with({**P, "w": np.ones(3, np.complex64)}),
            TypeError,
            "grads['w'] must be float32, float64, bfloat16, float16, got complex64",
        ),
        (
            lambda: step_with({**P, "w": "text"}),
            TypeError,
            "grads['w'] must be an array, got str",
        ),
        (
            lambda: adamw().init({"w": np.ones(3, np.int32)}),
            TypeError,
            "params['w'] must be float32, float64, bfloat16, float16, got int32",
        ),
        (
            lambda: adamw().init({"w": jnp.ones(3, bool)}),
            TypeError,
            "params['w'] must be float32, float64, bfloat16, float16, got bool",
        ),
        (
            lambda: adamw().init({"w": [jax.random.key(0)]}),
            TypeError,
            "params['w'][0] must be float32, float64, bfloat16, float16, got key<fry>",
        ),
        (
            lambda: adamw().update_params(P, (), P),
            TypeError,
            "state must be a State, as init makes it, got tuple",
        ),
        (
            lambda: adamw().update_params(P, fj.rmsprop(0.1).init(P), P),
            ValueError,
            "state must have the arrays exp_avg, exp_avg_sq, got square_avg",
        ),
        (
            lambda: adamw().update_params(P, fj.sgd(0.1).init(P), P),
            ValueError,
            "state must have the arrays exp_avg, exp_avg_sq, got none",
        ),
        (
            lambda: adamw().update_params(P, state_of({**P, "w": np.ones(4, np.float32)}), P),
            ValueError,
            "state.arrays['exp_avg']['w'] must have the shape (3,), got (4,)",
        ),
        (
            lambda: adamw().update_params(P, state_of({"w": P["w"]}), P),
            ValueError,
            "state.arrays['exp_avg'] must have the structure of params: ",
        ),
        (
            lambda: step_with(tx=fj.adam(0.1, state_dtype="q8"),
                              arrays=fj.adam(0.1, mu_dtype="bfloat16").init(P).arrays),
            ValueError,
            "state must have the arrays exp_avg, exp_avg_exponents, exp_avg_sq,",
        ),
        (
            lambda: step_with(arrays=fj.adam(0.1, mu_dtype="bfloat16").init(P).arrays),
            ValueError,
            "state.arrays['exp_avg']['b'] must be float32, got bfloat16",
        ),
        (
            lambda: step_with(count=np.zeros(2, np.int32)),
            ValueError,
            "state.count must have the shape (), got (2,)",
        ),
        (
            lambda: step_with(count=np.zeros((), np.int8)),
            ValueError,
            "state.count must be int32 or int64, got int8",
        ),
        (
            lambda: step_with(count=np.zeros((), np.float32)),
            ValueError,
            "state.count must be int32 or int64, got float32",
        ),
        (
            lambda: step_with(carry=np.zeros(2, np.uint32)),
            ValueError,
            "state.carry must have the shape (4,), got (2,)",
        ),
        (
            lambda: step_with(carry=np.zeros(4, np.float32)),
            ValueError,
            "state.carry must be uint32, got float32",
        ),
        (lambda: adamw().update(P, state_of(P)), ValueError, "params must be given to update, got"),
        (
            lambda: fj.adamw(0.1, rounding="split").init(P),
            ValueError,
            "rounding must be 'nearest' unless all parameters are bfloat16, got 'split'",
        ),
        (
            lambda: fj.adamw(0.1, rounding="kahan").update(P, state_of(P), P),
            ValueError,
            "rounding must be 'nearest' in update, whose result is added by optax, got 'kahan'",
        ),
        (lambda: fj.adamw(0.1, foo=1), TypeError, "foo must be an argument of AdamW, which are "),
        (lambda: by_name("Adam", foo=1), TypeError, "foo must be an argument of Adam, which are "),
        (lambda: by_name("adam"), ValueError, "name must be one of SGD, Lion, "),
        (lambda: fj.adamw(), TypeError, "adamw() missing 1 required positional argument"),
        (lambda: fj.adamw(-1.0), ValueError, "lr must be >= 0, got -1.0"),
        (lambda: fj.adamw(0.1, b2=1.0), ValueError, "betas[1] must be in [0, 1), got 1.0"),
        (lambda: fj.adamw("fast"), TypeError, "lr must be a number >= 0, got 'fast'"),
        (lambda: fj.adamw(jnp.ones(2)), TypeError, "a hyperparameter must be a number, got an arr"),
        (lambda: fj.adamw(0.1, max_norm=-1), ValueError, "max_norm must be >= 0, got -1"),
        (lambda: fj.adamw(0.1, clip_value=0), ValueError, "clip_value must be > 0, got 0"),
        (lambda: fj.adamw(0.1, ema=2), ValueError, "ema must be in [0, 1], got 2"),
        (lambda: fj.adamw(0.1, skip_nonfinite=1), TypeError, "skip_nonfinite must be True or "),
        (lambda: fj.adamw(0.1, norms="all"), TypeError, "norms must be True or False, got 'all'"),
        (lambda: fj.adamw(0.1, seed=-1), ValueError, "seed must be an integer in [0, 2^63)"),
        (
            lambda: fj.adamw(0.1, state_dtype="q4"),
            ValueError,
            "state_dtype must be 'float32', 'bfloat16' or 'q8', got 'q4'",
        ),
        (
            lambda: fj.adamw(0.1, mu_dtype="float16"),
            ValueError,
            "state_dtype['exp_avg'] must be 'float32', 'bfloat16' or 'q8', got 'float16'",
        ),
        (
            lambda: fj.adamw(0.1, mu_dtype="small"),
            TypeError,
            "mu_dtype must be a dtype, got 'small'",
        ),
        (
            lambda: step_with(tx=fj.adamw(0.1, mask={"w": True})),
            ValueError,
            "mask must have the structure of params: ",
        ),
        (
            lambda: step_with(tx=fj.adamw(0.1, mask=lambda p: {"w": 0.5, "b": True})),
            TypeError,
            "mask must have True or False at each leaf, got 0.5",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("inside", [False, True], ids=["eager", "jit"])
def test_wrong_input_is_refused(call, error, message, inside):
    with pytest.raises(error, match=re.escape(message)):
        jax.jit(call)() if inside else call()


def test_a_step_that_raises_has_changed_nothing():
    tx = adamw()
    params, state = on_device(P), tx.init(P)
    step = jax.jit(tx.update_params, donate_argnums=(1, 2))
    with pytest.raises(ValueError, match="must have the shape"):
        step({**P, "w": np.ones(4, np.float32)}, state, params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    made, _ = step(P, state, params)
    assert float(made["b"]) == pytest.approx(0.9, rel=1e-4)


# -- states as trees and files ---------------------------------------------------------------------


def test_states_are_trees_of_arrays():
    tx = fj.adamw(0.1, max_norm=1.0, ema=0.9, state_dtype="q8", rounding="split")
    params = {"w": jnp.ones((70, 3), jnp.bfloat16), "b": jnp.ones((), jnp.bfloat16)}
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    assert jax.eval_shape(tx.init, params) == shapes
    assert jax.eval_shape(tx.init, jax.eval_shape(lambda: params)) == shapes
    jax.tree.map(np.testing.assert_array_equal, jax.jit(tx.init)(params), state)
    step = jax.jit(tx.update_params)
    assert jax.eval_shape(step, params, state, params)[1] == shapes
    _, after = step(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    twice = jax.tree.map(lambda x: x + x, after)
    assert twice.count == 2
    back = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, after)))
    again = step(params, back, params)
    jax.tree.map(np.testing.assert_array_equal, tuple(again), tuple(step(params, after, params)))


def test_orbax_keeps_states(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")

    tx = fj.adamw(0.1, max_norm=1.0, ema=0.9, mu_dtype="bfloat16", weight_decay=0.1)
    step = jax.jit(tx.update_params)
    params = {"layer": {"w": jnp.linspace(-1, 1, 500).reshape(20, 25), "b": jnp.ones(())}}
    state = tx.init(params)
    grads = [jax.tree.map(lambda x, t=t: jnp.cos(x + t), params) for t in range(6)]
    for t in range(3):
        params, state = step(grads[t], state, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step3", (params, state))
        checkpointer.wait_until_finished()
        blank = jax.tree.map(jnp.zeros_like, (params, state))
        params2, state2 = checkpointer.restore(tmp_path / "step3", blank)
    assert isinstance(state2, fj.State)
    for t in range(3, 6):
        params, state = step(grads[t], state, params)
        params2, state2 = step(grads[t], state2, params2)
    jax.tree.map(np.testing.assert_array_equal, (params2, state2), (params, state))


def test_functions_are_written_as_the_conventions_are():
    # In a process of its own, as the script reads what it runs with.
    script = pathlib.Path(__file__).parents[1] / ".ci" / "jax_functions.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_trees_as_haiku_names_them():
    params = {
        "mlp/~/linear_0": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)},
        "norm": {"w": jnp.ones(2)},
    }
    tx = fj.lion(0.1, norms=True)
    made, state = jax.jit(tx.update_params)(params, tx.init(params), params)
    assert jax.tree.structure(made) == jax.tree.structure(params)
    np.testing.assert_allclose(state.grad_norm, 18**0.5, rtol=1e-6)
    assert tx.state_dict(state, params)["step"] == 1


def test_gradients_may_be_donated_too():
    tx = fj.adamw(0.1, max_norm=1.0)
    params, grads = three(), three(0.1)
    state = tx.init(params)
    expected = jax.tree.map(np.array, tuple(jax.jit(tx.update_params)(grads, state, params)))
    step = jax.jit(tx.update_params, donate_argnums=(0, 1, 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some donated buffers were not usable")
        found = step(grads, state, params)
    jax.tree.map(np.testing.assert_array_equal, tuple(found), expected)


def test_without_jit():
    tx = fj.adamw(0.1, **FULL)
    params = {"w": jnp.linspace(-1, 1, 100)}
    state = tx.init(params)
    wanted = jax.jit(tx.update_params)(params, state, params)
    with jax.disable_jit():
        found = tx.update_params(params, state, params)
    jax.tree.map(np.testing.assert_array_equal, tuple(found), tuple(wanted))
    assert np.array_equal(state.arrays["ema"]["w"], params["w"])  # before the first step


def test_several_threads_step_at_once():
    # Schedules are looked up by XLA's threads, which must get the lock that those who wait have.
    tx = fj.adamw(fs.schedules.Cosine(0.1, total=50), max_norm=1.0)
    step = jax.jit(tx.update_params)

    def train(seed):
        params = {"w": jax.random.normal(jax.random.key(seed), (300,))}
        state = tx.init(params)
        for _ in range(20):
            params, state = step(params, state, params)
        return np.asarray(params["w"])

    alone = [train(seed) for seed in range(4)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    assert np.array_equal(alone, together)


def test_many_leaves_are_several_calls_of_the_same_bits():
    theirs = {f"{i:03}": np.full(5, i / 300, np.float32) for i in range(300)}
    params = on_device(theirs)
    tx, opt = fj.adamw(0.1, max_norm=1.0), fs.conventions.optax.adamw(theirs, 0.1)
    state = tx.init(params)
    opt.step({key: value + 1 for key, value in theirs.items()}, max_norm=1.0)
    grads = jax.tree.map(lambda p: p + 1, params)
    params, state = jax.jit(tx.update_params)(grads, state, params)
    same(opt, params, state, theirs)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_traced_loss_scale_is_checked_as_the_program_runs(scale):
    tx, params = fj.sgd(0.1, skip_nonfinite=True), {"w": jnp.ones(3)}
    step = jax.jit(lambda g, p, s, scale: tx.update_params(g, s, p, loss_scale=scale))
    with pytest.raises((ValueError, RuntimeError), match="loss_scale must be finite and > 0, got"):
        step(params, params, tx.init(params), scale)


def test_optax_form_takes_a_loss_scale_and_a_copy_is_the_same_optimizer():
    tx, params = fj.sgd(0.5), {"w": jnp.ones(3)}
    updates, _ = tx.update(params, tx.init(params), params, loss_scale=4.0, value=1.0)
    assert updates["w"].tolist() == [-0.125] * 3
    assert copy.deepcopy(tx) is tx
