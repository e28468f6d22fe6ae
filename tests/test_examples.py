"""Each script in examples/ runs, and what it prints says that it came out right."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
FOR_JAX = ("flax", "optax", "fusedstep._jax")
PROCESSES = ("ddp", "zero", "fsdp2", "checkpoint")


def run(script, *arguments):
    command = [sys.executable, EXAMPLES / f"{script}.py", *arguments]
    # One thread: small models wait longer for a second one than it saves them.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_readme_names_every_script():
    named = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def plain_losses():
    return losses(run("gpt", "--steps", "6"))


def losses(printed):
    rows = re.findall(r"│ (\d+) +│ ([\d.]+) +│ ([\d.]+) +│ [+-]\d.\de[+-]\d+ +│", printed)
    assert [int(step) for step, _, _ in rows] == list(range(6))
    for name in ("torch", "fusedstep"):
        assert re.search(rf"^{name}: [\d,]+ tokens/s, ", printed, re.M)
    assert "the losses agree to float32 rounding" in printed
    return [(float(theirs), float(ours)) for _, theirs, ours in rows]


def test_gpt_learns(plain_losses):
    first, last = plain_losses[0], plain_losses[-1]
    assert first == pytest.approx((5.55, 5.55), rel=0.02)  # of the order of log(256)
    assert max(last) < min(first) - 0.5


@pytest.mark.parametrize("option", ["--flatten", "--step-in-backward"])
def test_gpt_learns_the_same_in_other_memory(plain_losses, option):
    printed = run("gpt", "--steps", "6", option)
    assert losses(printed) == plain_losses
    assert ("part of backward" in printed) == (option == "--step-in-backward")


@pytest.mark.parametrize("script", PROCESSES)
def test_processes_agree_with_one(script):
    printed = run(script, "--steps", "5")
    lines = [line for line in printed.splitlines() if "equal to one process" in line]
    assert len(lines) == (2 if script == "ddp" else 1), printed
    assert "DIFFERENT" not in printed
    if script == "fsdp2":
        assert "rank 1 steps shards of [(16, 8), (16,), (0, 32), (0,)]" in printed
    if script == "zero":
        kept = re.findall(r"keeps states of (\d+) of 321 parameters", printed)
        assert sum(map(int, kept)) == 321
        assert "0" not in kept


@pytest.fixture
def _jax():
    for name in FOR_JAX:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.usefixtures("_jax")
def test_jax_learns_as_under_optax(tmp_path):
    printed = run("train_jax", "--steps", "6", "-o", tmp_path / "curves.png")
    rows = re.findall(r"^ +(\d+) +([\d.]+) +([\d.]+) +[+-]\d.\de[+-]\d+$", printed, re.M)
    assert [int(step) for step, _, _ in rows] == list(range(6))
    losses = [(float(theirs), float(ours)) for _, theirs, ours in rows]
    assert losses[0] == pytest.approx((5.55, 5.55), rel=0.02)  # of the order of log(256)
    assert max(losses[-1]) < min(losses[0]) - 0.3
    for name in ("optax", "fusedstep"):
        assert re.search(rf"^{name}: [\d,]+ tokens/s, [\d.]+ ms or [\d.]+% ", printed, re.M)
    assert "the losses agree to float32 rounding" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
