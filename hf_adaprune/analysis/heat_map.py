"""A grid of shares, each in its colour and in figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def draw_heat_map(axes: Axes, grid: Any, texts: Sequence[Sequence[str]], highest: float = 1.0) -> AxesImage:
    """Draw a grid of numbers, each with a text over it.

    Args:
        axes (`matplotlib.axes.Axes`): Where to; ticks and titles are the caller's.
        grid (`numpy.ndarray` or lists): Numbers in [0, `highest`], of shape `(rows, columns)`; NaN leaves a gap.
        texts (`Sequence[Sequence[str]]`): What to write over each, of the same shape.
        highest (`float`): The number of the darkest colour.

    Returns:
        `matplotlib.image.AxesImage`: The image, for a colour bar.
    """
    numbers = np.asarray(grid, dtype=float)
    image = axes.imshow(numbers, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    for (row, column), number in np.ndenumerate(numbers):
        if not np.isnan(number):
            color = "white" if number > 0.6 * highest else "black"
            axes.text(column, row, texts[row][column], ha="center", va="center", fontsize=9, color=color)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return image
