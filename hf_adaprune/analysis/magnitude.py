"""How far a mask is just magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..masks import topk_mask
from .sources import Masks


def magnitude_masks(
    masks: Masks, weights: Mapping[str, torch.Tensor], scope: str = "module"
) -> dict[str, torch.Tensor]:
    """Return the masks that keep as many weights as given ones, and of those the largest.

    Args:
        masks (`Masks`): What `load_masks` or `model_masks` returns.
        weights (`Mapping[str, torch.Tensor]`): Their weights, of the same shapes: see `model_weights`.
        scope (`str`):
            `"module"`: as many as the mask keeps, in each module. `"global"`: as many as all masks keep together, the
            largest of all weights.

    Returns:
        `dict[str, torch.Tensor]`: Boolean masks of the same shapes.

    Raises:
        ValueError: If there is no such scope.

    Example:

        >>> masks, base = load_masks("me/sst2-adaprune"), AutoModel.from_pretrained("google-bert/bert-base-uncased")
        >>> report = mask_overlap(masks, magnitude_masks(masks, model_weights(base, masks)))
        >>> {layer: found.agreement for layer, found in report.by_layer().items()}
    """
    if scope not in ("module", "global"):
        raise ValueError(f"`scope` must be 'module' or 'global', got {scope!r}.")
    sizes = {name: weights[name].abs() for name in masks}
    if scope == "module":
        return {name: topk_mask(size, int(masks[name].count_nonzero()), size) for name, size in sizes.items()}
    flat = torch.cat([size.reshape(-1) for size in sizes.values()])
    mask = topk_mask(flat, sum(int(mask.count_nonzero()) for mask in masks.values()), flat)
    parts = mask.split([size.numel() for size in sizes.values()])
    return {name: part.view(sizes[name].shape) for name, part in zip(sizes, parts, strict=True)}
