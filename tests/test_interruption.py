"""A step or a load that is interrupted, wherever, has changed all or nothing."""

import contextlib
import copy
import gc
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import fusedstep as fs
from optional import optional

torch = optional("torch")
ft = optional("fusedstep.torch")
HAS_TORCH = "torch" in sys.modules

BIG = 1 << 22  # elements: a sweep of some milliseconds, for a signal to come in
needs_timer = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="this system has no interval timers"
)


class Interrupted(BaseException):
    """What a test raises in the middle of a call, which nothing expects."""


# -- optimizers of both layers, seen from outside -------------------------------------------------


class Neutral:
    """A NumPy optimizer whose step makes states, follows schedules and counts."""

    def __init__(self, n=64, name="SGD", **hypers):
        self.params = {"w": np.linspace(0, 1, n, dtype=np.float32), "b": np.ones(3, np.float32)}
        given = {"lr": lambda t: 0.5 / (t + 1), "momentum": lambda t: 0.9 if t else 0.0}
        self.opt = getattr(fs, name)(self.params, **(hypers or given))

    def step(self, t=0, **asked):
        grads = {k: np.full_like(p, t + 1) for k, p in self.params.items()}
        return self.opt.step(grads, **asked)

    def seen(self):
        saved = self.opt.state_dict()
        state = {
            i: {k: np.array(v).tobytes() for k, v in entry.items()}
            for i, entry in saved["state"].items()
        }
        now = {k: sorted(entry) for k, entry in self.opt.state.items()}
        params = {k: p.tobytes() for k, p in self.params.items()}
        return params, state, saved["param_groups"], self.opt.steps, now


class Flat(Neutral):
    """The same over a FlatBuffer."""

    def __init__(self, n=64):
        super().__init__(n)
        self.params = fs.FlatBuffer.pack(self.params)
        self.opt = fs.AdamW(self.params, lr=fs.schedules.Cosine(0.5, total=10))


class Torch:
    """A torch optimizer: one parameter dense, one strided, one a lazy conjugate's."""

    strided = True

    def __init__(self, n=64, name="AdamW", **hypers):
        p = torch.linspace(0, 1, n)
        strided = torch.ones(5, 4)[:, ::2] if self.strided else torch.ones(5, 2)
        self.params = [torch.nn.Parameter(p), torch.nn.Parameter(strided)]
        self.opt = getattr(ft, name)(self.params, **(hypers or {"lr": 0.5}))

    def step(self, t=0, **asked):
        for p in self.params:
            p.grad = torch.full_like(p, t + 1.0)
        self.opt.step(**asked)

    def seen(self):
        saved = self.opt.state_dict()
        state = {
            i: {k: (v.dtype, v.numpy().tobytes()) for k, v in entry.items()}
            for i, entry in saved["state"].items()
        }
        params = [p.detach().numpy().tobytes() for p in self.params]
        return params, state, saved["param_groups"], len(self.opt.state)


class Moved(Torch):
    """A torch optimizer whose counts a step has to move: integers, as checkpoints may have them."""

    def __init__(self):
        super().__init__()
        self.step()
        for entry in self.opt.state.values():
            entry["step"] = entry["step"].to(torch.int64)


def rmsprop():
    """Momentum that is switched on while states are there: the step adds one to each entry."""
    made = Torch(name="RMSprop", lr=0.1, momentum=0.0)
    made.step()
    made.opt.param_groups[0]["momentum"] = 0.5
    return made


LAYERS = {
    "neutral": Neutral,
    "flat": Flat,
    "amsgrad": lambda: Neutral(name="Adam", amsgrad=True),
    "torch": Torch,
    "torch moved": Moved,
    "torch RMSprop": rmsprop,
}
each_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def lines_of(call, stop_at=None):
    """Runs `call`, raising Interrupted at the `stop_at`-th line of Python that it comes to first.

    How many lines there are. One that is in a loop counts once.
    """
    seen = set()

    def local(frame, event, _):
        place = frame.f_code, frame.f_lineno
        if event == "line" and place not in seen:
            seen.add(place)
            if len(seen) == stop_at:
                raise Interrupted
        return local

    if HAS_TORCH:
        torch.set_grad_enabled(True)  # the last one may have cut off torch's no_grad at its end
    before = sys.gettrace()
    collecting = gc.isenabled()
    gc.disable()  # whose callbacks are Python lines too
    sys.settrace(lambda frame, event, arg: local)
    try:
        call()
    finally:
        sys.settrace(before)
        if collecting:
            gc.enable()
    return len(seen)


def between(make, call, steps=(0,)):
    """The lines at which an exception in `call` leaves what is neither old nor new."""

    def made():
        one = make()
        for t in steps:
            one.step(t)
        return one

    reference = made()
    old = reference.seen()
    total = lines_of(lambda: call(reference))
    new = reference.seen()
    assert new != old
    assert total > 5
    found = []
    for line in range(1, total + 1):
        one = made()
        with contextlib.suppress(Interrupted):
            lines_of(lambda one=one: call(one), line)
        if one.seen() == old:
            call(one)  # it goes on from there
        if one.seen() != new:
            found.append(line)
    return found


@each_layer
@pytest.mark.parametrize("asked", [{}, {"max_norm": 0.5}], ids=["plain", "clipped"])
def test_an_exception_at_any_line_of_a_step_leaves_old_or_new(make, asked):
    for before in ((), (0, 1)):
        assert between(make, lambda m: m.step(2, **asked), before) == []


@each_layer
def test_an_exception_at_any_line_of_a_load_leaves_old_or_new(make):
    other = make()
    for t in range(3):
        other.step(t)
    saved = copy.deepcopy(other.opt.state_dict())
    saved["param_groups"][0].update(weight_decay=0.25)
    assert between(make, lambda m: m.opt.load_state_dict(copy.deepcopy(saved))) == []


def test_an_exception_at_any_line_of_a_load_leaves_a_plateau_old_or_new():
    def make():
        made = Neutral(lr=fs.schedules.ReduceOnPlateau(0.5, patience=0))
        made.plateau = made.opt.param_groups[0]["lr"]
        seen = made.seen
        made.seen = lambda: (*seen(), made.plateau.progress)
        return made

    other = make()
    other.step(0)
    other.step(1)
    other.plateau.step(1.0)
    other.plateau.step(2.0)
    saved = copy.deepcopy(other.opt.state_dict())
    assert between(make, lambda m: m.opt.load_state_dict(saved)) == []


def test_an_exception_at_any_line_of_a_step_in_backward_leaves_old_or_new():
    class InBackward(Torch):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.ParameterList(self.params[:1])
            self.opt = ft.AdamW(self.params[:1], lr=0.5)
            self.handle = ft.step_in_backward(self.model, self.opt)

        def step(self, t=0):
            (self.params[0] * (t + 1)).sum().backward()

        def seen(self):
            params, *rest = super().seen()
            return (params[:1], *rest, self.params[0].grad is None)

    # Where nothing was stepped the gradient is still there, as after any backward that failed.
    reference = InBackward()
    before = reference.seen()[:-1]
    total = lines_of(reference.step)
    after = reference.seen()
    for line in range(1, total + 1):
        made = InBackward()
        with contextlib.suppress(Interrupted):
            lines_of(made.step, line)
        assert made.seen() == after or made.seen()[:-1] == before, line


# -- signals ---------------------------------------------------------------------------------------


class Big(Neutral):
    def __init__(self):
        super().__init__(BIG)


class BigTorch(Torch):
    strided = False

    def __init__(self):
        super().__init__(BIG)


def moments(step, n):
    """Delays that spread over a step's time."""
    begin = time.perf_counter()
    step()
    seconds = time.perf_counter() - begin
    return [max(1e-5, seconds * (k + 0.5) / n) for k in range(n)]


@needs_timer
@pytest.mark.parametrize("asked", [{}, {"max_norm": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize("make", [Big, BigTorch])
def test_a_signal_at_any_moment_leaves_old_or_new(make, asked):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        probe = make()
        probe.step(0)
        made, twin = make(), make()
        for t, delay in enumerate(moments(lambda: probe.step(1), 8)):
            old = made.seen()
            twin.step(t, **asked)
            try:
                signal.setitimer(signal.ITIMER_REAL, delay)
                made.step(t, **asked)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                pass
            now = made.seen()
            assert now in (old, twin.seen())
            if now == old:
                made.step(t, **asked)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@needs_timer
@pytest.mark.parametrize("make", [Big, BigTorch])
def test_a_handler_may_save_a_checkpoint_at_any_moment(make):
    files = []

    def save(*_):
        params = copy.deepcopy(made.params)
        files.append((params, copy.deepcopy(made.opt.state_dict())))

    before = signal.signal(signal.SIGALRM, save)
    try:
        made = make()
        made.step(0)
        seen = [made.seen()[:-1]]
        for t, delay in enumerate(moments(lambda: make().step(1), 6), 1):
            signal.setitimer(signal.ITIMER_REAL, delay)
            made.step(t)
            seen.append(made.seen()[:-1])
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert files
        for params, saved in files:
            resumed = make()
            with torch.no_grad() if isinstance(params, list) else contextlib.nullcontext():
                for key in range(2) if isinstance(params, list) else params:
                    resumed.params[key][...] = params[key]
            resumed.opt.load_state_dict(saved)
            assert resumed.seen()[:-1] in seen  # a load makes the states of the next step already
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# -- whose turn it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Big, BigTorch])
def test_two_threads_are_told_or_serial(make):
    made = make()
    made.step(0)
    taken, told = [1], []

    def run():
        for t in range(6):
            try:
                made.step(t)
            except RuntimeError as error:
                told.append(str(error))
            else:
                taken.append(1)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) + len(told) == 13
    assert set(told) <= {"this optimizer is already stepping in another thread"}
    if isinstance(made, Neutral):
        assert made.opt.steps == len(taken)
        assert {c[0] for c in made.opt._table.clocks()} == {len(taken)}
    else:
        assert made.opt.state[made.params[0]]["step"] == len(taken)


def test_a_step_from_inside_a_step_is_told_so():
    w = np.ones(4, np.float32)
    said = []

    def rate(t):
        if t == 1:
            with pytest.raises(RuntimeError) as raised:
                opt.step(w)
            said.append(str(raised.value))
            assert opt.state_dict()["step"] == 1  # reading is allowed
        return 0.5

    opt = fs.SGD(w, lr=rate)
    opt.step(np.ones(4, np.float32))
    opt.step(np.ones(4, np.float32))
    assert said == [
        "step and load_state_dict must not be called from inside a step of the same optimizer"
    ]
    assert opt.steps == 2


def test_a_torch_step_from_inside_a_step_is_told_so():
    class Nosy(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if armed:
                armed.clear()
                with pytest.raises(RuntimeError, match="must not be called from inside a step"):
                    opt.step()
            return super().__torch_function__(function, types, args, kwargs or {})

    armed = []
    p = torch.nn.Parameter(torch.ones(4))
    opt = ft.SGD([p], lr=1.0)
    p.grad = torch.ones(4).as_subclass(Nosy)
    armed.append(1)
    opt.step()
    assert not armed
    assert p.tolist() == [0.0] * 4


# -- what torch.amp leaves -------------------------------------------------------------------------


def test_a_scaled_step_that_raises_leaves_no_scale_behind():
    p = torch.nn.Parameter(torch.ones(4))
    opt = ft.SGD([p], lr=1.0)
    for name, value in (("grad_scale", 1024.0), ("found_inf", 1.0)):
        for wrong in (lambda: opt.step(lambda: 1 / 0), lambda: opt.step(max_norm="x")):
            p.grad = torch.ones(4)
            setattr(opt, name, torch.tensor(value))
            with pytest.raises((ZeroDivisionError, TypeError)):
                wrong()
            assert not hasattr(opt, name)
        p.grad = torch.ones(4).to_sparse()
        setattr(opt, name, torch.tensor(value))
        with pytest.raises(ValueError, match="dense"):
            opt.step()
        assert not hasattr(opt, name)
    p.grad = torch.ones(4)
    opt.step()
    assert p.tolist() == [0.0] * 4


def test_a_subclass_s_scaled_step_that_raises_leaves_no_scale_behind():
    class Own(ft.SGD):
        def step(self, closure=None):
            raise KeyError("own")

    def hook(*_):
        raise KeyError("hook")

    for cls in (Own, type("Plain", (ft.SGD,), {})):
        opt = cls([torch.nn.Parameter(torch.ones(4))], lr=1.0)
        opt.register_step_pre_hook(hook)
        opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        with pytest.raises(KeyError):
            opt.step()
        assert not hasattr(opt, "grad_scale")
        assert not hasattr(opt, "found_inf")


def test_what_a_scaler_sets_is_gone_after_the_step_and_may_be_deleted_still():
    p = torch.nn.Parameter(torch.ones(4))
    opt = ft.SGD([p], lr=1.0)
    p.grad = torch.full((4,), 8.0)
    opt.grad_scale = torch.tensor(8.0)
    opt.found_inf = torch.tensor(0.0)
    opt.step()
    assert p.tolist() == [0.0] * 4
    assert not hasattr(opt, "grad_scale")
    del opt.grad_scale  # as GradScaler does
    with pytest.raises(AttributeError):
        del opt.other


# -- memory that moves while it is read ------------------------------------------------------------


class Acting(torch.Tensor if HAS_TORCH else object):
    """A gradient that runs somebody's code when it is looked at."""

    act = staticmethod(lambda: None)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Acting.act()
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("what", ["data", "grad", "state", "entry", "entries"])
def test_memory_that_a_gradient_moves_is_read_anew(what):
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = ft.SGD([first, second], lr=1.0, momentum=0.5)
    for p in (first, second):
        p.grad = torch.zeros(4)
    opt.step()
    old = first.data if what == "data" else opt.state[first]["momentum_buffer"]
    kept = old.clone()
    acted = []

    def act():
        if acted:
            return
        acted.append(1)
        if what == "data":
            first.data = torch.full((4,), 3.0)
        elif what == "grad":
            first.grad = torch.full((4,), 2.0)
        elif what == "state":
            opt.state[first]["momentum_buffer"].set_(torch.full((4,), 2.0))
        elif what == "entry":
            opt.state[first]["momentum_buffer"] = torch.full((4,), 2.0)
        else:
            opt.state[first] = {"momentum_buffer": torch.full((4,), 2.0)}

    first.grad, second.grad = torch.ones(4), torch.ones(4).as_subclass(Acting)
    Acting.act = staticmethod(act)
    try:
        opt.step()
    finally:
        Acting.act = staticmethod(lambda: None)
    assert acted
    assert first.tolist() == [{"data": 2.0}.get(what, -1.0)] * 4
    if what == "data":
        assert torch.equal(old, kept)


def test_strided_memory_that_a_gradient_moves_onto_another_s_is_refused():
    first, second = (torch.nn.Parameter(torch.ones(4, 4)[:, ::2]) for _ in range(2))
    opt = ft.SGD([first, second], lr=1.0)

    def act():
        first.data = second.data

    first.grad, second.grad = torch.ones(4, 2), torch.ones(4, 2).as_subclass(Acting)
    Acting.act = staticmethod(act)
    try:
        with pytest.raises(ValueError, match=r"params\[0\] and params\[1\] must not share memory"):
            opt.step()
    finally:
        Acting.act = staticmethod(lambda: None)
    assert (second == 1).all()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("act", ["free", "retype", "own"])
def test_what_moves_before_a_parameter_s_copies_are_made_is_no_crash(monkeypatch, exchange, act):
    monkeypatch.setattr(ft.optimizers, "_EXCHANGE", exchange)
    strided = torch.nn.Parameter(torch.ones(1000, 2)[:, 0])  # stepped by way of dense copies
    other = torch.nn.Parameter(torch.ones(4, 2)[:, 0])
    opt = ft.AdamW([other, strided], lr=1.0)
    other.grad, strided.grad = torch.ones(4), torch.ones(1000)
    opt.step()
    kept = other.detach().clone()
    strided.grad = torch.ones(1000).as_subclass(Acting)

    def free():
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if act == "retype":  # the address may come back, with another type
                strided.data = torch.ones(1000, dtype=torch.float64)
            else:
                (strided if act == "free" else strided.grad).untyped_storage().resize_(0)

    Acting.act = staticmethod(free)
    try:
        with pytest.raises((ValueError, TypeError), match="must"):
            opt.step()
    finally:
        Acting.act = staticmethod(lambda: None)
    assert torch.equal(other, kept)


def test_memory_that_moves_each_time_is_refused():
    first, second = (torch.nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = ft.SGD([first, second], lr=1.0)

    def act():
        first.data = torch.ones(4)

    first.grad, second.grad = torch.ones(4), torch.ones(4).as_subclass(Acting)
    Acting.act = staticmethod(act)
    try:
        with pytest.raises(ValueError, match="must stay where they are while a step reads them"):
            opt.step()
    finally:
        Acting.act = staticmethod(lambda: None)
    assert second.tolist() == [1.0] * 4


class Exporter:
    """An array that runs somebody's code when it is exported."""

    def __init__(self, array, act):
        self.array, self.act = array, act

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, **asked):
        self.act()
        return self.array.__dlpack__(**asked)


def test_an_array_that_a_gradient_s_exporter_resizes_is_refused():
    first, second = np.ones(4, np.float32), np.ones(4, np.float32)
    opt = fs.SGD([first, second], lr=1.0)
    act = lambda: first.resize(1 << 16, refcheck=False)  # noqa: E731
    with pytest.raises(ValueError, match=r"params\[0\] must stay where it was"):
        opt.step([np.ones(4, np.float32), Exporter(np.ones(4, np.float32), act)])
    assert (second == 1).all()
    assert opt.steps == 0


def test_a_gradient_that_another_s_exporter_resizes_is_read_anew():
    first, second = np.ones(4, np.float32), np.ones(4, np.float32)
    opt = fs.SGD([first, second], lr=1.0)
    grad = np.ones(4, np.float32)
    act = lambda: grad.resize(1 << 16, refcheck=False)  # noqa: E731
    with pytest.raises(ValueError, match=r"grads\[0\] must have shape \(4,\), got \(65536,\)"):
        opt.step([grad, Exporter(np.ones(4, np.float32), act)])
    assert (first == 1).all()


@pytest.mark.parametrize("reads_first", [0, 1])
@pytest.mark.parametrize("what", ["array", "bfloat16", "float32"])
def test_memory_of_one_exporter_that_another_s_frees_is_read_anew(what, reads_first):
    params = [np.ones(1000, np.float32), np.ones(1000, np.float32)]
    opt = fs.SGD(params, lr=1.0)
    if what == "array":
        given = np.ones(1000, np.float32)
        free = lambda: given.resize(1 << 16, refcheck=False)  # noqa: E731
        grad, error = Exporter(given, lambda: None), r"shape \(1000,\), got \(65536,\)"
    else:
        grad = torch.ones(1000, dtype=getattr(torch, what))
        free = lambda: grad.untyped_storage().resize_(0)  # noqa: E731
        error = "memory for its elements"
    grads = [grad, grad]
    grads[1 - reads_first] = Exporter(np.ones(1000, np.float32), free)
    with pytest.raises(ValueError, match=rf"grads\[{reads_first}\] must have {error}"):
        opt.step(grads)
    assert all((p == 1).all() for p in params)


# -- storages without memory -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("where", ["grad", "param", "state", "step", "grad view", "grad shrunk"])
@pytest.mark.parametrize("exchange", [True, False])
def test_a_tensor_without_memory_is_refused(monkeypatch, exchange, where, dtype):
    monkeypatch.setattr(ft.optimizers, "_EXCHANGE", exchange)
    dtype = getattr(torch, dtype)
    p = torch.nn.Parameter(torch.ones(1000, dtype=dtype))
    opt = ft.AdamW([p], lr=1.0)
    p.grad = torch.zeros(1000, dtype=dtype)
    opt.step()
    kept = p.detach().clone()
    if where == "grad view":
        p.grad = torch.ones(3000, dtype=dtype)[2000:]
    found = {"param": p, "state": opt.state[p]["exp_avg"], "step": opt.state[p]["step"]}
    storage = found.get(where, p.grad).untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(8 if where == "grad shrunk" else 0)
    with pytest.raises(ValueError, match="must have memory"):
        opt.step()
    with pytest.raises(ValueError, match="must have memory"):
        opt.step(max_norm=1.0)
    if where == "param":
        storage.resize_(nbytes)
        return
    assert torch.equal(p, kept)
    if where != "step":
        assert opt.state[p]["step"] == 1


def test_a_state_is_measured_anew_once_it_was_refused():
    p = torch.nn.Parameter(torch.ones(1000))
    opt = ft.AdamW([p], lr=1.0)
    p.grad = torch.ones(1000)
    opt.step()
    state, kept = opt.state[p]["exp_avg"], p.detach().clone()
    storage, held = state.untyped_storage(), []
    address = storage.data_ptr()
    storage.resize_(0)
    with pytest.raises(ValueError, match="must have memory"):
        opt.step()
    for _ in range(100):  # an allocator gives the same place again, now or later
        storage.resize_(3000)
        if storage.data_ptr() == address:
            break
        held.append(torch.empty(750))
        storage.resize_(0)
    with pytest.raises(ValueError, match="4000 bytes of it, got a storage of"):
        opt.step()
    assert torch.equal(p, kept)


# -- the end of the process ------------------------------------------------------------------------


def test_a_daemon_thread_in_a_step_does_not_abort_the_process():
    code = """
import threading, time
import numpy as np
import fusedstep as fs
w = np.ones(1 << 20, np.float32)
opt, g = fs.AdamW(w), np.ones(1 << 20, np.float32)
def run():
    while True:
        opt.step(g)
threading.Thread(target=run, daemon=True).start()
time.sleep(0.05)
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(3)
    ]
    for run in runs:
        _, error = run.communicate(timeout=60)
        assert (run.returncode, error) == (0, b"")
