"""Collect the tensors that an adapter's file stores, and check that loaded ones fit the model."""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers.utils import logging

from ..choices import AUTO
from ..config import AdaPruneConfig
from ..errors import AdapterFileError
from ..files.fingerprint import fingerprint
from ..files.weights_file import check_head
from ..tensor_names import PREFIX, plain_name, stored_name, unwrapped_name
from ..tuner.head_sync import head_sync_of
from ..tuner.layer import AdaPruneLayer
from ..tuner.masked_layers import adaprune_layers, module_counts
from .checks import head_keys, run_checks


logger = logging.get_logger(__name__)


def masks_to_store(
    model: nn.Module, config: AdaPruneConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return an adapter's masks in their stored form, and record their metadata in its configuration.

    Args:
        model (`torch.nn.Module`): The model, wrapped by PEFT or not.
        config (`AdaPruneConfig`): The adapter's configuration; changed in place.
        adapter_name (`str`): Its name.
        state_dict (`dict[str, torch.Tensor]`): The model's state; embeddings, which PEFT must not save, are removed.

    Returns:
        `dict[str, torch.Tensor]`: `uint8`, by their names in the model: one bit per entry, or less.

    Raises:
        AdapterFileError: If the adapter was loaded, and is not the one that was saved.
        ConfigError: If an adapter of another method has layers in its head.
    """
    run_checks(model)  # saving a damaged adapter would give it a valid fingerprint
    base: Any = model.base_model.model if isinstance(model, PeftModel) else model
    head_sync = head_sync_of(base)
    if head_sync is not None and head_sync.shown is config:
        head_sync.record(base)
        if base.config.num_labels != head_sync.num_labels(config):
            warnings.warn(
                f"The model's configuration has {base.config.num_labels} labels, but the head of adapter "
                f"{adapter_name!r} has {head_sync.num_labels(config)}: it is saved with the labels that it had. To "
                "rename them, set `model.config.id2label` to as many names.",
                stacklevel=2,
            )
    layers = dict(adaprune_layers(model, adapter_name))
    keys = {name: f"{name}.adaprune_mask.{adapter_name}" for name in layers}
    masks = {name: layer.decode(adapter_name, state_dict[keys[name]]) for name, layer in layers.items()}
    config.module_counts = {
        plain_name(name): list(count) for name, count in module_counts(model, adapter_name).items()
    }
    config.group_counts = _group_counts(layers, adapter_name)
    if not config.in_memory.was_pruned and any(adapter_name in layer.adaprune_scores for layer in layers.values()):
        _report_unpruned(config)
    head = {stored_name(key, adapter_name): state_dict[key] for key in head_keys(model, adapter_name)}
    _leave_out_embeddings(model, state_dict)
    config.head_tensors = list(head)
    config.adapter_fingerprint = fingerprint([*masks.values(), *head.values()])
    stored = _shortest(masks, layers, adapter_name, config)
    return {unwrapped_name(keys[name]): mask for name, mask in stored.items()}


def check_loaded(
    model: nn.Module, config: AdaPruneConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Check that a loaded adapter fits the model, and return it by the model's names.

    Args:
        model (`torch.nn.Module`): The model, with the adapter on it.
        config (`AdaPruneConfig`): The adapter's configuration.
        adapter_name (`str`): Its name.
        state_dict (`dict[str, torch.Tensor]`): Masks and head, by the names that PEFT derives from the file's.

    Returns:
        `dict[str, torch.Tensor]`: The same tensors, by the names that the model has for them.

    Raises:
        AdapterFileError: If a mask is missing, or a mask or the head does not fit the model.
    """
    layers = dict(adaprune_layers(model, adapter_name))
    keys = {name: f"{name}.adaprune_mask.{adapter_name}" for name in layers}
    names = {unwrapped_name(key): key for key in keys.values()}
    state = {names.get(key, key): tensor for key, tensor in state_dict.items()}
    problems = []
    for name, layer in layers.items():
        mask, size = state.get(keys[name]), layer.adaprune_mask[adapter_name].numel()
        if mask is None:
            problems.append(f"no mask for {name!r}")
        elif not layer.accepts(adapter_name, mask):
            problems.append(f"the mask for {name!r} is {tuple(mask.shape)} {mask.dtype}, not ({size},) torch.uint8")
    if problems:
        raise AdapterFileError(
            f"The adapter's file does not fit the model: {'; '.join(problems)}. "
            "Fetch the adapter again, or open it on the base that it was made for."
        )
    if config.is_stored:
        shapes = {f"{PREFIX}{stored_name(key, adapter_name)}": tuple(tensor.shape) for key, tensor in state.items()}
        check_head("The adapter's file", shapes, head_shapes(model, adapter_name))
    return state


def head_shapes(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors of an adapter's head, by their names in its file."""
    state = model.state_dict()
    return {stored_name(key, adapter_name): tuple(state[key].shape) for key in head_keys(model, adapter_name)}


def _leave_out_embeddings(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Remove embeddings from a state dict: PEFT saves them if targeted or resized, but they are the base's."""
    embeddings = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        # Audio models, for example, have neither.
        with suppress(AttributeError, NotImplementedError):
            embeddings.append(getattr(model, name)())
    names = [name for name, module in model.named_modules() if any(module is found for found in embeddings)]
    for key in [key for name in names for key in state_dict if key.startswith(f"{name}.")]:
        if ".modules_to_save." not in key:
            del state_dict[key]


def _group_counts(layers: dict[str, AdaPruneLayer], adapter_name: str) -> dict[str, list[int]] | None:
    masks = {
        plain_name(name): layer.scored_mask(adapter_name)
        for name, layer in layers.items()
        if layer.groups(adapter_name)
    }
    return {name: [int((~mask).sum()), mask.numel()] for name, mask in masks.items()} or None


def _shortest(
    packed: dict[str, torch.Tensor], layers: dict[str, AdaPruneLayer], adapter_name: str, config: AdaPruneConfig
) -> dict[str, torch.Tensor]:
    """Return masks as `mask_codec` stores them, and record the sizes of coded ones in the configuration."""
    stored = packed
    if config.mask_codec == AUTO:
        stored = {name: layer.encode(adapter_name, packed[name]) for name, layer in layers.items()}
    coded = {name: mask.numel() for name, mask in stored.items() if mask.numel() < packed[name].numel()}
    config.mask_bytes = {plain_name(name): size for name, size in coded.items()} or None
    return stored


def _report_unpruned(config: AdaPruneConfig) -> None:
    """Warn once if an adapter that no `Pruner` has updated is saved with nothing pruned."""
    pruned = sum(count for count, _ in (config.module_counts or {}).values())
    if config.final_sparsity and not pruned:
        logger.warning_once(
            "The adapter is saved with nothing pruned: training has not begun, or runs without a `Pruner`. Pass "
            "`callbacks=[AdaPruneCallback]` to the Trainer, or call `Pruner.step()` in your own training loop and "
            "`Pruner.finalize()` at its end."
        )
