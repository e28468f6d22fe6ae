"""Quadratics: what is predicted in closed form is what the kernels do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedstep.convergence import Quadratic, Regime

EPS = np.finfo(float).eps


def random_quadratic(seed, n=5, diagonal=False):
    rng = np.random.default_rng(seed)
    if diagonal:
        return Quadratic(rng.uniform(0.1, 10, n), rng.standard_normal(n), 0.5)
    half = rng.standard_normal((n, n))
    return Quadratic(half @ half.T + 0.1 * np.eye(n), rng.standard_normal(n), 0.5)


@pytest.mark.parametrize("diagonal", [False, True])
def test_quadratic_value_and_gradient_are_the_formula(diagonal):
    q = random_quadratic(0, diagonal=diagonal)
    full = np.diag(q.A) if diagonal else q.A
    x = np.random.default_rng(1).standard_normal((4, 3, 5))
    for i in np.ndindex(4, 3):
        want = 0.5 * x[i] @ full @ x[i] + x[i] @ q.b + 0.5
        assert q.value(x)[i] == pytest.approx(want, rel=1e-13)
        np.testing.assert_allclose(q.gradient(x)[i], full @ x[i] + q.b, rtol=1e-13, atol=1e-13)
        assert q.value(x[i]) == q(x[i]) == pytest.approx(want, rel=1e-13)


@pytest.mark.parametrize("diagonal", [False, True])
def test_quadratic_minimiser_has_no_gradient_and_the_least_value(diagonal):
    q = random_quadratic(2, diagonal=diagonal)
    assert np.abs(q.gradient(q.minimiser)).max() < 1e-12
    around = q.minimiser + 0.1 * np.random.default_rng(3).standard_normal((50, 5))
    assert (q.value(around) > q.minimum).all()


def test_quadratic_facts_of_a_known_matrix():
    q = Quadratic([[2.0, 1.0], [1.0, 2.0]])  # eigenvalues 1 and 3
    np.testing.assert_allclose(q.eigenvalues, [1, 3], rtol=4 * EPS)
    np.testing.assert_allclose(np.abs(q.eigenvectors), np.sqrt(0.5), rtol=8 * EPS)
    np.testing.assert_allclose(q.optimal_rates, [1, 1 / 3], rtol=4 * EPS)
    facts = (q.condition_number, q.largest_stable_rate, q.best_rate, q.best_contraction)
    assert facts == pytest.approx((3, 2 / 3, 0.5, 0.5), rel=8 * EPS)
    lr, momentum, contraction = q.best_momentum
    assert lr == pytest.approx(4 / (np.sqrt(3) + 1) ** 2)
    assert contraction == pytest.approx((np.sqrt(3) - 1) / (np.sqrt(3) + 1))
    assert momentum == pytest.approx(contraction**2)
    assert q.stable_rates(0.5) == (0.0, pytest.approx(1.0))


def test_quadratic_diagonal_in_any_order_has_sorted_eigenvalues_and_their_axes():
    q = Quadratic([3.0, 1.0, 2.0])
    assert q.eigenvalues.tolist() == [1, 2, 3]
    assert (q.eigenvectors.argmax(0) == [1, 2, 0]).all()


def test_quadratic_newton_rate_ends_its_direction_in_one_step():
    q = random_quadratic(4)
    for i, lr in enumerate(q.optimal_rates):
        start = q.minimiser + q.eigenvectors[:, i]
        assert np.linalg.norm(q.simulate(start, lr, 1)[1] - q.minimiser) < 1e-13
        assert q.regime(lr)[i] is Regime.ONE_STEP


# What decides a regime, from runs of one direction alone.
def observed(eigenvalue, lr, momentum=0.0):
    along = Quadratic([eigenvalue]).simulate([1.0], lr, 400, momentum)[:, 0]
    if abs(along[1]) < 1e-12 and momentum == 0:
        return Regime.ONE_STEP
    late = np.abs(along[-20:]).max()
    if late > 10:
        return Regime.DIVERGING
    if late > 0.5:
        return Regime.AT_THE_LIMIT
    large = along[np.abs(along) > 1e-9]
    return Regime.OSCILLATING if (large[1:] * large[:-1] < 0).any() else Regime.MONOTONE


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0, 1.5, 1.9, 2.0, 2.2])
def test_regime_is_what_a_run_shows(diagonal, share):
    q = random_quadratic(5, n=3, diagonal=diagonal)
    for i, eigenvalue in enumerate(q.eigenvalues):
        lr = share / eigenvalue
        assert q.regime(lr)[i] is observed(eigenvalue, lr)


@pytest.mark.parametrize(
    ("reach", "momentum"),
    [
        (0.01, 0.5),
        (0.02, 0.7),
        (0.5, 0.5),
        (1.4, 0.5),
        (2.9, 0.5),
        (3.0, 0.5),
        (3.1, 0.5),
        (3.7, 0.9),
    ],
)
def test_regime_with_momentum_is_what_a_run_shows(reach, momentum):
    q = Quadratic([2.0])
    lr = reach / 2
    assert q.regime(lr, momentum)[0] is observed(2.0, lr, momentum)
    stable = q.regime(lr, momentum)[0] in (Regime.MONOTONE, Regime.OSCILLATING)
    assert q.is_stable(lr, momentum) is stable
    assert stable is (lr < q.stable_rates(momentum)[1])


def test_regime_boundaries_of_a_dense_matrix_are_within_rounding():
    q = random_quadratic(6, n=8)
    assert q.regime(q.largest_stable_rate)[-1] is Regime.AT_THE_LIMIT
    assert q.regime(q.largest_stable_rate * (1 + 1e-9))[-1] is Regime.DIVERGING
    assert q.regime(q.largest_stable_rate * (1 - 1e-9))[-1] is Regime.OSCILLATING
    assert str(Regime.AT_THE_LIMIT) == "at the limit" == Regime.AT_THE_LIMIT


# A step of the kernel in float64 rounds x and g a few times, relative to |x| and to |A||x| + |b|.
# 16 eps of these, times what later steps make of it (which a growing error bounds), leaves a factor
# of several in hand in n = 5.
def rounding(q, path, steps, growth):
    full = np.diag(q.A) if q.A.ndim == 1 else q.A
    size = np.abs(path).max() * (1 + np.linalg.norm(full, 2)) + np.linalg.norm(q.b)
    return 16 * EPS * steps * size * max(1.0, growth)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    diagonal=st.booleans(),
    share=st.floats(0.01, 1.1),
    momentum=st.sampled_from([0.0, 0.3, 0.9, 0.99]),
)
def test_predicted_error_is_the_simulated_one(seed, diagonal, share, momentum):
    q = random_quadratic(seed, diagonal=diagonal)
    lr, steps = share * q.stable_rates(momentum)[1], 60
    x0 = np.random.default_rng(seed + 1).standard_normal(5)
    path = q.simulate(x0, lr, steps, momentum)
    predicted = q.predicted_error(x0, lr, np.arange(steps + 1), momentum)
    growth = 1 / (1 - momentum) * max(1.0, q.contraction(lr, momentum)) ** steps
    np.testing.assert_allclose(
        path - q.minimiser, predicted, rtol=0, atol=rounding(q, path, steps, growth)
    )


@pytest.mark.parametrize("kind", [float, np.float32, np.array])
def test_whole_floats_are_numbers_of_steps(kind):
    q = Quadratic([1.0, 3.0])
    start = [1.0, 2.0]
    assert q.simulate(start, 0.1, kind(4.0)).shape == (5, 2)
    np.testing.assert_array_equal(
        q.predicted_error(start, 0.1, kind(4.0)), q.predicted_error(start, 0.1, 4)
    )
    np.testing.assert_array_equal(
        q.predicted_error(start, 0.1, np.linspace(0, 100, 11)),
        q.predicted_error(start, 0.1, range(0, 101, 10)),
    )
    for t in (4.5, [1.0, 4.5], True, "4"):
        with pytest.raises(TypeError, match=r"^t must be an int or an array of ints, got"):
            q.predicted_error(start, 0.1, t)


def test_predicted_error_where_the_two_roots_are_one():
    # At the optimum of a quadratic both extreme directions have a double root: no eigenvectors.
    q = Quadratic([1.0, 4.0, 9.0])
    lr, momentum, contraction = q.best_momentum
    x0, t = np.array([1.0, 1.0, 1.0]), np.arange(81)
    predicted = q.predicted_error(x0, lr, t, momentum)
    path = q.simulate(x0, lr, 80, momentum)
    np.testing.assert_allclose(predicted, path, rtol=0, atol=1e-13)
    # ~ t * r^t: the ratio tends to the contraction from above, and never gets below it.
    ratios = np.abs(predicted[60:, 0])[1:] / np.abs(predicted[60:, 0])[:-1]
    assert contraction < ratios.min() <= ratios.max() < contraction * 1.03


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_predicted_error_beyond_the_range_of_a_double_is_infinite(momentum):
    q = Quadratic([10.0, 1.0, 5.0])
    error = q.predicted_error([1.0, 1.0, 0.0], 0.5, 2000, momentum)
    assert abs(error[0]) == np.inf
    assert abs(error[1]) < 1e-40
    assert error[2] == 0
    extreme = Quadratic([1e-200, 1e200])
    assert extreme.best_contraction == 1.0


def test_predicted_error_takes_an_int_or_an_array_of_steps():
    q = random_quadratic(7)
    x0 = np.ones(5)
    many = q.predicted_error(x0, 0.01, [[0, 1], [10**6, 3]])
    assert many.shape == (2, 2, 5)
    np.testing.assert_array_equal(many[0, 1], q.predicted_error(x0, 0.01, 1))
    np.testing.assert_allclose(many[0, 0], x0 - q.minimiser, rtol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_contraction_is_the_rate_at_which_errors_fall(momentum):
    q = random_quadratic(8)
    lr = 0.7 * q.stable_rates(momentum)[1]
    e = [np.linalg.norm(q.predicted_error(np.ones(5), lr, t, momentum)) for t in (400, 600)]
    assert (e[1] / e[0]) ** (1 / 200) == pytest.approx(q.contraction(lr, momentum), rel=5e-3)


def test_best_rate_and_momentum_are_best_among_others():
    q = random_quadratic(9)
    assert q.contraction(q.best_rate) == pytest.approx(q.best_contraction)
    for other in (0.9, 1.1):
        assert q.contraction(q.best_rate * other) > q.best_contraction
    lr, momentum, contraction = q.best_momentum
    # A double root is known to the square root of a rounding.
    assert q.contraction(lr, momentum) == pytest.approx(contraction, abs=1e-7)
    for lr_share, mu_shift in ((0.9, 0), (1.1, 0), (1, 0.05), (1, -0.05)):
        assert q.contraction(lr * lr_share, momentum + mu_shift) > contraction + 1e-4


def test_quadratic_keeps_copies_that_cannot_be_written():
    a, b = np.array([1.0, 2.0]), np.array([3.0, 4.0])
    q = Quadratic(a, b)
    a[0] = b[0] = 100
    assert q.eigenvalues[0] == 1
    assert q.b[0] == 3
    for array in (q.A, q.b, q.eigenvalues, q.eigenvectors, q.minimiser):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize(
    ("a", "error", "message"),
    [
        ([[1.0, 2.0], [0.0, 1.0]], ValueError, "A must be symmetric, got A - A' up to 2"),
        ([[1.0, 2.0], [2.0, 1.0]], ValueError, "A must be positive definite.* -1"),
        ([[1.0, 1.0], [1.0, 1.0]], ValueError, "A must be positive definite"),
        ([1.0, -2.0], ValueError, "A must be positive definite.* -2"),
        ([1.0, 0.0], ValueError, "A must be positive definite.* 0"),
        ([[1.0, 2.0, 3.0]], ValueError, "A must be square"),
        ([], ValueError, r"A must have .* got shape \(0,\)"),
        (3.0, ValueError, r"A must have .* got shape \(\)"),
        ([np.nan, 1.0], ValueError, "A must be finite, got nan"),
        ([np.inf, 1.0], ValueError, "A must be finite, got inf"),
        ("matrix", TypeError, "A must be an array of real numbers"),
        ([1j], TypeError, r"A must be an array of real numbers, got \[1j\]"),
        ([[1.0], [1.0, 2.0]], TypeError, "A must be an array of real numbers"),
        (None, TypeError, "A must be"),
    ],
)
def test_quadratic_refuses_a_matrix_by_what_is_wrong(a, error, message):
    with pytest.raises(error, match=message):
        Quadratic(a)


def test_quadratic_takes_any_real_numbers():
    import ml_dtypes

    assert Quadratic(np.array([1, 2], ml_dtypes.bfloat16)).eigenvalues.tolist() == [1, 2]
    assert Quadratic(np.array([[3, 0], [0, 1]])).eigenvalues.tolist() == [1, 3]
    assert Quadratic([1e-12, 1.0]).condition_number == 1e12  # a diagonal is exact


def test_quadratic_forgives_rounding_alone():
    matrix = np.array([[2.0, 1.0], [1.0 + 1e-12, 3.0]])
    made = Quadratic(matrix).A
    assert made[0, 1] == made[1, 0]
    matrix[1, 0] = 1 + 1e-6
    with pytest.raises(ValueError, match="A must be symmetric, got A - A' up to 1e-06"):
        Quadratic(matrix)


def test_quadratic_refuses_other_arguments_by_name():
    for b, error in (([1.0], ValueError), ([[1.0, 2.0]], ValueError), ([1.0, np.nan], ValueError),
                     ("ab", TypeError)):  # fmt: skip
        with pytest.raises(error, match=r"^b must"):
            Quadratic([1.0, 2.0], b)
    for c, error in ((np.nan, ValueError), ("c", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"^c must"):
            Quadratic([1.0, 2.0], c=c)
    q = Quadratic([1.0, 2.0])
    for lr, error in ((0.0, ValueError), (-1, ValueError), (np.nan, ValueError),
                      (np.inf, ValueError), ("1", TypeError), (None, TypeError)):  # fmt: skip
        for call in (q.regime, q.contraction, q.is_stable):
            with pytest.raises(error, match=r"^lr must"):
                call(lr)
        with pytest.raises(error, match=r"^lr must"):
            q.simulate([1.0, 1.0], lr, 3)
    for momentum in (1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"^momentum must"):
            q.regime(0.1, momentum)
        with pytest.raises(ValueError, match=r"^momentum must"):
            q.stable_rates(momentum)
    with pytest.raises(ValueError, match=r"^x0 must"):
        q.predicted_error([1.0], 0.1, 3)
    with pytest.raises(TypeError, match=r"^t must"):
        q.predicted_error([1.0, 1.0], 0.1, 1.5)
    with pytest.raises(ValueError, match=r"^t must"):
        q.predicted_error([1.0, 1.0], 0.1, -1)
    with pytest.raises(ValueError, match=r"^t must be from 0 to 2\^53"):
        q.predicted_error([1.0, 1.0], 0.1, 2**60)
    for t in ([[1], [2, 3]], [1.5], 10**20):
        with pytest.raises((TypeError, ValueError), match=r"^t must"):
            q.predicted_error([1.0, 1.0], 0.1, t)
    for x in ("ab", [1j, 2], [None, 2], [[1], [2, 3]]):
        with pytest.raises(TypeError, match=r"^x must be an array of real numbers"):
            q.gradient(x)
    with pytest.raises(ValueError, match=r"^steps must"):
        q.simulate([1.0, 1.0], 0.1, -1)
    with pytest.raises(ValueError, match=r"^x must"):
        q.value([1.0, 2.0, 3.0])
