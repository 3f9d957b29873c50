"""Prunes in a stock `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import PeftModel
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..config import AdaPruneConfig
from ..errors import ConfigError, NotPrunedError
from ..hub.model_card import CARD, write_model_card
from ..hub.publish import fetch_card
from ..storage.checks import run_checks
from ..tuner.masked_layers import adaprune_layers, has_masks
from .checkpoints import (
    expose_resume_state,
    folders_of_step,
    load_best_state,
    quarantine_torn_checkpoints,
    save_state_with_checkpoints,
    stop_saving_state,
)
from .pruner import Pruner
from .trainer_card import complete_trainer_card, training_settings


logger = logging.get_logger(__name__)

# Beyond this a score crosses the whole range of its matrix in a few dozen steps, and masks are noise.
_MAX_SCORE_STEP = 0.05


class AdaPruneCallback(TrainerCallback):
    """Adapt the model of a `Trainer` by pruning alone.

    Puts masks on a plain model (one that `get_peft_model` has wrapped is taken as it is), moves them along their
    schedule, logs sparsity and flip rate beside the loss, and saves with each checkpoint what a resumed run needs.
    The Trainer's default learning rate of 5e-5 is right.

    Args:
        config (`AdaPruneConfig`, *optional*): For a plain model; by default `AdaPruneConfig()`.
        adapter_name (`str`): The adapter's name in the model.

    Example:

        >>> Trainer(model, args, train_dataset=data, callbacks=[AdaPruneCallback]).train()
        >>> model.push_to_hub("me/bert-base-uncased-sst2-adaprune")
    """

    pruner_cls: type[Pruner] = Pruner

    def __init__(self, config: AdaPruneConfig | None = None, adapter_name: str = "default") -> None:
        if config is not None and not isinstance(config, AdaPruneConfig):
            raise ConfigError(
                f"`AdaPruneCallback` takes an `AdaPruneConfig`, got {config!r}: as in "
                "`AdaPruneCallback(AdaPruneConfig(final_sparsity=0.8))`."
            )
        self.config, self.adapter_name = config, adapter_name
        self.pruner: Pruner | None = None
        # The adapter's card as it was before a push, and the name that it is pushed under.
        self._card: tuple[str | None, str | None] = (None, None)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Put masks on the Trainer's model, before its optimizer is made, and torn checkpoints out of the way."""
        with args.main_process_first(local=args.save_on_each_node, desc="looking for torn checkpoints"):
            if args.should_save:
                quarantine_torn_checkpoints(args.output_dir)
        # `Trainer.push_to_hub` writes a card of its own over the adapter's, and then has the model complete it.
        model.create_or_update_model_card = self._complete_card  # type: ignore[assignment]
        run_checks(model)  # now: FSDP is about to shard it
        if isinstance(model, PeftModel) or has_masks(model):
            self._add_to(model)
            return
        # A model of sentence-transformers is several modules, of which one is a transformers model.
        model = getattr(model, "transformers_model", None) or model
        if not isinstance(model, PreTrainedModel):
            raise NotPrunedError(
                f"`AdaPruneCallback` puts masks on a transformers model, got a {type(model).__name__}. Wrap it first: "
                "`peft.get_peft_model(model, AdaPruneConfig(target_modules=...))`."
            )
        model.add_adapter(self.config or AdaPruneConfig(), self.adapter_name)

    def _add_to(self, model: Any) -> None:
        """See that a model that has adapters has the one that is to be trained, and has it once."""
        if not has_masks(model):
            raise NotPrunedError(
                f"The Trainer's model is a {type(model).__name__} without masks: give it the plain model, or one that "
                "`peft.get_peft_model(model, AdaPruneConfig())` returns."
            )
        names = list(dict.fromkeys(name for _, layer in adaprune_layers(model) for name in layer.adaprune_mask))
        if self.adapter_name in names and self.config is not None:
            raise ConfigError(
                f"The model already has an adapter {self.adapter_name!r}, with its own configuration. To train that "
                "one further, pass `AdaPruneCallback()` without one; to train another, give it a name of its own, "
                "with `adapter_name=`; to begin anew, load the model anew."
            )
        if self.adapter_name in names:
            for _, layer in adaprune_layers(model, self.adapter_name):
                # Until a checkpoint is loaded: see `_check_resumed`.
                layer.config(self.adapter_name).masks_loaded = False
            return
        if self.config is None:
            raise ConfigError(
                f"The model has no adapter {self.adapter_name!r}, but {names}: name with `adapter_name=` the one to "
                "train; or pass an `AdaPruneConfig`, which adds one."
            )
        if isinstance(model, PeftModel):
            model.add_adapter(self.adapter_name, self.config)
            model.set_adapter(self.adapter_name)
        else:
            getattr(model, "transformers_model", model).add_adapter(self.config, self.adapter_name)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Start, or go on, at the point of the schedule where training is."""
        model.create_or_update_model_card = self._complete_card  # type: ignore[assignment]  # a `model_init`'s too
        scores = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", SAFE_WEIGHTS_NAME)
        if state.global_step and hasattr(model, "transformers_model") and scores.is_file():
            # sentence-transformers resumes from the adapter alone.
            model.load_state_dict(load_file(scores), strict=False)
        if not has_masks(model):
            raise NotPrunedError(
                "The Trainer's model has no masks: `AdaPruneCallback` puts them on the model that a Trainer is made "
                "with. Give it to `Trainer(callbacks=[AdaPruneCallback])`, not to `add_callback`; and have a "
                "`model_init` return `peft.get_peft_model(model, AdaPruneConfig())`."
            )
        self.pruner = self.pruner_cls(model, state.max_steps, self.adapter_name)
        _check_optimizer(model, kwargs.get("optimizer"))
        _check_resumed(self.pruner, state.global_step)
        self.pruner.load_state_dict({"num_steps": state.global_step})
        self._warn_of_score_steps(args)
        self._forget_best(state)
        save_state_with_checkpoints(model, args.world_size, resumable=not args.save_only_model)

    def _warn_of_score_steps(self, args: TrainingArguments) -> None:
        pruner = self._running
        if not pruner.trains_scores:
            if self.pruner_cls is Pruner:
                logger.warning(
                    f"The scores of adapter {self.adapter_name!r} are frozen: the head alone learns, and where scores "
                    "start chooses the masks. Leave `requires_grad` of the model's parameters as the adapter has set "
                    "it."
                )
            return
        score_step = pruner.config.score_lr_ratio * args.learning_rate
        if score_step > _MAX_SCORE_STEP:
            logger.warning(
                f"`learning_rate={args.learning_rate}` moves a score by {score_step:.2g} a step, of a range of 2: "
                "expect a poor mask. 5e-5, the Trainer's default, is right for AdaPrune."
            )
        if args.optim == OptimizerNames.SGD:
            logger.warning(
                "SGD moves scores in proportion to their gradients, at such learning rates next to not at all: masks "
                "stay about where they start. Train with AdamW, the Trainer's default, or Adafactor."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before a step that would ruin the model."""
        if self._running.finished:
            kwargs["optimizer"].zero_grad()  # a run that is resumed where it ended moves nothing
        # Under a gradient scaler an overflow is ordinary: it skips the step by itself.
        if not args.fp16:
            self._running.check_gradients()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the next masks."""
        # Before the evaluation of this step: what was found in the steps before it was of a model not yet pruned.
        self._forget_best(state)
        self._running.step()
        self._running.config.training = training_settings(args, state, kwargs.get("train_dataloader"))
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
        """Add sparsity and flip rate to the training loss's entry."""
        if self.pruner is not None and logs is not None and "loss" in logs:
            measured = {"sparsity": self.pruner.sparsity, "flip_rate": self.pruner.pop_flip_rate()}
            logs.update(measured)
            state.log_history[-1].update(measured)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See that all processes have the masks that were saved; put the scores where a resumed run looks for them."""
        self._running.check_masks()
        if args.should_save:
            expose_resume_state(*folders_of_step(args, state))
        self._forget_best(state)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the adapter's card through a push: the Trainer copies it from no checkpoint, and overwrites it."""
        if not state.is_world_process_zero:
            return
        card, name = Path(args.output_dir, CARD), _name_on_hub(args)
        fetch_card(card, name, revision=args.hub_revision, token=args.hub_token)
        self._card = (card.read_text(encoding="utf-8") if card.is_file() else None), name
        for folder in folders_of_step(args, state):
            if (folder / CONFIG_NAME).is_file():
                write_model_card(folder, name=name, card=card, picture=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End at exactly the sparsity that was asked for."""
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
                "`AdaPruneCallback` was added after training had begun: give it to the Trainer itself."
            )
        return self.pruner

    def _complete_card(self, folder: str) -> None:
        (former, name), self._card = self._card, (None, None)
        if Path(folder, CONFIG_NAME).is_file():
            complete_trainer_card(folder, former, name)

    def _forget_best(self, state: TrainerState) -> None:
        # A model that is not pruned as asked is no candidate for `load_best_model_at_end`.
        if not self._running.at_target:
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _check_resumed(pruner: Pruner, num_steps: int) -> None:
    """Raise if a run goes on in the middle of its schedule with masks of its beginning: its own did not arrive."""
    if num_steps and pruner.trains_scores and not pruner.config.masks_loaded:
        raise NotPrunedError(
            f"The run goes on after {num_steps} of {pruner.total_steps} steps, and its checkpoint has no masks "
            "under the names that they have in this model. Resume with the same form of model (wrapped by "
            "`get_peft_model` or not) and the same `adapter_name`."
        )


def _check_optimizer(model: nn.Module, optimizer: Any) -> None:
    """Raise if an optimizer has none of what is to be trained: it was made before there were masks."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    groups = getattr(optimizer, "param_groups", [])
    if groups and not trained & {id(parameter) for group in groups for parameter in group["params"]}:
        raise ConfigError(
            "The Trainer's optimizer was made before the masks, and would train nothing. Let the Trainer make it "
            "(`optim=`, or `optimizer_cls_and_kwargs=`), or put the masks on the model first, with "
            "`model.add_adapter(AdaPruneConfig())`, and then make the optimizer."
        )


def _name_on_hub(args: TrainingArguments) -> str:
    """Return the full name of the repository that a Trainer pushes to, as far as can be told."""
    name = args.hub_model_id or Path(args.output_dir).absolute().name
    if "/" in name:
        return name
    try:
        return f"{HfApi(token=args.hub_token).whoami()['name']}/{name}"
    except Exception:  # Whatever the Hub has against it, the push itself will say so.
        return name
