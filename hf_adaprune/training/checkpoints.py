"""What a `Trainer`'s checkpoint needs for a resumed run to be the same run, and whether it is all there."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME as MODEL_CONFIG
from transformers.utils import SAFE_WEIGHTS_NAME, logging

from ..tuner.masked_layers import adaprune_layers
from .sharding import is_sharded


logger = logging.get_logger(__name__)

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
_LAST_CHECKPOINT = "last-checkpoint"  # as the Trainer names it on the Hub
STATE_NAME = "training_state.safetensors"
# What only a Trainer's checkpoint holds.
_MARKS = (STATE_NAME, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME)


def save_state_with_checkpoints(model: Any, num_processes: int, resumable: bool) -> None:
    """Have a model's `save_pretrained`, in a checkpoint's folder, save what its adapter does not hold.

    The Trainer calls it before it deletes older checkpoints, and `on_save` only afterwards.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model in training.
        num_processes (`int`): How many processes train it; each leaves files of its own in a checkpoint.
        resumable (`bool`): Whether the Trainer saves its optimizer; if not, scores are not saved either.
    """
    stop_saving_state(model)
    if not hasattr(model, "save_pretrained"):
        return  # of somebody's own class: the Trainer saves all of it, masks and scores too
    model.save_pretrained = functools.partial(_save, model.save_pretrained, model, num_processes, resumable)


def stop_saving_state(model: Any) -> None:
    """Have a model's `save_pretrained` be what it was."""
    save = vars(model).get("save_pretrained")
    if isinstance(save, functools.partial) and save.func is _save:
        model.save_pretrained = save.args[0]


def _save(
    save: Callable[..., None],
    model: Any,
    num_processes: int,
    resumable: bool,
    /,
    save_directory: str,
    *args: Any,
    **kwargs: Any,
) -> None:
    checkpoint = Path(save_directory)
    # A model of sentence-transformers holds one that may have an adapter.
    holder = getattr(model, "transformers_model", None) or model
    # A model without an adapter is saved whole, and so is, by the Trainer itself, what FSDP trains.
    if not (_CHECKPOINT.fullmatch(checkpoint.name) and hasattr(holder, "peft_config")) or is_sharded(
        model.parameters()
    ):
        save(save_directory, *args, **kwargs)
        return
    # Those of an earlier run must not pass for this one's.
    for name in (TRAINER_STATE_NAME, SAFE_WEIGHTS_NAME):
        (checkpoint / name).unlink(missing_ok=True)
    # Empty for now: it marks the folder as a checkpoint that is not complete.
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / STATE_NAME).write_bytes(b"")
    save(save_directory, *args, **kwargs)
    _save_state(model, checkpoint / STATE_NAME, num_processes, resumable)


def _save_state(model: nn.Module, path: Path, num_processes: int, resumable: bool) -> None:
    """Write what is trained, and the masks, under the model's own names."""
    state = model.state_dict()
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, layer in adaprune_layers(model):
        names |= {f"{name}.adaprune_mask.{adapter}" for adapter in layer.adaprune_mask}
        if resumable:
            names |= {f"{name}.adaprune_score_scale.{adapter}" for adapter in layer.adaprune_score_scale}
        else:
            names -= {f"{name}.adaprune_scores.{adapter}" for adapter in layer.adaprune_scores}
    files = [OPTIMIZER_NAME, SCHEDULER_NAME] if resumable else []
    if resumable:
        files += [f"rng_state_{rank}.pth" for rank in range(num_processes)] if num_processes > 1 else ["rng_state.pth"]
    metadata = {"format": "pt", "files": json.dumps(files)}
    save_file({name: state[name].contiguous() for name in sorted(names)}, path, metadata=metadata)


def folders_of_step(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Return the checkpoints of the current step: one, or one for each trial of a hyperparameter search."""
    name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
    found = [Path(args.output_dir, name), *sorted(Path(args.output_dir).glob(f"*/{name}"))]
    return [folder for folder in found if folder.is_dir()]


def expose_resume_state(*checkpoints: Path) -> None:
    """Have a Trainer that resumes from one of these checkpoints find the scores in it.

    It loads a checkpoint's `model.safetensors` into the model in training in preference to its adapter, plain and
    wrapped models alike; but it also pushes a file of that name to the Hub, just before `on_save`.

    Args:
        checkpoints (`Path`): Their folders; one without scores stays as it is.
    """
    for checkpoint in checkpoints:
        state, path = checkpoint / STATE_NAME, checkpoint / SAFE_WEIGHTS_NAME
        if path.exists() or not state.exists():
            continue
        try:
            # Not renamed: a checkpoint may be on its way to the Hub, in the background, as it is.
            os.link(state, path)
        except OSError:  # a file system without links
            aside = path.with_suffix(".tmp")
            shutil.copyfile(state, aside)
            os.replace(aside, path)


def load_best_state(model: nn.Module, checkpoint: Path) -> None:
    """Load the best state of an adapter that the Trainer has not found: PEFT has one with a name in a subfolder."""
    path = checkpoint / SAFE_WEIGHTS_NAME
    if isinstance(model, PeftModel) and not (checkpoint / ADAPTER_CONFIG).is_file() and path.is_file():
        model.load_state_dict(load_file(path), strict=False)


def quarantine_torn_checkpoints(folder: str | Path) -> None:
    """Rename the checkpoints in a folder that were not written, or not deleted, to their end; complete the others.

    A run that is resumed takes the checkpoint of the highest number, whole or not: a torn one keeps its number under
    a name that is not looked for.

    Args:
        folder (`str` or `Path`): A Trainer's `output_dir`.
    """
    expose_resume_state(Path(folder, _LAST_CHECKPOINT))
    for path in sorted(Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")):
        if not (path.is_dir() and _CHECKPOINT.fullmatch(path.name)):
            continue
        if (path / MODEL_CONFIG).exists() and not (path / ADAPTER_CONFIG).exists():
            continue  # a whole model's
        if not any((path / name).exists() for name in _MARKS):
            continue  # no checkpoint of a Trainer, but somebody's own folder
        if _is_whole(path):
            expose_resume_state(path)
            continue
        torn = path.with_name(f"torn-{path.name}")
        while torn.exists():
            torn = torn.with_name(f"torn-{torn.name}")
        path.rename(torn)
        logger.warning(f"{path} was not saved to its end, and no run can go on from it: it is now called {torn.name}.")


def _is_whole(checkpoint: Path) -> bool:
    """Return whether all that was to be in a checkpoint is: the Trainer writes its own state last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        files = []
        for path in (checkpoint / SAFE_WEIGHTS_NAME, checkpoint / STATE_NAME):
            if not path.exists():
                continue
            with safe_open(path, framework="pt") as state:
                files = json.loads((state.metadata() or {}).get("files", "[]"))
    except (OSError, ValueError, SafetensorError):
        return False
    # `torch.save` writes zip files, whose directory comes last.
    return all(zipfile.is_zipfile(checkpoint / name) for name in files)
