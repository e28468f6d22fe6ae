"""One step of every optimizer against its equation (reference.py), on the scalar set."""

import numpy as np
import pytest

import fusedstep as fs
from cases import CASES, defaults, each_case, each_pair, load, make, mean_decay
from reference import RULES, carried, step, ulp

N = 4099  # whole registers of every set, and a tail

# Where long double is double (macOS on Arm) the reference itself is off by as much as it allows.
FLOAT64_BOUNDS = 1 if np.finfo(np.longdouble).nmant > 52 else 2


def draw(name, hypers, t, param, grad):
    """Random parameters, gradients and states, as arrays of their storage types.

    The bounds of this file are in units of the result, so they hold only where sums do not cancel.
    Gradients and parameters are between 1/2 and 2, of any sign. A mean whose sign is not the
    gradient's is far larger, or for a small decay far smaller, than its share of the gradient, so
    that neither the new mean nor what a rule adds to it cancels. Centered RMSprop's mean square is
    well above the square of its mean. States that take up a quotient are large beside it, as the
    quotient alone is off by some ulp: RMSprop's momentum, and Adadelta's acc_delta by way of its
    square_avg.
    """
    rng = np.random.default_rng([*name.encode(), t])

    def near():
        return rng.uniform(0.5, 2, N)

    def signs():
        return rng.choice([-1.0, 1.0], N)

    h = {**defaults(name), **hypers}
    state_type = "float64" if param == "float64" else "float32"
    p, g = (signs() * near()).astype(param), (signs() * near()).astype(grad)
    decay = mean_decay(name, h)
    up = np.sign(g.astype("f8")) * (-1 if h["maximize"] else 1)
    mean = up * near() * rng.choice([1.0, -32.0 if decay >= 0.5 else -1 / 32], N)

    opt = make(name, [p.copy()], hypers)
    states = {}
    for key in opt.state[0]:
        value = near() ** 2 if key in opt._spec.positive else mean
        if key == "momentum_buffer" and name == "RMSprop":
            value = signs() * 32 * near()
        elif key == "step_size":
            value = 10 ** rng.uniform(-2.5, 2.5, N)
        if key == "square_avg" and name == "Adadelta":
            value = 16 * value
        if key == "square_avg" and h.get("centered"):
            value = value + 4 * mean**2
        states[key] = value.astype(state_type)
    if name == "Rprop":
        states["prev"][::7] = 0
    if name == "SGD" and t == 1:
        states = {}  # the buffer begins with the gradient
    return p, g, states


def run(name, hypers, t, param, grad):
    """One step of the library and of the reference from the same inputs."""
    p, g, before = draw(name, hypers, t, param, grad)
    numbers = carried(name, t, hypers)
    fs.set_isa("scalar")
    after = p.copy()
    opt = make(name, [after], hypers)
    load(opt, t, [{**before, **numbers}])
    opt.step([g])

    exact = np.longdouble if param == "float64" else np.float64
    wide = {key: value.astype(exact) for key, value in before.items()}
    g = g.astype(param if param == "float64" else np.float32)  # as it is read, to compute in
    expected, expected_state = step(
        name, p.astype(exact), g.astype(exact), {**wide, **numbers}, t, hypers
    )
    entry = opt.state_dict()["state"].get(0, {})
    assert set(entry) - {"step"} == set(expected_state)
    for key, want in expected_state.items():
        got = entry[key]
        if isinstance(got, float):
            assert abs(got - want) <= 2 * ulp(np.float64(want), "float64"), key
            continue
        size = np.maximum(np.abs(wide.get(key, 0)), np.abs(want))
        allowed = 2 * ulp(size, got.dtype)
        if param == "float64":
            allowed *= FLOAT64_BOUNDS
        if hypers.get("amsgrad_corrected") and key == "max_exp_avg_sq":
            allowed *= 1.5  # the mean's, and two roundings more: 1/(1 - beta2^t) and the product
        if key == "ax":  # a copy of the parameter, or an average with it
            allowed = np.maximum(allowed, bound(p.astype(exact), expected, got.dtype))
        error = np.abs(got.astype(exact) - want) / allowed
        assert error.max() <= 1, f"{key}: {error.max()} of the bound at {error.argmax()}"
    if opt._spec.counts_steps:
        assert entry["step"] == t
    return p.astype(exact), after.astype(exact), expected


def bound(p, expected, dtype):
    """The error that a parameter may have: 2 ulp of itself and 4 of its update."""
    size = np.maximum(np.abs(p), np.abs(expected))
    allowed = 2 * ulp(size, dtype) + 4 * ulp(expected - p, dtype)
    return allowed * (FLOAT64_BOUNDS if dtype == "float64" else 1)


@pytest.mark.parametrize("t", [1, 2, 7, 1000])
@each_pair(lambda param, grad: param in ("float32", "float64"))
@each_case()
def test_step_matches_equation(name, hypers, param, grad, t):
    p, got, expected = run(name, hypers, t, param, grad)
    error = np.abs(got - expected) / bound(p, expected, param)
    assert error.max() <= 1, f"{error.max()} of the bound at {error.argmax()}"


@pytest.mark.parametrize("t", [1, 7])
@each_pair(lambda param, grad: param in ("bfloat16", "float16"))
@each_case()
def test_step_rounds_to_16_bits_once(name, hypers, param, grad, t):
    # Computed in float32 and rounded once: half an ulp beyond what float32 may be off by.
    p, got, expected = run(name, hypers, t, param, grad)
    slack = bound(p, expected, "float32")
    error = np.abs(got - expected) / (slack + 0.5 * ulp(np.abs(expected) + slack, param))
    assert error.max() <= 1, f"{error.max()} of the bound at {error.argmax()}"


@each_case()
def test_step_sequence_matches_equation(name, hypers):
    # From nothing, with the carried numbers and counts of the library itself; float64, so that the
    # errors of ten steps stay far below any mistake.
    fs.set_isa("scalar")
    rng = np.random.default_rng(5)
    p = rng.choice([-1.0, 1.0], 64) * rng.uniform(0.5, 2, 64)
    expected, state = p.copy(), {}
    opt = make(name, [p], hypers)
    for key, value in opt.state[0].items():
        if name != "SGD":  # its buffer begins with the first gradient
            state[key] = value.copy()
    for t in range(1, 11):
        g = rng.normal(size=64)
        opt.step([g])
        expected, state = step(name, expected, g, state, t, hypers)
    # 1e-11: ten steps of a few 1e-16, each magnified by up to 1/(1 - beta2) = 1000
    np.testing.assert_allclose(p, expected, rtol=1e-11, atol=1e-11)
    for key, value in opt.state[0].items():
        np.testing.assert_allclose(value, state[key], rtol=1e-11, atol=1e-11, err_msg=key)


def test_cases_cover_every_optimizer():
    classes = {
        name
        for name in fs.__all__
        if isinstance(getattr(fs, name), type)
        and issubclass(getattr(fs, name), fs.Optimizer)
        and name != "Optimizer"
    }
    assert classes == set(CASES) == set(RULES)
    for name in classes:
        assert {} in CASES[name], f"{name} lacks its defaults"


@pytest.mark.parametrize("name", CASES)
def test_cases_leave_no_hyper_at_its_default(name):
    for key, default in defaults(name).items():
        values = [hypers[key] for hypers in CASES[name] if key in hypers]
        if isinstance(default, tuple):
            for i, half in enumerate(default):
                assert any(value[i] != half for value in values), f"{key}[{i}]"
        else:
            assert any(value != default for value in values), key
    if "weight_decay" in defaults(name):
        assert any(h.get("weight_decay") and h.get("maximize") for h in CASES[name])
