"""Random inputs of a given size, for a model that is to be run and not understood."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from .errors import SizeError


def input_names(model: Any) -> list[str]:
    """Return which inputs a text model takes: `token_type_ids` only where it tells segments apart."""
    known = inspect.signature(model.forward).parameters
    has_segments = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1
    return ["input_ids", "attention_mask"] + ["token_type_ids"] * has_segments


def example_inputs(model: Any, batch_size: int, length: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Return inputs for a model, the same every time, on its device.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        batch_size (`int`): How many rows, >= 1.
        length (`int`): How many tokens a row, >= 1.
        padded (`bool`): Whether a third of every second row is padding.

    Returns:
        `dict[str, torch.Tensor]`: For each input an int64 tensor of shape `(batch_size, length)`.

    Raises:
        SizeError: If the model takes no batch of this size.
    """
    longest = longest_input(model)
    if batch_size < 1 or not 1 <= length <= longest:
        raise SizeError(
            f"The batch size must be at least 1 and the length between 1 and {longest}, the longest that "
            f"{type(model).__name__} has positions for; got {batch_size} and {length}."
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch_size, length), generator=generator)
    attended = torch.ones_like(ids)
    if padded:
        attended[1::2, length - length // 3 :] = 0
    segments = (torch.arange(length) >= length // 2).long().expand(batch_size, length).contiguous()
    every = {"input_ids": ids, "attention_mask": attended, "token_type_ids": segments}
    return {name: every[name].to(model.device) for name in input_names(model)}


def longest_input(model: Any) -> int:
    """Return how many tokens a row may have: RoBERTa and its kin need some of their positions for padding."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    return model.config.max_position_embeddings
