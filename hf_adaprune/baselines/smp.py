"""Masks over frozen weights, trained with the recipe of Static Model Pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..training.schedule import cubic_sparsity
from .score_steps import ScoreStepsCallback


class SMPCallback(ScoreStepsCallback):
    """Adapt the model of a `Trainer` by pruning alone, with the recipe of SMP (Jiang et al., arXiv 2210.06210).

    Scores start from a constant, with ties broken by |w|, and have straight-through gradients. Each kind of matrix has
    one threshold; the cubic ramp covers the first six tenths of training. Scores have a learning rate of 2e-2, and a
    penalty on their mean sigmoid grows over the whole run. The paper trains for 12 to 100 epochs and freezes a head of
    label words; here the head is trained, as AdaPrune trains it at the Trainer's learning rate of 5e-5. There is no
    distillation.

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).
        score_learning_rate (`float`): The learning rate of the scores, > 0.
        max_penalty (`float`): The factor of the penalty at the end of training, >= 0.

    Raises:
        ConfigError: If an argument is out of range, or the model computes no loss to add the penalty to.
    """

    def __init__(
        self, final_sparsity: float = 0.5, score_learning_rate: float = 2e-2, max_penalty: float = 400.0
    ) -> None:
        config = AdaPruneConfig(
            final_sparsity=final_sparsity, scope="kind", score_init="constant", dropout=None, settle=False
        )
        super().__init__(config, score_learning_rate)
        if not max_penalty >= 0:
            raise ConfigError(f"`max_penalty` must not be negative, got {max_penalty}.")
        self.max_penalty = max_penalty
        self._hook: RemovableHandle | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the penalty to the model's loss."""
        super().on_train_begin(args, state, control, model, **kwargs)
        if self._hook is not None:  # left by an interrupted run
            self._hook.remove()
        self._hook = model.register_forward_hook(self._penalize)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove the penalty from the loss, and end at exactly the requested sparsity."""
        if self._hook is not None:
            self._hook.remove()
        super().on_train_end(args, state, control, **kwargs)

    def penalty(self) -> torch.Tensor:
        """Return the current penalty: a factor times the mean, over matrices, of the mean sigmoid(score)."""
        pruner = self._running
        factor = self.max_penalty * cubic_sparsity(pruner.num_steps / pruner.total_steps, 1.0)
        means = [self._in_own_unit(layer.adaprune_scores[self.adapter_name]) for layer in pruner.layers.values()]
        return factor * torch.stack([scores.sigmoid().mean() for scores in means]).mean()

    def _in_own_unit(self, scores: torch.Tensor) -> torch.Tensor:
        # Scores are stored divided by `score_lr_ratio`. Scale the value but not the gradient, as for the task loss.
        return scores + ((self.config.score_lr_ratio - 1) * scores).detach()

    def _penalize(self, model: nn.Module, args: Any, output: Any) -> None:
        # A run that raised leaves the hook behind.
        if not (model.training and torch.is_grad_enabled() and self._running.is_current):
            return
        if getattr(output, "loss", None) is None:
            raise ConfigError(
                "The penalty of SMP is added to the loss that the model computes, but it computed none: train without "
                "`label_smoothing_factor`, and with labels in the data."
            )
        output.loss = output.loss + self.penalty()
