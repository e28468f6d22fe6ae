"""Resuming under a schedule: the one given now stays, in both layers, and a difference is said."""

import copy
import json
import warnings

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import schedules as S
from optional import optional

torch, ours = optional("torch"), optional("fusedstep.torch")


class Neutral:
    """A neutral optimizer that follows a schedule."""

    def __init__(self, lr):
        self.opt = fs.SGD(np.ones(2), lr=lr)

    @property
    def steps(self):
        return self.opt.steps

    def step(self):
        return self.opt.step(np.zeros(2)).lr

    def saved(self):
        return self.opt.state_dict()

    def load(self, saved):
        self.opt.load_state_dict(saved)


class Torch:
    """A torch optimizer and its scheduler."""

    def __init__(self, lr):
        self.opt = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
        self.scheduler = ours.LRScheduler(self.opt, lr)

    @property
    def steps(self):
        return self.scheduler.last_epoch

    def step(self):
        rate = self.opt.param_groups[0]["lr"]
        self.opt.step()
        self.scheduler.step()
        return rate

    def saved(self):
        return {"opt": self.opt.state_dict(), "scheduler": self.scheduler.state_dict()}

    def load(self, saved):
        self.opt.load_state_dict(saved["opt"])
        self.scheduler.load_state_dict(saved["scheduler"])


DIFFER = "^schedules differ from the checkpoint's, and the present ones stay: "
each_layer = pytest.mark.parametrize("layer", [Neutral, Torch])


def after(layer, schedule, steps, metrics=()):
    """A checkpoint after some steps, as a file would give it."""
    run = layer(schedule)
    for _ in range(steps):
        run.step()
    for plateau in S.plateaus([schedule]):
        for metric in metrics:
            plateau.step(metric)
    return copy.deepcopy(run.saved())


OTHERS = [
    (S.Cosine(0.1, total=10), S.Cosine(0.1, total=20)),
    (S.Cosine(0.1, total=10), S.Linear(0.2, total=30)),
    (S.Cosine(0.1, total=10).warmup(2), S.Cosine(0.1, total=10).warmup(5)),
    (S.Linear(0.1, 5).then(S.Constant(0.2), at=5), S.Linear(0.1, 5).then(S.Constant(0.3), at=5)),
    (S.Constant(0.5), S.Constant(0.5) * 0.5),
    (S.ReduceOnPlateau(0.5), S.Step(0.5, every=3)),
    (S.Step(0.5, every=3), S.ReduceOnPlateau(0.5)),
]


@each_layer
@pytest.mark.parametrize(("before", "now"), OTHERS, ids=repr)
def test_the_schedule_that_is_given_stays_and_one_warning_names_both(layer, before, now):
    saved = after(layer, before, 10)
    run = layer(now)
    with pytest.warns(UserWarning, match=DIFFER) as found:
        run.load(saved)
    (warning,) = found
    assert f"lr was {before!r}, is {now!r}" in str(warning.message)
    assert warning.filename == __file__
    assert [run.step() for _ in range(15)] == now(range(10, 25)).tolist()


@each_layer
@pytest.mark.parametrize("schedule", [S.Cosine(0.1, total=10).warmup(2), S.ReduceOnPlateau(0.5)])
def test_the_same_schedule_and_callables_are_no_difference(layer, schedule):
    saved = after(layer, schedule, 4)
    for now in (copy.deepcopy(schedule), schedule.__call__):
        layer(now).load(saved)
        layer(now).load(after(layer, schedule.__call__, 4))


@each_layer
def test_a_callable_is_left_alone(layer):
    class Function:
        def __call__(self, t):
            return 0.25

        def __deepcopy__(self, memo):
            raise TypeError("not to be copied")

    run = layer(Function())
    run.load(after(layer, S.Cosine(0.1, total=10), 3))
    assert run.step() == 0.25


PLATEAU = S.ReduceOnPlateau(0.5, factor=0.5, patience=0)


@each_layer
@pytest.mark.parametrize(
    "around",
    [
        lambda plateau: plateau,
        lambda plateau: plateau.warmup(2),
        lambda plateau: S.Constant(0.25).then(plateau, at=2),
        lambda plateau: plateau.then(S.Constant(0.25), at=50),
        lambda plateau: (3 * plateau).warmup(1).then(S.Constant(0.25), at=50) * 0.5,
    ],
)
@pytest.mark.parametrize(
    "changed",
    [{}, {"patience": 3}, {"factor": 0.25, "min_lr": 0.01}, {"threshold_mode": "abs", "eps": 0.0}],
)
def test_progress_is_taken_over_by_a_plateau_of_other_arguments(layer, around, changed):
    saved = after(layer, around(copy.deepcopy(PLATEAU)), 3, [1.0, 2.0, 2.0])
    plateau = S.ReduceOnPlateau(**{"lr": 0.5, "factor": 0.5, "patience": 0, **changed})
    run = layer(around(plateau))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run.load(saved)
    assert len(found) == bool(changed)
    assert plateau.progress == (0.125, 1.0, 0, 0)
    assert run.step() == around(plateau)(3)
    plateau.step(3.0)
    run.step()
    assert run.step() == around(plateau)(5)


@each_layer
def test_a_warning_that_is_an_error_leaves_all_as_it_was(layer):
    saved = after(layer, copy.deepcopy(PLATEAU).warmup(2), 5, [1.0, 2.0])
    plateau = copy.deepcopy(PLATEAU)
    run = layer(plateau.warmup(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=DIFFER):
            run.load(saved)
    assert (plateau.progress, run.steps) == (None, 0)


@each_layer
def test_a_schedule_of_a_class_that_is_not_known_is_a_difference(layer):
    saved = after(layer, S.Constant(0.1).warmup(2), 3)
    text = json.dumps(saved).replace('"Constant"', '"Mine"')
    run = layer(S.Constant(0.2))
    with pytest.warns(UserWarning, match=r"lr was .*'Mine'.*, is Constant\(lr=0.2\)"):
        run.load(json.loads(text))
    assert run.step() == 0.2


def test_a_neutral_checkpoint_says_once_what_differs_in_all_groups():
    def make(lr, decay, beta):
        arrays = {name: np.ones(2) for name in "ab"}
        group = fs.Group("b", weight_decay=decay)
        return fs.AdamW(arrays, lr=lr, betas=(beta, 0.99), groups=[group])

    saved = make(S.Constant(0.1), S.Constant(0.1), S.Constant(0.5)).state_dict()
    with pytest.warns(UserWarning, match=DIFFER) as found:
        make(S.Constant(0.2), 0.1, S.Constant(0.4)).load_state_dict(saved)
    (warning,) = found
    said = str(warning.message)
    assert said.count("lr was Constant(lr=0.1), is Constant(lr=0.2)") == 1
    assert said.count("betas[0] was Constant(lr=0.5), is Constant(lr=0.4)") == 1
    assert said.count("weight_decay was Constant(lr=0.1), is 0.1") == 1
    make(lambda t: 0.1, lambda t: 0.1, lambda t: 0.5).load_state_dict(saved)


def test_a_checkpoint_of_torch_has_no_schedules_to_differ_from():
    opt = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    opt.param_groups[0]["params"][0].grad = torch.ones(2)
    opt.step()
    mine = fs.AdamW([np.ones(2, np.float32)], lr=S.Cosine(0.1, total=20))
    mine.load_state_dict(opt.state_dict())
    assert mine.step([np.ones(2, np.float32)]).lr == S.Cosine(0.1, total=20)(1)
