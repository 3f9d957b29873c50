"""Training with an absolute learning rate for the scores."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..training.callback import AdaPruneCallback


class ScoreStepsCallback(AdaPruneCallback):
    """Train the scores at a given learning rate, independent of the Trainer's.

    Args:
        config (`AdaPruneConfig`): The pruning configuration; its `score_lr_ratio` is overwritten.
        score_learning_rate (`float`): The learning rate of the scores, > 0.

    Raises:
        ConfigError: If `score_learning_rate` or the Trainer's learning rate is not positive.
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
        """Add masks to the Trainer's model, before its optimizer is created."""
        if not args.learning_rate > 0:
            raise ConfigError(
                f"`learning_rate` must be greater than 0, got {args.learning_rate}: the learning rate of the "
                "scores is set as a multiple of it."
            )
        self.config.score_lr_ratio = self.score_learning_rate / args.learning_rate
        super().on_init_end(args, state, control, model, **kwargs)
