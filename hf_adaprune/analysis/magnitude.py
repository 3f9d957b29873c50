"""How far a mask is just magnitude."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..choices import SCOPES
from ..training.selection import threshold_scopes, topk_masks
from .sources import Masks


def magnitude_masks(
    masks: Masks, weights: Mapping[str, torch.Tensor], scope: str = "module"
) -> dict[str, torch.Tensor]:
    """Return the masks that keep as many weights as given ones, and of those the largest.

    Args:
        masks (`Masks`): What `load_masks` or `model_masks` returns.
        weights (`Mapping[str, torch.Tensor]`): Their weights, of the same shapes: see `model_weights`.
        scope (`str`):
            Over what as many are kept, and the largest: each `"module"`, each `"kind"` of matrix over all layers, or
            the `"global"` whole.

    Returns:
        `dict[str, torch.Tensor]`: Boolean masks of the same shapes.

    Raises:
        ValueError: If there is no such scope.

    Example:

        >>> masks, base = load_masks("me/sst2-adaprune"), AutoModel.from_pretrained("google-bert/bert-base-uncased")
        >>> report = mask_overlap(masks, magnitude_masks(masks, model_weights(base, masks)))
        >>> {layer: found.agreement for layer, found in report.by_layer().items()}
    """
    if scope not in SCOPES:
        raise ValueError(f"`scope` must be one of {list(SCOPES)}, got {scope!r}.")
    sizes = {name: weights[name].abs() for name in masks}
    groups = threshold_scopes(masks, scope)
    return topk_masks(sizes, sizes, groups, [sum(int(masks[name].sum()) for name in group) for group in groups])
