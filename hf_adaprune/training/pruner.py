"""Update a model's masks along its sparsity schedule, one optimizer step at a time."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import AdaPruneConfig
from ..errors import ConfigError, MergeError, NonFiniteError, NotPrunedError
from ..masks import pack_mask, unpack_mask
from ..storage.checks import run_checks
from ..tuner.dropout import restore_dropout, set_dropout
from ..tuner.masked_layers import adaprune_layers, chosen_adapter
from ..tuner.score_state import calibrate_scores, remake_scores, scale_scores
from ..tuner.sharding import check_sharding, full_tensor, is_sharded
from .calibration import InputMoments
from .frozen_base import check_statistics, check_vocabulary, warn_of_unsaved
from .head_learning_rate import HeadLearningRate
from .mask_selector import MaskSelector
from .replicas import check_same_masks
from .schedule import cubic_sparsity, settling


logger = logging.get_logger(__name__)

# Steps between checks that all processes have the same masks.
_CHECK_INTERVAL = 100


class Pruner:
    """Turn scores into masks after each optimizer step.

    Create it when the model is on its device and any adapter is loaded, and call `step` after each
    `optimizer.step()`. With Accelerate, pass it to `accelerator.register_for_checkpointing`.

    In training, the current masks are not in the model's buffers: a running average of the model (`AveragedModel`)
    keeps those that it was created with.

    Args:
        model (`torch.nn.Module`): A model with a trainable AdaPrune adapter, wrapped for training or not.
        total_steps (`int`): The number of optimizer steps of the run, >= 1.
        adapter_name (`str`, *optional*): The adapter to train; by default the active one.

    Raises:
        NotPrunedError: If the model has no trainable masks under that name, they are not active, or several adapters
            are and none is named.
        MergeError: If the masks are merged or disabled.
        AdapterFileError: If a loaded adapter is not the one that was saved.
        ConfigError: If the vocabulary was resized after masks were added, the base has running statistics, which
            training would change, or the model contains several adapted models.
        UnsupportedShardingError: If the model is trained under DeepSpeed or FSDP1, or whole groups under FSDP.
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

    def __init__(self, model: nn.Module, total_steps: int, adapter_name: str | None = None) -> None:
        if total_steps == float("inf") or int(total_steps) != total_steps or total_steps < 1:
            raise ValueError(f"`total_steps` must be an integer >= 1, got {total_steps!r}.")
        adapter_name = chosen_adapter(model, adapter_name)
        self.model, self.layers = model, dict(adaprune_layers(model, adapter_name))
        self.adapter_name, self.total_steps, self.num_steps = adapter_name, total_steps, 0
        self._has_stepped = False  # in this run; `num_steps` counts those of a resumed run too
        self._check_adapter()
        run_checks(model)  # before the masks change
        self.config: AdaPruneConfig = next(iter(self.layers.values())).config(adapter_name)
        if any(layer.config(adapter_name) is not self.config for layer in self.layers.values()):
            raise ConfigError(
                f"Several models in this one have an adapter {adapter_name!r}, each with its own configuration: "
                "create one `Pruner` for each."
            )
        check_vocabulary(model, self.config)
        check_statistics(model)
        warn_of_unsaved(model)
        self._selector = MaskSelector(self.layers, adapter_name, self.config)
        check_sharding(self._selector.scores(), self.config.granularity)

        self.config.in_memory.pruner_token = self._token = object()
        self._prepare_scores()
        restore_dropout(model)  # an earlier run may have been interrupted
        if self.config.training_dropout is not None:
            logger.info(f"The model is trained with a dropout of {self.config.training_dropout}.")
            set_dropout(model, self.config.training_dropout)
        self._head = HeadLearningRate(model, adapter_name, self.config.head_lr_ratio)
        self._reference: dict[str, torch.Tensor] = {}
        self._remember()
        self.config.training = None  # of an earlier run
        if self.trains_scores:
            # Training changes the masks, so the description of how they were made no longer holds.
            self.config.combination = self.config.whole_groups = None
        # Continued training starts from the adapter's masks, not from the beginning of the schedule.
        self._start_sparsity = min(self.sparsity, self.config.final_sparsity)
        self._num_weights = sum(layer.pruned_and_total(adapter_name)[1] for layer in self.layers.values())
        calibrates = self.config.score_init == "wanda" and self._start_sparsity == 0
        self._inputs = InputMoments(self.layers, adapter_name) if calibrates else None

    def _check_adapter(self) -> None:
        layers = self.layers.values()
        if not any(self.adapter_name in layer.adaprune_scores for layer in layers):
            raise NotPrunedError(
                f"The model has no trainable masks under the adapter name {self.adapter_name!r}. Create them with "
                "`peft.get_peft_model(model, AdaPruneConfig())`, or load an adapter with `is_trainable=True`."
            )
        if not all(self.adapter_name in layer.active_adapters for layer in layers):
            raise NotPrunedError(
                f"Adapter {self.adapter_name!r} is not active, so another one would be trained: call "
                f"`model.set_adapter({self.adapter_name!r})` first."
            )
        if any(layer.merged or layer.disable_adapters for layer in layers):
            raise MergeError(
                f"Adapter {self.adapter_name!r} is merged into the weights, or disabled: its masks would not be "
                "trained. First call `unmerge_adapter()`, or `enable_adapters()` (leave `disable_adapter()` of a "
                "`PeftModel`)."
            )

    @torch.no_grad()
    def _prepare_scores(self) -> None:
        """Make the scores of all layers float32, and recreate them if they do not give the current masks."""
        for scores in self._selector.scores().values():
            # Casting the model casts scores too, and in half precision small steps would not change them.
            if scores.dtype != torch.float32 and not is_sharded([scores]):
                scores.data = scores.data.float()
        self._has_new_scores = not self._selector.agrees()
        if self._has_new_scores:
            for layer in self.layers.values():
                remake_scores(layer, self.adapter_name)

    @property
    def sparsity(self) -> float:
        """The fraction of the masked weights that is currently pruned, in [0, 1]."""
        counts = [layer.pruned_and_total(self.adapter_name) for layer in self.layers.values()]
        return sum(pruned for pruned, _ in counts) / sum(total for _, total in counts)

    @property
    def target_sparsity(self) -> float:
        """The fraction that the schedule requires at the current step, and at least the initial sparsity."""
        config = self.config
        scheduled = cubic_sparsity(
            self.num_steps / self.total_steps, config.final_sparsity, config.pruning_start, config.pruning_end
        )
        return max(scheduled, self._start_sparsity)

    @property
    def is_current(self) -> bool:
        """Whether this is the latest `Pruner` of its adapter, and has not been closed."""
        return self.config.in_memory.pruner_token is self._token

    @property
    def finished(self) -> bool:
        """Whether training should end now: Algorithm 1 stops as soon as its target is exceeded."""
        return self.config.selection == "threshold" and self.sparsity > self.config.final_sparsity

    @property
    def at_target(self) -> bool:
        """Whether the target sparsity is reached; no earlier step of a run counts as its best."""
        if self.config.selection == "threshold":
            return self.finished
        # In whole weights, as in masks: a resumed run, which starts from such a count, reaches it at the same step.
        return round(self.target_sparsity * self._num_weights) == round(self.config.final_sparsity * self._num_weights)

    @property
    def trains_scores(self) -> bool:
        """Whether the scores are trainable; those of a fixed mask are not."""
        return any(scores.requires_grad for scores in self._selector.scores().values())

    def check_gradients(self) -> None:
        """Raise before an optimizer step with NaN or infinite gradients; also does what `remember_head` does.

        Do not call it under a gradient scaler (float16), which expects overflows and skips such steps by itself.

        Raises:
            NonFiniteError: If a gradient of the scores or of the head is NaN or infinite.
        """
        self.remember_head()
        gradients = [p.grad for p in (*self._selector.scores().values(), *self._head.parameters) if p.grad is not None]
        if gradients and not torch.isfinite(full_tensor(nn.utils.get_total_norm(gradients))):
            raise NonFiniteError(
                f"A gradient is NaN or infinite after step {self.num_steps} of {self.total_steps}; the model is as it "
                "was after that step and can be saved. Lower the learning rate, or look for bad values in the data."
            )

    def remember_head(self) -> None:
        """Record the head before an optimizer step: `step` scales only what has changed in it since."""
        self._head.remember()

    @torch.no_grad()
    def step(self) -> None:
        """Update the masks from the scores, after an optimizer step.

        Raises:
            ConfigError: If this `Pruner` was closed, or another was created for the adapter since.
            NotPrunedError: If, under `"threshold"`, more than `final_sparsity` is pruned before the first step.
            NonFiniteError: If a score is NaN or infinite; the masks of the previous step are kept.
            DivergenceError: If the processes have different masks (checked every 100 steps).
        """
        if not self.is_current:
            raise ConfigError(
                f"Adapter {self.adapter_name!r} must be trained by one `Pruner`, but this one was finalized or "
                "closed, or another was created since: remove the second `AdaPruneCallback`, or the `Pruner` beside a "
                "callback; for another run, create a new `Pruner`."
            )
        if self.finished:
            if not self.num_steps:
                raise NotPrunedError(
                    f"{self.sparsity:.4f} of the weights are pruned before the first step, more than "
                    f"`final_sparsity={self.config.final_sparsity}`, at which Algorithm 1 ends: there is nothing to "
                    "train. Start again from the base, with new masks."
                )
            return  # a run resumed at its end
        if self.num_steps == self.total_steps:
            logger.warning_once(
                f"The optimizer has made more steps than `total_steps={self.total_steps}`: the masks stay as they are "
                "from here on. (A Trainer that is resumed at its end makes one more step. In a loop of your own, call "
                "`Pruner.step` once after each step of the optimizer; with gradient accumulation that is not once per "
                "batch.)"
            )
            return
        self.num_steps += 1
        self._has_stepped = True
        self.config.in_memory.was_pruned = True
        self._head.scale_last_step()
        self._calibrate()
        self._settle()
        scores = self._selector.scores()
        drift = self.config.drift / self.total_steps / self.config.score_lr_ratio
        if drift:
            for score in scores.values():
                score -= drift
        self._check_scores(scores)
        by_sign = self.config.selection == "threshold"
        self._set(self._selector.by_sign() if by_sign else self._selector.at_sparsity(self.target_sparsity))
        if self.num_steps % _CHECK_INTERVAL == 0:
            self.check_masks()

    def _check_scores(self, scores: dict[str, torch.Tensor]) -> None:
        # One transfer from the device for all layers.
        finite = torch.stack([full_tensor(score.sum()) for score in scores.values()]).isfinite().tolist()
        if not all(finite):
            name = list(scores)[finite.index(False)]
            raise NonFiniteError(
                f"The scores of {name!r} are NaN or infinite at step {self.num_steps} of {self.total_steps}; the "
                "masks are those of the previous step. Lower the learning rate."
            )

    def check_masks(self) -> None:
        """Raise if the processes of a distributed run have different masks. Call it in all of them, or in none.

        Raises:
            DivergenceError: If the masks differ.
        """
        check_same_masks(self._selector.masks(), self.num_steps)

    @torch.no_grad()
    def finalize(self) -> None:
        """End the run, and prune to `final_sparsity` if it was not reached.

        A run that was cut short, or drifted too little, is below its target. Its lowest scores are then pruned, with
        a warning, as nothing was trained after that. The model's own dropout is restored. In a distributed run, call
        it in all processes.

        Raises:
            DivergenceError: If the processes have different masks.
        """
        for layer in self.layers.values():
            scale_scores(layer, self.adapter_name, 1.0)  # another run may follow
        # A run that was resumed at its end, as a shorter one, has taken no step at its target.
        if not (self.at_target and self._has_stepped):
            self._prune_to_target()
        self.close()
        self.check_masks()

    def close(self) -> None:
        """Remove the hooks from the model and restore its own dropout; the masks stay as they are.

        No `step` may follow.
        """
        self._close_inputs()
        self._head.close()
        if self.is_current:
            self.config.in_memory.pruner_token = None
            restore_dropout(self.model)
            for layer in self.layers.values():
                layer.pack(self.adapter_name)

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
        """Prune the lowest scores: exactly a fraction `sparsity`, in [0, 1], of all masked weights.

        Whole groups are pruned to the nearest number possible.

        Raises:
            ValueError: If `sparsity` is not in [0, 1].
        """
        if not 0 <= sparsity <= 1:
            raise ValueError(f"`sparsity` must be in [0, 1], got {sparsity}.")
        self.config.in_memory.was_pruned = True
        self._set(self._selector.at_sparsity(sparsity))

    def pop_flip_rate(self) -> float:
        """Return the share of mask entries that changed since the last call, or the resumption, in [0, 1]."""
        masks, flipped = self._selector.masks(), 0
        for name, mask in masks.items():
            flipped += int((mask ^ unpack_mask(self._reference[name], mask.shape)).count_nonzero())
            self._reference[name] = pack_mask(mask)
        return flipped / sum(mask.numel() for mask in masks.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides the model's state: the number of steps taken."""
        return {"num_steps": self.num_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from a state; call it after loading the model's own state."""
        self.num_steps = state_dict["num_steps"]
        self._settle()
        if self.num_steps:
            self._close_inputs()
            if self._has_new_scores and not self.config.in_memory.scores_loaded:
                warnings.warn(
                    "The scores behind the masks are lost: an adapter is stored without them, a checkpoint has them "
                    "in `model.safetensors`. Training continues from the masks, and its result will differ.",
                    stacklevel=2,
                )
        self._remember()

    def _set(self, masks: dict[str, torch.Tensor]) -> None:
        for name, mask in masks.items():
            self.layers[name].set_mask(self.adapter_name, mask)

    def _remember(self) -> None:
        masks = self._selector.masks()
        # Packed to save memory: it is only unpacked for logging.
        self._reference = {name: pack_mask(mask) for name, mask in masks.items()}
        # Keep the layers' masks unpacked from the start: a later change would recompile a compiled model.
        self._set(masks)
        self._head.remember()

    def _calibrate(self) -> None:
        if self._inputs is None:
            return
        seen = self._inputs.pop()
        if not seen and any(layer.input_dim is not None for layer in self.layers.values()):
            logger.warning_once(
                "No masked layer had an input before the first step: scores start from the weights alone. Create the "
                "`Pruner` before the first forward pass."
            )
        for name, moments in seen.items():
            calibrate_scores(self.layers[name], self.adapter_name, moments)
        self._inputs = None

    def _close_inputs(self) -> None:
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None

    def _settle(self) -> None:
        # Only the order of scores matters: scaling them up shortens later steps, whatever the optimizer.
        if self.config.settles:
            progress = min(self.num_steps, self.total_steps - 1) / self.total_steps
            for layer in self.layers.values():
                scale_scores(layer, self.adapter_name, 1 / settling(progress, self.config.pruning_end))
