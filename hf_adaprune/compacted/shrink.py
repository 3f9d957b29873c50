"""Shrink linear layers and attention modules in place."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..tuner.groups import input_dim


# Attributes of attention modules that hold the number of heads, and the width of all heads together.
_COUNTS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
_WIDTHS = ("all_head_size", "split_size")


def keep_inputs(layer: Any, kept: torch.Tensor) -> None:
    """Keep only some of a linear layer's inputs.

    Args:
        layer (`torch.nn.Linear` or `Conv1D`): The layer; changed in place.
        kept (`torch.Tensor`): Boolean, of shape `(inputs,)`, or the indices of those to keep.
    """
    _take(layer, "weight", input_dim(layer), kept)
    _note_features(layer)


def keep_outputs(layer: Any, kept: torch.Tensor) -> None:
    """Keep only some of a linear layer's outputs; see `keep_inputs`."""
    _take(layer, "weight", 1 - input_dim(layer), kept)
    if layer.bias is not None:
        _take(layer, "bias", 0, kept)
    _note_features(layer)


def keep_heads(attention: nn.Module, num_heads: int, kept: Sequence[int]) -> None:
    """Update an attention module whose linear layers have already lost heads.

    A forward pre-hook cuts inputs that have one slice per head, such as a position bias, to the remaining heads.

    Args:
        attention (`torch.nn.Module`): The module that holds the query, key and value layers; changed in place.
        num_heads (`int`): The number of heads that it had.
        kept (`Sequence[int]`): The indices of the remaining heads.
    """
    values = vars(attention)
    for name in _COUNTS:
        if values.get(name) == num_heads:
            values[name] = len(kept)
    for name in _WIDTHS:
        if isinstance(values.get(name), int):
            values[name] = values[name] // num_heads * len(kept)

    attention.register_forward_pre_hook(functools.partial(_cut_inputs, num_heads, list(kept)), with_kwargs=True)


def _cut_inputs(
    num_heads: int, kept: list[int], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, Any]:
    """Cut the inputs of an attention module that have one slice per head, to the remaining heads."""

    def cut(value: Any) -> Any:
        per_head = isinstance(value, torch.Tensor) and value.ndim == 4 and value.shape[1] == num_heads
        return value[:, kept] if per_head else value

    return tuple(map(cut, args)), {name: cut(value) for name, value in kwargs.items()}


def compose_heads(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Compose two removals of heads: return which of the original heads are left after both."""
    return {"of": before["of"], "kept": [before["kept"][head] for head in after["kept"]]}


def shrink(body: nn.Module, widths: Mapping[str, Sequence[int]], heads: Mapping[str, Mapping[str, Any]]) -> None:
    """Give a freshly built model the layer shapes of a compacted one; its weights are loaded afterwards.

    Args:
        body (`torch.nn.Module`): The model without its head; changed in place.
        widths (`Mapping[str, Sequence[int]]`): The number of inputs and outputs of each linear layer that was shrunk.
        heads (`Mapping[str, Mapping[str, Any]]`): For each attention module that lost heads, how many it had
            (`"of"`) and which are left (`"kept"`).
    """
    for name, (inputs, outputs) in widths.items():
        layer = body.get_submodule(name)
        keep_inputs(layer, torch.arange(inputs))
        keep_outputs(layer, torch.arange(outputs))
    for name, head in heads.items():
        keep_heads(body.get_submodule(name), head["of"], head["kept"])


def _take(layer: Any, name: str, dim: int, kept: torch.Tensor) -> None:
    parameter = getattr(layer, name)
    index = (kept.nonzero().squeeze(1) if kept.dtype == torch.bool else kept).to(parameter.device)
    taken = parameter.detach().index_select(dim, index)
    setattr(layer, name, nn.Parameter(taken, requires_grad=parameter.requires_grad))


def _note_features(layer: Any) -> None:
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = layer.weight.shape
    else:
        layer.out_features, layer.in_features = layer.weight.shape
