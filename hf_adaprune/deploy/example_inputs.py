"""What to run a model on, and in which copy, when it is to be run and not understood."""

from __future__ import annotations

import copy
import inspect
import itertools
from typing import Any

import torch
from torch import nn

from ..errors import SizeError


# How many tokens a row may have where positions are relative, and set no limit.
DEFAULT_MAX_LENGTH = 1024


def input_names(model: Any) -> list[str]:
    """Return which inputs a text model takes: `token_type_ids` only where it tells segments apart."""
    known = inspect.signature(model.forward).parameters
    has_segments = "token_type_ids" in known and getattr(model.config, "type_vocab_size", 0) > 1
    return ["input_ids", "attention_mask", *(["token_type_ids"] if has_segments else [])]


def example_inputs(model: Any, batch_size: int, length: int, *, padded: bool = False) -> dict[str, torch.Tensor]:
    """Return inputs for a model, the same every time, on its device.

    Args:
        model (`transformers.PreTrainedModel`): The model.
        batch_size (`int`): How many rows, >= 1.
        length (`int`): How many tokens a row, >= 1.
        padded (`bool`): Whether a third of every second row is padding.

    Returns:
        `dict[str, torch.Tensor]`: For each input an int64 tensor of shape `(batch_size, length)`; for models of
        multiple choice `(batch_size, 2, length)`, the two choices alike.

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
    inputs = {name: every[name].to(model.device) for name in input_names(model)}
    is_choice = type(model).__name__.endswith("ForMultipleChoice")
    return {name: torch.stack([tensor, tensor], 1) for name, tensor in inputs.items()} if is_choice else inputs


def dummy_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Return the few tokens that transformers has for trying out a model, on its device."""
    return {name: tensor.to(model.device) for name, tensor in model.dummy_inputs.items() if tensor is not None}


def tensor_sharing_copy(model: Any) -> Any:
    """Return a copy to try things on: of the same tensors, not of equal ones, and in evaluation mode.

    A pass can change a model for good: BigBird gives up its sparse attention at the first input too short for it.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()


def longest_input(model: Any) -> int:
    """Return how many tokens a row may have: RoBERTa and its kin need some of their positions for padding."""
    for name, module in model.named_modules():
        if (
            name.endswith("position_embeddings")
            and isinstance(module, nn.Embedding)
            and module.padding_idx is not None
        ):
            return module.num_embeddings - module.padding_idx - 1
    longest = getattr(model.config, "max_position_embeddings", None) or 0
    return longest if longest > 0 else DEFAULT_MAX_LENGTH  # XLNet says -1
