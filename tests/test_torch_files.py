"""A torch run in a file: what people put in `torch.save({...})` comes back, or is refused."""

import mmap
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from safetensors import safe_open  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim import lr_scheduler as L  # noqa: E402

import fusedstep as fs  # noqa: E402
import fusedstep.torch as fst  # noqa: E402
from cases import CASES  # noqa: E402
from this_torch import lacks, named  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


def same(a, b):
    """Whether two trees are of the same kinds and bits."""
    if isinstance(a, torch.Tensor):
        plain = [x.detach().resolve_conj().resolve_neg().contiguous() for x in (a, b)]
        bits = [x.reshape(-1).view(torch.uint8) for x in plain]
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*bits)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def model(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False)).to(dtype)


def train(net, opt, steps, sched=None):
    for i in steps:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))

        def closure():
            opt.zero_grad()
            loss = net(x.to(net[0].weight.dtype)).abs().square().mean()  # noqa: B023
            loss.backward()
            return loss

        opt.step(closure)
        if isinstance(sched, L.ReduceLROnPlateau):
            sched.step(1.0)
        elif sched is not None:
            sched.step()


def check_resumes(path, make_optimizer, make_scheduler=None, prepare=lambda net: net):
    """A run that is saved, gone on with, and resumed in other objects has the same bits."""

    def made(seed):
        net = prepare(model(seed))
        parts = {"model": net, "optimizer": make_optimizer(net)}
        if make_scheduler:
            parts["scheduler"] = make_scheduler(parts["optimizer"])
        return parts

    def go(parts, steps):
        train(parts["model"], parts["optimizer"], steps, parts.get("scheduler"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's schedulers, about themselves
        first, again = made(0), made(1)
        go(first, range(5))
        fst.save(path, **first)
        saved = fst.load(path, **dict(reversed(again.items())))  # in whatever order
        assert same(first["optimizer"].state_dict(), again["optimizer"].state_dict())
        go(first, range(5, 12))
        go(again, range(5, 12))
    assert all(saved[name] is part for name, part in again.items())
    for name in ("model", "optimizer"):
        assert same(first[name].state_dict(), again[name].state_dict())
    return saved


# -- optimizers, schedulers, generators ------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_our_optimizers_resume(name, path):
    check_resumes(path, lambda net: getattr(fst, name)(named(net), **CASES[name][-2]))


@pytest.mark.parametrize(
    "how",
    [
        {"state_dtype": "q8", "ema": 0.9},
        {"state_dtype": "bfloat16", "state_rounding": "nearest"},
        {"rounding": "split", "ema": 0.9, "ema_dtype": "bfloat16"},
        {"rounding": "kahan", "state_dtype": {"exp_avg": "q8"}},
        {"rounding": "stochastic", "seed": 7},
    ],
    ids=str,
)
def test_narrow_states_roundings_and_averages_resume(how, path):
    check_resumes(
        path, lambda net: fst.AdamW(net.parameters(), **how), prepare=lambda net: net.bfloat16()
    )


THEIRS = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": torch.tensor(0.01), "amsgrad": True},
    "AdamW": {"fused": True},
    "RMSprop": {"centered": True, "momentum": 0.5},
    "ASGD": {},
    "Adafactor": {},
    "LBFGS": {"max_iter": 2},
}


@pytest.mark.parametrize("name", [name for name in THEIRS if hasattr(torch.optim, name)])
def test_torchs_optimizers_resume_and_keep_nothing_of_the_file(name, path):
    saved = check_resumes(
        path, lambda net: getattr(torch.optim, name)(net.parameters(), **THEIRS[name])
    )
    assert saved.step == (0 if name in ("SGD", "LBFGS") else 5)
    with open("/proc/self/maps") as maps:
        saved = None
        assert str(path) not in maps.read()


SCHEDULERS = {
    "MultiStepLR": lambda opt: L.MultiStepLR(opt, [2, 4, 8, 8]),
    "SequentialLR": lambda opt: L.SequentialLR(
        opt, [L.LinearLR(opt, 0.1, 1.0, 3), L.CosineAnnealingLR(opt, 10)], [3]
    ),
    "ChainedScheduler": lambda opt: L.ChainedScheduler(
        [L.LinearLR(opt, 0.1, 1.0, 3), L.ExponentialLR(opt, 0.9)]
    ),
    "ReduceLROnPlateau": lambda opt: L.ReduceLROnPlateau(opt, patience=1),
    "OneCycleLR": lambda opt: L.OneCycleLR(opt, 0.5, total_steps=30),
    "CyclicLR": lambda opt: L.CyclicLR(opt, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda opt: L.CosineAnnealingWarmRestarts(opt, 3),
    "LambdaLR": lambda opt: L.LambdaLR(opt, lambda t: 0.9**t),
    "SWALR": lambda opt: torch.optim.swa_utils.SWALR(opt, 0.01),
    "ours": lambda opt: fst.LRScheduler(opt, fs.schedules.Cosine(0.1, total=20).warmup(3)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_resume(name, path):
    if name == "SWALR":
        own = SCHEDULERS[name](torch.optim.SGD(model(0).parameters(), lr=0.1)).state_dict()
        if any(map(callable, own.values())):
            pytest.skip(lacks("SWALR whose state is data"))
    check_resumes(
        path, lambda net: fst.SGD(net.parameters(), lr=0.1, momentum=0.9), SCHEDULERS[name]
    )


def test_scalers_and_generators_go_on(path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    net = model(0)
    opt = fst.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        scaler.scale(net(torch.ones(3)).sum()).backward()
        scaler.step(opt)
        scaler.update()
    rng, again = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    fst.save(path, scaler=scaler, rng=rng)
    resumed = torch.amp.GradScaler("cpu")
    fst.load(path, scaler=resumed, rng=again)
    assert resumed.state_dict() == scaler.state_dict()
    assert torch.equal(torch.rand(3, generator=rng), torch.rand(3, generator=again))


def test_optimizers_with_states_of_their_own_making_are_saved(path):
    net = model(0)
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    opt.state["calls"] = 3
    opt.state[net[0].weight] = {"step": torch.ones(4, 3)}
    fst.save(path, opt=opt)
    again = torch.optim.SGD(net.parameters(), lr=0.1)
    fst.load(path, opt=again)
    assert same(again.state_dict(), opt.state_dict())


def test_files_go_from_one_side_to_the_other(path):
    net = model(0)
    ours = fst.AdamW(named(net), lr=0.1)
    train(net, ours, range(3))
    fst.save(path, opt=ours, w=net[0].weight)
    theirs = torch.optim.AdamW(named(net))
    fs.load(path, opt=theirs)
    assert theirs.state[net[0].weight]["step"] == 3
    arrays = {name: p.detach().numpy() for name, p in net.named_parameters()}
    neutral = fs.AdamW(arrays)
    w = np.zeros((4, 3), np.float32)
    fst.load(path, opt=neutral, w=w)
    assert neutral.steps == 3
    assert np.array_equal(w, arrays["0.weight"])
    fs.save(path, opt=neutral, w=w)
    again = fst.AdamW(named(net))
    fst.load(path, opt=again, w=net[0].weight)
    assert same(again.state_dict()["state"], ours.state_dict()["state"])


class Loader:
    """An object of somebody's own, with both libraries' arrays in its state."""

    def __init__(self):
        self.state = {"torch": torch.zeros(2), "numpy": np.zeros(2)}

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_states_of_other_objects_have_the_arrays_that_they_had(path):
    fst.save(path, loader=Loader(), run={"rng": torch.get_rng_state()})
    for load in (fs.load, fst.load):
        loader, run = Loader(), {"rng": None}
        load(path, loader=loader, run=run)
        assert [type(one) for one in loader.state.values()] == [torch.Tensor, np.ndarray]
        torch.set_rng_state(run["rng"])


# -- tensors ---------------------------------------------------------------------------------------

DTYPES = [
    "bool",
    "uint8",
    "int8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "int64",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e5m2",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_all_dtypes_and_layouts_come_back(dtype, path):
    dtype = getattr(torch, dtype)
    plain = torch.arange(256, dtype=torch.uint8).repeat(6) % (2 if dtype == torch.bool else 255)
    plain = plain.view(dtype)[:96].reshape(4, 3, -1)
    layouts = {
        "plain": plain,
        "transposed": plain.mT,
        "strided": plain[::2, 1:],
        "broadcast": plain[:1].expand(5, -1, -1),
        "0-d": plain[0, 0, 0],
        "empty": plain[:0],
    }
    if dtype.is_complex:
        layouts |= {"conj": plain.conj(), "neg": plain.conj().imag}
    fst.save(path, **layouts)
    found = fst.load(path)
    assert [name for name, one in layouts.items() if not same(found[name], one)] == []
    fst.load(path, plain=plain.zero_())
    assert same(plain, found["plain"])
    with safe_open(path, "pt") as file:
        if not dtype.is_complex:
            assert same(file.get_tensor("transposed"), found["transposed"])


REFUSED = {
    "sparse": (lambda: torch.eye(2).to_sparse(), "x must be a dense tensor, got torch.sparse_coo"),
    "csr": (lambda: torch.eye(2).to_sparse_csr(), "x must be a dense tensor"),
    "meta": (lambda: torch.ones(2, device="meta"), "x must be a dense tensor, .* on meta"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(1)]), "got a nested tensor"),
    "lazy": (lambda: nn.LazyLinear(2).weight, "x must be initialized, got Uninitialized"),
    "complex32": (lambda: torch.ones(2, dtype=torch.complex32), "of a dtype that files have"),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        "x must be of a dtype that files have, got quint8",
    ),
    "e8m0": (
        lambda: torch.empty(2, dtype=torch.float8_e4m3fnuz),
        "x must be of bool, .* got float8",
    ),
    "dtype": (lambda: torch.float32, "x must be an array, .*, got dtype"),
    "set": (lambda: {1}, "x must be an array, .*, got set"),
}


@pytest.mark.filterwarnings("ignore")  # torch's, of what is new or old
@pytest.mark.parametrize("name", REFUSED)
def test_what_a_file_cannot_hold_is_refused_by_name(name, path):
    make, message = REFUSED[name]
    with pytest.raises(TypeError, match=message):
        fst.save(path, x=make())
    assert not path.exists()
    if name not in ("dtype", "set"):
        fst.save(path, x=torch.ones(2))
        with pytest.raises(TypeError, match="x must be"):
            fst.load(path, x=make())


def test_sharded_tensors_are_refused_and_sent_to_dcp(path):
    dist = pytest.importorskip("torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh

    try:
        from torch.distributed.tensor import distribute_tensor
    except ImportError:
        pytest.skip(lacks("torch.distributed.tensor.distribute_tensor"))
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        mesh = init_device_mesh("cpu", (1,))
        net = nn.Module()
        net.w = nn.Parameter(distribute_tensor(torch.ones(2), mesh))
        with pytest.raises(TypeError, match=r"net\['w'\] .* got a DTensor; torch.distributed.ch"):
            fst.save(path, net=net)
        plain = nn.Module()
        plain.w = nn.Parameter(torch.ones(2))
        opt = torch.optim.Adam([plain.w])
        plain.w.grad = torch.ones(2)
        opt.step()
        fst.save(path, net=plain, opt=opt)
        with pytest.raises(TypeError, match=r"net\['w'\] .* got a DTensor"):
            fst.load(path, net=net)
        with pytest.raises(TypeError, match=r"opt.param_groups\[0\].* got a DTensor"):
            fst.load(path, opt=torch.optim.Adam([net.w]))
        with pytest.raises(TypeError, match=r"opt: .* must be DTensor"):
            fst.load(path, opt=filled(fst.Adam([net.w])))
    finally:
        dist.destroy_process_group()


def filled(opt):
    for param in opt.param_groups[0]["params"]:
        param.grad = torch.ones_like(param) if param.grad is None else param.grad.fill_(1)
    opt.step()
    return opt


def test_tensors_of_a_mapping_that_may_not_be_written_are_copies(path, monkeypatch):
    fst.save(path, w=torch.ones(3))
    real = mmap.mmap

    def refusing(descriptor, size, access):
        if access == mmap.ACCESS_COPY:
            raise OSError("too large")
        return real(descriptor, size, access=access)

    monkeypatch.setattr(mmap, "mmap", refusing)
    w = fst.load(path)["w"]
    w += 1
    assert w.tolist() == [2, 2, 2]
    target = torch.zeros(3)
    fst.load(path, w=target)
    assert target.tolist() == [1, 1, 1]


# -- modules ---------------------------------------------------------------------------------------


class Extra(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.w = nn.Parameter(torch.rand(2))
        self.register_buffer("none", None)
        self.register_buffer("left", torch.rand(2), persistent=False)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, extra):
        if self.extra is None:
            raise ValueError("no extra state here")
        self.extra = extra


def tied():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    return net


MODULES = {
    "channels last": lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
    "tied": tied,
    "bfloat16": lambda: nn.Linear(3, 4, dtype=torch.bfloat16),
    "complex": lambda: nn.Linear(3, 4, dtype=torch.complex64),
    "buffers": lambda: nn.BatchNorm1d(3),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(3, 3)),
    "compiled": lambda: torch.compile(nn.Linear(3, 3), backend="eager"),
    "inside": lambda: nn.ModuleDict({"a b": Extra(1)}),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_come_back_in_place(name, path):
    torch.manual_seed(0)
    net, again = MODULES[name](), MODULES[name]()
    fst.save(path, net=net)
    places = {key: one.data_ptr() for key, one in again.named_parameters()}
    fst.load(path, net=again)
    assert same(dict(again.state_dict()), dict(net.state_dict()))
    assert {key: one.data_ptr() for key, one in again.named_parameters()} == places
    with safe_open(path, "pt") as file:
        for key, value in net.state_dict().items():
            if isinstance(value, torch.Tensor) and not value.is_complex():
                assert same(file.get_tensor(f"net.{key}"), value.contiguous())


@pytest.mark.parametrize("extra", [3, "a", [1, 2, 3], {"t": torch.ones(3)}, (1, 2)], ids=str)
def test_extra_states_of_other_sizes_come_back(extra, path):
    net = Extra(extra)
    fst.save(path, net=net)
    again = Extra(torch.zeros(5))
    fst.load(path, net=again)
    assert same(again.extra, extra)
    assert same(again.w, net.w)


def lin(*shape, **options):
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(*shape, **options))


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (lambda: lin(3, 4), ValueError, r"net\['1.weight'\] must have shape \(3, 3\)"),
        (lambda: lin(3, 3).double(), TypeError, r"net\['0.weight'\] must be float32, .* float64"),
        (lambda: lin(3, 3, bias=False), ValueError, r"net must have the names .* \['1.bias'\]"),
        (lambda: nn.Linear(3, 3), ValueError, "net must have the names in the file"),
        (lambda: lin(3, 3, device="meta"), TypeError, r"net\['1.weight'\] must be a dense tensor"),
    ],
)
def test_modules_that_do_not_fit_are_refused_and_unchanged(target, error, message, path):
    net, w = target(), torch.zeros(2)
    before = [p.clone() for p in net.parameters()]
    fst.save(path, net=lin(3, 3), w=torch.ones(2))
    with pytest.raises(error, match=message):
        fst.load(path, w=w, net=net)
    assert w.tolist() == [0, 0]
    assert all(
        a.is_meta or torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True)
    )


def test_modules_of_inference_mode_are_refused_outside_it(path):
    with torch.inference_mode():
        net = nn.Linear(3, 3)
    fst.save(path, net=net)
    with pytest.raises(ValueError, match=r"net\['weight'\] must be writable, got a tensor of inf"):
        fst.load(path, net=net)


def test_what_refuses_late_puts_all_back(path):
    net = model(0)
    opt = fst.AdamW(net.parameters())
    train(net, opt, range(2))
    fst.save(path, net=net, opt=opt, last=Extra(1))
    for last in (Extra(None), Refusing(1)):
        other = model(1)
        opt_2 = fst.AdamW(other.parameters())
        train(other, opt_2, range(1))
        parts = (other, opt_2, last)
        before = [dict(clone(one.state_dict())) for one in parts]
        with pytest.raises(ValueError, match="no extra state here"):
            fst.load(path, net=other, opt=opt_2, last=last)
        assert all(
            same(dict(one.state_dict()), old) for one, old in zip(parts, before, strict=True)
        )


class Refusing(Extra):
    def set_extra_state(self, extra):
        if extra != self.extra or not hasattr(self, "seen"):
            self.seen = True
            raise ValueError("no extra state here")


def clone(tree):
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {key: clone(one) for key, one in tree.items()}
    return [clone(one) for one in tree] if isinstance(tree, list) else tree


def test_flattened_models_have_the_files_of_others(path):
    def made(flat):
        net = nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)])
        torch.manual_seed(0)
        for param in net.parameters():
            nn.init.normal_(param)
        if flat:
            fst.flatten_(net)
        return net, filled(fst.AdamW(named(net), ema=0.9))

    files = []
    for flat in (False, True):
        net, opt = made(flat)
        fst.save(path, net=net, opt=opt)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    places = [param.data_ptr() for param in net.parameters()]
    fst.load(path, net=net, opt=opt)
    assert [param.data_ptr() for param in net.parameters()] == places
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # that a view was left
        opt.step()
