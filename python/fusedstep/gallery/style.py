"""How the gallery's pictures look: colours that colour-blind readers tell apart, and contours."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusedstep import _plot

# Okabe & Ito 2008.
BLUE, RED, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
GREY = "#666666"


def canvas(rows: int = 1, columns: int = 1, size: tuple[float, float] = (9, 4), **grid: Any) -> Any:
    """A figure and its axes in the gallery's style."""
    figure, axes = _plot.canvas(size, rows, columns, **grid)
    for ax in np.ravel(axes):
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def contours(ax: Any, landscape: Any, levels: int = 24) -> None:
    """Level lines of a landscape in its window, closer together where it is low; its minima."""
    (left, right), (bottom, top) = landscape.xlim, landscape.ylim
    x, y = np.linspace(left, right, 240), np.linspace(bottom, top, 200)
    values = landscape.value(np.stack(np.meshgrid(x, y), -1))
    low, high = values.min(), values.max()
    ax.contourf(x, y, values, low + (high - low) * np.linspace(0, 1, levels) ** 2, cmap="Greys_r",
                alpha=0.45)  # fmt: skip
    ax.plot(*np.transpose(landscape.minima), "*", color="w", ms=14, mec="k", ls="", zorder=5)
    ax.set_xlim(landscape.xlim)
    ax.set_ylim(landscape.ylim)
    ax.set_xlabel("x")
    ax.set_ylabel("y")
    ax.grid(False)


def walk(ax: Any, path: Any, label: str, color: str, marker: str = "o") -> None:
    """A trajectory, a mark for each step."""
    ax.plot(path[:, 0], path[:, 1], color=color, marker=marker, ms=3.5, lw=1.4, label=label)
