"""Batches of several tasks: each sample is computed with its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import nn
from transformers.cache_utils import Cache

from ..errors import MixedBatchError
from ..overrides import override, restore
from .head_sync import active_only, head_sync_of
from .masked_layers import adaprune_layers, is_foreign, masking_adapters


BASE = "__base__"
"""The name of the base: no masks, and its own head."""


@contextmanager
def mixed_batch(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Compute each sample of a batch with its own adapter, within the context.

    The rows of each adapter are computed together, one adapter after the other, and returned in the original order:
    the result is that of a separate batch per adapter. `peft_model(**batch, adapter_names=[...])` does the same. The
    masked weights of one adapter at a time are built, in each forward pass.

    A loss is the mean over all labels of the batch. Only the model's own forward pass knows the names: in the context,
    its parts and other methods refuse to compute, and so does `generate`, as there is no cache. The names are those of
    the rows that the model gets (`SentenceTransformer.encode` sorts texts by their length first). While one thread is
    in the context, no other may use the model: both would switch its adapters.

    Args:
        model (`torch.nn.Module`): A transformers model with AdaPrune adapters, in evaluation mode.
        adapter_names (`Sequence[str]`): One for each sample; `"__base__"` is the base, with its own head.

    Raises:
        MixedBatchError: If a name is unknown, heads have different sizes, or the model is in training mode or merged;
            in the forward pass, if the number of names is not that of samples, or a cache is given; and in any
            computation with masked weights that is not the model's own forward pass.

    Example:

        >>> with mixed_batch(model, ["sst2", "mrpc", "__base__"]):
        ...     logits = model(**batch).logits
    """
    _check(model, adapter_names)
    gate = _Gate()
    handles = [layer.register_forward_pre_hook(gate) for _, layer in adaprune_layers(model)]
    override(model, "forward", _forward, model, model.forward, list(adapter_names), gate)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        restore(model, "forward", _forward)


class _Gate:
    """Forward pre-hook of masked layers that lets them compute only within the model's own forward pass."""

    is_open = False

    def __call__(self, layer: nn.Module, args: Any) -> None:
        if not self.is_open:
            raise MixedBatchError(
                "In a mixed batch only the model's own forward pass computes each sample with its adapter: call the "
                "model itself, not a part or another method of it, or use a separate batch for each adapter."
            )


def _check(model: nn.Module, adapter_names: Sequence[str]) -> None:
    if model.training:
        raise MixedBatchError(
            "A mixed batch is for inference, but the model is in training mode: call `model.eval()` first."
        )
    layers = [layer for _, layer in adaprune_layers(model)]
    if any(layer.merged for layer in layers):
        raise MixedBatchError("An adapter is merged into the model's weights: call `unmerge_adapter()` first.")
    if any(is_foreign(module) and not module.disable_adapters and _has_active(module) for module in model.modules()):
        raise MixedBatchError(
            "An adapter of another method is active, and would act on every sample: first call `set_adapter` with "
            "adapters of masks alone."
        )
    if isinstance(adapter_names, str):
        raise MixedBatchError(f"`adapter_names` must be a list with a name for each sample, got {adapter_names!r}.")
    there = masking_adapters(model)
    unknown = sorted({str(name) for name in adapter_names} - {*there, BASE})
    if unknown:
        raise MixedBatchError(f"The model has no adapter {unknown}; use {there}, or {BASE!r} for the base.")
    head = head_sync_of(model)
    if head is None or not head.heads:
        return
    configs: Any = model.peft_config
    sizes = {name: head.num_labels(None if name == BASE else configs[name]) for name in adapter_names}
    if len(set(sizes.values())) > 1:
        raise MixedBatchError(
            f"The heads of a mixed batch must have one size, got {sizes}: their outputs do not fit into one tensor. "
            "Use a separate batch for each size."
        )


def _forward(
    model: nn.Module, forward: Callable[..., Any], adapter_names: list[str], gate: _Gate, *args: Any, **kwargs: Any
) -> Any:
    if kwargs.get("past_key_values") is not None:
        raise MixedBatchError("A mixed batch has no cache and cannot generate: generate for each adapter separately.")
    size = _batch_size(model, args, kwargs)
    if len(adapter_names) != size:
        raise MixedBatchError(
            f"`adapter_names` must have a name for each sample, got {len(adapter_names)} names for {size} samples."
        )
    groups = {
        name: torch.tensor([row for row, it in enumerate(adapter_names) if it == name])
        for name in dict.fromkeys(adapter_names)
    }
    parts, weights = [], []
    for name, rows in groups.items():
        part_args, part_kwargs = _take((args, kwargs), rows, size)
        with active_only(model, None if name == BASE else name):
            gate.is_open = True
            try:
                parts.append(forward(*part_args, **part_kwargs))
            finally:
                gate.is_open = False
        weights.append(_num_scored(model, part_kwargs.get("labels"), len(rows)))
    order = torch.cat(list(groups.values())).argsort()
    return _put_together(parts, weights, order)


def _has_active(layer: Any) -> bool:
    return bool({*layer.active_adapters} & {*layer._get_available_adapters()})


def _batch_size(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    main = [kwargs.get(name) for name in (getattr(model, "main_input_name", "input_ids"), "inputs_embeds")]
    inputs = [value for value in (*main, *args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.dim()]
    return len(inputs[0]) if inputs else 0


def _take(value: Any, rows: torch.Tensor, size: int) -> Any:
    """Return the given rows of every tensor that has one row per sample."""
    return recursively_apply(lambda it: it[rows.to(it.device)] if it.dim() and len(it) == size else it, value)


def _put_together(parts: list[Any], weights: list[int], order: torch.Tensor) -> Any:
    first = parts[0]
    if isinstance(first, torch.Tensor) and not first.dim():
        scored = [part * weight for part, weight in zip(parts, weights, strict=True) if weight]
        return sum(scored) / sum(weights) if scored else first  # without any label a model returns NaN
    if isinstance(first, torch.Tensor):
        together = torch.cat(parts)
        if len(together) != len(order):
            raise MixedBatchError(
                f"The outputs must have one row per sample, got {len(together)} rows for {len(order)} samples: "
                "turn that output off, or use a separate batch for each adapter."
            )
        return together[order.to(first.device)]
    if isinstance(first, dict):
        return type(first)(**{key: _put_together([part[key] for part in parts], weights, order) for key in first})
    if isinstance(first, (list, tuple)):
        return type(first)(_put_together(list(items), weights, order) for items in zip(*parts, strict=True))
    return None if isinstance(first, Cache) else first


def _num_scored(model: nn.Module, labels: torch.Tensor | None, num_samples: int) -> int:
    """Return the number of labels over which a part's loss is the mean."""
    if labels is None:
        return num_samples
    if type(model).__name__.endswith(("ForCausalLM", "LMHeadModel")):
        labels = labels[..., 1:]  # each token predicts the next
    return labels.numel() if labels.is_floating_point() else int((labels != -100).sum())
