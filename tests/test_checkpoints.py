"""What a checkpoint holds, and that a run which resumes from it goes on as if never stopped."""

import copy
import functools

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES
from this_torch import needs_names

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
each_class = pytest.mark.parametrize("name", list(CASES))


@functools.cache
def tensors(seed):
    """One small tensor of each dtype."""
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(9, generator=draw, dtype=torch.float64).to(d) for d in DTYPES]


class Neutral:
    """A neutral optimizer over tensors; `Torch` is the same for a class of fusedstep.torch."""

    def __init__(self, name, hypers, values):
        self.params = [value.clone() for value in values]
        self.opt = getattr(fs, name)(self.params, **hypers)

    def step(self, grads):
        self.opt.step(grads)


class Torch:
    def __init__(self, name, hypers, values):
        self.params = [torch.nn.Parameter(value.clone()) for value in values]
        self.opt = getattr(ft, name)(self.params, **hypers)

    def step(self, grads):
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = grad
        self.opt.step()


each_layer = pytest.mark.parametrize("layer", [Neutral, Torch])


def bits(value):
    """A tree of tensors, arrays and numbers, with dtype and bytes of each."""
    if isinstance(value, dict):
        return {key: bits(one) for key, one in value.items()}
    if isinstance(value, list):
        return [bits(one) for one in value]
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tobytes()
    return value


def moment(run):
    """What a run is made of: the values of parameters, and a copy of the state."""
    return [p.detach().clone() for p in run.params], copy.deepcopy(run.opt.state_dict())


def resumed(layer, name, hypers, values, saved):
    run = layer(name, hypers, values)
    run.opt.load_state_dict(saved)
    return run


@each_layer
@each_class
def test_a_run_resumes_to_the_bit_at_every_step(layer, name):
    hypers = max(CASES[name], key=len)
    straight = layer(name, hypers, tensors(0))
    before = None
    for t in range(40):
        straight.step(tensors(1 + t % 7))
        after = moment(straight)
        if before:
            again = resumed(layer, name, hypers, *before)
            again.step(tensors(1 + t % 7))
            assert bits(list(moment(again))) == bits(list(after)), f"step {t + 1}"
        before = after


@each_layer
def test_a_step_count_past_2_to_the_24_is_stored_whole(layer):
    run = layer("RAdam", {}, tensors(0))
    run.step(tensors(1))
    saved = copy.deepcopy(run.opt.state_dict())
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(2.0**24 - 1)
    saved["step"] = 2**24 - 1
    run.opt.load_state_dict(saved)
    for count in range(2**24, 2**24 + 4):
        values, saved = moment(run)
        again = resumed(layer, "RAdam", {}, values, saved)
        for one in (run, again):
            one.step(tensors(2))
        assert bits(list(moment(again))) == bits(list(moment(run)))
        entries = run.opt.state_dict()["state"].values()
        assert {int(entry["step"]) for entry in entries} == {count}


@pytest.mark.parametrize("name", ["NAdam", "ASGD"])
def test_float32_counts_put_into_the_state_are_used_as_they_are(name):
    # As torch keeps them. What the state then shows is what the next step uses.
    run = Torch(name, {}, tensors(0))
    run.step(tensors(1))
    for entry in run.opt.state.values():
        for key in {"mu_product", "eta", "mu"} & set(entry):
            entry[key] = entry[key].float()
    twin = resumed(Torch, name, {}, *moment(run))
    for seed in (2, 3):
        run.step(tensors(seed))
        twin.step(tensors(seed))
    assert bits(list(moment(twin))) == bits(list(moment(run)))


# -- states that begin later than the first step --------------------------------------------------

LATE = {
    "momentum_buffer": ("RMSprop", {"lr": 0.1}, {"momentum": 0.9}),
    "momentum_buffer of SGD": ("SGD", {"lr": 0.1}, {"momentum": 0.9, "dampening": 0.5}),
    "grad_avg": ("RMSprop", {"lr": 0.1}, {"centered": True}),
    "max_exp_avg_sq": ("AdamW", {"lr": 0.1}, {"amsgrad": True}),
}


@each_layer
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("late", LATE)
def test_a_run_resumes_where_a_state_begins_late(layer, at, late):
    name, hypers, edit = LATE[late]
    straight = layer(name, hypers, tensors(0))
    for t in range(at):
        straight.step(tensors(1 + t))
        if t == 1:
            straight.opt.param_groups[0].update(edit)
    again = resumed(layer, name, hypers, *moment(straight))
    for t in range(at, 6):
        for run in (straight, again):
            run.step(tensors(1 + t))
            if t == 1:
                run.opt.param_groups[0].update(edit)
    assert bits(list(moment(again))) == bits(list(moment(straight)))


@pytest.mark.parametrize("name", ["RMSprop", "SGD"])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_a_run_resumes_before_its_scheduled_momentum_begins(name, at):
    hypers = {"lr": 0.1, "momentum": lambda t: 0.0 if t < 2 else 0.9}
    straight = Neutral(name, hypers, tensors(0))
    for t in range(at):
        straight.step(tensors(1 + t))
    again = resumed(Neutral, name, hypers, *moment(straight))
    for t in range(at, 6):
        for run in (straight, again):
            run.step(tensors(1 + t))
    assert bits(list(moment(again))) == bits(list(moment(straight)))


# -- names ----------------------------------------------------------------------------------------


def named(order, cls=fs.Adam, **hypers):
    """An optimizer of parameters of one shape, each stepped by gradients of its own."""
    arrays = {name: np.ones(3, np.float32) for name in order}
    opt = cls(arrays, **hypers)
    opt.step({name: np.full(3, ord(name[0]), np.float32) for name in order})
    return opt


def moments_of(opt):
    return {str(name): entry["exp_avg"].tolist() for name, entry in opt.state.items()}


def test_a_checkpoint_goes_by_names():
    saved = named(["enc", "dec", "out"])
    other = fs.Adam({name: np.ones(3, np.float32) for name in ("out", "enc", "dec")})
    other.load_state_dict(saved.state_dict())
    assert moments_of(other) == moments_of(saved)
    assert saved.state_dict()["param_groups"][0]["param_names"] == ["enc", "dec", "out"]


@pytest.mark.parametrize("form", [dict, fs.FlatBuffer.pack])
def test_numbers_are_names_too(form):
    arrays = [form({k: np.ones(3, np.float32) for k in order}) for order in ([0, 1, 2], [2, 0, 1])]
    saved, other = map(fs.Adam, arrays)
    saved.step({k: np.full(3, k + 1, np.float32) for k in (0, 1, 2)})
    for one, two in ((saved, other), (other, saved)):
        two.load_state_dict(one.state_dict())
        assert moments_of(two) == moments_of(one)


def test_a_checkpoint_s_groups_go_by_the_names_in_them():
    groups = [fs.Group("e*", lr=0.5), fs.Group("d*", lr=0.25)]
    saved = named(["enc", "dec", "out"], groups=groups, lr=fs.schedules.Linear(0.125, total=9))
    other = named(["dec", "out", "enc"], groups=groups[::-1], lr=fs.schedules.Linear(0.125, 9))
    other.load_state_dict(saved.state_dict())
    assert moments_of(other) == moments_of(saved)
    assert [group["lr"] for group in other.param_groups][1:] == [0.25, 0.5]
    again = named(["enc", "dec", "out"], groups=groups[:1])
    with pytest.raises(ValueError, match=r"\['dec', 'out'\] as one group, got groups \[\['out'\]"):
        again.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["enc", "head"], r"names of params, got missing \['head'\], unknown \['dec'\]"),
        (["enc"], r"names of params, got missing \[\], unknown \['dec'\]"),
        (["enc", "dec", "out"], r"names of params, got missing \['out'\], unknown \[\]"),
    ],
)
def test_a_checkpoint_of_other_names_is_refused(names, message):
    opt = named(names)
    before = bits(opt.state_dict())
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(named(["enc", "dec"]).state_dict())
    assert bits(opt.state_dict()) == before


def test_a_checkpoint_without_names_goes_by_position():
    saved = named(["enc", "dec"]).state_dict()
    listed = fs.Adam([np.ones(3, np.float32) for _ in range(2)])
    listed.load_state_dict(saved)
    assert moments_of(listed) == {"0": moments_of(named(["enc"]))["enc"],
                                  "1": moments_of(named(["dec"]))["dec"]}  # fmt: skip
    assert "param_names" not in listed.state_dict()["param_groups"][0]
    other = named(["dec", "enc"])
    other.load_state_dict(listed.state_dict())
    assert moments_of(other)["dec"] == moments_of(listed)["0"]


def test_a_group_keeps_a_checkpoint_s_other_keys():
    param = torch.nn.Parameter(torch.ones(3))
    theirs = torch.optim.Adam([{"params": [param], "name": "head", "note": [1]}])
    saved = theirs.state_dict()
    opt = fs.Adam([torch.ones(3)])
    opt.load_state_dict(saved)
    saved["param_groups"][0]["note"].append(2)
    for found in (opt, copy.deepcopy(opt), copy.copy(opt)):
        assert found.param_groups[0]["name"] == "head"
        assert found.state_dict()["param_groups"][0]["note"] == [1]
    with pytest.raises(ValueError, match="hyperparameter must be one of"):
        opt.param_groups[0]["nmae"] = 1


# -- what is no whole checkpoint ------------------------------------------------------------------


def small(layer, name, seeds):
    """A run with two parameters under all that the class can do, after a step for each seed."""
    run = layer(name, max(CASES[name], key=len), tensors(0)[:2])
    for seed in seeds:
        run.step(tensors(seed)[:2])
    return run


def assert_refused(run, saved, message="state_dict"):
    before = bits(list(moment(run)))
    with pytest.raises((TypeError, ValueError), match=message):
        run.opt.load_state_dict(saved)
    assert bits(list(moment(run))) == before


@each_layer
@each_class
def test_a_checkpoint_that_lacks_a_state_is_refused(layer, name):
    saved, run = small(layer, name, [1, 2]).opt.state_dict(), small(layer, name, [3])
    entry = saved["state"][0]
    for key in entry if name != "SGD" else ():  # whose buffer is all: the entry is gone then
        state = {**saved["state"], 0: {n: value for n, value in entry.items() if n != key}}
        assert_refused(
            run, {**saved, "state": state}, rf"\['state'\]\[0\] must have the key '{key}'"
        )


HOSTILE = [
    *(None, "x", b"x", [], {}, (), set(), -1, 1.5, 2**53, 2**63, 2**80, np.nan, np.inf, True, 1j),
    *(object(), iter([1]), range(3), [None], {1: {}}, np.zeros((2, 2)), np.float64(np.nan)),
    *(torch.tensor(np.nan), torch.tensor([1.0, 2.0]), torch.tensor(1j), torch.zeros(3, 3)),
    *(torch.zeros(9).to_sparse(), torch.zeros(9, device="meta"), torch.zeros(9, dtype=torch.int32)),
    *(torch.zeros(9, dtype=torch.complex64), torch.tensor(1.0, device="meta"), torch.tensor(True)),
]


def places(tree, at=()):
    """The path of everything in a tree of dicts and lists."""
    yield at
    inside = tree.items() if isinstance(tree, dict) else ()
    for key, value in enumerate(tree) if isinstance(tree, list) else inside:
        yield from places(value, (*at, key))


def spoiled(tree, path, value):
    """The tree with `value` at a path; the containers on the way are copies."""
    if not path:
        return value
    result = copy.copy(tree)
    result[path[0]] = spoiled(tree[path[0]], path[1:], value)
    return result


@each_layer
@each_class
def test_a_checkpoint_is_taken_whole_or_refused_with_a_reason(layer, name):
    saved, run = small(layer, name, [1, 2]).opt.state_dict(), small(layer, name, [3])
    spoils = [(path, k) for path in places(saved) for k in range(len(HOSTILE))]
    first, messages = list(CASES).index(name), []
    for path, k in spoils[first::17]:
        before = bits(list(moment(run)))
        try:
            run.opt.load_state_dict(spoiled(saved, path, HOSTILE[k]))
        except (TypeError, ValueError) as error:
            messages.append(str(error))
            assert bits(list(moment(run))) == before
        else:
            run.step(tensors(4)[:2])  # what was taken can be used
            run = small(layer, name, [3])
    assert len(messages) > 10
    assert [text for text in messages if "state_dict" not in text] == []


@pytest.mark.parametrize("wrong", [None, 3, [], "x", {}, {"state": {}}, {"param_groups": []}])
@each_layer
def test_something_else_than_a_checkpoint_is_refused(layer, wrong):
    assert_refused(small(layer, "Adam", [1]), wrong)


@each_layer
def test_a_parameter_that_occurs_twice_is_refused(layer):
    run = small(layer, "Adam", [1])
    saved = copy.deepcopy(run.opt.state_dict())
    saved["param_groups"][0]["params"] = [0, 0]
    assert_refused(run, saved, r"\['params'\]\[1\] must occur once, got 0 twice")


def test_what_users_keep_in_the_state_is_copied():
    run = small(Torch, "Adam", [1])
    mine = {"note": [1], "text": "abc", "array": np.ones(2), "ema": torch.ones(3).double()}
    run.opt.state[run.params[0]].update(mine)
    run.opt.state["all"] = {"rounds": [1]}
    saved = run.opt.state_dict()
    again = resumed(Torch, "Adam", {"amsgrad": True}, tensors(0)[:2], saved)
    entry = again.opt.state[again.params[0]]
    assert bits({key: entry[key] for key in mine}) == bits(mine)
    mine["note"].append(2)
    mine["array"][:] = 2
    mine["ema"].zero_()
    run.opt.state["all"]["rounds"].append(2)
    assert (entry["note"], entry["array"].tolist(), entry["ema"].tolist()) == ([1], [1, 1], [1] * 3)
    assert again.opt.state["all"] == {"rounds": [1]}


def test_what_users_keep_in_the_state_before_a_first_step_is_no_state_begun():
    run = small(Torch, "NAdam", [])
    run.opt.state[run.params[0]]["note"] = 1
    _ = run.opt.state[run.params[1]]  # which makes an empty one
    again = resumed(Torch, "NAdam", {}, tensors(0)[:2], run.opt.state_dict())
    again.step(tensors(1)[:2])
    assert again.opt.state[again.params[0]]["note"] == 1


def test_a_checkpoint_of_another_rule_is_refused_by_torch_s_class_too():
    run = small(Torch, "SGD", [1])
    other = small(Torch, "Adagrad", [1]).opt.state_dict()
    other["param_groups"] = run.opt.state_dict()["param_groups"]
    assert_refused(run, other, "must have the key")


def test_hooks_may_make_a_checkpoint_of_something_else():
    run = small(Torch, "Adam", [1, 2])
    again = small(Torch, "Adam", [3])
    again.opt.register_load_state_dict_pre_hook(lambda opt, given: given["inside"])
    again.opt.load_state_dict({"inside": run.opt.state_dict()})
    assert bits(again.opt.state_dict()["state"]) == bits(run.opt.state_dict()["state"])


@needs_names
def test_names_in_another_order_are_followed_by_torch_s_class():
    def make(order):
        params = {name: torch.nn.Parameter(torch.ones(3)) for name in order}
        opt = ft.Adam([(name, params[name]) for name in order])
        for name, param in params.items():
            param.grad = torch.full((3,), float(ord(name[0])))
        return params, opt

    params, opt = make(["enc", "dec"])
    opt.step()
    others, again = make(["dec", "enc"])
    again.load_state_dict(opt.state_dict())
    for name, param in params.items():
        assert torch.equal(again.state[others[name]]["exp_avg"], opt.state[param]["exp_avg"])
    assert again.param_groups[0]["param_names"] == ["dec", "enc"]
    neutral = fs.Adam({name: param.detach().clone() for name, param in others.items()})
    neutral.load_state_dict(opt.state_dict())
    assert neutral.state["dec"]["exp_avg"].tolist() == opt.state[params["dec"]]["exp_avg"].tolist()


# -- attributes and copies ------------------------------------------------------------------------


@each_layer
@each_class
def test_a_hyperparameter_set_as_an_attribute_is_refused(layer, name):
    run = small(layer, name, [1])
    for key in set(run.opt.param_groups[0]) & set(fs.SGD._spec.table):
        before = repr(run.opt)
        if key in run.opt._read if layer is Torch else key != "decoupled_weight_decay":
            with pytest.raises(
                AttributeError, match=rf'must be set as opt.param_groups\[0\]\["{key}"\], got 5'
            ):
                setattr(run.opt, key, 5)
            assert not hasattr(run.opt, key)
        assert repr(run.opt) == before


@pytest.mark.parametrize("name", ["learning_rate", "momentum", "max_norm", "foo"])
def test_an_attribute_that_a_neutral_optimizer_has_not_is_refused(name):
    opt = fs.Adam(np.ones(3))
    with pytest.raises(
        AttributeError, match=rf"{name} must be one of lr, betas, .* got opt.{name} = 5"
    ):
        setattr(opt, name, 5)
    for fixed in ("steps", "params", "param_groups", "state", "grad_norm"):
        with pytest.raises(AttributeError):
            setattr(opt, fixed, 5)


def test_groups_and_reports_refuse_attributes():
    group = fs.Group("w*", lr=0.5)
    with pytest.raises(AttributeError, match=r"lr must be set in group.hypers\['lr'\], got 5"):
        group.lr = 5
    opt = fs.Adam({"w": np.ones(3)}, groups=[group])
    with pytest.raises(AttributeError, match=r'lr must be set as group\["lr"\], got 5'):
        opt.param_groups[1].lr = 5
    with pytest.raises(AttributeError):
        opt.step({"w": np.ones(3)}).lr = 5


@pytest.mark.parametrize("base", [fs.Adam, ft.Adam])
def test_a_subclass_has_attributes_of_its_own(base):
    class Mine(base):
        def __init__(self, params):
            self.early = 1
            super().__init__(params)
            self.late = 2

    opt = Mine([torch.nn.Parameter(torch.ones(3))] if base is ft.Adam else np.ones(3))
    for one in (opt, copy.deepcopy(opt)) if base is fs.Adam else (opt,):  # torch's copies drop them
        assert (one.early, one.late) == (1, 2)


def test_a_subclass_of_a_torch_class_may_keep_its_rate():
    class Mine(ft.Adam):
        def __init__(self, params, lr):
            self.lr = lr
            super().__init__(params, lr=lr)

    assert Mine([torch.nn.Parameter(torch.ones(3))], 0.5).lr == 0.5
    with pytest.raises(AttributeError, match="'Adam' object has no attribute 'lr'"):
        _ = ft.Adam([torch.nn.Parameter(torch.ones(3))]).lr


@each_class
@pytest.mark.parametrize("flat", [False, True])
def test_a_shallow_copy_is_an_optimizer_of_its_own_over_the_same_parameters(name, flat):
    params = {"a": np.ones(3, np.float32), "b": np.ones(4, np.float64)}
    params = fs.FlatBuffer.pack({"a": params["a"]}) if flat else params
    grads = {key: np.full_like(value, 0.5) for key, value in params.items()}
    opt = getattr(fs, name)(params, **max(CASES[name], key=len))
    opt.step(grads)
    twin, before = copy.copy(opt), bits(copy.deepcopy(opt.state_dict()))
    assert bits(twin.state_dict()) == before
    twin.param_groups[0]["lr"] = 0.75
    twin.step(grads)
    assert bits(opt.state_dict()) == before
    assert (opt.steps, twin.steps) == (1, 2)
    assert all(np.shares_memory(twin.params[key], opt.params[key]) for key in opt.params)
    opt.step(grads)
    again = bits(copy.deepcopy(twin.state_dict()))
    opt.step(grads)
    assert bits(twin.state_dict()) == again


def test_a_shallow_copy_of_torch_s_shares_state_and_groups_as_theirs():
    run = small(Torch, "Adam", [1])
    twin = copy.copy(run.opt)
    assert twin.state is run.opt.state
    assert twin.param_groups is run.opt.param_groups
    twin.step()
    run.step(tensors(2)[:2])
    assert float(run.opt.state[run.params[0]]["step"]) == 3


@pytest.mark.parametrize("layer", ["neutral", "torch"])
def test_a_state_of_none_is_called_missing_and_not_listed_as_there(layer):
    param = torch.nn.Parameter(torch.ones(3))
    opt = fs.Adam([np.ones(3, "f4")]) if layer == "neutral" else ft.Adam([param])
    param.grad = torch.ones(3)
    opt.step(*([[np.ones(3, "f4")]] if layer == "neutral" else []))
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["exp_avg"] = None
    with pytest.raises(ValueError, match=r"the key 'exp_avg', got \['step', 'exp_avg_sq'\]"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize("names", [None, 3, "bias_correction", torch.zeros(9)])
@each_layer
def test_what_a_group_has_beyond_torch_s_is_a_list_of_names(layer, names):
    saved = small(Torch, "Adam", [1]).opt.state_dict()
    saved["param_groups"][0] |= {"bias_correction": False, "fusedstep": names}
    assert_refused(small(layer, "Adam", [1]), saved, r"\['fusedstep'\] must be a list, got")
