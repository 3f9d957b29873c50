"""Moves a model along its sparsity schedule, one optimizer step at a time."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import AdaPruneConfig
from ..errors import ConfigError, MergeError, NonFiniteError, NotPrunedError
from ..storage.checks import check_statistics, check_vocabulary, run_checks
from ..tuner.masked_layers import adaprune_layers
from ..tuner.masks import pack_mask, unpack_mask
from ..tuner.score_state import calibrate_scores, remake_scores, scale_scores
from .calibration import InputMoments
from .dropout import restore_dropout, set_dropout
from .head_learning_rate import HeadLearningRate
from .mask_selector import MaskSelector
from .pruner_reminder import remove_reminder
from .replicas import check_same_masks
from .schedule import cubic_sparsity, settling
from .sharding import check_sharding, full_tensor, is_sharded


logger = logging.get_logger(__name__)

# How often a run of several processes sees whether they all have the same masks, in steps.
_CHECK_INTERVAL = 100


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
        MergeError: If they are merged, or disabled.
        AdapterFileError: If what was loaded is not what was saved.
        ConfigError: If the model has got other tokens since masks were put on it, or has layers that change in any
            forward pass of training.
        UnsupportedShardingError: If it is trained under DeepSpeed or FSDP1.
        ValueError: If `total_steps` is not positive.

    Example:

        >>> model.train()
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
        self.model, self.layers = model, dict(adaprune_layers(model, adapter_name))
        if not any(adapter_name in layer.adaprune_scores for layer in self.layers.values()):
            raise NotPrunedError(
                f"The model has no trainable masks under the adapter name {adapter_name!r}. Make them with "
                "`peft.get_peft_model(model, AdaPruneConfig())`, or load an adapter with `is_trainable=True`."
            )
        self.adapter_name, self.total_steps, self.num_steps = adapter_name, total_steps, 0
        if not all(adapter_name in layer.active_adapters for layer in self.layers.values()):
            raise NotPrunedError(
                f"Adapter {adapter_name!r} is not active, so what is trained would be another one: call "
                f"`model.set_adapter({adapter_name!r})` first."
            )
        if any(layer.merged or layer.disable_adapters for layer in self.layers.values()):
            raise MergeError(
                f"Adapter {adapter_name!r} is merged into the weights, or disabled: its masks would not be trained. "
                "First call `unmerge_adapter()`, or `enable_adapters()` (leave `disable_adapter()` of a `PeftModel`)."
            )
        run_checks(model)  # before the masks change
        remove_reminder(model, adapter_name)
        self.config: AdaPruneConfig = next(iter(self.layers.values())).config(adapter_name)
        self.config.pruner_token = self._token = object()
        check_vocabulary(model, self.config)
        check_statistics(model)
        self._selector = MaskSelector(self.layers, adapter_name, self.config)
        check_sharding(self._selector.scores(), self.config.granularity)
        for scores in self._selector.scores().values():
            # Whoever casts the model casts them too, and in half precision they would stand still under small steps.
            if scores.dtype != torch.float32 and not is_sharded([scores]):
                scores.data = scores.data.float()
        self._match_scores_to_masks()
        restore_dropout(model)  # a run may have been broken off
        if self.config.training_dropout is not None:
            set_dropout(model, self.config.training_dropout)
        self._head = HeadLearningRate(model, adapter_name, self.config.head_lr_ratio)
        self._reference: dict[str, torch.Tensor] = {}
        self._remember()
        if self.trains_scores:
            # What was said of the masks when they were made is not true of them for long.
            self.config.combination = self.config.whole_groups = None
        # An adapter that is trained on starts from its mask, and not from the schedule's beginning.
        self._start_sparsity = min(self.sparsity, self.config.final_sparsity)
        self._num_weights = sum(layer.pruned_and_total(adapter_name)[1] for layer in self.layers.values())
        calibrates = self.config.score_init == "wanda" and self._start_sparsity == 0
        self._inputs = InputMoments(self.layers, adapter_name) if calibrates else None

    @property
    def sparsity(self) -> float:
        """The fraction of the masked weights that is pruned now, in [0, 1]."""
        counts = [layer.pruned_and_total(self.adapter_name) for layer in self.layers.values()]
        return sum(pruned for pruned, _ in counts) / sum(total for _, total in counts)

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

    @property
    def at_target(self) -> bool:
        """Whether the model is as sparse as it is to be: before that, no step of a run is its best."""
        if self.config.selection == "threshold":
            return self.finished
        # Counted, as masks are: so it comes at the same step in a resumed run, which begins at what was counted.
        return round(self.target_sparsity * self._num_weights) == round(self.config.final_sparsity * self._num_weights)

    @property
    def trains_scores(self) -> bool:
        """Whether an optimizer may move the scores: of a mask that is fixed it may not."""
        return any(scores.requires_grad for scores in self._selector.scores().values())

    def check_gradients(self) -> None:
        """Raise before a step that would ruin the model.

        Under a gradient scaler (float16) leave it out: an overflow is ordinary there, and skips the step by itself.

        Raises:
            NonFiniteError: If a gradient of the scores or of the head is NaN or infinite.
        """
        gradients = [p.grad for p in (*self._selector.scores().values(), *self._head.parameters) if p.grad is not None]
        if gradients and not torch.isfinite(full_tensor(nn.utils.get_total_norm(gradients))):
            raise NonFiniteError(
                f"A gradient is NaN or infinite after step {self.num_steps} of {self.total_steps}; the model is as it "
                "was after that step and can be saved. Lower the learning rate, or look for bad values in the data."
            )

    @torch.no_grad()
    def step(self) -> None:
        """Make the next masks from the scores that the optimizer has just moved.

        Raises:
            ConfigError: If another `Pruner` has been made for the adapter since.
            NotPrunedError: If more was pruned before the first step than ever should be.
            NonFiniteError: If a score is NaN or infinite; the masks are then those of the step before.
            DivergenceError: If the processes have come to different masks (looked for every 100 steps).
        """
        if self.config.pruner_token is not self._token:
            raise ConfigError(
                f"Adapter {self.adapter_name!r} must be trained by one `Pruner`, and another has been made for it "
                "since: leave out the second `AdaPruneCallback`, or the `Pruner` beside a callback."
            )
        if self.finished:
            if not self.num_steps:
                raise NotPrunedError(
                    f"{self.sparsity:.4f} of the weights are pruned before the first step, more than "
                    f"`final_sparsity={self.config.final_sparsity}`, at which Algorithm 1 ends: there is nothing to "
                    "train. Put masks on the base anew."
                )
            return  # a run that is resumed where it ended
        if self.num_steps == self.total_steps:
            logger.warning_once(
                f"`Pruner.step` has been called more often than `total_steps={self.total_steps}`. Call it once after "
                "each step of the optimizer; where gradients are accumulated that is not once a batch."
            )
        self.num_steps += 1
        self.config.has_pruner = True
        self._head.scale_last_step()
        self._calibrate()
        self._settle()
        scores = self._selector.scores()
        drift = self.config.drift / self.total_steps / self.config.score_lr_ratio
        for name, score in scores.items():
            if drift:
                score -= drift
            if not torch.isfinite(full_tensor(score.sum())):
                raise NonFiniteError(
                    f"The scores of {name!r} are NaN or infinite at step {self.num_steps} of {self.total_steps}; its "
                    "masks are as they were after the step before. Lower the learning rate."
                )
        by_sign = self.config.selection == "threshold"
        self._set(self._selector.by_sign() if by_sign else self._selector.at_sparsity(self.target_sparsity))
        if self.num_steps % _CHECK_INTERVAL == 0:
            self.check_masks()

    def check_masks(self) -> None:
        """Raise if the processes of a distributed run have different masks. Call it in all of them, or in none.

        Raises:
            DivergenceError: If they have.
        """
        check_same_masks(self._selector.masks(), self.num_steps)

    @torch.no_grad()
    def finalize(self) -> None:
        """End the run at `final_sparsity`, to the last weight, whatever came between.

        A run that was cut short, or drifted too little, is below its target. Its lowest scores are pruned then, with
        a warning: nothing was trained after that. The model has its own dropout again. In a distributed run all
        processes call this.

        Raises:
            DivergenceError: If the processes have different masks.
        """
        self._close_inputs()
        self._head.close()
        restore_dropout(self.model)
        for layer in self.layers.values():
            scale_scores(layer, self.adapter_name, 1.0)  # another run may follow
        if not self.at_target:
            self._prune_to_target()
        self.check_masks()

    def _prune_to_target(self) -> None:
        before, sparsity, target = self._selector.masks(), self.sparsity, self.config.final_sparsity
        self.prune_to(target)
        if self.sparsity <= sparsity:
            self._set(before)
            return
        warnings.warn(
            f"Training ended at a sparsity of {sparsity:.4f}, below `final_sparsity={target}`: the lowest scores were "
            "pruned to reach it, and nothing was trained after that. Train longer, or lower `pruning_end`; under "
            '`selection="threshold"`, raise `drift` or the learning rate.',
            stacklevel=3,
        )

    @torch.no_grad()
    def prune_to(self, sparsity: float) -> None:
        """Keep the highest scores, so many that exactly a fraction `sparsity` in [0, 1] of all masked weights goes.

        Of whole groups, as many go as come nearest to that.
        """
        self.config.has_pruner = True
        self._set(self._selector.at_sparsity(sparsity))

    def pop_flip_rate(self) -> float:
        """Return the share of mask entries that changed since the last call, in [0, 1]."""
        masks, flipped = self._selector.masks(), 0
        for name, mask in masks.items():
            flipped += int((mask ^ unpack_mask(self._reference[name], mask.shape)).count_nonzero())
            self._reference[name] = pack_mask(mask)
        return flipped / sum(mask.numel() for mask in masks.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the model: the number of steps taken."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state; call it after the model's own state was loaded."""
        self.num_steps = state_dict["num_steps"]
        self._settle()
        if self.num_steps:
            self._close_inputs()
            if self._has_new_scores:
                warnings.warn(
                    "The scores behind the masks are lost: an adapter is stored without them, a checkpoint has them "
                    "in `model.safetensors`. Training goes on from the masks, and ends otherwise than it would have.",
                    stacklevel=2,
                )
        self._remember()

    def _set(self, masks: dict[str, torch.Tensor]) -> None:
        for name, mask in masks.items():
            self.layers[name].set_mask(self.adapter_name, mask)

    def _remember(self) -> None:
        masks = self._selector.masks()
        # Packed: in training memory is scarce, and logs are rare.
        self._reference = {name: pack_mask(mask) for name, mask in masks.items()}
        # Unpacked from the first step on: a compiled model would be compiled anew where that changes.
        self._set(masks)
        self._head.remember()

    def _calibrate(self) -> None:
        if self._inputs is None:
            return
        seen = self._inputs.pop()
        if not seen and any(layer.input_dim is not None for layer in self.layers.values()):
            logger.warning_once(
                "No masked layer had an input before the first step: scores start from the weights alone. Make the "
                "`Pruner` before the forward pass of that step."
            )
        for name, moments in seen.items():
            calibrate_scores(self.layers[name], self.adapter_name, moments)
        self._inputs = None

    def _close_inputs(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None

    def _settle(self) -> None:
        # Only the order of scores counts: to let them grow is to shorten the steps to come, whatever the optimizer.
        if self.config.settles:
            progress = min(self.num_steps, self.total_steps - 1) / self.total_steps
            for layer in self.layers.values():
                scale_scores(layer, self.adapter_name, 1 / settling(progress, self.config.pruning_end))

    @torch.no_grad()
    def _match_scores_to_masks(self) -> None:
        """Make scores that stand for the masks where those at hand do not: in all layers, which share thresholds."""
        self._has_new_scores = not self._selector.agrees()
        if self._has_new_scores:
            for layer in self.layers.values():
                remake_scores(layer, self.adapter_name)
