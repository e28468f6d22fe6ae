"""Values that break optimizers: denormals, infinities, NaN, overflow, ties, huge counts."""

import copy
import functools
import math
from decimal import Decimal, localcontext

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedstep as fs
from cases import CASES, PAIRS, each_case, load, make
from fusedstep import _core
from fusedstep._arrays import as_dtype
from optional import optional
from reference import step

torch = optional("torch")

N = 19  # a register of every set and a tail
STREAMS = 2 + max(len(getattr(fs, name)._spec.states) for name in CASES)  # parameter, gradient


def floats(width):
    """Any float of a width, bit pattern by bit pattern, and often one of the notorious ones."""
    tiny = {32: 1e-45, 64: 5e-324}[width]
    notorious = [0.0, -0.0, tiny, -tiny, 1.0, -1.0, math.inf, -math.inf, math.nan]
    return st.one_of(st.floats(width=width), st.sampled_from(notorious))


def rows(width):
    row = st.lists(floats(width), min_size=N, max_size=N)
    return st.lists(row, min_size=STREAMS, max_size=STREAMS)


def same_numbers(a, b):
    """The same bits; of NaN only that it is one."""
    with np.errstate(invalid="ignore"):  # ml_dtypes converts, and a signalling NaN signals then
        nan, nan_too = np.isnan(a), np.isnan(b)
    if not np.array_equal(nan, nan_too):
        return False
    unsigned = f"u{a.itemsize}"
    return np.array_equal(a.view(unsigned)[~nan], b.view(unsigned)[~nan])


def two_steps(name, hypers, p, g, states):
    """Updates number 7 and 8, from the states given; the parameter and the states after them."""
    p = p.copy()
    opt = make(name, [p], hypers)
    numbers = {"NAdam": {"mu_product": 0.1}, "ASGD": {"eta": 0.1, "mu": 0.5}}.get(name, {})
    values = dict(zip(opt.state[0], states, strict=False))
    load(opt, 7, [{**values, **numbers}])
    for _ in range(2):
        opt.step([g])
    return {"p": p, **opt.state[0]}


def casted(values, dtype):
    with np.errstate(over="ignore", invalid="ignore"):  # beyond the type's range is what we want
        return np.asarray(values).astype(as_dtype(dtype))


def check_sets_agree(name, hypers, pairs, data):
    for param, grad in pairs:
        state_type = "float64" if param == "float64" else "float32"
        p, g = casted(data[0], param), casted(data[1], grad)
        states = [casted(row, state_type) for row in data[2:]]
        fs.set_isa("scalar")
        want = two_steps(name, hypers, p, g, states)
        for isa in set(fs.usable_isas()) - {"scalar"}:
            fs.set_isa(isa)
            got = two_steps(name, hypers, p, g, states)
            for key, value in want.items():
                assert same_numbers(got[key], value), f"{key} on {isa}, {hypers}, {param}/{grad}"


# The database would leave files in the working tree; the machine's speed is not the subject.
anything = settings(max_examples=25, deadline=None, database=None)


@pytest.mark.parametrize("name", CASES)
def test_any_float32_gives_the_same_bits_on_every_set(name):
    @anything
    @given(rows(32))
    def check(data):
        for hypers in CASES[name]:
            check_sets_agree(name, hypers, [pair for pair in PAIRS if pair[0] != "float64"], data)

    check()


@pytest.mark.parametrize("name", CASES)
def test_any_float64_gives_the_same_bits_on_every_set(name):
    @anything
    @given(rows(64))
    def check(data):
        for hypers in CASES[name]:
            check_sets_agree(name, hypers, [("float64", "float64")], data)

    check()


@each_case()
def test_notorious_values_meet_in_every_combination(name, hypers):
    # The parameter and the gradient in all combinations, the states in three arrangements.
    values = [0.0, -0.0, 1e-45, -1e-40, 1.0, -2.0, 3e38, -3e38, math.inf, -math.inf, math.nan]
    p, g = (grid.ravel() for grid in np.meshgrid(values, values))
    for shift in (0, 1, 5):
        states = [np.roll(p, shift), np.roll(np.abs(g), 2 * shift), np.roll(g, shift)]
        check_sets_agree(name, hypers, PAIRS, [p, g, *states])


def sixteen_bit(dtype):
    return np.arange(1 << 16, dtype=np.uint16).view(as_dtype(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_patterns_survive_load_and_store(dtype, isa):
    p = sixteen_bit(dtype).copy()
    fs.SGD([p], lr=0.0).step([np.zeros_like(p)])
    assert same_numbers(p, sixteen_bit(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradient_patterns_load_exactly(dtype, isa):
    g = sixteen_bit(dtype)
    p = np.full(g.size, -0.0, np.float32)  # -0 - (-x) is x, also for both zeros
    fs.SGD([p], lr=1.0, maximize=True).step([g])
    assert same_numbers(p, g.astype(np.float32))


def near_ties(dtype):
    """float32 values at, just below and just above the middle of a 16-bit type's neighbours."""
    with np.errstate(invalid="ignore"):  # of signalling NaN
        values = sixteen_bit(dtype).astype(np.float64)
    low = np.sort(values[np.isfinite(values)])
    middle = (low[1:] + low[:-1]) / 2
    top = low[-1] + (low[-1] - low[-2]) / 2  # from here on to infinity
    exact = np.concatenate([low, middle, [top, -top]]).astype(np.float32)
    infinity = np.float32(np.inf)
    return np.concatenate([exact, np.nextafter(exact, infinity), np.nextafter(exact, -infinity)])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_store_rounds_to_nearest_even(dtype, isa):
    # momentum=1 with a gradient of -0 keeps the buffer, lr=1 subtracts it from -0: the parameter
    # becomes any float32 we like, rounded once.
    rng = np.random.default_rng(3)
    anywhere = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([near_ties(dtype), anywhere])
    p = np.full(x.size, -0.0, as_dtype(dtype))
    opt = fs.SGD([p], lr=1.0, momentum=1.0)
    load(opt, 2, [{"momentum_buffer": -x}])
    opt.step([p.copy()])
    assert same_numbers(p, casted(x, dtype))


@each_case()
@pytest.mark.parametrize("n", [N, 200_003])  # from 2^17 elements on the pool takes part
def test_flushed_denormals_change_nothing(name, hypers, n, isa):
    fs.set_num_threads(2)
    rng = np.random.default_rng(2)
    p, g, *states = (
        (rng.normal(size=n) * 10.0 ** rng.integers(-44, -30, n)).astype(np.float32)
        for _ in range(STREAMS)
    )
    states = [np.abs(state) for state in states]
    want = two_steps(name, hypers, p, g, states)
    assert torch.set_flush_denormal(True)
    try:
        got = two_steps(name, hypers, p, g, states)
        # The caller's mode is as it was: its own arithmetic still flushes.
        flushes = float(torch.tensor(1e-38) * torch.tensor(1e-3)) == 0
    finally:
        torch.set_flush_denormal(False)
    assert flushes
    for key, value in want.items():
        assert got[key].tobytes() == value.tobytes(), key


def test_centered_rmsprop_survives_a_negative_variance(isa):
    # One gradient all along: v is m^2 but for rounding, which leaves it below in many places.
    rng = np.random.default_rng(4)
    g = rng.normal(size=10_000).astype(np.float32)
    p = np.zeros_like(g)
    opt = fs.RMSprop([p], centered=True, eps=1e-8)
    load(opt, 1000, [{"square_avg": g * g, "grad_avg": g}])
    opt.step([g])
    v, m = (opt.state[0][key].astype(np.float64) for key in ("square_avg", "grad_avg"))
    assert np.count_nonzero(v - m * m < 0) > 100  # or this test would test nothing
    assert np.isfinite(p).all()


@pytest.mark.parametrize("param", ["float32", "float16"])
@pytest.mark.parametrize("name", ["Adam", "Adagrad", "RMSprop", "Adadelta"])
def test_float16_gradients_are_squared_in_float32(name, param, isa):
    g = np.array([6e4, -3e4, 300, -257] * 5, np.float16)
    with np.errstate(over="ignore"):
        assert np.isinf(g * g).all()
    p = np.ones(g.size, param)
    opt = make(name, [p], {"lr": 0.5})
    state = {key: value.astype(np.float64) for key, value in opt.state[0].items()}
    expected, after = step(name, p.astype("f8"), g.astype("f8"), state, 1, {"lr": 0.5})
    opt.step([g])
    np.testing.assert_allclose(p, expected, rtol=2 * float(ml_dtypes.finfo(param).eps))
    for key, value in opt.state[0].items():
        np.testing.assert_allclose(value, after[key], rtol=1e-6, err_msg=key)  # float32's rounding


@pytest.mark.parametrize("t", [2**24 - 1, 2**24 + 1, 2**24 + 2, 2**31 + 1, 2**40 + 3])
@pytest.mark.parametrize(
    ("name", "hypers"),
    [
        ("Adam", {"lr": 0.3, "betas": (0.9, 1 - 1e-8)}),
        ("Adagrad", {"lr": 0.3, "lr_decay": 1e-7}),
        ("RAdam", {"lr": 0.3, "betas": (0.9, 1 - 1e-7)}),
        ("ASGD", {"lr": 0.3, "lambd": 1e-7, "t0": 2**24}),
        ("NAdam", {"lr": 0.3, "momentum_decay": 1e-7}),
    ],
)
def test_step_counts_past_2_to_the_24_stay_exact(name, hypers, t):
    rng = np.random.default_rng(6)
    p, g = rng.uniform(0.5, 2, N), rng.uniform(0.5, 2, N)
    expected = p.copy()
    opt = make(name, [p], hypers)
    numbers = {"NAdam": {"mu_product": 1e-9}, "ASGD": {"eta": 0.25, "mu": 0.5}}.get(name, {})
    state = {**{key: rng.uniform(0.5, 2, N) for key in opt.state[0]}, **numbers}
    load(opt, t, [state])
    for k in range(2):
        opt.step([g])
        expected, state = step(name, expected, g, state, t + k, hypers)
        assert opt.state_dict()["state"][0]["step"] == t + k
    # 1e-12: the rounding of 1 - beta^t and of RAdam's differences, magnified by the long memory; a
    # count rounded to float32 shows as 1e-8.
    np.testing.assert_allclose(p, expected, rtol=1e-12)
    for key, value in state.items():
        found = opt.state_dict()["state"][0][key]
        np.testing.assert_allclose(found, value, rtol=1e-12, err_msg=key)


def test_count_past_2_to_the_24_differs_from_its_float32():
    # What the test above relies on: one update more or less is visible.
    results = []
    for t in (2**24 + 1, 2**24):
        p = np.ones(1)
        opt = fs.Adagrad([p], lr=1.0, lr_decay=1.0)
        load(opt, t, [{"sum": np.ones(1)}])
        opt.step([np.ones(1)])
        results.append(1 - p[0])
    assert results[0] != results[1]


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_begins_with_the_first_gradient_it_sees(nesterov):
    hypers = {"lr": 1.0, "momentum": 0.5, "nesterov": nesterov}
    hypers["dampening"] = 0.0 if nesterov else 0.75
    late, prompt = np.zeros(N), np.zeros(N)
    opt = fs.SGD([late, prompt], **hypers)
    other = np.zeros(N)
    alone = fs.SGD([other], **hypers)
    opt.step([None, np.full(N, 8.0)])
    assert not late.any()
    assert 0 not in opt.state_dict()["state"]
    for g in (2.0, 3.0, 5.0):
        opt.step([np.full(N, g), np.full(N, 8.0)])
        alone.step([np.full(N, g)])
        assert late.tobytes() == other.tobytes()
    assert np.all(opt.state[0]["momentum_buffer"] == alone.state[0]["momentum_buffer"])


def test_dampening_begins_with_the_second_update():
    p = np.zeros(N, np.float32)
    opt = fs.SGD([p], lr=1.0, momentum=0.5, dampening=0.75)
    opt.step([np.full(N, 8, np.float32)])
    assert np.all(p == -8)
    opt.step([np.full(N, 4, np.float32)])
    assert np.all(opt.state[0]["momentum_buffer"] == 0.5 * 8 + 0.25 * 4)
    assert np.all(p == -8 - 5)


@each_case()
def test_checkpoint_continues_bit_for_bit(name, hypers):
    rng = np.random.default_rng(8)
    p = rng.normal(size=N).astype(np.float32)
    grads = rng.normal(size=(6, N)).astype(np.float32)
    opt = make(name, [p], hypers)
    for g in grads[:3]:
        opt.step([g])
    saved, other = copy.deepcopy(opt.state_dict()), p.copy()
    resumed = make(name, [other], {})
    resumed.load_state_dict(saved)
    for g in grads[3:]:
        opt.step([g])
        resumed.step([g])
    assert other.tobytes() == p.tobytes()


@functools.cache
def exact_power(base, exponent):
    """base ** exponent as a Decimal of sixty digits."""
    with localcontext() as context:
        context.prec = 60
        return Decimal(base) ** Decimal(exponent)


def assert_power(got, base, exponent):
    want = exact_power(base, exponent)
    off = abs(Decimal(got) - want) / Decimal(math.ulp(float(want)))
    assert off <= 1, f"power({base}, {exponent}) is off by {off} ulp"


@pytest.mark.parametrize("base", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999, 0.9999, 1 - 2**-40, 1.0, 1.5])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 7, 1000, 2**24 + 1, 2**40 + 3])
def test_power_of_an_integer_is_within_an_ulp(base, n):
    if base == n == 0:
        assert _core.power(base, n) == 1  # Decimal leaves 0 ** 0 undefined
    elif base > 1 and n > 1000:
        assert _core.power(base, n) == math.inf
    else:
        assert_power(_core.power(base, n), base, n)


@settings(deadline=None, database=None)
@given(base=st.floats(0, 1, allow_subnormal=False), n=st.integers(0, 3000))
def test_power_of_any_beta_is_within_an_ulp(base, n):
    got = _core.power(base, n)
    if base == n == 0:
        assert got == 1
        return
    assert_power(got, base, n)
    assert got == pytest.approx(base**n, rel=1e-15, abs=1e-300)


@settings(deadline=None, database=None)
@given(base=st.floats(1e-3, 1e12), y=st.floats(-20, 20, allow_subnormal=False))
def test_power_of_a_fraction_is_within_an_ulp(base, y):
    got = _core.power(base, y)
    assert_power(got, base, y)
    assert got == pytest.approx(base**y, rel=1e-15)


@pytest.mark.parametrize("y", [0.0, 0.25, 0.75, 1.0, 4e-3 * 7, 1e300, -1e300])
@pytest.mark.parametrize("base", [1.0, 0.96, 1 + 2**-52, 0.5, 2.0])
def test_power_has_the_limits_of_pow(base, y):
    try:
        want = base**y
    except OverflowError:
        want = math.inf
    got = _core.power(base, y)
    assert got == want or abs(got - want) <= math.ulp(want)


def test_adagrad_whose_rate_has_died_stands_still():
    x = np.ones(3, np.float32)
    opt = fs.Adagrad(x, lr=0.1, lr_decay=1e38)  # 1 + 5 * lr_decay is no float32
    for _ in range(6):
        opt.step(np.array([0, 1, 0], np.float32))
    np.testing.assert_allclose(x, [1, 0.9, 1], rtol=1e-6)
