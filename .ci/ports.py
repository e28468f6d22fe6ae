"""The core compiled for Windows, macOS and musl, by the Clang in PyPI's `ziglang`, and run.

What includes no Python header is compiled for each system and set, warnings being errors, and what
does is read with this Python's headers, which are macOS's but for a few lines. What tests/native's
programs print here they must print with musl, of which zig links them, and, where there is Wine,
under Windows. Arguments are targets, all if there are none:
`python .ci/ports.py x86_64-windows-gnu`.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

CSRC = Path("csrc")
NATIVE = Path("tests/native")
HERE = "x86_64-linux-gnu"  # by this system's own compiler
MUSL = "x86_64-linux-musl"  # of Alpine and others; programs for it run here
WINDOWS = "x86_64-windows-gnu"
TARGETS = (MUSL, WINDOWS, "aarch64-windows-gnu", "x86_64-macos", "aarch64-macos")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")))
SETS = {
    "x86_64": {"scalar": (), "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"scalar": (), "neon": ()},
}
# As CMakeLists.txt; -O1, which promises the same bits, is soon done.
FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fno-math-errno", f"-I{CSRC}")
STRICT = ("-Wall", "-Wextra", "-Werror", "-fno-sanitize=undefined")
ENGINE = ("step/engine", "step/rules", "rules/power", "machine/dispatch", "machine/parallel")


def execute(*command: str | Path, **variables: str) -> str:
    environment = os.environ | variables
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout


def compile(target: str, *arguments: str | Path) -> None:
    zig = (sys.executable, "-m", "ziglang", "c++", "-target", target)
    compiler = [os.environ.get("CXX", "g++")] if target == HERE else zig
    execute(*compiler, *FLAGS, *STRICT, *arguments)


def system(target: str) -> str:
    return "windows" if "windows" in target else "posix"


def sources(target: str) -> list[Path]:
    """Those of the core that include no header of Python's, and are of this system."""
    other = "posix" if system(target) == "windows" else "windows"
    folders = ("files", "machine", "rules", "step")
    found = (path for folder in folders for path in sorted(CSRC.glob(f"{folder}/*.cpp")))
    return [path for path in found if not path.stem.endswith(other)]


class Objects:
    """Object files in a folder, each compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = functools.cache(self._source)

    def _source(self, target: str, path: Path, isa: str = "") -> Path:
        made = self.folder / "-".join((target, isa, *path.with_suffix(".o").parts))
        of_set = (f"-DFUSEDSTEP_TARGET={isa}", *SETS[target.split("-")[0]][isa]) if isa else ()
        compile(target, *of_set, "-c", path, "-o", made)
        return made

    def kernels(self, target: str, isa: str) -> Path:
        return self.source(target, CSRC / "kernels/kernels.cpp", isa)

    def program(self, target: str, name: str, parts: Iterable[Path]) -> Path:
        made = self.folder / f"{target}-{name}.exe"
        compile(target, *parts, "-o", made)
        return made

    def identity(self, target: str, isa: str) -> Path:
        """The program that hashes what a set's kernels write."""
        parts = [
            self.source(target, CSRC / f"{part}.cpp") for part in ("step/rules", "rules/power")
        ]
        parts += [self.source(target, NATIVE / "identity.cpp", isa), self.kernels(target, isa)]
        return self.program(target, f"identity-{isa}", parts)

    def engine(self, target: str) -> Path:
        """The program that steps plain memory by several threads."""
        parts = [self.source(target, CSRC / f"{part}.cpp") for part in ENGINE]
        parts.append(self.source(target, CSRC / f"machine/process_{system(target)}.cpp"))
        parts += [self.source(target, NATIVE / "engine.cpp"), self.kernels(target, "scalar")]
        return self.program(target, "engine", parts)


def bindings() -> list[Path]:
    """The sources that include Python's headers."""
    return [*CSRC.glob("python/*.cpp"), *CSRC.glob("torch/*.cpp")]


def read_bindings(objects: Objects, path: Path) -> None:
    headers = (f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}")
    definition = '-DFUSEDSTEP_COMPILER="Clang"'
    made = objects.folder / f"{path.stem}.o"
    compile("aarch64-macos", *headers, definition, "-O0", "-c", path, "-o", made)


def compile_everything(objects: Objects, targets: Sequence[str]) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = []
        for target in targets:
            done += [pool.submit(objects.source, target, path) for path in sources(target)]
            isas = SETS[target.split("-")[0]]
            done += [pool.submit(objects.kernels, target, isa) for isa in isas]
        if any("macos" in target for target in targets):
            done += [pool.submit(read_bindings, objects, path) for path in bindings()]
        for future in done:
            future.result()


def usable(isa: str) -> bool:
    flags = Path("/proc/cpuinfo").read_text().split()
    return {"scalar": True, "avx2": "avx2" in flags}.get(isa, f"{isa}vl" in flags)


def compare(objects: Objects, target: str, *emulator: str) -> None:
    """The programs print there, under each set, what they print here under the scalar one."""
    scalar = {"FUSEDSTEP_ISA": "scalar", "WINEDEBUG": "-all"}
    there = execute(*emulator, objects.engine(target), **scalar).split()
    if there != execute(objects.engine(HERE), **scalar).split():
        sys.exit(f"the engine steps otherwise on {target}")
    print(f"{target}, engine: as here")
    expected = execute(objects.identity(HERE, "scalar")).splitlines()
    for isa in SETS["x86_64"]:
        if not usable(isa):
            print(f"{target}, {isa}: not run, as this processor has it not")
            continue
        if execute(*emulator, objects.identity(target, isa), **scalar).splitlines() != expected:
            sys.exit(f"other bits on {target} than here: {isa}")
        print(f"{target}, {isa}: the {len(expected)} hashes of scalar here", flush=True)


def main(targets: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        objects = Objects(Path(folder))
        compile_everything(objects, targets)
        print(f"compiled for {', '.join(targets)}", flush=True)
        if MUSL in targets:
            compare(objects, MUSL)
        if WINDOWS not in targets:
            return
        wine = shutil.which("wine64") or shutil.which("wine64", path="/usr/lib/wine")
        if not wine:
            sys.exit("wine64 is not on PATH: nothing was run")
        compare(objects, WINDOWS, wine)


if __name__ == "__main__":
    main(sys.argv[1:] or TARGETS)
