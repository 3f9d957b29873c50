"""Magnitude pruning: gradual (MP), or iterative with rewinding (IMP)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from ..errors import ConfigError
from ..training.pruner import Pruner
from .fixed import FixedMaskPruner, global_masks
from .trained import TrainedWeightsCallback


class MagnitudePruner(Pruner):
    """Prune by |w| every hundredth of a run until the target is reached."""

    def __init__(self, model: nn.Module, total_steps: int, adapter_name: str | None = None) -> None:
        super().__init__(model, total_steps, adapter_name)
        self._interval = max(1, total_steps // 100)

    @torch.no_grad()
    def step(self) -> None:
        """Update the masks, if an interval has passed."""
        step = self.num_steps + 1
        if step % self._interval == 0 and step - self._interval < self.config.pruning_end * self.total_steps:
            for layer in self.layers.values():
                layer.adaprune_scores[self.adapter_name].copy_(layer.base_weight.abs())
            super().step()
        else:
            self.num_steps = step


class MagnitudeCallback(TrainedWeightsCallback):
    """Train the weights of a `Trainer`'s model and gradually prune the smallest.

    Gradual magnitude pruning (Zhu and Gupta, arXiv 1710.01878; `MP` of arXiv 2105.03343), with one threshold for all
    matrices. A pruned weight keeps its value behind the mask, and returns if others become smaller before the ramp
    ends. The ramp is that of magnitude pruning in "Movement Pruning" (arXiv 2005.07683): from one tenth to eight
    tenths of training. Use the learning rate of fine-tuning.

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).

    Raises:
        ConfigError: If `final_sparsity` is out of range.
    """

    pruner_cls = MagnitudePruner
    trains_scores = False

    def __init__(self, final_sparsity: float = 0.5) -> None:
        super().__init__(global_masks(final_sparsity, pruning_start=0.1, pruning_end=0.8))


class IterativeMagnitudeCallback(TrainedWeightsCallback):
    """Train, prune the smallest weights, rewind the others to their initial values, and repeat.

    Iterative magnitude pruning with rewinding (Frankle and Carbin, arXiv 1803.03635; for BERT, Chen et al., arXiv
    2007.12223; `IMP` of arXiv 2105.03343), with one threshold for all matrices. Each round is a full run of the
    Trainer, from the same initial weights and head; the last one trains at the target sparsity. Use the learning rate
    of fine-tuning.

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).
        rate (`float`): The fraction of the remaining weights to remove between two rounds, in (0, 1).

    Raises:
        ConfigError: If an argument is out of range, or a run is resumed from a checkpoint.

    Example:

        >>> callback = IterativeMagnitudeCallback(final_sparsity=0.5)
        >>> trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])
        >>> for _ in range(callback.num_rounds):
        ...     trainer.train()
    """

    pruner_cls = FixedMaskPruner
    trains_scores = False

    def __init__(self, final_sparsity: float = 0.5, rate: float = 0.2) -> None:
        super().__init__(global_masks(final_sparsity))
        if not 0 < rate < 1:
            raise ConfigError(f"`rate` must be in (0, 1), got {rate}.")
        self._sparsities = [0.0]
        while self._sparsities[-1] < final_sparsity:
            # Rounded: floating-point error could otherwise miss a target such as 0.2 and add a round.
            following = round(1 - (1 - rate) ** len(self._sparsities), 9)
            self._sparsities.append(min(following, final_sparsity))
        self._round = 0
        self._schedule: tuple[dict[str, Any], list[float]] | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Begin with the first round: the callback may have served another Trainer before."""
        self._round, self.pruner, self._schedule = 0, None, None
        super().on_init_end(args, state, control, model, **kwargs)

    @property
    def num_rounds(self) -> int:
        """How many times `Trainer.train` has to be called."""
        return len(self._sparsities)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Prune the smallest weights of the previous round, and rewind the model to its initial values."""
        if state.global_step:
            raise ConfigError(
                "The rounds of iterative pruning cannot be resumed from a checkpoint, which stores one round only: "
                "train without `resume_from_checkpoint`."
            )
        if self.pruner is not None and self._round < self.num_rounds:
            for layer in self.pruner.layers.values():
                remaining = layer.base_weight.detach() * layer.mask(self.adapter_name)
                layer.adaprune_scores[self.adapter_name].data.copy_(remaining.abs())
            self.pruner.prune_to(self._sparsities[self._round])
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(self._initial[name])
            kwargs["optimizer"].state.clear()
        self._restart_schedule(kwargs["optimizer"], kwargs["lr_scheduler"])
        super().on_train_begin(args, state, control, model=model, **kwargs)

    def _restart_schedule(self, optimizer: Any, schedule: Any) -> None:
        """Begin each round with the learning rates of the first: the Trainer recreates only schedules of its own."""
        if self._schedule is None:
            rates = [group["lr"] for group in optimizer.param_groups]
            self._schedule = copy.deepcopy(schedule.state_dict()), rates
        state, rates = self._schedule
        schedule.load_state_dict(copy.deepcopy(state))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last round, turn the model into a plain one with zeros."""
        self._round += 1  # only now: an interrupted round is to be repeated
        if self._round == self.num_rounds:
            super().on_train_end(args, state, control, **kwargs)
