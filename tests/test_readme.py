"""The README is true: its example prints what it says, its calls exist, its files are there."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fusedstep as fs
from fusedstep import bench

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_readme_examples_print_what_they_say(code, capsys):
    if "import torch" in code:
        pytest.importorskip("torch")
    exec(compile(code, "README.md", "exec"), {})
    promised = code.rsplit("# ", 1)[1].strip()
    assert capsys.readouterr().out.strip() == promised


def test_readme_lecture_calls_make_optimizers_that_step():
    calls = re.findall(r"\| `(fs\.\w+\(params.*?\))` \|", README)
    assert len(calls) == 11
    for call in calls:
        params = fs.FlatBuffer.pack([np.ones(5, np.float32)])
        opt = eval(call, {"fs": fs, "params": params})
        opt.step(params.copy())
        assert (params[0] < 1).all(), call


def test_readme_has_measured_every_optimizer():
    table = README.split("## How fast")[1].split("##")[0]
    for name in bench.OPTIMIZERS:
        assert re.search(rf"^\| {name} \|.*\d\.\d\d", table, re.M), name
    assert "fusedstep bench" in table


def test_figures_are_those_of_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "figures.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_is_short():
    assert len(README.splitlines()) < 200


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert "://" in target or (ROOT / target.partition("#")[0]).exists(), target


def test_readme_commands_are_the_ones_ci_runs():
    script = (ROOT / ".ci" / "run").read_text()
    for line in re.findall(r"^    (python -m pip install .*)$", README, re.M):
        install, command = line.split(" && ")
        package = install.split()[-1]
        assert f"{package} && {command}" in script, line
