"""Pruning in a stock `Trainer`."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..config import AdaPruneConfig
from ..errors import CardError, ConfigError, NotPrunedError
from ..hub.model_card import CARD, write_model_card
from ..hub.publish import fetch_card
from ..storage.checks import run_checks
from ..tuner.masked_layers import adaprune_layers, has_masks, masking_adapters
from .checkpoints import (
    expose_resume_state,
    folders_of_step,
    load_best_state,
    quarantine_torn_checkpoints,
    save_state_with_checkpoints,
    stop_saving_state,
)
from .pruner import Pruner
from .trainer_card import complete_trainer_card


logger = logging.get_logger(__name__)

# With larger steps, a score crosses the whole range [0, 2] in a few dozen steps and masks are noise.
_MAX_SCORE_STEP = 0.05


class AdaPruneCallback(TrainerCallback):
    """Adapt the model of a `Trainer` by pruning alone.

    Adds masks to a plain model (one that `get_peft_model` has wrapped is used as it is), updates them along their
    schedule, logs sparsity and flip rate beside the loss, and saves with each checkpoint what a resumed run needs.
    Use the Trainer's default learning rate, 5e-5; for the `"paper"` preset, 1e-4.

    Args:
        config (`AdaPruneConfig`, *optional*):
            The configuration of an adapter to add; for a plain model `AdaPruneConfig()` by default.
        adapter_name (`str`): The adapter's name in the model.

    Raises:
        ConfigError: If `config` is not an `AdaPruneConfig`, or is that of a stored adapter.

    Example:

        >>> Trainer(model, args, train_dataset=data, callbacks=[AdaPruneCallback]).train()
        >>> model.push_to_hub("me/bert-base-uncased-sst2-adaprune")
    """

    pruner_cls: type[Pruner] = Pruner

    def __init__(self, config: AdaPruneConfig | None = None, adapter_name: str = "default") -> None:
        if config is not None and not isinstance(config, AdaPruneConfig):
            raise ConfigError(
                f"`AdaPruneCallback` takes an `AdaPruneConfig`, got {reprlib.repr(config)}. Example: "
                "`AdaPruneCallback(AdaPruneConfig(final_sparsity=0.8))`."
            )
        if config is not None and config.is_stored:
            raise ConfigError(
                "The configuration is that of a stored adapter. To train that adapter further, open it by "
                "`PeftModel.from_pretrained(model, name, is_trainable=True)` and use the callback without a "
                "configuration; for a new adapter with the same options, pass `config.fresh()`."
            )
        self.config, self.adapter_name = config, adapter_name
        self.pruner: Pruner | None = None
        # The adapter's card as it was before a push, and the name that it is pushed under.
        self._card: tuple[str | None, str | None] = (None, None)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Add masks to the Trainer's model before its optimizer is created, and set incomplete checkpoints aside."""
        with args.main_process_first(local=args.save_on_each_node, desc="looking for incomplete checkpoints"):
            if args.should_save:
                quarantine_torn_checkpoints(args.output_dir)
        # `Trainer.push_to_hub` overwrites the adapter's card with its own, then calls this method of the model.
        model.create_or_update_model_card = self._complete_card  # type: ignore[assignment]
        run_checks(model)  # now, before FSDP shards it
        if isinstance(model, PeftModel) or has_masks(model):
            self._add_to(model)
            return
        # A sentence-transformers model consists of several modules, one of them a transformers model.
        model = getattr(model, "transformers_model", None) or model
        if not isinstance(model, PreTrainedModel):
            raise NotPrunedError(
                f"`AdaPruneCallback` needs a transformers model, got a {type(model).__name__}. Wrap it first: "
                "`peft.get_peft_model(model, AdaPruneConfig(target_modules=...))`."
            )
        model.add_adapter(self.config or AdaPruneConfig(), self.adapter_name)

    def _add_to(self, model: Any) -> None:
        """Ensure that a model with adapters has the one to train: it exists already, or is added from `config`."""
        if not has_masks(model):
            raise NotPrunedError(
                f"The Trainer's model is a {type(model).__name__} without masks: pass the plain model, or one that "
                "`peft.get_peft_model(model, AdaPruneConfig())` returns."
            )
        names = masking_adapters(model)
        if self.adapter_name in names and self.config is not None:
            raise ConfigError(
                f"The model already has an adapter {self.adapter_name!r}, with its own configuration. To continue "
                "training it, use `AdaPruneCallback` without a configuration; to train another adapter, choose a new "
                "`adapter_name=`; to start over, reload the model."
            )
        if self.adapter_name in names:
            for _, layer in adaprune_layers(model, self.adapter_name):
                # Set again when a checkpoint is loaded: see `_check_resumed`.
                layer.config(self.adapter_name).in_memory.masks_loaded = False
            return
        if self.config is None:
            raise ConfigError(
                f"The model has no adapter {self.adapter_name!r}, but {names}: set `adapter_name=` to the one to "
                "train, or pass an `AdaPruneConfig` to add a new one."
            )
        if isinstance(model, PeftModel):
            model.add_adapter(self.adapter_name, self.config)
            model.set_adapter(self.adapter_name)
        else:
            getattr(model, "transformers_model", model).add_adapter(self.config, self.adapter_name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Create the `Pruner`, at the step of the schedule where training starts or resumes."""
        model.create_or_update_model_card = self._complete_card  # type: ignore[assignment]  # or a `model_init`'s
        if state.global_step and hasattr(model, "transformers_model"):
            _load_scores(model, args, state)
        if not has_masks(model):
            raise NotPrunedError(
                "The Trainer's model has no masks: `AdaPruneCallback` adds them when the Trainer is created. Pass it "
                "as `Trainer(callbacks=[AdaPruneCallback])`, not to `add_callback`; a `model_init` must return "
                "`peft.get_peft_model(model, AdaPruneConfig())`."
            )
        self.pruner = self.pruner_cls(model, state.max_steps, self.adapter_name)
        _check_optimizer(model, kwargs["optimizer"])
        _check_resumed(self.pruner, state.global_step)
        self.pruner.load_state_dict({"num_steps": state.global_step})
        self._warn_of_score_steps(kwargs["optimizer"])
        self._forget_best(state)
        save_state_with_checkpoints(model, args, state)

    def _warn_of_score_steps(self, optimizer: Any) -> None:
        pruner = self._running
        if not pruner.trains_scores:
            if self.pruner_cls is Pruner:
                logger.warning(
                    f"The scores of adapter {self.adapter_name!r} are frozen: the initial scores determine the masks, "
                    "and they do not learn. Do not change `requires_grad` of the model's parameters after the "
                    "adapter was added."
                )
            return
        scores = {id(layer.adaprune_scores[self.adapter_name]) for layer in pruner.layers.values()}
        groups = [group for group in optimizer.param_groups if scores & {id(each) for each in group["params"]}]
        if not groups:
            logger.warning(
                "The optimizer has no scores: only the head learns, and the initial scores determine the masks."
            )
            return
        learning_rate = max(map(_initial_learning_rate, groups))
        score_step = pruner.config.score_lr_ratio * learning_rate
        if score_step > _MAX_SCORE_STEP:
            logger.warning(
                f"`learning_rate={learning_rate}` moves a score by {score_step:.2g} a step, in a range of 2: "
                "expect a poor mask. Use 5e-5, the Trainer's default."
            )
        if isinstance(getattr(optimizer, "optimizer", optimizer), SGD):
            logger.warning(
                "With SGD, scores barely move at this learning rate, so masks stay close to their initial state. "
                "Train with AdamW, the Trainer's default, or Adafactor."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise before an optimizer step with NaN or infinite gradients; skip the updates of a finished run."""
        if self._running.finished or state.global_step >= state.max_steps:
            kwargs["optimizer"].zero_grad()  # a run resumed at its end makes one more step, which changes nothing
        if getattr(kwargs["optimizer"], "scaler", None) is not None:
            # A gradient scaler expects overflows, and skips such steps by itself.
            self._running.remember_head()
        else:
            self._running.check_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Update the masks."""
        # Before this step's evaluation: earlier evaluations were of a model that was not yet fully pruned.
        self._forget_best(state)
        self._running.step()
        self._running.config.training = training_settings(
            args, state, kwargs.get("train_dataloader"), kwargs["optimizer"]
        )
        if self._running.finished:
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add sparsity and flip rate to the log entry of the training loss."""
        if self.pruner is not None and logs is not None and "loss" in logs:
            measured = {"sparsity": self.pruner.sparsity, "flip_rate": self.pruner.pop_flip_rate()}
            logs.update(measured)
            state.log_history[-1].update(measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that all processes have the same masks, and put the scores where a resumed run looks for them."""
        self._running.check_masks()
        if args.should_save:
            expose_resume_state(*folders_of_step(args, state))
        self._forget_best(state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the adapter's card during a push: the Trainer overwrites it, and ignores those in checkpoints."""
        if not state.is_world_process_zero:
            return
        card, name = Path(args.output_dir, CARD), _name_on_hub(args)
        try:
            fetch_card(card, name, revision=args.hub_revision, token=args.hub_token)
        except (CardError, UnicodeDecodeError) as error:
            logger.warning(f"The model card is left as it is while training goes on: {error}")
            return
        self._card = (card.read_text(encoding="utf-8") if card.is_file() else None), name
        for folder in folders_of_step(args, state):
            if (folder / CONFIG_NAME).is_file():
                write_model_card(folder, name=name, card=card, picture=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Load the best checkpoint if the Trainer could not, and finalize the masks at the target sparsity."""
        stop_saving_state(self._running.model)
        if args.load_best_model_at_end and state.best_global_step:
            load_best_state(kwargs["model"], Path(str(state.best_model_checkpoint)))
            told = self._running.config.training or {}
            self._running.config.training = told | {"num_steps": state.best_global_step}
        self._running.finalize()

    @property
    def _running(self) -> Pruner:
        if self.pruner is None:
            raise NotPrunedError(
                "`AdaPruneCallback` was added after training had begun: pass it to `Trainer(callbacks=...)`."
            )
        return self.pruner

    def _complete_card(self, folder: str) -> None:
        (former, name), self._card = self._card, (None, None)
        if Path(folder, CONFIG_NAME).is_file():
            complete_trainer_card(folder, former, name)

    def _forget_best(self, state: TrainerState) -> None:
        # `load_best_model_at_end` must not choose a model that is not fully pruned.
        if not self._running.at_target:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _load_scores(model: nn.Module, args: TrainingArguments, state: TrainerState) -> None:
    """Load the scores of the checkpoint that a sentence-transformers model resumes from: only its adapter was loaded.

    No callback is told which checkpoint that is, so it is recognized by its masks.
    """
    current = model.state_dict()
    of_output_dir = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
    for folder in filter(None, (args.resume_from_checkpoint, of_output_dir)):
        path = Path(folder, SAFE_WEIGHTS_NAME)
        stored = load_file(path) if path.is_file() else {}
        masks = [name for name in stored if ".adaprune_mask." in name]
        if masks and all(name in current and torch.equal(stored[name], current[name].cpu()) for name in masks):
            model.load_state_dict(stored, strict=False)
            return


def _check_resumed(pruner: Pruner, num_steps: int) -> None:
    """Raise if a run resumes within its schedule, but its masks were not loaded from the checkpoint."""
    if num_steps and pruner.trains_scores and not pruner.config.in_memory.masks_loaded:
        raise NotPrunedError(
            f"The run resumes after {num_steps} of {pruner.total_steps} steps, but its checkpoint has no masks "
            "under the names of this model. Resume with the same form of model (wrapped by `get_peft_model` or not) "
            "and the same `adapter_name`."
        )


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise if an optimizer has no trainable parameter: there is none, or it was created before the masks."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError(
            f"Nothing of the {type(model).__name__} can be trained: its masks are fixed, and it has no head to train. "
            "Use a model with a task head, such as one for sequence classification."
        )
    if not trained & {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
        raise ConfigError(
            "The Trainer's optimizer was created before the masks, and would train nothing. Let the Trainer create "
            "it (`optim=`, or `optimizer_cls_and_kwargs=`), or first add masks to the model with "
            "`model.add_adapter(AdaPruneConfig())` and then create the optimizer."
        )


def _name_on_hub(args: TrainingArguments) -> str:
    """Return the name of the repository that a Trainer pushes to, with its owner if that can be found."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if "/" in name:
        return name
    try:
        return f"{HfApi(token=args.hub_token).whoami()['name']}/{name}"
    except Exception:  # The push itself will report it.
        return name


def training_settings(args: TrainingArguments, state: TrainerState, data: Any, optimizer: Any) -> dict[str, Any]:
    """Return the settings of a Trainer, with its data loader and optimizer, for `AdaPruneConfig.training`."""
    dataset: Any = getattr(data, "dataset", None)
    name = str(getattr(args.optim, "value", args.optim))
    own = type(getattr(optimizer, "optimizer", optimizer)).__name__  # not that of `args` if it was passed in
    return {
        "num_steps": min(state.global_step, state.max_steps),
        "batch_size": (state.train_batch_size or args.train_batch_size)
        * args.gradient_accumulation_steps
        * args.world_size,
        "num_examples": len(dataset) if has_length(dataset) else None,
        "learning_rate": _initial_learning_rate(optimizer.param_groups[0]),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "optim": name if own.lower() in name.replace("_", "") else own,
        "seed": args.seed,
    }


def _initial_learning_rate(group: dict[str, Any]) -> float:
    """Return the learning rate of an optimizer's parameter group before any schedule."""
    return float(group.get("initial_lr", group["lr"]))
