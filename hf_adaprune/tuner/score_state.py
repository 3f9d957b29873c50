"""The scores of a masked layer while it is trained: made anew from inputs or a mask, and grown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..training.scores import elimination_ranks, scores_from_mask, wanda_ranks
from ..training.sharding import copy_to_shards, full_tensor


if TYPE_CHECKING:
    from .layer import AdaPruneLayer


@torch.no_grad()
def calibrate_scores(layer: AdaPruneLayer, adapter_name: str, moments: torch.Tensor) -> None:
    """Start the scores anew, from the weights and what `InputMoments` has seen of this layer's inputs."""
    assert layer.input_dim is not None
    groups = layer.groups(adapter_name)
    if groups is None:
        ranks = wanda_ranks(full_tensor(layer.base_weight), moments.sqrt(), layer.input_dim)
    else:
        ranks = elimination_ranks(groups.interactions(moments))
    copy_to_shards(layer.adaprune_scores[adapter_name], ranks / layer.config(adapter_name).score_lr_ratio)


@torch.no_grad()
def scale_scores(layer: AdaPruneLayer, adapter_name: str, growth: float) -> None:
    """Let the scores be so many times as large as they were made: in the same order, and less moved by a step."""
    stored = layer.adaprune_score_scale[adapter_name]
    before, after = float(stored), float(stored.fill_(growth))
    if before != after:
        layer.adaprune_scores[adapter_name] *= after / before


def remake_scores(layer: AdaPruneLayer, adapter_name: str) -> None:
    """Make scores that stand for the adapter's mask.

    The scores of an adapter are not saved with it. One that is loaded to be trained on has a mask, and the scores
    of a fresh adapter, or none.
    """
    scores = layer.adaprune_scores[adapter_name]
    weight, mask = layer.entry_weights(adapter_name), layer.scored_mask(adapter_name)
    made = scores_from_mask(weight, mask, layer.config(adapter_name))
    if scores.is_meta:
        layer.adaprune_scores[adapter_name] = nn.Parameter(made, requires_grad=scores.requires_grad)
    else:
        copy_to_shards(scores.data, made)
    layer.adaprune_score_scale[adapter_name] = torch.ones((), device=made.device)
