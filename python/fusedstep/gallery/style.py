"""How the gallery's pictures look."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedstep import _plot
from fusedstep._plot import BLUE, GREEN, ORANGE, PURPLE, RED, SKY

__all__ = [
    "BLUE", "GREEN", "GREY", "ORANGE", "PURPLE", "RED", "SKY", "canvas", "walk",
]  # fmt: skip

GREY = "#666666"


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 4), **grid: Any) -> Any:
    """A figure and its axes in the gallery's style."""
    figure, axes = _plot.canvas(size, rows, columns, **grid)
    for ax in np.ravel(axes):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def walk(ax: Any, path: Any, label: str, color: str, marker: str = "o") -> None:
    """A trajectory, a mark for each step."""
    ax.plot(path[:, 0], path[:, 1], color=color, marker=marker, ms=3.5, lw=1.4, label=label)
