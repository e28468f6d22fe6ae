"""Drawing, by matplotlib, which only those who draw need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Okabe & Ito 2008: colours that colour-blind readers tell apart.
BLUE, RED, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1, **grid: Any) -> Any:
    """A figure to be saved, outside pyplot, which keeps none of it, and its axes."""
    figure = loaded("figure").Figure(figsize=size, layout="constrained")
    loaded("backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **grid)


def new_axes() -> Any:
    """Axes on a figure of pyplot's, to be shown; or an error that says what to install."""
    axes = loaded("pyplot").subplots(layout="constrained")[1]
    axes.grid(alpha=0.3)
    return axes


def as_axes(value: Any) -> Any:
    """`value` if it is Axes, or TypeError."""
    if not hasattr(value, "semilogx"):
        raise TypeError(f"ax must be matplotlib Axes, got {value!r}")
    return value


def loaded(module: str) -> Any:
    """A module of matplotlib's, or an error that says what to install."""
    try:
        return import_module(f"matplotlib.{module}")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot needs matplotlib: pip install 'fusedstep[plot]'", name="matplotlib"
        ) from error
