"""The scalar set of this machine against the sets of aarch64, cross-compiled and run under qemu."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fusedstep as fs
from fusedstep import _core
from test_symbols import machine_sets

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
NATIVE = os.environ.get("CXX") or "c++"
CROSS = "aarch64-linux-gnu-g++"
QEMU = "qemu-aarch64"
PATIENCE = 300  # seconds for one compilation on a loaded machine

# -O1 compiles in half the time, and promises the same bits as the build's -O3.
FLAGS = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fno-math-errno"]


def need(*tools):
    for tool in tools:
        if shutil.which(tool.split()[0]) is None:
            pytest.skip(f"{tool} is not on PATH")


def hashes(compiler, isa, directory, *runner, link=(), flags=()):
    """What native/identity.cpp prints under one set, and the width that its kernels tell."""
    program = directory / f"identity_{isa}"
    sources = [TESTS / "native" / "identity.cpp"]
    parts = ("kernels/kernels.cpp", "step/rules.cpp", "rules/power.cpp")
    sources += [CSRC / part for part in parts]
    objects = []
    for source in sources:
        # rules.cpp names its own target, the host; the others are of the set.
        target = [] if source.name == "rules.cpp" else [f"-DFUSEDSTEP_TARGET={isa}"]
        objects.append(str(directory / f"{source.stem}.o"))
        command = [*compiler.split(), *FLAGS, *flags, *target, f"-I{CSRC}", "-c", str(source)]
        execute(*command, "-o", objects[-1])
    execute(*compiler.split(), *objects, *link, "-o", str(program))
    done = execute(*runner, str(program))
    return done.stdout.splitlines(), int(re.fullmatch(r"lanes (\d+)\n", done.stderr)[1])


def execute(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    """The scalar set's hashes on this machine."""
    need(NATIVE)
    lines, lanes = hashes(NATIVE, "scalar", tmp_path_factory.mktemp("native"))
    assert lanes == 1
    return lines


def test_identity_program_covers_every_rule_and_mix_and_sees_differences(native):
    native = [line for line in native if not line.startswith("+")]
    kernels = [tuple(line.split()[:5]) for line in native]
    assert len(set(kernels)) == len(kernels)
    assert {rule for rule, *_ in kernels} == set(_core.rules())
    formats = _core.formats()
    mixes = set(itertools.product(formats, formats))
    by_update = {}
    for rule, variant, decay, *mix in kernels:
        by_update.setdefault((rule, variant, decay), set()).add(tuple(mix))
    assert all(found == mixes for found in by_update.values())
    # Every kernel computes something of its own: equal hashes would mean a blind hash, or the same
    # kernel twice.
    found = [line.split()[5] for line in native]
    assert len(set(found)) == len(found)


def test_sweep_has_the_bits_of_the_update_staged_by_hand(native):
    mixes = [line for line in native if not line.startswith("+")]
    different = [line for line in mixes if len(set(line.split()[5:])) != 1]
    assert not different, f"{len(different)} of {len(mixes)} kernels, first {different[:3]}"


def test_identity_program_covers_narrow_parameters_and_states(native):
    lines = [line.split()[1:] for line in native if line.startswith("+")]
    assert {rule for rule, *_ in lines} == set(_core.rules())
    assert {param for _, _, param, *_ in lines} == {
        "float32", "float64", "bfloat16", "split", "kahan",
    }  # fmt: skip
    # A hash of its own for each way to store what a rule has: without states they are as one.
    hashes = {}
    for rule, variant, *how, found in lines:
        hashes.setdefault((rule, variant), {})[tuple(how)] = found
    for (rule, variant), found in hashes.items():
        narrow = {how: value for how, value in found.items() if how[1:] != ("float32", "1")}
        stateless = len({narrow["float32", state, "0"] for state in ("float32", "q8")}) == 1
        assert len(set(narrow.values())) == (5 if stateless else len(narrow)), (rule, variant)


@pytest.mark.parametrize("isa", [isa for isa in fs.usable_isas() if isa != "scalar"])
def test_set_of_this_machine_gives_the_bits_of_the_scalar_one(isa, native, tmp_path):
    flags = [*machine_sets()[isa], "-fexceptions"]  # of what is no kernel, and may throw
    lines, _ = hashes(NATIVE, isa, tmp_path, flags=flags)
    different = [pair for pair in zip(lines, native, strict=True) if pair[0] != pair[1]]
    assert not different, f"{len(different)} of {len(lines)} kernels, first {different[:3]}"


@pytest.mark.parametrize(("isa", "width"), [("scalar", 1), ("neon", 4)])
def test_aarch64_set_gives_the_bits_of_this_machine(isa, width, native, tmp_path):
    need(CROSS, QEMU)
    # Linked statically, so that no sysroot of the target is needed to run it.
    lines, lanes = hashes(CROSS, isa, tmp_path, QEMU, link=["-static"])
    assert lanes == width
    different = [pair for pair in zip(lines, native, strict=True) if pair[0] != pair[1]]
    assert not different, f"{len(different)} of {len(lines)} kernels, first {different[:3]}"
