"""Random inputs of a given size, for a model that is to be run and not understood."""

from __future__ import annotations

import inspect
from typing import Any

import torch


def input_names(model: Any) -> list[str]:
    """Return which inputs a text model takes: `token_type_ids` only where it tells segments apart."""
    known = inspect.signature(model.forward).parameters
    has_segments = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1
    return ["input_ids", "attention_mask"] + ["token_type_ids"] * has_segments


def example_inputs(model: Any, batch_size: int, length: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Return inputs for a model, the same every time, on its device.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        batch_size (`int`): How many rows.
        length (`int`): How many tokens a row.
        padded (`bool`): Whether a third of every second row is padding.

    Returns:
        `dict[str, torch.Tensor]`: For each input an int64 tensor of shape `(batch_size, length)`.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (batch_size, length), generator=generator)
    attended = torch.ones_like(ids)
    if padded:
        attended[1::2, length - length // 3 :] = 0
    segments = (torch.arange(length) >= length // 2).long().expand(batch_size, length).contiguous()
    every = {"input_ids": ids, "attention_mask": attended, "token_type_ids": segments}
    return {name: every[name].to(model.device) for name in input_names(model)}
