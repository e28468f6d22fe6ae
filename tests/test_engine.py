"""The engine by itself: a C++ program steps plain memory, with no Python in it."""

import sys

from test_rules import CSRC, SCALAR, TESTS, build


def test_plain_memory_is_measured_planned_and_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSEDSTEP_ISA", "scalar")
    parts = ("step/engine", "step/rules", "rules/power", "machine/dispatch", "machine/parallel")
    parts += (f"machine/process_{'windows' if sys.platform == 'win32' else 'posix'}",)
    *wrong, compared = build(
        tmp_path / "engine",
        CSRC,
        [TESTS / "native" / "engine.cpp"],
        *([CSRC / f"{part}.cpp"] for part in parts),
        [CSRC / "kernels" / "kernels.cpp", SCALAR],
    )
    assert wrong == []
    assert int(compared) == 2 * (1000 + 513 + 1025 + 7 + 40_000 + 1 + 200_001)  # by 1, 3 threads
