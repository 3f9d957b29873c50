"""A plain copy of a masked model, with zeros where it is pruned."""

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
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not any(True for _ in adaprune_layers(base)):
        raise NotPrunedError(f"There is no AdaPrune adapter on this {type(base).__name__}.")
    plain = AdaPruneModel.around(copy.deepcopy(base)).merge_and_unload()
    for name in ("create_or_update_model_card", "_hf_peft_config_loaded"):
        vars(plain).pop(name, None)
    return plain.eval()
