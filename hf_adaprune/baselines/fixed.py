"""Fixed masks: only the head is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..training.callback import AdaPruneCallback
from ..training.pruner import Pruner
from ..tuner.masked_layers import adaprune_layers


def global_masks(final_sparsity: float, **schedule: Any) -> AdaPruneConfig:
    """Return a configuration with one threshold for all masks, whose scores no optimizer trains."""
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
    """Count steps without changing the masks."""

    finished = False

    def step(self) -> None:
        """Count the step; the head is trained at the optimizer's own rate, whatever `head_lr_ratio` is."""
        self.num_steps += 1

    def finalize(self) -> None:
        """End the run; the masks stay as they are."""
        self.close()


class FixedMaskCallback(AdaPruneCallback):
    """Train the head of a model while its masks stay as they are."""

    pruner_cls = FixedMaskPruner

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Set the scores to the masks and freeze them, before the Trainer's optimizer is created."""
        super().on_init_end(args, state, control, model, **kwargs)
        for _, layer in adaprune_layers(model, self.adapter_name):
            if self.adapter_name in layer.adaprune_scores:
                scores = layer.adaprune_scores[self.adapter_name].requires_grad_(False)
                scores.copy_(layer.scored_mask(self.adapter_name))


class RandomMaskCallback(FixedMaskCallback):
    """Prune random weights of the Trainer's model, drawn with the Trainer's seed, and train only the head.

    `Rnd` of "Adapting by Pruning" (arXiv 2105.03343), except that exactly `final_sparsity` of all masked weights are
    pruned, where the paper prunes each with that probability. Use the learning rate of feature extraction, 1e-3.

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
        """Add masks to the Trainer's model and draw them at random."""
        super().on_init_end(args, state, control, model, **kwargs)
        generator = torch.Generator().manual_seed(args.seed)
        for _, layer in adaprune_layers(model, self.adapter_name):
            scores = layer.adaprune_scores[self.adapter_name]
            scores.copy_(torch.rand(scores.shape, generator=generator))
        pruner = Pruner(model, 1, self.adapter_name)
        pruner.prune_to(pruner.config.final_sparsity)
        pruner.close()
