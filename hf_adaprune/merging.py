"""Plain copies of a masked model, with its masks merged or without them."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from .errors import NotPrunedError
from .model import AdaPruneModel
from .tuner.head import head_wrappers
from .tuner.masked_layers import adaprune_layers, has_masks


def merged(model: Any) -> PreTrainedModel:
    """Return what `merge_and_unload` would, without changing the model.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an adapter, added by `peft` or by transformers itself.

    Returns:
        `transformers.PreTrainedModel`: A plain copy, in evaluation mode, with all of its parameters trainable.

    Raises:
        NotPrunedError: If the model has no AdaPrune adapter.
        MergeError: If there are layers of another method around the masked ones, or if a masked weight is shared with
            a module under another mask or none.
    """
    return _cleared(_tuner_of_copy(model).merge_and_unload())


def unmasked(model: Any) -> PreTrainedModel:
    """Return a copy of the base, with its own weights, head and labels, without changing the model; see `merged`.

    This differs from `unload`, which leaves the head of the active adapter in place.
    """
    tuner = _tuner_of_copy(model)
    for _, layer in adaprune_layers(tuner):
        if layer.merged:
            layer.unmerge()
    tuner._enable_adapter_layers(False)
    for wrapper in head_wrappers(tuner).values():
        wrapper._active_adapter = []
    return _cleared(tuner.unload())


def _tuner_of_copy(model: Any) -> AdaPruneModel:
    model = getattr(model, "_orig_mod", model)  # of a compiled model
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not has_masks(base):
        raise NotPrunedError(f"This {type(base).__name__} has no masks: open or train an adapter on it first.")
    return AdaPruneModel.around(copy.deepcopy(base))


def _cleared(plain: Any) -> PreTrainedModel:
    """Remove what an adapter and its training leave on a model: methods, a flag, key conversions, and autocast."""
    for module in plain.modules():  # a sentence-transformers model contains the transformers model
        if vars(module).pop("_original_forward", None) is not None:
            vars(module).pop("forward", None)  # accelerate's, which computes in lower precision
        for name in ("create_or_update_model_card", "_hf_peft_config_loaded", "_weight_conversions"):
            vars(module).pop(name, None)
    return plain.requires_grad_().eval()
