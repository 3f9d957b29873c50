"""Which weights are kept where layers share a threshold, on one device or sharded over many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from .masks import topk_mask
from .sharding import is_sharded, sharded_topk_masks


def topk_masks(
    scores: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    groups: Sequence[Sequence[str]],
    num_kept: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Keep, in each group of layers, exactly as many entries of highest score as are asked for.

    Args:
        scores (`Mapping[str, torch.Tensor]`): Finite scores of each layer, whole or sharded over processes.
        weights (`Mapping[str, torch.Tensor]`): The layers' weights, by which ties are broken as in `topk_mask`.
        groups (`Sequence[Sequence[str]]`): The layers that share a threshold; each is in one group.
        num_kept (`Sequence[int]`): How many entries of each group to keep.

    Returns:
        `dict[str, torch.Tensor]`: A boolean mask for each layer, of the shape of its scores; whole in every process.
    """
    if is_sharded(scores.values()):
        return sharded_topk_masks(scores, weights, groups, num_kept)
    masks = {}
    for names, count in zip(groups, num_kept, strict=True):
        mask = topk_mask(_flat([scores[name] for name in names]), count, _flat([weights[name] for name in names]))
        parts = mask.split([scores[name].numel() for name in names])
        masks.update({name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)})
    return masks


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
