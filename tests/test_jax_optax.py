"""Optimizers of fusedstep.jax as optax's: its numbers, its combinators, flax, schedules."""

from __future__ import annotations

import inspect
import itertools

import numpy as np
import pytest

import fusedstep as fs
from optional import optional

jax = optional("jax")
optax = optional("optax")
fj = optional("fusedstep.jax")
enable_x64 = (
    jax.enable_x64 if hasattr(jax, "enable_x64") else optional("jax.experimental").enable_x64
)

jnp = jax.numpy
chain = optax.chain
State = fj.State

IN_PLACE = "update_params"

# optax's arguments, each of them somewhere at a value that is not its default.
GIVEN = {
    "sgd": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "momentum": 0.8},
        {"learning_rate": 0.1, "momentum": 0.8, "nesterov": True},
        {"learning_rate": 0.1, "nesterov": True},
    ],
    "sign_sgd": [{"learning_rate": 0.1}],
    "signum": [{"learning_rate": 0.1}, {"learning_rate": 0.1, "beta": 0.7}],
    "adagrad": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "initial_accumulator_value": 0.3, "eps": 0.01},
    ],
    "rmsprop": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "decay": 0.7, "eps": 0.1, "initial_scale": 0.5},
        {"learning_rate": 0.1, "eps": 0.1, "eps_in_sqrt": False, "centered": True},
        {"learning_rate": 0.1, "eps": 0.1, "momentum": 0.8, "nesterov": True},
        {"learning_rate": 0.1, "eps": 0.1, "momentum": 0.8, "bias_correction": True},
    ],
    "adadelta": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.5, "rho": 0.7, "eps": 0.01, "weight_decay": 0.1},
    ],
    "adam": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.1},
        {"learning_rate": 0.1, "nesterov": True},
    ],
    "adamw": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.1,
         "weight_decay": 0.3},
        {"learning_rate": 0.1, "weight_decay": 0.3, "nesterov": True},
    ],
    "nadam": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.1},
        {"learning_rate": 0.1, "nesterov": False},
    ],
    "nadamw": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.1,
         "weight_decay": 0.3},
        {"learning_rate": 0.1, "nesterov": False},
    ],
    "amsgrad": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "eps_root": 0.1},
        {"learning_rate": 0.1, "bias_correction_mu": False, "bias_correction_nu": False},
    ],
    "adamax": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01},
    ],
    "adamaxw": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.8, "b2": 0.9, "eps": 0.01, "weight_decay": 0.3},
    ],
    "radam": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.7, "b2": 0.8, "eps": 0.01, "eps_root": 0.1,
         "threshold": 4.5},
    ],
    "lion": [
        {"learning_rate": 0.1},
        {"learning_rate": 0.1, "b1": 0.7, "b2": 0.8, "weight_decay": 0.3},
    ],
}  # fmt: skip


def params_of(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "w": jnp.asarray(rng.uniform(0.5, 2, (5, 7)), dtype),
        "in": {"b": jnp.asarray(rng.uniform(0.5, 2, 11), dtype), "s": jnp.asarray(0.7, dtype)},
    }


def grads_at(params, t):
    return jax.tree.map(lambda x: jnp.cos(3 * x + t), params)


def run(tx, steps=4, params=None, apart=True):
    """The parameters after each step in optax's form, or ours; and the last state."""
    key = "ours" if apart else IN_PLACE
    found, states = run_all({key: tx}, steps, params)
    return [one[key] for one in found], states[key]


def run_all(all_of, steps=4, params=None):
    """`run` of several in one program, by key."""
    params = dict.fromkeys(all_of, params_of() if params is None else params)
    states = jax.jit(lambda params: {key: tx.init(params[key]) for key, tx in all_of.items()})(
        params
    )

    def one(key, params, state, t):
        grads = grads_at(params, t)
        if key == IN_PLACE:
            return tuple(all_of[key].update_params(grads, state, params))
        updates, state = all_of[key].update(grads, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def step(params, states, t):
        both = {key: one(key, params[key], states[key], t) for key in all_of}
        return {key: p for key, (p, _) in both.items()}, {key: s for key, (_, s) in both.items()}

    found = []
    for t in range(steps):
        params, states = step(params, states, t)
        found.append(params)
    assert step._cache_size() == 1
    return found, states


def compare(ours, theirs, steps=4, params=None, rtol=2e-6):
    """Asserts that both forms of ours take optax' steps; returns our state."""
    found, states = run_all({"theirs": theirs, "ours": ours, IN_PLACE: ours}, steps, params)
    expected = [one["theirs"] for one in found]
    close([one["ours"] for one in found], expected, rtol)
    close([one[IN_PLACE] for one in found], expected, rtol)
    return states["ours"]


def close(found, expected, rtol=2e-6):
    for ours, theirs in zip(found, expected, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), ours, theirs
        )


def each():
    for name, sets in GIVEN.items():
        for given in sets:
            text = "-".join(f"{key}={value}" for key, value in given.items() if value != 0.1)
            yield pytest.param(name, given, id=f"{name}-{text}")


@pytest.mark.parametrize(("name", "given"), list(each()))
def test_numbers_are_those_of_optax(name, given):
    with enable_x64(True):
        params = params_of(np.float64)
        theirs = getattr(optax, name)(**given)
        ours = getattr(fj, name)(**given)
        assert isinstance(ours, optax.GradientTransformationExtraArgs)
        assert compare(ours, theirs, 8, params, rtol=1e-11).count == 8
    if given is GIVEN[name][0]:
        compare(ours, theirs)


def test_every_function_and_argument_is_compared():
    known = {name for name in fj.__all__ if hasattr(optax, name)}
    assert known - {"rprop"} == set(GIVEN)
    for name, sets in GIVEN.items():
        arguments = set(inspect.signature(getattr(fj, name)).parameters)
        theirs = inspect.signature(getattr(optax, name)).parameters
        own = {key: theirs[key].default for key in arguments & set(theirs)}
        for key, default in own.items():
            if key in ("mask", "mu_dtype") or (name, key) == ("radam", "nesterov"):
                continue  # tested below; refused
            assert any(key in given and given[key] != default for given in sets), (name, key)
            ours = inspect.signature(getattr(fj, name)).parameters[key].default
            assert ours == default or (name, key) == ("adadelta", "learning_rate"), (name, key)


def test_rprop_is_that_of_the_paper():
    # optax applies the step before; ours are the steps that it means to take.
    with enable_x64(True):
        params = params_of(np.float64)
        theirs = {key: np.array(v) for key, v in zip("abc", jax.tree.leaves(params), strict=True)}
        opt = fs.conventions.optax.rprop(theirs, 0.1)
        tree = params
        for t in range(5):
            grads = grads_at(tree, t)
            opt.step(dict(zip("abc", map(np.asarray, jax.tree.leaves(grads)), strict=True)))
            tree = jax.tree.unflatten(jax.tree.structure(params), map(jnp.array, theirs.values()))
        found, _ = run(fj.rprop(0.1), 5, params)
        close(found[-1:], [tree], rtol=1e-14)


@pytest.mark.parametrize(
    "mask",
    [
        {"w": True, "in": {"b": False, "s": True}},
        {"w": False, "in": True},
        lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
        {"w": False, "in": False},
        True,
    ],
    ids=["tree", "prefix", "callable", "none", "all"],
)
def test_masks_of_weight_decay_are_those_of_optax(mask):
    given = {"weight_decay": 0.3, "mask": mask}
    for name in ("adamw", "lion"):
        compare(getattr(fj, name)(0.1, **given), getattr(optax, name)(0.1, **given))


def test_clipping_is_that_of_optax():
    for ours, theirs in (
        (
            fj.adamw(0.1, max_norm=0.5),
            chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)),
        ),
        (fj.sgd(0.1, max_norm=1e9), optax.sgd(0.1)),
        (fj.sgd(0.1, clip_value=0.2), chain(optax.clip(0.2), optax.sgd(0.1))),
    ):
        compare(ours, theirs, rtol=5e-6)  # 1e-6 stands beside our norm, as in torch
    _, state = run(fj.adamw(0.1, norms=True), 1)
    norm = optax.tree.norm(grads_at(params_of(), 0))
    np.testing.assert_allclose(state.grad_norm, norm, rtol=1e-6)


# -- inside of optax' combinators ------------------------------------------------------------------


def combined(make):
    """optax' combinators around an optimizer."""
    labels = {"w": "one", "in": {"b": "two", "s": "one"}}
    wide = lambda params: jax.tree.map(lambda x: x.ndim > 0, params)  # noqa: E731
    return {
        "chain": optax.chain(optax.clip_by_global_norm(0.5), make(0.1), optax.scale(0.5)),
        "named_chain": optax.named_chain(("clip", optax.clip(0.2)), ("ours", make(0.1))),
        "masked": optax.masked(make(0.1), wide),
        "multi_transform": optax.multi_transform({"one": make(0.1), "two": optax.sgd(0.2)}, labels),
        "partition": optax.partition({"one": make(0.1), "two": make(0.2)}, labels),
        "apply_if_finite": optax.apply_if_finite(make(0.1), 3),
        "MultiSteps": optax.MultiSteps(make(0.1), 2).gradient_transformation(),
        "inject": optax.inject_hyperparams(make)(0.1),
        "inject schedule": optax.inject_hyperparams(make)(optax.linear_schedule(0.1, 0.0, 5)),
        "inject in chain": optax.chain(
            optax.clip(0.2), optax.inject_hyperparams(make)(learning_rate=0.1)
        ),
        "lookahead": optax.chain(optax.add_decayed_weights(0.1), make(0.1)),
        "freeze": optax.partition({"one": make(0.1), "two": optax.set_to_zero()}, labels),
        "conditionally": optax.conditionally_transform(make(0.1), lambda step: step != 1),
    }


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion"])
def test_combinators_take_ours_for_theirs(name):
    ours, theirs = combined(getattr(fj, name)), combined(getattr(optax, name))
    both = {f"ours {key}": tx for key, tx in ours.items()} | theirs
    for found in run_all(both)[0]:
        for key in theirs:
            close([found[f"ours {key}"]], [found[key]], rtol=5e-6)


def test_apply_if_finite_leaves_out_a_step():
    def finally_of(make):
        tx = optax.apply_if_finite(make(0.1), 3)
        params = params_of()
        state = tx.init(params)
        update = jax.jit(tx.update)
        for t in range(4):
            grads = grads_at(params_of(), t)
            if t == 2:
                grads["in"]["b"] = grads["in"]["b"].at[3].set(jnp.nan)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    found, state = finally_of(fj.adamw)
    expected, _ = finally_of(optax.adamw)
    close([found], [expected])
    assert state.inner_state.count == 3
    assert state.total_notfinite == 1


@pytest.mark.parametrize("name", sorted(GIVEN))
def test_injected_numbers_are_those_of_optax(name):
    given = GIVEN[name][-1]
    given = {**given, **({"momentum": 0.6} if name == "sgd" else {})}
    ours = optax.inject_hyperparams(getattr(fj, name))(**given)
    theirs = optax.inject_hyperparams(getattr(optax, name))(**given)
    if name == "radam":  # optax compares its threshold inside of Python
        theirs = optax.inject_hyperparams(optax.radam, static_args=("threshold",))(**given)
    assert set(ours.init(params_of()).hyperparams) >= {"learning_rate"}
    close(run(ours, 3)[0], run(theirs, 3)[0], rtol=5e-6)


def test_injected_numbers_of_rprop():
    given = {"learning_rate": 0.1, "eta_minus": 0.3, "eta_plus": 1.7, "max_step_size": 0.2}
    ours = optax.inject_hyperparams(fj.rprop)(**given)
    close(run(ours, 4)[0], run(fj.rprop(**given), 4)[0])


def test_injected_options_and_a_momentum_of_nothing():
    ours = optax.inject_hyperparams(fj.adamw)(0.1, max_norm=0.5, clip_value=0.2)
    close(run(ours, 3)[0], run(fj.adamw(0.1, max_norm=0.5, clip_value=0.2), 3)[0])
    assert "lr=0.25, " in repr(fj.adamw(jnp.asarray(0.25)))
    ours = optax.inject_hyperparams(fj.sgd)(0.1, momentum=0.0)
    close(run(ours, 3)[0], run(optax.sgd(0.1), 3)[0])


def test_injected_rates_change_without_a_new_program():
    traces = itertools.count()
    tx = optax.inject_hyperparams(fj.adamw)(learning_rate=0.1, weight_decay=0.1)
    params = params_of()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        next(traces)
        updates, state = tx.update(grads_at(params, 0), state, params)
        return optax.apply_updates(params, updates), state

    params, state = step(params, state)
    state.hyperparams["learning_rate"] = jnp.asarray(0.05, jnp.float32)
    params, state = step(params, state)
    state.hyperparams["weight_decay"] = jnp.asarray(0.0, jnp.float32)
    before = params
    params, state = step(params, state)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0, jnp.float32)
    last, state = step(params, state)
    jax.tree.map(np.testing.assert_array_equal, last, params)
    assert not np.array_equal(before["w"], params["w"])
    assert next(traces) == 1
    assert state.inner_state.count == 4


def test_updates_may_be_made_without_the_rest_of_the_tree():
    # A wrapper of optax gives trees with holes, and arguments that only others know.
    tx = fj.adamw(0.1)
    params = {"w": jnp.ones(3), "hole": optax.MaskedNode(), "none": None}
    updates, state = tx.update(params, tx.init(params), params, value=1.0, grad=None)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert state.count == 1


def test_state_is_found_by_the_tree_functions_of_optax():
    params = params_of()
    tx = optax.chain(optax.clip(1.0), fj.adamw(0.1, max_norm=1.0, ema=0.9))
    state = tx.init(params)
    assert optax.tree.get(state, "count") == 0
    moved = optax.tree.map_params(tx, lambda x: x + 1, state)
    one = moved[1]
    assert one.arrays.keys() == {"exp_avg", "exp_avg_sq", "ema"}
    jax.tree.map(
        np.testing.assert_array_equal, one.arrays["exp_avg"], jax.tree.map(jnp.ones_like, params)
    )
    assert one.count == 0


# -- flax ------------------------------------------------------------------------------------------


def test_train_state_of_flax():
    train_state = pytest.importorskip("flax.training.train_state")

    def finally_of(tx):
        state = train_state.TrainState.create(apply_fn=None, params=params_of(), tx=tx)
        step = jax.jit(lambda s, t: s.apply_gradients(grads=grads_at(s.params, t)))
        for t in range(3):
            state = step(state, t)
        assert state.step == 3
        return state.params

    close([finally_of(fj.adamw(0.1))], [finally_of(optax.adamw(0.1))])


def test_frozen_dicts_of_flax():
    core = pytest.importorskip("flax.core")

    params = core.freeze(params_of())
    found, state = run(fj.adamw(0.1, max_norm=1.0), 2, params, apart=False)
    assert isinstance(found[0], core.FrozenDict)
    assert isinstance(state.arrays["exp_avg"], core.FrozenDict)
    expected, _ = run(fj.adamw(0.1, max_norm=1.0), 2, apart=False)
    close([one.unfreeze() for one in found], expected)


def test_linen_and_nnx_of_flax():
    nnx = pytest.importorskip("flax.nnx")

    def finally_of(tx):
        model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            x = jnp.ones((4, 3))
            grads = nnx.grad(lambda model: jnp.square(model(x) - 1).mean())(model)
            optimizer.update(model, grads)

        for _ in range(3):
            step(model, optimizer)
        return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))

    close([finally_of(fj.adamw(0.1))], [finally_of(optax.adamw(0.1))])


# -- schedules -------------------------------------------------------------------------------------

S = fs.schedules
SCHEDULES = {
    "cosine": {"lr": S.Cosine(0.1, total=20).warmup(5)},
    "linear": {"lr": S.Linear(0.1, total=25, end=0.01).warmup(3)},
    "decay": {"lr": 0.1, "weight_decay": S.Linear(0.3, total=25, end=0.0)},
    "betas": {"lr": S.Constant(0.1), "betas": (S.Linear(0.5, total=25, end=0.9), 0.99)},
    "momentum": {"lr": S.Cosine(0.1, total=20), "momentum": S.Linear(0.5, total=25, end=0.95)},
}


@pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])
@pytest.mark.parametrize("key", SCHEDULES)
def test_our_schedules_have_the_bits_of_the_numpy_layer(key, x64):
    hypers = SCHEDULES[key]
    name = "SGD" if "momentum" in hypers else "AdamW"
    with enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        theirs = {"w": np.linspace(0.5, 2, 40).astype(dtype)}
        params = jax.tree.map(jnp.array, theirs)
        opt = getattr(fs, name)(theirs, **hypers)
        tx = fj.by_name(name, **hypers)
        state = tx.init(params)
        step = jax.jit(tx.update_params)
        for t in range(30):
            grads = {"w": np.cos(np.arange(40) + t).astype(dtype)}
            params, state = step(grads, state, params)
            opt.step(grads)
            assert np.array_equal(params["w"], theirs["w"])
        assert step._cache_size() == 1


def test_a_skipped_step_is_none_of_a_schedules():
    tx = fj.sgd(S.Linear(0.4, total=4, end=0.0), skip_nonfinite=True)
    params = jnp.zeros(2)
    state = tx.init(params)
    step = jax.jit(tx.update_params)
    moved = []
    for value in (1.0, jnp.nan, 1.0, jnp.inf, 1.0):
        new, state = step(jnp.full(2, value), state, params)
        moved.append(float((params - new)[0]))
        params = new
    np.testing.assert_allclose(moved, [0.4, 0, 0.3, 0, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.cosine_decay_schedule(0.1, 10),
        lambda: optax.warmup_cosine_decay_schedule(0.0, 0.1, 3, 8, 0.01),
        lambda: optax.piecewise_constant_schedule(0.1, {2: 0.5, 4: 0.1}),
        lambda: lambda count: 0.1 / (1.0 + count),
    ],
)
def test_schedules_of_optax(make):
    with enable_x64(True):
        params = params_of(np.float64)
        # Of optax' counts, int32, schedules are float32; of ours, int64 here, they are float64.
        compare(fj.adamw(make()), optax.adamw(make()), 10, params, rtol=1e-7)
    given = {"weight_decay": optax.linear_schedule(0.5, 0.0, 5)}
    compare(fj.adamw(make(), **given), optax.adamw(make(), **given), 6)


def test_schedules_that_are_none():
    params = {"w": jnp.ones(3)}
    with pytest.raises(TypeError, match=r"lr must be a function of the step .* ReduceOnPlateau"):
        fj.adamw(S.ReduceOnPlateau(0.1))

    def broken(count):
        raise RuntimeError(f"no rate at {count}")

    tx = fj.adamw(broken)
    state = tx.init(params)
    with pytest.raises(RuntimeError, match="no rate at"):
        jax.jit(tx.update_params)(params, state, params)
    for value in (jnp.ones(2), "fast", None, jnp.asarray(True)):
        tx = fj.adamw(lambda count, value=value: value)
        with pytest.raises(TypeError, match="lr must be a number at each step, got "):
            jax.jit(tx.update_params)(params, state, params)
