"""Runs the tests under each of several Pythons, or versions of torch or JAX; prints a table.

    python .ci/matrix.py pythons [INTERPRETER ...] [-- arguments of pytest]
    python .ci/matrix.py torches [VERSION ...] [-- arguments of pytest]
    python .ci/matrix.py jaxes [VERSION ...] [-- arguments of pytest]

Without arguments: the Pythons from 3.10 on that PATH and pyenv have, free-threaded ones too; and
torch's oldest supported release, the one that the test extra pins, and the newest; JAX' oldest, and
the newest under this Python and under the newest one. Each gets a fresh environment in
build/matrix, with the package built for it; the kernels, the same for all, are compiled once. What
is given as a path to the Python of a virtual environment is used with the libraries that it has.

Under other Pythons run the tests that need no torch: every file that imports nothing but NumPy and
the test tools; what needs torch in those is skipped. Under other torches run the files about torch,
under other JAXes those about it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "build" / "matrix"
BUILDS = PLACE / "builds"
TOOLS = ["pytest>=8", "hypothesis>=6.100", "mpmath>=1.3"]
WHERE_BUILT = ["safetensors", "xxhash"]  # of which not every Python has a wheel
# What the head of a file that runs without torch may import, beside Python's own.
PLAIN = {"cases", "fusedstep", "hypothesis", "ml_dtypes", "mpmath", "numpy", "optional", "pytest"}
PLAIN |= {"reference"}
# Of the sources, the wheel, and what the same machine code computes, whatever Python runs it.
ELSEWHERE = {"adding", "docs", "examples", "folders", "fuzz", "gallery", "identity", "imports"}
ELSEWHERE |= {"norm", "readme", "reference", "symbols", "values"}


@dataclass
class Environment:
    name: str
    interpreter: str
    requirements: list[str]
    files: list[Path]

    def prepare(self) -> str:
        """The Python to run, with the package and what its tests need."""
        python = Path(self.interpreter)
        if not (python.parent.parent / "pyvenv.cfg").exists():
            place = PLACE / self.name
            shutil.rmtree(place, ignore_errors=True)
            made = subprocess.run([self.interpreter, "-m", "venv", str(place)])
            if made.returncode:  # a distribution's may have no `ensurepip`
                run(self.interpreter, "-m", "venv", "--without-pip", str(place))
            python = place / "bin" / "python"
            install = (*pip(python), "install", "-q")
            run(*install, *TOOLS, *self.requirements)
            for tool in WHERE_BUILT:
                subprocess.run([*install, "--only-binary=:all:", tool])
        wheels = BUILDS / version_of(str(python))
        if not any(wheels.glob("*.whl")):  # several environments may be of one Python
            options = [f"--config-settings=build-dir={wheels}/build"]
            for kernels in BUILDS.glob("*/build/CMakeFiles/kernels_scalar.dir"):  # of the first one
                build = kernels.parent.parent
                options.append(f"--config-settings=cmake.define.FUSEDSTEP_KERNELS={build}")
            made = ("wheel", "-q", "--no-deps", "-w", str(wheels), *options, str(ROOT))
            run(*pip(python), *made)
        (wheel,) = wheels.glob("*.whl")
        run(*pip(python), "install", "-q", "--no-deps", "--force-reinstall", str(wheel))
        return str(python)

    def test(self, arguments: list[str]) -> list[str]:
        """A line of the table."""
        begin = time.monotonic()
        try:
            python = self.prepare()
        except subprocess.CalledProcessError as error:  # said what it lacks; the others go on
            print(f"{self.name} could not be prepared: {error}", flush=True)
            return [self.name, "-", "-", "-", "0", "1", "0", minutes_since(begin)]
        report = PLACE / f"{self.name}.xml"
        report.unlink(missing_ok=True)
        files = [str(f.relative_to(ROOT)) for f in self.files]
        how = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run([python, "-m", "pytest", *how, *files, *arguments], cwd=ROOT)
        counts = {"tests": 0, "failures": 0, "errors": 1, "skipped": 0}
        if report.exists():
            suite = ElementTree.parse(report).getroot()[0]
            counts = {key: int(suite.get(key, 0)) for key in counts}
        failed = counts["failures"] + counts["errors"]
        if done.returncode and not failed:  # a crash writes no report, or half of one
            failed = 1
        passed = counts["tests"] - failed - counts["skipped"]
        found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, cwd=PLACE)
        row = [str(passed), str(failed), str(counts["skipped"]), minutes_since(begin)]
        return [*found.stdout.split(), *row]


VERSIONS = """
import importlib.metadata as m, platform, sys
import fusedstep  # a module that does not declare itself fit for it turns the lock on
free = not getattr(sys, "_is_gil_enabled", lambda: True)()
print(platform.python_version() + ("t" if free else ""), end=" ")
for name in ("numpy", "torch", "jax"):
    try:
        print(m.version(name), end=" ")
    except m.PackageNotFoundError:
        print("-", end=" ")
"""
HEAD = ["Python", "NumPy", "torch", "JAX", "passed", "failed", "skipped", "minutes"]


def pip(python: Path) -> list[str]:
    """An environment's own, which knows its tags (free-threaded: 24.1 and later), or this one's."""
    own = [str(python), "-m", "pip", "--disable-pip-version-check"]
    if subprocess.run([*own, "--version"], capture_output=True).returncode == 0:
        return own
    return [sys.executable, *own[1:], "--python", str(python)]


def minutes_since(begin: float) -> str:
    return f"{(time.monotonic() - begin) / 60:.1f}"


def run(*command: str) -> None:
    subprocess.run(command, check=True, cwd=ROOT)


def version_of(interpreter: str) -> str:
    """Such as 3.13.5t, which is free-threaded; nothing where it does not run."""
    asked = "import platform, sysconfig; print(platform.python_version() + 't' *"
    asked += " bool(sysconfig.get_config_var('Py_GIL_DISABLED')))"
    done = subprocess.run([interpreter, "-c", asked], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def of_pyenv(version: str) -> list[str]:
    """The interpreters that pyenv has of a version, which may have wildcards."""
    if shutil.which("pyenv") is None:
        return []
    root = subprocess.run(["pyenv", "root"], capture_output=True, text=True, check=True).stdout
    return sorted(map(str, Path(root.strip(), "versions").glob(f"{version}/bin/python3")))


def imports(file: Path) -> set[str]:
    """What the file's head imports."""
    return set(re.findall(r"^(?:import|from) (\w+)", file.read_text(), re.MULTILINE))


def pythons(given: list[str]) -> list[Environment]:
    files = []
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        foreign = imports(file) - PLAIN - set(sys.stdlib_module_names)
        if not foreign and file.stem.removeprefix("test_") not in ELSEWHERE:
            files.append(file)
    if not given:
        names = [f"python3.{minor}{free}" for minor in range(10, 15) for free in ("", "t")]
        given = [p for p in map(shutil.which, names) if p] + of_pyenv("3.*")
    found = {}
    for interpreter in given:
        version = version_of(interpreter)
        if numbers_of(version) >= [3, 10]:
            found.setdefault(
                version, Environment(version, interpreter, ["numpy", "ml_dtypes"], files)
            )
    return [found[v] for v in sorted(found, key=numbers_of)]


def torches(given: list[str]) -> list[Environment]:
    pinned = re.search(r"torch==([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    files = sorted((ROOT / "tests").glob("test_torch_*.py"))
    files += [ROOT / "tests" / f"test_{name}.py" for name in ("against_torch", "checkpoints")]
    found = []
    for one in given or ["2.4.0", pinned, "newest"]:
        wanted = "torch" if one == "newest" else f"torch=={one}"
        path = "/" in one
        found.append(
            Environment(
                Path(one).absolute().parent.parent.name if path else f"torch-{one}",
                one if path else sys.executable,
                [wanted, "numpy", "ml_dtypes", "safetensors", "accelerate>=1"],
                files,
            )
        )
    return found


def jaxes(given: list[str]) -> list[Environment]:
    os.environ["FUSEDSTEP_JAX"] = "1"  # with the headers that the wheels are built with
    oldest = re.search(r"jax>=([\d.]+)", (ROOT / "pyproject.toml").read_text())[1]
    newest = max(of_pyenv("3.1[0-9].*"), key=lambda path: numbers_of(version_of(path)), default="")
    asked = [(one, sys.executable) for one in given or [oldest, "newest"]]
    if newest and not given:
        asked.append(("newest", newest))
    return [
        Environment(
            f"jax-{one}-{version_of(interpreter)}",
            interpreter,
            [
                "jax" if one == "newest" else f"jax=={one}",
                "optax",
                "flax",
                "equinox",
                "matplotlib",
                "numpy",
            ],
            sorted((ROOT / "tests").glob("test_jax*.py")),
        )
        for one, interpreter in asked
    ]


def numbers_of(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)]


def main() -> int:
    kind, *rest = sys.argv[1:]
    at = rest.index("--") if "--" in rest else len(rest)
    environments = {"pythons": pythons, "torches": torches, "jaxes": jaxes}[kind](rest[:at])
    shutil.rmtree(BUILDS, ignore_errors=True)
    BUILDS.mkdir(parents=True)
    rows = []
    for environment in environments:
        print(f"== {environment.name}: {environment.interpreter}", flush=True)
        rows.append(environment.test(rest[at + 1 :]))
    widths = [max(len(row[i]) for row in [HEAD, *rows]) for i in range(len(HEAD))]
    for row in [HEAD, *rows]:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    return any(row[4] != "0" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
