"""Memory that ends: MemoryError, nothing changed, no crash, no hang; tests/scale.py has more."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

SCRIPT = """
import resource, sys, tempfile
import numpy as np, numpy.random
import fusedstep as fs

def limited(call):
    status = open("/proc/self/status").read()
    now = int(status.split("VmSize:")[1].split()[0]) * 1024
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**20, limits[1]))
    try:
        return call()
    except MemoryError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

fs.set_num_threads(64)
n = 2**22
params, grads = (fs.FlatBuffer.pack({"w": np.ones(n, np.float32)}) for _ in range(2))
opt = fs.SGD(params, lr=0.5, momentum=0.9, dampening=0.5)
# A thread's stack is not granted: the others do its work.
assert limited(lambda: opt.step(grads).elements) == n
assert (params["w"] == 0.5).all()
found = [
    limited(lambda: fs.FlatBuffer.zeros([n])),
    limited(lambda: fs.Adam(params)),
    limited(lambda: opt.step(grads, ema=0.5)),
    limited(lambda: opt.state_dict(state_dtype="float32") and fs.FlatBuffer.pack(params)),
]
assert all("bytes, more than the system grants" in text for text in found), found
assert opt.steps == 1 and (params["w"] == 0.5).all()
folder = tempfile.TemporaryDirectory()
path = folder.name + "/run.safetensors"
# Saved, or not: but not waited for without end.
told = limited(lambda: fs.save(path, params=params, optimizer=opt))
assert told is None or isinstance(told, str)
fs.save(path, params=params, optimizer=opt)
assert "more than the system grants" in limited(lambda: fs.load(path, params=params))
opt.step(grads, ema=0.5)
assert opt.steps == 2
"""


def test_calls_that_find_no_memory_change_nothing():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# -- one allocation that fails, whichever ----------------------------------------------------------

EACH = """
import ctypes, gc, os, sys
from test_interruption import LAYERS, torch

fail_at = ctypes.PyDLL(None).fail_at
fail_at.argtypes, fail_at.restype = [ctypes.c_long], ctypes.c_long
gc.disable()  # whose allocations come at any moment

def failing(call, n):
    "Whether `call` came to its n-th allocation, which failed."
    raised = False
    try:
        fail_at(n)
        call()
    except Exception:
        raised = True
    while True:
        try:
            return fail_at(0) >= n, raised
        except Exception:  # it was the n-th that this call needs
            raised = True

def seen(one):
    return one.seen(), one.opt.grad_norms, one.opt.nonfinite

def step(one):
    if not hasattr(one.opt, "zero_grad"):
        return lambda: one.step(2, max_norm=0.5, norms=True, ema=0.5, zero_grad=True)
    for param in one.params:  # by torch itself, which is not on trial
        param.grad = torch.full_like(param, 3)
    return lambda: one.opt.step(max_norm=0.5, norms=True, ema=0.5, zero_grad=True)

def made(layer, steps):
    one = LAYERS[layer]()
    for t in range(steps):
        one.step(t, norms=True, ema=0.5)
    return one

def steps_old_or_new(layer, steps):
    reference = made(layer, steps)
    old = seen(reference)
    step(reference)()
    new, n, came = seen(reference), 0, True
    while came:
        n += 1
        one = made(layer, steps)
        came, raised = failing(step(one), n)
        now = seen(one)
        assert now in ((old, new) if raised else (new,)), (layer, steps, n, raised)
        if now == old:  # it goes on from there
            step(one)()
            assert seen(one) == new, (layer, steps, n)
    return n

def swaps_or_not(layer):
    one = made(layer, 2)
    old, n, came = one.seen(), 0, True
    while came:
        n += 1
        inside = one.opt.ema()
        came, raised = failing(inside.__enter__, n)
        if not raised:
            inside.__exit__(None, None, None)
        del inside  # which swaps back, where the call failed at its very end
        assert one.seen() == old, (layer, n)
    return n

for layer in sys.argv[1:]:
    print(layer, [steps_old_or_new(layer, steps) for steps in (0, 2)], flush=True)
    if not layer.startswith("torch"):
        print("ema", swaps_or_not(layer), flush=True)
os._exit(0)  # as torch's objects are not all whole (pybind11, below): Python would go through them
"""


# An object of a pybind11 class that finds no memory while it is made is freed twice, or ends the
# process (torch 2.13.0's and pybind11 3.1.0), and torch makes many in a step: beside torch Python's
# own memory is granted, and no table is made.
@pytest.mark.parametrize(
    ("malloc", "layers"),
    [("malloc", ["neutral", "flat"]), ("pymalloc", ["torch", "torch moved"])],
    ids=["neutral", "torch"],
)
def test_an_allocation_that_fails_leaves_old_or_new(tmp_path, malloc, layers):
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or platform.libc_ver()[0] != "glibc":
        pytest.skip("needs a C compiler, and glibc, whose malloc is put off")
    pytest.importorskip("torch")
    library, here = tmp_path / "no_memory.so", Path(__file__).parent
    source = here / "native" / "no_memory.c"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    environment = {"LD_PRELOAD": str(library), "PYTHONMALLOC": malloc, "PYTHONPATH": str(here)}
    done = subprocess.run(
        [sys.executable, "-c", EACH, *layers],
        env=os.environ | environment,
        timeout=120,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
