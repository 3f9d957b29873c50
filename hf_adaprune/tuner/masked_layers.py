"""The masked layers of a model, and how many of their weights are pruned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import NotPrunedError
from ..masks import pack_mask
from ..tensor_names import unwrapped_name
from .layer import AdaPruneLayer


def module_counts(model: nn.Module, adapter_name: str) -> dict[str, tuple[int, int]]:
    """Return, by module name, how many weights an adapter prunes in the module, and how many the module has.

    Where groups are masked, this includes every module in which a group has weights.
    """
    counts: dict[str, tuple[int, int]] = {}
    for name, layer in adaprune_layers(model, adapter_name):
        groups = layer.groups(adapter_name)
        if groups is None:
            counts[name] = layer.pruned_and_total(adapter_name)
            continue
        prefix = unwrapped_name(name).removesuffix(groups.block.consumer)
        num_pruned = int((~layer.scored_mask(adapter_name)).count_nonzero())
        counts |= {f"{prefix}{key}": count for key, count in groups.counts(num_pruned).items()}
    return counts


def adaprune_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, AdaPruneLayer]]:
    """Yield the names and masked layers of a model, all of them or only those that have the given adapter."""
    for name, module in model.named_modules():
        if isinstance(module, AdaPruneLayer) and (adapter_name is None or adapter_name in module.adaprune_mask):
            yield name, module


def masking_adapters(model: nn.Module) -> list[str]:
    """Return the names of the adapters that have masks on a model, in the order in which they were added."""
    return list(dict.fromkeys(name for _, layer in adaprune_layers(model) for name in layer.adaprune_mask))


def chosen_adapter(model: nn.Module, adapter_name: str | None = None) -> str:
    """Return the name of an adapter that has masks on a model: the given one, or by default the active one.

    Raises:
        NotPrunedError: If the model has no such adapter, or several are active and none is given.
    """
    names = masking_adapters(model)
    if not names:
        raise NotPrunedError(
            "The model has no masks: add them by `peft.get_peft_model(model, AdaPruneConfig())`, or open an adapter "
            "on it by `PeftModel.from_pretrained`."
        )
    active = [name for name in names if name in next(adaprune_layers(model))[1].active_adapters]
    if adapter_name is None and len(active or names) > 1:
        which = f"Several adapters are active, {active}" if active else f"None of the adapters {names} is active"
        raise NotPrunedError(f"{which}: name one by `adapter_name=`.")
    if adapter_name not in (None, *names):
        raise NotPrunedError(f"The model has no masks under the adapter name {adapter_name!r}: it has {names}.")
    return adapter_name or (active or names)[0]


def put_masks(model: nn.Module, adapter_name: str, masks: Mapping[str, torch.Tensor]) -> None:
    """Set the masks of an adapter that is not trained, by module name, each in the shape of `scored_mask`."""
    for name, layer in adaprune_layers(model, adapter_name):
        layer.adaprune_mask[adapter_name].copy_(pack_mask(masks[name]))
        layer.config(adapter_name).in_memory.masks_loaded = True


def is_foreign(module: nn.Module) -> bool:
    """Return whether a module is the layer of another PEFT method."""
    return isinstance(module, BaseTunerLayer) and not isinstance(module, AdaPruneLayer)


def has_foreign_layers(model: nn.Module) -> bool:
    """Return whether an adapter of another PEFT method is, or has been, on a model."""
    return any(is_foreign(module) for module in model.modules())


def added_parameters(model: nn.Module) -> set[int]:
    """Return the ids of a model's parameters that belong to adapters, of any method, and not to the base."""
    added: set[int] = set()
    for module in model.modules():
        for cls, own in ((BaseTunerLayer, "base_layer."), (AuxiliaryTrainingWrapper, "original_module.")):
            if isinstance(module, cls):
                added.update(id(p) for name, p in module.named_parameters() if not name.startswith(own))
    return added


def has_masks(model: Any) -> bool:
    """Return whether this is a model with masked layers, for any adapter."""
    return isinstance(model, nn.Module) and any(isinstance(module, AdaPruneLayer) for module in model.modules())
