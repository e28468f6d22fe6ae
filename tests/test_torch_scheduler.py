"""`fusedstep.torch.LRScheduler`: schedules for any torch optimizer; look-ahead over tensors."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

import fusedstep.torch as ft
from fusedstep import schedules as S
from fusedstep.torch import LRScheduler

COSINE = S.Cosine(0.5, total=6).warmup(3)
CYCLE = S.OneCycle(0.3, total=9)


def model(n=3):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(5)) for _ in range(n)]


def train(opt, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in opt.param_groups])
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = p.detach() * 2
        opt.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW, ft.SGD, ft.AdamW, ft.Lion])
def test_sets_the_schedule_s_value_each_step(cls):
    opt = cls(model(), lr=0.1)
    scheduler = LRScheduler(opt, COSINE)
    assert isinstance(scheduler, lr_scheduler.LRScheduler)
    assert scheduler.get_last_lr() == [COSINE(0)]
    rates = train(opt, scheduler, 12)
    assert rates == [[COSINE(t)] for t in range(12)]
    assert scheduler.get_last_lr() == [COSINE(12)]
    assert scheduler.last_epoch == 12
    assert scheduler.schedules == [COSINE]


def test_takes_any_callable_and_agrees_with_the_neutral_class():
    import fusedstep as fs

    ours = LRScheduler(torch.optim.SGD(model(), lr=1.0), lambda t: 0.5 / (t + 1))
    assert train(ours.optimizer, ours, 3) == [[0.5], [0.25], [0.5 / 3]]
    tensors = model(1)
    array = tensors[0].detach().numpy().copy()
    opt = ft.AdamW(tensors)
    train(opt, LRScheduler(opt, COSINE), 9)
    neutral = fs.AdamW(array, lr=COSINE)
    for _ in range(9):
        neutral.step(array * 2)
    np.testing.assert_array_equal(tensors[0].detach().numpy(), array)


@pytest.mark.parametrize("make", [torch.optim.SGD, ft.SGD])
def test_a_list_gives_each_group_its_own(make):
    a, b, c = model()
    opt = make([{"params": [a, b], "lr": 0.5}, {"params": [c], "lr": 0.05}], lr=0.1)
    scheduler = LRScheduler(opt, [COSINE, COSINE * 0.1])
    assert train(opt, scheduler, 5) == [[COSINE(t), COSINE(t) * 0.1] for t in range(5)]


@pytest.mark.parametrize("make", [torch.optim.SGD, ft.SGD])
def test_momentum_and_weight_decay_cycle_as_torch_s(make):
    opt, peer = make(model(), lr=0.1, momentum=0.9), make(model(), lr=0.1, momentum=0.9)
    decay = S.Linear(0.1, total=5)
    ours = LRScheduler(opt, CYCLE, momentum=CYCLE.momentum, weight_decay=decay)
    theirs = lr_scheduler.OneCycleLR(peer, 0.3, total_steps=9)
    for t in range(8):
        found, expected = opt.param_groups[0], peer.param_groups[0]
        assert found["lr"] == pytest.approx(expected["lr"], rel=1e-12)
        assert found["momentum"] == pytest.approx(expected["momentum"], rel=1e-12)
        assert found["weight_decay"] == decay(t)
        train(opt, ours, 1)
        train(peer, theirs, 1)


@pytest.mark.parametrize("make", [torch.optim.Adam, ft.Adam])
def test_momentum_is_the_first_beta_where_there_are_betas(make):
    opt = make(model(), betas=(0.5, 0.99))
    scheduler = LRScheduler(opt, CYCLE, momentum=CYCLE.momentum)
    for t in range(11):
        assert opt.param_groups[0]["betas"] == (CYCLE.momentum(t), 0.99)
        train(opt, scheduler, 1)


@pytest.mark.parametrize("make", [torch.optim.AdamW, ft.AdamW])
@pytest.mark.parametrize("cut", [0, 4, 10])
def test_a_checkpoint_through_torch_save_goes_on(make, cut):
    def begin():
        params = model()
        opt = make(params, lr=0.1)
        return params, opt, LRScheduler(opt, COSINE, weight_decay=S.Linear(0.1, 5))

    straight, opt, scheduler = begin()
    expected = train(opt, scheduler, 12)[cut:]
    params, opt, scheduler = begin()
    train(opt, scheduler, cut)
    file = io.BytesIO()
    torch.save({"params": params, "opt": opt.state_dict(), "lr": scheduler.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    params, opt, scheduler = begin()
    with torch.no_grad():
        for p, value in zip(params, saved["params"], strict=True):
            p.copy_(value)
    opt.load_state_dict(saved["opt"])
    scheduler.load_state_dict(saved["lr"])
    assert train(opt, scheduler, 12 - cut) == expected
    assert all(torch.equal(p, q) for p, q in zip(params, straight, strict=True))


def test_state_dict_carries_the_schedules_but_no_callables():
    a, b, c = model()
    opt = torch.optim.SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1)
    scheduler = LRScheduler(opt, [COSINE, lambda t: 0.25])
    saved = pickle.loads(pickle.dumps(scheduler.state_dict()))
    assert "optimizer" not in saved
    assert saved["schedules"] == {"lr": [COSINE.to_dict(), None]}
    alone = LRScheduler(torch.optim.SGD(model(), lr=0.1), COSINE)
    assert alone.state_dict()["schedules"] == {"lr": COSINE.to_dict()}
    other = LRScheduler(
        torch.optim.SGD([{"params": [a, b]}, {"params": [c]}], lr=0.1),
        [S.Constant(1.0), lambda t: 0.75],
    )
    with pytest.warns(UserWarning, match="lr was Cosine.*, is Constant"):
        other.load_state_dict(saved)
    train(other.optimizer, other, 1)
    assert other.get_last_lr() == [1.0, 0.75]


def test_a_plateau_s_state_is_saved():
    scheduler = LRScheduler(torch.optim.SGD(model(), lr=1.0), S.ReduceOnPlateau(0.5, patience=0))
    for loss in (1.0, 2.0):
        scheduler.schedules[0].step(loss)
        train(scheduler.optimizer, scheduler, 1)
    assert scheduler.get_last_lr() == [0.05]
    again = LRScheduler(torch.optim.SGD(model(), lr=1.0), S.ReduceOnPlateau(0.5, patience=0))
    again.load_state_dict(scheduler.state_dict())
    assert again.schedules == scheduler.schedules
    assert again.schedules[0] is not scheduler.schedules[0]


def test_a_metric_is_not_taken_for_a_step():
    plateau = S.ReduceOnPlateau(0.5, factor=0.5, patience=0)
    scheduler = LRScheduler(torch.optim.SGD(model(), lr=1.0), plateau * 2)
    for metric in (3, 2.5):
        with pytest.raises(TypeError, match=rf"epoch must be None with .*, got {metric}: a metric"):
            scheduler.step(metric)
    assert (scheduler.last_epoch, plateau.progress) == (0, None)
    plain = LRScheduler(torch.optim.SGD(model(), lr=1.0), COSINE)
    for metric in (2.5, 2.0, torch.tensor(2.0)):
        with pytest.raises(TypeError, match=r"epoch must be an integer >= 0, got .*2\."):
            plain.step(metric)
    plain.optimizer.step()
    with pytest.warns(UserWarning, match="epoch"):  # torch's own, of its deprecation
        plain.step(5)
    assert plain.get_last_lr() == [COSINE(5)]
    opt = torch.optim.SGD(model(), lr=1.0)
    both = [LRScheduler(opt, S.Constant(0.25)), LRScheduler(opt, plateau)]
    sequence = lr_scheduler.SequentialLR(opt, both, milestones=[2])
    assert [r for (r,) in train(opt, sequence, 4)] == [0.25, 0.25, 0.5, 0.5]


def test_a_plateau_goes_on_in_the_object_that_was_given():
    def make():
        plateau = S.ReduceOnPlateau(0.5, factor=0.5, patience=0)
        opt = torch.optim.SGD([group(0.1), group(0.1)], weight_decay=0.1)
        return plateau, LRScheduler(opt, plateau, weight_decay=[plateau * 0.5, plateau])

    plateau, scheduler = make()
    plateau.step(1.0)
    saved = pickle.loads(pickle.dumps(scheduler.state_dict()))
    plateau, scheduler = make()
    scheduler.load_state_dict(saved)
    assert plateau.progress == (0.5, 1.0, 0, 0)
    plateau.step(2.0)
    scheduler.optimizer.step()
    scheduler.step()
    groups = scheduler.optimizer.param_groups
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.25, 0.125), (0.25, 0.25)]


def test_one_plateau_takes_no_two_progresses():
    def make(schedules):
        return LRScheduler(torch.optim.SGD([group(0.1), group(0.1)]), schedules)

    one, two = S.ReduceOnPlateau(0.5, patience=0), S.ReduceOnPlateau(0.5, patience=0)
    one.step(1.0)
    own = S.ReduceOnPlateau(0.5, patience=0)
    scheduler = make([own, own])
    before = dict(vars(scheduler))
    with pytest.raises(ValueError, match=r"\['lr'\]\[1\] must have the progress of the other"):
        scheduler.load_state_dict(make([one, two]).state_dict())
    assert vars(scheduler) == before
    assert own.progress is None


@pytest.mark.parametrize("optimizer_s", [True, False], ids=["with optimizer", "alone"])
@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1)], ids=["number", "tensor"])
def test_the_step_after_loading_has_the_present_schedules_values(rate, optimizer_s):
    def make(schedule):
        opt = torch.optim.Adam(model(), lr=copy.copy(rate), weight_decay=0.1, betas=(0.8, 0.99))
        return LRScheduler(opt, schedule, momentum=schedule, weight_decay=schedule * 0.5)

    first = make(S.Linear(0.5, 10))
    train(first.optimizer, first, 4)
    schedule = S.Linear(0.5, 20)
    again = make(schedule)
    held = again.optimizer.param_groups[0]["lr"]
    if optimizer_s:
        again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
        held = again.optimizer.param_groups[0]["lr"]
    with pytest.warns(UserWarning, match="lr was .* momentum was .* weight_decay was"):
        again.load_state_dict(first.state_dict())
    now = again.optimizer.param_groups[0]
    assert again.get_last_lr() == [now["lr"]] == [schedule(4)]
    assert (now["betas"], now["weight_decay"]) == ((schedule(4), 0.99), schedule(4) * 0.5)
    if torch.is_tensor(rate):
        assert now["lr"] is held
        assert again.get_last_lr()[0] is not held


def test_loading_leaves_the_rate_of_another_scheduler():
    def make(first, second):
        opt = torch.optim.SGD(model(), lr=0.5)
        both = [LRScheduler(opt, first), LRScheduler(opt, second)]
        return opt, lr_scheduler.SequentialLR(opt, both, milestones=[3])

    opt, sequence = make(S.Linear(0.25, 8), S.Linear(1.0, 4))
    straight = train(opt, sequence, 2)
    saved = copy.deepcopy((opt.state_dict(), sequence.state_dict()))
    straight += train(opt, sequence, 4)
    opt, sequence = make(S.Linear(0.25, 8), S.Linear(1.0, 4))
    opt.load_state_dict(saved[0])
    sequence.load_state_dict(saved[1])
    assert train(opt, sequence, 4) == straight[2:]


def test_a_group_that_is_added_follows_the_one_schedule():
    opt = torch.optim.SGD(model(), lr=0.1)
    scheduler = LRScheduler(opt, COSINE)
    opt.add_param_group(group(0.7))
    train(opt, scheduler, 2)
    assert scheduler.get_last_lr() == [COSINE(2)] * 2


def test_a_group_without_a_schedule_of_its_own_is_an_error_that_changes_nothing():
    opt = torch.optim.SGD(model(), lr=0.1, momentum=0.9)
    scheduler = LRScheduler(opt, [COSINE], momentum=[CYCLE.momentum])
    opt.add_param_group(group(0.7))
    before = [(g["lr"], g["momentum"]) for g in opt.param_groups]
    with pytest.raises(ValueError, match="schedule must be one for each of 2 groups, got 1"):
        train(opt, scheduler, 1)
    assert [(g["lr"], g["momentum"]) for g in opt.param_groups] == before
    assert scheduler.last_epoch == 0


def test_a_scheduled_momentum_must_be_a_beta_where_it_is_one():
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), got 1"):
        LRScheduler(torch.optim.Adam(model()), COSINE, momentum=lambda t: 1.0)


@pytest.mark.parametrize("last", [7.0, np.float32(7), np.array(7.0), torch.tensor(7.0)])
def test_a_whole_last_epoch_is_an_int(last):
    scheduler = LRScheduler(torch.optim.SGD(model(), lr=0.1), COSINE, last_epoch=last)
    other = LRScheduler(torch.optim.SGD(model(), lr=0.1), COSINE)
    other.load_state_dict({**scheduler.state_dict(), "last_epoch": last})
    assert (scheduler.last_epoch, other.last_epoch) == (8, 7)
    assert {type(scheduler.last_epoch), type(other.last_epoch)} == {int}


@pytest.mark.parametrize("make", [torch.optim.SGD, ft.SGD])
def test_resuming_at_a_far_step_costs_nothing(make):
    schedule = S.InverseSqrt(1.0, timescale=1000)
    scheduler = LRScheduler(make(model(), lr=0.1), schedule, last_epoch=10**9)
    assert scheduler.get_last_lr() == [schedule(10**9 + 1)]  # the step after the last
    train(scheduler.optimizer, scheduler, 1)
    assert scheduler.get_last_lr() == [schedule(10**9 + 2)]


def test_goes_together_with_torch_s_schedulers():
    opt = torch.optim.SGD(model(), lr=0.5)
    first, second = LRScheduler(opt, S.Constant(0.25)), LRScheduler(opt, S.Linear(0.5, 4))
    sequence = lr_scheduler.SequentialLR(opt, [first, second], milestones=[2])
    assert [r for (r,) in train(opt, sequence, 5)] == [0.25, 0.25, 0.5, 0.375, 0.25]
    opt = torch.optim.SGD(model(), lr=0.5)
    chained = lr_scheduler.ChainedScheduler(
        [LRScheduler(opt, S.Linear(0.5, 4)), LRScheduler(opt, S.Constant(0.125))]
    )
    train(opt, chained, 2)
    assert opt.param_groups[0]["lr"] == 0.125  # a schedule sets the rate itself: the last one wins


def test_a_rate_in_a_tensor_stays_that_tensor():
    lr = torch.tensor(0.1)
    opt = torch.optim.SGD(model(), lr=lr)
    scheduler = LRScheduler(opt, COSINE)
    train(opt, scheduler, 2)
    assert opt.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(COSINE(2))
    assert opt.param_groups[0]["initial_lr"] == torch.tensor(0.1)


def test_a_copy_goes_its_own_way():
    opt = torch.optim.SGD(model(), lr=0.1)
    scheduler = LRScheduler(opt, COSINE)
    train(opt, scheduler, 3)
    twin_opt, twin = copy.deepcopy((opt, scheduler))
    assert twin.optimizer is twin_opt
    train(twin_opt, twin, 1)
    assert twin.get_last_lr() == [COSINE(4)]
    assert scheduler.get_last_lr() == [COSINE(3)]


def shared(key, value):
    """A torch optimizer whose two groups have one tensor in that place, and their tensors."""
    held = {"betas": (torch.tensor(0.5), torch.tensor(0.5))}.get(key, torch.tensor(0.5))
    groups = [{"params": params} for params in (model(1), model(1))]
    opt = torch.optim.AdamW(groups, **{"lr": 0.5, key: held}, capturable=True)
    if value == "view":
        views = [torch.as_tensor(one).view(()) for one in (held if key == "betas" else [held])]
        opt.param_groups[1][key] = tuple(views) if key == "betas" else views[0]
    return opt


@pytest.mark.parametrize("how", ["one object", "view"])
@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_one_tensor_of_several_groups_takes_no_two_values(name, how):
    key = "betas" if name == "momentum" else name
    falling = S.Linear(0.5, 10)

    def make(opt, both):
        given = {"schedule": S.Constant(0.5), name.replace("lr", "schedule"): both}
        return LRScheduler(opt, **given)

    opt = shared(key, how)
    before = copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=rf"^{key} must be a tensor of its own in each group .* 0"):
        make(opt, [S.Constant(0.5), S.Constant(0.25)])
    assert opt.state_dict()["param_groups"] == before
    scheduler = make(opt, [S.Constant(0.5), S.Constant(0.5).then(falling, at=1)])
    opt.step()
    scheduler.step()
    before = copy.deepcopy(opt.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=r"one for 0.5 in param_groups\[0\] and 0.45 in param_gr"):
        scheduler.step()
    assert opt.state_dict()["param_groups"] == before
    assert scheduler.last_epoch == 1
    agreed = make(shared(key, how), [falling, falling])
    agreed.optimizer.step()
    agreed.step()
    for one in agreed.optimizer.param_groups:
        assert torch.equal(one[key][0] if key == "betas" else one[key], torch.tensor(0.45))


def negative(t):
    return -0.1 if t == 2 else 0.1


def group(lr):
    return {"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda o: LRScheduler(3, COSINE), TypeError, "optimizer must be a torch.optim.Optimizer"),
        (lambda o: LRScheduler(o, 0.1), TypeError, "schedule must be a schedule or one for each"),
        (lambda o: LRScheduler(o, [0.1]), TypeError, "schedule must be a schedule or one for"),
        (lambda o: LRScheduler(o, [COSINE] * 2), ValueError, "schedule must be one for each of 1"),
        (lambda o: LRScheduler(o, lambda t: -1), ValueError, "lr must be >= 0, got -1"),
        (lambda o: LRScheduler(o, lambda t: None), TypeError, "lr must be a number"),
        (lambda o: LRScheduler(o, COSINE, momentum=0.9), TypeError, "momentum must be a schedule"),
        (lambda o: LRScheduler(o, COSINE, last_epoch="3"), TypeError, "last_epoch"),
        (lambda o: LRScheduler(o, COSINE, last_epoch=-2), ValueError, "last_epoch"),
        (
            lambda o: LRScheduler(torch.optim.Adagrad(model()), COSINE, momentum=COSINE),
            ValueError,
            "momentum must be a hyperparameter of each group",
        ),
        (
            lambda o: LRScheduler(torch.optim.SGD([group(0.1), group(0.2)]), COSINE),
            ValueError,
            r"schedule must be one for each group where their lr differ, got \[0.1, 0.2\]",
        ),
    ],
)
def test_refuses_by_name_and_changes_nothing(make, error, message):
    opt = torch.optim.SGD(model(), lr=0.1)
    before = copy.deepcopy(opt.param_groups[0])
    with pytest.raises(error, match=message):
        make(opt)
    after = opt.param_groups[0]
    assert {k: v for k, v in after.items() if k != "params"} == {
        k: v for k, v in before.items() if k != "params"
    }


def test_a_value_out_of_range_leaves_the_rate():
    opt = torch.optim.SGD(model(), lr=0.1)
    scheduler = LRScheduler(opt, negative)
    train(opt, scheduler, 1)
    before = {**vars(scheduler)}
    with pytest.raises(ValueError, match=r"lr must be >= 0, got -0.1"):
        train(opt, scheduler, 1)
    assert vars(scheduler) == before
    assert opt.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize(
    "schedules", [3, {}, {"lr": []}, {"lr": [None]}, {"lr": None, "momentum": None}]
)
def test_load_state_dict_refuses_other_schedules(schedules):
    scheduler = LRScheduler(torch.optim.SGD(model(), lr=0.1), COSINE)
    saved = {**scheduler.state_dict(), "schedules": schedules, "last_epoch": 7}
    with pytest.raises(ValueError, match=r"state_dict\['schedules'\] must be for"):
        scheduler.load_state_dict(saved)
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (None, TypeError, "state_dict must be a dict, got NoneType"),
        ({"schedules": {"lr": 3}}, TypeError, r"\['lr'\]: values must be a dict, got 3"),
        ({"schedules": {"lr": {"type": "Cosine", "lr": -1}}}, ValueError, r"\['lr'\]: values must"),
        ({"last_epoch": "x"}, TypeError, r"state_dict\['last_epoch'\] must be an integer >= -1"),
        ({"last_epoch": 2.5}, TypeError, r"state_dict\['last_epoch'\] must be an integer >= -1"),
        ({"last_epoch": -5}, ValueError, r"state_dict\['last_epoch'\] must be an integer from -1"),
    ],
)
def test_load_state_dict_refuses_what_is_no_state(change, error, message):
    scheduler = LRScheduler(torch.optim.SGD(model(), lr=0.1), COSINE)
    saved = change and {**scheduler.state_dict(), **change}
    before = dict(vars(scheduler))
    with pytest.raises(error, match=message):
        scheduler.load_state_dict(saved)
    assert vars(scheduler) == before


def test_torch_classes_point_to_it():
    with pytest.raises(TypeError, match="LRScheduler"):
        ft.SGD(model(), lr=COSINE)


# -- look-ahead ------------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True])
def test_look_ahead_over_tensors_is_nesterov(flat):
    curve = torch.linspace(0.1, 2, 5, dtype=torch.float64)

    def start():
        torch.manual_seed(0)
        return [torch.nn.Parameter(torch.randn(5, dtype=torch.float64)) for _ in range(2)]

    def descend(opt, params):
        opt.zero_grad()
        sum((curve * p * p).sum() / 2 for p in params).backward()

    x, y = start(), start()
    original, torch_form = (ft.SGD(p, lr=0.3, momentum=0.8, nesterov=n)
                            for p, n in ((x, False), (y, True)))  # fmt: skip
    if flat:
        ft.flatten_(x)
    for _ in range(25):
        before = [p.detach().clone() for p in x]
        with original.lookahead():
            for p, q in zip(x, y, strict=True):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-14)
            descend(original, x)
        assert all(torch.equal(p, b) for p, b in zip(x, before, strict=True))
        original.step()
        descend(torch_form, y)
        torch_form.step()


def test_look_ahead_over_tensors_has_each_group_s_reach():
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.25, "momentum": 0.75}]
    opt = ft.SGD(groups, momentum=0.5)
    train_on_ones(opt)
    with opt.lookahead():
        assert [a.item(), b.item()] == [-0.5 - 0.5 * 0.5, -0.25 - 0.25 * 0.75]


def train_on_ones(opt):
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()


def test_look_ahead_over_tensors_refuses_a_step_inside_and_no_momentum():
    params = model()
    opt = ft.SGD(params, lr=0.1, momentum=0.9)
    train(opt, LRScheduler(opt, S.Constant(0.1)), 1)
    saved = opt.state_dict()
    with opt.lookahead():
        for refused in (opt.step, lambda: copy.deepcopy(opt), lambda: opt.load_state_dict(saved)):
            with pytest.raises(RuntimeError, match=r"must .* after a lookahead"):
                refused()
    assert copy.deepcopy(opt).state_dict()["param_groups"] == saved["param_groups"]
    with pytest.raises(ValueError, match="lookahead needs momentum > 0"):
        ft.SGD(params, lr=0.1).lookahead().__enter__()
    with pytest.raises(ValueError, match="lookahead needs momentum > 0"):
        ft.SGD(params, lr=0.1, momentum=0.9, nesterov=True).lookahead().__enter__()
    assert not hasattr(ft.Adam(params), "lookahead")


def test_look_ahead_catches_a_backward_after_it():
    params = model(1)
    opt = ft.SGD(params, lr=0.1, momentum=0.9)
    train(opt, LRScheduler(opt, S.Constant(0.1)), 1)
    with opt.lookahead():
        loss = (params[0] ** 2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
