"""How many connections each neuron has left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .names import component_of, grouped
from .sources import Masks, check_matrices


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Degrees:
    """How many weights each neuron of one module keeps.

    Args:
        name (`str`): The module's name.
        in_degrees (`numpy.ndarray`):
            Integers of shape `(outputs,)`: the number of weights kept in each row of the mask. The rows of an
            embedding are tokens.
        out_degrees (`numpy.ndarray`): Integers of shape `(inputs,)`: the number kept in each column.
    """

    name: str
    in_degrees: NDArray[np.int64]
    out_degrees: NDArray[np.int64]

    @property
    def density(self) -> float:
        """The share of the module's weights that is kept, in [0, 1]."""
        return float(self.in_degrees.sum() / (self.in_degrees.size * self.out_degrees.size))

    @property
    def dead_outputs(self) -> NDArray[np.int64]:
        """Outputs whose weights are all pruned: only the bias of such a neuron is left."""
        return np.flatnonzero(self.in_degrees == 0)

    @property
    def dead_inputs(self) -> NDArray[np.int64]:
        """Inputs whose weights are all pruned."""
        return np.flatnonzero(self.out_degrees == 0)

    @property
    def chance_dead(self) -> tuple[float, float]:
        """The expected numbers of dead outputs and inputs if each weight were kept with the same probability."""
        outputs, inputs = self.in_degrees.size, self.out_degrees.size
        return outputs * (1 - self.density) ** inputs, inputs * (1 - self.density) ** outputs

    @property
    def dispersion(self) -> tuple[float, float]:
        """The variances of the in- and out-degrees over those of a random mask: 1 by chance, more if uneven.

        NaN if nothing or everything is pruned, or if there is only one output or input.
        """
        outputs, inputs = self.in_degrees.size, self.out_degrees.size
        spread = self.density * (1 - self.density)
        if not spread:
            return float("nan"), float("nan")
        # The fixed sum of all degrees makes their variance smaller than the binomial one; `ddof=1` corrects for that.
        return (
            float(self.in_degrees.var(ddof=1) / (inputs * spread)) if outputs > 1 else float("nan"),
            float(self.out_degrees.var(ddof=1) / (outputs * spread)) if inputs > 1 else float("nan"),
        )


def neuron_degrees(masks: Masks) -> dict[str, Degrees]:
    """Count the connections that each neuron keeps.

    Args:
        masks (`Masks`): Masks as returned by `load_masks` or `model_masks`, of shape `(outputs, inputs)` each.

    Returns:
        `dict[str, Degrees]`: The counts, by module.

    Raises:
        ValueError: If a mask is not a matrix.

    Example:

        >>> {name: len(found.dead_outputs) for name, found in neuron_degrees(load_masks("me/sst2-adaprune")).items()}
    """
    check_matrices(masks)
    return {
        name: Degrees(name, mask.sum(1, dtype=torch.int64).cpu().numpy(), mask.sum(0, dtype=torch.int64).cpu().numpy())
        for name, mask in masks.items()
    }


def plot_degrees(found: Mapping[str, Degrees] | Iterable[Degrees]) -> Figure:
    """Draw the degree distributions of each component over all layers, with those of random masks.

    Args:
        found (`Mapping[str, Degrees]` or `Iterable[Degrees]`): The result of `neuron_degrees`, or its values.

    Returns:
        `matplotlib.figure.Figure`: A figure without a window; save it with `savefig`.
    """
    from matplotlib.figure import Figure

    pools = _same_shapes(found.values() if isinstance(found, Mapping) else found)
    figure = Figure(figsize=(7.2, 0.6 + 1.25 * len(pools)), layout="constrained")
    grid = figure.subplots(len(pools), 2, squeeze=False)
    for row, (title, modules) in zip(grid, pools.items(), strict=True):
        fans = [modules[0].out_degrees.size, modules[0].in_degrees.size]
        pooled = [
            np.concatenate([module.in_degrees for module in modules]),
            np.concatenate([module.out_degrees for module in modules]),
        ]
        for axes, values, fan in zip(row, pooled, fans, strict=True):
            _draw_degrees(axes, values, fan)
        row[0].set_ylabel(title.replace(".", ".\n"), rotation=0, ha="right", va="center", fontsize=9)
    for axes, title in zip(grid[0], ("inputs kept by a neuron", "outputs kept by an input"), strict=True):
        axes.set_title(title, fontsize=10)
    boxes = [axes.dataLim for axes in grid.flat]
    for axes in grid.flat:
        axes.set_xlim(min(box.x0 for box in boxes) - 0.02, max(box.x1 for box in boxes) + 0.02)
    for axes in grid[-1]:
        axes.set_xlabel("share kept")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower right", ncols=2, frameon=False, fontsize=9)
    return figure


def _same_shapes(found: Iterable[Degrees]) -> dict[str, list[Degrees]]:
    """Group modules by component, and by shape where the layers differ in it, as those of a compacted model do."""
    pools: dict[str, list[Degrees]] = {}
    for component, modules in grouped(found, component_of).items():
        shapes: dict[str, list[Degrees]] = defaultdict(list)
        for module in modules:
            shapes[f"{module.in_degrees.size} x {module.out_degrees.size}"].append(module)
        pools |= {f"{component}\n{shape}" if len(shapes) > 1 else component: same for shape, same in shapes.items()}
    return pools


def _draw_degrees(axes: Any, values: NDArray[np.int64], fan: int) -> None:
    from scipy import stats

    # Bins cover whole numbers of counts: other edges would draw stripes.
    step = -(-fan // 48)
    edges = np.arange(-0.5, fan + step, step)
    random = np.diff(stats.binom(fan, values.mean() / fan).cdf(edges))
    counts = np.histogram(values, edges)[0] / values.size
    seen = (counts > 0) | (random > 1e-3)
    centres = ((edges[1:] + edges[:-1]) / 2 / fan)[seen]
    axes.bar(centres, counts[seen], step / fan, color="tab:blue", label="mask")
    axes.plot(centres, random[seen], color="black", linewidth=1, label="random mask")
    axes.set_yticks([])
    axes.spines[["left", "right", "top"]].set_visible(False)
