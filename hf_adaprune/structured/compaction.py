"""Physically remove the neurons and attention heads that a model's masks prune."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..compacted.compact_model import MODEL_TYPE, config_class, model_class, plain_class
from ..compacted.shrink import compose_heads, keep_heads, keep_inputs, keep_outputs
from ..config import AdaPruneConfig
from ..errors import CompactionError, NotPrunedError, StructureError
from ..hub.compact_card import CompactCard
from ..merging import merged
from ..tuner.example_inputs import dummy_inputs, tensor_sharing_copy
from ..tuner.groups import Block, Groups
from ..tuner.head import body_name
from ..tuner.layer_average import LayerAverageHead
from ..tuner.masked_layers import adaprune_layers, has_foreign_layers
from ..tuner.structure import features, find_blocks
from ..tuner.targets import linear_layers


def compact(model: Any) -> PreTrainedModel:
    """Return an equivalent dense model without the neurons and attention heads that the active masks prune.

    If every feed-forward layer keeps the same number of neurons (`granularity="neuron"`, `scope="module"`) and no head
    is pruned, the result is a stock transformers model with a smaller `intermediate_size`, which can be opened without
    this package. Otherwise its layers differ in shape, and the Auto classes open it only after `hf_adaprune` has been
    imported.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an active AdaPrune adapter: masks of neurons or heads, or masks of single weights that prune
            every weight reading some neuron or head. Not modified.

    Returns:
        `transformers.PreTrainedModel`: A plain model, in evaluation mode, with all of its parameters trainable.

    Raises:
        NotPrunedError: If the model has no active AdaPrune adapter.
        CompactionError: If the active masks prune no neuron or head as a whole, or all of one block; if the forward
            pass does not work with fewer of them; if the model has `head="layer_average"`, has an adapter of another
            method or is not a transformers model.

    Example:

        >>> model = AutoPeftModelForSequenceClassification.from_pretrained("me/bert-sst2-neurons")
        >>> compact(model).save_pretrained("bert-sst2-small")
    """
    base = base_of(model)
    if any(isinstance(module, LayerAverageHead) for module in base.modules()):
        raise CompactionError(
            'A model with `head="layer_average"` cannot be compacted, because transformers would not rebuild this '
            "head from a checkpoint: keep the adapter on its base."
        )
    config = active_config(base)
    kept, dense = kept_groups(base), merged(model)
    expected, before = hidden_states(dense), dense.num_parameters()
    shapes = {name: features(module) for name, module in linear_layers(dense)}
    heads = _remove_groups(dense, kept)
    widths = {name: features(module) for name, module in linear_layers(dense) if features(module) != shapes[name]}
    is_stock = not heads and _try_stock_config(dense, shapes, widths)
    if not is_stock:
        _use_compact_class(dense, widths, heads)
    _check_outputs_match(dense, expected)
    blocks = [(block.consumer, int(mask.sum()), len(mask), block.kind) for block, mask in kept]
    CompactCard(config, type(dense).__name__, is_stock, before, dense.num_parameters(), blocks).attach(dense)
    return dense.requires_grad_()


def base_of(model: Any) -> PreTrainedModel:
    """Return the transformers model under an adapter.

    Raises:
        CompactionError: If it is not a transformers model, or has an adapter of another method too.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        raise CompactionError(
            f"The model must be a transformers model with an AdaPrune adapter, got a {type(model).__name__}."
        )
    if has_foreign_layers(base):
        raise CompactionError(
            "The model must have AdaPrune adapters only, but has an adapter of another method too: load it without "
            "that one."
        )
    return base


def active_config(base: nn.Module) -> AdaPruneConfig:
    """Return the configuration of the first adapter whose masks a model applies.

    Raises:
        NotPrunedError: If the model has no active AdaPrune adapter.
    """
    configs = (layer.config(name) for _, layer in adaprune_layers(base) for name in layer.active_masks)
    config = next(configs, None)
    if config is None:
        raise NotPrunedError("The model has no active AdaPrune adapter: add one, or activate one with `set_adapter`.")
    return config


def kept_groups(base: nn.Module) -> list[tuple[Block, torch.Tensor]]:
    """Return the masked blocks of a model, each with a boolean tensor of which groups the active masks keep.

    Raises:
        CompactionError: If no group is pruned as a whole.
    """
    layers = dict(adaprune_layers(base))
    kept = []
    for block in _removable_blocks(base):
        layer = layers.get(block.consumer)
        masks = [layer.mask(name) for name in layer.active_masks] if layer else []
        if masks:
            kept.append((block, Groups(block, base).any_kept(torch.stack(masks).all(0)).cpu()))
    if all(mask.all() for _, mask in kept):
        raise CompactionError(
            "There is nothing to remove: the active masks prune no neuron or head as a whole, so every matrix keeps "
            'its shape. Train with `granularity="neuron"`, "head" or "neuron+head"; for a 2:4 mask see '
            "`to_semi_structured`."
        )
    return kept


def _removable_blocks(base: nn.Module) -> list[Block]:
    """Return the blocks with neurons and heads; those with neurons alone if the model's heads cannot be identified."""
    for kinds in (("neuron", "head"), ("neuron",)):
        with suppress(StructureError):
            return [block for found in find_blocks(base, kinds).values() for block in found]
    return []


def _remove_groups(dense: nn.Module, kept: Iterable[tuple[Block, torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Remove the pruned groups from the layers; return which heads each shrunk attention module keeps."""
    heads: dict[str, dict[str, Any]] = {}
    for block, mask in kept:
        if mask.all():
            continue
        if not mask.any():
            raise CompactionError(
                f"The active masks prune every {block.kind} of {block.consumer!r}: activate fewer adapters."
            )
        groups = Groups(block, dense)
        keep_inputs(groups.consumer, mask.repeat_interleave(block.width))
        for producer in groups.producers.values():
            keep_outputs(producer, groups.rows(producer, mask))
        if block.kind == "head":
            attention = block.producers[0].rpartition(".")[0]
            heads[attention] = {"of": block.num_groups, "kept": mask.nonzero().squeeze(1).tolist()}
            keep_heads(dense.get_submodule(attention), block.num_groups, heads[attention]["kept"])
    return heads


def _try_stock_config(dense: Any, shapes: dict[str, tuple[int, int]], widths: dict[str, tuple[int, int]]) -> bool:
    """Set the field of the stock configuration that gives the current shapes; return whether there is one."""
    changes = {
        (old, new) for name, now in widths.items() for old, new in zip(shapes[name], now, strict=True) if old != new
    }
    # One change for all layers, and a second where a gated pair is one layer, twice as wide as the field says.
    if len(changes) > 2:
        return False
    wanted = {name: tensor.shape for name, tensor in dense.state_dict().items()}
    for old, new in changes:
        fields = {field: value for field, value in dense.config.to_dict().items() if not isinstance(value, bool)}
        # A field that is not set has a default that depends on others.
        for field in sorted(fields, key=lambda field: fields[field] is None):
            if fields[field] not in (old, None):
                continue
            config = copy.deepcopy(dense.config)
            try:
                setattr(config, field, new)
                with torch.device("meta"):
                    built = type(dense)._from_config(config)
            except Exception:  # another field with the same old value, which cannot take the new one
                continue
            if {name: tensor.shape for name, tensor in built.state_dict().items()} == wanted:
                setattr(dense.config, field, new)
                return True
    return False


def _use_compact_class(dense: Any, widths: dict[str, tuple[int, int]], heads: dict[str, Any]) -> None:
    """Convert the model to a class whose configuration stores its layer shapes."""
    body = body_name(dense)
    old, cls = dense.config, plain_class(type(dense))
    base_model_type = getattr(old, "base_model_type", old.model_type)
    special = config_class(base_model_type)
    # The model may have been compacted before.
    widths_before, heads_before = getattr(old, "compact_widths", {}), getattr(old, "compact_heads", {})
    wide = widths_before | {name.removeprefix(body): list(width) for name, width in widths.items()}
    left = {name.removeprefix(body): head for name, head in heads.items()}
    left |= {name: compose_heads(heads_before[name], head) for name, head in left.items() if name in heads_before}
    shapes = {"compact_widths": wide, "compact_heads": heads_before | left}
    types = {"model_type": MODEL_TYPE, "base_model_type": base_model_type}
    config = special.from_dict(old.to_dict() | types | shapes)
    config._attn_implementation = old._attn_implementation
    config._name_or_path = old._name_or_path
    for module in dense.modules():
        if vars(module).get("config") is old:
            vars(module)["config"] = config
    dense.__class__ = model_class(cls, special)


@torch.no_grad()
def hidden_states(model: Any) -> torch.Tensor:
    """Return a plain model's last hidden states for its example inputs, in float32."""
    return tensor_sharing_copy(model).base_model(**dummy_inputs(model))[0].float()


def difference(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> str:
    """Describe by how much hidden states differ beyond the rounding of a dtype; return `""` if they do not."""
    error = float((found - expected).abs().max() / expected.abs().max())
    allowed = 1e-4 if dtype == torch.float32 else 5e-2
    return "" if error < allowed else f"its hidden states differ by {error:.2g} of their range"


def _check_outputs_match(dense: Any, expected: torch.Tensor) -> None:
    """Raise a `CompactionError` if the smaller model does not compute the expected hidden states."""
    try:
        problem = difference(hidden_states(dense), expected, dense.dtype)
    except (RuntimeError, ValueError, IndexError) as cause:
        problem = f"it cannot run ({cause})"
    if problem:
        raise CompactionError(
            f"{type(dense).__name__} cannot be compacted: with fewer neurons or heads {problem}. Use "
            "`merge_and_unload()`, which keeps them in place as zeros."
        )
