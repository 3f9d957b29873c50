"""Saving and loading of adapters by a transformers model that holds them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .config import AdaPruneConfig
from .files.weights_file import check_head, check_is_safetensors, check_shapes, read_shapes
from .files.write_order import weights_first
from .hub.publish import PUSH_OPTIONS, push_adapter
from .overrides import restore
from .tuner.layer import decode_loaded
from .tuner.masked_layers import adaprune_layers


# In bytes: PyTorch aligns CPU memory to multiples of this.
_ALIGNMENT = 64


def save_weights_first(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save a transformers model's adapter, weights first: its own `save_pretrained` begins with the configuration."""
    active = model.active_adapters() if model._hf_peft_config_loaded else []
    others = [name for name in active if not isinstance(model.peft_config.get(name), AdaPruneConfig)]
    never_saved = [name for name in active if name not in others and not model.peft_config[name].adapter_fingerprint]
    if others and never_saved:
        warnings.warn(
            f"Only the adapter {others} is saved: to save masks and head of {never_saved}, call "
            f"`set_adapter({never_saved[0]!r})` and `save_pretrained` with another folder.",
            stacklevel=2,
        )
    if others or not active:
        with _one_active(model, others):
            type(model).save_pretrained(model, save_directory, *args, **kwargs)
        return
    # An adapter can only be opened if it is a single file with PEFT's names.
    kwargs |= {"save_peft_format": True, "max_shard_size": sys.maxsize}
    pushed = kwargs.pop("push_to_hub", False)
    given = {key: kwargs.pop(key) for key in PUSH_OPTIONS if pushed and key in kwargs}
    with weights_first():
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if pushed:
        # `save_pretrained` would overwrite the card in the folder before pushing it.
        name = given.pop("repo_id", Path(save_directory).resolve().name)
        push_adapter(save_directory, name, token=kwargs.get("token"), **given)


@contextmanager
def _one_active(model: Any, names: list[str]) -> Iterator[None]:
    """Report only the adapter of another method (a LoRA over masks) as active: transformers saves one at a time."""
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
    """Load an adapter's weights as transformers does, after checking their file.

    `PreTrainedModel.load_adapter` injects the adapter and then calls this method of the model. No other step gives
    access to the file, and so to its format, before it is loaded.
    """
    restore_loading(model)
    for path in checkpoint_files or ():
        check_is_safetensors(path)
        shapes = read_shapes(Path(path))
        check_shapes(path, shapes, config)
        check_head(path, shapes, head_shapes)
    info, offloaded = model._load_pretrained_model(model=model, checkpoint_files=checkpoint_files, **kwargs)
    # The whole adapter was in the file. The keys reported as missing are of the base and of other adapters.
    info.missing_keys = set()
    _align_head(model)
    if config.mask_bytes:
        for _, layer in adaprune_layers(model):
            decode_loaded(layer)
    return info, offloaded


def _align_head(model: Any) -> None:
    """Copy head parameters that are mapped from a file to aligned memory, as a head in training has it.

    Tensors in a file are unaligned, and some kernels then sum in another order: logits would differ in the last bit.
    """
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def restore_loading(model: Any) -> None:
    """Restore a model's own way of loading weights."""
    for module in model.modules():
        restore(module, "_load_pretrained_model")
