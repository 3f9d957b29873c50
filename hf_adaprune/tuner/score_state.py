"""The scores of a masked layer in training: initialized from inputs or from a mask, and rescaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from .scores import elimination_ranks, scores_from_mask, wanda_ranks
from .sharding import copy_to_shards, full_tensor


if TYPE_CHECKING:
    from .layer import AdaPruneLayer


@torch.no_grad()
def calibrate_scores(layer: AdaPruneLayer, adapter_name: str, moments: torch.Tensor) -> None:
    """Reinitialize the scores from the weights and this layer's input moments (`InputMoments`)."""
    assert layer.input_dim is not None
    groups = layer.groups(adapter_name)
    if groups is None:
        ranks = wanda_ranks(full_tensor(layer.base_weight), moments.sqrt(), layer.input_dim)
    else:
        ranks = elimination_ranks(groups.interactions(moments))
    copy_to_shards(layer.adaprune_scores[adapter_name], ranks / layer.config(adapter_name).score_lr_ratio)


@torch.no_grad()
def scale_scores(layer: AdaPruneLayer, adapter_name: str, growth: float) -> None:
    """Scale the scores to `growth` times their initial size, so that a step changes their order less."""
    stored = layer.adaprune_score_scale[adapter_name]
    before, after = float(stored), float(np.float32(growth))
    if before != after:
        stored.fill_(after)
        layer.adaprune_scores[adapter_name] *= after / before


def remake_scores(layer: AdaPruneLayer, adapter_name: str) -> None:
    """Initialize scores that match the adapter's mask.

    Scores are not saved with an adapter. One that is loaded for further training has its mask, but the scores of a new
    adapter, or unmaterialized ones.
    """
    scores = layer.adaprune_scores[adapter_name]
    weight, mask = layer.entry_weights(adapter_name), layer.scored_mask(adapter_name)
    made = scores_from_mask(weight, mask, layer.config(adapter_name))
    if scores.is_meta:
        layer.adaprune_scores[adapter_name] = nn.Parameter(made, requires_grad=scores.requires_grad)
    else:
        copy_to_shards(scores.data, made)
    layer.adaprune_score_scale[adapter_name] = torch.ones((), device=made.device)
