"""Each flattened tensor has a storage of its own: what saves, copies or sends it sees no buffer."""

import copy
import functools
import gc
import pickle
import weakref

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import fusedstep as fs
import fusedstep.torch as ft
from this_torch import NO_DIST, OF_DCP


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small models wait longer for a second thread than it saves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.complex64, torch.complex128),
)


class Net(nn.Module):
    """Many tensors; tied weights, an empty and a 0-d parameter, a buffer, other strides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        self.layers = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.head = nn.Linear(4, 4)
        self.head.weight = self.layers[0].weight

    def forward(self, x):
        h = self.norm(self.layers(self.conv(x).mean((2, 3))))
        return self.head(h * self.scale) + self.nothing.sum()


def net(flatten, cls=Net):
    torch.manual_seed(0)
    model = cls()
    if flatten:
        ft.flatten_(model)
    return model


def train(model, opt, steps=2):
    for step in range(steps):
        opt.zero_grad()
        x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        opt.step()


def trained(flatten, cls=Net):
    model = net(flatten, cls)
    opt = ft.AdamW(model.parameters(), lr=0.1)
    train(model, opt)
    return model, opt


@functools.cache
def trained_once(flatten):
    """For tests that change nothing."""
    return trained(flatten)


def leaves(state):
    """All tensors of nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return [state]
    inside = state.values() if isinstance(state, dict) else state
    return [t for s in inside if isinstance(s, dict | list | torch.Tensor) for t in leaves(s)]


def storages(state):
    found = [tensor.untyped_storage() for tensor in leaves(state)]
    return {storage._cdata: storage for storage in found}.values()


def assert_own_storage(found):
    for tensor in found:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.storage_offset() == 0
    places = [tensor.untyped_storage().data_ptr() for tensor in found if tensor.numel()]
    assert len(set(places)) == len(places)


def assert_same(model, expected):
    mine, theirs = dict(model.state_dict()), dict(expected.state_dict())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# -- what is given away ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tensor_has_a_storage_of_its_own(dtype):
    shapes = [(3, 5), (), (0, 3), (0,), (7,), (2, 3, 4, 5)]
    params = [nn.Parameter(torch.ones(shape).to(dtype)) for shape in shapes]
    params.append(nn.Parameter(torch.ones(5, 3).to(dtype).t()))
    params[5].data = params[5].data.to(memory_format=torch.channels_last)
    ft.flatten_(params)
    assert_own_storage([*params, *(p.grad for p in params)])
    opt = ft.AdamW(params)
    opt.step()
    assert_own_storage([v for entry in opt.state.values() for v in entry.values()])
    for param in params:
        for value in (param, param.grad, opt.state[param]["exp_avg"]):
            assert value.stride() == param.stride()
            assert not value._is_view()


def test_a_tied_weight_has_one_storage():
    model = net(True)
    state = model.state_dict()
    assert model.head.weight is model.layers[0].weight
    one, other = (state[name].untyped_storage() for name in ("head.weight", "layers.0.weight"))
    assert one._cdata == other._cdata


def test_the_buffers_are_still_the_whole():
    model = net(False)
    buffers = ft.flatten_(model)
    assert buffers.flat is buffers.flat
    assert buffers.flat_grad is buffers.flat_grad
    for param in model.parameters():
        if param.numel():
            at = (param.data_ptr() - buffers.flat.data_ptr()) // 4
            assert 0 <= at <= buffers.flat.numel() - param.numel()
            assert at == (param.grad.data_ptr() - buffers.flat_grad.data_ptr()) // 4


def test_memory_lives_as_long_as_the_last_tensor_on_it(monkeypatch):
    memory, allocate = [], fs._core.allocate

    def remember(*args):
        array = allocate(*args)
        memory.append(weakref.ref(array))
        return array

    monkeypatch.setattr(fs._core, "allocate", remember)
    model = net(False)
    buffers = ft.flatten_(model)
    opt = ft.AdamW(model.parameters())
    train(model, opt, 1)
    buffers.flat.fill_(3)
    bias = model.head.bias.detach()
    del model, buffers, opt
    gc.collect()
    assert [ref() is not None for ref in memory] == [True, False, False, False]
    assert (bias == 3).all()
    del bias
    assert memory[0]() is None


# -- files, pickles and copies ---------------------------------------------------------------------


def pickled(state, folder):
    (folder / "pickle").write_bytes(pickle.dumps(state))
    return lambda: pickle.loads((folder / "pickle").read_bytes())


def saved(state, folder):
    torch.save(state, folder / "save")
    return lambda: torch.load(folder / "save", weights_only=True)


def saved_in_the_old_format(state, folder):
    torch.save(state, folder / "save", _use_new_zipfile_serialization=False)
    return lambda: torch.load(folder / "save", weights_only=True)


def distributed(state, folder):
    state = {"state": state}
    alone = {"no_dist": True} if NO_DIST else {}  # torch 2.4.0 sees that there is one process
    dcp.save(state, checkpoint_id=folder, **alone)

    def load():
        into = copy.deepcopy(state)
        for tensor in leaves(into):
            tensor.zero_()
        dcp.load(into, checkpoint_id=folder, **alone)
        return into["state"]

    return load


WRITERS = [pickled, saved, saved_in_the_old_format, distributed]
STATES = {
    "model": lambda model, opt: model.state_dict(),
    "optimizer": lambda model, opt: opt.state_dict()["state"],
    "one weight": lambda model, opt: {"w": model.state_dict()["layers.7.weight"]},
    "one state": lambda model, opt: {"s": opt.state[model.layers[7].weight]["exp_avg"]},
    "gradients": lambda model, opt: {n: p.grad for n, p in model.named_parameters()},
}


def bytes_in(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.filterwarnings(f"ignore:{OF_DCP}")
@pytest.mark.parametrize("what", STATES)
@pytest.mark.parametrize("write", WRITERS)
def test_files_have_the_size_of_an_unflattened_models(write, what, tmp_path):
    sizes = []
    for flatten in (False, True):
        folder = tmp_path / f"{flatten:d}"  # names of one length: they are in the files
        folder.mkdir()
        state = STATES[what](*trained_once(flatten))
        load = write(state, folder)
        torch.testing.assert_close(dict(load()), dict(state), rtol=0, atol=0)
        sizes.append(bytes_in(folder))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("what", STATES)
def test_copies_take_the_memory_of_what_they_copy(what):
    state = STATES[what](*trained_once(True))
    for value in leaves(state):
        assert copy.deepcopy(value).untyped_storage().nbytes() == value.nbytes
    copies = copy.deepcopy(state)
    assert sum(s.nbytes() for s in storages(copies)) == sum(s.nbytes() for s in storages(state))


def test_safetensors_writes_every_parameter(tmp_path):
    for flatten in (False, True):
        model = net(flatten)
        safetensors.torch.save_model(model, tmp_path / str(flatten))
        fresh = Net()
        assert safetensors.torch.load_model(fresh, tmp_path / str(flatten)) == (set(), [])
        assert_same(fresh, net(False))
    assert (tmp_path / "True").read_bytes() == (tmp_path / "False").read_bytes()


def test_accelerate_writes_every_parameter_and_state(tmp_path):
    import accelerate  # takes as long as all the tests here

    accelerator = accelerate.Accelerator(cpu=True)
    files = {}
    for flatten in (False, True):
        folder = tmp_path / str(flatten)
        model, opt = accelerator.prepare(*trained(flatten))
        accelerator.save_model(model, folder / "model")
        accelerator.save_state(folder / "state")
        files[flatten] = {
            str(file.relative_to(folder)): file.stat().st_size
            for file in folder.rglob("*")
            if file.is_file() and not file.name.startswith("random_states")
        }
        weights = safetensors.torch.load_file(folder / "model" / "model.safetensors")
        expected = model.state_dict()
        del expected["head.weight"]  # tied
        torch.testing.assert_close(weights, dict(expected), rtol=0, atol=0)
        before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
        train(model, opt)
        accelerator.load_state(folder / "state")
        after = dict(model.state_dict()), opt.state_dict()["state"]
        torch.testing.assert_close(after, (dict(before[0]), before[1]), rtol=0, atol=0)
        accelerator.free_memory()
    assert files[True] == files[False]
    assert "model/model.safetensors" in files[True]


def test_hugging_faces_mixin_writes_every_parameter(tmp_path):
    from huggingface_hub import PyTorchModelHubMixin  # comes with accelerate

    class Shared(Net, PyTorchModelHubMixin):
        pass

    model = net(True, Shared)
    model.save_pretrained(tmp_path)
    assert_same(Shared.from_pretrained(tmp_path), net(False))


# -- a storage that is moved, sent or resized ------------------------------------------------------


def test_a_model_in_shared_memory_trains_alike_and_the_buffer_is_left_with_one_warning():
    model, expected = net(False), net(False)
    buffers = ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    train(model, opt)
    model.share_memory()
    assert all(param.is_shared() for param in model.parameters())
    before = buffers.flat.clone()
    with pytest.warns(UserWarning, match="left the flat buffer") as seen:
        train(model, opt)
    assert len(seen) == 1
    train(expected, other, 2)
    train(expected, other, 2)
    assert_same(model, expected)
    assert torch.equal(buffers.flat, before)  # nobody's any more, and nobody writes to it


def test_states_in_shared_memory_train_alike():
    (model, opt), (expected, other) = trained(True), trained(False)
    opt.share_memory()
    states = [v for entry in opt.state.values() for v in entry.values()]
    assert all(value.is_shared() for value in states if value.numel())
    train(model, opt)
    train(expected, other)
    assert_same(model, expected)


def test_the_buffers_stay_the_models_though_a_tensor_on_them_is_moved():
    model, expected = net(False), net(False)
    buffers = ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters(), lr=0.1), ft.AdamW(expected.parameters(), lr=0.1)
    moved, moved_grad = buffers.flat.share_memory_(), buffers.flat_grad.share_memory_()
    moved.fill_(7)
    moved_grad.fill_(7)
    assert_same(model, expected)
    train(model, opt)
    train(expected, other)
    assert_same(model, expected)
    assert buffers.flat_grad.any()
    opt.zero_grad()
    assert not buffers.flat_grad.any()
    assert not any(param.grad.any() for param in model.parameters())
    assert (moved_grad == 7).all()


@pytest.mark.parametrize("nbytes", [0, 4, 1 << 20])
def test_torch_refuses_to_resize_what_flatten_gave(nbytes):
    model = net(False)
    buffers = ft.flatten_(model)
    opt = ft.AdamW(model.parameters())
    train(model, opt)
    weight = model.layers[3].weight
    state = opt.state[weight]["exp_avg"]
    for tensor in (weight, weight.grad, state, buffers.flat, buffers.flat_grad):
        with pytest.raises(RuntimeError, match="storage that is not resizable"):
            tensor.untyped_storage().resize_(nbytes)
    train(model, opt)
    expected, other = net(False), None
    other = ft.AdamW(expected.parameters())
    train(expected, other)
    train(expected, other)
    assert_same(model, expected)


def resized(tensor, nbytes):
    tensor.untyped_storage().resize_(nbytes)
    return tensor


@pytest.mark.parametrize("nbytes", [0, 4, 23])
@pytest.mark.parametrize("of", ["parameter", "gradient", "both"])
def test_flatten_refuses_tensors_without_memory_and_changes_nothing(of, nbytes):
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weight = model[0].weight
    label = r"module_or_params\[0.weight\]"
    if of != "parameter":
        weight.grad = resized(torch.ones(3, 2), nbytes)
        label = "the gradient of " + label
    if of != "gradient":
        resized(weight, nbytes)
    places = [param.data_ptr() for param in model.parameters()]
    grads = [param.grad for param in model.parameters()]
    message = rf"^{label} must have memory, 24 bytes of it, got a storage of {nbytes} bytes$"
    with pytest.raises(ValueError, match=message):
        ft.flatten_(model)
    assert [param.data_ptr() for param in model.parameters()] == places
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert "zero_grad" not in vars(model)


def test_flatten_counts_what_a_view_spans():
    base = torch.ones(4, 4)
    param = nn.Parameter(base[1:, 1:])  # from element 5 to element 15
    resized(base, 60)
    with pytest.raises(ValueError, match="64 bytes of it, got a storage of 60 bytes"):
        ft.flatten_([param])
    resized(base, 64)
    ft.flatten_([param])


def test_step_in_backward_refuses_parameters_without_memory():
    model = nn.Linear(2, 3)
    resized(model.weight, 0)
    with pytest.raises(ValueError, match=r"^params\[0\] must have memory, 24 bytes of it"):
        ft.step_in_backward(model, ft.SGD(model.parameters()))


# -- autograd --------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["all", "some"])
def test_a_backward_through_a_zeroed_gradient_is_noticed(of):
    model = nn.Linear(2, 2)
    ft.flatten_(model)
    params = model.parameters() if of == "all" else [model.weight]
    opt = ft.SGD(params, lr=0.1)
    x = torch.ones(2, 2, requires_grad=True)
    loss = (x * model.weight.grad).sum()
    opt.zero_grad()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parameters_flattened_in_inference_mode_train():
    model, expected = net(False), net(False)
    with torch.inference_mode():
        ft.flatten_(model)
    opt, other = ft.AdamW(model.parameters()), ft.AdamW(expected.parameters())
    train(model, opt)
    train(expected, other)
    assert_same(model, expected)


# -- the neutral optimizers ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["arrays", "buffer", "tensors"])
def test_neutral_states_are_pickled_and_copied_alone(kind):
    values = {f"w{i}": np.ones((64, 64), np.float32) for i in range(20)}
    params = {
        "arrays": lambda: values,
        "buffer": lambda: fs.FlatBuffer.pack(values),
        "tensors": lambda: {k: torch.from_numpy(v.copy()) for k, v in values.items()},
    }[kind]()
    opt = fs.Adam(params)
    opt.step({name: np.ones((64, 64), np.float32) for name in values})
    state, nbytes = opt.state_dict()["state"], 4 * 64 * 64
    assert len(pickle.dumps(state)) < 1.1 * 2 * len(values) * nbytes
    assert len(pickle.dumps(params)) < 1.1 * len(values) * nbytes
    one = state[7]["exp_avg"]
    assert len(pickle.dumps(one)) < nbytes + 500
    copied = copy.deepcopy(one)
    if kind == "tensors":
        assert_own_storage(leaves(state))
        assert copied.untyped_storage().nbytes() == nbytes
    else:
        assert copied.base is None


@pytest.mark.parametrize("name", ["exp_avg", "step", "own"])
@pytest.mark.parametrize("nbytes", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_tensor_without_memory_is_refused(name, nbytes, dtype):
    param = nn.Parameter(torch.ones(2, 3, dtype=dtype))
    param.grad = torch.ones_like(param)
    opt = ft.AdamW([param])
    opt.step()
    opt.state[param]["own"] = torch.ones(4)
    saved, before = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    saved["state"][0][name].untyped_storage().resize_(nbytes)
    message = rf"state_dict\['state'\]\[0\]\['{name}'\] must have memory, \d+ bytes of it, got a"
    with pytest.raises(ValueError, match=message):
        opt.load_state_dict(saved)
    for key, value in before["state"][0].items():
        assert torch.equal(opt.state[param][key], value)
