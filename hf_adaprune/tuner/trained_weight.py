"""The masked weight of a layer in training, which passes the gradient on to the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..masks import apply_mask
from .binarize import sigmoid_relaxation, straight_through


if TYPE_CHECKING:
    from .layer import AdaPruneLayer


def trained_weight(layer: AdaPruneLayer, weight: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
    """Return a layer's weight times the masks of the given adapters, differentiable in the scores of those trained.

    Args:
        layer (`AdaPruneLayer`): The layer. In training mode, `forward_temperature` applies.
        weight (`torch.Tensor`): The base layer's weight.
        adapter_names (`list[str]`): The adapters whose masks apply.

    Returns:
        `torch.Tensor`: Of the weight's shape.
    """
    for name in adapter_names:
        mask = layer.mask(name)
        if not layer.is_trained(name):
            weight = apply_mask(weight, mask)
            continue
        config, scores = layer.config(name), layer.broadcast(name, layer.adaprune_scores[name])
        if config.estimator == "straight_through":
            weight = straight_through(weight, scores, mask)
        else:
            weight = sigmoid_relaxation(
                weight,
                scores,
                mask,
                backward_temperature=config.backward_temperature,
                forward_temperature=config.forward_temperature if layer.training else None,
                score_scale=config.score_lr_ratio,
            )
    return weight
