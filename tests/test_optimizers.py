"""The optimizers as objects: kinds of memory, groups, schedules, reports, checkpoints, copies."""

import copy
import inspect
import pickle
import re
import sys

import ml_dtypes
import numpy as np
import pytest

import fusedstep as fs
from cases import CASES, each_case, make
from fusedstep._types import Hypers
from optional import optional

torch = optional("torch")

SHAPES = {"w1": (3, 7), "b1": (7,), "w2": (33,), "s": ()}
each_class = pytest.mark.parametrize("cls", [getattr(fs, name) for name in CASES])


class Exporter:
    """Memory that is reachable through DLPack alone, by the newest or by the first protocol."""

    def __init__(self, array, legacy=False):
        self.array, self.legacy = array, legacy

    def __dlpack__(self, **keywords):
        if self.legacy and keywords:
            raise TypeError("the first protocol has no max_version")
        return self.array.__dlpack__(**keywords)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def values(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {k: np.asarray(rng.standard_normal(s)).astype(dtype) for k, s in SHAPES.items()}


def to_torch(array):
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def raw(array):
    array = getattr(array, "array", array)  # an Exporter's
    if isinstance(array, torch.Tensor):
        array = array.detach().reshape(-1).view(torch.uint8).numpy()
    return array.tobytes()


def contents(opt):
    """All that an optimizer has computed, as bytes and numbers."""
    state = opt.state_dict()["state"]
    return (
        {str(name): raw(array) for name, array in opt.params.items()},
        {i: {k: np.asarray(v).tobytes() for k, v in s.items()} for i, s in state.items()},
        opt.steps,
    )


def run(opt, seeds, keys=None):
    for seed in seeds:
        grads = values(seed)
        opt.step(list(grads.values()) if keys is None else {k: grads[k] for k in keys})
    return opt


# -- what memory it takes -------------------------------------------------------------------------


def forms():
    """Ways to hand over the same arrays: parameters and gradients from a dict of NumPy arrays."""

    def tensors(arrays):
        return {k: to_torch(a) for k, a in arrays.items()}

    def leaves(arrays):
        return {k: t.requires_grad_() for k, t in tensors(arrays).items()}

    def exporters(arrays, legacy=False):
        return {k: Exporter(to_torch(a), legacy) for k, a in arrays.items()}

    def listed(form):
        return lambda arrays: list(form(arrays).values())

    yield "dict", dict, dict
    yield "list", listed(dict), listed(dict)
    yield "tuple", lambda a: tuple(a.values()), lambda a: tuple(a.values())
    yield "generator", lambda a: iter(a.values()), lambda a: iter(a.values())
    yield "buffer", fs.FlatBuffer.pack, fs.FlatBuffer.pack
    yield "buffer, dict", fs.FlatBuffer.pack, dict
    yield "buffer, tensors", fs.FlatBuffer.pack, tensors
    yield "dict, buffer", dict, fs.FlatBuffer.pack
    yield "tensors", listed(tensors), listed(tensors)
    yield "leaves", listed(leaves), listed(tensors)
    yield "leaves, arrays", leaves, dict
    yield "leaves, leaves", leaves, leaves
    yield "exporters", listed(exporters), listed(exporters)
    yield "list, legacy exporters", listed(dict), listed(lambda a: exporters(a, legacy=True))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    ("params", "grads"), [pytest.param(p, g, id=name) for name, p, g in forms()]
)
def test_form_of_memory_does_not_change_a_bit(params, grads, dtype):
    expected = values(0, dtype)
    opt = fs.Adam(expected, lr=0.1)
    for seed in (1, 2):
        opt.step(values(seed, dtype))

    start = values(0, dtype)
    held = params(start)
    opt = fs.Adam(held, lr=0.1)
    reports = [opt.step(grads(values(seed, dtype))) for seed in (1, 2)]
    assert reports == [(1, 0.1, 62), (2, 0.1, 62)]
    assert [raw(p) for p in opt.params.values()] == [raw(p) for p in expected.values()]
    if not isinstance(held, fs.FlatBuffer):  # in place, so the arrays we came with have changed
        assert [raw(p) for p in start.values()] == [raw(p) for p in expected.values()]


def test_one_array_is_taken_with_one_gradient():
    for wrap in (lambda a: a, to_torch, Exporter, lambda a: [a], lambda a: {"p": a}):
        param = np.ones(4, np.float32)
        opt = fs.SGD(wrap(param), lr=0.5)
        grad = np.full(4, 2, np.float32)
        assert opt.step(wrap(grad)) == (1, 0.5, 4)
        assert param.tolist() == [0, 0, 0, 0]
        assert grad.tolist() == [2, 2, 2, 2]


def test_torch_leaf_trains_by_its_grad():
    model = torch.nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    opt = fs.SGD(dict(model.named_parameters()), lr=0.1)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, foreach=False)
    x = torch.ones(5, 3)
    for _ in range(3):
        for module in (model, twin):
            module.zero_grad()
            module(x).square().sum().backward()
        opt.step({name: p.grad for name, p in model.named_parameters()})
        other.step()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert p.is_leaf
        assert p.requires_grad
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("grad", ["float32", "bfloat16", "float16"])
def test_torch_float32_param_takes_narrow_gradients(grad):
    param = torch.zeros(40)
    grads = torch.linspace(-1, 1, 40).to(getattr(torch, grad))
    fs.SGD(param, lr=1.0).step(grads)
    assert torch.equal(param, -grads.float())


def test_params_are_held_and_named():
    arrays = values(0)
    assert list(fs.SGD(arrays).params) == list(SHAPES)
    assert list(fs.SGD(list(arrays.values())).params) == [0, 1, 2, 3]
    opt = fs.SGD(arrays)
    assert all(opt.params[name] is array for name, array in arrays.items())
    view = arrays["w1"]
    del arrays
    run(opt, [1])
    assert np.shares_memory(opt.params["w1"], view)


@each_class
def test_state_has_the_parameter_s_shape_and_float32_or_float64(cls):
    for dtype, state_dtype in [("float16", "float32"), ("float32", "float32"), ("float64",) * 2]:
        opt = cls(values(0, dtype))
        opt.step(values(1, dtype))
        for name, states in opt.state.items():
            for array in states.values():
                assert (array.shape, array.dtype) == (SHAPES[name], np.dtype(state_dtype))


def test_mixed_dtypes_step_together():
    dtypes = ["float32", "float64", "float16"]
    params = {d: np.ones(100, d) for d in dtypes}
    opt = fs.Adam(params, lr=0.5)
    assert opt.step({d: np.ones(100, d) for d in dtypes}).elements == 300
    for d in dtypes:
        alone = np.ones(100, d)
        fs.Adam(alone, lr=0.5).step(np.ones(100, d))
        assert params[d].tobytes() == alone.tobytes()


# -- memory that moves under an optimizer ---------------------------------------------------------


@pytest.mark.parametrize("size", [100_000, 3, 0])
def test_param_resized_is_an_error_not_a_stale_write(size):
    param = np.ones(64, np.float32)
    opt = fs.SGD(param, lr=1.0)
    grad = np.ones(64, np.float32)
    opt.step(grad)
    param.resize(size, refcheck=False)
    before = param.tobytes()
    for g in (grad, np.ones(size, np.float32)):
        with pytest.raises(ValueError, match=r"params\[0\] must .*got"):
            opt.step(g)
    assert param.tobytes() == before
    assert opt.steps == 1


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")  # NumPy 2.5 and later
def test_param_given_another_shape_is_an_error():
    param = np.ones((4, 6), np.float32)
    opt = fs.SGD(param, lr=1.0)
    param.shape = (24,)
    for g in (np.ones(24, np.float32), np.ones((4, 6), np.float32)):
        with pytest.raises(ValueError, match=r"params\[0\] must .*got"):
            opt.step(g)
    assert (param == 1).all()
    param.shape = (4, 6)
    opt.step(np.ones((4, 6), np.float32))
    assert not param.any()


def test_torch_param_replaced_is_an_error():
    param = torch.ones(8)
    old = param.data
    opt = fs.SGD({"p": param}, lr=1.0)
    param.data = torch.ones(8)
    with pytest.raises(ValueError, match=r"params\[p\] must stay where it was"):
        opt.step(torch.ones(8))
    assert (param == 1).all()
    assert (old == 1).all()


# -- groups ---------------------------------------------------------------------------------------


def pack(arrays):
    return fs.FlatBuffer.pack(arrays)


@pytest.mark.parametrize("form", [dict, pack])
def test_group_first_match_wins(form):
    groups = [fs.Group("b*", lr=0.5), fs.Group(["s", "?1"], lr=0.25), fs.Group("[w]*", lr=0.125)]
    opt = fs.SGD(form(values(0)), lr=8.0, groups=groups)
    before = values(0)
    grads = {k: np.ones(s, np.float32) for k, s in SHAPES.items()}
    opt.step(grads)
    rates = {"w1": 0.25, "b1": 0.5, "w2": 0.125, "s": 0.25}
    for name, rate in rates.items():
        assert np.array_equal(opt.params[name], before[name] - np.float32(rate))
    assert [g["params"] for g in opt.param_groups] == [[], [1], [0, 3], [2]]
    assert [g["lr"] for g in opt.param_groups] == [8.0, 0.5, 0.25, 0.125]


def test_group_matches_case_and_the_whole_name():
    names = ["w", "W", "aw", "wb", "w.x"]
    opt = fs.SGD({n: np.ones(1, np.float32) for n in names}, groups=[fs.Group("w", lr=0.5)])
    assert opt.param_groups[1]["params"] == [0]


def test_group_numbers_name_listed_parameters():
    arrays = [np.ones(1, np.float32) for _ in range(12)]
    opt = fs.SGD(arrays, groups=[fs.Group("1*", lr=0.5)])
    assert opt.param_groups[1]["params"] == [1, 10, 11]


@each_class
@pytest.mark.parametrize("form", [dict, pack])
def test_groups_step_as_separate_optimizers_would(cls, form):
    together = form(values(0))
    opt = cls(together, lr=0.1, groups=[fs.Group("w*", lr=0.3, weight_decay=0.05)])
    apart = values(0)
    w = cls({k: apart[k] for k in ("w1", "w2")}, lr=0.3, weight_decay=0.05)
    rest = cls({k: apart[k] for k in ("b1", "s")}, lr=0.1)
    for seed in (1, 2, 3):
        grads = values(seed)
        opt.step(form(grads))
        run(w, [seed], ["w1", "w2"])
        run(rest, [seed], ["b1", "s"])
    for name, array in apart.items():
        assert together[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("form", [dict, pack])
def test_group_state_starts_with_its_own_value(form):
    shapes = {"a": (4,), "b": (4,), "c": (4,)}  # one shape, so that a mix-up could go unseen
    arrays = {k: np.ones(s, np.float32) for k, s in shapes.items()}
    groups = [fs.Group("b", initial_accumulator_value=0.5)]
    opt = fs.Adagrad(form(arrays), initial_accumulator_value=0.25, groups=groups)
    assert {k: s["sum"][0] for k, s in opt.state.items()} == {"a": 0.25, "b": 0.5, "c": 0.25}


# -- reports and schedules ------------------------------------------------------------------------


def test_report_counts_steps_and_elements():
    opt = fs.SGD(values(0), lr=lambda t: 0.5 / (t + 1), groups=[fs.Group("s", lr=9.0)])
    first = opt.step(values(1))
    assert isinstance(first, fs.StepReport)
    assert (first.step, first.lr, first.elements) == (1, 0.5, 62)
    second = opt.step({**values(1), "w2": None})
    assert second == (2, 0.25, 29)
    assert opt.steps == 2


def test_schedule_is_called_with_0_1_2_once_per_step():
    seen, other = [], []
    opt = fs.SGD(
        values(0),
        lr=lambda t: seen.append(t) or 0.5,
        groups=[fs.Group("b*", lr=lambda t: other.append(t) or 0.25)],
    )
    run(opt, [1, 2, 3])
    assert seen == other == [0, 1, 2]
    assert all(type(t) is int for t in seen)


@each_class
def test_schedule_gives_the_bits_of_rates_set_by_hand(cls):
    rates = [0.1, 0.0, 0.05, 0.2, 0.3]
    scheduled = cls(values(0), lr=lambda t: rates[t])
    by_hand = cls(values(0))
    for t, rate in enumerate(rates[:-1]):
        by_hand.param_groups[0]["lr"] = rate
        run(by_hand, [t])
        assert scheduled.step(values(t)).lr == rate
    assert contents(scheduled) == contents(by_hand)  # asks the schedule for the next rate


@pytest.mark.parametrize("kind", [np.float32, np.array, lambda x: torch.tensor(x), int])
def test_schedule_may_return_any_real_scalar(kind):
    rate = kind(1.5)
    assert fs.SGD(values(0), lr=lambda t: rate).step(values(1)).lr == float(rate)


# -- edits ----------------------------------------------------------------------------------------

EDITS = {
    "SGD": [{"lr": 0.2}, {"momentum": 0.9}, {"dampening": 0.3}, {"momentum": 0.0},
            {"momentum": 0.5}, {"dampening": 0.0, "nesterov": True}, {"maximize": True}],
    "RMSprop": [{"lr": 0.02}, {"alpha": 0.8}, {"eps": 0.1}, {"weight_decay": 0.1}],
    "Adam": [{"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.1}, {"maximize": True}],
    "AdamW": [{"weight_decay": 0.0}, {"betas": (0.0, 0.9)}, {"lr": 0.0}, {"lr": 0.3}],
    "Adagrad": [{"lr_decay": 0.5}, {"eps": 0.1}],
}  # fmt: skip


@pytest.mark.parametrize("name", list(EDITS))
def test_edit_takes_effect_at_the_next_step_as_in_torch(name):
    params, tensors = values(0), [torch.from_numpy(a.copy()) for a in values(0).values()]
    opt = getattr(fs, name)(params, lr=0.1)
    peer = getattr(torch.optim, name)(tensors, lr=0.1, foreach=False)
    for seed, edit in enumerate([{}, {}, *EDITS[name], {}]):
        opt.param_groups[0].update(edit)
        peer.param_groups[0].update(edit)
        assert all(opt.param_groups[0][key] == value for key, value in edit.items())
        grads = values(seed)
        for tensor, grad in zip(tensors, grads.values(), strict=True):
            tensor.grad = torch.from_numpy(grad)
        opt.step(grads)
        peer.step()
        for p, tensor in zip(params.values(), tensors, strict=True):
            np.testing.assert_allclose(p, tensor.numpy(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("form", [dict, pack])
def test_momentum_switched_on_later_begins_with_the_whole_gradient(form):
    opt = run(fs.SGD(form(values(0)), lr=0.1, dampening=0.5), [1, 2])
    fresh = fs.SGD({k: a.copy() for k, a in opt.params.items()}, 0.1, 0.9, dampening=0.5)
    assert opt.state == {name: {} for name in SHAPES}
    opt.param_groups[0]["momentum"] = 0.9
    run(opt, [3, 4])
    run(fresh, [3, 4])
    assert contents(opt)[:2] == contents(fresh)[:2]


def test_momentum_switched_on_for_one_group_leaves_the_other_without_a_state():
    opt = run(fs.SGD(values(0), groups=[fs.Group("w*", lr=0.1)]), [1])
    opt.param_groups[1]["momentum"] = 0.9
    run(opt, [2])
    assert {name: list(state) for name, state in opt.state.items()} == {
        "w1": ["momentum_buffer"],
        "b1": [],
        "w2": ["momentum_buffer"],
        "s": [],
    }


def test_amsgrad_switched_on_later_takes_the_maximum_from_then_on():
    opt, plain = run(fs.Adam(values(0)), [1, 2]), run(fs.Adam(values(0)), [1, 2, 3])
    opt.param_groups[0]["amsgrad"] = True
    run(opt, [3])
    # The first maximum is of the second moment alone: the step is the plain one.
    for name, state in opt.state.items():
        assert state["max_exp_avg_sq"].tobytes() == plain.state[name]["exp_avg_sq"].tobytes()
    assert contents(opt)[0] == contents(plain)[0]


@pytest.mark.parametrize("option", [{"momentum": 0.9}, {"centered": True}])
def test_rmsprop_option_switched_on_later_starts_at_zero(option):
    opt = run(fs.RMSprop(values(0)), [1, 2])
    square = {name: state["square_avg"].copy() for name, state in opt.state.items()}
    opt.param_groups[0].update(option)
    run(opt, [3])
    for name, grad in values(3).items():
        new = opt.state[name].get("grad_avg", opt.state[name].get("momentum_buffer"))
        v = np.float32(0.99) * square[name] + (1 - np.float32(0.99)) * grad * grad
        expected = grad * 0.01 if "centered" in option else grad / (np.sqrt(v) + 1e-8)
        np.testing.assert_allclose(new, expected, rtol=1e-5)


@each_class
def test_repr_shows_every_hyperparameter(cls):
    opt = cls(values(0), groups=[fs.Group("b*", weight_decay=0.125)])
    text = repr(opt)
    assert text.startswith(f"{cls.__name__}(\n  4 parameters, 62 elements, float32\n")
    for group in opt.param_groups:
        for name, value in group.items():
            assert name == "params" or f"{name}={value!r}" in text
    assert "group 1 (1): " in text
    assert repr(opt.param_groups[1]).endswith("params=[1])")


# -- checkpoints ----------------------------------------------------------------------------------


def resume_by_state_dict(opt, name, hypers):
    params = {k: a.copy() for k, a in opt.params.items()}
    again = getattr(fs, name)(params)  # with defaults: the values come from the checkpoint
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    return again


def resume_by_pickle(opt, name, hypers):
    return pickle.loads(pickle.dumps(opt))


def resume_by_deepcopy(opt, name, hypers):
    return copy.deepcopy(opt)


def resume_by_pickled_state_dict(opt, name, hypers):
    params = fs.FlatBuffer.pack(opt.params)
    again = make(name, params, hypers)
    run(again, [7])  # whatever it had done before is forgotten
    params.flat[:] = fs.FlatBuffer.pack(opt.params).flat
    again.load_state_dict(pickle.loads(pickle.dumps(opt.state_dict())))
    return again


RESUMES = [resume_by_state_dict, resume_by_pickle, resume_by_deepcopy, resume_by_pickled_state_dict]


@each_case()
@pytest.mark.parametrize("resume", RESUMES)
def test_resume_is_bit_exact(name, hypers, resume):
    opt = run(make(name, values(0), hypers), [1, 2, 3])
    again = resume(opt, name, hypers)
    assert contents(again) == contents(opt)
    run(again, [4, 5])
    assert not any(np.shares_memory(again.params[k], opt.params[k]) for k in SHAPES)
    run(opt, [4, 5])
    assert contents(again) == contents(opt)
    assert list(map(dict, again.param_groups)) == list(map(dict, opt.param_groups))


@pytest.mark.parametrize("resume", [resume_by_pickle, resume_by_deepcopy])
def test_resume_keeps_a_flat_buffer_and_its_views_one(resume):
    params = fs.FlatBuffer.pack(values(0))
    groups = [fs.Group("b*", lr=0.5)]
    opt = run(fs.Adam(params, groups=groups), [1])
    again = resume(opt, "Adam", {})
    grads = fs.FlatBuffer.pack(values(2))
    opt.step(grads)
    again.step(grads)
    assert contents(again) == contents(opt)
    flat = np.concatenate([a.ravel() for a in again.params.values()])
    assert flat.size == params.n
    base = {id(a.base) for a in again.params.values()}
    assert len(base) == 1


def test_deepcopy_of_params_and_optimizer_together_keeps_them_together():
    params = fs.FlatBuffer.pack(values(0))
    twins, opt = copy.deepcopy((params, fs.SGD(params, lr=0.1)))
    before = params.flat.tobytes()
    run(opt, [1])
    assert params.flat.tobytes() == before
    assert twins.flat.tobytes() != before
    assert np.shares_memory(twins["w1"], opt.params["w1"])


def test_deepcopy_of_torch_leaves_keeps_training():
    leaf = torch.ones(5, requires_grad=True)
    opt = fs.Adam([leaf], lr=0.5)
    twin = copy.deepcopy(opt)
    twin.step([torch.ones(5)])
    assert (leaf == 1).all()
    assert torch.allclose(twin.params[0], torch.full((5,), 0.5))


def test_state_dict_arrays_are_live_and_hold_the_schedule_s_rate():
    rates = [0.5, 0.25]
    opt = fs.Adam(values(0), lr=lambda t: rates[t])
    assert opt.state_dict()["param_groups"][0]["lr"] == 0.5
    run(opt, [1, 2])  # the schedule has no third rate, and nothing may ask for one
    saved = opt.state_dict()
    assert saved["param_groups"][0]["lr"] == 0.25
    assert saved["step"] == 2
    assert saved["state"][0]["exp_avg"] is opt.state["w1"]["exp_avg"]


def test_load_state_dict_copies_and_keeps_a_schedule():
    rates = [0.5, 0.25, 0.125, 0.0625]
    opt = run(fs.Adam(values(0), lr=lambda t: rates[t]), [1, 2])
    saved = opt.state_dict()
    again = fs.Adam(values(0), lr=lambda t: 2 * rates[t])
    again.load_state_dict(saved)
    before = saved["state"][0]["exp_avg"].tobytes()
    assert again.step(values(3)) == (3, 0.25, 62)
    assert saved["state"][0]["exp_avg"].tobytes() == before


def test_load_state_dict_keeps_hyperparameters_that_it_lacks():
    opt = fs.Adam(values(0), bias_correction=False, lr=0.5)
    saved = run(fs.Adam(values(0), lr=0.25), [1]).state_dict()
    del saved["param_groups"][0]["bias_correction"]
    opt.load_state_dict(saved)
    assert opt.param_groups[0]["bias_correction"] is False
    assert opt.param_groups[0]["lr"] == 0.25


def test_load_state_dict_maps_groups_by_their_order():
    opt = fs.Adam(values(0), groups=[fs.Group("b*", lr=0.5), fs.Group("s", lr=0.25)])
    run(opt, [1, 2])
    again = fs.Adam(values(0), groups=[fs.Group("b*"), fs.Group("s")])
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert contents(again)[1:] == contents(opt)[1:]
    assert [g["lr"] for g in again.param_groups] == [1e-3, 0.5, 0.25]


def test_load_state_dict_of_itself_changes_nothing():
    opt = run(fs.NAdam(values(0)), [1, 2])
    before = contents(opt)
    opt.load_state_dict(opt.state_dict())
    assert contents(opt) == before


def test_load_state_dict_of_a_fresh_optimizer_forgets():
    opt = run(fs.Adagrad(values(0), initial_accumulator_value=0.5), [1, 2])
    opt.load_state_dict(fs.Adagrad(values(0), initial_accumulator_value=0.5).state_dict())
    assert opt.steps == 0
    assert all((state["sum"] == 0.5).all() for state in opt.state.values())


def entry(saved):
    return saved["state"][1]


def group(saved):
    return saved["param_groups"][0]


SPOILS = {
    "no state": lambda s: s.pop("state"),
    "no param_groups": lambda s: s.pop("param_groups"),
    "no params": lambda s: group(s).pop("params"),
    "fewer params": lambda s: group(s)["params"].pop(),
    "more groups": lambda s: s["param_groups"].append({**group(s), "params": [9]}),
    "unknown parameter": lambda s: s["state"].update({9: entry(s)}),
    "unknown group key": lambda s: group(s).update(momentum=0.5),
    "bad lr": lambda s: group(s).update(lr=-1.0),
    "NaN eps": lambda s: group(s).update(eps=np.nan),
    "text betas": lambda s: group(s).update(betas="ab"),
    "number amsgrad": lambda s: group(s).update(amsgrad=1),
    "unknown state": lambda s: entry(s).update(velocity=np.zeros(7, np.float32)),
    "other shape": lambda s: entry(s).update(exp_avg=np.zeros(8, np.float32)),
    "one element": lambda s: entry(s).update(exp_avg=np.zeros(1, np.float32)),
    "number for an array": lambda s: entry(s).update(exp_avg=0.0),
    "integers": lambda s: entry(s).update(exp_avg=np.zeros(7, np.int64)),
    "too wide": lambda s: entry(s).update(exp_avg=np.zeros(7, np.float64)),
    "no exp_avg": lambda s: entry(s).pop("exp_avg"),
    "no step": lambda s: entry(s).pop("step"),
    "no mu_product": lambda s: entry(s).pop("mu_product"),
    "text mu_product": lambda s: entry(s).update(mu_product="x"),
    "NaN mu_product": lambda s: entry(s).update(mu_product=np.nan),
    "negative step": lambda s: entry(s).update(step=-1),
    "half a step": lambda s: entry(s).update(step=1.5),
    "NaN step": lambda s: entry(s).update(step=np.nan),
    "infinite step": lambda s: entry(s).update(step=np.inf),
    "huge step": lambda s: entry(s).update(step=2**70),
    "text step": lambda s: entry(s).update(step="x"),
    "negative total": lambda s: s.update(step=-1),
    "huge total": lambda s: s.update(step=2**70),
}


@pytest.mark.parametrize("spoil", list(SPOILS.values()), ids=list(SPOILS))
def test_load_state_dict_that_fails_changes_nothing(spoil):
    opt = run(fs.NAdam(values(0), lr=0.5), [1])
    saved = copy.deepcopy(run(fs.NAdam(values(0), lr=0.25), [1, 2, 3]).state_dict())
    spoil(saved)
    before = contents(opt), repr(opt), {k: list(v) for k, v in opt.state.items()}
    if spoil is SPOILS["number amsgrad"]:
        opt = run(fs.Adam(values(0), lr=0.5), [1])
        saved = copy.deepcopy(run(fs.Adam(values(0), lr=0.25), [1, 2]).state_dict())
        spoil(saved)
        before = contents(opt), repr(opt), {k: list(v) for k, v in opt.state.items()}
    with pytest.raises((ValueError, TypeError), match=r"must|needs|got"):
        opt.load_state_dict(saved)
    assert (contents(opt), repr(opt), {k: list(v) for k, v in opt.state.items()}) == before
    assert opt.step(values(2)).step == 2


@pytest.mark.parametrize("wrong", [None, [], 3, "abc", {}])
def test_load_state_dict_of_something_else_is_refused(wrong):
    opt = run(fs.Adam(values(0)), [1])
    before = contents(opt)
    with pytest.raises((ValueError, TypeError)):
        opt.load_state_dict(wrong)
    assert contents(opt) == before


def test_load_state_dict_of_another_class_is_refused():
    opt = run(fs.Adam(values(0)), [1])
    before = contents(opt)
    for other in (fs.Adagrad, fs.SGD, fs.NAdam, fs.RMSprop, fs.Rprop):
        with pytest.raises((ValueError, TypeError), match=r"must|needs"):
            opt.load_state_dict(run(other(values(0)), [1]).state_dict())
    assert contents(opt) == before
    # Adam with decoupled decay is AdamW, but AdamW with coupled decay is not.
    with pytest.raises(ValueError, match="decoupled_weight_decay must be True, got False"):
        fs.AdamW(values(0)).load_state_dict(opt.state_dict())


# -- torch's checkpoints --------------------------------------------------------------------------


def in_torch(name, hypers):
    """Whether torch's class, if it is installed, has these hyperparameters."""
    cls = getattr(sys.modules.get("torch.optim"), name, None)
    return cls is not None and set(hypers) <= set(cls.__init__.__code__.co_varnames)


def torch_steps(peer, tensors, seeds, dtype):
    for seed in seeds:
        for tensor, grad in zip(tensors, values(seed, dtype).values(), strict=True):
            tensor.grad = torch.from_numpy(grad)
        peer.step()


def our_steps(opt, seeds, dtype):
    for seed in seeds:
        opt.step(values(seed, dtype))


def torch_pair(name, hypers, dtype):
    tensors = [torch.from_numpy(a) for a in values(0, dtype).values()]
    return tensors, getattr(torch.optim, name)(tensors, **hypers, foreach=False)


@each_case(in_torch)
def test_state_dict_keys_are_torch_s(name, hypers):
    tensors, peer = torch_pair(name, hypers, np.float32)
    torch_steps(peer, tensors, [1, 2], np.float32)
    theirs = peer.state_dict()
    ours = run(make(name, values(0), hypers), [1, 2]).state_dict(state_dtype="float32")
    for i in range(len(SHAPES)):
        expected = {k: v for k, v in theirs["state"].get(i, {}).items() if v is not None}
        found = ours["state"].get(i, {})
        assert set(found) == set(expected)
        for key, value in expected.items():
            assert np.shape(found[key]) == tuple(torch.as_tensor(value).shape)
    ours_only = {"param_names", *getattr(fs, name)._spec.always}
    how_not_what = {"foreach", "fused", "capturable", "differentiable"}
    (mine,), (its,) = ours["param_groups"], theirs["param_groups"]
    assert set(mine) - ours_only == set(its) - how_not_what
    assert mine["params"] == its["params"]


TOLERANCE = {np.float32: {"rtol": 2e-4, "atol": 2e-5}, np.float64: {"rtol": 1e-6, "atol": 1e-8}}


def assert_close(params, tensors, dtype):
    for name, param, tensor in zip(SHAPES, params, tensors, strict=True):
        np.testing.assert_allclose(param, tensor.numpy(), **TOLERANCE[dtype], err_msg=name)


@each_case(in_torch)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_torch_checkpoint_loads_into_ours_and_continues(name, hypers, dtype):
    tensors, peer = torch_pair(name, hypers, dtype)
    torch_steps(peer, tensors, [1, 2, 3], dtype)
    params = [t.numpy().copy() for t in tensors]
    opt = getattr(fs, name)(dict(zip(SHAPES, params, strict=True)))
    opt.load_state_dict(copy.deepcopy(peer.state_dict()))
    torch_steps(peer, tensors, [4, 5, 6], dtype)
    our_steps(opt, [4, 5, 6], dtype)
    assert_close(params, tensors, dtype)


@each_case(in_torch)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_our_checkpoint_loads_into_torch_and_continues(name, hypers, dtype):
    params = {key: torch.from_numpy(a) for key, a in values(0, dtype).items()}
    opt = make(name, params, hypers)
    our_steps(opt, [1, 2, 3], dtype)
    tensors = [p.clone() for p in params.values()]
    peer = getattr(torch.optim, name)(tensors, foreach=False)
    peer.load_state_dict(copy.deepcopy(opt.state_dict()))  # as it is, nothing converted
    our_steps(opt, [4, 5, 6], dtype)
    torch_steps(peer, tensors, [4, 5, 6], dtype)
    assert_close(params.values(), tensors, dtype)


def test_state_dict_over_tensors_is_torch_s_and_goes_through_torch_save(tmp_path):
    params = [torch.ones(3), torch.ones(2, dtype=torch.bfloat16)]
    opt = fs.NAdam(params)
    opt.step([torch.ones(3), torch.ones(2, dtype=torch.bfloat16)])
    entry = opt.state_dict()["state"][1]
    assert (entry["step"].dtype, entry["step"].shape) == (torch.float32, ())
    assert entry["exp_avg"].dtype == torch.float32
    assert entry["exp_avg"].data_ptr() == opt.state[1]["exp_avg"].ctypes.data
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    again = fs.NAdam([p.clone() for p in params])
    again.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert again.state_dict()["state"][1]["mu_product"] == entry["mu_product"]


def test_step_of_tensors_is_announced_to_autograd():
    w = torch.ones(2, requires_grad=True)
    still = torch.ones(2, requires_grad=True)
    loss = (w**2).sum() + (still**2).sum()
    fs.SGD([w, still], lr=1.0).step([torch.ones(2), None])
    assert (w._version, still._version) == (1, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_load_state_dict_takes_live_arrays_from_any_place():
    opt = fs.SGD([np.zeros(2, np.float32), np.zeros(2, np.float32)], lr=1.0, momentum=0.5)
    opt.step([np.full(2, 1, np.float32), np.full(2, 2, np.float32)])
    saved = opt.state_dict()
    saved["state"][0], saved["state"][1] = saved["state"][1], saved["state"][0]
    opt.load_state_dict(saved)
    assert [opt.state[i]["momentum_buffer"][0] for i in (0, 1)] == [2, 1]


def test_unpickled_states_are_aligned_again():
    opt = run(fs.Adam({"a": np.ones(3, np.float32), "b": np.ones(5, np.float32)}), [])
    again = pickle.loads(pickle.dumps(opt))
    for states in again.state.values():
        assert all(a.ctypes.data % 64 == 0 for a in states.values())


def test_torch_checkpoint_with_groups_and_a_scheduler_loads():
    tensors = [torch.from_numpy(a) for a in values(0).values()]
    peer = torch.optim.AdamW(
        [{"params": [tensors[0], tensors[2], tensors[3]]}, {"params": [tensors[1]], "lr": 0.5}],
        lr=0.25,
        foreach=False,
    )
    scheduler = torch.optim.lr_scheduler.StepLR(peer, 1, gamma=0.5)  # adds initial_lr to groups
    torch_steps(peer, tensors, [1, 2], np.float32)
    scheduler.step()
    opt = fs.AdamW(values(0), groups=[fs.Group("b1", lr=1.0)])
    opt.load_state_dict(peer.state_dict())
    assert [g["lr"] for g in opt.param_groups] == [0.125, 0.25]
    by_torch = peer.state_dict()["state"]
    order = {"w1": 0, "w2": 1, "s": 2, "b1": 3}  # torch counts parameters group by group
    for name, place in order.items():
        expected = by_torch[place]["exp_avg"].numpy()
        assert opt.state[name]["exp_avg"].tobytes() == expected.tobytes()


def test_torch_checkpoint_loads_narrow_states():
    # torch keeps states in the parameter's type, ours are float32: widening is exact.
    tensor = torch.ones(5, dtype=torch.bfloat16)
    peer = torch.optim.Adam([tensor], lr=0.5, foreach=False)
    tensor.grad = torch.linspace(-1, 1, 5).bfloat16()
    peer.step()
    opt = fs.Adam([tensor.clone()])
    opt.load_state_dict(peer.state_dict())
    expected = peer.state_dict()["state"][0]["exp_avg"].float().numpy()
    assert opt.state[0]["exp_avg"].tobytes() == expected.tobytes()


def test_groups_are_typed_as_constructors_are():
    typed = {name: one.__forward_arg__ for name, one in Hypers.__annotations__.items()}
    told = set()
    for name in CASES:
        cls = getattr(fs, name)
        for argument, one in inspect.signature(cls).parameters.items():
            if argument in cls._spec.table:
                assert one.annotation == typed[argument], (name, argument)
                told.add(argument)
    assert told == typed.keys()


def test_docstring_lists_every_argument():
    for name in CASES:
        cls = getattr(fs, name)
        for argument in list(inspect.signature(cls).parameters):
            assert re.search(rf"^ +{argument}: ", cls.__doc__, re.MULTILINE), (name, argument)
