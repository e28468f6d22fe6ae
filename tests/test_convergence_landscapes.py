"""Landscapes are what they say, and trajectories are the optimizers' own steps."""

import pickle
import sys
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import pyplot

import fusedstep as fs
from fusedstep.convergence import Quadratic, landscapes, trajectory

each = pytest.mark.parametrize("land", landscapes.ALL, ids=lambda land: land.name)


@pytest.fixture(autouse=True)
def no_figure_stays():
    """pyplot keeps the figures that are made without axes of the caller's, and warns of many."""
    yield
    pyplot.close("all")


def test_landscapes_are_all_there():
    assert len({land.name for land in landscapes.ALL}) == len(landscapes.ALL) == 6


@each
def test_landscape_gradient_is_the_slope_of_its_value(land):
    x = np.random.default_rng(0).uniform(-1.5, 1.5, (40, 2))
    h = 1e-6
    slopes = [(land(x + h * e) - land(x - h * e)) / (2 * h) for e in np.eye(2)]
    # h^2 f''' of truncation and eps f / h of rounding, for values up to some 1e3.
    np.testing.assert_allclose(land.gradient(x), np.stack(slopes, -1), rtol=1e-6, atol=1e-6)


@each
def test_landscape_minima_are_minima_the_lowest_first_and_in_the_window(land):
    values = [land.value(point) for point in land.minima]
    assert values == sorted(values)
    around = 0.05 * np.random.default_rng(1).standard_normal((100, 2))
    for point, value in zip(land.minima, values, strict=True):
        assert np.abs(land.gradient(point)).max() < 1e-12
        assert (land.value(around + point) > value).all()
    for x, y in (*land.minima, land.start):
        assert land.xlim[0] < x < land.xlim[1]
        assert land.ylim[0] < y < land.ylim[1]
    x, y = np.linspace(*land.xlim, 101), np.linspace(*land.ylim, 101)
    assert land.value(np.stack(np.meshgrid(x, y), -1)).min() >= values[0] - 1e-12


@each
def test_landscape_takes_one_point_or_many(land):
    many = np.random.default_rng(2).uniform(-1, 1, (3, 4, 2))
    assert land.value(many).shape == (3, 4)
    assert land.gradient(many).shape == (3, 4, 2)
    assert isinstance(land.value(many[1, 2]), float)
    assert land.value(many)[1, 2] == pytest.approx(land.value(list(many[1, 2])), rel=1e-14)
    with pytest.raises(ValueError, match="x must have shape"):
        land.value([1.0, 2.0, 3.0])


def test_landscape_values_that_are_known():
    assert landscapes.ravine(8.0).value([2.0, 1.0]) == 6
    assert landscapes.saddle().value([0.0, 1.0]) == -0.25
    assert landscapes.saddle().gradient([0.0, 0.0]).tolist() == [0, 0]
    assert landscapes.two_minima().value([-1.0, 0.0]) == pytest.approx(-23 / 60)
    assert landscapes.two_minima().value([1.0, 0.0]) == pytest.approx(-7 / 60)
    assert landscapes.rosenbrock().value([-1.2, 1.0]) == pytest.approx(24.2)
    assert landscapes.rosenbrock(a=2, b=1).minima == ((2.0, 4.0),)
    assert landscapes.beale().value([1.0, 1.0]) == pytest.approx(14.203125)
    far = landscapes.plateau()
    assert np.linalg.norm(far.gradient(far.start)) < 0.006


def test_landscape_arguments_are_refused_by_name():
    for value in (0.0, -1.0, np.nan, "a"):
        with pytest.raises((TypeError, ValueError), match=r"^condition must be"):
            landscapes.ravine(value)
        with pytest.raises((TypeError, ValueError), match=r"^b must be"):
            landscapes.rosenbrock(b=value)
    with pytest.raises(ValueError, match=r"^a must be"):
        landscapes.rosenbrock(a=np.inf)


@each
def test_trajectory_is_the_optimizer_on_the_gradient(land):
    path = trajectory(lambda x: fs.Adam(x, lr=0.05), land, land.start, 30)
    x = np.array(land.start)
    opt = fs.Adam(x, lr=0.05)
    for point in path:
        np.testing.assert_array_equal(point, x)
        opt.step(land.gradient(x))
    assert path.shape == (31, 2)
    assert path.dtype == np.float64


def test_trajectory_goes_on_with_an_optimizer_that_is_given():
    land = landscapes.rosenbrock()
    x = np.zeros(2, np.float32)
    opt = fs.SGD({"x": x}, lr=1e-3, momentum=0.9)
    first = trajectory(opt, land, land.start, 5)
    assert opt.steps == 5
    np.testing.assert_array_equal(first[-1], x)
    assert first[0].tolist() == [np.float32(-1.2), 1]
    second = trajectory(opt, land, (0.5, 0.5), 5)
    assert opt.steps == 10
    assert second[0].tolist() == [0.5, 0.5]


def test_trajectory_takes_a_quadratic_of_any_dimension_and_no_steps():
    q = Quadratic(np.arange(1.0, 6.0))
    make = partial(fs.SGD, lr=0.1)
    assert trajectory(make, q, np.ones(5), 0).tolist() == [[1.0] * 5]
    np.testing.assert_array_equal(
        trajectory(make, q, np.ones(5), 7), q.simulate(np.ones(5), 0.1, 7)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([land for land in landscapes.ALL if land.name != "Beale"]),
    st.floats(5e-4, 1e-3),
    st.floats(0.3, 0.95),
)
def test_nesterov_in_both_forms_is_one_method(land, lr, momentum):
    # y_t = p_t - lr*mu*v_t: the torch form's parameters are the original's look-ahead points.
    steps = 25
    torch_form = trajectory(
        partial(fs.SGD, lr=lr, momentum=momentum, nesterov=True), land, land.start, steps
    )
    make = partial(fs.SGD, lr=lr, momentum=momentum)
    original = trajectory(make, land, land.start, steps, lookahead=True)
    looked = original[1:] + momentum * np.diff(original, axis=0)  # p moves by -lr*v
    # Both round each step alike, to a few eps of what moves; the slopes that carry a difference on
    # grow it by 1 + lr*|f''| a step, below 1.9 for |f''| < 900.
    np.testing.assert_allclose(torch_form[1:], looked, rtol=0, atol=1e-11)
    plain = trajectory(make, land, land.start, steps)
    assert np.abs(plain - original).max() > 1e-10


def test_trajectory_refuses_by_name():
    land = landscapes.saddle()
    make = partial(fs.SGD, lr=0.1)
    for arguments, error, message in (
        ((make, 3, (1, 1), 5), TypeError, "landscape must have a method gradient"),
        ((3, land, (1, 1), 5), TypeError, "opt must be an optimizer or make one"),
        ((lambda x: x, land, (1, 1), 5), TypeError, "opt must make a fusedstep optimizer"),
        ((make, land, (1, np.nan), 5), ValueError, "start must be finite"),
        ((make, land, (), 5), ValueError, "start must have"),
        ((make, land, "ab", 5), TypeError, "start must be"),
        ((make, land, (1, 1, 1), 5), ValueError, "start must be a point of the landscape: x must"),
        (
            (lambda x: fs.SGD(x.copy()), land, (1, 1), 5),
            ValueError,
            "opt must make an optimizer of",
        ),
        ((make, land, (1, 1), -5), ValueError, "steps must be an integer from 0 to .*, got -5"),
        ((make, land, (1, 1), 2.5), TypeError, "steps must be an integer >= 0, got 2.5"),
        ((make, land, (1, 1), True), TypeError, "steps must be"),
    ):
        with pytest.raises(error, match=message):
            trajectory(*arguments)
    slope = type("Slope", (), {"gradient": staticmethod(lambda x: x.sum())})
    with pytest.raises(
        ValueError, match=r"^landscape.gradient\(start\) must have start's shape \(2,"
    ):
        trajectory(make, slope, (1, 1), 5)
    x = np.ones(3)
    with pytest.raises(ValueError, match="opt must have one parameter of shape"):
        trajectory(fs.SGD(x), land, (2, 2), 1)
    assert x.tolist() == [1, 1, 1]
    with pytest.raises(TypeError, match="opt must be SGD with momentum for lookahead, got Adam"):
        trajectory(fs.Adam, land, (1, 1), 1, lookahead=True)
    with pytest.raises(TypeError, match="lookahead must be"):
        trajectory(make, land, (1, 1), 1, lookahead=1)
    y = np.array([5.0, 5.0])
    with pytest.raises(ValueError, match="lookahead needs momentum > 0"):
        trajectory(fs.SGD(y, lr=0.1), land, (1, 1), 1, lookahead=True)
    assert y.tolist() == [5, 5]
    for opt in (fs.Adam(y), fs.SGD(y, momentum=0.9, nesterov=True)):
        with pytest.raises((TypeError, ValueError), match="lookahead"):
            trajectory(opt, land, (1, 1), 1, lookahead=True)
        assert y.tolist() == [5, 5]


# -- pictures --------------------------------------------------------------------------------------


def paths(land, steps=3):
    made = (partial(fs.SGD, lr=0.01), partial(fs.SGD, lr=0.01, momentum=0.9), fs.Adam)
    return [trajectory(make, land, land.start, steps) for make in made]


@each
def test_landscape_plot_shows_its_window_and_minima(land):
    ax = land.plot()
    assert (ax.get_xlim(), ax.get_ylim()) == (land.xlim, land.ylim)
    assert [tuple(point) for point in ax.lines[0].get_xydata()] == list(land.minima)
    assert ax.collections
    assert land.plot(ax) is ax
    with pytest.raises(TypeError, match="ax must be matplotlib Axes, got 3"):
        land.plot(3)


def covered(ax, value):
    """The levels of a picture, which rise, ever further apart, over all values in its window."""
    levels = ax.collections[0].levels
    x, y = np.linspace(*ax.get_xlim(), 121), np.linspace(*ax.get_ylim(), 121)
    values = np.array([[value(np.array([one, other])) for one in x] for other in y])
    steps = np.diff(levels)
    assert len(levels) > 10
    assert (steps > 0).all()
    assert (np.diff(steps) > 0).all()
    # Two grids, of which neither need have the lowest point.
    np.testing.assert_allclose(levels[[0, -1]], [values.min(), values.max()], atol=steps[0])
    return levels


@each
def test_level_lines_are_closer_where_it_is_low_and_leave_nothing_out(land):
    covered(land.plot(), land.value)


def test_level_lines_are_of_the_window_that_is_drawn():
    land = landscapes.ravine()
    near, far = land.plot(), trajectory(partial(fs.SGD, lr=0.01), land, (5.0, 4.0), 3).plot()
    assert far.get_ylim()[1] > 4 > near.get_ylim()[1]
    assert covered(far, land.value)[-1] > 2 * covered(near, land.value)[-1]

    class Own:  # of one point at a time, and below zero
        def value(self, x):
            return x[0] ** 2 + x[1] ** 2 - 3

        def gradient(self, x):
            return 2 * x

    ax = trajectory(partial(fs.SGD, lr=0.1), Own(), (1, 2), 5).plot()
    assert covered(ax, Own().value)[0] < -2.5


def test_trajectories_plot_on_one_landscape_by_name():
    first, *others = paths(landscapes.ravine())
    ax, chained = first.plot(others=others), first.plot()
    levels = len(chained.collections)
    for other in others:
        assert other.plot(chained) is chained
    assert len(chained.collections) == levels  # which are drawn once
    for one in (ax, chained):
        drawn = one.lines[1:]  # after the minimum
        assert [line.get_label() for line in drawn] == [
            "SGD, lr 0.01", "SGD, lr 0.01, momentum 0.9", "Adam, lr 0.001"
        ]  # fmt: skip
        assert len({line.get_color() for line in drawn}) == 3
        for line, path in zip(drawn, (first, *others), strict=True):
            np.testing.assert_array_equal(line.get_xydata(), path)
    assert first.plot(label="mine", color="k").lines[-1].get_label() == "mine"


def test_trajectories_plot_where_they_start_and_what_diverges():
    land = landscapes.ravine()
    path = trajectory(partial(fs.SGD, lr=5.0), land, (5.0, 1.0), 100)  # to 1e239
    ax = path.plot()
    assert ax.get_xlim()[0] == land.xlim[0]
    assert 5 < ax.get_xlim()[1] < 8
    ax.figure.canvas.draw()
    own = type("Own", (), {"gradient": lambda _, x: 2 * x, "value": lambda _, x: x[0] ** 2 + x[1]})
    assert trajectory(partial(fs.SGD, lr=0.1), own(), (1, 2), 5).plot().collections
    q = Quadratic([3.0, 1.0])
    assert q.simulate([5.0, 1.0], 0.1, 5).plot().lines[0].get_xydata().tolist() == [[0, 0]]


def test_trajectory_is_an_array():
    path = paths(landscapes.saddle())[0]
    assert isinstance(path, np.ndarray)
    assert path[1:].label == path.label
    for computed in (path + 1, np.diff(path, axis=0), np.abs(path), path.mean(0)):
        assert type(computed) is np.ndarray
    assert type(path.max()) is np.float64
    assert repr(path) == repr(np.asarray(path))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(path)), path)


def test_trajectory_animates_to_a_gif(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="matplotlib has it")
    first, *others = paths(landscapes.plateau())
    file = first.animate(tmp_path / "film.gif", others=others[:1], fps=5)
    with image.open(file) as film:
        assert (film.n_frames, film.info["duration"]) == (4, 200)


def test_pictures_refuse_by_name_and_write_nothing(tmp_path, monkeypatch):
    path = paths(landscapes.ravine(), 1)[0]
    line = trajectory(partial(fs.SGD, lr=0.1), Quadratic([1.0]), [1.0], 2)
    monkeypatch.setattr("matplotlib.animation.FFMpegWriter.isAvailable", lambda: False)
    for call, error, message in (
        (lambda: path.plot(3), TypeError, "ax must be matplotlib Axes, got 3"),
        (lambda: line.plot(), ValueError, r"trajectory must have shape \(steps \+ 1, 2\)"),
        (lambda: path.plot(others=[path, 3]), TypeError, r"others\[1\] must be a trajectory, got"),
        (lambda: path.plot(others=path), TypeError, "others must be a sequence of trajectories"),
        (lambda: path.animate(3), TypeError, "path must be a path, got 3"),
        (lambda: path.animate("a.avi"), ValueError, "path must end in .gif or .mp4, got 'a.avi'"),
        (lambda: path.animate("no/a.gif"), FileNotFoundError, "path must be in a folder that"),
        (lambda: path.animate(tmp_path / "a.gif", fps=0), ValueError, "fps must be an integer"),
        (lambda: path.animate(tmp_path / "a.mp4"), RuntimeError, "where ffmpeg is not installed"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert not list(tmp_path.iterdir())
    for module, call in (("pyplot", path.plot), ("animation", partial(path.animate, "a.gif"))):
        monkeypatch.setitem(sys.modules, f"matplotlib.{module}", None)
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'fusedstep\[plot\]'"):
            call()
