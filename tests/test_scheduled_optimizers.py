"""Optimizers whose hyperparameters are schedules, and the look-ahead form of Nesterov's method."""

import copy
import pickle

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from cases import CASES
from fusedstep import _core
from fusedstep import schedules as S
from optional import optional

torch = optional("torch")

each_class = pytest.mark.parametrize("cls", [getattr(fs, name) for name in CASES])
SHAPES = {"w": (3, 7), "b": (33,), "s": ()}
CYCLE = S.OneCycle(0.2, total=9, base_momentum=0.0, max_momentum=0.9, anneal="linear")
DECAY = S.Linear(0.1, total=5)


def values(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.standard_normal(s)).astype(dtype) for k, s in SHAPES.items()}


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def contents(opt):
    """All that an optimizer has computed."""
    state = opt.state_dict()["state"]
    return (
        {name: p.tobytes() for name, p in opt.params.items()},
        {i: {k: np.asarray(v).tobytes() for k, v in s.items()} for i, s in state.items()},
        opt.steps,
    )


# -- schedules -------------------------------------------------------------------------------------


def scheduled_hypers(cls):
    """Every hyperparameter of a class that takes a schedule, with one."""
    own = cls(values(0)).param_groups[0]
    found = {"lr": CYCLE, "momentum": CYCLE.momentum, "weight_decay": DECAY}
    if "betas" in own:
        others = [S.Linear(0.9, 8, end=0.99)] * (len(own["betas"]) - 1)
        found["betas"] = (CYCLE.momentum, *others)
    return {name: value for name, value in found.items() if name in own}


@each_class
def test_schedules_give_the_bits_of_groups_edited_by_hand(cls):
    hypers = scheduled_hypers(cls)
    scheduled = cls(values(0), **hypers, groups=[fs.Group("b", lr=S.Constant(0.05))])
    by_hand = cls(values(0), groups=[fs.Group("b", lr=0.05)])
    for t in range(12):
        now = {
            name: tuple(half(t) for half in value) if name == "betas" else value(t)
            for name, value in hypers.items()
        }
        for group, extra in zip(by_hand.param_groups, ({}, {"lr": 0.05}), strict=True):
            for name, value in {**now, **extra}.items():
                group[name] = value
        report = scheduled.step(values(t))
        assert report == by_hand.step(values(t))
        assert contents(scheduled) == contents(by_hand)


def test_the_cycle_takes_momentum_to_0_and_back():
    cycle = S.OneCycle(0.2, total=10, base_momentum=0.0, max_momentum=0.9)
    assert [cycle.momentum(t) for t in (0, 2, 9)] == [0.9, 0.0, 0.9]
    params = values(0)
    opt = fs.SGD(params, lr=cycle, momentum=cycle.momentum)
    for t in range(2):
        opt.step(values(t))
    expected = copy.deepcopy(params)
    report = opt.step(values(2))  # with momentum 0 a plain step
    fs.SGD(expected, lr=report.lr).step(values(2))
    for key, p in params.items():
        np.testing.assert_array_equal(p, expected[key])


@each_class
def test_a_schedule_may_be_put_in_and_taken_out(cls):
    opt, by_hand = cls(values(0), lr=0.1), cls(values(0), lr=0.1)
    opt.param_groups[0]["lr"] = S.Linear(0.1, total=4)
    for t in range(3):
        by_hand.param_groups[0]["lr"] = S.Linear(0.1, total=4)(t)
        opt.step(values(t))
        by_hand.step(values(t))
    opt.param_groups[0]["lr"] = 0.3
    by_hand.param_groups[0]["lr"] = 0.3
    opt.step(values(9))
    by_hand.step(values(9))
    assert contents(opt) == contents(by_hand)


@pytest.mark.parametrize("params", ["flat", "dict"])
def test_a_flat_buffer_and_separate_arrays_follow_one_schedule(params):
    buffer = fs.FlatBuffer.pack(values(0))
    opt = fs.AdamW(buffer if params == "flat" else values(0), lr=S.Cosine(0.1, 6).warmup(2))
    grads = fs.FlatBuffer.pack(values(1)) if params == "flat" else values(1)
    rates = [opt.step(grads).lr for _ in range(10)]
    assert rates == list(S.Cosine(0.1, 6).warmup(2)(range(10)))


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_a_checkpoint_goes_on_at_its_step(cut):
    def make(params):
        return fs.SGD(params, lr=CYCLE, momentum=CYCLE.momentum, weight_decay=DECAY)

    straight, first = make(values(0)), make(values(0))
    for t in range(8):
        straight.step(values(t))
    for t in range(cut):
        first.step(values(t))
    saved = copy.deepcopy(first.state_dict())
    group = saved["param_groups"][0]
    last = max(cut - 1, 0)
    assert (group["lr"], group["momentum"]) == (CYCLE(last), CYCLE.momentum(last))
    assert group["weight_decay"] == DECAY(last)
    second = make({k: p.copy() for k, p in first.params.items()})
    second.load_state_dict(saved)
    for copied in (second, pickle.loads(pickle.dumps(second)), copy.deepcopy(second)):
        assert copied.param_groups[0]["momentum"] == CYCLE.momentum
        for t in range(cut, 8):
            copied.step(values(t))
        assert contents(copied) == contents(straight)


def test_a_checkpoint_of_schedules_is_numbers_that_torch_loads():
    opt = fs.AdamW({k: torch.from_numpy(v.copy()) for k, v in values(0).items()}, lr=CYCLE,
                   betas=(CYCLE.momentum, 0.99), weight_decay=DECAY)  # fmt: skip
    opt.step({k: torch.from_numpy(v) for k, v in values(1).items()})
    peer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(s)) for s in SHAPES.values()])
    peer.load_state_dict(opt.state_dict())
    group = peer.param_groups[0]
    assert (group["lr"], group["betas"]) == (CYCLE(0), (CYCLE.momentum(0), 0.99))
    assert group["weight_decay"] == DECAY(0)


def test_resuming_at_a_far_step_costs_nothing_and_gives_its_rate():
    opt = fs.SGD(values(0), lr=S.InverseSqrt(1.0, timescale=1000))
    saved = opt.state_dict()
    saved["step"] = 10**9
    opt.load_state_dict(saved)
    report = opt.step(values(1))
    assert report.step == 10**9 + 1
    assert report.lr == (1000 / (10**9 + 1000)) ** 0.5


def test_reduce_on_plateau_drives_a_rate_between_steps():
    plateau = S.ReduceOnPlateau(0.5, factor=0.5, patience=0)
    opt = fs.SGD(values(0), lr=plateau)
    rates = []
    for loss in (2.0, 3.0, 1.0, 1.0):
        rates.append(opt.step(values(1)).lr)
        plateau.step(loss)
    assert rates == [0.5, 0.5, 0.25, 0.25]
    assert opt.step(values(1)).lr == 0.125


def plateau_optimizer():
    """Two plateaus, one of them inside another schedule, in two groups."""
    rate = S.ReduceOnPlateau(0.5, factor=0.5, patience=0)
    decay = S.ReduceOnPlateau(0.25, factor=0.5, patience=0)
    group = fs.Group(next(iter(SHAPES)), weight_decay=(decay * 0.5).warmup(1))
    return rate, decay, fs.AdamW(values(0), lr=rate, groups=[group])


@pytest.mark.parametrize("told", [0, 2])
def test_a_checkpoint_has_the_progress_of_reduce_on_plateau(told):
    rate, decay, straight = plateau_optimizer()
    straight.step(values(1))
    for loss in (2.0, 3.0)[:told]:
        rate.step(loss)
        decay.step(-loss)
        decay.step(loss)
    saved = copy.deepcopy(straight.state_dict())
    again_rate, again_decay, again = plateau_optimizer()
    again.load_state_dict(saved)
    for one, other in zip(straight.params.values(), again.params.values(), strict=True):
        np.copyto(other, one)
    assert (again_rate, again_decay) == (rate, decay)
    for plateau in (rate, again_rate):
        plateau.step(9.0)
    assert straight.step(values(2)).lr == again.step(values(2)).lr
    assert contents(straight) == contents(again)


HALF = S.ReduceOnPlateau(0.5, factor=0.5, patience=0).to_dict()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda d: 3, ValueError, r"\['schedules'\] must have a dict for each of 2 groups, got 3"),
        (lambda d: d[:1], ValueError, r"\['schedules'\] must have a dict for each of 2 groups"),
        (lambda d: [d[0], 1], TypeError, r"\['schedules'\]\[1\] must be a dict, got 1"),
        (lambda d: [d[0], {"alpha": HALF}], ValueError, r"\[1\]\['alpha'\] must be of the hyper"),
        (lambda d: [{"lr": 3}, d[1]], TypeError, r"\[0\]\['lr'\]: values must be a dict, got 3"),
        (lambda d: [{"lr": [HALF, HALF]}, d[1]], TypeError, r"\['lr'\]: values must be a dict"),
        (lambda d: [{"betas": HALF}, d[1]], TypeError, r"\[0\]\['betas'\] must be a pair, got"),
        (lambda d: [{"lr": {"type": "Cosine"}}, d[1]], ValueError, r"\['lr'\]: values must have"),
        (lambda d: [{"lr": {}}, d[1]], ValueError, r"\['lr'\]: values\['type'\] must be one of"),
        (
            lambda d: [{"lr": {**HALF, "progress": 3}}, d[1]],
            TypeError,
            r"\['schedules'\]\[0\]\['lr'\]: progress must be None or",
        ),
        (
            lambda d: [{"lr": {**HALF, "progress": [0.1, None, 0, 0]}}, d[1]],
            ValueError,
            r"\[1\]\['lr'\] must have the progress of the other places of its schedule, got \(0.5",
        ),
    ],
)
def test_schedules_that_do_not_fit_change_nothing(change, error, message):
    rate, decay, opt = plateau_optimizer()
    rate.step(1.0)
    before = contents(opt), rate.progress, decay.progress
    saved = opt.state_dict()
    with pytest.raises(error, match=message):
        opt.load_state_dict({**saved, "schedules": change(saved["schedules"])})
    assert (contents(opt), rate.progress, decay.progress) == before


def test_a_checkpoint_without_schedules_leaves_reduce_on_plateau_where_it_is():
    rate, _, opt = plateau_optimizer()
    saved = opt.state_dict()
    del saved["schedules"]
    rate.step(1.0)
    opt.load_state_dict(saved)
    assert rate.progress == (0.5, 1.0, 0, 0)


def test_a_loaded_optimizer_stores_the_values_of_the_last_step():
    opt = fs.Adam(values(0), lr=S.Linear(0.5, total=10), betas=(S.Linear(0.9, 10, 0.5), 0.99))
    for seed in range(3):
        opt.step(values(seed))
    again = fs.Adam(values(0), lr=S.Linear(0.5, total=10), betas=(S.Linear(0.9, 10, 0.5), 0.99))
    again.load_state_dict(opt.state_dict())
    for stored in (opt.state_dict(), again.state_dict()):
        group = stored["param_groups"][0]
        assert group["lr"] == S.Linear(0.5, total=10)(2)
        assert group["betas"] == (S.Linear(0.9, 10, 0.5)(2), 0.99)
        rate, momentum = S.Linear(0.5, total=10).to_dict(), S.Linear(0.9, 10, 0.5).to_dict()
        assert stored["schedules"] == [{"lr": rate, "betas": [momentum, None]}]
    assert "schedules" not in fs.Adam(values(0), lr=lambda t: 0.5).state_dict()


@pytest.mark.parametrize("name", ["lr", "weight_decay", "momentum"])
def test_an_infinite_value_of_a_schedule_is_refused(name):
    opt = fs.SGD(values(0), **{name: S.Exponential(1.0, 1e10) * 1e300})
    opt.step(values(1))
    before = contents(opt)
    with pytest.raises(ValueError, match=f"{name} must be finite, got inf from its schedule at"):
        opt.step(values(1))
    assert contents(opt) == before


@pytest.mark.parametrize(
    ("cls", "name", "make", "error", "message"),
    [
        (fs.SGD, "lr", lambda bad: bad, ValueError, "lr must be >= 0, got -1"),
        (fs.SGD, "momentum", lambda bad: bad, ValueError, "momentum must be >= 0, got -1"),
        (fs.SGD, "weight_decay", lambda bad: bad, ValueError, "weight_decay must be >= 0, got -1"),
        (fs.Adam, "betas", lambda bad: (0.9, bad), ValueError, r"betas\[1\] must be in \[0, 1\)"),
        (fs.Adam, "betas", lambda bad: (bad, 0.9), ValueError, r"betas\[0\] must be in \[0, 1\)"),
    ],
)
def test_a_schedule_that_leaves_the_range_changes_nothing(cls, name, make, error, message):
    current = [0.5]
    opt = cls(values(0), **{name: make(lambda t: current[0])})
    opt.step(values(1))
    before = contents(opt)
    for wrong, kind in ((-1, error), (np.nan, ValueError), ("x", TypeError), (None, TypeError)):
        current[0] = wrong
        with pytest.raises(kind, match=message if wrong == -1 else f"^{name}"):
            opt.step(values(2))
        current[0] = 0.5
        assert contents(opt) == before
    assert opt.step(values(2)).step == 2


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_step_that_raises_has_made_no_states(scheduled):
    begins = {"momentum": lambda t: 0.0 if t == 0 else 0.9} if scheduled else {}
    opt = fs.SGD(values(0), lr=0.1, **begins)
    opt.step(values(1))
    if not scheduled:
        opt.param_groups[0]["momentum"] = 0.9
    before = contents(opt)
    with pytest.raises(ValueError, match="shape"):
        opt.step({**values(2), "w": np.ones(2, np.float32)})
    assert not any(opt.state.values())
    assert contents(opt) == before
    opt.step(values(2))
    assert all("momentum_buffer" in state for state in opt.state.values())
    peer = fs.SGD(values(0), lr=0.1)
    peer.step(values(1))
    peer.param_groups[0]["momentum"] = 0.9
    peer.step(values(2))
    assert contents(peer) == contents(opt)


def test_schedules_that_do_not_go_together_change_nothing():
    opt = fs.SGD(values(0), momentum=S.Linear(0.9, total=2), nesterov=True)
    opt.step(values(1))
    opt.step(values(1))
    before = contents(opt)
    with pytest.raises(ValueError, match="nesterov needs momentum > 0"):
        opt.step(values(1))
    assert contents(opt) == before


@each_class
def test_what_takes_no_schedule_refuses_one(cls):
    takes = {"lr", "weight_decay", "momentum", "betas"}
    for name, value in cls(values(0)).param_groups[0].items():
        if name in takes or name == "params":
            continue
        with pytest.raises(TypeError, match=f"^{name}"):
            cls(values(0), **{name: S.Constant(0.5)})
        if isinstance(value, tuple):
            with pytest.raises(TypeError, match=f"^{name}"):
                cls(values(0), **{name: (S.Constant(0.5), S.Constant(1.5))})
        opt = cls(values(0))
        with pytest.raises(TypeError, match=f"^{name}"):
            opt.param_groups[0][name] = S.Constant(0.5)


# -- the look-ahead form ---------------------------------------------------------------------------


def quadratic(p):
    """The gradient of a poorly conditioned quadratic, in the dtype of p."""
    return np.asarray(np.linspace(0.1, 3, p.size).reshape(p.shape).astype(p.dtype) * p)


@pytest.mark.parametrize("mu", [0.5, 0.9, 0.99])
def test_look_ahead_and_torch_form_are_one_method(mu):
    """At each step the torch form stands where the look-ahead form looks."""
    lr = 0.2
    start = values(0, np.float64)
    y, x = copy.deepcopy(start), copy.deepcopy(start)
    torch_form = fs.SGD(y, lr=lr, momentum=mu, nesterov=True)
    original = fs.SGD(x, lr=lr, momentum=mu)
    for t in range(60):
        with original.lookahead():
            for key in x:
                if t:
                    np.testing.assert_allclose(x[key], y[key], rtol=0, atol=1e-13)
            grads = {key: quadratic(p) for key, p in x.items()}
        original.step(grads)
        torch_form.step({key: quadratic(p) for key, p in y.items()})
    plain = copy.deepcopy(start)
    momentum = fs.SGD(plain, lr=lr, momentum=mu)
    for _ in range(60):
        momentum.step({key: quadratic(p) for key, p in plain.items()})
    assert not np.allclose(plain["b"], x["b"], atol=1e-6)  # momentum alone is another method


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["dict", "flat", "torch"])
def test_look_ahead_moves_and_restores_to_the_bit(kind, dtype):
    arrays = values(0, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if kind == "torch":
        params = {k: to_torch(v) for k, v in arrays.items()}
        grads = {k: to_torch(v.copy()) for k, v in arrays.items()}
    elif kind == "flat":
        params, grads = fs.FlatBuffer.pack(arrays), fs.FlatBuffer.pack(arrays)
        arrays = {k: params[k] for k in SHAPES}
    else:
        params, grads = arrays, copy.deepcopy(arrays)
    opt = fs.SGD(params, lr=0.25, momentum=0.5)
    opt.step(grads)
    before = {k: a.copy() for k, a in arrays.items()}
    with opt.lookahead():
        for key, array in arrays.items():
            buffer = np.asarray(opt.state[key]["momentum_buffer"])
            expected = (before[key].astype(buffer.dtype) - 0.125 * buffer).astype(array.dtype)
            np.testing.assert_array_equal(array, expected)
            assert array.size == 0 or not np.array_equal(array, before[key])
    for key, array in arrays.items():
        assert array.tobytes() == before[key].tobytes()


def test_look_ahead_restores_after_an_exception_and_before_the_first_step_is_a_no_op():
    params = values(0)
    opt = fs.SGD(params, lr=0.25, momentum=0.5)
    before = copy.deepcopy(params)
    with opt.lookahead():
        assert all(np.array_equal(params[k], before[k]) for k in params)
    opt.step(values(1))
    before = copy.deepcopy(params)

    def interrupted():
        with opt.lookahead():
            params["w"][...] = np.nan
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert all(np.array_equal(params[k], before[k]) for k in params)
    opt.step(values(2))  # and it steps on


def test_look_ahead_leaves_groups_without_momentum_and_follows_schedules():
    params = values(0)
    opt = fs.SGD(params, lr=S.Linear(0.5, total=4), momentum=S.Constant(0.5),
                 groups=[fs.Group("b", momentum=0.0)])  # fmt: skip
    opt.step(values(1))
    before = copy.deepcopy(params)
    with opt.lookahead():
        np.testing.assert_array_equal(params["b"], before["b"])
        ahead = {"w": before["w"].copy()}
        fs.SGD(ahead, lr=0.375 * 0.5).step({"w": opt.state["w"]["momentum_buffer"]})
        np.testing.assert_array_equal(params["w"], ahead["w"])


@pytest.mark.parametrize(
    "hypers", [{}, {"momentum": 0.9, "nesterov": True}, {"momentum": S.Constant(0.0)}]
)
def test_look_ahead_needs_plain_momentum(hypers):
    opt = fs.SGD(values(0), **hypers)
    with pytest.raises(ValueError, match="lookahead needs momentum > 0 and nesterov = False"):
        opt.lookahead().__enter__()


def test_look_ahead_catches_a_backward_after_it():
    p = torch.ones(3, requires_grad=True)
    opt = fs.SGD(p, lr=0.1, momentum=0.9)
    opt.step(torch.ones(3))
    with opt.lookahead():
        loss = (p**2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    outside = (p**2).sum()
    with opt.lookahead(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outside.backward()


def test_what_a_look_ahead_shows_and_what_it_refuses():
    opt = fs.SGD(values(0), lr=S.Constant(0.25), momentum=0.5)
    with opt.lookahead():
        assert opt.state_dict()["param_groups"][0]["lr"] == 0.25
        for refused in (copy.deepcopy, pickle.dumps, lambda o: o.load_state_dict(o.state_dict())):
            with pytest.raises(RuntimeError, match=r"must .* after a lookahead, not inside it"):
                refused(opt)
    copy.deepcopy(opt).step(values(1))


def test_a_step_inside_a_look_ahead_is_refused():
    opt = fs.SGD(values(0), lr=0.25, momentum=0.5)
    opt.step(values(1))
    before = contents(opt)
    with opt.lookahead():
        with pytest.raises(RuntimeError, match="must come after a lookahead"):
            opt.step(values(1))
        with pytest.raises(RuntimeError, match="must come after a lookahead"):
            opt.lookahead().__enter__()
    assert contents(opt) == before


# -- denominators ----------------------------------------------------------------------------------

DIVIDING = {
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1},
    "RMSprop": {"lr": 0.1, "centered": True, "alpha": 0.8},
    "Adadelta": {"lr": 0.1},
    "Adam": {"lr": 0.1, "betas": (0.0, 0.9), "amsgrad": True},
    "Adam plain": {"lr": 0.1, "betas": (0.0, 0.9), "bias_correction": False},
    "AdamW": {"lr": 0.1, "betas": (0.0, 0.9), "weight_decay": 0.0},
    "Adamax": {"lr": 0.1, "betas": (0.0, 0.9)},
    "NAdam": {"lr": 0.1, "betas": (0.0, 0.9)},
    "RAdam": {"lr": 0.1, "betas": (0.0, 0.9)},
}


@pytest.mark.parametrize("steps", [1, 5, 6, 9])  # RAdam divides from the 6th on
@pytest.mark.parametrize("name", DIVIDING)
def test_denominator_is_what_the_step_divided_by(name, steps):
    """Without momentum the last step was `lr * g / denominator`, whatever the rule."""
    params = values(0, np.float64)
    opt = getattr(fs, name.split()[0])(params, **DIVIDING[name])
    for t in range(steps):
        before = copy.deepcopy(params)
        earlier = copy.deepcopy(opt.state)
        grads = values(t + 1, np.float64)
        opt.step(grads)
    for (key, p), (held, found) in zip(params.items(), opt._divisors(), strict=True):
        assert held is p
        expected = 0.1 * grads[key] / (before[key] - p)
        if name == "Adadelta":  # whose numerator is that of the step before
            a, now = (s[key]["acc_delta"] for s in (earlier, opt.state))
            expected *= np.sqrt((a + 1e-6) / (now + 1e-6))
        np.testing.assert_allclose(found, expected, rtol=1e-7)


@pytest.mark.parametrize(
    "name", [name for name in CASES if not _core.rules()[getattr(fs, name)._spec.rule][2]]
)
def test_rules_that_do_not_divide_have_no_denominator(name):
    opt = getattr(fs, name)(values(0), **({"momentum": 0.9} if name == "SGD" else {}))
    opt.step(values(1))
    with pytest.raises(TypeError, match=f"must be one that divides its steps, got {name}"):
        opt._divisors()


def test_divisors_of_the_core_refuse_what_is_no_state():
    one, two = np.ones(1), np.ones(2)
    adamax = [0.1, 0.9, 0.99, 1e-8, 0.0, 0.0, 1.0]
    for rule, hypers, states, message in (
        ("sgd", [0.1, 0.9, 0.0, 0.0, 0.0, 0.0], [one], "rule must be one that divides, got sgd"),
        ("adamax", adamax, [one], "states must have 2 entries, got 1"),
        ("adamax", adamax, [one, None], "states must have exp_inf"),
        ("adamax", adamax, [one, two], "states must have one size"),
        ("adamax", [0.1], [one, one], "hypers must have 7 entries, got 1"),
        ("adamax2", [0.1], [one, one], "rule must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            _core.divisors(rule, hypers, 1, states)
