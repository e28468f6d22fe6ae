"""What a rule may be: its states under any hyperparameters, and the most and the fewest of them."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fusedstep import _core

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
COMPILER = os.environ.get("CXX") or "c++"
FLAGS = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-pthread"]
SCALAR = "-DFUSEDSTEP_TARGET=scalar"
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
        tmp_path / "rules",
        CSRC,
        [native],
        [CSRC / "step" / "rules.cpp"],
        [CSRC / "rules" / "power.cpp"],
        [CSRC / "kernels" / "kernels.cpp", SCALAR],
    )
    assert wrong == []
    assert int(rows) == 14 * sum(3 ** len(hypers) for hypers, *_ in _core.rules().values())


def sources_of_toys(directory, most_states=None):
    """A copy of the core whose rules are those of native/toys/registry.h, one of four states."""
    csrc = directory / "csrc"
    shutil.copytree(CSRC, csrc)
    shutil.copy(TESTS / "native" / "toys" / "registry.h", csrc / "rules" / "registry.h")
    if most_states:
        path = csrc / "interface" / "kernels.h"
        text, found = re.subn(
            r"(constexpr int kMaxStates =) \d+;", rf"\1 {most_states};", path.read_text()
        )
        assert found == 1
        path.write_text(text)
    return csrc


def test_rules_of_no_state_and_of_four_are_swept(tmp_path):
    csrc = sources_of_toys(tmp_path)
    fake = f"-I{TESTS / 'native' / 'cuda_on_host'}"
    lines = build(
        tmp_path / "toys",
        csrc,
        [TESTS / "native" / "toys" / "main.cpp", fake],
        [csrc / "step" / "rules.cpp"],
        [csrc / "kernels" / "kernels.cpp", SCALAR],
    )
    got = {}
    for line in lines:
        rule, where, _, *values = line.split()
        got.setdefault((rule, where), []).append([float(x) for x in values])

    def after_two_steps(states):
        p, g, *s = ([10.0 * k + i for i in range(5)] for k in range(2 + states))
        for _ in range(2):
            d = g
            for k in range(states):
                s[k] = d = [x + y for x, y in zip(s[k], d, strict=True)]
            p = [x - 0.5 * y for x, y in zip(p, d, strict=True)]
        return [p, g, *s]

    for where in ("cpu", "gpu"):
        assert got["four", where] == after_two_steps(4)
        assert got["none", where] == after_two_steps(0)


def test_rule_of_more_states_than_tables_have_room_for_does_not_compile(tmp_path):
    csrc = sources_of_toys(tmp_path, most_states=3)
    refused = compile(SCALAR, "-fsyntax-only", f"-I{csrc}", csrc / "kernels" / "kernels.cpp")
    assert refused.returncode != 0
    # GCC's words, Clang's
    assert re.search(r"too many initializers for .*State|excess elements in", refused.stderr)
