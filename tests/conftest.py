"""Fixtures that every test file shares: each instruction set, and the controls put back."""

import pytest

import fusedstep as fs


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
