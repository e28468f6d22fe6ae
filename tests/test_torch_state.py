"""Whoever was shown `opt.state` may change it: a step sees that, and else does not look at it."""

import copy
import gc
import io
import pickle
import threading
import time
import weakref
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch

import fusedstep as fs
import fusedstep.torch as ft
from cases import CASES
from fusedstep.torch import optimizers
from test_torch_memory import hypers_of
from test_torch_optimizers import bits
from this_torch import needs_exchange, recalled

SHAPES = [(7,), (3, 5), (), (40,), (2, 3, 4)]
SETTLE = 4  # steps: states begin, are read twice as nobody else's, and then no more

each_class = pytest.mark.parametrize("name", CASES)
either_memory = pytest.mark.parametrize("flat", [False, True], ids=["plain", "flat"])


def made(cls, flat, **hypers):
    rng = np.random.default_rng(3)
    params = [torch.nn.Parameter(torch.tensor(rng.uniform(1, 2, s)).float()) for s in SHAPES]
    if flat:
        ft.flatten_(params)
    return params, cls(params, **hypers)


def take(opt, params, steps):
    """Steps with gradients that depend on the number of the step alone; the gradients stay."""
    for step in steps:
        for k, param in enumerate(params):
            values = torch.tensor(np.random.default_rng([step, k]).normal(size=param.shape)).float()
            if param.grad is None:
                param.grad = values
            else:
                param.grad.copy_(values)
        opt.step()


def seen(opt, params):
    return [bits(p) for p in params], [
        {key: bits(value) for key, value in opt.state.get(p, {}).items()} for p in params
    ]


def settled(cls, flat, **hypers):
    """An optimizer that looks at no state any more."""
    params, opt = made(cls, flat, **hypers)
    take(opt, params, range(SETTLE))
    assert recalled(opt, len(params))
    return params, opt


def watched(cls, flat, **hypers):
    """The same steps by one that looks at all in each, as somebody holds its state."""
    params, opt = made(cls, flat, **hypers)
    opt.held = opt.state
    take(opt, params, range(SETTLE))
    assert opt._table.recalled == 0
    return params, opt


# -- what a step looks at --------------------------------------------------------------------------


@each_class
@either_memory
def test_states_that_nobody_was_shown_are_not_looked_at(name, flat):
    cls, hypers = getattr(ft, name), hypers_of(name)
    (params, opt), (others, other) = settled(cls, flat, **hypers), watched(cls, flat, **hypers)
    for steps in (range(4, 5), range(5, 9)):
        take(opt, params, steps)
        assert recalled(opt, len(params))
        take(other, others, steps)
    assert other._table.recalled == 0
    assert seen(opt, params) == seen(other, others)


@either_memory
def test_states_are_looked_at_once_they_were_shown_and_then_no_more(flat):
    params, opt = settled(ft.Adam, flat)
    for _ in range(3):
        assert opt.state
        found = []
        for step in range(4):
            take(opt, params, [step])
            found.append([recalled(opt, n) for n in (0, len(params))])
        assert [none for none, _ in found[:2]] == [True, True]
        assert [everything for _, everything in found[2:]] == [True, True]


def test_tensors_without_the_exchange_functions_are_always_looked_at(monkeypatch):
    monkeypatch.setattr(optimizers, "_EXCHANGE", False)
    params, opt = made(ft.Adam, False)
    take(opt, params, range(6))
    assert opt._table.recalled == 0


def test_a_parameter_of_six_dimensions_is_always_looked_at():
    params = [torch.nn.Parameter(torch.ones((1,) * n)) for n in (5, 6)]
    opt = ft.Adam(params)
    take(opt, params, range(6))
    assert recalled(opt, 1)


def test_a_parameter_without_a_gradient_does_not_keep_the_others():
    params, opt = settled(ft.Adam, False)
    params[1].grad = None
    opt.step()
    assert recalled(opt, len(params) - 1)
    params[1].grad = torch.ones(3, 5)
    opt.step()
    assert recalled(opt, len(params))
    assert [int(opt.state[p]["step"]) for p in params] == [6, 5, 6, 6, 6]


@pytest.mark.parametrize("momentum", [0.0, 0.5], ids=["plain", "beside momentum"])
def test_plain_sgd_looks_for_no_state(momentum):
    def sgd(cls):
        params = made(ft.SGD, flat=False)[0]
        return params, cls(
            [{"params": params[:2]}, {"params": params[2:], "momentum": momentum}], lr=0.1
        )

    (params, opt), (others, other) = sgd(ft.SGD), sgd(torch.optim.SGD)
    for each, one in ((params, opt), (others, other)):
        take(one, each, range(SETTLE))
    assert recalled(opt, len(params))
    for ours, theirs in zip(params, others, strict=True):
        torch.testing.assert_close(ours, theirs)


@needs_exchange
def test_states_read_in_each_step_are_not_asked_whose_they_are(monkeypatch):
    params, opt = settled(ft.Adam, False)
    asked = []
    own = torch.Tensor.untyped_storage
    monkeypatch.setattr(torch.Tensor, "untyped_storage", lambda t: asked.append(t.shape) or own(t))
    for step in range(4):
        assert opt.state[params[0]]["step"] == SETTLE + step
        take(opt, params, [step])
    assert not asked


# -- what somebody may hold ------------------------------------------------------------------------

# Each returns what he keeps of the state, and what he does to it two steps later.


def hold_the_state(opt, p):
    state = opt.state
    return state, lambda: state[p]["exp_avg"].mul_(2)


def hold_the_state_and_replace_an_entry(opt, p):
    state = opt.state
    return state, lambda: state.update({p: {k: v * 2 for k, v in state[p].items()}})


def hold_the_state_and_drop_an_entry(opt, p):
    state = opt.state
    return state, lambda: state.pop(p)


def hold_the_state_and_clear_it(opt, p):
    state = opt.state
    return state, state.clear


def hold_an_iterator(opt, p):
    items = iter(opt.state.items())
    return items, lambda: [entry["exp_avg"].mul_(2) for _, entry in items]


def hold_a_method(opt, p):
    pop = opt.state.pop
    return pop, lambda: pop(p)


def hold_an_entry(opt, p):
    entry = opt.state[p]
    return entry, lambda: entry.update(exp_avg=entry["exp_avg"] * 2)


def hold_an_entry_and_drop_a_state(opt, p):
    entry = opt.state[p]
    return entry, lambda: entry.update(exp_avg=None)


def hold_an_entry_and_replace_the_count(opt, p):
    entry = opt.state[p]
    return entry, lambda: entry.update(step=torch.tensor(30.0))


def hold_a_tensor(opt, p):
    tensor = opt.state[p]["exp_avg"]
    return tensor, lambda: tensor.mul_(2)


def hold_a_tensor_and_its_data(opt, p):
    tensor = opt.state[p]["exp_avg"]
    return tensor, lambda: setattr(tensor, "data", tensor.data * 2)


def hold_a_tensor_and_set_it(opt, p):
    tensor = opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].clone()
    return tensor, lambda: tensor.set_(tensor * 2)


def hold_a_tensor_and_resize_it(opt, p):
    tensor = opt.state[p]["exp_avg"] = opt.state[p]["exp_avg"].clone()
    return tensor, lambda: tensor.resize_(1 << 14).resize_(40)


def hold_a_tensor_and_swap_it(opt, p):
    tensor = opt.state[p]["exp_avg"]
    return tensor, lambda: torch.utils.swap_tensors(tensor, (tensor * 2).detach())


def hold_a_tensor_and_negate_it_lazily(opt, p):
    tensor = opt.state[p]["exp_avg"]
    return tensor, lambda: setattr(tensor, "data", torch._neg_view(tensor.data))


def hold_the_second_state(opt, p):
    tensor = opt.state[p]["exp_avg_sq"]
    return tensor, lambda: setattr(tensor, "data", tensor.data * 2)


def hold_the_count(opt, p):
    count = opt.state[p]["step"]
    return count, lambda: count.fill_(30)


def hold_the_count_and_its_data(opt, p):
    count = opt.state[p]["step"]
    return count, lambda: setattr(count, "data", torch.tensor(30.0, dtype=torch.float64))


def hold_the_count_and_set_it(opt, p):
    count = opt.state[p]["step"] = torch.tensor(float(opt.state[p]["step"]))
    return count, lambda: count.set_(torch.tensor(30.0))


def hold_a_weak_reference(opt, p):
    tensor = weakref.ref(opt.state[p]["exp_avg"])
    return tensor, lambda: setattr(tensor(), "data", tensor().data * 2)


def hold_weak_references_to_dicts(opt, p):
    opt.state = OrderedDict((q, OrderedDict(entry)) for q, entry in opt.state.items())
    state, entry = weakref.ref(opt.state), weakref.ref(opt.state[p])

    def change():
        state()[next(iter(state()))] = {}
        entry().update(exp_avg=entry()["exp_avg"] * 2)

    return None, change


def hold_a_view(opt, p):
    view = opt.state[p]["exp_avg"].view(-1)
    return view, lambda: setattr(view._base, "data", view._base.data * 2)


def hold_an_alias_and_share_it(opt, p):
    alias = opt.state[p]["exp_avg"].detach()
    return alias, lambda: alias.share_memory_().mul_(2)


def hold_a_storage_and_share_it(opt, p):
    storage = opt.state[p]["exp_avg"].untyped_storage()
    return storage, storage.share_memory_


def hold_an_array(opt, p):
    array = opt.state[p]["exp_avg"].numpy()
    return array, lambda: np.multiply(array, 2, out=array)


def hold_a_checkpoint(opt, p):
    saved = opt.state_dict()["state"][3]
    return saved, lambda: setattr(saved["exp_avg"], "data", saved["exp_avg"].data * 2)


def hold_it_all_in_a_graph(opt, p):
    w = torch.ones(40, requires_grad=True)
    loss = (w * opt.state[p]["exp_avg"]).sum()

    def change():
        tensor = loss.grad_fn.next_functions[0][0]._saved_other
        tensor.data = tensor.data * 2

    return loss, change


# And what is done to a state that is held by nobody.


def drop_all(opt, p):
    return None, lambda: opt.state.clear()


def drop_one(opt, p):
    return None, lambda: opt.state.pop(p)


def delete_one(opt, p):
    return None, lambda: opt.state.__delitem__(p)


def replace_one(opt, p):
    def change():
        opt.state[p] = {key: value * 2 for key, value in opt.state[p].items()}

    return None, change


def replace_a_tensor(opt, p):
    return None, lambda: opt.state[p].update(exp_avg=opt.state[p]["exp_avg"] * 2)


def replace_all(opt, p):
    def change():
        entries = {q: {k: v.clone() for k, v in entry.items()} for q, entry in opt.state.items()}
        opt.state = defaultdict(dict, entries)

    return None, change


def begin_anew(opt, p):
    return None, lambda: setattr(opt, "state", defaultdict(dict))


def edit_in_place(opt, p):
    return None, lambda: opt.state[p]["exp_avg"].mul_(2)


def edit_the_count(opt, p):
    return None, lambda: opt.state[p]["step"].fill_(30)


def add_a_key(opt, p):
    return None, lambda: opt.state[p].update(mine=torch.ones(3))


def move_a_tensor(opt, p):
    def change():
        opt.state[p]["exp_avg"].data = opt.state[p]["exp_avg"].data * 2

    return None, change


def move_a_parameter(opt, p):
    return None, lambda: setattr(p, "data", p.data * 2)


def share_all(opt, p):
    return None, opt.share_memory


def load_own(opt, p):
    return None, lambda: opt.load_state_dict(opt.state_dict())


def load_older(opt, p):
    saved = copy.deepcopy(opt.state_dict())
    return saved, lambda: opt.load_state_dict(saved)


def use_a_state_more(opt, p):
    return None, lambda: opt.param_groups[0].update(amsgrad=True)


def reverse_the_parameters(opt, p):
    return None, lambda: opt.param_groups[0]["params"].reverse()


def copy_it(opt, p):
    return None, lambda: copy.deepcopy(opt).state.clear()


def share_it_with_a_copy(opt, p):
    other = copy.copy(opt)
    return other, lambda: other.state[p]["exp_avg"].mul_(2)


CHANGES = [value for value in list(vars().values()) if getattr(value, "__code__", None)
           and value.__code__.co_varnames[:2] == ("opt", "p")]  # fmt: skip


@either_memory
@pytest.mark.filterwarnings("ignore:.*left the flat buffer")
@pytest.mark.parametrize("change", CHANGES, ids=[change.__name__ for change in CHANGES])
@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_change_by_whoever_was_shown_a_state_is_seen(change, flat, steps):
    results = []
    for make in (settled, watched):
        params, opt = make(ft.Adam, flat)
        held, act = change(opt, params[3])
        take(opt, params, range(4, 4 + steps))
        act()
        take(opt, params, range(10, 13))
        act = held = None
        take(opt, params, range(13, 17))
        results.append(seen(opt, params))
        del held
    assert results[0] == results[1]


@either_memory
def test_nothing_is_read_where_a_dropped_state_was(flat):
    params, opt = settled(ft.Adam, flat)
    refs = [weakref.ref(value) for entry in opt.state.values() for value in entry.values()]
    opt.state.clear()
    gc.collect()
    assert not any(ref() for ref in refs)
    take(opt, params, [0])
    fresh, other = made(ft.Adam, flat)
    assert {int(opt.state[p]["step"]) for p in params} == {1}
    take(other, fresh, [0])
    for p, q in zip(params, fresh, strict=True):
        assert bits(opt.state[p]["exp_avg"]) == bits(other.state[q]["exp_avg"])


@either_memory
@pytest.mark.parametrize("spoil", ["shape", "dtype", "count", "list", "overlap"])
def test_a_settled_step_refuses_a_spoilt_state_and_changes_nothing(flat, spoil):
    params, opt = settled(ft.Adam, flat)
    entry = opt.state[params[3]]
    if spoil == "shape":
        entry["exp_avg"] = torch.ones(39)
    elif spoil == "dtype":
        entry["exp_avg"].data = torch.ones(40, dtype=torch.float64)
    elif spoil == "count":
        entry["step"].fill_(0.5)
    elif spoil == "list":
        entry["exp_avg"] = [0.0] * 40
    else:
        entry["exp_avg"] = entry["exp_avg_sq"]
    del entry
    before = [bits(p) for p in params]
    with pytest.raises((TypeError, ValueError), match="state"):
        take(opt, params, [9])
    assert [bits(p) for p in params] == before
    assert [int(opt.state[p]["step"]) for p in params[:3]] == [SETTLE] * 3


def test_a_settled_step_refuses_a_parameter_that_was_moved_to_another_shape():
    params, opt = settled(ft.Adam, False)
    params[3].data = torch.ones(4, 10)
    params[3].grad = torch.ones(4, 10)
    with pytest.raises(ValueError, match=r"state\[3\]\['exp_avg'\] must be of shape \(4, 10\)"):
        opt.step()


@pytest.mark.parametrize("state", [None, [], 3])
def test_a_state_that_is_no_dict_is_refused(state):
    opt = settled(ft.Adam, False)[1]
    opt.state = state
    with pytest.raises(TypeError, match=r"^state must be a dict, got "):
        opt.step()


def test_a_settled_step_counts_exactly_beyond_float32():
    params, opt = settled(ft.Adam, False)
    opt.state[params[0]]["step"].fill_(2.0**24 - 2)
    take(opt, params, range(6))
    assert opt.state[params[0]]["step"].item() == 2**24 + 4
    assert opt.state[params[0]]["step"].dtype == torch.float64


def test_copies_and_pickles_of_a_settled_optimizer_step_on_alike():
    params, opt = settled(ft.NAdam, True)
    file = io.BytesIO()
    torch.save((params, opt.state_dict()), file)
    file.seek(0)
    loaded, saved = torch.load(file, weights_only=False)
    again = ft.NAdam(loaded)
    again.load_state_dict(saved)
    copied, copy_opt = copy.deepcopy((params, opt))
    stored, store_opt = pickle.loads(pickle.dumps((params, opt)))
    for some, one in ((loaded, again), (copied, copy_opt), (stored, store_opt), (params, opt)):
        take(one, some, range(4, 9))
    assert seen(opt, params) == seen(again, loaded)
    assert seen(opt, params) == seen(copy_opt, copied) == seen(store_opt, stored)
    for some, one in ((copied, copy_opt), (stored, store_opt)):
        take(one, some, range(9, 12))
        assert recalled(one, len(params))


@pytest.mark.parametrize("how", ["shown", "cleared", "replaced"])
def test_a_state_dropped_in_the_middle_of_a_sweep_lives_through_it(how):
    fs.set_num_threads(1)
    param = torch.nn.Parameter(torch.zeros(1 << 23))
    ft.flatten_([param])
    param.grad.fill_(1)
    opt = ft.Adam([param], lr=1.0)
    for _ in range(SETTLE):
        opt.step()
    assert recalled(opt, 1)
    thread = threading.Thread(target=opt.step)
    thread.start()
    time.sleep(0.002)
    if how == "replaced":
        opt.state = defaultdict(dict)
    elif how == "cleared":
        opt.state.clear()
    else:
        assert opt.state
    gc.collect()
    thread.join()
    assert torch.unique(param.detach()).numel() == 1
    opt.step()
    assert torch.unique(param.detach()).numel() == 1


def test_an_optimizer_that_its_parameters_hooks_have_is_collected():
    def collected(settle):
        param = torch.nn.Parameter(torch.ones(3))
        opt = ft.Adam([param])
        param.grad = torch.ones(3)
        for _ in range(settle):
            opt.step()
        param.register_hook(lambda grad, own=opt: own.state and None)
        gone = weakref.ref(opt), weakref.ref(opt.state[param]["exp_avg"] if settle else param)
        del opt, param
        gc.collect()
        return [ref() for ref in gone]

    assert collected(0) == collected(SETTLE) == [None, None]


def test_steps_in_backward_look_at_no_state():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    expected = copy.deepcopy(model)
    opt, other = ft.Adam(model.parameters()), ft.Adam(expected.parameters())
    with ft.step_in_backward(model, opt):
        for step in range(6):
            x = torch.ones(5, 3) * step
            model(x).square().sum().backward()
            assert recalled(opt, step >= 3)  # of one parameter, the last
            expected(x).square().sum().backward()
            other.step()
            other.zero_grad()
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        assert bits(p) == bits(q)


class Strict(torch.overrides.TorchFunctionMode):
    """A mode under which nobody may ask for storages."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.untyped_storage:
            raise RuntimeError("no storages here")
        return function(*args, **(kwargs or {}))


@needs_exchange
def test_a_mode_that_refuses_to_show_storages_stops_no_step():
    params, opt = made(ft.Adam, False)
    others, other = made(ft.Adam, False)
    take(opt, params, range(2))
    with Strict():
        for _ in range(4):
            opt.step()
            assert opt._table.recalled == 0
    take(other, others, range(2))
    for _ in range(4):
        other.step()
    assert seen(opt, params) == seen(other, others)


def test_a_storage_that_is_weakly_referenced_is_looked_at():
    params, opt = made(ft.AdamW, False)
    take(opt, params, [0])
    ref = weakref.ref(opt.state[params[0]]["exp_avg"].untyped_storage())
    take(opt, params, range(1, 6))
    if ref() is None:
        pytest.skip("this torch makes a storage's object anew each time")
    assert opt._table.recalled < len(params)
    ref().resize_(1 << 16)
    take(opt, params, range(6, 9))
    assert opt.state[params[0]]["exp_avg"].untyped_storage().nbytes() == 1 << 16


def test_a_state_of_another_class_that_is_weakly_referenced_is_looked_at():
    params, opt = made(ft.AdamW, False)
    take(opt, params, [0])
    state = OrderedDict(opt.state)
    opt.state = state
    ref = weakref.ref(state)
    del state
    take(opt, params, range(1, 6))
    ref()[params[0]]["exp_avg"] = torch.zeros(SHAPES[0])
    take(opt, params, [6])
    params[0].grad.mul_(0.1)
    assert torch.allclose(opt.state[params[0]]["exp_avg"], params[0].grad)


@pytest.mark.parametrize("walk", [gc.get_objects, lambda: gc.get_referents(gc.get_objects())])
def test_what_a_walk_over_all_objects_finds_is_looked_at(walk):
    params, opt = settled(ft.AdamW, False)
    wanted = ["step", "exp_avg", "exp_avg_sq"]
    entries = [
        one
        for one in walk()
        if type(one) is dict and all(type(key) is str for key in one) and list(one) == wanted
    ]
    assert len(entries) >= len(params)
    for entry in entries:
        entry["exp_avg"] = torch.zeros_like(torch.as_tensor(entry["exp_avg"]))
    del entries, entry
    take(opt, params, [9])
    assert torch.allclose(opt.state[params[0]]["exp_avg"], params[0].grad * 0.1)


def test_a_subclass_may_set_the_state_before_it_is_made():
    class Mine(ft.SGD):
        def __init__(self, params, **hypers):
            self.state = defaultdict(dict)
            assert self.state == {}
            super().__init__(params, **hypers)

    params, opt = made(Mine, False, momentum=0.9)
    take(opt, params, range(2))
    assert len(opt.state) == len(params)


def test_a_subclass_s_own_state_is_the_one_that_steps_go_by():
    class Mine(ft.SGD):
        @property
        def state(self):
            return self._mine

        @state.setter
        def state(self, state):
            self._mine = state

    (params, mine), (others, plain) = (made(cls, False, momentum=0.9) for cls in (Mine, ft.SGD))
    for opt, its in ((mine, params), (plain, others)):
        take(opt, its, range(3))
    assert seen(mine, params) == seen(plain, others)
    assert len(mine.state_dict()["state"]) == len(params)


def test_a_deleted_state_begins_anew():
    (params, opt), (others, other) = (made(ft.SGD, False, momentum=0.9) for _ in range(2))
    for one, its in ((opt, params), (other, others)):
        take(one, its, range(2))
    del opt.state
    other.state = defaultdict(dict)
    for one, its in ((opt, params), (other, others)):
        take(one, its, [5])
    assert seen(opt, params) == seen(other, others)
