"""Combination of masks: a new adapter from several adapters of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper

from ..config import AdaPruneConfig
from ..errors import CombineError
from .groups import join_kinds
from .head import head_wrappers
from .layer import AdaPruneLayer
from .masked_layers import adaprune_layers, masking_adapters, put_masks


How = Literal["intersection", "union", "majority"]


def combine_adapters(
    model: Any, adapter_names: Sequence[str], how: How, new_name: str, *, head: str | None = None
) -> None:
    """Create a new adapter from the masks of several adapters of a model. The active adapter does not change.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`): The model.
        adapter_names (`Sequence[str]`): Two or more adapters. One that does not mask a module keeps all of it.
        how (`str`):
            Which weights are kept. `"intersection"`: those that all adapters keep, as if all were active. `"union"`:
            those that any adapter keeps. `"majority"`: those that more than half of the adapters keep.
        new_name (`str`): The new adapter's name.
        head (`str`, *optional*):
            The adapter whose head, as a copy, and labels the new adapter gets: any masked adapter of the model.
            Required if one of the combined adapters has a head, as heads cannot be combined.

    Raises:
        CombineError: If an adapter does not exist, if there are fewer than two, if `how` is invalid, if `head` is
            missing, if the new name is taken, or if nothing would be kept.

    Example:

        >>> combine_adapters(model, ["sst2", "mrpc", "rte"], "majority", "common", head="mrpc")
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    base: Any = tuner.model if isinstance(tuner, BaseTuner) else tuner
    wrappers = list(head_wrappers(base).values())
    _check(base, wrappers, list(adapter_names), how, new_name, head)
    layers = {name: layer for name, layer in adaprune_layers(base) if {*adapter_names} & {*layer.adaprune_mask}}
    grouped = _mask_the_same_groups(base.peft_config, list(layers.values()), adapter_names)
    masks = {name: _combine(layer, adapter_names, how, grouped) for name, layer in layers.items()}
    if not any(mask.any() for mask in masks.values()):
        raise CombineError(f"The {how} of {list(adapter_names)} keeps nothing: they have no weight in common.")
    config = _new_config(base.peft_config, adapter_names, head, masks, grouped)
    if how == "intersection" and not grouped:
        # A group that one of them prunes as a whole is pruned as a whole in the intersection.
        kinds = {kind for name in adapter_names for kind in base.peft_config[name].removable_kinds}
        config.whole_groups = join_kinds(kinds)
    config.combination = f"{how} of {', '.join(adapter_names)}"
    _add(tuner, new_name, config)
    put_masks(base, new_name, masks)
    pruned, total = zip(*(layer.pruned_and_total(new_name) for layer in layers.values()), strict=True)
    base.peft_config[new_name].final_sparsity = sum(pruned) / sum(total)
    for wrapper in wrappers:
        if head in wrapper.modules_to_save:
            wrapper.modules_to_save[new_name].load_state_dict(wrapper.modules_to_save[head].state_dict())


def _check(
    model: Any,
    wrappers: list[ModulesToSaveWrapper],
    names: list[str],
    how: How,
    new_name: str,
    head: str | None,
) -> None:
    there = masking_adapters(model)
    unknown = sorted({*names, *([] if head is None else [head])} - {*there})
    if unknown:
        raise CombineError(f"The model has no adapter {unknown}; it has {there}.")
    if len({*names}) < 2:
        raise CombineError(f"A combination needs at least two adapters, got {names}.")
    if how not in get_args(How):
        raise CombineError(f"`how` must be one of {list(get_args(How))}, got {how!r}.")
    if new_name in model.peft_config:
        raise CombineError(f"There is an adapter {new_name!r} already: choose another `new_name`.")
    with_head = [name for name in names if any(name in wrapper.modules_to_save for wrapper in wrappers)]
    if head is None and with_head:
        raise CombineError(f"{with_head} have heads: name with `head=` the adapter whose head to use.")


def _mask_the_same_groups(configs: Any, layers: list[AdaPruneLayer], names: Sequence[str]) -> bool:
    """Return whether all adapters mask the same groups, so that groups are combined instead of weights."""
    return len({configs[name].granularity for name in names}) == 1 and all(
        layer.groups(name) is not None for layer in layers for name in names
    )


def _combine(layer: AdaPruneLayer, names: Sequence[str], how: How, grouped: bool) -> torch.Tensor:
    there = [name for name in names if name in layer.adaprune_mask]
    masks = torch.stack([layer.scored_mask(name) if grouped else layer.mask(name) for name in there])
    # An adapter without a mask here keeps everything.
    num_keeping = masks.sum(0) + (len(names) - len(there))
    return num_keeping >= {"intersection": len(names), "union": 1, "majority": len(names) // 2 + 1}[how]


def _new_config(
    configs: Any, names: Sequence[str], head: str | None, masks: dict[str, torch.Tensor], grouped: bool
) -> AdaPruneConfig:
    config: AdaPruneConfig = configs[names[0] if head is None else head].for_masks(masks)
    if grouped:
        config.granularity, config.target_modules = configs[names[0]].granularity, configs[names[0]].target_modules
    config.mask_embeddings = any(configs[name].mask_embeddings for name in names)
    return config


def _add(tuner: Any, new_name: str, config: AdaPruneConfig) -> None:
    if isinstance(tuner, BaseTuner):
        tuner.peft_config[new_name] = config
        tuner.inject_adapter(tuner.model, new_name)
        return
    active = tuner.active_adapters()
    tuner.add_adapter(config, new_name)
    tuner.set_adapter(active)
