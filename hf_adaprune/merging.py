"""Plain copies of a masked model: with zeros where it is pruned, or as it was."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from .errors import NotPrunedError
from .layer import adaprune_layers
from .model import AdaPruneModel


def merged(model: Any) -> PreTrainedModel:
    """Return what `merge_and_unload` would, and leave the model as it is.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an adapter, put on it by `peft` or by transformers itself.

    Returns:
        `transformers.PreTrainedModel`: A plain copy, in evaluation mode.

    Raises:
        NotPrunedError: If the model has no AdaPrune adapter.
    """
    return _without_adapter(model, merge=True)


def unmasked(model: Any) -> PreTrainedModel:
    """Return what `unload` would, the base with its own head, and leave the model as it is; see `merged`."""
    return _without_adapter(model, merge=False)


def _without_adapter(model: Any, merge: bool) -> PreTrainedModel:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not any(True for _ in adaprune_layers(base)):
        raise NotPrunedError(f"There is no AdaPrune adapter on this {type(base).__name__}.")
    tuner = AdaPruneModel.around(copy.deepcopy(base))
    plain = tuner.merge_and_unload() if merge else tuner.unload()
    # What transformers leaves of an adapter that it has loaded: a card, a flag, and how its keys are renamed.
    for name in ("create_or_update_model_card", "_hf_peft_config_loaded", "_weight_conversions"):
        vars(plain).pop(name, None)
    return plain.eval()
