"""What every test file shares: each instruction set, the controls put back, all cores."""

import ast
import ctypes
import importlib.util
import os

import pytest

import fusedstep as fs

# What `pytest -m quick` runs: the core's behaviour, without torch and without long sweeps.
QUICK = {
    *("test_buffers", "test_conventions", "test_epilogue", "test_folders", "test_grad_norms"),
    *("test_imports", "test_limits", "test_metadata", "test_narrow", "test_optimizers"),
    *("test_readme", "test_resuming", "test_schedules", "test_validation"),
}
HAS_TORCH = importlib.util.find_spec("torch") is not None


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
    config.addinivalue_line("markers", "quick: the core, in a minute and without torch")
    if "FUSEDSTEP_COUNTERS" in os.environ and "PYTEST_XDIST_WORKER" in os.environ:
        me, leave, at_once = os.getpid(), ctypes.CDLL(None).exit, os._exit
        os._exit = lambda status: leave(status) if os.getpid() == me else at_once(status)


def pytest_ignore_collect(collection_path, config):
    """`-m quick` does not even read the other files, which takes longer than its tests."""
    name = collection_path.stem
    left_out = name.startswith("test_") and name not in QUICK and config.option.markexpr == "quick"
    return True if left_out else None


def pytest_itemcollected(item):
    if item.path.stem in QUICK:
        item.add_marker("quick")


class NeedsTorch(pytest.Module):
    """A file that imports torch, where there is none."""

    def collect(self):
        pytest.skip("torch is not installed", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """The core's tests run without torch; the files that begin with it say so and are skipped."""
    if HAS_TORCH:
        return None
    found = {
        name
        for node in ast.parse(module_path.read_text(encoding="utf-8")).body
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom)
            else [one.name for one in node.names] if isinstance(node, ast.Import)
            else []
        )
    }  # fmt: skip
    needs = any(f"{name}.".startswith(("torch.", "fusedstep.torch.")) for name in found)
    return NeedsTorch.from_parent(parent, path=module_path) if needs else None


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
