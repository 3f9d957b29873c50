"""Masks that no training moves: only the head learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..training.callback import AdaPruneCallback
from ..training.dropout import restore_dropout
from ..training.pruner import Pruner
from ..tuner.masked_layers import adaprune_layers


def global_masks(final_sparsity: float, **schedule: Any) -> AdaPruneConfig:
    """Return the configuration of masks under one threshold whose scores no optimizer moves."""
    return AdaPruneConfig(
        final_sparsity=final_sparsity,
        scope="global",
        score_init="constant",
        score_lr_ratio=1.0,
        dropout=None,
        settle=False,
        **schedule,
    )


class FixedMaskPruner(Pruner):
    """Count steps, and leave the masks as they are."""

    finished = False

    def step(self) -> None:
        """Count: the head learns at the optimizer's own rate, whatever `head_lr_ratio` is."""
        self.num_steps += 1

    def finalize(self) -> None:
        """Leave the masks as they are; give the model its own dropout again."""
        restore_dropout(self.model)


class FixedMaskCallback(AdaPruneCallback):
    """Train the head of a model with an adapter whose masks stay as they are."""

    pruner_cls = FixedMaskPruner

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Freeze the scores, before the Trainer's optimizer is made."""
        super().on_init_end(args, state, control, model, **kwargs)
        for _, layer in adaprune_layers(model, self.adapter_name):
            if self.adapter_name in layer.adaprune_scores:
                scores = layer.adaprune_scores[self.adapter_name].requires_grad_(False)
                scores.copy_(layer.scored_mask(self.adapter_name))


class RandomMaskCallback(FixedMaskCallback):
    """Prune weights of the Trainer's model at random, with the Trainer's seed, and train the head alone.

    `Rnd` of "Adapting by Pruning" (arXiv 2105.03343), with exactly `final_sparsity` of all masked weights pruned where
    the paper prunes each with that probability. The learning rate that suits is that of feature extraction: 1e-3.

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).

    Raises:
        ConfigError: If `final_sparsity` is out of range.
    """

    def __init__(self, final_sparsity: float = 0.5) -> None:
        super().__init__(global_masks(final_sparsity))

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Put masks on the Trainer's model and draw them."""
        super().on_init_end(args, state, control, model, **kwargs)
        generator = torch.Generator().manual_seed(args.seed)
        for _, layer in adaprune_layers(model, self.adapter_name):
            scores = layer.adaprune_scores[self.adapter_name]
            scores.copy_(torch.rand(scores.shape, generator=generator))
        assert self.config is not None
        Pruner(model, 1, self.adapter_name).prune_to(self.config.final_sparsity)
