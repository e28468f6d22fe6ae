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
