"""What every test file shares: each instruction set, the controls put back, all cores."""

import ctypes
import os

import pytest

import fusedstep as fs


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """All tests run on all cores, a file on one; some of them, or a debugger, in this process.

    `pytest -n 0` runs all tests in this process too.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:  # which come here as well, and must start no others
        return
    option = config.option
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not option.keyword
    if everything and getattr(option, "numprocesses", 0) is None and not option.usepdb:
        option.numprocesses, option.dist = "auto", "loadfile"
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's, which wait for each other busily


def pytest_configure(config):
    """Lets a build with counters write them, as processes of xdist end by `_exit`."""
    if "FUSEDSTEP_COUNTERS" in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
        me, leave, at_once = os.getpid(), ctypes.CDLL(None).exit, os._exit
        os._exit = lambda status: leave(status) if os.getpid() == me else at_once(status)


@pytest.fixture(autouse=True)
def _controls():
    """Puts the instruction set and the thread count back after each test."""
    isa, threads = fs.isa(), fs.num_threads()
    yield
    fs.set_isa(isa)
    fs.set_num_threads(threads)


@pytest.fixture(params=fs.usable_isas())
def isa(request):
    """Each instruction set that this machine can run, chosen before the test begins."""
    fs.set_isa(request.param)
    return request.param


@pytest.fixture
def _double_scalars():
    """Makes torch keep step, mu_product, eta and mu in float64, its default type, as we do."""
    torch = pytest.importorskip("torch")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
