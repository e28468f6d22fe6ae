"""The learning-rate range test finds the edge, and leaves nothing changed."""

import copy

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from fusedstep.convergence import lr_range_test
from fusedstep.schedules import Cosine, ReduceOnPlateau


def parabola(opt, x, curvature=4.0):
    """A training step on curvature/2 * |x|^2."""

    def step(lr):
        opt.param_groups[0]["lr"] = lr
        loss = 0.5 * curvature * float(x @ x)
        opt.step(curvature * x)
        return loss

    return step


def test_range_test_diverges_beyond_the_largest_stable_rate():
    x = np.array([1.0, -2.0])
    found = lr_range_test(parabola(fs.SGD(x), x), x, start=1e-4, end=100.0, steps=200)
    assert 2 / 4 < found.divergence < 2 / 4 * 1.3
    assert 1e-4 < found.steepest < 2 / 4
    assert found.lrs.size == found.losses.size == found.smoothed.size < 200
    assert found.divergence < found.lrs[-1]


@pytest.mark.parametrize("start", [1e-7, 1e-4, 1e-2])
def test_range_test_under_noise_ends_near_the_largest_stable_rate(start):
    scale = np.linspace(0.1, 10, 50)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal(50)
        opt = fs.SGD(x, lr=0.1)

        def step(lr, rng=rng, x=x, opt=opt):
            opt.param_groups[0]["lr"] = lr
            loss = 0.5 * float(scale @ x**2)
            opt.step(scale * (x + 0.3 * rng.standard_normal(50)))
            return loss

        found = lr_range_test(step, opt, start=start, end=100.0, steps=150)
        assert 0.2 / 3 < found.divergence < 0.2 * 1.3  # 2/lambda_max = 0.2
        assert found.steepest < found.divergence


def test_range_test_sweeps_exponentially_from_start_to_end():
    tried = []
    found = lr_range_test(lambda lr: tried.append(lr) or 1.0, np.ones(1), start=0.01, end=1.0,
                          steps=5)  # fmt: skip
    np.testing.assert_allclose(tried, 0.01 * 100 ** (np.arange(5) / 4), rtol=1e-15)
    assert (tried[0], tried[-1]) == (0.01, 1.0)
    assert found.steepest is None
    for value in (0.3, 7.0, 1e-9, -2.0):  # no rounding makes a fall of it
        flat = lr_range_test(lambda lr, value=value: value, np.ones(1), steps=100)
        assert flat.steepest is None
        np.testing.assert_array_equal(flat.smoothed, value)
    for n in range(3, 60):  # a power need not end where it should
        assert (
            lr_range_test(lambda lr: 1.0, np.ones(1), start=3e-7, end=0.7, steps=n).lrs[-1] == 0.7
        )
    np.testing.assert_array_equal(found.lrs, tried)
    np.testing.assert_allclose(found.smoothed, 1.0, rtol=1e-15)
    assert found.divergence is None


def test_range_test_steepest_does_not_lag_as_its_running_average_does():
    # Falls fastest against log lr at 0.095, and blows up beyond 1.
    def loss(lr):
        return 1 / (1 + lr / 0.095) + 0.02 * max(lr - 1, 0) ** 2

    found = lr_range_test(loss, np.ones(1), start=1e-4, end=100.0, steps=160, smoothing=0.9)
    raw = found.lrs[1:][np.diff(found.losses).argmin()]
    assert raw == pytest.approx(0.095, rel=0.1)
    assert found.steepest == pytest.approx(0.095, rel=0.1)
    # The average of those before, by itself, falls fastest at twice that rate.
    average, weight, averages = 0.0, 0.0, []
    for one in found.losses:
        average, weight = 0.9 * average + 0.1 * one, 0.9 * weight + 0.1
        averages.append(average / weight)
    assert 0.15 <= found.lrs[1:][np.diff(averages).argmin()] < found.divergence


@pytest.mark.parametrize(
    ("losses", "turn"),
    [
        ([5.0, 4.0, 3.0, 2.0, 100.0], 4),  # at once
        ([5.0, 4.0, 3.0, 1.0, 2.0, 2.5, 4.0, 9.0], 5),  # 2 is not above the mean of 4, 3, 1
        ([5.0, 9.0, 3.0, 1.0, 4.0, 2.5, 4.0, 9.0], 6),  # nor 2.5 above that of 3, 1, 4
        ([1.0, 2.0, 3.0, 4.0, 5.0], 1),  # rises from the start
        ([3.0, 9.0, 2.0, 2.0, 50.0], 4),  # a spike before is none
        ([np.nan], 0),
        ([2.0, np.inf], 1),
        ([1e308, 1e308, 1e308, np.inf], 3),
    ],
)
def test_range_test_finds_where_the_loss_turns(losses, turn):
    given = iter(losses)
    found = lr_range_test(lambda lr: next(given), np.ones(1), start=1.0, end=10.0,
                          steps=max(len(losses), 2), smoothing=0.0)  # fmt: skip
    assert found.losses.size == len(losses)
    assert found.divergence == found.lrs[turn]


def test_range_test_takes_rates_of_any_span():
    wide = lr_range_test(lambda lr: 1.0, np.ones(1), start=1e-200, end=1e200, steps=5)
    np.testing.assert_allclose(wide.lrs, [1e-200, 1e-100, 1, 1e100, 1e200])
    near = lr_range_test(lambda lr: -lr, np.ones(1), start=1.0, end=np.nextafter(1, 2), steps=5)
    assert near.lrs[-1] > 1


def test_range_test_smooths_without_bias():
    losses = iter([4.0, 2.0, 3.0, 1.0])
    found = lr_range_test(lambda lr: next(losses), np.ones(1), steps=4, smoothing=0.5)
    average, weight = 0.0, 0.0
    for loss, smooth in zip([4.0, 2.0, 3.0, 1.0], found.smoothed, strict=True):
        average, weight = 0.5 * average + 0.5 * loss, 0.5 * weight + 0.5
        assert smooth == pytest.approx(average / weight, rel=1e-15)


def test_range_test_finds_the_steepest_fall_and_stops_where_told():
    losses = [5.0, 5.0, 5.0, 3.0, 1.0, 1.0, 1.0, 1.9, 2.1, 9.0]
    given = iter(losses)
    found = lr_range_test(lambda lr: next(given), np.ones(1), start=1.0, end=1e9, steps=10,
                          smoothing=0.0, stop=2.0)  # fmt: skip
    assert found.steepest == pytest.approx(1e3)
    assert found.divergence == pytest.approx(1e7)  # stopped at 1e8, but risen from here on
    assert found.losses.tolist() == losses[:9]


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("blows_up", [False, True])
@pytest.mark.parametrize(("center", "width"), [(0.095, 0.2), (0.095, 1.0), (0.7, 0.5)])
def test_range_test_steepest_does_not_lag(smoothing, blows_up, center, width):
    def loss(lr):
        fall = 2 / (1 + np.exp(-np.log(lr / center) / width))
        return 2.3 - fall + (100 * (lr - 8) if blows_up and lr > 8 else 0)

    found = lr_range_test(loss, np.ones(1), start=1e-4, end=30.0, steps=150, smoothing=smoothing)
    assert (found.divergence is not None) == blows_up
    assert abs(np.log(found.steepest / center)) < 1.05 * np.log(found.lrs[1] / found.lrs[0])


def test_range_test_steepest_is_no_accident_of_the_first_losses():
    for seed in range(10):  # of which a running average holds one, then two
        noise = 0.1 * np.random.default_rng(seed).standard_normal(150)
        losses = iter(2.3 - 2 / (1 + (0.095 / np.geomspace(1e-4, 30.0, 150))) + noise)
        found = lr_range_test(lambda lr, it=losses: next(it), np.ones(1), start=1e-4, end=30.0,
                              steps=150, stop=100)  # fmt: skip
        assert 0.03 < found.steepest < 0.3


def test_range_test_shows_itself_in_three_lines():
    x = np.array([1.0, -2.0])
    found = lr_range_test(parabola(fs.SGD(x), x), x, start=1e-4, end=100.0, steps=200)
    first, second, third = repr(found).split("\n")
    assert first == (f"RangeTest of {found.lrs.size} rates, 0.0001 to {found.lrs[-1]:.3g}, "
                     f"of losses 10 to {found.losses[-1]:.3g}")  # fmt: skip
    assert second.split()[:2] == ["steepest", f"{found.steepest:.2g}"]
    assert third.split()[:2] == ["divergence", f"{found.divergence:.2g}"]
    assert repr(lr_range_test(lambda lr: np.nan, x)).split("\n")[1:] == [
        "  steepest    none  the loss never falls", "  divergence  1e-07  from where on it blew up"
    ]  # fmt: skip


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_range_test_stops_at_a_loss_that_is_no_number(bad):
    given = iter([2.0, 1.0, bad, 5.0])
    found = lr_range_test(lambda lr: next(given), np.ones(1), start=1.0, end=1e3, steps=4)
    assert found.divergence == pytest.approx(100)
    assert found.losses.size == 3
    assert np.isfinite(found.steepest)


def test_range_test_takes_losses_below_zero():
    given = iter([-1.0, -2.0, -2.5, -2.4, 1.0, 6.0])
    found = lr_range_test(lambda lr: next(given), np.ones(1), steps=6, smoothing=0.0, stop=3.0)
    assert found.losses[-1] == 6.0  # more than 2 * 2.5 above the lowest


def same(a, b):
    """Whether two nested states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


@pytest.mark.parametrize("name", ["SGD", "Adam", "Adagrad", "Rprop", "ASGD"])
@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_range_test_puts_an_optimizer_back(name, before, fails):
    hypers = {"SGD": {"momentum": 0.9}, "Adagrad": {"initial_accumulator_value": 0.5}}
    params = {"a": np.array([1.0, -0.0, 3.0], np.float32), "b": np.array([[2.0]], np.float32)}
    grads = {key: np.ones_like(p) for key, p in params.items()}
    lr = Cosine(0.1, 10)
    opt = getattr(fs, name)(params, lr=lr, groups=[fs.Group("b", lr=0.2)], **hypers.get(name, {}))
    for _ in range(before):
        opt.step(grads)
    values, state = copy.deepcopy(params), copy.deepcopy(opt.state_dict())
    count = iter(range(100))

    def step(lr):
        for group in opt.param_groups:
            group["lr"] = lr
        opt.step(grads)
        if fails and next(count) == 4:
            raise KeyError("in the middle")
        return 1.0

    if fails:
        with pytest.raises(KeyError, match="in the middle"):
            lr_range_test(step, opt)
    else:
        lr_range_test(step, opt, steps=9)
    assert same(params, values)
    assert same(opt.state_dict(), state)
    assert opt.param_groups[0]["lr"] is lr
    assert opt.param_groups[1]["lr"] == 0.2
    # And it goes on as one that was never tested.
    other = getattr(fs, name)(values, lr=lr, groups=[fs.Group("b", lr=0.2)], **hypers.get(name, {}))
    other.load_state_dict(state)
    for each in (opt, other):
        each.step(grads)
    assert same(params, values)


@pytest.mark.parametrize("library", [torch.optim, ft])
@pytest.mark.parametrize("before", [0, 2])
def test_range_test_puts_torch_back(library, before):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1)
    )
    inputs = torch.randn(16, 4)
    opt = library.AdamW(model.parameters(), lr=0.01)

    def step(lr):
        opt.param_groups[0]["lr"] = lr
        opt.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        opt.step()
        return loss

    for _ in range(before):
        step(0.01)
    held = copy.deepcopy((model.state_dict(), opt.state_dict()))
    found = lr_range_test(step, {"model": model, "optimizer": opt}, steps=12)
    assert found.losses.size == 12
    assert same((model.state_dict(), opt.state_dict()), held)


@pytest.mark.parametrize("library", [torch.optim, ft])
@pytest.mark.parametrize("name", ["NAdam", "AdamW", "SGD", "ASGD"])
@pytest.mark.parametrize("before", [0, 2])
def test_range_test_leaves_torch_s_very_objects(library, name, before):
    p = torch.nn.Parameter(torch.tensor([1.0, -0.0, float("nan")]))
    rate = torch.tensor(0.25) if name == "AdamW" else 0.25
    opt = getattr(library, name)([p], lr=rate, **({"momentum": 0.9} if name == "SGD" else {}))

    def step(lr):
        p.grad = torch.ones(3)
        for group in opt.param_groups:
            group["lr"] = lr
        if name == "AdamW":
            rate.fill_(lr)
        opt.step()
        return 1.0

    def held():
        entry = opt.state.get(p, {})
        objects = [opt.param_groups[0], opt.param_groups[0]["lr"], p.grad, *entry.values()]
        values = [p.detach().numpy().tobytes(), float(rate), str(opt.param_groups[0]["lr"])]
        tensors = [v for v in entry.values() if isinstance(v, torch.Tensor)]
        return [*map(id, objects)], [*values, *(t.numpy().tobytes() for t in tensors)], objects

    for _ in range(before):
        step(0.25)
        opt.param_groups[0]["lr"] = rate
        if name == "AdamW":
            rate.fill_(0.25)
    now = held()
    lr_range_test(step, opt, steps=5)
    after = held()
    assert after[:2] == now[:2]


@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Adam"])
def test_range_test_puts_neutral_optimizers_over_tensors_back_in_full_precision(name):
    tensors = {"a": torch.ones(3), "b": torch.ones(2)}
    grads = {key: torch.full_like(t, 0.3) for key, t in tensors.items()}
    opt = getattr(fs, name)(tensors)
    for _ in range(3):
        opt.step(grads)
    clocks, state = opt._table.clocks(), {k: id(a) for k, a in opt.state["a"].items()}

    def step(lr):
        opt.step(grads)
        return 1.0

    lr_range_test(step, opt, steps=4)
    assert opt._table.clocks() == clocks
    assert {k: id(a) for k, a in opt.state["a"].items()} == state
    assert opt.steps == 3


def test_range_test_puts_memory_back_that_was_swapped():
    model = torch.nn.Linear(2, 1)
    before = [p.detach().clone() for p in model.parameters()]
    places = [p.data_ptr() for p in model.parameters()]
    model(torch.ones(2)).backward()
    grads = [p.grad.clone() for p in model.parameters()]

    def step(lr):
        for p in model.parameters():
            p.grad.mul_(2)
            p.data = p.data - lr
        model.double()
        return 1.0

    lr_range_test(step, model, steps=3)
    for p, value, place, grad in zip(model.parameters(), before, places, grads, strict=True):
        assert p.dtype == torch.float32
        assert torch.equal(p, value)
        assert p.data_ptr() == place
        assert torch.equal(p.grad, grad)


def test_range_test_puts_back_what_it_can_beside_an_expanded_buffer():
    model = torch.nn.Linear(2, 1)
    model.register_buffer("positions", torch.zeros(1, 3).expand(4, 3))
    opt = torch.optim.SGD(model.parameters(), lr=0.5)

    def step(lr):
        opt.param_groups[0]["lr"] = lr
        return 1.0

    lr_range_test(step, [model, opt], steps=3)
    assert opt.param_groups[0]["lr"] == 0.5


def test_range_test_puts_lists_in_states_back():
    def make():
        p = torch.nn.Parameter(torch.ones(3))
        return p, torch.optim.LBFGS([p], lr=0.1, max_iter=2)

    def step(p, opt):
        def loss():
            opt.zero_grad()
            value = (torch.arange(1.0, 4.0) * p**4).sum()
            value.backward()
            return value

        return opt.step(loss)

    (p, tested), (q, twin) = make(), make()
    for one in ((p, tested), (q, twin)):
        step(*one)
        step(*one)
    lr_range_test(lambda lr: step(p, tested), tested, steps=4)
    for one in ((p, tested), (q, twin)):
        step(*one)
    assert torch.equal(p, q)


def test_range_test_puts_schedules_with_a_state_back():
    plateau = ReduceOnPlateau(0.5, patience=0)
    plateau.step(1.0)
    opt = fs.SGD(np.ones(2), lr=plateau * 2)

    def step(lr):
        plateau.step(lr)
        return 1.0

    lr_range_test(step, opt, steps=5)
    assert plateau.progress == (0.5, 1.0, 0, 0)


def test_range_test_puts_buffers_back_that_the_module_replaces():
    class Averaging(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("average", torch.zeros(2))
            self.register_buffer("late", None)

        def forward(self):
            self.average = self.average + self.weight.detach()
            self.late = self.weight.detach() * 2
            return self.weight.sum()

    model = Averaging()
    average, weight = model.average, model.weight
    lr_range_test(lambda lr: model(), model, steps=3)
    assert model.average is average
    assert model.average.tolist() == [0, 0]
    assert model.late is None
    lr_range_test(lambda lr: float(weight.data.add_(1).sum()), model.parameters(), steps=3)
    assert weight.tolist() == [1, 1]


@pytest.mark.parametrize("form", ["buffer", "list", "dict", "tensor"])
def test_range_test_puts_arrays_of_every_form_back(form):
    params = {
        "buffer": fs.FlatBuffer.pack([np.arange(3.0)]),
        "list": [np.arange(3.0), [torch.arange(3.0)]],
        "dict": {"x": np.arange(3.0)},
        "tensor": torch.arange(3.0, requires_grad=True),
    }[form]

    def arrays(thing):
        if isinstance(thing, fs.FlatBuffer | dict):
            return list(thing.values())
        if isinstance(thing, list):
            return [thing[0], thing[1][0]]
        return [thing]

    def step(lr):
        with torch.no_grad():
            for array in arrays(params):
                array += lr
        return 1.0

    lr_range_test(step, params, steps=3)
    for array in arrays(params):
        np.testing.assert_array_equal(np.asarray(array.detach() if form == "tensor" else array),
                                      np.arange(3.0))  # fmt: skip


def test_range_test_plot_shows_the_losses_and_both_points():
    x = np.array([1.0, -2.0])
    found = lr_range_test(parabola(fs.SGD(x), x), x, start=1e-4, end=100.0, steps=60)
    ax = found.plot()
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), found.lrs)
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), found.smoothed)
    assert [line.get_xdata()[0] for line in ax.lines[2:]] == [found.steepest, found.divergence]
    assert ax.get_xscale() == "log"
    assert found.plot(ax) is ax
    with pytest.raises(TypeError, match="ax must be matplotlib Axes, got 3"):
        found.plot(3)


def test_range_test_refuses_by_name_before_it_steps():
    x = np.ones(2)

    def step(lr):
        raise AssertionError("stepped")

    for name, values in {
        "start": (0.0, -1.0, np.nan, "a", np.inf), "end": (0.0, np.inf, None),
        "steps": (1, 2.5, True), "smoothing": (1.0, -0.1, np.nan), "stop": (1.0, np.inf, "b"),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
                lr_range_test(step, x, **{name: value})
    with pytest.raises(ValueError, match="start must be < end"):
        lr_range_test(step, x, start=1.0, end=0.5)
    with pytest.raises(TypeError, match="step_fn must be callable"):
        lr_range_test(None, x)
    with pytest.raises(TypeError, match="params must be"):
        lr_range_test(step, "model")
    for nothing in ([], {}, (), np.ones(0)):
        with pytest.raises(ValueError, match="params must have something to put back"):
            lr_range_test(step, nothing)
    frozen = np.ones(2)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[1\] must be writable"):
        lr_range_test(step, [x, frozen])
    for loss in (None, "low", [1.0, 2.0]):
        with pytest.raises(TypeError, match=r"^step_fn\(lr\) must be a number or NaN, got"):
            lr_range_test(lambda lr, loss=loss: loss, x)
