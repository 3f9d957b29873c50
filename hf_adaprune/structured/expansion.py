"""Turn masks over a compacted model into masks over the original one, in which removed groups are pruned."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import AdaPruneConfig
from ..errors import BaseMismatchError, ConfigError, NotPrunedError
from ..labels import LABEL_FIELDS
from ..merging import merged, unmasked
from ..tuner.groups import Groups, join_kinds
from ..tuner.head import head_wrappers
from ..tuner.layer import AdaPruneLayer
from ..tuner.masked_layers import adaprune_layers, put_masks
from .compaction import active_config, base_of, difference, hidden_states, kept_groups


def expand(small: Any, whole: Any) -> PreTrainedModel:
    """Return the base of `whole` with a single adapter that computes what `small` computes.

    This is for pruning in two stages: neurons and heads first, then single weights of the compacted model. The result
    combines both stages in one adapter over the original base. It is saved, pushed and opened like any other, and
    `compact` produces the smaller model from it again.

    Args:
        small (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model that `compact` has returned, with an active AdaPrune adapter. Not modified.
        whole (`peft.PeftModel` or `transformers.PreTrainedModel`):
            The model that was passed to `compact`, with the same adapter active. Not modified.

    Returns:
        `transformers.PreTrainedModel`: A copy of the base in evaluation mode, with the adapter `"default"` and the
        head of `small`.

    Raises:
        NotPrunedError: If `small` does not have exactly one active AdaPrune adapter, or `whole` has none.
        CompactionError: If the active masks of `whole` prune no neuron or head as a whole, or one of the models is not
            a transformers model or has an adapter of another method.
        ConfigError: If `small` masks weights that were trained for `whole`, as part of `modules_to_save`.
        BaseMismatchError: If `small` is not `whole` compacted under its active masks.

    Example:

        >>> trainer = Trainer(model, ..., callbacks=[AdaPruneCallback(AdaPruneConfig(granularity="neuron+head"))])
        >>> trainer.train()
        >>> small = compact(trainer.model)
        >>> Trainer(small, ..., callbacks=[AdaPruneCallback]).train()
        >>> expand(small, trainer.model).push_to_hub("me/bert-sst2")
    """
    small, whole = base_of(small), base_of(whole)
    name, base, blocks = _active_adapter(small), unmasked(whole), kept_groups(whole)
    retrained = tuple(f"{module}." for module in _trained_whole(whole))
    if any(module.startswith(retrained) for module, _ in adaprune_layers(small, name)):
        raise ConfigError(
            f"`small` has masks over weights that the adapter of `whole` trained, not the base's: {retrained}. Leave "
            "these modules out of `modules_to_save` in the first run."
        )
    left: dict[str, torch.Tensor] = {}
    for block, kept in blocks:
        left |= Groups(block, base).masks(kept)
    masks = left | {module: _widened(layer, name, left.get(module)) for module, layer in adaprune_layers(small, name)}
    for module, layer in adaprune_layers(whole):
        for active in layer.active_masks:
            mask = layer.mask(active).cpu()
            masks[module] = mask & masks.get(module, mask)
    config = _config_over(active_config(whole), active_config(small).for_masks(masks))
    config.whole_groups = join_kinds({block.kind for block, kept in blocks if not kept.all()})
    base.add_adapter(config)
    put_masks(base, "default", masks)
    for module, state in (_trained_whole(whole) | _trained_whole(small)).items():
        trained: Any = base.get_submodule(module)
        trained.modules_to_save["default"].load_state_dict(state)
    # Allow for half-precision rounding if either model is in half precision.
    dtype = base.dtype if base.dtype == small.dtype else torch.bfloat16
    problem = difference(hidden_states(merged(base)), hidden_states(merged(small)), dtype)
    if problem:
        raise _mismatch(problem)
    return base


def _active_adapter(small: PreTrainedModel) -> str:
    names = {name for _, layer in adaprune_layers(small) for name in layer.active_masks}
    if len(names) != 1:
        raise NotPrunedError(
            f"The smaller model must have exactly one active AdaPrune adapter, got {sorted(names)}: train one, or "
            "activate one with `set_adapter`."
        )
    return names.pop()


def _trained_whole(model: PreTrainedModel) -> dict[str, dict[str, torch.Tensor]]:
    """Return the state of each module that the active adapter holds a copy of: the head and `modules_to_save`."""
    return {
        name: wrapper.modules_to_save[wrapper.active_adapter].state_dict()
        for name, wrapper in head_wrappers(model).items()
        if wrapper.active_adapters
    }


def _widened(layer: AdaPruneLayer, name: str, left: torch.Tensor | None) -> torch.Tensor:
    """Return a layer's mask in the layer's original shape, in which `left` marks the weights that were not removed."""
    mask = layer.mask(name).cpu()
    if left is None:
        return mask
    if int(left.sum()) != mask.numel():
        raise _mismatch(f"a layer has shape {tuple(mask.shape)}, where the masks keep {int(left.sum())} weights")
    widened = left.clone()
    widened[left] = mask.flatten()
    return widened


def _config_over(first: AdaPruneConfig, config: AdaPruneConfig) -> AdaPruneConfig:
    """Change `config` in place to describe an adapter over the base of `first`, with its own labels; return it."""
    for field in ("base_model_name_or_path", "revision", "num_parameters"):
        setattr(config, field, getattr(first, field))
    config.modules_to_save = sorted({*(first.modules_to_save or ()), *(config.modules_to_save or ())}) or None
    labels = {field: value for field, value in (config.model_config or {}).items() if field in LABEL_FIELDS}
    whole_config = {field: value for field, value in (first.model_config or {}).items() if field not in LABEL_FIELDS}
    config.model_config = whole_config | labels
    config.combination = "intersection of masks of neurons and heads with masks of the remaining weights"
    return config


def _mismatch(reason: str) -> BaseMismatchError:
    return BaseMismatchError(
        f"`small` must be `whole` compacted under its active masks, but {reason}. Give `expand` the model that was "
        "given to `compact`, with the same adapter active."
    )
