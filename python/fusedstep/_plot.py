"""What draws: matplotlib, which only those who draw need."""

from __future__ import annotations

from typing import Any


def new_axes() -> Any:
    """Axes on a new figure, or ModuleNotFoundError that says what to install."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot needs matplotlib: pip install 'fusedstep[plot]'", name="matplotlib"
        ) from error
    axes = plt.subplots(layout="constrained")[1]
    axes.grid(alpha=0.3)
    return axes
