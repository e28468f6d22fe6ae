"""Schedules: torch's where both have one, values by hand, and what holds for every one of them."""

import dataclasses
import itertools
import json
import math
import pickle
import re
import warnings
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedstep as fs
from fusedstep import _core, schedules
from optional import optional

torch = optional("torch")

S = schedules
LAST = 2**53
NAN, INF = math.nan, math.inf

# A schedule of each class and shape, none with a value at a round step alone.
EXAMPLES = [
    S.Constant(0.3),
    S.Step(0.3, every=7, factor=0.3),
    S.MultiStep(0.3, [3, 4, 20], factor=0.3),
    S.Exponential(0.3, 0.97),
    S.Exponential.percent(0.3, 3),
    S.Linear(0.3, total=23, end=0.01),
    S.Linear(0.01, total=23, end=0.3),
    S.Cosine(0.3, total=23, end=0.01),
    S.Polynomial(0.3, total=23, end=0.01, power=1.7),
    S.CosineRestarts(0.3, period=5, end=0.01),
    S.CosineRestarts(0.3, period=5, mult=3),
    S.InverseSqrt(0.3, timescale=7.5),
    *(S.WSD(0.3, 40, 11, 0.01, shape) for shape in ("linear", "cosine", "exponential", "1-sqrt")),
    S.OneCycle(0.3, total=37),
    S.OneCycle(0.3, total=37, anneal="linear", three_phase=True),
    S.OneCycle(0.3, total=37).momentum,
    S.Cyclic(0.01, 0.3, step_size_up=5, step_size_down=3),
    S.Cyclic(0.01, 0.3, step_size_up=5, mode="triangular2").momentum,
    S.Cyclic(0.01, 0.3, step_size_up=5, mode="exp_range", gamma=0.99),
    S.ReduceOnPlateau(0.3, patience=2, progress=(0.03, 1.5, 1, 0)),
    S.Cosine(0.3, total=23).warmup(5, start=0.1),
    S.Step(0.3, every=7).then(S.Linear(0.1, total=5), at=11),
    0.5 * S.Cosine(0.3, total=23).warmup(5) * 3,
    (S.Constant(0.3) * 0.5).warmup(4).then(2 * S.Constant(0.1), at=9),
]
each = pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
STEPS = [*range(120), 10**6, 10**9, LAST - 1, LAST]


def test_every_schedule_has_an_example():
    used = {type(one).__name__ for one in EXAMPLES}
    assert set(S.__all__) - {"Schedule", "from_dict"} <= used


# -- torch's ---------------------------------------------------------------------------------------

T = optional("torch.optim.lr_scheduler")


def torch_rates(make, lr, steps, momentum=0.9):
    """The rate and momentum that a torch scheduler gives each step."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr, momentum=momentum)
    scheduler = make(opt)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # SequentialLR and a deprecated argument of its own
        for _ in range(steps):
            found.append((opt.param_groups[0]["lr"], opt.param_groups[0]["momentum"]))
            opt.step()
            scheduler.step()
    return np.array(found).T


SHARED = [
    (S.Constant(0.3), lambda o: T.ConstantLR(o, factor=1.0, total_iters=5)),
    (S.Step(0.3, 7, 0.5), lambda o: T.StepLR(o, 7, gamma=0.5)),
    (S.MultiStep(0.3, [3, 9, 31]), lambda o: T.MultiStepLR(o, [3, 9, 31])),
    (S.MultiStep(0.3, [3, 9, 9, 31], 0.5), lambda o: T.MultiStepLR(o, [3, 9, 9, 31], gamma=0.5)),
    (S.Exponential(0.3, 0.93), lambda o: T.ExponentialLR(o, 0.93)),
    (S.Linear(0.3, 20, end=0.06), lambda o: T.LinearLR(o, 1.0, 0.2, total_iters=20)),
    (S.Constant(0.3).warmup(10, 0.1), lambda o: T.LinearLR(o, 1 / 3, 1.0, total_iters=10)),
    (S.Polynomial(0.3, 20, power=2.5), lambda o: T.PolynomialLR(o, 20, power=2.5)),
    (S.Cosine(0.3, 60, end=0.01), lambda o: T.CosineAnnealingLR(o, 60, eta_min=0.01)),
    (
        S.CosineRestarts(0.3, 4, mult=2, end=0.01),
        lambda o: T.CosineAnnealingWarmRestarts(o, 4, T_mult=2, eta_min=0.01),
    ),
    (S.CosineRestarts(0.3, 7), lambda o: T.CosineAnnealingWarmRestarts(o, 7)),
    (
        S.Exponential(0.3, 0.9).then(S.Step(0.3, 3), at=6),
        lambda o: T.SequentialLR(o, [T.ExponentialLR(o, 0.9), T.StepLR(o, 3)], milestones=[6]),
    ),
]


@pytest.mark.parametrize(("ours", "theirs"), SHARED, ids=[repr(a) for a, _ in SHARED])
def test_agrees_with_torch(ours, theirs):
    n = 60
    np.testing.assert_allclose(ours(range(n)), torch_rates(theirs, 0.3, n)[0], 1e-12, 1e-15)


ONE_CYCLES = [
    (total, pct, anneal, three)
    for total, pct, anneal, three in itertools.product(
        [10, 37, 100], [0.05, 0.3, 0.5, 0.87, 1.0], ["cos", "linear"], [False, True]
    )
    if abs(pct * total - 1) > 1e-9 and pct * total > 1 and not (three and pct > 0.5)
]


@pytest.mark.parametrize(("total", "pct", "anneal", "three"), ONE_CYCLES)
def test_one_cycle_agrees_with_torch_with_its_momentum(total, pct, anneal, three):
    ours = S.OneCycle(
        0.3, total, pct, 10.0, 100.0, anneal, three, base_momentum=0.7, max_momentum=0.95
    )
    rates, momenta = torch_rates(
        lambda o: T.OneCycleLR(
            o, 0.3, total_steps=total, pct_start=pct, div_factor=10.0, final_div_factor=100.0,
            anneal_strategy=anneal, three_phase=three, base_momentum=0.7, max_momentum=0.95,
        ),
        0.3,
        total - 1,
    )  # fmt: skip
    np.testing.assert_allclose(ours(range(total - 1)), rates, 1e-12)
    np.testing.assert_allclose(ours.momentum(range(total - 1)), momenta, 1e-12)
    assert ours(total - 1) == ours(10**9) == 0.3 / 10 / 100 or pct == 1


@pytest.mark.parametrize("down", [None, 3, 11])
@pytest.mark.parametrize(
    ("mode", "gamma"), [("triangular", 1.0), ("triangular2", 1.0), ("exp_range", 0.98)]
)
def test_cyclic_agrees_with_torch_with_its_momentum(mode, gamma, down):
    ours = S.Cyclic(0.01, 0.3, 5, down, mode, gamma, base_momentum=0.7, max_momentum=0.95)
    rates, momenta = torch_rates(
        lambda o: T.CyclicLR(o, 0.01, 0.3, 5, down, mode, gamma, base_momentum=0.7,
                             max_momentum=0.95),
        0.3,
        60,
    )  # fmt: skip
    np.testing.assert_allclose(ours(range(60)), rates, 1e-10)  # torch's own rounding of the cycle
    np.testing.assert_allclose(ours.momentum(range(60)), momenta, 1e-10)


@settings(deadline=None)
@given(
    metrics=st.lists(st.sampled_from([0.0, 1e-9, 0.5, 0.99995, 1.0, 1.5, -1.0, math.nan]),
                     max_size=30),
    mode=st.sampled_from(["min", "max"]),
    threshold_mode=st.sampled_from(["rel", "abs"]),
    patience=st.integers(0, 3),
    cooldown=st.integers(0, 3),
    threshold=st.sampled_from([0.0, 1e-4, 0.6]),
    min_lr=st.sampled_from([0.0, 0.05]),
)  # fmt: skip
def test_reduce_on_plateau_agrees_with_torch_on_any_metrics(metrics, **arguments):
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    if arguments["threshold_mode"] == "rel":  # below 0 torch's bar lies on the worse side
        metrics = [abs(metric) for metric in metrics]
    theirs = T.ReduceLROnPlateau(opt, factor=0.5, **arguments)
    ours = S.ReduceOnPlateau(0.3, factor=0.5, **arguments)
    given = hash(ours)
    for metric in metrics:
        theirs.step(metric)
        assert ours.step(metric) == ours(0) == ours(LAST) == opt.param_groups[0]["lr"]
        assert hash(ours) == given
        ours = S.from_dict(json.loads(json.dumps(ours.to_dict())))  # a checkpoint at every step


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
@pytest.mark.parametrize(
    ("mode", "metrics"),
    [
        ("min", [-10, -10, -9.9995, -9.999, -9.9985, -9.998]),  # worse, by less than a threshold
        ("min", [-10, -10.0005, -10.0005, -10.0009, -10, -10.0008]),  # better, by less than one
        ("max", [-10, -10, -10.0005, -10.001, -10.0015, -10.002]),
        ("max", [-10, -9.9995, -9.9995, -9.9991, -10, -9.9992]),
        ("min", [10, 10, 10.0005, 10.001, 9.9995, 9.9991]),
        ("max", [10, 10, 9.9995, 9.999, 10.0005, 10.0009]),
        ("min", [0.0, 0.0, 1e-9, 0.0, 1.0, 0.0]),
        ("max", [-0.0, 0.0, -1e-9, 0.0, -1.0, 0.0]),
    ],
)
def test_reduce_on_plateau_takes_no_worse_metric_for_a_better_one(mode, metrics, scale):
    plateau = S.ReduceOnPlateau(0.5, mode, factor=0.5, patience=4)
    assert [plateau.step(scale * one) for one in metrics] == [0.5] * 5 + [0.25]
    assert plateau.progress[1] == scale * metrics[0]


@settings(deadline=None)
@given(
    metrics=st.lists(st.floats(-100, 100), min_size=1, max_size=30),
    mode=st.sampled_from(["min", "max"]),
    threshold=st.sampled_from([0.0, 1e-4, 0.3, 2.0]),
)
def test_reduce_on_plateau_keeps_the_best_metric_seen_but_for_its_threshold(
    metrics, mode, threshold
):
    plateau = S.ReduceOnPlateau(0.5, mode, threshold=threshold)
    better = min if mode == "min" else max
    for i, metric in enumerate(metrics):
        plateau.step(metric)
        seen, best = better(metrics[: i + 1]), plateau.progress[1]
        assert abs(best - seen) <= threshold * abs(best) * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1.0, 0.01])
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_better_metric_is_one_by_a_share_of_the_best_one_s_size(mode, scale):
    for best in (-10.0, 10.0):
        step = scale * abs(best) * (-1 if mode == "min" else 1)
        for reach, rate in ((0.999, 0.25), (1.001, 0.5)):
            plateau = S.ReduceOnPlateau(0.5, mode, factor=0.5, patience=0, threshold=scale)
            plateau.step(best)
            assert plateau.step(best + reach * step) == rate


@pytest.mark.parametrize(("eps", "rates"), [(0.25, [0.5, 0.5, 0.5]), (0.2, [0.5, 0.25, 0.25])])
def test_reduce_on_plateau_makes_no_fall_of_eps_or_less(eps, rates):
    ours = S.ReduceOnPlateau(0.5, factor=0.5, patience=0, eps=eps)
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = T.ReduceLROnPlateau(opt, factor=0.5, patience=0, eps=eps)
    for rate in rates:
        theirs.step(1.0)
        assert ours.step(1.0) == opt.param_groups[0]["lr"] == rate


# -- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (S.Constant(0.25), {0: 0.25, LAST: 0.25}),
        (S.Step(1.0, 10, 0.5), {0: 1, 9: 1, 10: 0.5, 19: 0.5, 20: 0.25, LAST: 0}),
        (S.Step(1.0, 10, 0.0), {9: 1, 10: 0}),
        (S.MultiStep(1.0, [0, 2], 0.5), {0: 0.5, 1: 0.5, 2: 0.25, LAST: 0.25}),
        (S.Exponential(1.0, 0.5), {0: 1, 3: 0.125, 1074: 2.0**-1074, 1076: 0}),
        (S.Exponential(1.0, 0.0), {0: 1, 1: 0}),
        (S.Exponential.percent(1.0, 50), {2: 0.25}),
        (S.Exponential.percent(1.0, 0), {LAST: 1}),
        (S.Linear(1.0, 4), {0: 1, 1: 0.75, 3: 0.25, 4: 0, 5: 0, LAST: 0}),
        (S.Linear(0.0, 4, end=1.0), {0: 0, 1: 0.25, 4: 1, LAST: 1}),
        (S.Cosine(1.0, 6, end=0.5), {0: 1, 2: 0.875, 3: 0.75, 4: 0.625, 6: 0.5, 7: 0.5}),
        (S.Polynomial(1.0, 4, power=3.0), {0: 1, 2: 0.125, 4: 0, 5: 0}),
        (S.CosineRestarts(1.0, 6), {0: 1, 2: 0.75, 3: 0.5, 6: 1, 9: 0.5}),
        (S.CosineRestarts(1.0, 2, 3), {0: 1, 1: 0.5, 2: 1, 5: 0.5, 8: 1, 17: 0.5, 26: 1}),
        (S.InverseSqrt(1.0, 4), {0: 1, 12: 0.5, 60: 0.25}),
        (S.WSD(1.0, 8, 4), {0: 1, 4: 1, 5: 0.75, 7: 0.25, 8: 0, 9: 0}),
        (S.WSD(1.0, 8, 4, 0.0, "cosine"), {4: 1, 6: 0.5, 8: 0, 9: 0}),
        (S.WSD(1.0, 8, 4, 0.0625, "exponential"), {4: 1, 5: 0.5, 6: 0.25, 8: 0.0625, 9: 0.0625}),
        (S.WSD(1.0, 8, 4, 0.0, "1-sqrt"), {4: 1, 5: 0.5, 8: 0, 9: 0}),
        (S.WSD(1.0, 8, 8), {0: 1, 4: 0.5}),
        (S.Cyclic(0.0, 1.0, 4, 2), {0: 0, 1: 0.25, 4: 1, 5: 0.5, 6: 0, 7: 0.25}),
        (S.Constant(1.0).warmup(4), {0: 0, 1: 0.25, 4: 1, 5: 1}),
        (S.Linear(1.0, 4).warmup(2, start=2.0), {0: 2, 1: 1.5, 2: 1, 3: 0.75, 6: 0}),
        (S.Linear(1.0, 4).warmup(0), {0: 1, 4: 0}),
        (S.Constant(1.0).then(S.Linear(0.5, 2), at=3), {2: 1, 3: 0.5, 4: 0.25, 5: 0}),
        (S.Constant(1.0).then(S.Constant(2.0), at=0), {0: 2}),
        (S.Linear(1.0, 4) * 0.5, {0: 0.5, 2: 0.25}),
        (3 * S.Constant(0.5), {0: 1.5}),
        (np.float32(0.5) * S.Constant(0.5), {0: 0.25}),
        (S.ReduceOnPlateau(0.3), {0: 0.3, LAST: 0.3}),
    ],
    ids=lambda x: repr(x) if isinstance(x, S.Schedule) else "",
)
def test_values_by_hand(schedule, values):
    for t, value in values.items():
        assert schedule(t) == value, t


def test_one_cycle_by_hand():
    cycle = S.OneCycle(1.0, 11, pct_start=3 / 11, div_factor=4.0, final_div_factor=8.0)
    assert [cycle(t) for t in (0, 1, 2, 6, 10, 11)] == [
        1 / 4, (1 + 1 / 4) / 2, 1, (1 + 1 / 32) / 2, 1 / 32, 1 / 32
    ]  # fmt: skip
    assert [cycle.momentum(t) for t in (0, 2, 10, LAST)] == [0.95, 0.85, 0.95, 0.95]


@pytest.mark.parametrize("three", [False, True])
@pytest.mark.parametrize("pct", [0.0, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("total", [1, 2, 5, 10])
def test_one_cycle_divides_by_zero_nowhere(total, pct, three):
    cycle = S.OneCycle(1.0, total, pct_start=pct, three_phase=three)
    values = cycle(range(total + 3))
    assert (values > 0).all()
    assert (values <= 1).all()
    np.testing.assert_array_equal(values[total:], cycle(LAST))
    assert np.isfinite(cycle.momentum(range(total + 3))).all()


# -- what holds for every one ----------------------------------------------------------------------


@each
def test_an_array_gives_the_bits_of_the_scalars(schedule):
    alone = np.array([schedule(t) for t in STEPS])
    together = schedule(STEPS)
    assert type(schedule(3)) is float
    assert together.dtype == np.float64
    np.testing.assert_array_equal(together.view(np.uint64), alone.view(np.uint64))
    for kind in (np.int8, np.uint16, np.int64, np.uint64):
        np.testing.assert_array_equal(schedule(np.arange(100, dtype=kind)), alone[:100])
        assert schedule(kind(5)) == alone[5]
    np.testing.assert_array_equal(schedule(np.arange(6).reshape(2, 3)), alone[:6].reshape(2, 3))
    assert schedule([]).shape == schedule(np.empty(0, int)).shape == (0,)
    assert schedule(np.array(5)).shape == ()


@each
def test_is_a_value(schedule):
    again = eval(repr(schedule), vars(schedules))
    for other in (
        again,
        pickle.loads(pickle.dumps(schedule)),
        S.from_dict(schedule.to_dict()),
        S.from_dict(json.loads(json.dumps(schedule.to_dict()))),
        type(schedule).from_dict(schedule.to_dict()),
    ):
        assert other == schedule
        assert type(other) is type(schedule)
        assert hash(other) == hash(schedule)
        assert repr(other) == repr(schedule)
    assert schedule != schedule * 0.5
    assert len({schedule, again, schedule.warmup(3)}) == 2
    for name in schedule._arguments():
        with pytest.raises(AttributeError):
            setattr(schedule, name, 1)
        with pytest.raises(AttributeError):
            delattr(schedule, name)


@pytest.mark.parametrize("mult", [2, 3, 7, 10**6])
def test_restarts_are_counted_exactly_to_the_last_step(mult):
    schedule = S.CosineRestarts(1.0, period=5, mult=mult)
    for t in (10**6, 10**9 + 7, 2**45 + 1, LAST - 1, LAST):
        start, length = 0, 5
        while start + length <= t:
            start, length = start + length, length * mult
        x = Fraction(t - start, length)
        assert schedule(t) == pytest.approx((1 + math.cos(math.pi * float(x))) / 2, abs=1e-15)
        assert schedule([0, t])[1] == schedule(t)


def test_an_exponential_decay_ends_at_its_end_to_the_bit():
    rng = np.random.default_rng(0)
    for lr, end in rng.uniform(1e-4, 1, (200, 2)).tolist():
        assert S.WSD(lr, 9, 4, end, shape="exponential")(9) == end


@pytest.mark.parametrize(
    ("schedule", "span"),
    [
        (S.Step(1.0, 7), 28),
        (S.MultiStep(1.0, [3, 30]), 41),
        (S.Exponential(1.0, 0.1), 2),  # 1 %
        (S.InverseSqrt(1.0, 10), 80),  # a third
        (S.CosineRestarts(1.0, 5, mult=2), 35),
        (S.Cyclic(0.1, 1.0, 5, 3), 24),
        (S.Linear(1.0, 9).warmup(4).then(S.Cosine(1.0, 20), at=6), 26),
    ],
    ids=repr,
)
def test_spans_show_what_a_schedule_does(schedule, span):
    assert schedule.span == span


def test_equal_values_are_equal_however_they_are_given():
    assert S.Constant(1) == S.Constant(1.0) == S.Constant(np.float32(1))
    assert S.MultiStep(1, [1, 2]) == S.MultiStep(1.0, (1, np.int64(2)), factor=0.1)
    assert S.Constant(1.0) != S.Linear(1.0, 1)


@each
def test_holds_its_end_value_and_stays_finite(schedule):
    values = schedule(STEPS)
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    cycles = (S.CosineRestarts, S.Cyclic, S.MomentumOf)
    if not isinstance(schedule, (S.Exponential, S.Step, S.InverseSqrt, *cycles)):
        assert schedule(120) == schedule(10**9) == schedule(LAST)


@pytest.mark.parametrize("t", [-1, LAST + 1, 2**70, [-1, 3], np.array([0, LAST + 1])], ids=repr)
@each
def test_steps_out_of_range_are_refused(schedule, t):
    with pytest.raises(ValueError, match=r"^t must be from 0 to 2\^53"):
        schedule(t)


@pytest.mark.parametrize(
    "t",
    [1.5, "1", None, True, [1.5], [1.0, NAN], [INF], ["a"], np.array(True), [[1, 2], [3]], NAN, 1j],
    ids=repr,
)
def test_steps_that_are_no_integers_are_refused(t):
    with pytest.raises(TypeError, match=r"^t must be an int or an array of ints"):
        S.Constant(0.1)(t)


rate = st.floats(0, 10)
count = st.integers(1, 10_000)


@settings(deadline=None)
@given(
    lr=rate, end=rate, total=count, t=st.integers(0, 20_000), power=st.floats(0.1, 5),
    shape=st.sampled_from(["linear", "cosine", "1-sqrt", "exponential"]),
)  # fmt: skip
def test_decays_are_exact_at_their_ends_monotone_and_bounded(lr, end, total, t, power, shape):
    found = [S.Linear(lr, total, end), S.Cosine(lr, total, end)]
    found.append(S.Polynomial(lr, total, end, power))
    if shape != "exponential" or (lr > 0 and 0 < end / lr < INF):
        found.append(S.WSD(lr, total, max(1, total // 3), end, shape))
    for one in found:
        assert one(0) == lr
        assert one(total) == one(total + t) == end
        here, after = one(t), one(t + 1)
        assert min(lr, end) <= here <= max(lr, end)
        assert here >= after if lr >= end else here <= after


@settings(deadline=None)
@given(lr=rate, start=rate, steps=count, total=count, t=st.integers(0, 20_000))
def test_warmup_is_monotone_and_joins_without_a_jump(lr, start, steps, total, t):
    inner = S.Cosine(lr, total)
    warm = inner.warmup(steps, start)
    assert warm(steps) == inner(0) == lr
    assert warm(0) == (start if steps else lr)
    assert warm(steps + t) == inner(t)
    assert abs(warm(steps) - warm(steps - 1)) <= abs(lr - start) / steps * (1 + 1e-9) + 1e-12
    if t < steps:
        here, after = warm(t), warm(t + 1)
        assert here <= after if start <= lr else here >= after


@settings(deadline=None)
@given(low=rate, high=rate, up=count, down=count, t=st.integers(0, 10**12))
def test_cycles_stay_between_their_values_and_are_continuous(low, high, up, down, t):
    wave = S.Cyclic(low, high, up, down)
    steepest = abs(high - low) / min(up, down)
    assert min(low, high) <= wave(t) <= max(low, high)
    assert abs(wave(t + 1) - wave(t)) <= steepest * (1 + 1e-6) + 1e-12
    assert wave(up) == wave(up + 7 * (up + down)) == high
    assert wave(up + down) == low
    restarts = S.CosineRestarts(high, up, 1 + down % 4, low)
    assert min(low, high) <= restarts(t) <= max(low, high)
    assert restarts(up) == high


@settings(deadline=None)
@given(
    total=st.integers(2, 2000), pct=st.floats(0, 0.5), three=st.booleans(),
    anneal=st.sampled_from(["cos", "linear"]), t=st.integers(0, 3000),
)  # fmt: skip
def test_one_cycle_and_its_momentum_are_mirrored_and_bounded(total, pct, three, anneal, t):
    cycle = S.OneCycle(1.0, total, pct, 10.0, 100.0, anneal, three)
    assert 1e-3 * (1 - 1e-12) <= cycle(t) <= 1
    assert 0.85 <= cycle.momentum(t) <= 0.95
    if t <= pct * total - 1:  # the rising phase: the same share of the way
        share = (cycle(t) - 0.1) / 0.9
        assert cycle.momentum(t) == pytest.approx(0.95 - 0.1 * share, abs=1e-12)


@settings(deadline=None)
@given(lr=st.floats(1e-3, 10), decay=st.floats(0.5, 1), t=st.integers(0, 10**9))
def test_there_is_no_drift(lr, decay, t):
    reference = lr * np.longdouble(decay) ** t
    assert S.Exponential(lr, decay)(t) == pytest.approx(float(reference), rel=1e-14, abs=1e-307)


@pytest.mark.parametrize("schedule", [S.Exponential(0.0, 2.0), S.Step(0.0, 1, 2.0)], ids=repr)
def test_nothing_grows_out_of_0(schedule):
    assert schedule(10**9) == 0
    np.testing.assert_array_equal(schedule([0, 1, 10**9]), 0)


def test_no_other_class_takes_a_schedule_s_name():
    for name in ("Cosine", "Warmup"):
        with pytest.raises(TypeError, match=f"must not be named as one of ours, got '{name}'"):
            type(name, (S.Schedule,), {})
    saved = S.Cosine(0.1, 10).to_dict()
    assert type(S.from_dict(saved)) is S.Cosine


def test_an_overflow_is_infinite_for_one_step_and_for_many():
    schedule = S.Linear(1e300, 10, end=1e300) * 1e300
    assert schedule(0) == INF
    assert schedule([0, 1]).tolist() == [INF, INF]


def test_numpy_s_strings_become_strings():
    assert type(S.WSD(0.1, 3, 2, shape=np.str_("cosine")).shape) is str


def test_half_waves_and_powers_are_exact_where_they_can_be():
    assert [_core.cospi(x) for x in (0, 0.5, 1, 1.5, 2, 2**60, -0.5)] == [1, 0, -1, 0, 1, 1, 0]
    assert _core.cospi(1 / 3) == 0.5
    x = np.random.default_rng(0).uniform(-4, 4, 2000)
    with mpmath.workprec(200):
        exact = [float(mpmath.cospi(mpmath.mpf(one))) for one in x]  # rounded once
    np.testing.assert_array_equal(_core.cospi(x), exact)
    np.testing.assert_array_equal(_core.cospi(x), [_core.cospi(one) for one in x])
    np.testing.assert_array_equal(_core.power(0.3, np.arange(9)), [_core.power(0.3, n)
                                                                    for n in range(9)])  # fmt: skip
    assert np.isnan(_core.cospi([math.inf, -math.inf, math.nan])).all()


# -- whole floats ----------------------------------------------------------------------------------


def tensor(value):
    return torch.tensor(value)


FLOATS = [float, np.float32, np.float64, np.array, np.float16, tensor, Fraction]


def counts(schedule):
    """The names of a schedule's arguments that are counts of steps, with their values."""
    kinds = {S.Count, S.Whole, S.CountOrNone}
    hints = S._hints(type(schedule))
    found = {name: getattr(schedule, name) for name in hints if hints[name] in kinds}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("kind", FLOATS, ids=lambda kind: kind.__name__)
@each
def test_whole_floats_are_counts_of_steps(schedule, kind):
    for name, value in counts(schedule).items():
        again = dataclasses.replace(schedule, **{name: kind(float(value))})
        assert again == schedule
        assert type(getattr(again, name)) is int
    stones = S.MultiStep(0.3, [kind(3.0), 4, kind(20.0)]).milestones
    assert stones == (3, 4, 20)
    assert set(map(type, stones)) == {int}
    assert schedule(kind(7.0)) == schedule(7)
    assert type(schedule.warmup(kind(3.0)).steps) is int
    assert type(schedule.then(S.Constant(0.1), at=kind(3.0)).at) is int


@each
def test_numbers_between_integers_are_no_counts_of_steps(schedule):
    for name, value in counts(schedule).items():
        for other in (value + 0.5, np.float32(value + 0.25), value * (1 + 1e-9) + 1e-9, NAN, INF):
            with pytest.raises(TypeError, match=rf"^{name} must be an integer >= \d, got "):
                dataclasses.replace(schedule, **{name: other})
        with pytest.raises(
            ValueError, match=rf"^{name} must be an integer from \d to 2\^53, got -3.0"
        ):
            dataclasses.replace(schedule, **{name: -3.0})


PRODUCTS = [
    (0.03 * 1000, 30), (0.07 * 100, 7), (0.1 * 3 * 1000, 300), ((1 - 0.97) * 1000, 30),
    ((1 - 0.9) * 10**9, 10**8), (0.57 * 100, 57), (1.1 * 10**6, 1_100_000),
    (np.float32(0.07) * np.float32(100), 7), (np.float32(0.29) * np.float32(1e5), 29_000),
]  # fmt: skip


@pytest.mark.parametrize(("product", "whole"), PRODUCTS, ids=repr)
def test_a_product_that_is_whole_but_for_its_rounding_is_whole(product, whole):
    assert S.Constant(0.1).warmup(product).steps == whole
    assert S.Cosine(0.1, total=product) == S.Cosine(0.1, total=whole)
    assert (
        S.Linear(0.1, 10**9)([product, 1.0]).tolist() == S.Linear(0.1, 10**9)([whole, 1]).tolist()
    )


@settings(deadline=None)
@given(total=st.integers(1, 10**9), percent=st.integers(1, 100))
def test_every_share_in_percent_that_is_whole_is_taken(total, percent):
    share = percent / 100 * total
    if total * percent % 100 == 0:
        assert S.Cosine(0.1, share).total == total * percent // 100
    else:
        with pytest.raises(TypeError, match="total must be an integer"):
            S.Cosine(0.1, share)


# -- then, without at ------------------------------------------------------------------------------

AFTER = S.Linear(0.1, total=5)


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (S.Linear(0.3, 9), 9),
        (S.Cosine(0.3, 9), 9),
        (S.Polynomial(0.3, 9), 9),
        (S.WSD(0.3, 9, 4), 9),
        (S.OneCycle(0.3, 9), 9),
        (S.OneCycle(0.3, 9).momentum, 9),
        (S.Cosine(0.3, 9).warmup(3), 12),
        (S.Cosine(0.3, 9) * 0.5, 9),
        ((0.5 * S.Cosine(0.3, 9).warmup(3)).warmup(2), 14),
        (S.Constant(0.3).then(S.Cosine(0.3, 9), at=4), 13),
        (S.Cosine(0.3, 9).then(S.Linear(0.3, 6).warmup(2)), 17),
        ((S.Constant(0.3).then(S.Cosine(0.3, 9), at=4) * 2).warmup(1), 14),
    ],
    ids=repr,
)
def test_a_join_is_at_the_end_of_what_has_one(schedule, end):
    joined = schedule.then(AFTER)
    assert joined == schedule.then(AFTER, at=end)
    assert eval(repr(joined), vars(schedules)) == S.from_dict(joined.to_dict()) == joined
    assert joined.then(S.Constant(0.1)).at == end + 5
    assert joined(range(end + 9)).tolist() == [*schedule(range(end)), *AFTER(range(9))]


ENDLESS = [
    S.Constant(0.3), S.Step(0.3, 7), S.MultiStep(0.3, [3, 4]), S.Exponential(0.3, 0.97),
    S.CosineRestarts(0.3, 5), S.InverseSqrt(0.3, 5), S.Cyclic(0.1, 0.3),
    S.Cyclic(0.1, 0.3).momentum, S.ReduceOnPlateau(0.3), S.Constant(0.3).warmup(5),
    S.Cosine(0.3, 9).then(S.Constant(0.3)), S.Constant(0.3) * 0.5,
]  # fmt: skip


@pytest.mark.parametrize("schedule", ENDLESS, ids=repr)
def test_what_has_no_end_needs_a_step_to_join_at(schedule):
    said = re.escape(f"at must be given after a schedule that has no end, got {schedule!r}")
    for arguments in ({}, {"at": None}):
        with pytest.raises(TypeError, match=f"^{said}$"):
            schedule.then(AFTER, **arguments)
    assert schedule.then(AFTER, at=4)(4) == AFTER(0)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: S.Constant(NAN), ValueError, "lr must be finite and >= 0, got nan"),
        (lambda: S.Constant(-0.1), ValueError, "lr must be finite and >= 0, got -0.1"),
        (lambda: S.Constant(INF), ValueError, "lr must be finite and >= 0, got inf"),
        (lambda: S.Constant("1"), TypeError, "lr must"),
        (lambda: S.Constant(None), TypeError, "lr must"),
        (lambda: S.Constant(True), TypeError, "lr must"),
        (lambda: S.Constant(np.ones(2)), TypeError, "lr must"),
        (lambda: S.Step(0.1, 0), ValueError, "every must be an integer from 1"),
        (lambda: S.Step(0.1, 1.5), TypeError, "every must be an integer"),
        (lambda: S.Step(0.1, True), TypeError, "every must be an integer"),
        (lambda: S.Step(0.1, 3, NAN), ValueError, "factor must be finite"),
        (lambda: S.MultiStep(0.1, []), ValueError, "milestones must be sorted"),
        (lambda: S.MultiStep(0.1, [5, 3]), ValueError, "milestones must be sorted"),
        (lambda: S.MultiStep(0.1, [-1]), ValueError, r"milestones\[0\] must be an integer from 0"),
        (lambda: S.MultiStep(0.1, [1, 2.5]), TypeError, r"milestones\[1\] must be an integer"),
        (lambda: S.MultiStep(0.1, 5), TypeError, "milestones must be a sequence"),
        (lambda: S.MultiStep(0.1, "12"), TypeError, "milestones must be a sequence"),
        (lambda: S.MultiStep(0.1, {3: 1}), TypeError, "milestones must be a sequence"),
        (lambda: S.MultiStep(0.1, np.ones((1, 2), int)), TypeError, r"milestones\[0\] must be an"),
        (lambda: S.Cosine(0.1, np.array([3])), TypeError, "total must be an integer >= 1"),
        (lambda: S.Cosine(0.1, np.array(True)), TypeError, "total must be an integer >= 1"),
        (lambda: S.Cosine(0.1, torch.tensor(True)), TypeError, "total must be an integer >= 1"),
        (lambda: S.WSD(2e-198, 3, 3, 1e300, "exponential"), ValueError, "end / lr must be finite"),
        (lambda: S.Exponential(0.1, -0.5), ValueError, "decay must"),
        (lambda: S.Exponential.percent(0.1, 101), ValueError, "alpha must"),
        (lambda: S.Exponential.percent(0.1, NAN), ValueError, "alpha must"),
        (lambda: S.Linear(0.1, -3), ValueError, "total must be an integer from 1"),
        (lambda: S.Linear(0.1, 3, -1.0), ValueError, "end must be finite"),
        (lambda: S.Linear(0.1, 2**60), ValueError, r"total must be an integer from 1 to 2\^53"),
        (lambda: S.Cosine(0.1, 0), ValueError, "total must"),
        (lambda: S.Polynomial(0.1, 3, power=0), ValueError, "power must be finite and > 0"),
        (lambda: S.CosineRestarts(0.1, 0), ValueError, "period must"),
        (lambda: S.CosineRestarts(0.1, 3, 0), ValueError, "mult must"),
        (lambda: S.CosineRestarts(0.1, 3, 1.5), TypeError, "mult must"),
        (lambda: S.InverseSqrt(0.1, 0), ValueError, "timescale must be finite and > 0"),
        (lambda: S.WSD(0.1, 3, 4), ValueError, r"decay must be <= total \(3\), got 4"),
        (lambda: S.WSD(0.1, 3, 2, shape="x"), ValueError, "shape must be one of .*1-sqrt.*'x'"),
        (lambda: S.WSD(0.1, 3, 2, shape=3), TypeError, "shape must be one of"),
        (lambda: S.WSD(0.1, 3, 2, shape="exponential"), ValueError, "end must be > 0"),
        (lambda: S.WSD(0, 3, 2, 0.1, shape="exponential"), ValueError, "lr must be > 0"),
        (lambda: S.OneCycle(0.1, 10, 1.5), ValueError, r"pct_start must be in \[0, 1\]"),
        (lambda: S.OneCycle(0.1, 10, div_factor=0), ValueError, "div_factor must"),
        (lambda: S.OneCycle(0.1, 10, anneal="sin"), ValueError, "anneal must be one of"),
        (lambda: S.OneCycle(0.1, 10, three_phase=1), TypeError, "three_phase must be True or"),
        (lambda: S.OneCycle(0.1, 10, 0.6, three_phase=True), ValueError, "pct_start must be <="),
        (lambda: S.OneCycle(0.1, 10, max_momentum=1.0), ValueError, "max_momentum must"),
        (lambda: S.Cyclic(0.1, NAN), ValueError, "max_lr must"),
        (lambda: S.Cyclic(0.1, 0.2, step_size_down=0), ValueError, "step_size_down must"),
        (lambda: S.Cyclic(0.1, 0.2, gamma=0.9), ValueError, "gamma must be 1 with mode"),
        (lambda: S.ReduceOnPlateau(0.1, factor=1.0), ValueError, "factor must"),
        (lambda: S.ReduceOnPlateau(0.1, patience=-1), ValueError, "patience must"),
        (lambda: S.ReduceOnPlateau(0.1, mode="low"), ValueError, "mode must be one of"),
        (lambda: S.ReduceOnPlateau(0.1, progress=3), TypeError, "progress must be None or"),
        (lambda: S.ReduceOnPlateau(0.1).step("x"), TypeError, "metric must be a number or NaN"),
        (lambda: S.ReduceOnPlateau(0.1).step(-INF), ValueError, "metric must not be infinitely"),
        (lambda: S.Constant(0.1).warmup(-1), ValueError, "steps must be an integer from 0"),
        (lambda: S.Constant(0.1).warmup(2.5), TypeError, "steps must be an integer"),
        (lambda: S.Constant(0.1).warmup(3, NAN), ValueError, "start must"),
        (lambda: S.Constant(0.1).then(0.1, 3), TypeError, "other must be a schedule, got 0.1"),
        (lambda: S.Constant(0.1).then(S.Constant(1), -3), ValueError, "at must be an integer"),
        (lambda: S.Constant(0.1) * -1, ValueError, "factor must be finite and >= 0"),
        (lambda: S.Constant(0.1) * NAN, ValueError, "factor must"),
        (lambda: S.Constant(0.1) * "2", TypeError, "can't multiply"),
        (lambda: S.Constant(0.1) * S.Constant(0.1), TypeError, "unsupported operand"),
        (lambda: S.Constant(0.1) * np.ones(2), TypeError, "operand 'Constant' does not"),
        (lambda: np.ones(2) * S.Constant(0.1), TypeError, "unsupported operand"),
        (lambda: S.MomentumOf(S.Constant(1)), TypeError, "schedule must be OneCycle or Cyclic"),
        (lambda: S.from_dict(3), TypeError, "values must be a dict, got 3"),
        (lambda: S.from_dict({}), ValueError, r"values\['type'\] must be one of"),
        (lambda: S.from_dict({"type": "Os"}), ValueError, r"values\['type'\] must be one of"),
        (lambda: S.from_dict({"type": "_Cycle"}), ValueError, r"values\['type'\] must be one of"),
        (lambda: S.from_dict({"type": "Constant", "lr": 1, "x": 2}), ValueError, r"got \['x'\]"),
        (lambda: S.from_dict({"type": "Constant", "lr": -1}), ValueError, "lr must"),
        (lambda: S.from_dict({"type": "Cosine", "lr": 1}), ValueError, r"got no \['total'\]"),
        (lambda: S.Constant(0.1).plot(ax=3), TypeError, "ax must be matplotlib Axes, got 3"),
        (lambda: S.Cosine.from_dict(S.Constant(1).to_dict()), ValueError, r"one of \['Cosine'\]"),
        (lambda: S.Constant(0.1).plot(steps=0), ValueError, "steps must"),
    ],
)  # fmt: skip
def test_refuses_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_refused_metric_changes_nothing():
    plateau = S.ReduceOnPlateau(0.1, patience=0, progress=(0.1, 2.0, 0, 0))
    before = plateau.to_dict()
    for metric in (-INF, "low", None):
        with pytest.raises((TypeError, ValueError)):
            plateau.step(metric)
    assert plateau.to_dict() == before


# -- pictures --------------------------------------------------------------------------------------


def test_plot_draws_what_the_schedule_says(monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")

    schedule = S.Cosine(0.3, total=23).warmup(5)
    ax = schedule.plot()
    (line,) = ax.lines
    np.testing.assert_array_equal(line.get_xdata(), range(29))
    np.testing.assert_array_equal(line.get_ydata(), schedule(range(29)))
    assert line.get_label() == repr(schedule)
    assert S.Constant(0.1).plot(steps=7, ax=ax, label="flat", color="red") is ax
    assert ax.lines[1].get_label() == "flat"
    assert ax.lines[1].get_xdata()[-1] == 7
    assert len(S.Constant(0.1).plot(steps=10**9, ax=ax).lines[2].get_xdata()) <= 10_001
    plt.close("all")


@pytest.mark.parametrize("steps", [99_990, 10**9])  # the first in strides of a wave, if equal
def test_plot_shows_a_wave_however_long_the_picture(steps):
    plt = pytest.importorskip("matplotlib.pyplot")

    drawn = S.Cyclic(0.1, 0.9, step_size_up=5).plot(steps).lines[0]
    assert drawn.get_xdata()[[0, -1]].tolist() == [0, steps]
    assert 9_900 < len(drawn.get_xdata()) <= 10_001
    assert np.percentile(drawn.get_ydata(), [5, 95]) == pytest.approx([0.1, 0.9], abs=0.17)
    plt.close("all")


@pytest.mark.parametrize(
    "schedule",
    [
        S.Step(0.1, 2**52),
        S.Cyclic(0.1, 0.2, 2**52),
        S.MultiStep(0.1, [2**53]),
        S.Linear(0.1, 2**53).warmup(2**53),
        S.CosineRestarts(0.1, 10**9, 10**6),
        S.InverseSqrt(0.1, 1e308),
    ],
    ids=repr,
)
def test_plot_ends_where_steps_do(schedule):
    plt = pytest.importorskip("matplotlib.pyplot")

    assert schedule.plot().lines[0].get_xdata()[-1] == LAST
    plt.close("all")


def test_the_package_has_the_module():
    assert fs.schedules is schedules
