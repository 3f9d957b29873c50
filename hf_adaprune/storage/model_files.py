"""How a transformers model that holds an adapter saves it, and loads one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config import AdaPruneConfig
from ..hub.publish import PUSH_OPTIONS, push_adapter
from ..tuner.layer import decode_loaded
from ..tuner.masked_layers import adaprune_layers
from .weights_file import check_head, check_no_pickle, check_shapes, read_shapes
from .write_order import weights_first


# Bytes: what PyTorch allocates for the CPU begins at a multiple.
_ALIGNMENT = 64


def save_weights_first(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save a transformers model that holds an adapter: its own `save_pretrained` writes the configuration first."""
    active = model.active_adapters() if model._hf_peft_config_loaded else []
    others = [name for name in active if getattr(model.peft_config.get(name), "peft_type", None) != "ADAPRUNE"]
    if others or not active:
        with _one_active(model, others):
            type(model).save_pretrained(model, save_directory, *args, **kwargs)
        return
    # An adapter is one file with PEFT's names in it: in any other form it could not be opened.
    kwargs |= {"save_peft_format": True, "max_shard_size": sys.maxsize}
    pushed = kwargs.pop("push_to_hub", False)
    given = {key: kwargs.pop(key) for key in PUSH_OPTIONS if pushed and key in kwargs}
    with weights_first():
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if pushed:
        # Its own way to push would first overwrite the card in the folder.
        name = given.pop("repo_id", Path(save_directory).name)
        push_adapter(save_directory, name, token=kwargs.get("token"), **given)


@contextmanager
def _one_active(model: Any, names: list[str]) -> Iterator[None]:
    """Have a model name one active adapter where that is a LoRA, say, over masks: transformers saves one at a time."""
    if len(names) != 1:
        yield
        return
    model.active_adapters = lambda: names
    try:
        yield
    finally:
        del model.active_adapters


def load_checked(
    config: AdaPruneConfig,
    head_shapes: dict[str, tuple[int, ...]],
    /,
    *,
    model: Any,
    checkpoint_files: list[str] | None,
    **kwargs: Any,
) -> Any:
    """Load an adapter's weights as transformers does, after a look at their file.

    `PreTrainedModel.load_adapter` injects the adapter first, and then has the model itself load the file: there, and
    only there, it can still be seen what kind of file that is.
    """
    forget_check(model)
    for path in checkpoint_files or ():
        check_no_pickle(path)
        shapes = read_shapes(Path(path))
        check_shapes(path, shapes, config)
        check_head(path, shapes, head_shapes)
    info, offloaded = model._load_pretrained_model(model=model, checkpoint_files=checkpoint_files, **kwargs)
    # All of the adapter was in the file. What is reported as missing, the base and other adapters, is where it was.
    info.missing_keys = set()
    _align_head(model)
    if config.mask_bytes:
        for _, layer in adaprune_layers(model):
            decode_loaded(layer)
    return info, offloaded


def _align_head(model: Any) -> None:
    """Move what is mapped from a file to memory of its own, aligned as that of a head in training is.

    A file's tensors begin anywhere, and some kernels sum in another order there: logits would differ in the last bit.
    """
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def forget_check(model: Any) -> None:
    """Have a model load files as ever again."""
    for module in model.modules():
        vars(module).pop("_load_pretrained_model", None)
