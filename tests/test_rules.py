"""What a rule may be: its states under any hyperparameters, and the most and the fewest of them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedstep import _core

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = os.environ.get("CXX") or "c++"
FLAGS = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-pthread"]
PATIENCE = 300  # seconds for one compilation on a loaded machine


def run(*command):
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=PATIENCE
    )


def compile(*arguments):
    if shutil.which(COMPILER.split()[0]) is None:
        pytest.skip(f"{COMPILER} is not on PATH")
    return run(*COMPILER.split(), *FLAGS, *arguments)


def build(program, csrc, *sources):
    """Compiles sources, each a path or a path with flags of its own, and runs the program."""
    objects = []
    for number, (source, *own) in enumerate(sources):
        objects.append(program.with_name(f"{number}.o"))
        made = compile(f"-I{csrc}", *own, "-x", "c++", "-c", source, "-o", objects[-1])
        assert made.returncode == 0, made.stderr[-4000:]
    linked = compile(*objects, "-o", program)
    assert linked.returncode == 0, linked.stderr[-4000:]
    done = run(program)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


def test_variant_of_a_step_has_the_states_that_hyperparameters_say(tmp_path):
    native = TESTS / "native" / "rules.cpp"
    *wrong, rows = build(
        tmp_path / "rules", CSRC, [native], [CSRC / "rules.cpp"], [CSRC / "power.cpp"]
    )
    assert wrong == []
    assert int(rows) == 14 * sum(3 ** len(hypers) for hypers, *_ in _core.rules().values())
