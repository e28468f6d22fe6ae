"""What a step does beside the update: averages, copies, zeros, clipping by value."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import fusedstep as fs
from cases import CASES
from fusedstep._arrays import as_dtype

SHAPES = {"w": (700, 3), "b": (5,), "none": (33,)}
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def arrays(seed, dtype="float32", scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: (scale * rng.standard_normal(s)).astype(as_dtype(dtype)) for k, s in SHAPES.items()}


def grads_of(seed, dtype="float32"):
    return {**arrays(seed, dtype), "none": None}


def bits(array):
    return None if array is None else np.asarray(array).tobytes()


def contents(found):
    return {key: bits(a) for key, a in found.items()}


def all_state(opt):
    return {key: contents(entry) for key, entry in opt.state.items()}


def average(a, p, decay, dtype):
    """The reference, a + (1 - decay) * (p - a), each operation rounded once."""
    dtype = np.dtype(dtype)
    if decay <= 0.5:  # then p - decay * (p - a)
        weight, base = dtype.type(-decay), p
    else:
        weight, base = dtype.type(1 - decay), a
    wide = np.longdouble if dtype == np.float64 else np.float64  # holds the product exactly
    return (wide(weight) * (p - a).astype(wide) + base.astype(wide)).astype(dtype)


# float64 has no wider type in NumPy that holds a product, so its fma can be off by an ulp.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "hypers"), [(name, sets[1]) for name, sets in CASES.items()])
def test_pieces_are_those_of_separate_passes(name, hypers, dtype):
    """All at once against a plain step, and NumPy's average, copy, zeros and clipping."""
    together, apart = arrays(0, dtype), arrays(0, dtype)
    opt, plain = (getattr(fs, name)(p, **hypers) for p in (together, apart))
    shadow = {k: np.empty(s, as_dtype("bfloat16")) for k, s in SHAPES.items()}
    shadow |= {"b": None, "none": np.empty(SHAPES["none"], np.float16)}
    compute = "float64" if dtype == "float64" else "float32"
    decays, averages = [0.9, 0.3, 0.99], {}
    for step, decay in enumerate(decays):
        grads = grads_of(10 + step, "float32")
        clipped = {
            k: None if g is None else np.clip(g.astype(compute), -0.5, 0.5)
            for k, g in grads.items()
        }
        opt.step(grads, ema=lambda n: decays[n], shadow=shadow, zero_grad=True, clip_value=0.5)
        plain.step(clipped)
        assert contents(together) == contents(apart)
        for key, p in apart.items():
            wide = p.astype(compute)
            averages[key] = wide if step == 0 else average(averages[key], wide, decay, compute)
            np.testing.assert_allclose(
                opt.state[key]["ema"], averages[key], rtol=0 if compute == "float32" else 1e-15
            )
            if shadow[key] is not None:
                expected = wide.astype(np.float32).astype(shadow[key].dtype)
                assert bits(shadow[key]) == bits(expected)
        assert not any(g.any() for g in grads.values() if g is not None)
    assert opt.state["none"].keys() - plain.state["none"].keys() == {"ema"}


def test_clip_value_comes_after_max_norm_and_keeps_nan():
    w, twin = np.zeros(4, np.float32), np.zeros(4, np.float32)
    grad = np.array([6, -8, 0.5, 0], np.float32)
    opt = fs.SGD(w, lr=1.0)
    opt.step(grad, max_norm=5.0, loss_scale=2.0, clip_value=2.0)
    k = 0.5 * min(1.0, 5.0 / (float(np.sqrt(np.sum((grad / 2).astype("f8") ** 2))) + 1e-6))
    fs.SGD(twin, lr=1.0).step(np.clip(grad * np.float32(k), -2, 2))
    assert bits(w) == bits(twin)
    assert opt.grad_norm == pytest.approx(np.linalg.norm(grad / 2))  # of the gradients before it
    opt.step(np.array([np.nan, np.inf, -np.inf, 1], np.float32), clip_value=0.25)
    np.testing.assert_array_equal(w - twin, np.array([np.nan, -0.25, 0.25, -0.25], np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_results_do_not_depend_on_threads_sets_or_layout(dtype):
    def run(flat, isa, threads):
        fs.set_isa(isa)
        fs.set_num_threads(threads)
        params = arrays(0, dtype)
        params["w"] = np.tile(params["w"], (80, 1))  # enough for two threads
        params = fs.FlatBuffer.pack(params) if flat else params
        shadow = {k: np.empty(p.shape, np.float16) for k, p in params.items()}
        how = {"rounding": "stochastic", "ema_dtype": "bfloat16"} if dtype == "bfloat16" else {}
        opt = fs.AdamW(params, state_dtype="q8", seed=7, **how)
        for step in range(3):
            grads = {k: np.full(p.shape, 0.1 * (step + 1), np.float32) for k, p in params.items()}
            grads = fs.FlatBuffer.pack(grads) if flat else grads
            opt.step(grads, ema=0.9, shadow=shadow, zero_grad=True, clip_value=0.25)
        return contents(params), contents(shadow), all_state(opt)

    isa, threads = fs.isa(), fs.num_threads()
    try:
        expected = run(False, "scalar", 1)
        for one in fs.usable_isas():
            assert run(True, one, 2) == expected
        assert run(False, isa, 2) == expected
    finally:
        fs.set_isa(isa)
        fs.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ema_dtype", [None, "float32", "float64", "bfloat16", "parameter"])
def test_ema_stands_in_the_parameters_place_and_leaves_all_as_it_was(dtype, ema_dtype):
    params = arrays(1, dtype)
    if dtype == "float16" and ema_dtype == "parameter":
        with pytest.raises(ValueError, match=r"ema_dtype must be wide enough .* got 'parameter'"):
            fs.SGD(params, ema_dtype=ema_dtype)
        return
    opt = fs.SGD(params, lr=0.1, ema_dtype=ema_dtype)
    with pytest.raises(ValueError, match="ema must follow a step with ema=, got no average"):
        opt.ema().__enter__()
    for seed in range(3):
        opt.step(grads_of(seed), ema=0.7)
    before, state = contents(params), all_state(opt)
    expected = {k: entry["ema"].astype(np.float64) for k, entry in opt.state.items()}
    with pytest.raises(KeyError), opt.ema():  # noqa: PT012 - what is inside it is the test
        for key, p in params.items():
            eps = {"float32": 2**-24, "float64": 0}.get(dtype, 2**-8)
            np.testing.assert_allclose(p.astype(np.float64), expected[key], rtol=eps, atol=1e-7)
        for refused in (
            lambda: opt.step(grads_of(0)),
            opt.state_dict,
            lambda: opt.load_state_dict({}),
            lambda: copy.copy(opt),
            lambda: pickle.dumps(opt),
            opt.masters,
            lambda: opt.ema().__enter__(),
        ):
            with pytest.raises(RuntimeError, match="after ema, not inside it"):
                refused()
        raise KeyError
    assert (contents(params), all_state(opt)) == (before, state)
    opt.step(grads_of(3), ema=0.7)


def test_nan_and_extremes_survive_the_swap():
    bf16 = as_dtype("bfloat16")
    params = np.array([np.nan, np.inf, -np.inf, 3e38, -0.0, 1e-40, 1.0], bf16)
    opt = fs.SGD(params, lr=0.0)
    opt.step(np.zeros(7, np.float32), ema=0.5)
    ema = opt.state[0]["ema"]
    ema[...] = np.array([-0.0, 3.4e38, np.nan, 1e-44, np.inf, 1.0, np.pi], np.float32)
    before = params.copy(), ema.copy()
    with opt.ema():
        np.testing.assert_allclose(params.astype("f4")[5:], before[1][5:], rtol=2**-8)
        assert np.isnan(params[2])
    np.testing.assert_array_equal(params.astype("f4"), before[0].astype("f4"))
    np.testing.assert_array_equal(ema, before[1])
    assert bits(params[1:]) == bits(before[0][1:])


def test_an_average_in_bfloat16_does_not_stall():
    w = np.ones(4096, np.float32)
    opt = fs.SGD(w, lr=1.0, ema_dtype="bfloat16")
    opt.step(np.zeros_like(w), ema=0.999)
    w[...] = 1.25  # an update of 0.001 * 0.25 is a thirtieth of an ulp
    for _ in range(500):
        opt.step(np.zeros_like(w), ema=0.999)
    mean = opt.state[0]["ema"].astype(np.float64).mean()
    # The standard error of the mean is at most 500^0.5 * ulp/2 / 4096^0.5 = 0.0014: four of them.
    assert mean == pytest.approx(1.25 - 0.25 * 0.999**500, abs=0.0056)


def test_a_skipped_step_changes_nothing():
    params, grads = arrays(0), grads_of(1)
    shadow = {k: np.zeros(s, np.float16) for k, s in SHAPES.items()}
    opt = fs.AdamW(params)
    grads["b"][0] = np.inf
    before = contents(params), contents(shadow), contents(grads), all_state(opt)
    report = opt.step(
        grads, ema=0.9, shadow=shadow, zero_grad=True, clip_value=1.0, skip_nonfinite=True
    )
    assert report.elements == 0
    assert before == (contents(params), contents(shadow), contents(grads), all_state(opt))
    grads["b"][0] = 1
    opt.step(grads, ema=lambda n: [0.9][n])  # that average was none
    assert bits(opt.state["w"]["ema"]) == bits(params["w"])


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"ema": 1.5}, ValueError, r"ema must be in \[0, 1\], got 1.5"),
        ({"ema": "x"}, TypeError, "ema must be a number"),
        ({"ema": lambda n: -1.0}, ValueError, r"ema must be in \[0, 1\], got -1.0"),
        ({"clip_value": 0.0}, ValueError, "clip_value must be > 0, got 0.0"),
        ({"clip_value": float("nan")}, ValueError, "clip_value must be > 0, got nan"),
        ({"zero_grad": 1}, TypeError, "zero_grad must be True or False, got 1"),
        ({"shadow": [None]}, ValueError, r"shadow must have one entry per parameter \(3\), got 1"),
        ({"shadow": {"w": None}}, ValueError, "shadow must have the names of params, got missing"),
        ({"shadow": [np.zeros(3, "f4"), None, None]}, ValueError, r"shadow\[w\] must have shape"),
        (
            {"shadow": [np.zeros((700, 3), int), None, None]},
            TypeError,
            r"shadow\[w\] must be float",
        ),
    ],
)
def test_bad_input_names_argument_rule_and_value(keywords, error, message):
    params = arrays(0)
    opt = fs.AdamW(params)
    grads = grads_of(1)
    before = contents(params), contents(grads), all_state(opt)
    with pytest.raises(error, match=message):
        opt.step(grads, **keywords)
    assert before == (contents(params), contents(grads), all_state(opt))
    assert opt.steps == 0


def test_what_a_step_writes_may_not_overlap():
    params, grads = arrays(0), grads_of(1)
    opt = fs.SGD(params, momentum=0.9)
    opt.step(grads, ema=0.5)
    fixed = np.zeros((700, 3), np.float32)
    fixed.flags.writeable = False
    cases = [
        (
            {"shadow": {**params, "b": None, "none": None}},
            r"shadow\[w\] must not share memory with",
        ),
        ({"shadow": [opt.state["w"]["ema"], None, None]}, r"shadow\[w\] must not share .*'ema'"),
        ({"shadow": [grads["w"], None, None]}, r"grads\[w\] must not share memory with shadow"),
        ({"shadow": [fixed, None, None]}, r"shadow\[w\] must be writable, got a read-only array"),
    ]
    flat = np.zeros(2100 + 4, np.float32)
    shared = {"w": flat[4:].reshape(700, 3), "b": flat[:5], "none": None}
    constant = {**grads, "w": fixed}
    before = contents(params), all_state(opt)
    for keywords, message in cases:
        with pytest.raises(ValueError, match=message):
            opt.step(grads, **keywords)
    with pytest.raises(ValueError, match=r"must not share memory with grads\[.\]"):
        opt.step(shared, zero_grad=True)
    with pytest.raises(ValueError, match=r"grads\[w\] must be writable, got a read-only array"):
        opt.step(constant, zero_grad=True)
    assert before == (contents(params), all_state(opt))
    opt.step(shared)  # read only, they may
    opt.step(constant)


@pytest.mark.parametrize("flat", [False, True])
def test_flat_gradients_are_zeroed_and_flat_shadows_written(flat):
    params = fs.FlatBuffer.pack(arrays(0))
    grads, shadow = params.zeros_like(), params.zeros_like("float16")
    for key in grads:
        grads[key] = 1.0
    opt = fs.SGD(params if flat else dict(params), lr=0.5)
    opt.step(grads, shadow=shadow, zero_grad=True)
    assert not grads.flat.any()
    assert bits(shadow["w"]) == bits(params["w"].astype(np.float16))


@pytest.mark.parametrize("resume", ["state_dict", "pickle", "deepcopy"])
def test_averages_go_on_after_a_checkpoint(resume):
    def decay(n):
        return min(0.9, (1 + n) / (10 + n))

    params = arrays(0, "bfloat16")
    how = {"rounding": "stochastic", "ema_dtype": "bfloat16", "state_dtype": "bfloat16", "seed": 3}
    opt = fs.SGD(params, lr=1e-3, momentum=0.9, **how)
    for seed in range(3):
        opt.step(grads_of(seed), ema=decay)
    if resume == "state_dict":
        twin_params = {k: p.copy() for k, p in params.items()}
        twin = fs.SGD(twin_params, lr=1e-3, momentum=0.9, **how)
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        del decay  # a local function cannot be pickled, and it is no part of the optimizer
        twin = pickle.loads(pickle.dumps(opt)) if resume == "pickle" else copy.deepcopy(opt)
        twin_params = twin.params
    for one in (opt, twin):
        for seed in range(3, 6):
            one.step(grads_of(seed), ema=lambda n: min(0.9, (1 + n) / (10 + n)))
    assert contents(params) == contents(twin_params)
    assert all_state(opt) == all_state(twin)
    assert "ema" in opt.state_dict()["state"][2]  # of a parameter that never had a gradient


def test_an_average_goes_on_without_gradients():
    w = np.ones(4096, np.float32)
    opt = fs.SGD(w, lr=1.0, ema_dtype="bfloat16")
    opt.step(np.zeros_like(w), ema=0.999)
    w[...] = 1.25
    for _ in range(500):  # no count of updates says which of these it is
        opt.step([None], ema=0.999)
    mean = opt.state[0]["ema"].astype(np.float64).mean()
    assert mean == pytest.approx(1.25 - 0.25 * 0.999**500, abs=0.0056)  # as above
