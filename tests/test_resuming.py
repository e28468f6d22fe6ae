"""The recipes for resuming: killed, stopped or interrupted, they end with the bits of one run."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fusedstep as fs
from optional import optional

safetensors = optional("safetensors")

EXAMPLES = Path(__file__).parent.parent / "examples"
NOTEBOOK = EXAMPLES / "resume.ipynb"
STEPS, EVERY = 60, 10
recipes = pytest.mark.parametrize("name", ["numpy", "torch"])


def recipe(name):
    """The example as a module."""
    if name == "torch":
        pytest.importorskip("torch")
    spec = importlib.util.spec_from_file_location("recipe", EXAMPLES / f"resume_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def values(path):
    """All arrays in a file, as bytes."""
    with safetensors.safe_open(path, "np") as file:
        return {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


# A script that is killed in its n-th fsync: two of each save, of the file and of its folder.
KILLED = """
import os, runpy, signal, sys
real, left = os.fsync, int(sys.argv.pop(1))
def fsync(descriptor):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
os.fsync = fsync
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@recipes
def test_killed_run_ends_with_the_same_bits(name, tmp_path):
    module = recipe(name)
    module.train(tmp_path / "whole", STEPS, EVERY)
    options = ["--path", tmp_path / "killed", "--steps", str(STEPS), "--every", str(EVERY)]
    command = [sys.executable, "-c", KILLED, "5", EXAMPLES / f"resume_{name}.py", *options]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert fs.load(tmp_path / "killed").step == 2 * EVERY  # of the save before
    assert len(os.listdir(tmp_path)) == 3  # and what the killed one had written beside it
    module.train(tmp_path / "killed", STEPS, EVERY)
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]
    assert fs.load(tmp_path / "killed").step == STEPS
    assert values(tmp_path / "killed") == values(tmp_path / "whole")


@recipes
def test_run_that_is_asked_to_stop_saves_the_step_it_is_at(name, tmp_path, monkeypatch):
    module = recipe(name)
    module.train(tmp_path / "whole", STEPS, EVERY)
    kind = fs.AdamW if name == "numpy" else module.fst.AdamW
    real, left = kind.step, 13

    def step(self, *args, **options):
        nonlocal left
        left -= 1
        if not left:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(kind, "step", step)
    handler = signal.getsignal(signal.SIGTERM)
    module.train(tmp_path / "stopped", STEPS, EVERY)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert fs.load(tmp_path / "stopped").step == 13
    module.train(tmp_path / "stopped", STEPS, EVERY)
    assert values(tmp_path / "stopped") == values(tmp_path / "whole")
    module.train(tmp_path / "stopped", STEPS, EVERY)  # one that has ended stays as it is
    assert values(tmp_path / "stopped") == values(tmp_path / "whole")


# A cell after which the n-th call of a function sends this process a signal.
SIGNALLED = """
import itertools, signal
def call(*args, real={function}, count=itertools.count(1), **options):
    if next(count) == {n}:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **options)
{function} = call
"""


def test_notebook_is_killed_and_interrupted_and_ends_with_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel", reason="the extra `test` has it")
    nbclient = pytest.importorskip("nbclient", reason="the extra `test` has it")
    nbformat = pytest.importorskip("nbformat", reason="nbclient has it")
    # Kernels are this Python's, whichever are registered; what they keep goes to a folder here.
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    [training] = [i for i, c in enumerate(cells()) if "while opt.steps" in c["source"]]

    def run(folder, *before):
        """All cells in a new kernel; `before` each of some sources, training is run once more."""
        notebook = nbformat.read(NOTEBOOK, 4)
        train = notebook.cells[training]
        for source in reversed(before):
            cell = nbformat.v4.new_code_cell(train.source, metadata={"tags": ["raises-exception"]})
            notebook.cells[training:training] = [nbformat.v4.new_code_cell(source), cell]
        client = nbclient.NotebookClient(
            notebook, timeout=120, resources={"metadata": {"path": str(folder)}}
        )
        try:
            client.execute()
        finally:
            printed = "".join(
                one.get("text", one.get("ename", ""))
                for cell in notebook.cells
                for one in cell.get("outputs", ())
            )
        return printed

    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    monkeypatch.chdir(tmp_path / "whole")
    for _ in range(2):  # the second time there is nothing left to do
        names = {}
        for cell in cells():
            if cell["cell_type"] == "code":
                exec(cell["source"], names)
        assert names["opt"].steps == names["STEPS"] == 300

    path = tmp_path / "killed" / "resume.safetensors"
    with pytest.raises(nbclient.exceptions.DeadKernelError):
        run(path.parent, SIGNALLED.format(function="os.fsync", n=9, signal="SIGKILL"))
    step = fs.load(path).step
    assert step == 80  # of the fourth save
    in_save = SIGNALLED.format(function="os.fsync", n=5, signal="SIGINT")
    in_step = SIGNALLED.format(function="fs.AdamW.step", n=30, signal="SIGINT")
    printed = run(path.parent, in_save, in_step)
    assert f"begins at step {step}\n" in printed
    assert printed.count("KeyboardInterrupt") == 2
    assert "ends at step 300, " in printed
    assert values(path) == values(tmp_path / "whole" / "resume.safetensors")


def cells():
    found = json.loads(NOTEBOOK.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def test_notebook_is_kept_without_outputs():
    for cell in cells():
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None
