"""Pictures of landscapes, and of paths over them, still and moving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedstep._plot import BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, loaded
from fusedstep.convergence.arrays import Array

Window = tuple[float, float]

COLORS = (BLUE, RED, GREEN, ORANGE, PURPLE, SKY)
MARKERS = "osv^DP"
LEVELS = 24
FRAMES = 200  # of an animation at most: of a longer path some steps are left out


def draw_contours(ax: Any, landscape: Any, xlim: Window, ylim: Window) -> None:
    """Level lines of a landscape in a window, closer together where it is low; its minima."""
    x, y = np.linspace(*xlim, 240), np.linspace(*ylim, 200)
    if callable(value := getattr(landscape, "value", None)):
        grid = np.stack(np.meshgrid(x, y), -1)
        values = np.asarray(value(grid), dtype=np.float64)
        if values.shape != grid.shape[:-1]:  # of a function of one point
            values = np.apply_along_axis(value, -1, grid)
        low, high = np.nanmin(values), np.nanmax(values)
        if low < high < np.inf:
            levels = low + (high - low) * np.linspace(0, 1, LEVELS) ** 2
            ax.contourf(x, y, values, levels, cmap="Greys_r", alpha=0.45)
    minima = getattr(landscape, "minima", None) or [getattr(landscape, "minimiser", (np.nan,) * 2)]
    ax.plot(*np.transpose(minima), "*", color="w", ms=14, mec="k", ls="", zorder=5)
    ax.set(xlim=xlim, ylim=ylim, xlabel="x", ylabel="y")
    ax.grid(False)


def window(landscape: Any, paths: Sequence[Array]) -> tuple[Window, Window]:
    """What shows a landscape's own window and where the paths start; or else the whole paths."""
    limits = []
    for axis, name in enumerate(("xlim", "ylim")):
        own = getattr(landscape, name, None)
        shown = [path[:1, axis] if own else path[np.isfinite(path).all(1), axis] for path in paths]
        places = np.concatenate([*shown, own or ()])
        low, high = float(places.min()), float(places.max())
        margin = 0.1 * (high - low) or 1.0
        # The landscape's own edges are where they are.
        limits.append(
            (low if own and low == own[0] else low - margin,
             high if own and high == own[1] else high + margin)
        )  # fmt: skip
    return limits[0], limits[1]


def visible(path: Array, ax: Any) -> Array:
    """The path without what is so far away that no line to it could be drawn."""
    far = np.zeros(len(path), bool)
    for axis, (low, high) in enumerate((ax.get_xlim(), ax.get_ylim())):
        far |= ~(np.abs(path[:, axis] - (low + high) / 2) < 1e4 * abs(high - low))
    return np.where(far[:, None], np.nan, path)


def draw_paths(ax: Any, landscape: Any, paths: Sequence[Any], **line: Any) -> list[Any]:
    """The paths on the landscape, which is drawn first where the axes are still empty."""
    if not ax.has_data():
        draw_contours(ax, landscape, *window(landscape, [np.asarray(path) for path in paths]))
    taken = sum(line.get_gid() == "path" for line in ax.lines)
    lines = []
    for i, path in enumerate(paths, taken):
        look: dict[str, Any] = {
            "color": COLORS[i % len(COLORS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        look |= {"ms": 4, "lw": 1.5, "label": path.label}
        points = visible(np.asarray(path), ax)
        lines += ax.plot(*points.T, gid="path", scalex=False, scaley=False, **{**look, **line})
    ax.legend()
    return lines


def animate(path: Path, landscape: Any, paths: Sequence[Any], fps: int) -> None:
    """Saves the paths as they grow, by matplotlib's writers."""
    animation = loaded("animation")
    if path.suffix == ".gif":
        writer = animation.PillowWriter(fps=fps)
    elif animation.FFMpegWriter.isAvailable():
        writer = animation.FFMpegWriter(fps=fps)
    else:
        raise RuntimeError(f"path must end in .gif where ffmpeg is not installed, got '{path}'")
    figure, ax = canvas((6.4, 4.8))
    ax.set_title(getattr(landscape, "name", ""))
    lines = draw_paths(ax, landscape, paths)
    points = [visible(np.asarray(one), ax) for one in paths]
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # found once: it takes longer than a frame
    longest = max(map(len, points))
    frames = np.unique(np.linspace(0, longest - 1, min(longest, FRAMES)).round().astype(int))

    def grow(t: int) -> list[Any]:
        for line, one in zip(lines, points, strict=True):
            line.set_data(*one[: t + 1].T)
        ax.set_xlabel(f"x (step {t})")
        return lines

    film = animation.FuncAnimation(figure, grow, frames=frames.tolist(), repeat=False)
    film.save(path, writer=writer, dpi=100)
