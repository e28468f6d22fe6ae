"""The GPU module's own sources, compiled for the host: tests/native/cuda_on_host has the why."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
FAKE = Path(__file__).parent / "native" / "cuda_on_host"
NAME = "fusedstep_cuda_on_host"
CPU = 1  # DLPack's device type: the memory of this GPU is the CPU's
PATIENCE = 500  # seconds for one compilation on a loaded machine


def compiler():
    """The C++ compiler, or a skip."""
    pybind11 = pytest.importorskip("pybind11")
    found = shutil.which((os.environ.get("CXX") or "c++").split()[0])
    if found is None:
        pytest.skip("there is no C++ compiler for the GPU's sources")
    return found, ["-I", pybind11.get_include(), "-I", sysconfig.get_paths()["include"]]


def build(directory):
    """The extension module, made in `directory`; its device() is a GPU in the CPU's memory."""
    command, includes = compiler()
    flags = [
        *("-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-math-errno"),
        *("-fvisibility=hidden", "-w"),  # warnings are the build's business
        # A GPU faults where a vector is not aligned; so does this, by an illegal instruction.
        *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
        *("-I", str(FAKE), "-I", str(CUDA.parent), *includes),
        *(f"-DFUSEDSTEP_DEVICE_KIND={CPU}", f"-DFUSEDSTEP_MODULE={NAME}"),
        '-DFUSEDSTEP_ARCHITECTURES="host"',
    ]
    sources = [*sorted(CUDA.glob("*.cu")), *sorted(CUDA.glob("*.cpp")), FAKE / "controls.cpp"]

    def compile(source):
        made = directory / f"{source.stem}.o"
        run(command, *flags, "-x", "c++", "-c", source, "-o", made)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile, sources))
    library = directory / (NAME + sysconfig.get_config_var("EXT_SUFFIX"))
    run(command, "-shared", *objects, "-o", library)
    return load(library)


def load(library):
    """The extension module, and its `controls` (controls.cpp)."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.controls = ctypes.CDLL(str(library))
    for name in ("make_stream", "end_capture"):
        getattr(module.controls, name).restype = ctypes.c_void_p
    for name in ("begin_capture", "end_capture", "recording"):
        getattr(module.controls, name).argtypes = [ctypes.c_void_p]
    module.controls.replay.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    return module


def run(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-4000:]
