"""Moves a model along its sparsity schedule, one optimizer step at a time."""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .calibration import InputNorms
from .config import AdaPruneConfig
from .errors import NonFiniteError, NotPrunedError
from .layer import adaprune_layers
from .masks import sparsity_of, topk_mask
from .schedule import cubic_sparsity


class Pruner:
    """Turn scores into masks after each optimizer step.

    Make it once the model is where it trains and any checkpoint is loaded, and call `step` after each
    `optimizer.step()`. With Accelerate, hand it to `accelerator.register_for_checkpointing`.

    Args:
        model (`torch.nn.Module`): A model with a trainable AdaPrune adapter, wrapped for training or not.
        total_steps (`int`): How many optimizer steps the run has, >= 1.
        adapter_name (`str`): Which adapter is trained.

    Raises:
        NotPrunedError: If the model has no trainable masks under that name.
        ValueError: If `total_steps` is not positive.

    Example:

        >>> pruner = Pruner(model, total_steps=len(loader) * epochs)
        >>> for batch in loader:
        ...     model(**batch).loss.backward()
        ...     pruner.check_gradients()
        ...     optimizer.step()
        ...     pruner.step()
        ...     optimizer.zero_grad()
        >>> pruner.finalize()
    """

    def __init__(self, model: nn.Module, total_steps: int, adapter_name: str = "default") -> None:
        if total_steps < 1:
            raise ValueError(f"`total_steps` must be at least 1, got {total_steps}.")
        self.layers = dict(adaprune_layers(model, adapter_name))
        if not any(adapter_name in layer.adaprune_scores for layer in self.layers.values()):
            raise NotPrunedError(
                f"The model has no trainable masks under the adapter name {adapter_name!r}. Make them with "
                "`peft.get_peft_model(model, AdaPruneConfig())`, or load an adapter with `is_trainable=True`."
            )
        self.adapter_name, self.total_steps, self.num_steps = adapter_name, total_steps, 0
        self.config: AdaPruneConfig = next(iter(self.layers.values())).config(adapter_name)
        if sum(layer.match_scores_to_mask(adapter_name) for layer in self.layers.values()):
            warnings.warn(
                "The scores behind the loaded masks are not stored: training goes on from the masks.", stacklevel=2
            )
        self._head = [
            parameter
            for module in model.modules()
            if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
            for parameter in module.modules_to_save[adapter_name].parameters()
        ]
        self._reference: dict[str, torch.Tensor] = {}
        self._remember()
        # An adapter that is trained on starts from its mask, and not from the schedule's beginning.
        self._start_sparsity = min(self.sparsity, self.config.final_sparsity)
        calibrates = self.config.score_init == "wanda" and self._start_sparsity == 0
        self._input_norms = InputNorms(self.layers) if calibrates else None

    @property
    def sparsity(self) -> float:
        """The fraction of the masked weights that is pruned now, in [0, 1]."""
        return sparsity_of(self._masks().values())

    @property
    def target_sparsity(self) -> float:
        """The fraction that the schedule wants pruned now, and no less than was to begin with."""
        config = self.config
        scheduled = cubic_sparsity(
            self.num_steps / self.total_steps, config.final_sparsity, config.pruning_start, config.pruning_end
        )
        return max(scheduled, self._start_sparsity)

    @property
    def finished(self) -> bool:
        """Whether training should end now: Algorithm 1 stops as soon as its target is exceeded."""
        return self.config.selection == "threshold" and self.sparsity > self.config.final_sparsity

    def check_gradients(self) -> None:
        """Raise before a step that would ruin the model.

        Raises:
            NonFiniteError: If a gradient of the scores or of the head is NaN or infinite.
        """
        gradients = [p.grad for p in (*self._scores().values(), *self._head) if p.grad is not None]
        if gradients and not torch.isfinite(nn.utils.get_total_norm(gradients)):
            raise NonFiniteError(
                f"A gradient is NaN or infinite after step {self.num_steps} of {self.total_steps}; the model is as it "
                "was after that step and can be saved. Lower the learning rate, or look for bad values in the data."
            )

    @torch.no_grad()
    def step(self) -> None:
        """Make the next masks from the scores that the optimizer has just moved.

        Raises:
            NonFiniteError: If a score is NaN or infinite; the masks are then those of the step before.
        """
        self.num_steps += 1
        self._scale_head_update()
        self._calibrate()
        scores = self._scores()
        drift = self.config.drift / self.total_steps / self.config.score_lr_ratio
        for name, score in scores.items():
            if drift:
                score -= drift
            if not torch.isfinite(score.sum()):
                raise NonFiniteError(
                    f"The scores of {name!r} are NaN or infinite at step {self.num_steps} of {self.total_steps}; its "
                    "masks are as they were after the step before. Lower the learning rate."
                )
        if self.config.selection == "threshold":
            masks = {name: score > 0 for name, score in scores.items()}
        else:
            masks = self._topk_masks(self.target_sparsity)
        self._set(masks)

    @torch.no_grad()
    def finalize(self) -> None:
        """End the run at `final_sparsity`, to the last weight, whatever came between.

        A run that was cut short, or drifted too little, is below its target. Its lowest scores are pruned then, with
        a warning: nothing was trained after that.
        """
        sparsity, target = self.sparsity, self.config.final_sparsity
        num_weights = sum(mask.numel() for mask in self._masks().values())
        if round(sparsity * num_weights) >= round(target * num_weights):
            return
        warnings.warn(
            f"Training ended at a sparsity of {sparsity:.4f}, below `final_sparsity={target}`: the lowest scores were "
            "pruned to reach it, and nothing was trained after that. Train longer, or lower `pruning_end`; under "
            '`selection="threshold"`, raise `drift` or the learning rate.',
            stacklevel=2,
        )
        self.prune_to(target)

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """Keep the highest scores, so many that exactly a fraction `sparsity` in [0, 1] of all masked weights goes."""
        self._set(self._topk_masks(sparsity))

    def pop_flip_rate(self) -> float:
        """Return the share of mask entries that changed since the last call, in [0, 1]."""
        masks = self._masks()
        flipped = sum(int((mask ^ self._reference[name]).count_nonzero()) for name, mask in masks.items())
        self._reference = masks
        return flipped / sum(mask.numel() for mask in masks.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model: the number of steps taken."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; call it after the model's own state was loaded."""
        self.num_steps = state_dict["num_steps"]
        if self._input_norms is not None and self.num_steps:
            self._input_norms.close()
            self._input_norms = None
        self._remember()

    def _masks(self) -> dict[str, torch.Tensor]:
        return {name: layer.mask(self.adapter_name) for name, layer in self.layers.items()}

    def _scores(self) -> dict[str, torch.Tensor]:
        return {name: layer.adaprune_scores[self.adapter_name] for name, layer in self.layers.items()}

    def _set(self, masks: dict[str, torch.Tensor]) -> None:
        for name, mask in masks.items():
            self.layers[name].set_mask(self.adapter_name, mask)

    def _remember(self) -> None:
        self._reference = self._masks()
        self._previous_head = [parameter.detach().clone() for parameter in self._head]

    def _calibrate(self) -> None:
        if self._input_norms is None:
            return
        for name, norm in self._input_norms.pop().items():
            self.layers[name].calibrate_scores(self.adapter_name, norm)
        self._input_norms = None

    def _scale_head_update(self) -> None:
        # A stock Trainer has one learning rate. What the optimizer did to the head is carried on in its direction:
        # for every optimizer whose step is proportional to the learning rate, that is a larger learning rate.
        ratio = self.config.head_lr_ratio
        if ratio != 1:
            for parameter, previous in zip(self._head, self._previous_head, strict=True):
                parameter.copy_(previous + ratio * (parameter - previous))
                previous.copy_(parameter)

    def _topk_masks(self, sparsity: float) -> dict[str, torch.Tensor]:
        groups: dict[str, list[str]] = defaultdict(list)
        for name in self.layers:
            groups[self._group(name)].append(name)
        scores, masks = self._scores(), {}
        seen = pruned = 0
        for names in groups.values():
            shapes = [scores[name].shape for name in names]
            # Rounding the running total, and not each group, makes the whole exact.
            seen += sum(shape.numel() for shape in shapes)
            to_prune, pruned = round(sparsity * seen) - pruned, round(sparsity * seen)
            grouped = _flat([scores[name] for name in names])
            weights = _flat([self.layers[name].weight for name in names])
            mask = topk_mask(grouped, grouped.numel() - to_prune, weights)
            parts = mask.split([shape.numel() for shape in shapes])
            masks.update({name: part.view(shape) for name, part, shape in zip(names, parts, shapes, strict=True)})
        return masks

    def _group(self, name: str) -> str:
        if self.config.scope == "global":
            return ""
        return re.sub(r"\.\d+(?=\.)", "", name) if self.config.scope == "kind" else name


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
