"""Curvature and safe rates: against known spectra, dense computations, and what training does."""

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from fusedstep.convergence import curvature, safe_lr
from fusedstep.schedules import Linear

SPECTRA = {
    "spread": np.linspace(-5.0, 10.0, 120),
    "clustered": np.concatenate([np.full(60, 1.0), np.full(40, 1e-9)]),
    "logarithmic": np.logspace(-6, 2, 150),
    "negative": -np.linspace(1.0, 2.0, 60),
    "small": np.array([3.0, -1.0, 0.5]),
    "one": np.array([4.0]),
}


def turned(values, seed=0):
    """A symmetric matrix of these eigenvalues."""
    n = len(values)
    basis = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return (basis * values) @ basis.T


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_curvature_lies_within_its_error_of_the_truth(name, dtype):
    values = SPECTRA[name]
    matrix = turned(values)
    x = np.random.default_rng(1).standard_normal(values.size).astype(dtype)
    found = curvature(lambda x: (matrix @ x).astype(dtype), x, tol=1e-4)
    assert abs(found.largest - values.max()) <= found.largest_error
    assert abs(found.smallest - values.min()) <= found.smallest_error
    size = np.abs(values).max()
    assert found.largest_error < (1e-3 if dtype is np.float32 else 2e-4) * size
    assert found.method == "finite differences"
    assert found.products > 0


def test_curvature_error_shows_a_curvature_that_changes_within_the_difference():
    # The difference over h is f'' + h^2 = 0.03 + 0.25: the error must cover what h itself adds.
    x = np.array([0.1])
    found = curvature(lambda x: x**3, x, step=0.5)
    assert abs(found.largest - 3 * 0.1**2) > 0.1
    assert abs(found.largest - 3 * 0.1**2) <= found.largest_error


def test_curvature_asks_for_more_only_as_far_as_it_is_told():
    values = SPECTRA["logarithmic"]
    x = np.ones(values.size)
    rough = curvature(lambda x: values * x, x, tol=0.3)
    fine = curvature(lambda x: values * x, x, tol=1e-4)
    assert rough.products < fine.products
    assert fine.smallest_error < rough.smallest_error
    with pytest.raises(RuntimeError, match="max_products=20"):
        curvature(lambda x: values * x, x, tol=1e-12, max_products=20)
    again = curvature(lambda x: values * x, x, tol=0.3)
    assert again == rough


def network(dtype=torch.float64):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    inputs, labels = torch.randn(32, 5).to(dtype), torch.randint(0, 3, (32,))
    model = model.to(dtype)
    return model, lambda *_: torch.nn.functional.cross_entropy(model(inputs), labels)


def test_curvature_by_torch_is_exact_and_agrees_with_differences_and_dense():
    model, loss = network()
    params = list(model.parameters())
    exact = curvature(loss, model.parameters(), tol=1e-9)
    assert exact.method == "exact products"
    slopes = torch.autograd.grad(loss(), params, create_graph=True)
    flat = torch.cat([s.reshape(-1) for s in slopes])
    rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(
        one, params, retain_graph=True, materialize_grads=True)]) for one in flat]  # fmt: skip
    values = np.linalg.eigvalsh(torch.stack(rows).numpy())
    # eps^(1/2) of an eigenvector's error is eps of the value's; the rest is the graph's roundings.
    assert exact.largest == pytest.approx(values[-1], abs=1e-12)
    assert exact.smallest == pytest.approx(values[0], abs=1e-10)

    def gradients(_):
        model.zero_grad()
        loss().backward()
        return [p.grad for p in params]

    near = curvature(gradients, params)
    assert near.method == "finite differences"
    assert abs(near.largest - values[-1]) <= near.largest_error < 1e-3
    assert abs(near.smallest - values[0]) <= near.smallest_error < 1e-3


@pytest.mark.parametrize("graph", [False, True])
def test_curvature_takes_a_gradient_of_one_tensor(graph):
    p = torch.arange(1.0, 5.0, dtype=torch.float64, requires_grad=True)
    scale = torch.arange(1.0, 5.0, dtype=torch.float64)

    def gradient(p):
        return torch.autograd.grad((scale * p * p).sum() / 2, p, create_graph=graph)[0]

    found = curvature(gradient, p)
    assert found.method == "finite differences"
    assert found.largest == pytest.approx(4, abs=1e-6)
    zero_d = torch.tensor(2.0, requires_grad=True)
    assert curvature(lambda q: q**3, zero_d).largest == pytest.approx(12)


@pytest.mark.parametrize("form", ["array", "list", "dict", "buffer"])
def test_curvature_takes_parameters_and_gradients_in_every_form(form):
    first, second = np.array([1.0, 2.0, 3.0]), np.full((2, 2), 5.0)
    if form == "array":
        params, grad = first, lambda p: np.array([7.0, 1.0, 2.0]) * p
    elif form == "list":
        params, grad = [first, second], lambda p: (7 * p[0], 2 * p[1])
    elif form == "dict":
        params, grad = {"a": first, "b": second}, lambda p: {"b": 2 * p["b"], "a": 7 * p["a"]}
    else:
        params = fs.FlatBuffer.pack({"a": first, "b": second})
        grads = params.zeros_like()
        grads.flat[...] = 99.0  # also in the gaps, which belong to no parameter

        def grad(p):  # the same buffer each time
            grads["a"], grads["b"] = 7 * p["a"], 2 * p["b"]
            return grads

    found = curvature(grad, params)
    assert found.largest == pytest.approx(7, abs=1e-6)
    assert found.smallest == pytest.approx(1 if form == "array" else 2, abs=1e-6)


def test_curvature_puts_the_parameters_back_to_the_bit():
    values = np.array([1.0, -0.0, 1e-300, 3.3] * 20)
    for dtype in (np.float32, np.float64):
        x = values.astype(dtype)
        before = x.tobytes()
        curvature(lambda x: 2 * x, x)
        assert x.tobytes() == before
        calls = []

        def fails(x, calls=calls):
            calls.append(1)
            if len(calls) == 4:
                raise KeyError("in the middle")
            return 2 * x

        with pytest.raises(KeyError, match="in the middle"):
            curvature(fails, x)
        assert x.tobytes() == before


@pytest.mark.parametrize("torch_too", [False, True])
def test_safe_rate_is_where_gradient_descent_turns(torch_too):
    values = np.linspace(0.5, 8.0, 50)
    start = np.random.default_rng(0).standard_normal(50)
    if torch_too:
        p, scale = torch.tensor(start, requires_grad=True), torch.tensor(values)
        rate = safe_lr(lambda p: 0.5 * (scale * p * p).sum(), p)
    else:
        rate = safe_lr(lambda x: values * x, start.copy())
    assert rate == pytest.approx(2 / 8, rel=1e-6)
    for share, converges in ((0.98, True), (1.02, False)):
        x = start.copy()
        opt = fs.SGD(x, lr=share * rate)
        for _ in range(500):
            opt.step(values * x)
        assert bool(np.abs(x).max() < np.abs(start).max()) is converges
    assert safe_lr(lambda x: -x, np.ones(3)) == np.inf


ADAPTIVE = {
    "Adam": {}, "AdamW": {"amsgrad": True}, "NAdam": {}, "Adamax": {}, "Adadelta": {},
    "Adagrad": {"lr_decay": 0.1}, "RMSprop": {"centered": True},
}  # fmt: skip


@pytest.mark.parametrize("name", ADAPTIVE)
def test_preconditioned_rate_is_that_of_the_scaled_hessian(name):
    rng = np.random.default_rng(2)
    matrix = turned(np.linspace(1, 9, 40))
    x = rng.standard_normal(40)
    opt = getattr(fs, name)(x, lr=1e-3, **ADAPTIVE[name])
    for _ in range(5):
        opt.step(matrix @ x + rng.standard_normal(40))
    ((_, divisor),) = opt._divisors()
    root = 1 / np.sqrt(divisor)
    want = 2 / np.linalg.eigvalsh(root[:, None] * matrix * root)[-1]
    rate = safe_lr(lambda x: matrix @ x, x, opt, preconditioned=True)
    assert rate == pytest.approx(want, rel=1e-4)
    # Under that denominator, held still, steps below the rate converge and above it do not.
    for share, converges in ((0.97, True), (1.03, False)):
        y = rng.standard_normal(40)
        first = np.abs(y).max()
        for _ in range(400):
            y -= share * rate * (matrix @ y) / divisor
        assert bool(np.abs(y).max() < first) is converges


def test_preconditioned_rate_of_the_torch_class_is_the_neutral_one():
    x = np.random.default_rng(3).standard_normal(6)
    p = torch.nn.Parameter(torch.tensor(x))
    neutral, drop_in = fs.Adam(x), ft.Adam([p])
    scale = np.arange(1.0, 7.0)
    for _ in range(3):
        neutral.step(scale * x)
        p.grad = torch.tensor(scale) * p.detach()
        drop_in.step()
    ours = safe_lr(lambda x: scale * x, x, neutral, preconditioned=True)
    theirs = safe_lr(
        lambda q: 0.5 * (torch.tensor(scale) * q[0] * q[0]).sum(), [p], drop_in, preconditioned=True
    )
    assert theirs == pytest.approx(ours, rel=1e-6)


def test_curvature_refuses_by_name():
    x, ten = np.ones(3), np.ones(10)
    interleaved = curvature(lambda p: [3 * p[0], p[1]], [ten[::2], ten[1::2]])
    assert interleaved.largest == pytest.approx(3, abs=1e-6)

    def grad(x):
        return 2 * x

    for bad, error, message in (
        (np.ones(0), ValueError, "params must have at least one element"),
        ([], ValueError, "params must have at least one element"),
        (np.ones(3, np.float16), TypeError, r"params\[0\] must be float32 or float64, got float16"),
        (np.ones(3, int), TypeError, r"params\[0\] must be float32 or float64"),
        (np.array([1.0, np.nan]), ValueError, r"params\[0\] must be finite"),
        (np.array([1.0, np.inf]), ValueError, r"params\[0\] must be finite"),
        ([x, x], ValueError, r"params\[1\] must not share memory with params\[0\]"),
        ({"a": x[:2], "b": x[1:]}, ValueError, r"params\[b\] must not share memory with params\[a"),
        ([ten[::2], ten[1:2], ten[4:5]], ValueError, r"params\[2\] must not share memory with pa"),
        ("x", TypeError, "params must be"),
        (3.0, TypeError, "params must be"),
    ):
        with pytest.raises(error, match=message):
            curvature(grad, bad)
    for function, error, message in (
        (None, TypeError, "grad_fn must be callable"),
        (lambda x: [x, x], ValueError, "grad_fn must return 1 gradients, got 2"),
        (
            lambda x: x[:2],
            ValueError,
            r"^grad_fn\(params\)\[0\] must have shape \(3,\), got \(2,\)",
        ),
        (lambda x: x * np.nan, ValueError, r"^grad_fn\(params\) must be finite"),
        (lambda x: None, TypeError, r"^grad_fn\(params\)\[0\] must be"),
        (lambda x: "x", TypeError, r"^grad_fn\(params\) must be an array, .* got str"),
        (lambda x: {"w": x}, ValueError, r"^grad_fn\(params\) must have the names of params"),
        (lambda x: x * 1j, TypeError, r"^grad_fn\(params\)\[0\] must"),
        (lambda x: x.astype(int), TypeError, r"^grad_fn\(params\)\[0\] must be floating-point"),
    ):
        with pytest.raises(error, match=message):
            curvature(function, x)
    for name, values in {
        "step": (0.0, -1.0, np.nan, "a"), "tol": (0.0, np.inf, None),
        "max_products": (0, 1.5, True), "seed": (-1, "a", None),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
                curvature(grad, x, **{name: value})
    frozen = np.ones(3)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match=r"params\[0\] must be writable"):
        curvature(grad, frozen)
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="loss of no dimensions"):
        curvature(lambda p: p[:2] * 2, p)
    for bad, kind in ((torch.ones(3), "Tensor with requires_grad=False"), (np.ones(3), "ndarray")):
        with pytest.raises(TypeError, match=rf"params\[1\] must be a tensor that .*, got {kind}"):
            curvature(lambda q: q[0].square().sum(), [p, bad])


@pytest.mark.parametrize("call", [curvature, safe_lr])
@pytest.mark.parametrize(
    "loss", [float, int, np.float32, np.array, torch.tensor], ids=lambda kind: kind.__name__
)
def test_a_loss_in_place_of_gradients_is_told_so(call, loss):
    x = np.ones(3)
    for params in (x, [x], {"w": x}, {"w": x, "b": np.ones(2)}, fs.FlatBuffer.pack({"w": x})):
        said = r"^grad_fn must return gradients like params, got the number 6: a loss will do where"
        with pytest.raises(TypeError, match=said):
            call(lambda params: loss(6), params)
    assert x.tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [float, np.float64, np.array])
def test_the_gradient_of_one_number_may_be_a_number(kind):
    x = np.array(2.0)
    assert safe_lr(lambda x: kind(4.0 * x), x) == pytest.approx(0.5)
    assert safe_lr(lambda p: {"x": kind(4.0 * p["x"])}, {"x": x}) == pytest.approx(0.5)


def test_safe_rate_refuses_an_optimizer_that_does_not_fit():
    x = np.ones(3)

    def grad(x):
        return 2 * x

    adam = fs.Adam(x)
    with pytest.raises(ValueError, match="must have stepped params"):
        safe_lr(grad, x, adam, preconditioned=True)
    adam.step(x.copy())
    with pytest.raises(ValueError, match="optimizer must be given with preconditioned=True"):
        safe_lr(grad, x, adam)
    with pytest.raises(ValueError, match="optimizer must be given with preconditioned=True"):
        safe_lr(grad, x, preconditioned=True)
    with pytest.raises(TypeError, match="preconditioned must be True or False"):
        safe_lr(grad, x, adam, preconditioned=1)
    sgd = fs.SGD(x, momentum=0.9)
    sgd.step(x.copy())
    with pytest.raises(TypeError, match="one that divides its steps, got SGD"):
        safe_lr(grad, x, sgd, preconditioned=True)
    with pytest.raises(TypeError, match="optimizer must be one of fusedstep's, got Adam"):
        safe_lr(grad, x, torch.optim.Adam([torch.nn.Parameter(torch.ones(3))]), preconditioned=True)
    for other in (np.ones(4), np.ones(3), [x, np.ones(3)]):
        with pytest.raises(
            ValueError, match=r"optimizer must hold params\[[01]\], got one of other"
        ):
            safe_lr(lambda y: y, other, adam, preconditioned=True)
    still = fs.Adam(x, eps=0)
    still.step(np.zeros(3))  # 0/0
    x[...] = 1
    with pytest.raises(ValueError, match=r"optimizer must divide by numbers > 0, got 0.0"):
        safe_lr(grad, x, still, preconditioned=True)
    plain = fs.SGD(x)
    plain.step(x.copy())
    with pytest.raises(TypeError, match="one that divides its steps, got SGD"):
        safe_lr(grad, x, plain, preconditioned=True)
    p = torch.nn.Parameter(torch.ones(3))
    for opt, error, message in (
        (ft.Adagrad([p]), ValueError, r"must have stepped params\[0\]"),
        (ft.SGD([p]), TypeError, "one that divides its steps, got SGD"),
    ):
        with pytest.raises(error, match=message):
            safe_lr(lambda p: (p * p).sum(), p, opt, preconditioned=True)


def test_preconditioned_rate_goes_by_the_parameters_not_by_their_order():
    a, b = np.ones(3), np.full(3, 2.0)
    opt = fs.Adam({"a": a, "b": b})
    opt.step({"a": np.ones(3), "b": np.full(3, 100.0)})

    def grad(p):
        return {key: {"a": 1.0, "b": 100.0}[key] * p[key] for key in p}

    forward = safe_lr(grad, {"a": a, "b": b}, opt, preconditioned=True)
    assert forward == pytest.approx(2, rel=1e-6)
    assert safe_lr(grad, {"b": b, "a": a}, opt, preconditioned=True) == pytest.approx(forward)
    assert safe_lr(lambda x: 100 * x, b, opt, preconditioned=True) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("scheduled", [False, True])
def test_preconditioned_rate_is_known_after_a_checkpoint_is_loaded(scheduled):
    betas = (0.9, Linear(0.9, total=10, end=0.99)) if scheduled else (0.9, 0.95)
    x = np.array([1.0, 2.0, 3.0])
    opt = fs.Adam(x, betas=betas)
    for _ in range(3):
        opt.step(np.array([1.0, 10.0, 100.0]))
    before = safe_lr(lambda x: 2 * x, x, opt, preconditioned=True)
    again = fs.Adam(x, betas=betas)
    again.load_state_dict(opt.state_dict())
    assert safe_lr(lambda x: 2 * x, x, again, preconditioned=True) == before


def test_denominators_are_those_of_each_group_and_count():
    params = {"a": np.ones(2), "b": np.ones(2)}
    tensors = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2)]
    neutral = fs.Adam(params, betas=(0.0, 0.9), groups=[fs.Group("b", betas=(0.0, 0.5), eps=0.5)])
    drop_in = ft.Adam(
        [{"params": [tensors[0]]}, {"params": [tensors[1]], "betas": (0.0, 0.5), "eps": 0.5}],
        betas=(0.0, 0.9),
    )
    for g in (None, np.full(2, 2.0), np.full(2, 3.0)):  # b is stepped twice, a three times
        neutral.step({"a": np.full(2, 4.0), "b": g})
        tensors[0].grad = torch.full((2,), 4.0, dtype=torch.float64)
        tensors[1].grad = None if g is None else torch.from_numpy(g)
        drop_in.step()
    v = (0.5 * 0.5 * 4 + 0.5 * 9) / (1 - 0.25)  # of b, with its bias correction
    for opt in (neutral, drop_in):
        (_, a), (_, b) = opt._divisors()
        np.testing.assert_allclose(a, 4, rtol=1e-6)
        np.testing.assert_allclose(b, np.sqrt(v) + 0.5, rtol=1e-6)


@pytest.mark.parametrize("n", [3, 33, 200])
def test_a_loss_without_curvature_has_none(n):
    x = np.ones(n)
    for slope in (lambda x: np.ones(n), lambda x: np.zeros(n)):
        found = curvature(slope, x)
        assert abs(found.largest) <= found.largest_error < 1e-9
        assert abs(found.smallest) <= found.smallest_error < 1e-9
    p, q = torch.ones(n, requires_grad=True), torch.ones(2, requires_grad=True)
    found = curvature(lambda p: p.sum(), p)
    assert (found.largest, found.smallest) == (0, 0)
    assert safe_lr(lambda p: p.sum(), p) == np.inf
    mixed = curvature(lambda both: both[0].square().sum() + both[1].sum(), [p, q])
    assert (mixed.largest, mixed.smallest) == pytest.approx((2, 0), abs=1e-6)


@pytest.mark.parametrize("torch_too", [False, True])
def test_a_loss_that_curves_alike_in_all_directions(torch_too):
    p = torch.ones(50, requires_grad=True) if torch_too else np.ones(50)
    found = curvature((lambda p: 1.5 * (p * p).sum()) if torch_too else (lambda x: 3 * x), p)
    for value, error in (
        (found.largest, found.largest_error),
        (found.smallest, found.smallest_error),
    ):
        assert abs(value - 3) <= error < 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_one_direction_of_many_is_seen(seed):
    n = 10_000
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    alike = np.ones(n)
    alike[7] = 0.9
    found = curvature(lambda p: (alike * p).astype(np.float32), x, seed=seed)
    assert abs(found.smallest - 0.9) <= found.smallest_error < 1e-2
    single, slope = np.zeros(n), np.zeros(n)
    single[3], slope[9] = 1, 1e5
    rate = safe_lr(lambda p: (single * p + slope).astype(np.float32), x, seed=seed)
    assert rate == pytest.approx(2, rel=1e-2)


def test_preconditioned_rate_is_of_the_present_hyperparameters_in_both_libraries():
    x = np.array([3.0])
    p = torch.nn.Parameter(torch.tensor([3.0], dtype=torch.float64))
    neutral, drop_in = fs.Adam(x), ft.Adam([p])
    neutral.step(np.array([3.0]))
    p.grad = torch.tensor([3.0], dtype=torch.float64)
    drop_in.step()

    def rates():
        return (
            safe_lr(lambda x: 2 * x, x, neutral, preconditioned=True),
            safe_lr(lambda p: (p * p).sum(), p, drop_in, preconditioned=True),
        )

    assert rates() == pytest.approx((3, 3), rel=1e-6)
    for opt in (neutral, drop_in):
        opt.param_groups[0]["eps"] = 1.0
    assert rates() == pytest.approx((4, 4), rel=1e-6)
    for opt, one, loss in ((neutral, x, lambda x: 2 * x), (drop_in, p, lambda p: (p * p).sum())):
        opt.param_groups[0]["amsgrad"] = True
        with pytest.raises(ValueError, match=r"must have stepped params\[0\] with these"):
            safe_lr(loss, one, opt, preconditioned=True)


def test_preconditioned_rate_needs_only_its_own_parameters_stepped():
    a, b = np.ones(2), np.ones(2)
    opt = fs.Adam([a, b])
    opt.step([np.full(2, 4.0), None])
    assert safe_lr(lambda x: 2 * x, a, opt, preconditioned=True) == pytest.approx(4, rel=1e-6)
    with pytest.raises(ValueError, match=r"optimizer must have stepped params\[0\]"):
        safe_lr(lambda x: 2 * x, b, opt, preconditioned=True)
    w = np.ones((3, 3))
    square = fs.Adagrad(w)
    square.step(np.arange(1.0, 10.0).reshape(3, 3))
    with pytest.raises(ValueError, match=r"optimizer must hold params\[0\]"):
        safe_lr(lambda x: x, w.T, square, preconditioned=True)


def test_products_are_counted_for_each_end():
    values = np.linspace(-10, 10, 200)
    total = curvature(lambda x: values * x, np.ones(200)).products
    again = curvature(lambda x: values * x, np.ones(200), max_products=3 * total // 4)
    assert again.products == total


def test_float32_errors_are_of_float32():
    scale = np.linspace(0.1, 10, 5).astype(np.float32)
    found = curvature(lambda x: scale * x, np.zeros(5, np.float32))
    assert abs(found.largest - 10) <= found.largest_error < 1e-4
    single, double = (
        curvature(loss, list(model.parameters()), tol=1e-9)
        for model, loss in map(network, (torch.float32, torch.float64))
    )
    assert abs(single.largest - double.largest) <= single.largest_error < 1e-5
    assert abs(single.smallest - double.smallest) <= single.smallest_error < 1e-5


def test_errors_of_mixed_parameters_are_of_the_coarser():
    params = [np.zeros(3), np.zeros(3, np.float32)]
    found = curvature(lambda p: [2 * p[0], 2 * p[1]], params)
    assert found.largest_error > 1e-7


@pytest.mark.parametrize("n", [5, 60])
def test_errors_are_no_smaller_than_rounding(n):
    scale = np.ones(n, np.float32)
    scale[0] = 100
    found = curvature(lambda x: scale * x, np.zeros(n, np.float32))
    assert abs(found.largest - 100) <= found.largest_error
    assert found.largest_error > 100 * np.finfo(np.float32).eps


def test_the_default_step_balances_rounding_and_curvature():
    """Errors of 1e-9 are eps^(2/3), which no much smaller or larger step gives."""
    found = curvature(np.sin, np.full(3, 1.0))
    assert abs(found.largest - np.cos(1.0)) <= found.largest_error < 1e-8
    assert abs(found.largest - np.cos(1.0)) < 2e-9
    far = curvature(lambda x: 2 * x, np.full(3, 1e6))
    assert abs(far.largest - 2) < 1e-9


def test_seeds_and_products_are_what_is_said():
    values, calls = SPECTRA["logarithmic"], []

    def grad(x):
        calls.append(1)
        return values * x

    first = curvature(grad, np.ones(values.size), tol=0.3)
    assert len(calls) == 1 + 2 * first.products
    assert curvature(grad, np.ones(values.size), tol=0.3, seed=1) != first


def test_max_products_is_a_bound_for_each_end():
    values = SPECTRA["logarithmic"]
    calls = []

    def grad(x):
        calls.append(1)
        return values * x

    with pytest.raises(RuntimeError, match="max_products=7"):
        curvature(grad, np.ones(values.size), tol=1e-9, max_products=7)
    assert len(calls) == 1 + 2 * 7
