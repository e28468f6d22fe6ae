"""CUDA parameters: the CPU's bits on a GPU, streams and graphs respected, the host never waiting.

Skipped as a whole where there is no GPU or the package was built without CUDA; bench/gpu.sh runs it
where there is one. What the CPU computes is test_reference.py's business.
"""

import contextlib
import copy
import functools
import io
import itertools
import math
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import fusedstep as fs
from cases import CASES, FORMATS, each_case, each_case_in_turn, each_pair, make

torch = pytest.importorskip("torch")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what torch says of an old driver is in the reason to skip
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device", allow_module_level=True)
if not fs.info()["cuda"]:
    pytest.skip(
        'fusedstep was built without CUDA (CMAKE_ARGS="-DFUSEDSTEP_CUDA=ON" pip install .)',
        allow_module_level=True,
    )

import fusedstep.torch as ft  # noqa: E402  # needs torch, which may not be there
from test_against_torch import torch_has, torch_optimizer  # noqa: E402  # likewise

DEVICE = "cuda"

# Below, at and above what a thread takes (4 elements) and what a block does (1024); the last is
# many blocks and no multiple of anything.
LENGTHS = [0, 1, 3, 4, 5, 1023, 1024, 1025, 100_003]
STARTS = np.cumsum([0, *LENGTHS])
STEPS = 3
DTYPES = {name: getattr(torch, name) for name in FORMATS}
SCALARS = {"step", "mu_product", "eta", "mu"}  # in a state beside the arrays
GUARD = 0x5A  # the byte around unaligned views

each_class = pytest.mark.parametrize("name", CASES)


def hypers_of(name):
    """Hyperparameters of an optimizer that are not its defaults."""
    return CASES[name][1]


# -- numbers, places, comparison -------------------------------------------------------------------


@functools.cache
def streams(param, grad, steps=STEPS):
    """The parameters and each step's gradients, end to end; no zeros, which make NaN of eps=0."""
    rng = np.random.default_rng(7)

    def draw(dtype):
        sign = rng.choice([-1.0, 1.0], STARTS[-1])
        return torch.from_numpy(sign * rng.uniform(0.1, 2, STARTS[-1])).to(DTYPES[dtype])

    return draw(param), [draw(grad) for _ in range(steps)]


def split(flat):
    return [flat[a:b] for a, b in itertools.pairwise(STARTS.tolist())]


def parameter(values, grad=None):
    """A parameter in the memory of `values`, whose gradients may be of another dtype."""
    param = torch.nn.Parameter(values.detach())
    if grad is not None and DTYPES[grad] != values.dtype:
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch has no gradients of another dtype than the parameter's")
        param.grad_dtype = DTYPES[grad]
    return param


def bits(tensor):
    """A tensor's bits, on the CPU; every NaN is the same one, as payloads are exempt."""
    tensor = tensor.detach().cpu().contiguous().reshape(-1)
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor).reshape(-1)
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    found = tensor.view(kind).clone()
    found[tensor.isnan()] = -1
    return found


def contents(opt, params):
    """All that a step may write: parameters, states, and the numbers beside them."""
    parts, numbers = {"params": [bits(p) for p in params]}, set()
    for param in params:
        for key, value in opt.state.get(param, {}).items():
            if key in SCALARS:
                numbers.add((key, float(value)))
            elif value is not None:
                assert value.device == param.device, f"{key} is on {value.device}"
                parts.setdefault(key, []).append(bits(value))
    return {key: torch.cat(found) for key, found in parts.items()}, sorted(numbers)


def assert_same(got, want, where=""):
    assert got[0].keys() == want[0].keys(), where
    for key, value in want[0].items():
        if not torch.equal(got[0][key], value):
            assert got[0][key].shape == value.shape, f"{key} {where}"
            wrong = (got[0][key] != value).nonzero().reshape(-1)
            raise AssertionError(
                f"{key} {where}: {len(wrong)} of {len(value)} differ from the CPU's, the first at"
                f" {wrong[:8].tolist()}"
            )
    assert got[1] == want[1], where


def train(opt, params, grads, **how):
    """A step for each of `grads`, which has a gradient, or None, for each parameter."""
    for step in grads:
        for param, grad in zip(params, step, strict=True):
            param.grad = None if grad is None else grad.to(param.device)
        opt.step(**how)


class Scaled:
    """Steps as torch.amp.GradScaler takes them: a step uses up the scale that was set for it."""

    def __init__(self, opt, scale):
        self.opt = opt
        self.scale = torch.full((), scale, device=DEVICE)
        self.found_inf = torch.zeros((), device=DEVICE)

    def step(self, **how):
        self.opt.grad_scale, self.opt.found_inf = self.scale, self.found_inf
        self.opt.step(**how)


def norm_bits(opt):
    norm = opt.grad_norm
    assert norm.ndim == 0
    return str(norm.dtype), bits(norm).tolist()


class Guarded:
    """Views at odd offsets of one allocation, with guard bytes before, between and behind them."""

    def __init__(self, parts):
        dtype = parts[0].dtype
        starts, at = [], 1
        for part in parts:
            starts.append(at)
            at += len(part) + 1
            at += 1 - at % 2
        self.memory = torch.full((at * dtype.itemsize,), GUARD, dtype=torch.uint8, device=DEVICE)
        elements = self.memory.view(dtype)
        inside = torch.zeros(at, dtype=torch.bool)
        self.views = []
        for start, part in zip(starts, parts, strict=True):
            self.views.append(elements[start : start + len(part)])
            self.views[-1].copy_(part)
            inside[start : start + len(part)] = True
        self.outside = ~inside.repeat_interleave(dtype.itemsize).to(DEVICE)

    def check(self):
        assert (self.memory[self.outside] == GUARD).all(), "bytes beside a view were written"


def run_cpu(name, hypers, param, grad, **how):
    start, grads = streams(param, grad)
    params = [parameter(values.clone(), grad) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers)
    train(opt, params, map(split, grads), **how)
    return opt, params


@functools.lru_cache(maxsize=2)  # the mixes of one case follow each other
def yardstick(name, hypers, param, grad):
    return contents(*run_cpu(name, dict(hypers), param, grad))


def run_separate(name, hypers, param, grad, **how):
    start, grads = streams(param, grad)
    params = [parameter(values.to(DEVICE), grad) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers)
    train(opt, params, map(split, grads), **how)
    return opt, params


def run_guarded(join, name, hypers, param, grad, **how):
    start, grads = streams(param, grad)
    memory = Guarded(join(start))
    params = [parameter(view, grad) for view in memory.views]
    opt = getattr(ft, name)(params, **hypers)
    for step in grads:
        given = Guarded(join(step))
        before = given.memory.clone()
        train(opt, params, [given.views], **how)
        assert torch.equal(given.memory, before), "gradients were written"
    memory.check()
    return opt, params


def run_flat(name, hypers, param, grad, **how):
    start, grads = streams(param, grad)
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    buffers = ft.flatten_(params)
    opt = getattr(ft, name)(params, **hypers)
    for step in grads:
        opt.zero_grad()
        for p, values in zip(params, split(step), strict=True):
            p.grad.copy_(values)
        opt.step(**how)
    used = sum(map(torch.count_nonzero, params))
    assert torch.count_nonzero(buffers.flat) == used, "gaps were written"
    return opt, params


LAYOUTS = {
    "separate tensors": run_separate,
    "unaligned views": functools.partial(run_guarded, split),
    "one unaligned tensor": functools.partial(run_guarded, lambda flat: [flat]),
    "flatten_": run_flat,
}


# -- the CPU's bits --------------------------------------------------------------------------------


@each_case_in_turn()
def test_steps_have_the_bits_of_the_cpu(name, hypers, param, grad):
    want = yardstick(name, tuple(hypers.items()), param, grad)
    for layout, run in LAYOUTS.items():
        if layout == "flatten_" and param != grad:  # it wants gradients of the parameter's dtype
            continue
        assert_same(contents(*run(name, hypers, param, grad)), want, f"in {layout}")


def specials(dtype):
    """Values at the edges of a dtype."""
    found = torch.finfo(dtype)
    least = found.smallest_normal * found.eps  # the smallest subnormal number
    values = [math.nan, math.inf, 0.0, least, 3 * least, found.smallest_normal, found.max, 1.0]
    return torch.tensor([sign * v for v in values for sign in (1, -1)], dtype=torch.float64)


@each_case_in_turn()
def test_special_values_have_the_bits_of_the_cpu(name, hypers, param, grad):
    p, g = specials(DTYPES[param]), specials(DTYPES[grad])
    start = p.repeat_interleave(len(g)).to(DTYPES[param])
    grads = [[g.roll(5 * k).repeat(len(p)).to(DTYPES[grad])] for k in range(STEPS)]
    assert start.isnan().any()
    assert torch.signbit(start[start == 0]).any()
    found = []
    for values in (start.clone(), start.to(DEVICE)):
        params = [parameter(values, grad)]
        opt = getattr(ft, name)(params, **hypers)
        train(opt, params, grads)
        found.append(contents(opt, params))
    assert_same(found[1], found[0])


@each_class
def test_groups_of_mixed_dtypes_have_the_bits_of_the_cpu(name):
    generator = torch.Generator().manual_seed(5)
    dtypes = list(itertools.islice(itertools.cycle(DTYPES.values()), 12))
    sizes = [(3, 5), (2050,), (), (0, 3), (4097,), (70,)] * 2

    def draw():
        return [
            torch.randn(size, generator=generator).add_(2).to(dtype)
            for size, dtype in zip(sizes, dtypes, strict=True)
        ]

    start, grads = draw(), [draw() for _ in range(4)]
    grads[0][1] = grads[2][4] = None  # one begins late, one sits a step out
    found = []
    for device in ("cpu", DEVICE):
        params = [parameter(values.clone().to(device)) for values in start]
        groups = [
            {"params": params[:3], **hypers_of(name)},
            {"params": params[3:6], "lr": 0.25},
            {"params": params[6:7], "maximize": True},
            {"params": params[7:9], "weight_decay": 0.1},
            {"params": params[9:10], "lr": 0.0},
            {"params": params[10:]},
        ]
        opt = getattr(ft, name)(groups)
        train(opt, params, grads[:2])
        opt.param_groups[1]["lr"] = 0.125
        train(opt, params, grads[2:])
        found.append(contents(opt, params))
    assert_same(found[1], found[0])


@each_class
def test_strided_and_complex_parameters_have_the_bits_of_the_cpu(name):
    generator = torch.Generator().manual_seed(6)
    start = [torch.randn(shape, generator=generator) for shape in [(6, 50), (2, 3, 4, 5), (9, 40)]]
    start.append(torch.complex(*(torch.randn(33, generator=generator) for _ in range(2))))
    found = []
    for device in ("cpu", DEVICE):
        memory = [values.clone().to(device) for values in start]
        places = [
            memory[0].t(),
            memory[1].contiguous(memory_format=torch.channels_last),
            memory[2][:, ::2],
            memory[3],
        ]
        params = [parameter(place) for place in places]
        opt = getattr(ft, name)(params, **hypers_of(name))
        train(opt, params, [[(p.detach() + k).cpu() for p in params] for k in range(1, STEPS)])
        found.append(contents(opt, params))
        assert torch.equal(memory[2][:, 1::2].cpu(), start[2][:, 1::2])  # between the elements
    assert_same(found[1], found[0])


# -- the norm: clipping and skipping ---------------------------------------------------------------


@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@each_pair()
@each_class
def test_clipped_steps_have_the_bits_of_the_cpu(name, param, grad, max_norm):
    hypers, how = hypers_of(name), {"max_norm": max_norm}
    opt, params = run_cpu(name, hypers, param, grad, **how)
    want, norm = contents(opt, params), norm_bits(opt)
    last = streams(param, grad)[1][-1].double()
    assert float(opt.grad_norm) == pytest.approx(float(last.norm()), rel=1e-6)
    for layout, run in LAYOUTS.items():
        if layout.startswith("one ") or (layout == "flatten_" and param != grad):
            continue  # a single tensor's norm is another sum
        opt, params = run(name, hypers, param, grad, **how)
        assert norm_bits(opt) == norm, f"in {layout}"
        assert opt.grad_norm.device.type == DEVICE
        assert_same(contents(opt, params), want, f"in {layout}")


def test_norm_of_one_tensor_has_the_bits_of_the_cpu():
    for n in (1, 15, 16, 17, 1023, 1024, 1025, 16384, 16385, 2**20 + 3, 2**25 + 5):
        values = torch.randn(n, generator=torch.Generator().manual_seed(n))
        found = []
        for device in ("cpu", DEVICE):
            param = parameter(values.clone().to(device))
            opt = ft.SGD([param], lr=0.5)
            train(opt, [param], [[values]], max_norm=0.25)
            found.append((norm_bits(opt), bits(param).tolist()))
        assert found[0] == found[1], f"n = {n}"


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [16385, 9] * 20, [600, 5] * 3000, [3] * 70_000], ids=len
)
def test_norms_of_tensors_have_the_bits_of_the_cpu(lengths):
    """Small tensors side by side in a tile, large ones in trees of their own; one is not finite."""
    draw = torch.Generator().manual_seed(8)
    flat = torch.randn(sum(lengths), generator=draw)
    flat[-1] = math.inf
    found = []
    for device in ("cpu", DEVICE):
        params = [parameter(torch.zeros(n, device=device)) for n in lengths]
        for param, values in zip(params, flat.to(device).split(lengths), strict=True):
            param.grad = values
        opt = ft.SGD(params, lr=0.5)
        for finite in (True, False):
            if finite:
                params[-1].grad = None
            else:
                params[-1].grad = flat[-lengths[-1] :].to(device)
            opt.step(norms=True)
            found.append((norm_bits(opt), list(opt.grad_norms.values()), opt.nonfinite))
    assert found[2:] == found[:2]
    assert not found[0][2]
    assert len(found[1][2]) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_clipping_by_a_norm_that_is_not_finite_does_as_the_cpu(name, bad):
    start, grads = streams("float32", "float32")
    found = []
    for device in ("cpu", DEVICE):
        params = [parameter(values.clone().to(device)) for values in split(start)]
        opt = getattr(ft, name)(params, **hypers_of(name))
        spoiled = [g.clone() for g in split(grads[0])]
        spoiled[5][1000] = bad
        train(opt, params, [spoiled], max_norm=1.0)
        found.append((contents(opt, params), norm_bits(opt)))
    assert found[1][1] == found[0][1]
    assert_same(found[1][0], found[0][0])


@pytest.mark.parametrize("max_norm", [None, 0.5])
@each_case()
def test_skipped_steps_leave_all_as_it_was(name, hypers, max_norm):
    start, grads = streams("float32", "float32")
    how = {"skip_nonfinite": True} | ({} if max_norm is None else {"max_norm": max_norm})
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers)
    twin = [parameter(values.clone()) for values in split(start)]
    other = getattr(ft, name)(twin, **hypers)
    for step, (bad, place) in enumerate([(math.nan, -1), (math.inf, 1), (-math.inf, 6)]):
        before = contents(opt, params)
        spoiled = [g.clone() for g in split(grads[step])]
        spoiled[place][-1] = bad
        train(opt, params, [spoiled], **how)
        assert not math.isfinite(float(opt.grad_norm))
        after = contents(opt, params)
        if step:  # the states may have begun, though not the count
            assert_same(after, before, f"after skipped step {step}")
        else:
            assert torch.equal(after[0]["params"], before[0]["params"])
        # SGD's first step that is taken is its first, whatever was skipped before.
        train(opt, params, [split(grads[step])], **how)
        train(other, twin, [split(grads[step])], **({} if max_norm is None else how))
    assert_same(contents(opt, params), contents(other, twin))


# -- torch.amp -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
@each_class
def test_grad_scaler_skips_and_unscales_as_without_it(name, how):
    start, grads = streams("float32", "float32")
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers_of(name), fused=True)
    twin = [parameter(values.to(DEVICE)) for values in split(start)]
    other = getattr(ft, name)(twin, **hypers_of(name))
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1000)
    for step in range(STEPS):
        for spoil in (True, False):
            factors = [g.to(DEVICE) for g in split(grads[step])]
            if spoil:
                factors[4] = factors[4].clone().fill_(math.inf)
            opt.zero_grad()
            loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
            scaler.scale(loss).backward()  # the gradients are the factors, times the scale
            before, scale = contents(opt, params), scaler.get_scale()
            scaler.step(opt, **how)
            scaler.update()
            if spoil:
                after = contents(opt, params)
                assert torch.equal(after[0]["params"], before[0]["params"])
                assert step == 0 or after[1] == before[1]
                assert scaler.get_scale() == scale / 2
        train(other, twin, [split(grads[step])], **how)
    assert_same(contents(opt, params), contents(other, twin))  # scales are powers of two: exact


def test_grad_scaler_that_unscaled_before_is_respected():
    start, grads = streams("float32", "float32")
    found = []
    for scaled in (True, False):
        params = [parameter(values.to(DEVICE)) for values in split(start)]
        opt = ft.AdamW(params, lr=0.1)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8, enabled=scaled)
        for step in grads:
            opt.zero_grad()
            given = [g.to(DEVICE) for g in split(step)]
            scaler.scale(sum((p * g).sum() for p, g in zip(params, given, strict=True))).backward()
            scaler.unscale_(opt)
            scaler.step(opt)
            scaler.update()
        found.append(contents(opt, params))
    assert_same(found[0], found[1])


# -- streams, threads, and the host, which must not wait -------------------------------------------


@contextlib.contextmanager
def no_wait(seconds=0.15):
    """Keeps the current stream busy, and fails if that is over when the body is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch remarks that it does not see every wait
        torch.cuda.set_sync_debug_mode("error")
    try:
        over = torch.cuda.Event()
        torch.cuda._sleep(int(2e9 * seconds))  # cycles of a clock of at most 2 GHz
        over.record()
        yield
        assert not over.query(), "the host waited for the GPU"
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("how", ["plain", "clip", "skip", "amp", "capturable"])
@each_class
def test_step_does_not_wait_for_the_gpu(name, how):
    start, grads = streams("float32", "float32")
    step = {"clip": {"max_norm": 0.5}, "skip": {"skip_nonfinite": True}}.get(how, {})
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    more = {"capturable": True} if how == "capturable" else {}
    opt = getattr(ft, name)(params, **hypers_of(name), **more)
    stepping = Scaled(opt, 2.0) if how == "amp" else opt
    train(stepping, params, [split(grads[0])] * 2, **step)  # states, and code to load
    torch.cuda.synchronize()
    with no_wait():
        for _ in range(3):
            stepping.step(**step)
            if step:
                assert opt.grad_norm.is_cuda  # not read here: that would wait
    twin = [parameter(values.to(DEVICE)) for values in split(start)]
    other = getattr(ft, name)(twin, **hypers_of(name))
    given = [g * (0.5 if how == "amp" else 1) for g in split(grads[0])]
    train(other, twin, [given] * 5, **step)
    assert_same(contents(opt, params), contents(other, twin))


@each_class
def test_steps_queued_behind_a_busy_stream_each_use_their_own_numbers(name):
    # What the host hands to a step must be there still when the GPU comes to it.
    rng = torch.Generator().manual_seed(8)
    sizes = [9, 4000, 17, 1, 2048, 333, 5, 77]
    start = [torch.randn(n, generator=rng) for n in sizes]
    grads = [[torch.randn(n, generator=rng) for n in sizes] for _ in range(24)]
    found = []
    for device in ("cpu", DEVICE):
        params = [parameter(values.clone().to(device)) for values in start]
        groups = [{"params": params[k : k + 1]} for k in range(6)]
        opt = getattr(ft, name)([*groups, {"params": params[6:]}])
        given = [[g.to(device) for g in step] for step in grads]
        if device != "cpu":
            torch.cuda.synchronize()
            torch.cuda._sleep(int(1e8))
        for t, step in enumerate(given):
            for k, group in enumerate(opt.param_groups):
                group["lr"] = 0.5 / (1 + t + k)
            train(opt, params, [step], max_norm=0.5 + t)
        found.append(contents(opt, params))
    assert_same(found[1], found[0])


@pytest.mark.parametrize("how", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
@each_class
def test_step_runs_on_the_current_stream(name, how):
    want = contents(*run_cpu(name, hypers_of(name), "float32", "float32", **how))
    start, grads = streams("float32", "float32")
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers_of(name))
    given = [[g.to(DEVICE) for g in split(step)] for step in grads]
    for param in params:
        param.grad = torch.full_like(param, math.nan)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in given:
            torch.cuda._sleep(int(2e7))  # a step on another stream would not find the gradients
            for param, grad in zip(params, step, strict=True):
                param.grad.copy_(grad)
            opt.step(**how)
    torch.cuda.current_stream().wait_stream(side)
    assert_same(contents(opt, params), want)


def test_optimizers_step_in_two_threads_on_two_streams():
    names = ("AdamW", "NAdam")
    want = [contents(*run_cpu(n, hypers_of(n), "float32", "float32", max_norm=0.5)) for n in names]
    barrier = threading.Barrier(len(names))

    def run(name):
        stream = torch.cuda.Stream()
        found = []
        with torch.cuda.stream(stream):
            barrier.wait(timeout=60)
            for _ in range(10):
                found.append(run_separate(name, hypers_of(name), "float32", "float32",
                                          max_norm=0.5))  # fmt: skip
        stream.synchronize()
        return [contents(*one) for one in found]

    with ThreadPoolExecutor(len(names)) as pool:
        for found, expected in zip(pool.map(run, names), want, strict=True):
            for one in found:
                assert_same(one, expected)


# -- CUDA graphs -----------------------------------------------------------------------------------

RATES = [0.5, 0.5, 0.5, 0.25, 0.5, 0.125, 0.0625]  # exact in float32, as a tensor has them
WARM = 3  # of them are taken before the capture; RAdam's rule changes after the fifth


def graph_case(name):
    hypers = {key: value for key, value in hypers_of(name).items() if key != "lr"}
    start, grads = streams("float32", "float32", len(RATES))
    return hypers, start, grads


def run_rates(name, device, how, as_tensor):
    """All steps, one after the other, with lr as a number or a capturable's device tensor."""
    hypers, start, grads = graph_case(name)
    params = [parameter(values.clone().to(device)) for values in split(start)]
    lr = torch.tensor(RATES[0], device=device) if as_tensor else RATES[0]
    more = {"capturable": True} if as_tensor else {}
    opt = getattr(ft, name)(params, lr=lr, **hypers, **more)
    for rate, step in zip(RATES, grads, strict=True):
        if as_tensor:
            lr.fill_(rate)
        else:
            opt.param_groups[0]["lr"] = rate
        train(opt, params, [split(step)], **how)
    return contents(opt, params)


def capture(opt, warm, **how):
    """Takes `warm`'s steps on a side stream, then captures one that is not taken."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for prepare in warm:
            prepare()
            opt.step(**how)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step(**how)
    return graph


def prepared(params, lr, rate, step):
    """Puts a step's gradients and rate where the graph reads them."""

    def prepare():
        lr.fill_(rate)
        for param, grad in zip(params, step, strict=True):
            param.grad.copy_(grad)

    return prepare


def run_graph(name, how):
    hypers, start, grads = graph_case(name)
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    for param in params:
        param.grad = torch.zeros_like(param)
    lr = torch.tensor(RATES[0], device=DEVICE)
    opt = getattr(ft, name)(params, lr=lr, capturable=True, **hypers)
    given = [[g.to(DEVICE) for g in split(step)] for step in grads]
    steps = [prepared(params, lr, *one) for one in zip(RATES, given, strict=True)]
    graph = capture(opt, steps[:WARM], **how)
    for prepare in steps[WARM:]:
        prepare()
        graph.replay()
    return contents(opt, params)


each_how = pytest.mark.parametrize(
    "how",
    [{}, {"max_norm": 0.5}, {"skip_nonfinite": True}],
    ids=["plain", "clipped", "skipping"],
)


@each_how
@each_class
def test_graph_replays_are_the_eager_steps(name, how):
    assert_same(run_graph(name, how), run_rates(name, DEVICE, how, as_tensor=True))


@each_how
@each_class
def test_capturable_steps_have_the_bits_of_the_cpu(name, how):
    want = run_rates(name, "cpu", how, as_tensor=False)
    assert_same(run_rates(name, DEVICE, how, as_tensor=False), want, "not capturable")
    assert_same(run_rates(name, DEVICE, how, as_tensor=True), want, "capturable")


@each_class
def test_replay_skips_where_found_inf_says_so(name):
    _, start, grads = graph_case(name)
    params = [parameter(values.to(DEVICE)) for values in split(start)]
    for param in params:
        param.grad = torch.zeros_like(param)
    lr = torch.tensor(0.25, device=DEVICE)
    opt = getattr(ft, name)(params, lr=lr, capturable=True)
    scaled = Scaled(opt, 1.0)
    given = [[g.to(DEVICE) for g in split(step)] for step in grads]
    steps = [prepared(params, lr, 0.25, step) for step in given]
    graph = capture(scaled, steps[:1])
    for k, prepare in enumerate(steps[1:], 1):
        prepare()
        scaled.found_inf.fill_(k % 2)
        scaled.scale.fill_(4.0)
        before = contents(opt, params)
        graph.replay()
        if k % 2:
            assert_same(contents(opt, params), before, f"after replay {k}")
    twin = [parameter(values.to(DEVICE)) for values in split(start)]
    other = getattr(ft, name)(twin, lr=0.25)
    taken = [given[0], *([g / 4 for g in step] for step in given[2::2])]
    train(other, twin, taken)
    assert_same(contents(opt, params), contents(other, twin))


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [False, True], ids=["dict", "file"])
@pytest.mark.parametrize(("here", "there"), [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
@each_class
def test_checkpoints_move_between_cpu_and_gpu(name, here, there, file):
    start, grads = streams("float32", "float32")
    params = [parameter(values.clone().to(here)) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers_of(name))
    train(opt, params, map(split, grads))
    saved = copy.deepcopy(opt.state_dict())
    if file:
        whole = io.BytesIO()
        torch.save(saved, whole)
        whole.seek(0)
        saved = torch.load(whole, map_location=there, weights_only=True)
    # Resumed in both places: the count of a run that goes on may have digits that no file has.
    found = []
    for place in (here, there):
        moved = [parameter(param.detach().clone().to(place)) for param in params]
        other = getattr(ft, name)(moved)
        other.load_state_dict(saved)
        assert_same(contents(other, moved), contents(opt, params), f"as loaded on {place}")
        train(other, moved, map(split, grads))
        found.append(contents(other, moved))
    assert_same(found[1], found[0])


@pytest.mark.usefixtures("_double_scalars")
@pytest.mark.parametrize("to_ours", [True, False], ids=["torch-to-ours", "ours-to-torch"])
@each_case(lambda name, hypers: torch_has(name, hypers) and hypers.get("eps") != 0)
def test_checkpoints_go_both_ways_with_torch(name, hypers, to_ours):
    generator = torch.Generator().manual_seed(9)
    sizes = [(3, 5), (2050,), (70,)]
    start = [torch.rand(s, generator=generator, dtype=torch.float64) + 0.5 for s in sizes]
    grads = [
        [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes] for _ in range(6)
    ]

    def of(ours, params):
        return (getattr(ft, name)(params, **hypers) if ours
                else torch_optimizer(name, params, hypers))  # fmt: skip

    params = [parameter(values.to(DEVICE)) for values in start]
    opt = of(not to_ours, params)
    train(opt, params, grads[:3])
    twin = [parameter(param.detach().clone()) for param in params]
    other = of(to_ours, twin)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(opt, params, grads[3:])
    train(other, twin, grads[3:])
    for p, want in zip(twin, params, strict=True):
        # Both sides round some times in float64; large rates magnify that.
        torch.testing.assert_close(p.detach(), want.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("to_ours", [True, False], ids=["torch-to-ours", "ours-to-torch"])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_checkpoints_go_both_ways_with_torch_s_fused(name, to_ours):
    hypers = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    start, grads = streams("float32", "float32")

    def of(ours, params):
        module, more = (ft, {}) if ours else (torch.optim, {"fused": True})
        return getattr(module, name)(params, **hypers, **more)

    params = [parameter(values.to(DEVICE)) for values in split(start)]
    opt = of(not to_ours, params)
    train(opt, params, [split(grads[0])] * 2)
    twin = [parameter(param.detach().clone()) for param in params]
    other = of(to_ours, twin)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, held in ((opt, params), (other, twin)):
        train(one, held, map(split, grads))
    for p, want in zip(twin, params, strict=True):
        # float32: both sides round a few times in each step.
        torch.testing.assert_close(p.detach(), want.detach(), rtol=2e-5, atol=1e-5)


def test_clipping_is_torch_s_clip_grad_norm():
    start, grads = streams("float32", "float32")
    mine = [parameter(values.to(DEVICE)) for values in split(start)]
    theirs = [parameter(values.to(DEVICE)) for values in split(start)]
    opt = ft.AdamW(mine, lr=0.1)
    oracle = torch.optim.AdamW(theirs, lr=0.1, fused=True)
    for step in grads:
        train(opt, mine, [split(step)], max_norm=0.5)
        for param, grad in zip(theirs, split(step), strict=True):
            param.grad = grad.to(DEVICE, copy=True)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        oracle.step()
        torch.testing.assert_close(opt.grad_norm.float(), norm, rtol=1e-5, atol=0)
    for p, want in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p.detach(), want.detach(), rtol=2e-5, atol=1e-5)


# -- devices and errors ----------------------------------------------------------------------------


@each_class
def test_parameters_on_two_kinds_of_device_are_refused(name):
    params = [parameter(torch.ones(5)), parameter(torch.ones(5, device=DEVICE))]
    for param in params:
        param.grad = torch.ones_like(param)

    def step():
        getattr(ft, name)(params).step()

    with pytest.raises(ValueError, match=r"cpu|CPU|device"):
        step()
    assert all((param == 1).all() for param in params)


def test_added_parameter_on_another_device_is_refused():
    params = [parameter(torch.ones(5, device=DEVICE)), parameter(torch.ones(5))]
    opt = ft.AdamW(params[:1], lr=0.5)
    train(opt, params[:1], [[torch.ones(5)]])
    params[1].grad = torch.ones(5)
    before = contents(opt, params[:1])

    def step():
        opt.add_param_group({"params": params[1:]})
        opt.step()

    with pytest.raises(ValueError, match=r"cpu|CPU|device"):
        step()
    assert_same(contents(opt, params[:1]), before)
    assert (params[1] == 1).all()


@pytest.mark.parametrize("how", [{}, {"max_norm": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize("edit", [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"eps": math.nan}])
def test_a_step_that_raises_has_changed_nothing(edit, how):
    params = [parameter(torch.ones(5, device=DEVICE)), parameter(torch.ones(3000, device=DEVICE))]
    opt = ft.Adam([{"params": params[:1]}, {"params": params[1:]}], lr=0.5)
    given = [torch.ones(5), torch.ones(3000)]
    train(opt, params, [given])
    before = contents(opt, params)
    opt.param_groups[1].update(edit)
    with pytest.raises((TypeError, ValueError), match=next(iter(edit))):
        opt.step(**how)
    assert_same(contents(opt, params), before)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@each_class
def test_parameters_on_a_device_that_is_not_the_current_one(name):
    want = contents(*run_cpu(name, hypers_of(name), "float32", "float32", max_norm=0.5))
    start, grads = streams("float32", "float32")
    params = [parameter(values.to("cuda:1")) for values in split(start)]
    opt = getattr(ft, name)(params, **hypers_of(name))
    train(opt, params, map(split, grads), max_norm=0.5)
    assert torch.cuda.current_device() == 0
    assert opt.grad_norm.device == torch.device("cuda:1")
    assert_same(contents(opt, params), want)


def test_flattened_parameters_and_gradients_are_views_on_the_gpu():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(33, 7), torch.nn.Linear(7, 3)).to(DEVICE)
    before = [param.detach().clone() for param in model.parameters()]
    buffers = ft.flatten_(model)
    assert buffers.flat.device.type == buffers.flat_grad.device.type == DEVICE
    opt = ft.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 33, device=DEVICE)).sum().backward()
    for param, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(param, old)
        for tensor, buffer in ((param, buffers.flat), (param.grad, buffers.flat_grad)):
            first = (tensor.data_ptr() - buffer.data_ptr()) // 4
            assert 0 <= first <= buffer.numel() - tensor.numel()
    assert buffers.flat_grad.abs().sum() > 0
    opt.step(max_norm=1.0)
    opt.zero_grad()
    assert buffers.flat_grad.abs().sum() == 0
    assert all(param.grad is not None for param in model.parameters())
    assert not torch.equal(next(model.parameters()), before[0])


def test_info_names_the_devices():
    cuda = fs.info()["cuda"]
    assert cuda["architectures"]
    assert len(cuda["devices"]) == torch.cuda.device_count()
    assert cuda["devices"][0]["name"] == torch.cuda.get_device_name(0)
    assert cuda["devices"][0]["capability"]


# -- neutral classes -------------------------------------------------------------------------------


def neutral_streams(dtype):
    """NumPy arrays: the parameters, and the gradients of each step."""
    start, grads = streams(dtype, dtype)
    return [p.numpy() for p in split(start)], [[g.numpy() for g in split(one)] for one in grads]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@each_class
def test_neutral_classes_take_cupy_arrays(name, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # CuPy looks for libraries that are not needed here
        try:
            import cupy
        except ImportError as error:
            pytest.skip(f"CuPy cannot be imported: {error}")
    start, grads = neutral_streams(dtype)
    arrays = [p.copy() for p in start]
    placed = [cupy.asarray(p) for p in start]
    want, opt = make(name, arrays, hypers_of(name)), make(name, placed, hypers_of(name))
    for step in grads:
        report = want.step(step)
        assert opt.step([cupy.asarray(g) for g in step]) == report
    for mine, theirs in zip(placed, arrays, strict=True):
        assert torch.equal(bits(torch.from_numpy(cupy.asnumpy(mine))),
                           bits(torch.from_numpy(theirs)))  # fmt: skip


@each_pair()
@each_class
def test_neutral_classes_take_cuda_tensors(name, param, grad):
    start, grads = streams(param, grad)
    arrays = [p.clone() for p in split(start)]
    placed = [p.to(DEVICE) for p in split(start)]
    want, opt = make(name, arrays, hypers_of(name)), make(name, placed, hypers_of(name))
    for step in grads:
        report = want.step(split(step))
        assert opt.step([g.to(DEVICE) for g in split(step)]) == report
    assert torch.equal(torch.cat(list(map(bits, placed))), torch.cat(list(map(bits, arrays))))


class Exposed:
    """Nothing but the interface."""

    def __init__(self, tensor):
        self.tensor = tensor
        self.__cuda_array_interface__ = tensor.__cuda_array_interface__


def test_neutral_classes_take_the_cuda_array_interface():
    start, grads = neutral_streams("float32")
    arrays = [p.copy() for p in start]
    placed = [torch.from_numpy(p.copy()).to(DEVICE) for p in start]
    want, opt = fs.AdamW(arrays, lr=0.5), fs.AdamW([Exposed(p) for p in placed], lr=0.5)
    for step in grads:
        want.step(step)
        opt.step([Exposed(torch.from_numpy(g.copy()).to(DEVICE)) for g in step])
        torch.cuda.synchronize()  # the interface names no stream: ours must be done with them
    for mine, theirs in zip(placed, arrays, strict=True):
        assert torch.equal(bits(mine), bits(torch.from_numpy(theirs)))


@pytest.mark.parametrize("place", ["params", "grads"])
def test_neutral_classes_refuse_mixed_devices(place):
    params = [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)]
    grads = [torch.ones(5, device=DEVICE), torch.ones(5, device=DEVICE)]
    found = {"params": params, "grads": grads}[place]
    found[1] = found[1].cpu()

    def step():
        fs.AdamW(params, lr=0.5).step(grads)

    with pytest.raises(ValueError, match=r"cpu|CPU|device|GPU|CUDA"):
        step()
    assert all((param == 1).all() for param in params)


# -- size ------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.mem_get_info()[0] < 20 << 30, reason="needs 20 GiB of GPU memory")
@pytest.mark.parametrize("how", [{}, {"max_norm": 1e9}], ids=["plain", "clipped"])
def test_step_indexes_beyond_32_bits(how):
    n = (1 << 31) + 12348  # a multiple of 4, to be looked at as int64
    memory = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    param = parameter(memory)
    param.grad = torch.zeros_like(memory)
    places = [0, 1, (1 << 31) - 1, 1 << 31, (1 << 31) + 1, n - 2, n - 1]
    marks = torch.tensor(places, device=DEVICE)
    memory[marks] = torch.arange(1.0, 8, device=DEVICE).bfloat16()
    param.grad[marks] = 2
    opt = ft.SGD([param], lr=0.5)
    opt.step(**how)
    assert memory[marks].tolist() == [0, 1, 2, 3, 4, 5, 6]
    # Zeros stay zeros: nothing but the marks was written; memory[0] has become zero.
    touched = {at // 4 for at in places[1:]}
    assert torch.count_nonzero(memory.view(torch.int64)) == len(touched)
    if how:
        assert float(opt.grad_norm) == pytest.approx(math.sqrt(4 * len(places)), rel=1e-6)
    del opt, param, memory
    torch.cuda.empty_cache()  # other tests, and other processes, need some too


# -- what a step does beside the update ------------------------------------------------------------

KEPT = [
    ("float32", {"state_dtype": "bfloat16"}),
    ("float32", {"state_dtype": "q8", "ema_dtype": "bfloat16"}),
    ("float32", {"state_dtype": "q8", "state_rounding": "nearest"}),
    ("float64", {"state_dtype": "float32"}),
    ("bfloat16", {"rounding": "split", "state_dtype": "q8"}),
    ("bfloat16", {"rounding": "kahan", "state_dtype": "bfloat16"}),
    ("bfloat16", {"rounding": "stochastic", "seed": 3}),
]


@pytest.mark.parametrize(("dtype", "how"), KEPT, ids=lambda value: "-".join(map(str, value)))
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Lion"])
@pytest.mark.parametrize("asked", [{}, {"ema": 0.9, "zero_grad": True, "clip_value": 0.3}])
def test_streams_of_other_formats_have_the_cpu_bits(name, dtype, how, asked):
    values, grads = streams(dtype, dtype)

    def run(device):
        params = [torch.nn.Parameter(p.clone().to(device)) for p in split(values)]
        copies = [torch.zeros_like(p, dtype=torch.float16) for p in params]
        shadow = {"shadow": copies} if asked else {}
        opt = getattr(ft, name)(params, lr=0.1, **how)
        train(opt, params, [[g.clone() for g in split(step)] for step in grads], **asked, **shadow)
        found = [*params, *copies, *(p.grad for p in params)]
        found += [s for p in params for s in opt.state[p].values() if s.dim()]
        return [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in found]

    for got, want in zip(run(DEVICE), run("cpu"), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(("dtype", "how"), KEPT, ids=lambda value: "-".join(map(str, value)))
@pytest.mark.parametrize(("here", "there"), [("cpu", DEVICE), (DEVICE, "cpu"), (DEVICE, DEVICE)])
def test_files_move_between_cpu_and_gpu(dtype, how, here, there, tmp_path):
    start, grads = streams(dtype, dtype)
    params = [parameter(values.clone().to(here)) for values in split(start)]
    opt = ft.AdamW(params, lr=0.1, **how)
    train(opt, params, map(split, grads), ema=0.9)
    file = tmp_path / "run.safetensors"
    ft.save(file, params=params, optimizer=opt, epoch=3)
    moved = [parameter(torch.zeros_like(param, device=there)) for param in params]
    other = ft.AdamW(moved, lr=0.5, **how)
    rest = ft.load(file, params=moved, optimizer=other)
    assert rest["epoch"] == 3
    assert_same(contents(other, moved), contents(opt, params))
    for one, its in ((opt, params), (other, moved)):
        train(one, its, map(split, grads), ema=0.9)
    assert_same(contents(other, moved), contents(opt, params))
