"""Every check by one command: `nox -s lint`, `nox -s tests -- -k adamw`, `nox --list`.

Arguments after `--` reach the session's command. `.ci/run` calls the same sessions in one
environment that has all they need (`nox --no-venv --no-install`).
"""

from __future__ import annotations

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "docs", "tests"]


def files(session: nox.Session, *patterns: str) -> list[str]:
    """Files that git tracks."""
    return session.run("git", "ls-files", *patterns, external=True, silent=True).split()


@nox.session
def lint(session: nox.Session) -> None:
    """Style, types, formatting, clang-tidy."""
    session.install(".[lint]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("clang-format", "--dry-run", "--Werror", *files(session, "*.h", "*.cpp", "*.cu"))
    build = session.create_tmp()
    pybind11 = session.run("python", "-m", "pybind11", "--cmakedir", silent=True).strip()
    session.run(
        *("cmake", "-S", ".", "-B", build, "--log-level=WARNING"),
        *("-DSKBUILD_PROJECT_VERSION=0", f"-Dpybind11_DIR={pybind11}"),
        *("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DFUSEDSTEP_WERROR=ON"),
        silent=True,
    )
    # Those in csrc/cuda include no header of CUDA, and CMake has not defined theirs.
    session.run(
        *("clang-tidy", "-p", build, "--quiet", "--extra-arg=-Wno-unknown-warning-option"),
        *("--extra-arg=-DFUSEDSTEP_MODULE=_cuda", '--extra-arg=-DFUSEDSTEP_ARCHITECTURES=""'),
        *files(session, "csrc/*.cpp"),
    )


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
    """The suite under sanitizers."""
    session.skip("not filled yet")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Arbitrary input to every instruction set at once: the same bits, and no byte outside."""
    session.skip("not filled yet")


@nox.session
def emulate(session: nox.Session) -> None:
    """The wheels on emulated processors."""
    session.skip("not filled yet")


@nox.session
def wheels(session: nox.Session) -> None:
    """Wheels and the sdist in dist/, and what makes them fit to publish."""
    session.skip("not filled yet")


@nox.session
def bench(session: nox.Session) -> None:
    """`fusedstep bench`, small unless told otherwise: `nox -s bench -- --n 67108864`."""
    session.install(".[bench]")
    session.run("fusedstep", "bench", *(session.posargs or ("--n", "1048576", "--rounds", "3")))
