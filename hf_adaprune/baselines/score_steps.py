"""Scores with a learning rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..training.callback import AdaPruneCallback


class ScoreStepsCallback(AdaPruneCallback):
    """Move scores by a learning rate that is given, whatever the Trainer's is.

    Args:
        config (`AdaPruneConfig`): What is pruned, how much of it and when.
        score_learning_rate (`float`): The learning rate of the scores, > 0.

    Raises:
        ConfigError: If it is not positive, or the Trainer's is not, which it is a multiple of.
    """

    config: AdaPruneConfig

    def __init__(self, config: AdaPruneConfig, score_learning_rate: float) -> None:
        super().__init__(config)
        if not score_learning_rate > 0:
            raise ConfigError(f"`score_learning_rate` must be greater than 0, got {score_learning_rate}.")
        self.score_learning_rate = score_learning_rate

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Put masks on the Trainer's model, before its optimizer is made."""
        if not args.learning_rate > 0:
            raise ConfigError(
                f"`learning_rate` must be greater than 0, got {args.learning_rate}: that of the scores is set as a "
                "multiple of it."
            )
        self.config.score_lr_ratio = self.score_learning_rate / args.learning_rate
        super().on_init_end(args, state, control, model, **kwargs)
