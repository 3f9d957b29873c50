"""Singular values of masked matrices, compared with those under random masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from .sources import Masks, check_matrices


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one matrix, largest first.

    Args:
        name (`str`): The module's name.
        masked (`numpy.ndarray`): Those of the masked matrix, of shape `(min(outputs, inputs),)`.
        random (`numpy.ndarray`): Those under random masks of the same sparsity, of shape `(masks, min(...))`.
        dense (`numpy.ndarray`): Those of the unmasked matrix, of shape `(min(outputs, inputs),)`.
    """

    name: str
    masked: NDArray[np.float64]
    random: NDArray[np.float64]
    dense: NDArray[np.float64]

    @property
    def effective_rank(self) -> dict[str, float]:
        """The exponential of the entropy of the normalised singular values (Roy and Vetterli, 2007), by kind.

        In [1, `min(outputs, inputs)`], or 0 if everything is pruned; for the random masks, their mean.
        """
        return {
            "masked": _effective_rank(self.masked),
            "random": float(np.mean([_effective_rank(values) for values in self.random])),
            "dense": _effective_rank(self.dense),
        }


def _effective_rank(values: NDArray[np.float64]) -> float:
    share = values[values > 0] / max(values.sum(), np.finfo(float).tiny)
    return float(np.exp(-(share * np.log(share)).sum())) if share.size else 0.0


def mask_spectrum(
    masks: Masks, weights: Mapping[str, torch.Tensor] | None = None, *, num_random: int = 3, seed: int = 0
) -> dict[str, Spectrum]:
    """Return the singular values of masked matrices, and those under random masks of the same sparsity.

    Args:
        masks (`Masks`): Masks as returned by `load_masks` or `model_masks`; pass a subset to analyse fewer modules.
        weights (`Mapping[str, torch.Tensor]`, *optional*):
            The weights under the masks, of the same shapes: see `model_weights`. `None` stands for ones, which gives
            the spectra of the masks themselves and needs no base.
        num_random (`int`): The number of random masks per module, >= 1.
        seed (`int`): The seed of the random masks.

    Returns:
        `dict[str, Spectrum]`: The singular values, by module.

    Raises:
        ValueError: If a mask is not a matrix, or `num_random` is not positive.
    """
    check_matrices(masks)
    if num_random < 1:
        raise ValueError(f"`num_random` must be at least 1, got {num_random}.")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, mask in masks.items():
        weight = torch.ones(mask.shape) if weights is None else weights[name].cpu().float()
        flat = mask.cpu().reshape(-1)
        shuffled = [
            flat[torch.randperm(flat.numel(), generator=generator)].view(mask.shape) for _ in range(num_random)
        ]
        values = [_singular_values(weight * other) for other in (mask.cpu(), *shuffled)]
        found[name] = Spectrum(name, values[0], np.stack(values[1:]), _singular_values(weight))
    return found


def _singular_values(matrix: torch.Tensor) -> NDArray[np.float64]:
    return torch.linalg.svdvals(matrix).double().numpy()


def plot_spectrum(found: Spectrum) -> Figure:
    """Draw the singular values of one matrix.

    Args:
        found (`Spectrum`): One of the values in the result of `mask_spectrum`.

    Returns:
        `matplotlib.figure.Figure`: A figure without a window; save it with `savefig`.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.add_subplot()
    rank = np.arange(1, found.masked.size + 1)
    axes.plot(rank, found.dense, color="grey", linewidth=1, label="not pruned")
    axes.plot(rank, found.masked, color="tab:blue", label="mask")
    axes.plot(rank, found.random.mean(0), color="black", linestyle="--", linewidth=1, label="random masks")
    axes.fill_between(rank, found.random.min(0), found.random.max(0), color="black", alpha=0.2, linewidth=0)
    axes.set_xlabel("rank")
    axes.set_ylabel("singular value")
    axes.set_ylim(bottom=0)
    axes.set_title(found.name, fontsize=10)
    axes.spines[["right", "top"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
