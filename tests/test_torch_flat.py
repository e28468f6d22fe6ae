"""`flatten_` and `step_in_backward`: the same training in other memory, and what they refuse."""

import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.testing._internal.two_tensor import TwoTensor

import fusedstep.torch as ft
from cases import each_case

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small models wait longer for a second thread than it saves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name, params, hypers):
    return getattr(ft, name)(params, **hypers)


class Net(nn.Module):
    """Tied weights, a 0-d and an empty parameter, one that is frozen, a buffer, odd sizes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.norm = nn.BatchNorm1d(6)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x)
        h = self.norm(h + self.frozen(torch.tanh(self.body(h))))
        return self.head(h * self.scale) + self.nothing.sum()


def net(cls=Net):
    torch.manual_seed(0)
    return cls()


def loss_of(model, step, scale=1.0):
    x = torch.randint(11, (9,), generator=torch.Generator().manual_seed(step))
    out = model(x)
    return nn.functional.cross_entropy(out, (x * 3 + 1) % 11) * scale


def train(model, opt, steps=range(STEPS), zero_grad=None):
    for step in steps:
        (zero_grad or opt.zero_grad)()
        loss_of(model, step).backward()
        opt.step()


def assert_same(model, expected):
    mine, theirs = model.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0, msg=name)


def assert_same_state(opt, expected):
    mine, theirs = opt.state_dict()["state"], expected.state_dict()["state"]
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def places(params):
    return [param.grad.data_ptr() for param in params]


def lies_in(tensor, buffer):
    begin, end = buffer.data_ptr(), buffer.data_ptr() + buffer.nbytes
    return begin <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= end


def trained(model):
    """The parameters that have numbers and are trained."""
    return [p for p in model.parameters() if p.requires_grad and p.numel()]


# -- flatten_: what stays --------------------------------------------------------------------------


def test_flatten_keeps_objects_names_values_and_ties():
    model, expected = net(), net()
    before = dict(model.named_parameters())
    ft.flatten_(model)
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert all(type(p) is nn.Parameter and p.is_leaf for p in after.values())
    assert model.head.weight is model.embed.weight
    assert list(model.state_dict()) == list(expected.state_dict())
    assert_same(model, expected)


def test_flatten_shares_values_with_its_buffer():
    model = net()
    buffers = ft.flatten_(model)
    for param in trained(model):
        assert lies_in(param, buffers.flat)
        assert lies_in(param.grad, buffers.flat_grad)
        offset = param.data_ptr() - buffers.flat.data_ptr()
        assert param.grad.data_ptr() - buffers.flat_grad.data_ptr() == offset
    buffers.flat.fill_(3)
    assert all((param == 3).all() for param in trained(model))


def test_flatten_counts_a_tied_weight_once_and_keeps_gaps_zero():
    model = net()
    buffers = ft.flatten_(model)
    opt = ft.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, opt)
    inside = sum(float(p.detach().double().square().sum()) for p in trained(model))
    assert float(buffers.flat.double().square().sum()) == pytest.approx(inside, rel=1e-12)
    n = sum(param.numel() for param in trained(model))
    assert repr(buffers) == f"Flat(8 x torch.float32, {n} elements)"  # one of the 8 is empty


def test_flatten_aligns_buffers_and_parameters_to_64_bytes():
    for shapes in [[(3,)], [(5, 7), (), (33,)], [(1 << 20, 2), (1,)]]:
        params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
        buffers = ft.flatten_(params)
        assert buffers.flat.dim() == buffers.flat_grad.dim() == 1
        for tensor in [buffers.flat, buffers.flat_grad, *params, *(p.grad for p in params)]:
            assert tensor.data_ptr() % 64 == 0


def test_flatten_leaves_frozen_parameters_and_buffers_alone():
    model = net()
    kept = [*model.frozen.parameters(), *model.buffers()]
    before = [tensor.data_ptr() for tensor in kept]
    buffers = ft.flatten_(model)
    assert [tensor.data_ptr() for tensor in kept] == before
    assert not any(lies_in(tensor, buffers.flat) for tensor in kept)
    assert all(param.grad is None for param in model.frozen.parameters())
    ft.SGD(model.parameters(), lr=0.1).zero_grad()
    model.zero_grad()
    assert all(param.grad is None for param in model.frozen.parameters())


def test_flatten_keeps_gradients_that_exist():
    model, expected = net(), net()
    for m in (model, expected):
        loss_of(m, 0).backward()
    ft.flatten_(model)
    for param, other in zip(model.parameters(), expected.parameters(), strict=True):
        if other.grad is not None:
            assert torch.equal(param.grad, other.grad)
    for m in (model, expected):  # and adds to them
        loss_of(m, 1).backward()
        ft.SGD(m.parameters(), lr=0.1).step()
    assert_same(model, expected)


def test_flatten_takes_parameter_lists():
    params = [nn.Parameter(torch.full((n,), float(n))) for n in (3, 40, 1)]
    spare = nn.Parameter(torch.ones(2))
    buffers = ft.flatten_(p for p in params)
    assert [p.data_ptr() - buffers.flat.data_ptr() for p in params] == [0, 128, 384]
    assert buffers.flat.sum() == sum(p.sum() for p in params)
    assert spare.grad is None
    opt = ft.SGD([*params, spare], lr=0.5)
    sum((2 * p).sum() for p in [*params, spare]).backward()
    opt.step()
    assert [p[0].item() for p in [*params, spare]] == [2, 39, 0, 0]
    opt.zero_grad()
    assert spare.grad is None
    assert places(params) == [buffers.flat_grad.data_ptr() + at for at in (0, 128, 384)]


def test_flatten_again_moves_everything_to_the_new_buffers():
    model, expected = net(), net()
    opt, other = ft.Adam(model.parameters(), lr=0.1), ft.Adam(expected.parameters(), lr=0.1)
    first = ft.flatten_(model)
    train(model, opt)
    second = ft.flatten_(model)
    train(model, opt)
    train(expected, other)
    train(expected, other)
    assert_same(model, expected)
    assert all(lies_in(p, second.flat) and not lies_in(p, first.flat) for p in trained(model))


@pytest.mark.parametrize("channels_last", [False, True])
def test_flatten_keeps_strides(channels_last):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 2)
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    turned = nn.Parameter(torch.randn(5, 3).t())
    shapes = [(p.shape, p.stride()) for p in (conv.weight, turned)]
    values = [p.detach().clone() for p in (conv.weight, turned)]
    ft.flatten_([conv.weight, turned])
    assert [(p.shape, p.stride()) for p in (conv.weight, turned)] == shapes
    assert [p.grad.stride() for p in (conv.weight, turned)] == [s for _, s in shapes]
    assert all(torch.equal(p, v) for p, v in zip((conv.weight, turned), values, strict=True))
    before = places([conv.weight, turned])
    weight = torch.arange(15.0).reshape(3, 5)
    (conv(torch.ones(1, 3, 5, 5)).sum() + (turned * weight).sum()).backward()
    assert places([conv.weight, turned]) == before
    assert torch.equal(turned.grad, weight)
    ft.SGD([turned], lr=1.0).step()
    assert torch.equal(turned, values[1] - weight)


def test_flatten_packs_what_is_not_dense():
    wide = torch.arange(12.0).reshape(3, 4)
    param = nn.Parameter(wide[:, ::2])
    ft.flatten_([param])
    assert param.tolist() == [[0, 2], [4, 6], [8, 10]]
    assert param.is_contiguous()


def test_flatten_makes_one_buffer_for_each_dtype():
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float16)
    params = [nn.Parameter(torch.full((n,), float(n), dtype=d)) for n in (3, 4) for d in dtypes]
    buffers = ft.flatten_(params)
    assert tuple(buffers.flats) == tuple(buffers.flat_grads) == dtypes
    for param in params:
        assert lies_in(param, buffers.flats[param.dtype])
        assert lies_in(param.grad, buffers.flat_grads[param.dtype])
    for dtype in dtypes:
        assert buffers.flats[dtype].dtype == buffers.flat_grads[dtype].dtype == dtype
        assert buffers.flats[dtype].data_ptr() % 64 == 0
        assert buffers.flats[dtype].sum().real == 3 * 3 + 4 * 4
    with pytest.raises(ValueError, match=r"^flat needs parameters of one dtype, got torch.float32"):
        _ = buffers.flat
    with pytest.raises(ValueError, match=r"^flat_grad needs .* see flat_grads"):
        _ = buffers.flat_grad


# -- flatten_: training ----------------------------------------------------------------------------


@each_case()
def test_flattened_training_has_the_same_bits(name, hypers):
    model, expected = net(), net()
    ft.flatten_(model)
    opt, other = make(name, model.parameters(), hypers), make(name, expected.parameters(), hypers)
    train(model, opt)
    train(expected, other)
    assert_same(model, expected)
    assert_same_state(opt, other)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_flattened_training_has_the_same_bits_in_other_dtypes(dtype):
    model, expected = net().to(dtype), net().to(dtype)
    ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    train(model, opt)
    train(expected, other)
    assert_same(model, expected)
    assert_same_state(opt, other)


def test_flattened_training_has_the_same_bits_with_groups():
    def groups(model):
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 0.01}]

    model, expected = net(), net()
    ft.flatten_(model)
    opt = ft.AdamW(groups(model), lr=0.1, weight_decay=0.0)
    train(model, opt)
    train(expected, ft.AdamW(groups(expected), lr=0.1, weight_decay=0.0))
    assert_same(model, expected)


def test_flatten_after_steps_goes_on_with_the_same_bits():
    model, expected = net(), net()
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    train(model, opt)
    ft.flatten_(model)
    train(model, opt)
    train(expected, other)
    train(expected, other)
    assert_same(model, expected)


def test_backward_accumulates_into_the_flat_gradient():
    model, expected = net(), net()
    buffers = ft.flatten_(model)
    before = places(trained(model))
    for _ in range(2):
        loss_of(model, 0).backward()
        loss_of(expected, 0).backward()
        assert places(trained(model)) == before
    for param, other in zip(trained(model), trained(expected), strict=True):
        at = (param.grad.data_ptr() - buffers.flat_grad.data_ptr()) // 4
        flat = buffers.flat_grad[at : at + param.numel()].view(param.shape)
        assert torch.equal(flat, other.grad)


@pytest.mark.parametrize("set_to_none", [None, True, False])
@pytest.mark.parametrize("of", ["opt", "module"])
def test_zero_grad_zeroes_and_keeps_the_views(of, set_to_none):
    model = net()
    buffers = ft.flatten_(model)
    opt = ft.SGD(model.parameters(), lr=0.1)
    before = places(trained(model))
    loss_of(model, 0).backward()
    assert buffers.flat_grad.any()
    zero_grad = opt.zero_grad if of == "opt" else model.zero_grad
    zero_grad(**({} if set_to_none is None else {"set_to_none": set_to_none}))
    assert places(trained(model)) == before
    assert not buffers.flat_grad.any()
    assert all(not param.grad.any() for param in trained(model))


def test_zero_grad_of_an_optimizer_leaves_the_others_gradients():
    model = net()
    buffers = ft.flatten_(model)
    head, body = [model.head.bias], [model.body.weight, model.body.bias]
    opt = ft.SGD(head, lr=0.1)
    loss_of(model, 0).backward()
    expected = [p.grad.clone() for p in body]
    opt.zero_grad()
    assert not head[0].grad.any()
    assert all(torch.equal(p.grad, e) for p, e in zip(body, expected, strict=True))
    assert buffers.flat_grad.any()


def test_a_write_into_flat_grad_is_seen_by_the_step():
    model, expected = net(), net()
    buffers = ft.flatten_(model)
    loss_of(model, 0).backward()
    loss_of(expected, 0).backward()
    buffers.flat_grad.mul_(0.5)  # as an all-reduce of the mean would
    for param in trained(expected):
        param.grad.mul_(0.5)
    for m in (model, expected):
        ft.SGD(m.parameters(), lr=0.1, momentum=0.9).step()
    assert_same(model, expected)


def test_clip_grad_norm_on_flat_gradients():
    model, expected = net(), net()
    ft.flatten_(model)
    norms = []
    for m in (model, expected):
        loss_of(m, 0).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(m.parameters(), 0.01))
        ft.SGD(m.parameters(), lr=1.0).step()
    assert torch.equal(*norms)
    assert_same(model, expected)


def test_states_of_a_flattened_model_lie_together():
    model = net()
    ft.flatten_(model)
    opt = ft.AdamW(model.parameters())
    train(model, opt, range(1))
    first = trained(model)[0]
    for name in ("exp_avg", "exp_avg_sq"):
        for param in trained(model):
            offset = param.data_ptr() - first.data_ptr()
            state, start = opt.state[param][name], opt.state[first][name]
            assert state.data_ptr() - start.data_ptr() == offset
            assert state.data_ptr() % 64 == 0


# -- flatten_: copies and checkpoints --------------------------------------------------------------


def test_load_state_dict_writes_through_the_views():
    model, source = net(), net()
    train(source, ft.SGD(source.parameters(), lr=0.5))
    buffers = ft.flatten_(model)
    model.load_state_dict(source.state_dict())
    assert_same(model, source)
    assert all(lies_in(param, buffers.flat) for param in trained(model))
    unflattened = net()
    unflattened.load_state_dict(model.state_dict())
    assert_same(unflattened, source)


def test_checkpoint_of_flattened_training_resumes_unflattened_and_back():
    model, expected = net(), net()
    ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    train(expected, other)
    train(model, opt)
    for flatten in (False, True):
        file = io.BytesIO()
        torch.save((model.state_dict(), opt.state_dict()), file)
        file.seek(0)
        weights, states = torch.load(file, weights_only=True)
        torch.manual_seed(7)
        model = Net()
        model.frozen.load_state_dict(expected.frozen.state_dict())
        if flatten:
            ft.flatten_(model)
        opt = ft.AdamW(model.parameters(), lr=0.5)
        model.load_state_dict(weights)
        opt.load_state_dict(states)
        train(model, opt)
        train(expected, other)
        assert_same(model, expected)


@pytest.mark.parametrize("how", ["deepcopy", "save"])
def test_a_copy_of_a_flattened_module_is_a_module_of_its_own(how):
    model, expected = net(), net()
    buffers = ft.flatten_(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert_same(copied, expected)
    assert copied.head.weight is copied.embed.weight
    assert not any(lies_in(param, buffers.flat) for param in trained(copied))
    buffers.flat_grad.fill_(2)
    # Trains like any other, and without a touch of the original.
    train(copied, ft.AdamW(copied.parameters(), lr=0.1), zero_grad=copied.zero_grad)
    train(expected, ft.AdamW(expected.parameters(), lr=0.1))
    assert_same(copied, expected)
    assert (buffers.flat_grad == 2).all()
    assert_same(model, net())


def test_deepcopy_of_model_and_optimizer_together():
    model, expected = net(), net()
    ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    train(model, opt)
    train(expected, other)
    copied, copied_opt = copy.deepcopy((model, opt))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(copied, copied_opt)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    train(expected, other)
    assert_same(copied, expected)


def test_flattened_memory_is_freed_with_its_model():
    model = net()
    buffers = ft.flatten_(model)
    opt = ft.AdamW(model.parameters())
    train(model, opt, range(1))
    alive = [weakref.ref(t) for t in (buffers.flat, buffers.flat_grad, model.body.weight)]
    del model, opt, buffers
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3


# -- flatten_: views that break --------------------------------------------------------------------


def to_double(model):
    model.to(torch.float64)
    for param in model.parameters():
        param.grad = None


def replace_data(model):
    model.body.weight.data = model.body.weight.data.clone()
    model.scale.data = model.scale.data.clone()


def drop_gradients(model):
    for param in model.parameters():
        param.grad = None


def replace_gradient(model):
    model.body.weight.grad = torch.zeros_like(model.body.weight)


def replace_gradient_data(model):
    if model.body.weight.grad is not None:
        model.body.weight.grad.data = torch.zeros_like(model.body.weight)


BREAKS = [to_double, replace_data, drop_gradients, replace_gradient, replace_gradient_data]


@pytest.mark.parametrize("zero_by", ["opt", "module"])
@pytest.mark.parametrize(
    ("break_views", "begun"),
    # Not float64 after steps: its states would be float32, flattened or not.
    [(to_double, 0), *((change, begun) for change in BREAKS[1:] for begun in (0, 2))],
)
def test_broken_views_give_the_same_training_and_one_warning(break_views, begun, zero_by):
    model, expected = net(), net()
    ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    seen = []
    for step in range(6):
        for m, o in ((model, opt), (expected, other)):
            (o if zero_by == "opt" else m).zero_grad()
            if step == begun:
                break_views(m)
            loss_of(m, step).backward()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                o.step()
            seen += caught
            assert m is model or not caught
        assert_same(model, expected)
    assert len(seen) == 1
    assert seen[0].category is UserWarning
    assert "left the flat buffer" in str(seen[0].message)


@pytest.mark.parametrize("hooked", [False, True])
def test_the_warning_points_at_the_call_of_step(hooked):
    model = net()
    ft.flatten_(model)
    opt = ft.SGD(model.parameters(), lr=0.1)
    if hooked:
        opt.register_step_post_hook(lambda *_: None)
    loss_of(model, 0).backward()
    replace_data(model)
    with pytest.warns(UserWarning, match="left the flat buffer") as seen:
        opt.step()
    assert seen[0].filename == __file__


def test_a_gradient_that_was_dropped_returns_to_its_view():
    model = net()
    buffers = ft.flatten_(model)
    opt = ft.SGD(model.parameters(), lr=0.1)
    before = places(trained(model))
    drop_gradients(model)
    opt.zero_grad()
    assert places(trained(model)) == before
    drop_gradients(model)
    loss_of(model, 0).backward()
    assert places(trained(model)) != before
    opt.zero_grad()
    assert places(trained(model)) == before
    assert not buffers.flat_grad.any()
    train(model, opt)  # without a warning


def test_parameters_that_are_gone_do_not_warn():
    model = net()
    ft.flatten_(model)
    opt = ft.SGD(model.head.parameters(), lr=0.1)
    body, model.body = model.body, nn.Identity()
    del body
    train(model, opt)


def test_flatten_again_after_a_break_sweeps_one_buffer_again():
    model = net()
    ft.flatten_(model)
    opt = ft.SGD(model.parameters(), lr=0.1)
    replace_data(model)
    with pytest.warns(UserWarning, match="call flatten_ again"):
        train(model, opt, range(1))
    buffers = ft.flatten_(model)
    train(model, opt)
    assert all(lies_in(param, buffers.flat) for param in trained(model))


# -- flatten_: what it refuses ---------------------------------------------------------------------


def sparse_gradient():
    model = nn.Embedding(4, 3, sparse=True)
    model(torch.tensor([1])).sum().backward()
    return [nn.Parameter(torch.ones(3)), model.weight]


def shared_memory():
    memory = torch.ones(6)
    return [nn.Parameter(memory[:4]), nn.Parameter(memory[3:])]


def twice():
    param = nn.Parameter(torch.ones(3))
    return [param, nn.Parameter(torch.ones(2)), param]


def wrapped():
    return [nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))]


def with_first(*others):
    return [nn.Parameter(torch.ones(3)), *others]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (lambda: nn.Parameter(torch.ones(3)), TypeError, "^module_or_params must be .* Parameter$"),
        (lambda: 5, TypeError, "^module_or_params must be a module or an iterable .* int$"),
        (lambda: None, TypeError, "NoneType$"),
        (list, ValueError, "must have a parameter that requires a gradient, got none"),
        (nn.Tanh, ValueError, "must have a parameter that requires a gradient, got none"),
        (
            lambda: nn.Linear(2, 2).requires_grad_(False),
            ValueError,
            "must have a parameter that requires a gradient, got none",
        ),
        (lambda: with_first(5), TypeError, r"params\[1\] must be a parameter, got int"),
        (lambda: with_first("w"), TypeError, r"params\[1\] must be a parameter, got str"),
        (lambda: net().named_parameters(), TypeError, r"params\[0\] must .* got tuple"),
        (lambda: with_first(nn.Parameter(torch.ones(2)) * 2), TypeError, r"params\[1\] must be a"),
        (twice, ValueError, r"params\[2\] must be given once, got it as 0 too"),
        (wrapped, TypeError, r"params\[0\] must be an ordinary parameter, got TwoTensor"),
        (shared_memory, ValueError, r"\[0\] and module_or_params\[1\] must not share"),
        (
            lambda: with_first(nn.Parameter(torch.ones(2, device="meta"))),
            ValueError,
            r"params\[1\] must be dense and on the CPU, got torch.strided on meta",
        ),
        (
            lambda: with_first(torch.ones(2).to_sparse().requires_grad_()),
            ValueError,
            r"params\[1\] must be dense and on the CPU, got torch.sparse_coo on cpu",
        ),
        (sparse_gradient, ValueError, r"params\[1\] must have a dense gradient, got torch.sparse"),
        (
            lambda: with_first(nn.Parameter(torch.ones(2, dtype=torch.int32), requires_grad=False)),
            TypeError,
            r"params\[1\] must be float32, .*, got torch.int32",
        ),
    ],
)
def test_flatten_refuses_and_changes_nothing(given, error, message):
    value = given()
    whole = value if isinstance(value, nn.Module | list | torch.Tensor) else []
    params = list(whole.parameters()) if isinstance(whole, nn.Module) else whole
    params = [p for p in params if isinstance(p, torch.Tensor) and p.is_leaf]
    before = [(p.data_ptr() if p.layout == torch.strided else None, p.grad) for p in params]
    with pytest.raises(error, match=message):
        ft.flatten_(value)
    now = [(p.data_ptr() if p.layout == torch.strided else None, p.grad) for p in params]
    for (was, grad), (place, kept) in zip(before, now, strict=True):
        assert place == was
        assert kept is grad
    if isinstance(value, nn.Module):
        assert "zero_grad" not in vars(value)


def test_flatten_names_the_parameter_of_a_module():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"^module_or_params\[1.weight\] must be dense and on"):
        ft.flatten_(model)


def test_flatten_takes_a_module_that_counts_as_empty():
    class Scale(nn.Sequential):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

    model = Scale()
    buffers = ft.flatten_(model)
    assert lies_in(model.scale, buffers.flat)
    model.scale.sum().backward()
    model.zero_grad()
    assert lies_in(model.scale.grad, buffers.flat_grad)


# -- step_in_backward ------------------------------------------------------------------------------


def two_groups(model):
    params = list(model.parameters())
    return [{"params": params[:3], "weight_decay": 0.1}, {"params": params[3:], "lr": 0.01}]


IN_BACKWARD = {
    "sgd": lambda model: ft.SGD(model.parameters(), lr=0.1),
    "momentum": lambda model: ft.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1
    ),
    "adamw": lambda model: ft.AdamW(model.parameters(), lr=0.1, weight_decay=0.1),
    "groups": lambda model: ft.AdamW(two_groups(model), lr=0.1, weight_decay=0.0),
    "nadam": lambda model: ft.NAdam(model.parameters(), lr=0.1),  # carries a product over steps
    "asgd": lambda model: ft.ASGD(model.parameters(), lr=0.1, t0=2.0),
    "rprop": lambda model: ft.Rprop(model.parameters(), lr=0.1),
}


@pytest.mark.parametrize("make_opt", IN_BACKWARD.values(), ids=IN_BACKWARD)
def test_step_in_backward_has_the_same_bits(make_opt):
    model, expected = net(), net()
    opt, other = make_opt(model), make_opt(expected)
    with ft.step_in_backward(model, opt):
        for step in range(STEPS):
            loss_of(model, step).backward()
            assert all(param.grad is None for param in model.parameters())
            before = {name: value.clone() for name, value in model.state_dict().items()}
            opt.step()  # finds no gradients
            torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
            train(expected, other, [step])
            assert_same(model, expected)
    assert_same_state(opt, other)


def test_step_in_backward_never_holds_all_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(6)))
    opt = ft.AdamW(model.parameters())
    counts = []

    def count(param):
        counts.append(sum(p.grad is not None for p in model.parameters()))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(count)
    handle = ft.step_in_backward(model, opt)
    model(torch.ones(2, 4)).sum().backward()
    assert len(counts) == 12  # each parameter was there once
    assert max(counts) == 1  # and none of the others
    handle.remove()
    counts.clear()
    model(torch.ones(2, 4)).sum().backward()
    assert max(counts) == 12


def test_step_in_backward_frees_the_gradient_of_each_parameter():
    model = net()
    grads = []

    def remember(param):
        grads.append(weakref.ref(param.grad))

    for param in trained(model):
        param.register_post_accumulate_grad_hook(remember)
    with ft.step_in_backward(model, ft.AdamW(model.parameters())):
        loss_of(model, 0).backward()
    assert len(grads) == len(trained(model))
    assert all(ref() is None for ref in grads)


def test_step_in_backward_steps_only_what_the_optimizer_holds():
    model = net()
    opt = ft.SGD(model.body.parameters(), lr=0.1)
    before = model.head.bias.detach().clone()
    with ft.step_in_backward(model, opt):
        loss_of(model, 0).backward()
    assert model.body.weight.grad is None
    assert model.head.bias.grad is not None
    assert torch.equal(model.head.bias, before)


def test_step_in_backward_leaves_unused_and_frozen_parameters():
    model, expected = net(), net()
    opt = ft.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    with ft.step_in_backward(model, opt):
        model.body(torch.ones(1, 6)).sum().backward()
    assert torch.equal(model.head.bias, expected.head.bias)
    assert torch.equal(model.frozen.weight, expected.frozen.weight)
    assert not torch.equal(model.body.bias, expected.body.bias)
    assert set(opt.state) == {model.body.weight, model.body.bias}


def test_remove_gives_gradients_and_steps_back():
    model, expected = net(), net()
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    handle = ft.step_in_backward(model, opt)
    loss_of(model, 0).backward()
    handle.remove()
    handle.remove()  # has no more to do
    train(expected, other, [0])
    loss_of(model, 1).backward()
    assert all(param.grad is not None for param in trained(model))
    opt.step()
    train(expected, other, [1])
    assert_same(model, expected)
    opt.zero_grad()
    with ft.step_in_backward(model, opt):  # and may begin again
        loss_of(model, 2).backward()
    train(expected, other, [2])
    assert_same(model, expected)


def test_step_in_backward_ends_with_its_context_though_it_raises():
    model = net()
    opt = ft.SGD(model.parameters(), lr=0.1)
    with pytest.raises(KeyError), ft.step_in_backward(model, opt):
        raise KeyError
    loss_of(model, 0).backward()
    assert model.body.weight.grad is not None


@pytest.mark.parametrize(
    "schedule",
    [
        lambda opt: torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.2, total_steps=STEPS),
    ],
)
def test_schedulers_drive_steps_in_backward(schedule):
    model, expected = net(), net()
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    mine, theirs = schedule(opt), schedule(other)
    with ft.step_in_backward(model, opt):
        for step in range(STEPS):
            loss_of(model, step).backward()
            opt.step()  # without it, schedulers warn
            mine.step()
            train(expected, other, [step])
            theirs.step()
    assert opt.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert_same(model, expected)


def test_step_hooks_run_once_with_steps_in_backward():
    model = net()
    opt = ft.SGD(model.parameters(), lr=0.1)
    calls = []
    opt.register_step_post_hook(lambda *_: calls.append(1))
    with ft.step_in_backward(model, opt):
        loss_of(model, 0).backward()
        opt.step()
    assert calls == [1]


def test_edited_groups_count_in_the_next_backward():
    model, expected = net(), net()
    opt, other = ft.SGD(model.parameters(), lr=0.1), ft.SGD(expected.parameters(), lr=0.1)
    with ft.step_in_backward(model, opt):
        for step in range(3):
            for o in (opt, other):
                o.param_groups[0].update(lr=0.1 / (step + 1), momentum=0.5 * (step > 0))
            loss_of(model, step).backward()
            train(expected, other, [step])
            assert_same(model, expected)


def test_a_group_added_later_keeps_its_gradients_for_step():
    model, extra = net(), nn.Parameter(torch.ones(3))
    opt = ft.SGD(model.parameters(), lr=0.5)
    with ft.step_in_backward(model, opt):
        opt.add_param_group({"params": [extra]})
        (loss_of(model, 0) + extra.sum()).backward()
        assert extra.tolist() == [1, 1, 1]
        opt.step()
        assert extra.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("active", [True, False], ids=["in-backward", "ordinary"])
def test_checkpoints_of_steps_in_backward_resume(active):
    model, expected = net(), net()
    opt, other = ft.NAdam(model.parameters(), lr=0.1), ft.NAdam(expected.parameters(), lr=0.1)
    with ft.step_in_backward(model, opt):
        for step in range(STEPS):
            loss_of(model, step).backward()
            train(expected, other, [step])
    file = io.BytesIO()
    torch.save((model.state_dict(), opt.state_dict()), file)
    file.seek(0)
    weights, states = torch.load(file, weights_only=True)
    resumed = net()
    again = ft.NAdam(resumed.parameters(), lr=0.5)
    if active:
        handle = ft.step_in_backward(resumed, again)
        loss_of(resumed, 99).backward()  # what is loaded replaces what was begun
    resumed.load_state_dict(weights)
    again.load_state_dict(states)
    for step in range(STEPS):
        if active:
            loss_of(resumed, step).backward()
        else:
            train(resumed, again, [step])
        train(expected, other, [step])
        assert_same(resumed, expected)
    assert_same_state(again, other)
    if active:
        handle.remove()


def test_a_backward_through_a_stale_graph_is_noticed():
    model = nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2, requires_grad=True)
    out = model(x)
    with ft.step_in_backward(model, ft.SGD(model.parameters(), lr=0.5)):
        out.sum().backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_clip_grad_norm_is_refused_for_stepped_parameters_only():
    model, other = net(), net()
    handle = ft.step_in_backward(model, ft.SGD(model.parameters(), lr=0.1))
    loss_of(model, 0).backward()
    loss_of(other, 0).backward()
    for given in (model.parameters(), list(model.parameters()), model.body.weight):
        with pytest.raises(RuntimeError, match=r"^clip_grad_norm_ needs all gradients at once"):
            torch.nn.utils.clip_grad_norm_(given, 1.0)
    mixed = [*other.parameters(), model.scale]
    with pytest.raises(RuntimeError, match="clip_grad_norm_ needs"):
        torch.nn.utils.clip_grad_norm_(parameters=mixed, max_norm=1.0)
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), max_norm=1e-3)
    clipped = torch.cat([p.grad.flatten() for p in trained(other)]).norm()
    assert norm > 1e-3
    assert clipped == pytest.approx(1e-3, rel=1e-3)
    handle.remove()
    loss_of(model, 0).backward()
    assert torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0) > 0


def test_clip_grad_norm_imported_by_name_is_refused_too():
    model = net()
    with ft.step_in_backward(model, ft.SGD(model.parameters(), lr=0.1)):
        loss_of(model, 0).backward()
        with pytest.raises(RuntimeError, match="clip_grad_norm_ needs all gradients at once"):
            clip_grad_norm_(model.parameters(), 1.0)


def test_clip_grad_norm_works_again_when_nothing_is_stepped():
    first, second = net(), net()
    handles = [ft.step_in_backward(m, ft.SGD(m.parameters(), lr=0.1)) for m in (first, second)]
    handles[0].remove()
    with pytest.raises(RuntimeError, match="clip_grad_norm_ needs"):
        torch.nn.utils.clip_grad_norm_(second.parameters(), 1.0)
    handles[1].remove()
    loss_of(second, 0).backward()
    torch.nn.utils.clip_grad_norm_(second.parameters(), 1e-3)
    grads = [p.grad for p in second.parameters() if p.grad is not None]
    assert sum(grad.square().sum() for grad in grads) < 1.01e-6


def test_an_ended_step_in_backward_keeps_nothing_alive():
    model = net()
    opt = ft.AdamW(model.parameters())
    with ft.step_in_backward(model, opt):
        loss_of(model, 0).backward()
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


def test_step_in_backward_refuses_parameters_that_share_memory():
    model = nn.Linear(4, 1)
    model.bias.data = model.weight.data[0, :1]
    with pytest.raises(ValueError, match="must not share memory"):
        ft.step_in_backward(model, ft.SGD(model.parameters()))


def test_flatten_refuses_frozen_parameters_given_one_by_one():
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"module_or_params\[0\] must require a gradient"):
        ft.flatten_(model.parameters())
    assert model.bias.grad is None


def test_flatten_refuses_parameters_that_other_processes_see():
    model = torch.nn.Linear(3, 2).share_memory()
    with pytest.raises(ValueError, match=r"\[weight\] must not be in shared memory"):
        ft.flatten_(model)
    assert model.weight.is_shared()


def test_flatten_refuses_gradients_of_another_dtype():
    model = torch.nn.Linear(3, 2)
    model.bias.grad_dtype = torch.bfloat16
    before = model.weight.data_ptr()
    with pytest.raises(TypeError, match=r"\[bias\] must have a gradient of torch.float32"):
        ft.flatten_(model)
    assert (model.weight.data_ptr(), model.weight.grad) == (before, None)


def test_a_warning_that_is_an_error_comes_before_the_step():
    model = torch.nn.Linear(3, 2)
    ft.flatten_(model)
    opt = ft.SGD(model.parameters(), lr=1.0)
    model(torch.ones(3)).sum().backward()
    model.weight.data = model.weight.data.clone()
    before = model.weight.detach().clone()
    with pytest.raises(UserWarning, match="left the flat buffer"):
        opt.step()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("loaded", [False, True])
def test_grad_scaler_is_refused(loaded, unscale):
    model = net()
    opt = ft.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with ft.step_in_backward(model, opt):
        if loaded:
            opt.load_state_dict(opt.state_dict())
        scaler.scale(loss_of(model, 0)).backward()
        if unscale:
            scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match="GradScaler cannot be used with step_in_backward"):
            scaler.step(opt)


def refuse_ddp():
    # A wrapper that was never set up: what is asked is only which class it is of.
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = net()
    return wrapped, ft.SGD(wrapped.module.parameters(), lr=0.1), {}


def refuse_flattened():
    model = net()
    ft.flatten_(model.body)
    return model, ft.SGD(model.parameters(), lr=0.1), {}


def refuse_torch_optimizer():
    model = net()
    return model, torch.optim.SGD(model.parameters(), lr=0.1), {}


def refuse_others_optimizer():
    return net(), ft.SGD(net().parameters(), lr=0.1), {}


def refuse_parameters():
    params = list(net().parameters())
    return params, ft.SGD(params, lr=0.1), {}


def refuse_max_norm():
    model = net()
    return model, ft.SGD(model.parameters(), lr=0.1), {"max_norm": 1.0}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (refuse_parameters, TypeError, "^model must be a torch.nn.Module, got list$"),
        (refuse_torch_optimizer, TypeError, "^optimizer must be one of fusedstep.torch, got torch"),
        (refuse_max_norm, ValueError, "^max_norm must be None, got 1.0: the global norm"),
        (refuse_ddp, ValueError, "^model must not be wrapped in DistributedDataParallel"),
        (refuse_flattened, ValueError, "^model must not be flattened"),
        (refuse_others_optimizer, ValueError, "must have a parameter that optimizer holds, got no"),
    ],
)
def test_step_in_backward_refuses(given, error, message):
    model, opt, keywords = given()
    own = torch.nn.utils.clip_grad_norm_
    with pytest.raises(error, match=message):
        ft.step_in_backward(model, opt, **keywords)
    assert torch.nn.utils.clip_grad_norm_ is own


def test_step_in_backward_is_refused_twice():
    model = net()
    opt = ft.SGD(model.parameters(), lr=0.1)
    with (
        ft.step_in_backward(model, opt),
        pytest.raises(ValueError, match="must not be stepped in backward twice"),
    ):
        ft.step_in_backward(model, ft.AdamW(model.parameters()))


def test_a_failing_step_in_backward_changes_nothing():
    model = net()
    opt = ft.SGD(model.parameters(), lr=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with ft.step_in_backward(model, opt):
        opt.param_groups[0]["lr"] = -1.0
        with pytest.raises(ValueError, match="lr must be"):
            model.body(torch.ones(2, 6)).sum().backward()
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_a_model_stepped_in_backward_is_freed_with_its_optimizer():
    model = net()
    opt = ft.AdamW(model.parameters())
    ft.step_in_backward(model, opt)
    loss_of(model, 0).backward()
    alive = [weakref.ref(value) for value in (model.body.weight, opt)]
    del model, opt
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


def test_a_copy_of_a_model_stepped_in_backward_is_an_ordinary_one():
    model = net()
    opt = ft.AdamW(model.parameters(), lr=0.1)
    with ft.step_in_backward(model, opt):
        loss_of(model, 0).backward()
        copied, copied_opt = copy.deepcopy((model, opt))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        loss_of(copied, 1).backward()
        assert copied.body.weight.grad is not None
        copied_opt.step()
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
        loss_of(model, 1).backward()
    assert_same(model, copied)
