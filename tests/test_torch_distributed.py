"""Two processes joined by gloo: results are those of one process, and close to torch.optim's.

Starting processes takes seconds, so all scenarios run in one start, and tests read what they left.
"""

import copy
import functools
import inspect
import traceback
import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR

import fusedstep.torch as ft
from fusedstep import schedules
from this_torch import OF_DCP, lacks, needs

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
except ImportError:  # torch < 2.6: all but shards is tested

    def fully_shard(*_, **__):
        raise NotImplementedError(lacks("fully_shard"))

    distribute_tensor = Shard = Replicate = fully_shard
    DTensor = ()
    # What scenarios raise, and why. The second is torch 2.4.0's before a first step: a flattened
    # model has its gradients from the beginning.
    OLD = {
        lacks("fully_shard"): "fully_shard",
        "the optimizer states are initialized": "get_state_dict beside gradients",
    }
else:
    OLD = {}

with warnings.catch_warnings():  # its module uses what torch deprecates
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

RANKS = 2
STEPS = 4
LIBRARIES = {"fusedstep": ft, "torch": torch.optim}
CLASSES = [
    name
    for name in ft.__all__
    if inspect.isclass(getattr(ft, name)) and issubclass(getattr(ft, name), torch.optim.Optimizer)
]
CLASSES.remove("Optimizer")


THEIRS = [name for name in CLASSES if hasattr(torch.optim, name)]
THEIRS.remove("Rprop")  # indexes in place, which DTensors do not take


def net(seed=0):
    """Its first shards are uneven, its last are empty on rank 1."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def loss_of(model, step, rank):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(RANKS * step + rank))
    return (model(x).squeeze(1) - x.sin().sum(1)).square().mean()


def hypers_of(name):
    return {"lr": 0.05} | ({} if name == "Rprop" else {"weight_decay": 0.1})  # as torch has them


def optimizer(lib, model, name="AdamW", **hypers):
    return getattr(lib, name)(model.parameters(), **{**hypers_of(name), **hypers})


def train(model, opt, rank, steps=range(STEPS), clip=None):
    for step in steps:
        opt.zero_grad()
        loss_of(model, step, rank).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()


def train_alone(model, opt, steps=range(STEPS)):
    """On the batches of all ranks; averaging two gradients rounds as adding their halves."""
    for step in steps:
        opt.zero_grad()
        for rank in range(RANKS):
            (loss_of(model, step, rank) / RANKS).backward()
        opt.step()


@functools.cache
def alone(name="AdamW", steps=STEPS, **hypers):
    model = net()
    train_alone(model, optimizer(ft, model, name, **hypers), range(steps))
    return full(model)


def full(model):
    with torch.no_grad():
        return [whole(param).clone() for param in model.parameters()]


def whole(tensor):
    if tensor.dtype == torch.int16:  # which gloo cannot gather
        tensor = tensor.to(torch.int32)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


# -- scenarios: run on each rank, return what a test shall see -------------------------------------

SCENARIOS = {}


def scenario(*parameters):
    def register(function):
        for values in parameters or [()]:
            key = (function.__name__, *values)
            SCENARIOS[key] = functools.partial(function, *values)
        return function

    return register


each_library = scenario(*((name,) for name in LIBRARIES))


def sharded(seed=0, flatten=False):
    model = net(seed)
    if flatten:
        ft.flatten_(model)
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


@scenario(*((lib, view, name) for lib in LIBRARIES for view in (0, 1) for name in ("AdamW", "SGD")))
def ddp(lib, bucket_view, name, rank, folder):
    model = DistributedDataParallel(net(), gradient_as_bucket_view=bool(bucket_view))
    train(model, optimizer(LIBRARIES[lib], model, name), rank)
    return full(model)


@scenario((0,), (1,))
def ddp_flattened(bucket_view, rank, folder):
    model = net()
    buffers = ft.flatten_(model)
    model = DistributedDataParallel(model, gradient_as_bucket_view=bool(bucket_view))
    opt = optimizer(ft, model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, opt, rank)
    begin, end = buffers.flat.data_ptr(), buffers.flat.data_ptr() + buffers.flat.nbytes
    inside = all(begin <= param.data_ptr() < end for param in model.parameters())
    return SimpleNamespace(
        params=full(model), warnings=[str(w.message) for w in caught], inside=inside
    )


@scenario()
def one_all_reduce(rank, folder):
    model = net()
    buffers = ft.flatten_(model)
    opt = optimizer(ft, model)
    for step in range(STEPS):
        opt.zero_grad()
        loss_of(model, step, rank).backward()
        dist.all_reduce(buffers.flat_grad.div_(RANKS))
        opt.step()
    return full(model)


@scenario(*((lib, view, name) for lib in LIBRARIES for view in (0, 1) for name in ("AdamW", "SGD")))
def zero(lib, bucket_view, name, rank, folder):
    model = DistributedDataParallel(net())
    opt = ZeroRedundancyOptimizer(
        model.parameters(),
        optimizer_class=getattr(LIBRARIES[lib], name),
        parameters_as_bucket_view=bool(bucket_view),
        **hypers_of(name),
    )
    train(model, opt, rank)
    kept = len(opt.optim.state)
    opt.consolidate_state_dict(0)
    states = copy.deepcopy(opt.state_dict()) if rank == 0 else None
    return SimpleNamespace(params=full(model), kept=kept, states=states)


@scenario()
def zero_resumed(rank, folder):
    def begin():
        model = DistributedDataParallel(net())
        return model, ZeroRedundancyOptimizer(
            model.parameters(), optimizer_class=ft.AdamW, **hypers_of("AdamW")
        )

    model, opt = begin()
    train(model, opt, rank)
    opt.consolidate_state_dict(0)
    box = [opt.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(box)
    resumed, again = begin()
    again.param_groups[0]["lr"] = 1.0
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(box[0])
    train(resumed, again, rank, range(STEPS, 2 * STEPS))
    return full(resumed)


@scenario(*(("fusedstep", name) for name in CLASSES), *(("torch", name) for name in THEIRS))
def fsdp2(lib, name, rank, folder):
    model = sharded()
    opt = optimizer(LIBRARIES[lib], model, name)
    train(model, opt, rank)
    shapes = [tuple(param.to_local().shape) for param in model.parameters()]
    alike = all(
        isinstance(value, DTensor) and value.placements == param.placements
        for param, entry in opt.state.items()
        for value in entry.values()
        if isinstance(value, torch.Tensor) and value.dim()
    )
    return SimpleNamespace(params=full(model), shapes=shapes, states_alike=alike)


@scenario()
def fsdp2_of_a_flattened_model(rank, folder):
    """It takes the values into shards of its own, and the views are nobody's any more."""
    model = sharded(flatten=True)
    train(model, optimizer(ft, model), rank)
    return full(model)


@each_library
def fsdp2_clipped_and_scheduled(lib, rank, folder):
    model = sharded()
    opt = optimizer(LIBRARIES[lib], model)
    schedule = StepLR(opt, 2, gamma=0.5)
    for step in range(STEPS):
        train(model, opt, rank, [step], clip=0.5)
        schedule.step()
    return full(model)


@scenario(*((name,) for name in CLASSES))
def checkpointed(name, rank, folder):
    """A checkpoint on two ranks; a fresh model and optimizer load it and go on."""
    model = sharded()
    opt = optimizer(ft, model, name)
    train(model, opt, rank)
    weights, states = get_state_dict(model, opt)
    path = f"{folder}/{name}"
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)

    resumed = sharded(seed=1)
    before = full(resumed)
    again = optimizer(ft, resumed, name, lr=0.7)
    weights, states = get_state_dict(resumed, again)  # makes states by a step with lr 0
    untouched = all(torch.equal(a, b) for a, b in zip(before, full(resumed), strict=True))
    kept_lr = again.param_groups[0]["lr"]
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=states)
    train(resumed, again, rank, range(STEPS, 2 * STEPS))
    return SimpleNamespace(params=full(resumed), untouched=untouched, kept_lr=kept_lr)


@scenario(("fusedstep", "torch"), ("torch", "fusedstep"))
def checkpoint_changes_library(first, second, rank, folder):
    model = sharded()
    opt = optimizer(LIBRARIES[first], model)
    train(model, opt, rank)
    weights, states = get_state_dict(model, opt)
    path = f"{folder}/{first}-{second}"
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
    resumed = sharded(seed=1)
    again = optimizer(LIBRARIES[second], resumed)
    weights, states = get_state_dict(resumed, again)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=states)
    train(resumed, again, rank, range(STEPS, 2 * STEPS))
    return full(resumed)


@scenario()
def full_checkpoint_to_one_process(rank, folder):
    model = sharded()
    opt = optimizer(ft, model)
    train(model, opt, rank)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, opt, options=options)
    if rank:
        return None
    resumed = net(seed=1)
    again = optimizer(ft, resumed, lr=0.7)
    set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=states)
    train_alone(resumed, again, range(STEPS, 2 * STEPS))
    return full(resumed)


@scenario()
def ddp_checkpoint(rank, folder):
    model = DistributedDataParallel(net())
    opt = optimizer(ft, model)
    train(model, opt, rank)
    weights, states = get_state_dict(model, opt)
    resumed = DistributedDataParallel(net(seed=1))
    again = optimizer(ft, resumed, lr=0.7)
    set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=states)
    train(resumed, again, rank, range(STEPS, 2 * STEPS))
    return full(resumed)


@scenario()
def local_state_dict(rank, folder):
    """`state_dict` of an optimizer of DTensors, loaded by another on the same mesh."""
    model = sharded()
    opt = optimizer(ft, model)
    train(model, opt, rank)
    resumed = sharded(seed=1)
    resumed.load_state_dict(model.state_dict())
    again = optimizer(ft, resumed, lr=0.7)
    again.load_state_dict(opt.state_dict())
    train(resumed, again, rank, range(STEPS, 2 * STEPS))
    return full(resumed)


@scenario()
def gradient_placed_otherwise(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,))
    value = torch.arange(6.0).reshape(3, 2)
    results = []
    for of_param, of_grad in ((Shard(0), Replicate()), (Replicate(), Shard(0)), (Shard(0),) * 2):
        param = nn.Parameter(distribute_tensor(value.clone(), mesh, [of_param]))
        param.grad = distribute_tensor(torch.full_like(value, 2), mesh, [of_grad])
        ft.SGD([param], lr=0.5).step()
        results.append((param.full_tensor().detach(), param.placements == (of_param,)))
    return results


@scenario()
def sent_after_flatten(rank, folder):
    """One model in the memory of all processes, which step it in turn, each on its own batches."""
    model = SENT[0]
    opt = optimizer(ft, model, "SGD")
    for turn in range(RANKS):
        if turn == rank:
            train(model, opt, rank)
        dist.barrier()
    return SimpleNamespace(
        params=full(model), shared=[param.is_shared() for param in model.parameters()]
    )


# How parameters and states are stored, what a step does beside its rule. 8-bit states have whole
# blocks in each shard of `NARROW_SHAPES`.
NARROW_SHAPES = ((6, 128), (3, 256), (1, 128))
NARROW = {
    "q8": (torch.float32, {"state_dtype": "q8", "ema": 0.75}),
    "bfloat16": (torch.float32, {"state_dtype": "bfloat16", "ema": 0.5, "ema_dtype": "bfloat16"}),
    "split": (torch.bfloat16, {"rounding": "split", "state_dtype": "q8", "ema": 0.75}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "ema": lambda n: n / (n + 1)}),
}


class Held(nn.Module):
    """Parameters alone, each as `place` has it."""

    def __init__(self, dtype, place=lambda value: value, seed=0, shapes=NARROW_SHAPES):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=rng).to(dtype) for shape in shapes]
        self.held = nn.ParameterList([nn.Parameter(place(value)) for value in values])

    def train_on(self, opt, steps, place=lambda value: value):
        for step in steps:
            rng = torch.Generator().manual_seed(100 + step)
            for param in self.held:
                grad = place(torch.randn(param.shape, generator=rng).to(param.dtype))
                if param.grad is None:
                    param.grad = grad
                else:  # a view, which stays
                    param.grad.copy_(grad)
            opt.step()


def narrow_optimizer(model, how):
    return ft.AdamW(model.parameters(), lr=0.05, seed=9, **how)


def averages(model, opt):
    with opt.ema():
        return full(model)


@scenario(*((key,) for key in NARROW))
def narrow(key, rank, folder):
    """Some steps, a checkpoint, some more in a model that loads it."""
    dtype, how = NARROW[key]
    mesh = init_device_mesh("cpu", (RANKS,))

    def place(value):
        return distribute_tensor(value, mesh, [Shard(0)])

    model = Held(dtype, place)
    opt = narrow_optimizer(model, how)
    model.train_on(opt, range(STEPS), place)
    weights, states = get_state_dict(model, opt)
    placed = all(
        isinstance(value, DTensor)
        for entry in states["state"].values()
        for name, value in entry.items()
        if name != "step"
    )
    path = f"{folder}/narrow-{key}"
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=path)
    resumed = Held(dtype, place, seed=1)
    again = narrow_optimizer(resumed, how)
    weights, states = get_state_dict(resumed, again)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=path)
    set_state_dict(resumed, again, model_state_dict=weights, optim_state_dict=states)
    resumed.train_on(again, range(STEPS, 2 * STEPS), place)
    return SimpleNamespace(params=full(resumed), averages=averages(resumed, again), placed=placed)


# A checkpoint of one world and what loads it in another: how it is stored, how parameters are held.
# Three ranks cut 4 and 1 rows unevenly, and blocks of 8-bit states in the rows of 3.
RESHARDED_SHAPES = ((4, 128), (5, 3), (1, 128))
RESHARDED = {
    "momentum": ("SGD", torch.float32, {"momentum": 0.9, "dampening": 0.5}),
    "float32": ("AdamW", torch.float32, {"amsgrad": True}),
    "kahan": ("AdamW", torch.bfloat16, {"rounding": "kahan", "state_dtype": "bfloat16"}),
    **{key: ("AdamW", *NARROW[key]) for key in ("q8", "split")},
}
SAVED = [(key, "sharded") for key in RESHARDED]
SAVED += [("float32", "flat, sharded"), ("float32", "flat"), ("q8", "flat")]


class Run:
    """A model, its optimizer and its schedules, on all ranks."""

    def __init__(self, key, holder, seed=0):
        name, dtype, how = RESHARDED[key]
        self.model = Held(dtype, seed=seed, shapes=RESHARDED_SHAPES)
        self.place = lambda value: value
        if holder.startswith("flat"):
            ft.flatten_(self.model)
        if holder.endswith("sharded"):
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.model, mesh=mesh)
            self.place = lambda value: distribute_tensor(value, mesh, [Shard(0)])
        seeded = {"seed": 9} if name == "AdamW" else {}
        lr = 0.05 + 0.5 * seed
        self.opt = getattr(ft, name)(self.model.parameters(), lr=lr, **seeded, **how)
        self.ours = ft.LRScheduler(self.opt, schedules.Cosine(0.05, total=20), weight_decay=DECAY)
        self.other = ft.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        self.theirs = StepLR(self.other, 3)

    def train(self, steps):
        for step in steps:
            self.model.train_on(self.opt, [step], self.place)
            self.other.step()
            self.ours.step()
            self.theirs.step()

    def state_dict(self, **options):
        options = StateDictOptions(**options)
        weights, states = get_state_dict(self.model, self.opt, options=options)
        kept = {"ours": self.ours.state_dict(), "theirs": self.theirs.state_dict()}
        kept["other"] = self.other.state_dict()
        return {"model": weights, "optim": states, **kept}

    def load_state_dict(self, saved, **options):
        states = {"model_state_dict": saved["model"], "optim_state_dict": saved["optim"]}
        set_state_dict(self.model, self.opt, **states, options=StateDictOptions(**options))
        self.other.load_state_dict(saved["other"])
        self.ours.load_state_dict(saved["ours"])
        self.theirs.load_state_dict(saved["theirs"])

    def seen(self):
        """All that there is, whole: what a checkpoint has of it, and the parameters."""
        entries = self.state_dict()["optim"]["state"].values()
        states = [{name: whole(value).clone() for name, value in e.items()} for e in entries]
        return {"params": full(self.model), "states": states, "schedules": self.schedules()}

    def schedules(self):
        rates = [(group["lr"], group["weight_decay"]) for group in self.opt.param_groups]
        return rates, self.ours.last_epoch, self.theirs.last_epoch, self.theirs.get_last_lr()


def DECAY(t):
    return 0.1 / (t + 1)


def saved_run(key, holder, folder):
    run = Run(key, holder)
    run.train(range(STEPS))
    path = f"{folder}/{dist.get_world_size() if dist.is_initialized() else 1} {holder} {key}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", OF_DCP)
        dcp.save({"run": run}, checkpoint_id=path)
    return path


def resumed_run(key, holder, path):
    """As it was loaded, and after some more steps."""
    run = Run(key, holder, seed=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", OF_DCP)
        dcp.load({"run": run}, checkpoint_id=path)
    loaded = run.seen()
    run.train(range(STEPS, 2 * STEPS))
    return SimpleNamespace(loaded=loaded, later=run.seen())


@scenario(*SAVED)
def saves_for_others(key, holder, rank, folder):
    saved_run(key, holder, folder)


@scenario(*SAVED)
def resumes_what_one_saved(key, holder, rank, folder):
    return resumed_run(key, holder, f"{folder}/1 flat {key}")


def resumes_what_two_saved(key, saved, rank, folder):
    return resumed_run(key, "sharded", f"{folder}/2 {saved} {key}")


THREE = {("three", *case): functools.partial(resumes_what_two_saved, *case) for case in SAVED}


@scenario()
def narrow_zero(rank, folder):
    dtype, how = NARROW["split"]
    model = Held(dtype)
    opt = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=ft.AdamW, lr=0.05, seed=9, **how
    )
    model.train_on(opt, range(STEPS))
    opt.consolidate_state_dict(0)
    return SimpleNamespace(params=full(model), states=opt.state_dict() if rank == 0 else None)


@scenario()
def sharded_otherwise(rank, folder):
    mesh = init_device_mesh("cpu", (RANKS,))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(1)]))
    param.grad = torch.ones_like(param)
    errors = [
        error_of(ft.AdamW([param], lr=0.1, **how).step)
        for how in ({"state_dtype": "q8"}, {"state_dtype": "bfloat16"})
    ]
    kept = bool((param.full_tensor() == 1).all())
    nearest = ft.AdamW([param], lr=0.1, state_dtype="bfloat16", state_rounding="nearest")
    return errors, kept, error_of(nearest.step)


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@scenario()
def refusals(rank, folder):
    shards = sharded()
    replica = DistributedDataParallel(net())
    plain = sharded()
    mixed = next(plain.parameters())
    opt = ft.SGD([mixed], lr=0.1)
    before = whole(mixed).clone()
    train(plain, ft.SGD(plain[2].parameters(), lr=0.1), rank, [0])
    opt.state[mixed]["momentum_buffer"] = torch.zeros(5, 6)  # of the whole, not of a shard
    opt.param_groups[0]["momentum"] = 0.9
    return {
        "flatten_": error_of(lambda: ft.flatten_(shards)),
        "backward of DDP": error_of(lambda: ft.step_in_backward(replica, optimizer(ft, replica))),
        "backward of FSDP2": error_of(lambda: ft.step_in_backward(shards, optimizer(ft, shards))),
        "state of the whole": error_of(opt.step),
        "changed": not torch.equal(before, whole(mixed)),
    }


# -- the processes ---------------------------------------------------------------------------------


SENT = []  # the model that the processes got from the one that started them


def work(rank, folder, sent, ranks=RANKS):
    SENT.append(sent)
    torch.set_num_threads(1)  # the processes share few cores
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{ranks}",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for key, function in (SCENARIOS if ranks == RANKS else THREE).items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "You are using `torch.load`")  # as torch 2.4.0 does
            try:
                results[key] = function(rank, folder)
            except Exception:
                results[key] = traceback.format_exc()
    torch.save(results, f"{folder}/rank{rank} of {ranks}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By scenario, what each rank returned."""
    folder = tmp_path_factory.mktemp("two_processes")
    sent = net()
    ft.flatten_(sent)
    for key in RESHARDED:
        saved_run(key, "flat", folder)
    ranks = {}
    for n in (RANKS, 3):
        torch.multiprocessing.spawn(work, (str(folder), sent, n), nprocs=n)
        files = [folder / f"rank{rank} of {n}" for rank in range(n)]
        ranks[n] = [torch.load(file, weights_only=False) for file in files]

    def of(*key):
        found = [rank[key] for rank in ranks[3 if key[0] == "three" else RANKS]]
        for result in found:
            for text, what in OLD.items():
                if isinstance(result, str) and text in result:
                    pytest.skip(lacks(what))
            assert not isinstance(result, str), result
        return found

    of.sent, of.folder = sent, folder
    return of


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def assert_close(found, expected):
    # float32 rounds a few times per step, on either side, by 6e-8 of numbers around 1.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- tests -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("bucket_view", [0, 1])
def test_ddp_equals_one_process(results, bucket_view, name):
    for params in results("ddp", "fusedstep", bucket_view, name):
        assert_equal(params, alone(name))
    assert_close(results("ddp", "torch", bucket_view, name)[0], alone(name))


def test_ddp_of_a_flattened_model_keeps_the_views(results):
    for result in results("ddp_flattened", 0):
        assert_equal(result.params, alone())
        assert result.warnings == []
        assert result.inside


def test_ddp_that_takes_the_gradients_from_their_views_is_correct_and_noticed(results):
    for result in results("ddp_flattened", 1):
        assert_equal(result.params, alone())
        assert len(result.warnings) == 1
        assert "the gradient of parameter" in result.warnings[0]
        assert result.inside


def test_one_all_reduce_of_flat_gradients_equals_one_process(results):
    for params in results("one_all_reduce"):
        assert_equal(params, alone())


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
@pytest.mark.parametrize("bucket_view", [0, 1])
def test_zero_equals_one_process(results, bucket_view, name):
    found = results("zero", "fusedstep", bucket_view, name)
    for result in found:
        assert_equal(result.params, alone(name))
    if name == "AdamW":
        assert [result.kept > 0 for result in found] == [True, True]
        assert sum(result.kept for result in found) == 4
    theirs = results("zero", "torch", bucket_view, name)[0]
    assert_close(theirs.params, alone(name))
    assert_close(found[0].states["state"], theirs.states["state"])


def test_zero_state_dict_loads_in_one_process(results):
    model, expected = net(), net()
    opt, other = optimizer(ft, model, lr=0.7), optimizer(ft, expected)
    train_alone(expected, other)
    model.load_state_dict(expected.state_dict())
    opt.load_state_dict(results("zero", "fusedstep", 0, "AdamW")[0].states)
    assert_equal(opt.state_dict()["state"], other.state_dict()["state"])
    train_alone(model, opt, range(STEPS, 2 * STEPS))
    assert_equal(full(model), alone(steps=2 * STEPS))


def test_zero_resumes_from_its_state_dict(results):
    for params in results("zero_resumed"):
        assert_equal(params, alone(steps=2 * STEPS))


@pytest.mark.parametrize("name", CLASSES)
def test_fsdp2_equals_one_process(results, name):
    found = results("fsdp2", "fusedstep", name)
    for result in found:
        assert_equal(result.params, alone(name))
        assert result.states_alike
    assert found[0].shapes == [(3, 6), (3,), (1, 5), (1,)]
    assert found[1].shapes == [(2, 6), (2,), (0, 5), (0,)]


def test_fsdp2_of_a_flattened_model_equals_one_process(results):
    for params in results("fsdp2_of_a_flattened_model"):
        assert_equal(params, alone())


def test_a_flattened_model_is_shared_with_the_processes_that_it_is_sent_to(results):
    expected = net()
    for rank in range(RANKS):
        train(expected, optimizer(ft, expected, "SGD"), rank)
    for result in results("sent_after_flatten"):
        assert_equal(result.params, full(expected))
        assert all(result.shared)
    assert_equal(full(results.sent), full(expected))


@pytest.mark.parametrize("name", THEIRS)
def test_fsdp2_is_close_to_torch(results, name):
    assert_close(results("fsdp2", "torch", name)[0].params, alone(name))


def test_fsdp2_with_clipping_and_a_schedule_is_close_to_torch(results):
    mine, theirs = (results("fsdp2_clipped_and_scheduled", lib) for lib in LIBRARIES)
    assert_equal(*mine)
    assert_close(mine[0], theirs[0])


@pytest.mark.parametrize("name", CLASSES)
def test_distributed_checkpoint_resumes(results, name):
    for result in results("checkpointed", name):
        assert result.untouched
        assert result.kept_lr == 0.7
        assert_equal(result.params, alone(name, steps=2 * STEPS))


@pytest.mark.parametrize("libraries", [("fusedstep", "torch"), ("torch", "fusedstep")])
def test_distributed_checkpoint_goes_from_library_to_library(results, libraries):
    for params in results("checkpoint_changes_library", *libraries):
        assert_close(params, alone(steps=2 * STEPS))


def test_full_checkpoint_resumes_in_one_process(results):
    assert_equal(results("full_checkpoint_to_one_process")[0], alone(steps=2 * STEPS))


@pytest.mark.parametrize("how", ["ddp_checkpoint", "local_state_dict"])
def test_other_checkpoints_resume(results, how):
    for params in results(how):
        assert_equal(params, alone(steps=2 * STEPS))


def test_a_gradient_is_distributed_as_its_parameter(results):
    for rank in results("gradient_placed_otherwise"):
        for value, kept in rank:
            assert kept
            assert_equal(value, torch.arange(6.0).reshape(3, 2) - 1)


@pytest.mark.parametrize("key", NARROW)
def test_narrow_shards_equal_one_process(results, key):
    dtype, how = NARROW[key]
    model = Held(dtype)
    opt = narrow_optimizer(model, how)
    model.train_on(opt, range(2 * STEPS))
    for result in results("narrow", key):
        assert_equal(result.params, full(model))
        assert_equal(result.averages, averages(model, opt))
        assert result.placed


@functools.cache
def never_interrupted(key):
    run = Run(key, "plain")
    run.train(range(STEPS))
    saved = run.seen()
    run.train(range(STEPS, 2 * STEPS))
    return saved, run.seen()


def assert_resumed(found, key):
    """Bit by bit, but for 8-bit states from the first step on that has other blocks."""
    saved, later = never_interrupted(key)
    assert_equal(found.loaded, saved)
    if RESHARDED[key][2].get("state_dtype") != "q8":
        assert_equal(found.later, later)


@pytest.mark.parametrize(("key", "saved"), SAVED)
def test_a_checkpoint_of_two_processes_is_resumed_in_three_and_in_one(results, key, saved):
    for found in results("three", key, saved):
        assert_resumed(found, key)
    for holder in ("flat", "plain"):
        assert_resumed(resumed_run(key, holder, f"{results.folder}/2 {saved} {key}"), key)


@pytest.mark.parametrize(("key", "holder"), SAVED)
def test_a_checkpoint_of_one_process_is_resumed_in_two(results, key, holder):
    for found in results("resumes_what_one_saved", key, holder):
        assert_resumed(found, key)


@needs(DTensor, "fully_shard")
def test_a_checkpoint_has_the_names_of_the_model(results, tmp_path):
    for saved in ("sharded", "flat"):
        folder = f"{results.folder}/2 {saved} q8"
        names = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
        assert {f"run.model.held.{i}" for i in range(3)} <= set(names)
        states = {f"run.optim.state.held.2.{s}" for s in ("exp_avg", "exp_avg_sq", "ema", "step")}
        assert states == {name for name in names if name.startswith("run.optim.state.held.2.")}
    dcp_to_torch_save(folder, tmp_path / "one.pt")
    one = torch.load(tmp_path / "one.pt", weights_only=False)["run"]
    run = Run("q8", "flat", seed=1)
    run.load_state_dict({**one, "other": run.other.state_dict()})  # whose empty dict is left out
    assert_equal(run.seen(), never_interrupted("q8")[0])


def test_narrow_zero_equals_one_process(results):
    dtype, how = NARROW["split"]
    model = Held(dtype)
    opt = narrow_optimizer(model, how)
    model.train_on(opt, range(STEPS))
    found = results("narrow_zero")
    for result in found:
        assert_equal(result.params, full(model))
    assert_equal(found[0].states["state"], opt.state_dict()["state"])
    assert found[0].states["param_groups"][0]["averages"] == STEPS


def test_a_shard_that_is_no_run_of_places_is_refused(results):
    for errors, kept, nearest in results("sharded_otherwise"):
        assert nearest == "no error"
        assert kept
        for error in errors:
            assert error.startswith(
                "ValueError: params[0] must be sharded by its first dimension, because random bits"
            )


def test_what_cannot_be_distributed_is_refused(results):
    for errors, rows in zip(results("refusals"), (3, 2), strict=True):
        assert errors["flatten_"].startswith(
            "TypeError: module_or_params[0.weight] must be an ordinary parameter, got a DTensor"
        )
        assert errors["backward of DDP"].startswith(
            "ValueError: model must not be wrapped in DistributedDataParallel"
        )
        assert errors["backward of FSDP2"].startswith(
            "ValueError: model must have ordinary parameters, got DTensors"
        )
        assert errors["state of the whole"].startswith(
            f"ValueError: state[0]['momentum_buffer'] must be of shape ({rows}, 6), got (5, 6)"
        )
        assert not errors["changed"]
