"""Find a model's neurons and attention heads by the shapes of its linear layers; verify them by a forward pass."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..config import AdaPruneConfig
from ..errors import NoMatchingModuleError, StructureError
from .example_inputs import dummy_inputs, tensor_sharing_copy
from .groups import Block
from .head import body_name
from .targets import linear_layers


# (number of producer layers, total producer width / hidden width) -> kind of group: query, key and value in three
# layers or one; a gated pair in two layers or one; a plain feed-forward.
_PATTERNS = {(3, 3): "head", (1, 3): "head", (2, 2): "neuron", (1, 2): "neuron", (1, 1): "neuron"}


def plan_blocks(model: Any, config: AdaPruneConfig, everywhere: bool) -> dict[str, Block]:
    """Find the blocks that an adapter of structured granularity masks, and set its `target_modules` accordingly.

    Args:
        model (`torch.nn.Module`): The model; not changed.
        config (`AdaPruneConfig`): The adapter's configuration; `target_modules` becomes the names of the consumers.
        everywhere (`bool`): Whether every layer of the model must have all kinds of groups of the granularity.

    Returns:
        `dict[str, Block]`: The blocks by the names of their consumers; empty if single weights are masked.

    Raises:
        StructureError: If the neurons or heads of the model cannot be identified.
        NoMatchingModuleError: If `target_modules` matches no layer of any block.
    """
    if not config.group_kinds:
        return {}
    by_layer = find_blocks(model, config.group_kinds)
    blocks = [block for found in by_layer.values() for block in found]
    if not config.is_stored and not any(parameter.is_meta for parameter in model.parameters()):
        blocks = verified(model, blocks)
    for layer, found in by_layer.items():
        missing = set(config.group_kinds) - {block.kind for block in found if block in blocks}
        if missing and everywhere:
            raise StructureError(_not_found(model, layer, config, missing))
    chosen = [block for block in blocks if _is_chosen(block, config)]
    if not chosen:
        endings = sorted({name.rpartition(".")[2] for block in blocks for name in block.modules})
        raise NoMatchingModuleError(
            f"`granularity={config.granularity!r}` needs `target_modules` (got {config.target_modules!r}) to match a "
            f"layer of a block, and `exclude_modules` to match none of it. Names of such layers end in: {endings}."
        )
    config.target_modules = {block.consumer for block in chosen}
    return {block.consumer: block for block in chosen}


def stored_blocks(model: Any, config: AdaPruneConfig) -> dict[str, Block]:
    """Return the blocks whose groups a stored adapter masks, by the names of their consumers."""
    if not config.group_counts:
        return {}
    blocks = [block for found in find_blocks(model, config.group_kinds).values() for block in found]
    return {block.consumer: block for block in blocks if block.consumer in config.group_counts}


def check_patterns(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if an n:m granularity does not fit a layer that is to be masked.

    Raises:
        StructureError: If a layer's number of inputs is not a multiple of m, or the layer is an embedding.
    """
    if config.n_of_m is None:
        return
    chosen = {name: module for name, module in model.named_modules() if check_target_module_exists(config, name)}
    offenders = {name: features(module)[0] for name, module in linear_layers(model) if name in chosen}
    offenders = {name: inputs for name, inputs in offenders.items() if inputs % config.n_of_m[1]}
    embeddings = [
        name for name, module in chosen.items() if isinstance(getattr(module, "base_layer", module), nn.Embedding)
    ]
    if offenders or embeddings:
        raise StructureError(
            f"`granularity={config.granularity!r}` needs layers whose number of inputs is a multiple of "
            f"{config.n_of_m[1]}; these have another number: {offenders}; these are embeddings: {embeddings}. List "
            "them in `exclude_modules`."
        )


def features(module: Any) -> tuple[int, int]:
    """Return the input and output width of a linear layer."""
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else (module.in_features, module.out_features)


def find_blocks(model: Any, kinds: Collection[str]) -> dict[str, list[Block]]:
    """Return the blocks found by the shapes of a model's layers, keyed by the numbered layer that contains them.

    Args:
        model (`torch.nn.Module`): The model, with adapters or without; not changed.
        kinds (`Collection[str]`): The kinds of groups to look for: `"neuron"`, `"head"`, or both.

    Raises:
        StructureError: If the model has no numbered layers, or its configuration does not give the number of heads.
    """
    layers: dict[str, list[tuple[str, tuple[int, int]]]] = defaultdict(list)
    for name, module in linear_layers(model):
        numbered = re.match(r"(.*\.\d+)\.", name)
        if numbered and name.startswith(body_name(model)):
            layers[numbered[1]].append((name, features(module)))
    if not layers:
        raise StructureError(
            f"{' and '.join(f'{kind}s' for kind in kinds).capitalize()} can only be found in numbered layers; "
            f"{type(model).__name__} has no numbered layers."
        )
    num_heads = _heads_by_name(model) if "head" in kinds else lambda attention: 1
    return {
        layer: [block for block in _blocks(linears, num_heads) if block.kind in kinds]
        for layer, linears in layers.items()
    }


def _heads_by_name(model: Any) -> Callable[[str], int]:
    """Return a function from an attention module's name to its number of heads, less those that `compact` removed."""
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    num_heads = getattr(text_config, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        raise StructureError(
            f"The configuration of {type(model).__name__} has no `num_attention_heads`: its heads cannot be "
            'identified. Use `granularity="neuron"`.'
        )
    left = {
        f"{body_name(model)}{name}": len(head["kept"]) for name, head in getattr(config, "compact_heads", {}).items()
    }
    return lambda attention: left.get(attention, num_heads)


def _blocks(linears: list[tuple[str, tuple[int, int]]], num_heads: Callable[[str], int]) -> Iterator[Block]:
    """Split the linear layers of one transformer layer, in order, into blocks."""
    position = 0
    while position < len(linears):
        for num_producers in (3, 2, 1):
            block = _block(linears[position : position + num_producers + 1], num_producers, num_heads)
            if block is not None:
                yield block
                position += num_producers
                break
        position += 1


def _block(
    linears: list[tuple[str, tuple[int, int]]], num_producers: int, num_heads: Callable[[str], int]
) -> Block | None:
    if len(linears) != num_producers + 1:
        return None
    *producers, (consumer, (hidden, outputs)) = linears
    shapes = {shape for _, shape in producers}
    inputs, produced = producers[0][1]
    kind = _PATTERNS.get((num_producers, num_producers * produced // hidden))
    if len(shapes) != 1 or inputs != outputs or num_producers * produced % hidden or kind is None:
        return None
    num_groups = hidden if kind == "neuron" else num_heads(producers[0][0].rpartition(".")[0])
    if hidden % num_groups:
        return None
    return Block(kind, consumer, tuple(name for name, _ in producers), num_groups, hidden // num_groups)


def _is_chosen(block: Block, config: AdaPruneConfig) -> bool:
    """Return whether at least one layer of the block is targeted and none is excluded."""
    all_named = copy.copy(config)
    all_named.target_modules = set(block.modules)
    return any(check_target_module_exists(config, name) for name in block.modules) and all(
        check_target_module_exists(all_named, name) for name in block.modules
    )


def _not_found(model: Any, layer: str, config: AdaPruneConfig, missing: set[str]) -> str:
    linears = {
        name.removeprefix(f"{layer}."): "{} -> {}".format(*features(module))
        for name, module in linear_layers(model)
        if name.startswith(f"{layer}.")
    }
    return (
        f"`granularity={config.granularity!r}`: no {' and no '.join(sorted(missing))}s were found in {layer!r} of "
        f"{type(model).__name__}, whose linear layers are {linears}. Heads need query, key and value layers (or one "
        "layer for all three, in this order), each as wide as the input of the next layer; neurons need one layer, or "
        "a gated pair, as wide as the input of the next layer; and each head or neuron must be computed by its own "
        'rows. Name suitable layers in `target_modules`, or use another granularity ("weight" works everywhere).'
    )


def verified(model: Any, blocks: list[Block]) -> list[Block]:
    """Return the blocks that are confirmed by the gradients of one forward pass.

    The gradient of every second group of a consumer's inputs must reach the producers' outputs, and only the entries
    of the same groups. Gradients do not flow between blocks.
    """
    if not isinstance(model, PreTrainedModel):
        raise StructureError(
            f"Neurons and heads can only be found in a transformers model, got a {type(model).__name__}. Use "
            '`granularity="weight"`.'
        )
    if model.main_input_name != "input_ids":
        raise StructureError(
            "Neurons and heads are found by a forward pass over tokens, but the input of "
            f'{type(model).__name__} is `{model.main_input_name}`. Use `granularity="weight"`.'
        )
    produced: dict[str, list[torch.Tensor]] = defaultdict(list)
    read: list[torch.Tensor] = []
    tried = tensor_sharing_copy(model)
    _watch(tried, blocks, produced, read)
    with torch.enable_grad():
        try:
            tried.base_model(**dummy_inputs(model))
        except (TypeError, ValueError) as error:
            raise StructureError(
                f"Neurons and heads are found by a forward pass over tokens, which {type(model).__name__} refused: "
                f'{error} Use `granularity="weight"`.'
            ) from error
        outputs = [output for block in blocks for name in block.producers for output in produced[name]]
        total = sum(read, torch.zeros((), requires_grad=True))
        found = iter(torch.autograd.grad(total, outputs, allow_unused=True) if outputs else ())
    confirmed = []
    for block in blocks:
        by_output = [next(found) for name in block.producers for _ in produced[name]]
        shape = (-1, block.num_groups, block.width)
        reached = [gradient.unflatten(-1, shape) for gradient in by_output if gradient is not None]
        inside = any(gradient[..., ::2, :].any() for gradient in reached)
        outside = any(gradient[..., 1::2, :].any() for gradient in reached)
        if len(reached) == len(by_output) and inside and not outside:
            confirmed.append(block)
    return confirmed


def _watch(
    model: nn.Module, blocks: list[Block], produced: dict[str, list[torch.Tensor]], read: list[torch.Tensor]
) -> None:
    def cut(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            produced[name].append(output.detach().requires_grad_())
            return produced[name][-1].clone()  # the model may modify it in place

        return hook

    def look(block: Block) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            groups = args[0].unflatten(-1, (block.num_groups, block.width))[..., ::2, :]
            # The weights must differ: the plain sum of softmax outputs is constant and has no gradient.
            weights = torch.arange(1, groups.numel() + 1, device=groups.device).cos()
            read.append((groups.reshape(-1).float() * weights).sum().cpu())

        return hook

    for block in blocks:
        for name in block.producers:
            model.get_submodule(name).register_forward_hook(cut(name))
        consumer = model.get_submodule(block.consumer)
        consumer.register_forward_pre_hook(look(block))
        consumer.register_forward_hook(lambda module, args, output: output.detach())
