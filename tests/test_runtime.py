"""Run-time controls, the environment, and the package as installed: imports, types, examples."""

import doctest
import importlib
import importlib.util
import os
import pkgutil
import platform
import subprocess
import sys
from importlib import resources

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import _core

PATIENCE = 100  # seconds; only a hang takes that long
LANES = {"scalar": 1, "avx2": 8, "avx512": 16, "neon": 4}  # float32 in one register


def python(code, **variables):
    """Runs `code` in a new interpreter under these environment variables."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FUSEDSTEP_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def last_line(done):
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


# -- instruction sets -----------------------------------------------------------------------------


def test_isa_asked_for_is_the_one_that_runs(isa):
    assert fs.isa() == isa
    assert _core.lanes() == LANES[isa]  # told by the kernels themselves


def test_usable_isas_begin_with_scalar_and_are_compiled_in():
    usable = fs.usable_isas()
    assert usable[0] == "scalar"
    compiled = _core.compiled_isas()
    assert [isa for isa in compiled if isa in usable] == usable  # in the same order


def test_usable_isas_are_what_the_cpu_tells():
    try:
        with open("/proc/cpuinfo") as file:
            flags = next(line for line in file if line.startswith("flags")).split()
    except (OSError, StopIteration):
        pytest.skip("no x86 /proc/cpuinfo")
    needs = {"avx2": {"avx2", "fma", "f16c"}}
    needs["avx512"] = needs["avx2"] | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    expected = ["scalar", *(isa for isa, words in needs.items() if words <= set(flags))]
    assert fs.usable_isas() == expected


def test_neon_is_usable_on_every_aarch64():
    if platform.machine() not in ("aarch64", "arm64"):
        pytest.skip("not an aarch64 machine")
    assert fs.usable_isas() == ["scalar", "neon"]


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "cuda", "scalar "])
def test_set_isa_unknown_is_refused_with_the_usable_ones(name):
    before = fs.isa()
    with pytest.raises(ValueError, match=r"name must be one of") as caught:
        fs.set_isa(name)
    assert f"({', '.join(fs.usable_isas())}), got '{name}'" in str(caught.value)
    assert fs.isa() == before


@pytest.mark.parametrize("name", [None, 1, b"scalar", True, ["scalar"]])
def test_set_isa_of_a_wrong_type_is_refused(name):
    before = fs.isa()
    with pytest.raises(TypeError, match="name must be a string, got"):
        fs.set_isa(name)
    assert fs.isa() == before


def test_set_isa_switches_under_a_living_optimizer():
    params = np.linspace(-1, 1, 1001, dtype=np.float32)
    expected = params.copy()
    grads = np.linspace(2, -3, 1001, dtype=np.float32)
    fs.set_isa("scalar")
    opt = fs.Adam(expected, lr=0.1)
    for _ in range(4):
        opt.step(grads)
    opt = fs.Adam(params, lr=0.1)
    for i in range(4):
        fs.set_isa(fs.usable_isas()[i % len(fs.usable_isas())])
        opt.step(grads)
    assert params.tobytes() == expected.tobytes()


def test_default_isa_is_the_last_usable():
    assert python("import fusedstep; print(fusedstep.isa())").stdout.strip() == fs.usable_isas()[-1]


@pytest.mark.parametrize("name", fs.usable_isas())
def test_environment_chooses_the_isa(name):
    code = "import fusedstep as f, fusedstep._core as c; print(f.isa(), c.lanes())"
    done = python(code, FUSEDSTEP_ISA=name)
    assert done.stdout.split() == [name, str(LANES[name])], done.stderr


def unusable():
    return [isa for isa in ("scalar", "avx2", "avx512", "neon") if isa not in fs.usable_isas()]


@pytest.mark.parametrize("name", ["sse9", "AVX2", *unusable()])
def test_environment_isa_that_cannot_run_is_an_error_at_import(name):
    usable = ", ".join(fs.usable_isas())
    assert last_line(python("import fusedstep", FUSEDSTEP_ISA=name)) == (
        f"ValueError: FUSEDSTEP_ISA must be one of the sets usable on this machine ({usable}),"
        f" got '{name}'"
    )


def test_environment_isa_empty_means_the_default():
    done = python("import fusedstep; print(fusedstep.isa())", FUSEDSTEP_ISA="")
    assert done.stdout.strip() == fs.usable_isas()[-1]


# -- huge pages and info --------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "expected"), [("0", "False"), ("1", "True"), ("", "True")])
def test_environment_sets_huge_pages(text, expected):
    done = python("import fusedstep; print(fusedstep.huge_pages())", FUSEDSTEP_HUGE_PAGES=text)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.parametrize("text", ["2", "yes", "-1", "off"])
def test_environment_huge_pages_invalid_is_an_error_at_import(text):
    done = python("import fusedstep", FUSEDSTEP_HUGE_PAGES=text)
    assert last_line(done) == f"ValueError: FUSEDSTEP_HUGE_PAGES must be 0 or 1, got {text!r}"


def test_set_huge_pages_is_seen():
    before = fs.huge_pages()
    try:
        for enabled in (False, True):
            fs.set_huge_pages(enabled)
            assert fs.huge_pages() is enabled
            assert fs.info()["huge_pages"] is enabled
    finally:
        fs.set_huge_pages(before)


def test_info_tells_what_runs(isa):
    fs.set_num_threads(3)
    info = fs.info()
    assert list(info) == [
        "version", "isa", "isas_compiled", "isas_usable", "threads", "huge_pages",
        "huge_pages_system", "cuda", "xla_module", "cpu", "platform", "compiler", "python", "numpy",
        "ml_dtypes", "torch", "jax",
    ]  # fmt: skip
    assert info["isa"] == isa
    assert info["threads"] == 3
    assert info["isas_usable"] == fs.usable_isas()
    assert info["version"] == fs.__version__ == importlib.metadata.version("fusedstep")
    assert info["cuda"] is False
    assert info["xla_module"] is any(
        module.name == "_jax" for module in pkgutil.iter_modules(fs.__path__)
    )
    assert info["numpy"] == np.__version__
    assert info["huge_pages_system"] in ("always", "madvise", "never", "unavailable")
    assert all(info[key] for key in ("cpu", "platform", "compiler", "python"))


def test_controls_are_read_from_the_environment_alone_at_import():
    # Changing them later in the process has no effect: the setters are for that.
    code = """
import os, fusedstep
os.environ.update(FUSEDSTEP_ISA="sse9", FUSEDSTEP_NUM_THREADS="77", FUSEDSTEP_HUGE_PAGES="0")
print(fusedstep.isa(), fusedstep.num_threads(), fusedstep.huge_pages())
"""
    done = python(code, FUSEDSTEP_ISA="scalar", FUSEDSTEP_NUM_THREADS="5")
    assert done.stdout.split() == ["scalar", "5", "True"], done.stderr


# -- the package ----------------------------------------------------------------------------------


def test_import_and_step_bring_in_no_heavy_module():
    # An import is to take 0.03 s beyond NumPy's at most, and each of these would take its share:
    # torch and others seconds, what makes dataclasses or reads metadata 0.01 s. What comes when it
    # is first called for is in this list too: ml_dtypes, `fs.schedules`, `fs.convergence`.
    code = """
import inspect, sys, numpy as np  # NumPy 2.5 brings inspect, 2.2 did not
before = set(sys.modules)
import fusedstep as fs
p = fs.FlatBuffer.zeros([(3,)])
fs.AdamW(p, groups=[fs.Group("0", lr=0.5)]).step(p.zeros_like())
print(*set(sys.modules) - before)
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    heavy = {"torch", "matplotlib", "rich", "sklearn", "scipy", "ml_dtypes", "importlib_metadata"}
    slow = {"importlib.metadata", "dataclasses", "socket", "pathlib", "zipfile", "email"}
    ours = {"fusedstep.schedules", "fusedstep.convergence", "fusedstep.bench", "fusedstep.torch"}
    assert not found & (heavy | slow | ours)


def test_modules_that_come_when_called_for_are_listed():
    code = "import fusedstep as fs; print(*dir(fs)); print(fs.schedules.Constant(1)(0))"
    listed, value = python(code).stdout.splitlines()
    assert {"schedules", "convergence"} <= set(listed.split())
    assert value == "1.0"


def test_public_names_are_there_and_listed_in_order():
    assert all(hasattr(fs, name) for name in fs.__all__)
    assert len(set(fs.__all__)) == len(fs.__all__)
    for name in fs.__all__:
        assert name == "__version__" or getattr(fs, name).__doc__, f"{name} has no docstring"


def test_package_is_typed():
    files = {path.name for path in resources.files("fusedstep").iterdir()}
    assert "py.typed" in files
    assert "_core.pyi" in files


def test_core_stub_agrees_with_the_module(tmp_path):
    if importlib.util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed")
    # pybind11's classes have a metaclass of its own, which is not worth a place in the stub. The
    # class's members are still compared.
    allowed = tmp_path / "allowed"
    names = ("ArrayTable", "Digesting", "TensorTable")
    allowed.write_text("".join(f"fusedstep._core.{name}\n" for name in names))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "fusedstep._core"),
            # Another version of mypy may not look at metaclasses.
            *(f"--allowlist={allowed}", "--ignore-unused-allowlist"),
        ],
        cwd=tmp_path,  # and not where the source tree would hide the installed package
        env={**os.environ, "MYPY_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def modules():
    """The package's own modules; `__main__` runs something when imported, `_core` is compiled."""
    found = pkgutil.walk_packages(fs.__path__, "fusedstep.")
    names = [m.name for m in found if m.name.rpartition(".")[2] not in ("__main__", "_core")]
    return ["fusedstep", *names]


@pytest.mark.parametrize("name", modules())
def test_examples_run(name):
    # --doctest-modules would import the source tree, which has no compiled module.
    if name == "fusedstep.gallery":  # imports what draws when it draws
        pytest.importorskip("matplotlib")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if (error.name or "").startswith("fusedstep"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    result = doctest.testmod(module, optionflags=doctest.FAIL_FAST)
    assert result.failed == 0


def test_examples_exist_for_every_optimizer():
    finder = doctest.DocTestFinder(recurse=False)
    for name in fs.__all__:
        value = getattr(fs, name)
        if (
            isinstance(value, type)
            and issubclass(value, fs.Optimizer)
            and value is not fs.Optimizer
        ):
            (test,) = finder.find(value, name)
            assert test.examples, f"{name} has no example"
