"""Baselines without pruning: a frozen body with a trained head, and LoRA."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..training.checkpoints import (
    expose_resume_state,
    folders_of_step,
    save_state_with_checkpoints,
    stop_saving_state,
)
from ..tuner.head import head_modules
from ..tuner.targets import resolve_targets


def check_is_prepared(callback: TrainerCallback, prepared: Any, model: Any) -> None:
    """Raise if a callback, which has prepared one model when the Trainer was created, is now to train another.

    Raises:
        ConfigError: If they are not the same.
    """
    if prepared is not model:
        raise ConfigError(
            f"`{type(callback).__name__}` prepares the model that a Trainer is created with, and another is to be "
            "trained: give the Trainer `model=`, not `model_init=`, and create one callback for each Trainer."
        )


class FeatureExtractionCallback(TrainerCallback):
    """Freeze the body of a `Trainer`'s model and train only the head.

    The head is that of AdaPrune: everything outside of the body, and the pooler.

    Raises:
        ConfigError: If the model has no such head, or is not the one that the Trainer was created with.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Freeze all but the head."""
        heads = head_modules(model)
        if not heads:
            raise ConfigError(
                f"The {type(model).__name__} has no head that could be trained over a frozen body: use a model with a "
                "task head, such as one for sequence classification."
            )
        model.requires_grad_(False)
        for name in heads:
            model.get_submodule(name).requires_grad_(True)
        self._model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Check that the model is the frozen one."""
        check_is_prepared(self, self._model, model)


class LoraCallback(TrainerCallback):
    """Put a LoRA adapter on the linear layers that AdaPrune would mask, and train the same head (arXiv 2106.09685).

    Args:
        rank (`int`):
            The rank of each update, >= 1, also used as its `lora_alpha`. The paper has 8 for both with RoBERTa-base on
            GLUE, at learning rates of 4e-4 and 5e-4, but adapts queries and values only.

    Raises:
        ConfigError: If the model is not the one that the Trainer was created with.
    """

    def __init__(self, rank: int = 8) -> None:
        self.rank = rank
        self._model: nn.Module | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **kwargs: Any
    ) -> None:
        """Add the adapter to the Trainer's model, before its optimizer is created."""
        masked = AdaPruneConfig()
        resolve_targets(model, masked)
        targets = sorted(masked.target_modules or ())
        model.add_adapter(
            LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets, modules_to_save=head_modules(model))
        )
        self._model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Save a state to resume from with each checkpoint: the Trainer reloads no adapter of a plain model."""
        check_is_prepared(self, self._model, model)
        save_state_with_checkpoints(model, args, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put that state where the Trainer looks for it."""
        if args.should_save:
            expose_resume_state(*folders_of_step(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Restore the model's usual saving."""
        stop_saving_state(model)
