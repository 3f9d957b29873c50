"""Connection recovery, as the paper calls it: weights that come back after they were pruned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..tuner.masked_layers import has_masks
from .sources import Masks, model_masks


class Recovery:
    """Count weights that were pruned and came back, from the masks of one run in chronological order.

    Changes between two of these masks are not seen: from the masks of a few checkpoints the shares are lower bounds,
    from those after every step they are exact. A single stored adapter does not contain this information.

    Example:

        >>> recovery = Recovery()
        >>> for batch in loader:
        ...     ...
        ...     pruner.step()
        ...     recovery.update(model_masks(model))
        >>> recovery.share_of_kept
    """

    def __init__(self) -> None:
        self._ever_pruned: dict[str, torch.Tensor] = {}
        self._masks: dict[str, torch.Tensor] = {}

    @classmethod
    def of(cls, history: Iterable[Masks]) -> Recovery:
        """Return the recovery over a whole run.

        Args:
            history (`Iterable[Masks]`): Masks in chronological order, such as `load_masks` of each checkpoint.

        Returns:
            `Recovery`: The recovery up to the last of them.
        """
        recovery = cls()
        for masks in history:
            recovery.update(masks)
        return recovery

    def update(self, masks: Masks) -> None:
        """Add the next masks of the run."""
        for name, mask in masks.items():
            earlier = self._ever_pruned.get(name)
            self._ever_pruned[name] = ~mask if earlier is None else earlier | ~mask
        self._masks = dict(masks)

    def recovered(self) -> dict[str, torch.Tensor]:
        """Return, for each module, which weights are kept now and were pruned before: boolean, of the mask's shape."""
        return {name: mask & self._ever_pruned[name] for name, mask in self._masks.items()}

    @property
    def share_of_kept(self) -> float:
        """The share of the weights kept now that were pruned before, in [0, 1].

        The paper reports .123 on MNLI at a sparsity of .99.
        """
        return self._recovered / max(1, sum(int(mask.count_nonzero()) for mask in self._masks.values()))

    @property
    def share_of_pruned(self) -> float:
        """The share of the weights ever pruned that are kept now, in [0, 1]."""
        return self._recovered / max(1, sum(int(mask.count_nonzero()) for mask in self._ever_pruned.values()))

    @property
    def _recovered(self) -> int:
        return sum(int(mask.count_nonzero()) for mask in self.recovered().values())


class RecoveryCallback(TrainerCallback):
    """Record recovery in a `Trainer` exactly, from the masks after every step.

    Args:
        adapter_name (`str`, *optional*): Which adapter of the model; by default the active one.

    Example:

        >>> watch = RecoveryCallback()
        >>> Trainer(model, args, train_dataset=data, callbacks=[AdaPruneCallback, watch]).train()
        >>> watch.recovery.share_of_kept
    """

    def __init__(self, adapter_name: str | None = None) -> None:
        self.adapter_name, self.recovery = adapter_name, Recovery()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the masks after this step."""
        self.recovery.update(model_masks(model, self.adapter_name))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add the masks that training ends with, if they are still there."""
        if has_masks(model):
            self.recovery.update(model_masks(model, self.adapter_name))
