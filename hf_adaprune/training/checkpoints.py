"""Save in a `Trainer`'s checkpoints what an exact resume needs, and detect incomplete checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils.constants import RNG_STATE_NAME as ACCELERATE_RNG_STATE
from huggingface_hub.constants import REPOCARD_NAME
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME as MODEL_CONFIG
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..overrides import override, restore
from ..tuner.masked_layers import adaprune_layers
from ..tuner.sharding import is_sharded


logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
_LAST_CHECKPOINT = "last-checkpoint"  # as the Trainer names it on the Hub
_STATE_NAME = "training_state.safetensors"
# Beginnings of the names of files in a checkpoint: those that only a Trainer writes, and others.
_TRAINER_FILES = ("training_", TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, SAFE_WEIGHTS_NAME, "rng_state")
_OTHER_FILES = (ADAPTER_CONFIG, SAFETENSORS_WEIGHTS_NAME, REPOCARD_NAME, "tokenizer")


def save_state_with_checkpoints(model: Any, args: TrainingArguments, state: TrainerState) -> None:
    """Make a model's `save_pretrained` also save, in a Trainer's checkpoint, the state that its adapter lacks.

    The `load_adapter` of a `PeftModel` then finds in a checkpoint the adapter that it is asked for: the Trainer always
    names the checkpoint's own folder, where PEFT saves the adapter "default".

    `on_save` would be too late: the Trainer calls it after it has deleted older checkpoints.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model in training.
        args (`TrainingArguments`): The Trainer's arguments; under `save_only_model`, scores are not saved either.
        state (`TrainerState`): Its state, which has the number of the checkpoint that is saved now.
    """
    stop_saving_state(model)
    if not hasattr(model, "save_pretrained"):
        return  # a custom class: the Trainer saves its whole state, with masks and scores
    override(model, "save_pretrained", _save, model.save_pretrained, model, args, state)
    if isinstance(model, PeftModel):
        override(model, "load_adapter", _load_own, model.load_adapter)


def stop_saving_state(model: Any) -> None:
    """Restore a model's original `save_pretrained` and `load_adapter`."""
    restore(model, "save_pretrained", _save)
    restore(model, "load_adapter", _load_own)


def _save(
    save: Callable[..., None],
    model: Any,
    trainer_args: TrainingArguments,
    state: TrainerState,
    /,
    save_directory: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    checkpoint = Path(save_directory)
    # A sentence-transformers model contains the model that may have an adapter.
    holder = getattr(model, "transformers_model", None) or model
    # A model without an adapter is saved whole, and so, by the Trainer itself, is one under FSDP.
    if not (_is_of_step(checkpoint, trainer_args, state) and hasattr(holder, "peft_config")) or is_sharded(
        model.parameters()
    ):
        save(save_directory, *args, **kwargs)
        return
    # Files of an earlier run must not be taken for this run's.
    for name in (TRAINER_STATE_NAME, SAFE_WEIGHTS_NAME):
        (checkpoint / name).unlink(missing_ok=True)
    # Empty for now: it marks the checkpoint as incomplete.
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / _STATE_NAME).write_bytes(b"")
    save(save_directory, *args, **kwargs)
    _save_state(model, checkpoint / _STATE_NAME, trainer_args)


def _is_of_step(folder: Path, args: TrainingArguments, state: TrainerState) -> bool:
    # A run that raised leaves its model as it was in training, and that may be saved by hand under such a name.
    inside = Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(args.output_dir))
    return inside and folder.name == f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _load_own(
    load: Callable[..., Any], /, model_id: str | os.PathLike[str], adapter_name: str, *args: Any, **kwargs: Any
) -> Any:
    own = Path(model_id, adapter_name)
    return load(own if (own / ADAPTER_CONFIG).is_file() else model_id, adapter_name, *args, **kwargs)


def _save_state(model: nn.Module, path: Path, args: TrainingArguments) -> None:
    """Save the trainable parameters, the masks, and heads and scores even if frozen, by the model's own names."""
    state, resumable, num_processes = model.state_dict(), not args.save_only_model, args.world_size
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    # A head may also have buffers, such as the statistics of a BatchNorm.
    names |= {name for name in state if ".modules_to_save." in name or ".adaprune_scores." in name}
    for name, layer in adaprune_layers(model):
        names |= {f"{name}.adaprune_mask.{adapter}" for adapter in layer.adaprune_mask}
        if resumable:
            names |= {f"{name}.adaprune_score_scale.{adapter}" for adapter in layer.adaprune_score_scale}
        else:
            names -= {f"{name}.adaprune_scores.{adapter}" for adapter in layer.adaprune_scores}
    files = []
    if resumable:
        files = [OPTIMIZER_NAME, SCHEDULER_NAME]
        files += [f"rng_state_{rank}.pth" for rank in range(num_processes)] if num_processes > 1 else ["rng_state.pth"]
    metadata = {"format": "pt", "files": json.dumps(files)}
    # Copied, as several names may share their memory.
    save_file({name: state[name].clone() for name in sorted(names)}, path, metadata=metadata)


def folders_of_step(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Return the checkpoints of the current step: one, or one for each trial of a hyperparameter search."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    found = [Path(args.output_dir, name), *sorted(Path(args.output_dir).glob(f"*/{name}"))]
    return [folder for folder in found if folder.is_dir()]


def expose_resume_state(*checkpoints: Path) -> None:
    """Make the scores in checkpoints available to a Trainer that resumes from one of them.

    A resuming Trainer prefers `model.safetensors` to the adapter in a checkpoint, for plain and wrapped models alike.
    The state gets that name in `on_save` only: before that, the Trainer would push a file of that name to the Hub.

    Args:
        checkpoints (`Path`): Their folders; one without a saved state is left unchanged.
    """
    for checkpoint in checkpoints:
        state, path = checkpoint / _STATE_NAME, checkpoint / SAFE_WEIGHTS_NAME
        if path.exists() or not state.exists():
            continue
        try:
            # Linked, not renamed: a push in the background may still be reading the checkpoint.
            os.link(state, path)
        except OSError:  # a file system without links
            aside = path.with_suffix(".tmp")
            shutil.copyfile(state, aside)
            os.replace(aside, path)


def load_best_state(model: nn.Module, checkpoint: Path) -> None:
    """Load the best checkpoint if the Trainer could not.

    PEFT stores an adapter not named "default" in a subfolder, where the Trainer does not look.
    """
    path = checkpoint / SAFE_WEIGHTS_NAME
    if isinstance(model, PeftModel) and not (checkpoint / ADAPTER_CONFIG).is_file() and path.is_file():
        model.load_state_dict(load_file(path), strict=False)


def quarantine_torn_checkpoints(folder: str | Path) -> None:
    """Rename the checkpoints in a folder whose writing or deletion was interrupted; complete the others.

    A resumed run takes the checkpoint of the highest number, complete or not. An incomplete one is renamed to
    `torn-checkpoint-...`, which the Trainer ignores.

    Args:
        folder (`str` or `Path`): A Trainer's `output_dir`.
    """
    expose_resume_state(Path(folder, _LAST_CHECKPOINT))
    for path in sorted(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if not (path.is_dir() and _CHECKPOINT.fullmatch(path.name)):
            continue
        if (path / MODEL_CONFIG).exists() and not (path / ADAPTER_CONFIG).exists():
            continue  # of a whole model
        if _is_saved_by_hand(path):
            continue
        if _is_whole(path):
            expose_resume_state(path)
            continue
        torn = path.with_name(f"torn-{path.name}")
        while torn.exists():
            torn = torn.with_name(f"torn-{torn.name}")
        path.rename(torn)
        logger.warning(f"{path} is incomplete, and no run can resume from it: it was renamed to {torn.name}.")


def _is_saved_by_hand(folder: Path) -> bool:
    """Return whether a folder that is named like a checkpoint was not written by a Trainer.

    A run can be killed while it creates or deletes a checkpoint, so a few files of an adapter do not show that. But a
    file of another kind does, or an adapter whose configuration has no record of a Trainer.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    if any(name.startswith(ACCELERATE_RNG_STATE) for name in names):
        return True  # by `Accelerator.save_state`
    if any(name.startswith(_TRAINER_FILES) for name in names):
        return False
    try:
        configs = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"**/{ADAPTER_CONFIG}")]
    except ValueError:  # cut off
        return False
    has_others = not all(name.startswith(_OTHER_FILES) for name in names)
    return has_others or any(not config.get("training") for config in configs)


def _is_whole(checkpoint: Path) -> bool:
    """Return whether a checkpoint is complete; the Trainer writes its own state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        files = []
        for path in (checkpoint / SAFE_WEIGHTS_NAME, checkpoint / _STATE_NAME):
            if not path.exists():
                continue
            with safe_open(path, framework="pt") as state:
                files = json.loads((state.metadata() or {}).get("files", "[]"))
    except (OSError, ValueError, SafetensorError):
        return False
    # `torch.save` writes zip files, whose directory comes last.
    return all(zipfile.is_zipfile(checkpoint / name) for name in files)
