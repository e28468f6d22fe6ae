"""Drawing, by matplotlib, which only those who draw need."""

from __future__ import annotations

from typing import Any


def canvas(size: tuple[float, float], rows: int = 1, columns: int = 1, **grid: Any) -> Any:
    """A figure to be saved, outside pyplot, which keeps none of it, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **grid)


def new_axes() -> Any:
    """Axes on a figure of pyplot's, to be shown; or an error that says what to install."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot needs matplotlib: pip install 'fusedstep[plot]'", name="matplotlib"
        ) from error
    axes = plt.subplots(layout="constrained")[1]
    axes.grid(alpha=0.3)
    return axes
