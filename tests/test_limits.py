"""Memory that ends: MemoryError, nothing changed, no crash, no hang; tests/scale.py has more."""

import subprocess
import sys

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
path = tempfile.mkdtemp() + "/run.safetensors"
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
