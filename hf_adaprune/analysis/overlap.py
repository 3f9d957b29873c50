"""Overlap of masks, compared with the overlap expected by chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from .heat_map import draw_heat_map
from .names import component_of, grouped, layer_of
from .sources import Masks


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Overlap:
    """Overlap of two masks over the same weights.

    The chance level is that of two masks with these two sparsities whose entries are independent of each other.

    Args:
        name (`str`): The module, component or layer that is masked; empty for all.
        num_weights (`int`): The number of weights, > 0.
        num_kept (`tuple[int, int]`): How many each mask keeps.
        num_both (`int`): How many both keep.
    """

    name: str
    num_weights: int
    num_kept: tuple[int, int]
    num_both: int

    @property
    def agreement(self) -> float:
        """The share of weights that both keep or both prune, in [0, 1]."""
        return 1 - (sum(self.num_kept) - 2 * self.num_both) / self.num_weights

    @property
    def chance_agreement(self) -> float:
        """The agreement expected by chance."""
        first, second = (kept / self.num_weights for kept in self.num_kept)
        return first * second + (1 - first) * (1 - second)

    @property
    def kappa(self) -> float:
        """Cohen's kappa, in [-1, 1]: 0 by chance, 1 for equal masks; NaN if both keep, or prune, everything."""
        possible = 1 - self.chance_agreement
        return (self.agreement - self.chance_agreement) / possible if possible else float("nan")

    @property
    def jaccard(self) -> float:
        """The Jaccard index: kept by both over kept by either, in [0, 1]; NaN if both prune everything."""
        return _jaccard(self.num_kept, self.num_both)

    @property
    def chance_jaccard(self) -> float:
        """The Jaccard index at the number of commonly kept weights expected by chance."""
        return _jaccard(self.num_kept, self.num_kept[0] * self.num_kept[1] / self.num_weights)


def _jaccard(num_kept: tuple[int, int], num_both: float) -> float:
    either = sum(num_kept) - num_both
    return num_both / either if either else float("nan")


@dataclass(frozen=True)
class OverlapReport:
    """Overlap of the masks of two adapters.

    Args:
        modules (`tuple[Overlap, ...]`): One entry per module.
    """

    modules: tuple[Overlap, ...]

    @property
    def whole(self) -> Overlap:
        """The overlap over all modules; masks that prune the same *modules* most agree here by more than chance."""
        return _sum("", list(self.modules))

    def by_component(self) -> dict[str, Overlap]:
        """Return the overlap in each component, over all layers."""
        return {name: _sum(name, group) for name, group in grouped(self.modules, component_of).items()}

    def by_layer(self) -> dict[str, Overlap]:
        """Return the overlap in each layer, over all components."""
        return {name: _sum(name, group) for name, group in grouped(self.modules, layer_of).items()}


def _sum(name: str, overlaps: list[Overlap]) -> Overlap:
    return Overlap(
        name,
        sum(overlap.num_weights for overlap in overlaps),
        (sum(overlap.num_kept[0] for overlap in overlaps), sum(overlap.num_kept[1] for overlap in overlaps)),
        sum(overlap.num_both for overlap in overlaps),
    )


def mask_overlap(first: Masks, second: Masks) -> OverlapReport:
    """Compare the masks of two adapters of the same base.

    Args:
        first (`Masks`): Masks as returned by `load_masks` or `model_masks`.
        second (`Masks`): The masks of another adapter: of another task, method, seed or sparsity.

    Returns:
        `OverlapReport`: The counts, module by module.

    Raises:
        ValueError: If the two do not mask the same weights.

    Example:

        >>> report = mask_overlap(load_masks("me/sst2-adaprune"), load_masks("me/mrpc-adaprune"))
        >>> report.whole.jaccard, report.whole.chance_jaccard, report.whole.kappa
    """
    sizes = [{name: mask.numel() for name, mask in masks.items()} for masks in (first, second)]
    differing = sorted(name for name in {**first, **second} if sizes[0].get(name) != sizes[1].get(name))
    if differing or not first:
        raise ValueError(
            f"Two adapters must mask the same weights to be compared; they differ in {differing}, out of {len(first)} "
            f"and {len(second)} modules. Give only the modules that both of them mask."
        )
    return OverlapReport(
        tuple(
            Overlap(
                name,
                mask.numel(),
                (int(mask.count_nonzero()), int(second[name].count_nonzero())),
                int((mask.reshape(-1) & second[name].reshape(-1).to(mask.device)).count_nonzero()),
            )
            for name, mask in first.items()
        )
    )


def pairwise_overlap(adapters: Mapping[str, Masks]) -> dict[tuple[str, str], OverlapReport]:
    """Compare each pair of adapters.

    Args:
        adapters (`Mapping[str, Masks]`): The masks of each adapter, by display name.

    Returns:
        `dict[tuple[str, str], OverlapReport]`: One report for each pair of names, in the order given.

    Raises:
        ValueError: If there are fewer than two adapters, or they do not mask the same weights.
    """
    if len(adapters) < 2:
        raise ValueError(f"A comparison takes at least two adapters, got {len(adapters)}.")
    return {pair: mask_overlap(adapters[pair[0]], adapters[pair[1]]) for pair in combinations(adapters, 2)}


def plot_overlap(pairs: Mapping[tuple[str, str], OverlapReport], measure: str = "kappa") -> Figure:
    """Draw an overlap measure of each pair of adapters.

    Args:
        pairs (`Mapping[tuple[str, str], OverlapReport]`): The result of `pairwise_overlap`.
        measure (`str`):
            `"kappa"`, `"jaccard"` or `"agreement"`, over all weights; for the latter two the chance level is
            shown in brackets.

    Returns:
        `matplotlib.figure.Figure`: A figure without a window; save it with `savefig`.

    Raises:
        ValueError: If `measure` is none of these.
    """
    from matplotlib.figure import Figure

    if measure not in ("kappa", "jaccard", "agreement"):
        raise ValueError(f"`measure` must be 'kappa', 'jaccard' or 'agreement', got {measure!r}.")
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    grid = [[float("nan")] * (len(names) - 1) for _ in names[1:]]
    texts = [[""] * (len(names) - 1) for _ in names[1:]]
    longest = max(map(len, names))
    side = 1.1 * (len(names) - 1)
    figure = Figure(figsize=(0.5 + side + 0.1 * longest, 0.8 + 0.7 * side + 0.06 * longest), layout="constrained")
    axes = figure.add_subplot()
    for (first, second), report in pairs.items():
        row, column = names.index(second) - 1, names.index(first)
        value = grid[row][column] = getattr(report.whole, measure)
        texts[row][column] = f"{value:.2f}"
        if measure != "kappa":
            texts[row][column] += f"\n({getattr(report.whole, f'chance_{measure}'):.2f})"
    draw_heat_map(axes, grid, texts)
    axes.set_xticks(range(len(names) - 1), names[:-1], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names) - 1), names[1:])
    label = {"kappa": "Cohen's kappa", "jaccard": "Jaccard index (by chance)", "agreement": "agreement (by chance)"}
    axes.set_title(label[measure], fontsize=11, loc="left")
    return figure
