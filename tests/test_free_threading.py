"""Many threads: each with its own optimizer, all with one, and others that read and set controls.

Under a free-threaded interpreter only what the core locks itself is between them.
"""

import subprocess
import sys
import sysconfig
import threading
from contextlib import contextmanager

import numpy as np
import pytest

import fusedstep as fs
from optional import optional

torch = optional("torch")
ft = optional("fusedstep.torch")

N, STEPS, THREADS = 3000, 40, 4
HYPERS = [("AdamW", {}), ("SGD", {"momentum": 0.9}), ("Lion", {}), ("RMSprop", {"centered": True})]


def run(code):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def together(*calls):
    """Runs each in a thread of its own, from the same moment on; raises what one of them raised."""
    errors = []
    start = threading.Barrier(len(calls))

    def guarded(call):
        start.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def meanwhile(*calls):
    """Calls these over and over in other threads until the block ends."""
    over, errors = threading.Event(), []

    def again(call):
        try:
            while not over.wait(1e-4):
                call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=again, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def controls():
    for isa in fs.usable_isas():
        fs.set_isa(isa)
        fs.set_num_threads(len(isa))
        assert fs.isa() in fs.usable_isas()
        assert fs.num_threads() >= 1


def values(seed):
    return np.random.default_rng(seed).normal(size=N).astype("f4")


class Neutral:
    def __init__(self, which):
        name, hypers = HYPERS[which % len(HYPERS)]
        self.params = {"w": values(which), "b": values(which)[:7].copy()}
        self.grads = {k: np.cos(v) for k, v in self.params.items()}
        self.opt = getattr(fs, name)(self.params, **hypers)

    def step(self):
        self.opt.step(self.grads, max_norm=1.0, ema=0.9, norms=True)

    def read(self):
        opt = self.opt
        saved = opt.state_dict()
        return saved, opt.grad_norm, opt.grad_norms, opt.steps, opt.state, opt.param_groups[0]["lr"]

    def bits(self):
        return [self.params[k].tobytes() for k in ("w", "b")]


class Torch(Neutral):
    def __init__(self, which):
        name, hypers = HYPERS[which % len(HYPERS)]
        arrays = {"w": values(which), "b": values(which)[:7].copy()}
        self.params = {k: torch.nn.Parameter(torch.from_numpy(v)) for k, v in arrays.items()}
        for param in self.params.values():
            param.grad = torch.from_numpy(np.cos(param.detach().numpy()))
        self.opt = getattr(ft, name)(self.params.values(), **hypers)

    def step(self):
        self.opt.step(max_norm=1.0, ema=0.9, norms=True)

    def read(self):
        opt = self.opt
        return opt.state_dict(), opt.grad_norm, opt.grad_norms, len(opt.state), opt.param_groups[0]

    def bits(self):
        return [self.params[k].detach().numpy().tobytes() for k in ("w", "b")]


each_layer = pytest.mark.parametrize("layer", [Neutral, Torch])


def stepped(layer, which, steps):
    one = layer(which)
    for _ in range(steps):
        one.step()
    return one.bits()


@each_layer
def test_own_optimizers_step_at_once_to_the_same_bits(layer):
    expected = [stepped(layer, which, STEPS) for which in range(THREADS)]
    ours = [layer(which) for which in range(THREADS)]

    def steps(one):
        for _ in range(STEPS):
            one.step()
            one.read()

    with meanwhile(controls):
        together(*[lambda one=one: steps(one) for one in ours])
    assert [one.bits() for one in ours] == expected


@each_layer
def test_one_optimizer_takes_one_step_at_a_time_or_says_so(layer):
    shared = layer(0)
    taken, refused = [], []

    def tried(call, counted):
        for _ in range(STEPS):
            try:
                call()
                counted.append(1)
            except RuntimeError as error:
                refused.append(str(error))

    def reads():
        try:
            shared.read()
        except RuntimeError as error:
            refused.append(str(error))

    with meanwhile(controls, reads):
        together(*[lambda: tried(shared.step, taken) for _ in range(THREADS)])
    assert all("already stepping in another thread" in text for text in refused)
    assert shared.bits() == stepped(layer, 0, len(taken))


def test_import_leaves_a_lock_that_is_off_off():
    lock = "getattr(sys, '_is_gil_enabled', bool)()"  # an older Python cannot say, and has one
    done = run(f"import sys, numpy; before = {lock}; import fusedstep; assert {lock} == before")
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="it has a lock")
def test_the_lock_is_off_in_these_tests():
    assert not sys._is_gil_enabled()


SUB = """
import sys
code = '''
try:
    import fusedstep
    found = "imported"
except ImportError as error:
    found = str(error)
with open({path!r}, "w") as file:
    file.write(found)
'''
try:
    import _interpreters as interpreters
    one = interpreters.create({kind!r})
    interpreters.run_string(one, code)
except ModuleNotFoundError:
    import _xxsubinterpreters as interpreters
    one = interpreters.create(isolated={kind!r} == "isolated")
    interpreters.run_string(one, code)
"""


@pytest.mark.parametrize("kind", ["legacy", "isolated"])
@pytest.mark.parametrize("before", ["", "import fusedstep\n"])
def test_sub_interpreters_are_refused(tmp_path, kind, before):
    path = tmp_path / "found"
    done = run(before + SUB.format(path=str(path), kind=kind))
    assert done.returncode == 0, done.stderr
    # Newer Pythons refuse before a module is asked.
    assert "sub-interpreter" in path.read_text().replace("subinterp", "sub-interp")
