"""Read masks from a stored adapter, without its base, or from a model in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..compacted.compact_model import MODEL_TYPE, class_for, config_class, stock_class
from ..config import AdaPruneConfig
from ..errors import AdapterFileError, NoMatchingModuleError, NotPrunedError
from ..files.weights_file import read_masks
from ..masks import unpack_mask
from ..storage.stored_adapter import read_adapter, read_config
from ..tensor_names import plain_name
from ..tuner.groups import Groups, innermost
from ..tuner.masked_layers import adaprune_layers, chosen_adapter
from ..tuner.structure import stored_blocks
from .names import in_order


# Fields that could make transformers download code, or create a billion labels.
_NOT_TAKEN = {"attn_implementation", "_attn_implementation", "experts_implementation", "auto_map", "num_labels"}
_MAX_LAYERS = 1000

# The masks of one adapter: module name -> boolean tensor, True = kept.
Masks = Mapping[str, torch.Tensor]


def load_masks(name_or_path: str | Path, **hub: Any) -> dict[str, torch.Tensor]:
    """Read the masks of a stored adapter.

    The base is neither needed nor loaded, unless the masks are entropy-coded with its weights.

    Args:
        name_or_path (`str` or `Path`): The adapter's folder, or its name on the Hub.
        hub: Further arguments of `huggingface_hub.hf_hub_download`: `subfolder`, `revision`, `token`, `cache_dir`, ...

    Returns:
        `dict[str, torch.Tensor]`:
            The mask of each module, boolean, True = kept, of shape `(outputs, inputs)`; that of a `Conv1D` is
            transposed to this. A mask of neurons or heads is expanded to all the modules that hold their weights. The
            mask of an embedding has shape `(tokens, width)`. An adapter of a model class that transformers does not
            have stores no shapes: its masks are flat.

    Raises:
        AdapterFileError: If the adapter is of another method, was never saved, or is damaged.
        AdapterNotFoundError: If there is no adapter of that name, or no base to decode entropy-coded masks with.
        BaseMismatchError: If that base is not the one that they were coded with.

    Example:

        >>> masks = load_masks("me/sst2-adaprune", revision="v2")
    """
    config = read_config(str(name_or_path), **hub)
    if config.mask_bytes:
        return model_masks(read_adapter(name_or_path, **hub).open())
    packed = read_masks(str(name_or_path), config, **hub)
    skeleton: Any = _skeleton(config)
    blocks = {} if skeleton is None else stored_blocks(skeleton, config)
    masks: dict[str, torch.Tensor] = {}
    for name, bits in packed.items():
        module: Any = None if skeleton is None else skeleton.get_submodule(name)
        if name in blocks:
            groups = Groups(blocks[name], skeleton)
            masks |= groups.masks(unpack_mask(bits, groups.shape))
        else:
            shape = torch.Size([config.mask_entries[name]]) if module is None else module.weight.shape
            masks[name] = unpack_mask(bits, shape)
    return _outputs_first(masks, skeleton)


def model_masks(model: nn.Module, adapter_name: str | None = None) -> dict[str, torch.Tensor]:
    """Return the masks of a model in memory, during or after training.

    Args:
        model (`torch.nn.Module`): A model with an AdaPrune adapter.
        adapter_name (`str`, *optional*): Which adapter of the model; by default the active one.

    Returns:
        `dict[str, torch.Tensor]`: The masks, with the same names and shapes as from `load_masks`.

    Raises:
        NotPrunedError: If the model has no such adapter, or several are active and none is named.
    """
    adapter_name = chosen_adapter(model, adapter_name)
    layers = {plain_name(name): layer for name, layer in adaprune_layers(model, adapter_name)}
    masks: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        groups = layer.groups(adapter_name)
        masks |= {name: layer.mask(adapter_name)} if groups is None else groups.masks(layer.scored_mask(adapter_name))
    return _outputs_first(masks, model.get_base_model() if isinstance(model, PeftModel) else model)


def model_weights(model: nn.Module, masks: Masks) -> dict[str, torch.Tensor]:
    """Return the weights under the masks, from the base or from any model that contains it.

    Args:
        model (`torch.nn.Module`): The base, with or without a head or an adapter.
        masks (`Masks`): Masks as returned by `load_masks` or `model_masks`.

    Returns:
        `dict[str, torch.Tensor]`: For each mask its weight, of the mask's shape.

    Raises:
        NoMatchingModuleError: If the model lacks one of the modules, or has one of another size.
    """
    modules = {plain_name(name): module for name, module in model.named_modules()}
    # In a base that was loaded without a head, module names lack the prefix of the body.
    prefix = getattr(model, "base_model_prefix", "")
    modules = {f"{prefix}.{name}": module for name, module in modules.items()} | modules
    weights, missing = {}, []
    for name, mask in masks.items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        weight = weight if weight is None else _turned(weight.detach(), module)
        if weight is None or weight.numel() != mask.numel():
            missing.append(name)
        else:
            weights[name] = weight.reshape(mask.shape)
    if missing:
        raise NoMatchingModuleError(
            f"The model has no weights of the masks' size under {missing}. Give the base that the adapter was made "
            "for."
        )
    return weights


def transformers_config(config: AdaPruneConfig | PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the model that a stored adapter was made for.

    Args:
        config (`AdaPruneConfig` or `PreTrainedConfig`): The adapter's; that of a model is returned unchanged.

    Returns:
        `PreTrainedConfig`: The configuration of the model.

    Raises:
        NotPrunedError: If the adapter was made for a model that is not a transformers model.
        AdapterFileError: If the stored `model_config` is not a valid model configuration.
    """
    if isinstance(config, PreTrainedConfig):
        return config
    if config.model_config is None:
        raise NotPrunedError(
            "The adapter's configuration has no `model_config`, because it was not made for a transformers model: "
            "give the configuration of the model itself."
        )
    told = {key: value for key, value in config.model_config.items() if key not in _NOT_TAKEN}
    try:
        is_compact = told.get("model_type") == MODEL_TYPE
        found = config_class(told["base_model_type"]).from_dict(told) if is_compact else AutoConfig.for_model(**told)
    except Exception as error:
        raise _no_model(error) from None
    num_layers = getattr(found, "num_hidden_layers", None) or 0
    if not isinstance(num_layers, int) or num_layers > _MAX_LAYERS:
        raise _no_model(f"{num_layers} layers")
    return found


def _no_model(reason: object) -> AdapterFileError:
    return AdapterFileError(
        f"The `model_config` in the adapter's configuration must describe the model under the masks: {reason}. "
        "Fetch the adapter again."
    )


def check_matrices(masks: Masks) -> None:
    """Raise if there are no masks, or some of them are not matrices.

    Raises:
        ValueError: If `masks` is empty, or a mask does not have two dimensions.
    """
    flat = [name for name, mask in masks.items() if mask.dim() != 2]
    if flat or not masks:
        raise ValueError(
            f"Masks must be matrices; got {len(masks)}, of which these are not: {flat}. An adapter whose model "
            "transformers does not know is stored without shapes: reshape its masks, or use `model_masks` of the "
            "model."
        )


def _skeleton(config: AdaPruneConfig) -> nn.Module | None:
    """Return the adapter's model on the meta device, or `None` if transformers has no such class."""
    cls = stock_class(config.architecture)
    if cls is None:
        return None
    told: Any = transformers_config(config)
    try:
        with torch.device("meta"):
            skeleton: nn.Module = class_for(cls, told)(told)
    except Exception as error:
        raise _no_model(error) from None
    sizes = {
        key.removesuffix(".weight"): parameter.numel()
        for key, parameter in skeleton.named_parameters(remove_duplicate=False)
        if key.endswith(".weight")
    }
    strangers = [name for name in config.mask_entries if name not in sizes]
    if not config.group_counts:
        strangers += [name for name, length in config.mask_entries.items() if sizes.get(name, length) != length]
    if strangers:
        raise _no_model(f"it has no {strangers} of the masks' sizes")
    return skeleton


def _outputs_first(masks: Masks, model: nn.Module | None) -> dict[str, torch.Tensor]:
    modules: Any = {} if model is None else {name: model.get_submodule(name) for name in masks}
    return {name: _turned(masks[name], modules.get(name)) for name in in_order(list(masks))}


def _turned(tensor: torch.Tensor, module: Any) -> torch.Tensor:
    return tensor.T if isinstance(innermost(module), Conv1D) else tensor
