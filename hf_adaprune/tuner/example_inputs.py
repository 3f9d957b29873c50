"""Example inputs for trial forward passes of text models, and copies to run them on."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import torch
from torch import nn

from ..errors import SizeError


# The maximum number of tokens per row for models whose positions are relative and set no limit.
_DEFAULT_MAX_LENGTH = 1024


def input_names(model: Any) -> list[str]:
    """Return the names of a text model's inputs, with `token_type_ids` only if it distinguishes segments."""
    known = inspect.signature(model.forward).parameters
    has_segments = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if has_segments else [])]


def example_inputs(model: Any, batch_size: int, length: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Return deterministic example inputs for a model, on its device.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        batch_size (`int`): The number of rows, >= 1.
        length (`int`): The number of tokens per row, in [1, `longest_input(model)`].
        padded (`bool`): Whether the last third of every second row is padding.

    Returns:
        `dict[str, torch.Tensor]`: For each input an int64 tensor of shape `(batch_size, length)`; for multiple-choice
        models `(batch_size, 2, length)`, with two identical choices.

    Raises:
        SizeError: If `batch_size` or `length` is out of range.
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
    inputs = {name: every[name].to(model.device) for name in input_names(model)}
    is_choice = type(model).__name__.endswith("ForMultipleChoice")
    return {name: torch.stack([tensor, tensor], 1) for name, tensor in inputs.items()} if is_choice else inputs


def dummy_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return the dummy inputs that transformers defines for a model, on its device."""
    return {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items() if tensor is not None}


def tensor_sharing_copy(model: Any) -> Any:
    """Return a copy of a model for trial runs, in evaluation mode, that shares its parameters and buffers.

    A forward pass can change a model permanently: BigBird switches off its sparse attention at the first input that is
    too short for it.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def longest_input(model: Any) -> int:
    """Return the maximum number of tokens per row; RoBERTa-like models reserve some positions for padding."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    longest = getattr(model.config, "max_position_embeddings", None) or 0
    return longest if longest > 0 else _DEFAULT_MAX_LENGTH  # XLNet has -1
