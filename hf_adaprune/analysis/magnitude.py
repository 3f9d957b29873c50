"""Magnitude masks, to compare learned masks with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import torch

from ..choices import Scope
from ..tuner.selection import threshold_scopes, topk_masks
from .sources import Masks


def magnitude_masks(
    masks: Masks, weights: Mapping[str, torch.Tensor], scope: Scope = "module"
) -> dict[str, torch.Tensor]:
    """Return masks that keep the largest weights, in the same number as given masks keep.

    Args:
        masks (`Masks`): Masks as returned by `load_masks` or `model_masks`.
        weights (`Mapping[str, torch.Tensor]`): The weights under the masks, of the same shapes: see `model_weights`.
        scope (`str`):
            Where the number of kept weights is matched and the largest are chosen: in each `"module"`, in each
            `"kind"` of matrix over all layers, or over all masks together (`"global"`).

    Returns:
        `dict[str, torch.Tensor]`: Boolean masks of the same shapes.

    Raises:
        ValueError: If `scope` is none of these.

    Example:

        >>> masks, base = load_masks("me/sst2-adaprune"), AutoModel.from_pretrained("google-bert/bert-base-uncased")
        >>> report = mask_overlap(masks, magnitude_masks(masks, model_weights(base, masks)))
        >>> {layer: found.agreement for layer, found in report.by_layer().items()}
    """
    if scope not in get_args(Scope):
        raise ValueError(f"`scope` must be one of {list(get_args(Scope))}, got {scope!r}.")
    sizes = {name: weights[name].abs() for name in masks}
    groups = threshold_scopes(masks, scope)
    return topk_masks(sizes, sizes, groups, [sum(int(masks[name].sum()) for name in group) for group in groups])
