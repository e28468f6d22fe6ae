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
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR

import fusedstep.torch as ft

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

    def __init__(self, dtype, place=lambda value: value, seed=0):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        values = [torch.randn(shape, generator=rng).to(dtype) for shape in NARROW_SHAPES]
        self.held = nn.ParameterList([nn.Parameter(place(value)) for value in values])

    def train_on(self, opt, steps, place=lambda value: value):
        for step in steps:
            rng = torch.Generator().manual_seed(100 + step)
            for param in self.held:
                param.grad = place(torch.randn(param.shape, generator=rng).to(param.dtype))
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


def work(rank, folder, sent):
    SENT.append(sent)
    torch.set_num_threads(1)  # two processes share few cores
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    results = {}
    for key, function in SCENARIOS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                results[key] = function(rank, folder)
            except Exception:
                results[key] = traceback.format_exc()
    torch.save(results, f"{folder}/rank{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By scenario, what each rank returned."""
    folder = tmp_path_factory.mktemp("two_processes")
    sent = net()
    ft.flatten_(sent)
    torch.multiprocessing.spawn(work, (str(folder), sent), nprocs=RANKS)
    ranks = [torch.load(folder / f"rank{rank}", weights_only=False) for rank in range(RANKS)]

    def of(*key):
        found = [rank[key] for rank in ranks]
        for result in found:
            assert not isinstance(result, str), result
        return found

    of.sent = sent
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
