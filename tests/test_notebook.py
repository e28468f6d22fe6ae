"""The lecture's notebook runs, and what it says changes with the rate."""

import json
from pathlib import Path

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parents[1] / "docs" / "lecture" / "try-it.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_notebook_is_kept_without_outputs():
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in CELLS)


@pytest.mark.parametrize(
    ("rate", "momentum", "regimes"),
    [
        (0.05, 0.0, ["monotone", "monotone"]),
        (0.15, 0.0, ["monotone", "oscillating"]),
        (0.21, 0.0, ["monotone", "diverging"]),
        (0.21, 0.9, ["oscillating", "oscillating"]),
    ],
)
def test_regime_changes_with_the_rate(rate, momentum, regimes, capsys):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    names = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
            if "rate =" in cell["source"][0]:
                names.update(rate=rate, momentum=momentum)
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1] for line in said[:2]] == regimes
    assert np.isfinite(names["path"]).all()
    measured, predicted = said[3].removeprefix("after 40 steps: ").split(", predicted ")
    assert float(measured) == pytest.approx(float(predicted), 1e-2)


def test_notebook_runs_as_one(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel", reason="the extra `test` has it")
    nbclient = pytest.importorskip("nbclient", reason="the extra `test` has it")
    nbformat = pytest.importorskip("nbformat", reason="nbclient has it")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    notebook = nbformat.read(NOTEBOOK, 4)
    nbclient.NotebookClient(
        notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [one for cell in notebook.cells for one in cell.get("outputs", ())]
    assert any("image/png" in one.get("data", {}) for one in shown)
