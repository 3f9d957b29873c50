"""Heat maps with a text in each cell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage


def draw_heat_map(axes: Axes, grid: Any, texts: Sequence[Sequence[str]], highest: float = 1.0) -> AxesImage:
    """Draw a grid of numbers as colours, with a text in each cell.

    Args:
        axes (`matplotlib.axes.Axes`): The axes to draw on; ticks and titles are left to the caller.
        grid (`numpy.ndarray` or lists): Numbers in [0, `highest`], of shape `(rows, columns)`; NaN leaves a gap.
        texts (`Sequence[Sequence[str]]`): The text of each cell, of the same shape.
        highest (`float`): The number that has the darkest colour.

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
