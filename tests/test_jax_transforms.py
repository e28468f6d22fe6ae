"""Steps of fusedstep.jax under vmap, scan, grad, cond and shard_map."""

from __future__ import annotations

import functools
import os
import subprocess
import sys

import numpy as np
import pytest

from optional import optional

jax = optional("jax")
fj = optional("fusedstep.jax")

jnp = jax.numpy
State = fj.State

FULL = {"max_norm": 1.0, "clip_value": 0.3, "skip_nonfinite": True, "ema": 0.9}
SHAPES = {"w": (9, 5), "b": (11,), "none": (0, 2), "s": ()}


def tree(seed, batch=(), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: jax.random.normal(key, batch + shape, dtype)
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def member(batched, *index):
    return jax.tree.map(lambda x: x[index], batched)


def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def plain(pair):
    return tuple(pair)


def stepper(tx):
    return lambda g, s, p: plain(tx.update_params(g, s, p))


# -- vmap ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        FULL,
        {"mask": {"w": True, "b": False, "none": True, "s": False}},
        {"state_dtype": "q8", "seed": 9},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_members_of_an_ensemble_step_as_if_alone(kwargs, dtype):
    tx = fj.adamw(0.1, weight_decay=0.2, **kwargs)
    step, size = stepper(tx), 3
    params = tree(0, (size,), dtype)
    grads = [tree(1 + t, (size,), "float16") for t in range(3)]
    if "skip_nonfinite" in kwargs:  # one member skips a step
        grads[1]["b"] = grads[1]["b"].at[1, 4].set(jnp.nan)

    @jax.jit
    def together(params, grads):
        state = jax.vmap(tx.init)(params)
        for g in grads:
            params, state = jax.vmap(step)(g, state, params)
        return params, state

    @jax.jit
    def alone(params, grads):
        state = tx.init(params)
        for g in grads:
            params, state = step(g, state, params)
        return params, state

    found = together(params, grads)
    for i in range(size):
        equal(member(found, i), alone(member(params, i), member(grads, i)))
    if "skip_nonfinite" in kwargs:
        assert found[1].count.tolist() == [3, 2, 3]


@pytest.mark.parametrize("name", ["AdamW", "NAdam"])
@pytest.mark.parametrize("first", [0, 1], ids=["first member", "second member"])
def test_members_that_skip_their_first_step(first, name):
    # Their average has not begun when the others' has, nor what NAdam carries; in optax' form they
    # differ by nothing.
    mask = {"w": True, "b": False, "none": True, "s": False}
    tx = fj.by_name(name, lr=0.1, weight_decay=0.1, mask=mask, **FULL)
    params, grads = tree(0, (2,)), [tree(1, (2,)), tree(2, (2,))]
    grads[0]["s"] = grads[0]["s"].at[first].set(jnp.nan)

    def steps(form):
        def all_of(params, grads):
            state, made = tx.init(params), []
            for g in grads:
                found, state = form(g, state, params)
                made.append(found)
            return made, state

        return all_of

    for form in (stepper(tx), tx.update):
        found = jax.jit(jax.vmap(steps(form)))(params, grads)
        alone = jax.jit(steps(form))
        for i in range(2):
            equal(member(found, i), alone(member(params, i), member(grads, i)))
        assert found[1].count.tolist() == ([1, 2] if first == 0 else [2, 1])
    assert not found[0][0]["w"][first].any()
    assert found[0][0]["w"][1 - first].all()


def test_axes_that_are_batched_and_not():
    tx = fj.nadam(0.1, max_norm=1.0)
    step, size = stepper(tx), 3
    params, grads = tree(0), tree(1, (size,))
    state = tx.init(params)
    many, states = tree(2, (size,)), jax.vmap(tx.init)(tree(2, (size,)))
    one = jax.jit(step)
    last = jax.tree.map(lambda x: jnp.moveaxis(x, 0, -1), grads)

    @jax.jit
    def all_of(grads, last, many, states):
        return (
            jax.vmap(step, in_axes=(0, None, None))(grads, state, params),
            jax.vmap(step, in_axes=(0, None, 0))(grads, state, many),
            jax.vmap(step, in_axes=(None, 0, 0))(tree(1), states, many),
            jax.vmap(step, in_axes=(-1, None, None), out_axes=0)(last, state, params),
            jax.vmap(step, in_axes=(0, State(None, None, 0, None), 0))(
                grads, states._replace(count=state.count, carry=state.carry, grad_norm=0.0), many
            ),
            jax.vmap(lambda c: step(tree(1), state._replace(count=c), params))(jnp.arange(size)),
        )

    found = all_of(grads, last, many, states)
    for i in range(size):
        g, p, s = member(grads, i), member(many, i), member(states, i)
        equal(member(found[0], i), one(g, state, params))
        equal(member(found[1], i), one(g, state, p))
        equal(member(found[2], i), one(tree(1), s, p))
        equal(member(found[3], i), one(g, state, params))
        equal(member(found[4], i), one(g, s, p))
        equal(member(found[5], i), one(tree(1), state._replace(count=i), params))


def test_vmap_of_vmap_and_of_nothing():
    tx = fj.adamw(0.1, **FULL)
    step = stepper(tx)
    params, grads = tree(0, (2, 3)), tree(1, (2, 3))
    grads["w"] = grads["w"].at[1, 2, 0].set(jnp.inf)
    init = jax.vmap(jax.vmap(tx.init))
    found = jax.jit(jax.vmap(jax.vmap(step)))(grads, init(params), params)
    turned = jax.vmap(jax.vmap(step), in_axes=1, out_axes=1)  # members in another order
    equal(jax.jit(turned)(grads, init(params), params), found)
    assert found[1].count.tolist() == [[1, 1, 1], [1, 1, 0]]
    one = jax.jit(step)
    for i in range(2):
        for k in range(3):
            p = member(params, i, k)
            expected = one(member(grads, i, k), tx.init(p), p)
            equal(member(found, i, k), expected)
    empty = tree(0, (0,))
    made, state = jax.jit(jax.vmap(step))(empty, jax.vmap(tx.init)(empty), empty)
    assert made["w"].shape == (0, 9, 5)
    assert state.count.shape == (0,)


def test_rates_of_an_ensemble():
    optax = pytest.importorskip("optax")
    tx = optax.inject_hyperparams(fj.adamw)(0.1, weight_decay=0.1)
    rates = jnp.array([0.0, 0.1, 0.3])
    params, grads = tree(0), tree(1)

    def one(rate):
        state = tx.init(params)
        state.hyperparams["learning_rate"] = rate
        return tx.update(grads, state, params)[0]

    found = jax.jit(jax.vmap(one))(rates)
    for i, rate in enumerate(rates):
        expected = fj.adamw(float(rate), weight_decay=0.1)
        expected = expected.update(grads, expected.init(params), params)[0]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
            member(found, i),
            expected,
        )


# -- control flow ----------------------------------------------------------------------------------


def test_scan_while_and_cond():
    tx = fj.adamw(0.1, **FULL)
    params, steps = tree(0), 5
    grads = [tree(1 + t) for t in range(steps)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *grads)
    step = jax.jit(stepper(tx))
    expected = params, tx.init(params)
    for g in grads:
        expected = step(g, *expected[::-1])

    @jax.jit
    def scanned(params, stacked):
        def body(carry, g):
            return tx.update_params(g, *carry[::-1]), None

        return jax.lax.scan(body, (params, tx.init(params)), stacked)[0]

    @jax.jit
    def looped(state, params, stacked):
        def body(t, carry):
            return tx.update_params(jax.tree.map(lambda x: x[t], stacked), *carry)[::-1]

        return jax.lax.fori_loop(0, steps, body, (state, params))[::-1]

    equal(scanned(params, stacked), expected)
    equal(looped(tx.init(params), params, stacked), expected)


def test_results_are_pairs_in_every_place():
    # What update_params returns may be given on as it is: as a branch's result, or to tree.map.
    tx = fj.adamw(0.1)
    params, grads = tree(0), tree(1)
    state = tx.init(params)
    expected = plain(jax.jit(tx.update_params)(grads, state, params))

    def chosen(on, grads, state, params):
        return jax.lax.cond(
            on, lambda: tx.update_params(grads, state, params), lambda: (params, state)
        )

    def masked(on, grads, state, params):
        grads = jax.tree.map(lambda g: 1 * g, grads)  # a program of more than the step
        made = tx.update_params(grads, state, params)
        return jax.tree.map(lambda a, b: jnp.where(on, a, b), made, (params, state))

    def whole(grads, params, state):
        made = tx.update_params(grads, state, params)
        jax.tree.map(lambda a, b: None, made, (params, state))
        return made

    for body in (chosen, masked):
        equal(plain(jax.jit(body)(True, grads, state, params)), expected)
        equal(plain(jax.jit(body)(False, grads, state, params)), (params, state))
    equal(plain(jax.jit(chosen)(True, grads, state, params)), expected)
    branch = lambda on, *args: jax.lax.cond(on, tx.update_params, lambda g, s, p: (p, s), *args)  # noqa: E731
    equal(jax.jit(branch)(True, grads, state, params), expected)
    many = jax.tree.map(lambda x: x[None], (grads, state, params))
    found = jax.jit(jax.vmap(tx.update_params, out_axes=(0, 0)))(*many)
    equal(member(found, 0), expected)
    equal(plain(jax.jit(whole)(grads, params, state)), expected)


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: jax.grad(f)(x),
        lambda f, x: jax.grad(jax.jit(f))(x),
        lambda f, x: jax.jit(jax.grad(f))(x),
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.jacrev(f)(x),
        lambda f, x: jax.jacfwd(f)(x),
        lambda f, x: jax.linearize(f, x),
        lambda f, x: jax.hessian(f)(x),
        lambda f, x: jax.vmap(jax.grad(f))(jax.tree.map(lambda x: x[None], x)),
        lambda f, x: jax.grad(jax.checkpoint(f))(x),
    ],
)
@pytest.mark.parametrize("given", ["grads", "state", "params"])
def test_derivatives_are_refused(derivative, given):
    tx = fj.adamw(0.1, max_norm=1.0)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)

    def f(x):
        g = x if given == "grads" else params
        s = state._replace(arrays={**state.arrays, "exp_avg": x}) if given == "state" else state
        return tx.update_params(g, s, x if given == "params" else params)[0]["w"].sum()

    with pytest.raises(TypeError, match=r"a step of fusedstep\.jax has no derivative: diff"):
        derivative(f, params)


def test_what_is_stopped_has_no_derivative():
    tx = fj.adamw(0.1)
    params = {"w": jnp.arange(3.0)}

    def loss(p):
        stopped = jax.lax.stop_gradient(p)
        made, _ = tx.update_params(stopped, tx.init(stopped), stopped)
        return (made["w"] * p["w"]).sum()

    made, _ = tx.update_params(params, tx.init(params), params)
    equal(jax.jit(jax.grad(loss))(params), made)


# -- several devices, which only a new process can have --------------------------------------------

DEVICES = """
import functools, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import fusedstep.jax as fj

devices = jax.devices()
assert len(devices) == 4
mesh = Mesh(np.array(devices), ("d",))
split, whole = NamedSharding(mesh, P("d")), NamedSharding(mesh, P())
rng = np.random.default_rng(0)
PARAMS = {k: jnp.asarray(rng.standard_normal(s), jnp.float32)
          for k, s in {"a": (8, 300), "b": (4,), "c": (16, 3)}.items()}
GRADS = [jax.tree.map(lambda x: jnp.cos(x + t), PARAMS) for t in range(3)]

def equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, found), expected)

def alone(tx, grads=GRADS):
    step = jax.jit(lambda g, s, p: tuple(tx.update_params(g, s, p)))
    params, state = PARAMS, tx.init(PARAMS)
    for g in grads:
        params, state = step(g, state, params)
    return jax.tree.map(np.asarray, (params, state))

def put(tree, sharding):  # copies, which may be donated
    return jax.tree.map(lambda x: jax.device_put(np.array(x), sharding), tree)

FULL = dict(max_norm=1.0, clip_value=0.3, skip_nonfinite=True, ema=0.9)

# Replicated parameters, gradients of a quarter of the batch on each device, averaged.
def data_parallel():
    for kwargs in ({}, FULL):
        tx = fj.adamw(0.1, **kwargs)
        batch = jnp.asarray(rng.integers(-8, 8, (8, 3)) / 4.0, jnp.float32)
        def loss(p, x):
            own = sum(jnp.mean(v * v) for v in p.values())
            return jnp.mean(x @ p["c"][:3].T @ jnp.ones(3)) + own
        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("d")),
                           out_specs=(P(), P()))
        def train(params, state, x):
            if hasattr(jax.lax, "pcast"):
                own = jax.lax.pcast(params, "d", to="varying")
            else:  # until JAX 0.8
                own = jax.lax.pvary(params, "d")
            grads = jax.lax.pmean(jax.grad(loss)(own, x), "d")
            return tuple(tx.update_params(grads, state, params))
        @jax.jit
        def reference(params, state, x):
            parts = [jax.grad(loss)(params, part) for part in jnp.split(x, 4)]
            grads = jax.tree.map(lambda *g: sum(g) / 4, *parts)
            return tuple(tx.update_params(grads, state, params))
        params, state = put((PARAMS, tx.init(PARAMS)), whole)
        p, s = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            params, state = train(params, state, batch)
            p, s = reference(p, s, batch)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
                     (params, state), (p, s))
        for leaf in jax.tree.leaves((params, state)):
            assert leaf.sharding.is_fully_replicated
            first, *others = [np.asarray(s.data) for s in leaf.addressable_shards]
            assert all(np.array_equal(first, o) for o in others)

# Each device has its part of all, as in ZeRO: the bits are those of the whole.
def sharded():
    for kwargs in ({}, dict(clip_value=0.3, ema=0.9), dict(state_dtype="bfloat16",
                   state_rounding="nearest")):
        tx = fj.adamw(0.1, **kwargs)
        specs = fj.State(P(), P(), P("d"), P())
        @jax.jit
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), specs, P("d")),
                           out_specs=(P("d"), specs))
        def step(g, s, p):
            return tx.update_params(g, s, p)
        params, state = put(PARAMS, split), tx.init(PARAMS)
        for g in GRADS:
            params, state = step(put(g, split), state, params)
        assert params["a"].sharding == split and state.arrays["exp_avg"]["a"].sharding == split
        donated = jax.jit(lambda p, s, g: step(g, s, p), donate_argnums=(0, 1))
        places = lambda tree: [part.data.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tree)
                               for part in leaf.addressable_shards]
        own = jax.tree.map(jnp.copy, (state, params))
        before = places((own[1], own[0].arrays))
        own_params, own_state = donated(own[1], own[0], put(GRADS[0], split))
        assert places((own_params, own_state.arrays)) == before
        equal((params, state), alone(tx))

# Some leaves in parts and others whole.
def mixed():
    tx = fj.adamw(0.1, clip_value=0.3, mask={"a": True, "b": False, "c": True})
    own = {"a": P("d"), "b": P(), "c": P("d")}
    specs = fj.State(P(), P(), {"exp_avg": own, "exp_avg_sq": own}, P())
    step = jax.jit(jax.shard_map(tx.update_params, mesh=mesh, in_specs=(own, specs, own),
                                 out_specs=(own, specs)))
    params, state = PARAMS, tx.init(PARAMS)
    for g in GRADS:
        params, state = step(g, state, params)
    equal((params, state), alone(tx))

# A rate that each device has of its own makes all vary.
def own_rates():
    import optax
    tx = optax.inject_hyperparams(fj.sgd)(0.1)
    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("d"), P()), out_specs=P("d"))
    def one(rate, params):
        state = tx.init(params)
        state.hyperparams["learning_rate"] = rate[0]
        updates, _ = tx.update(params, state, params)
        return jax.tree.map(lambda x: x[None], updates)
    rates = jnp.arange(4.0) / 8
    found = one(rates, PARAMS)
    for i in range(4):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-7),
                     jax.tree.map(lambda x: x[i], found),
                     jax.tree.map(lambda x: -rates[i] * x, PARAMS))

def refused():
    for kwargs in (dict(max_norm=1.0), dict(skip_nonfinite=True), dict(norms=True)):
        tx = fj.adamw(0.1, **kwargs)
        specs = fj.State(P(), P(), P("d"), P())
        step = jax.jit(jax.shard_map(tx.update_params, mesh=mesh, in_specs=(P("d"), specs, P("d")),
                                     out_specs=(P("d"), specs)))
        try:
            step(PARAMS, tx.init(PARAMS), PARAMS)
        except ValueError as error:
            assert "need gradients that all devices of a shard_map have whole, got ones that" \\
                   " vary over 'd'" in str(error), error
        else:
            raise AssertionError(kwargs)

# Without shard_map XLA gathers, and gives the bits of one device.
def gathered():
    for kwargs in ({}, FULL):
        tx = fj.adamw(0.1, **kwargs)
        for sharding in (split, whole):
            step = jax.jit(lambda g, s, p: tuple(tx.update_params(g, s, p)))
            params = put(PARAMS, sharding)
            state = jax.jit(tx.init)(params)
            for g in GRADS:
                params, state = step(put(g, sharding), state, params)
            equal((params, state), alone(tx))
    donating = jax.jit(tx.update_params, donate_argnums=(1, 2))
    params, state = put((PARAMS, tx.init(PARAMS)), whole)
    for g in GRADS:
        params, state = donating(put(g, whole), state, params)
    equal((params, state), alone(tx))

# Steps in a loop, whose carry has one type.
def scanned():
    tx = fj.adamw(0.1)
    specs = fj.State(P(), P(), P("d"), P())
    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "d"), specs, P("d")),
                       out_specs=(P("d"), specs))
    def steps(gs, s, p):
        body = lambda carry, g: (tx.update_params(g, carry[1], carry[0]), None)
        return jax.lax.scan(body, (p, s), gs)[0]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)
    equal(steps(stacked, tx.init(PARAMS), PARAMS), alone(tx))

# Gradients as they are on each device, with parts of its own of the clipping: an ensemble.
def ensemble():
    tx = fj.adamw(0.1, **FULL)
    many = jax.tree.map(lambda x: jnp.stack([x * k for k in range(1, 9)]), PARAMS)
    step = jax.vmap(lambda g, s, p: tuple(tx.update_params(g, s, p)))
    state = jax.vmap(tx.init)(many)
    found = jax.jit(step)(many, state, many)
    split_step = jax.jit(step, in_shardings=split, out_shardings=split)
    equal(split_step(put(many, split), put(state, split), put(many, split)),
          jax.tree.map(np.asarray, found))

# A device that is not the first.
def another():
    tx = fj.adamw(0.1, **FULL)
    step = jax.jit(tx.update_params)
    params, state = jax.device_put((PARAMS, tx.init(PARAMS)), devices[2])
    for g in GRADS:
        params, state = step(jax.device_put(g, devices[2]), state, params)
    assert params["a"].devices() == {devices[2]}
    equal((params, state), alone(tx))

for check in (data_parallel, sharded, mixed, own_rates, refused, gathered, scanned,
              ensemble, another):
    try:
        check()
        print(check.__name__, "ok", flush=True)
    except Exception as error:
        import traceback
        traceback.print_exc()
        print(check.__name__, "failed", flush=True)
"""


@pytest.fixture(scope="module")
def on_four_devices():
    flags = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [sys.executable, "-c", DEVICES],
        env={**os.environ, **flags},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return run.stdout.splitlines(), run.stderr


@pytest.mark.parametrize(
    "check",
    [
        "data_parallel",
        "sharded",
        "mixed",
        "own_rates",
        "refused",
        "gathered",
        "scanned",
        "ensemble",
        "another",
    ],
)
def test_several_devices(on_four_devices, check):
    lines, errors = on_four_devices
    assert f"{check} ok" in lines, errors


def test_what_is_added_needs_no_memory_of_its_own():
    tx, n = fj.adamw(0.1), 1 << 16

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + u, params, updates), state

    params = {"a": jnp.ones(n), "b": jnp.ones(n)}
    memory = train.lower(params, tx.init(params)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.1 * n * 4  # the gradients, where updates lie after them
