"""Groups of weights that share one score, and the expansion of one value per group to one per weight."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def join_kinds(kinds: Collection[str]) -> str | None:
    """Return the granularity with the given kinds of groups: `"neuron"`, `"head"`, `"neuron+head"`, or `None`."""
    return "+".join(kind for kind in ("neuron", "head") if kind in kinds) or None


@dataclass(frozen=True)
class Block:
    """One feed-forward or attention block: the linear layers that produce a hidden vector, and the one that reads it.

    A group is a slice of the vector: one entry (a neuron), or the entries of an attention head. It consists of the
    consumer's columns that read the slice and the producers' rows that compute it; where the former are zero, the
    latter have no effect.

    Args:
        kind (`str`): Kind of the groups, `"neuron"` or `"head"`.
        consumer (`str`): Name of the layer that reads the vector.
        producers (`tuple[str, ...]`): Names of the layers that produce it.
        num_groups (`int`): Number of groups.
        width (`int`): Number of entries of the vector per group.
    """

    kind: str
    consumer: str
    producers: tuple[str, ...]
    num_groups: int
    width: int

    @property
    def modules(self) -> tuple[str, ...]:
        """The names of all linear layers of the block."""
        return (*self.producers, self.consumer)


class Groups:
    """The groups of a block. Their mask belongs to the consumer, the layer whose inputs they are.

    Only the consumer's columns are masked. A pruned group then has no effect, yet its producers still compute it, so
    its score keeps receiving a gradient and the group can recover. Masking the producers too would zero that gradient.

    Args:
        block (`Block`): The block.
        model (`torch.nn.Module`): The model that it is in; its layers are those beneath any adapter layers.
    """

    def __init__(self, block: Block, model: nn.Module) -> None:
        self.block = block
        self.producers = {name: innermost(model.get_submodule(name)) for name in block.producers}
        self.consumer = innermost(model.get_submodule(block.consumer))

    @property
    def shape(self) -> torch.Size:
        """The shape of masks and scores: one entry per group."""
        return torch.Size([self.block.num_groups])

    @property
    def size(self) -> int:
        """The number of weights per group, in all layers of the block together."""
        return sum(total for _, total in self.counts(0).values()) // self.block.num_groups

    def broadcast(self, values: torch.Tensor) -> torch.Tensor:
        """Expand one value per group to one per weight of the consumer (a view where possible)."""
        per_input = values.repeat_interleave(self.block.width) if self.block.width > 1 else values
        if input_dim(self.consumer) == 0:
            per_input = per_input.unsqueeze(1)
        return per_input.expand(self.consumer.weight.shape)

    def any_kept(self, mask: torch.Tensor) -> torch.Tensor:
        """Return of which groups a mask of the consumer's weight keeps any: boolean, one entry per group."""
        per_input = mask.movedim(input_dim(self.consumer), 0)
        return per_input.reshape(self.block.num_groups, -1).any(1)

    def interactions(self, moments: torch.Tensor) -> torch.Tensor:
        """Return the inner products of any two groups' contributions to the consumer's output, over all inputs seen.

        Args:
            moments (`torch.Tensor`): The second moments of the consumer's inputs, of shape `(inputs, inputs)`.

        Returns:
            `torch.Tensor`: float32, of shape `(groups, groups)`.
        """
        weight = self.consumer.weight.detach().float().movedim(input_dim(self.consumer), 0)
        pairs = (weight @ weight.T) * moments
        num_groups, width = self.block.num_groups, self.block.width
        return pairs.view(num_groups, width, num_groups, width).sum((1, 3))

    def magnitudes(self) -> torch.Tensor:
        """Return the sum of |w| over the weights of each group, in all layers of the block: float32."""
        per_input = self.consumer.weight.detach().float().abs().movedim(input_dim(self.consumer), 0)
        total = per_input.reshape(self.block.num_groups, -1).sum(1)
        for producer in self.producers.values():
            per_output = producer.weight.detach().float().abs().sum(input_dim(producer))
            total = total + per_output.view(-1, self.block.num_groups, self.block.width).sum((0, 2))
        return total

    def rows(self, producer: Any, groups: torch.Tensor) -> torch.Tensor:
        """Expand one value per group to one per output of a producer."""
        outputs = producer.weight.shape[1 - input_dim(producer)]
        per_entry = groups.repeat_interleave(self.block.width)
        return per_entry.repeat(outputs // len(per_entry))

    def masks(self, groups: torch.Tensor) -> dict[str, torch.Tensor]:
        """Expand one value per group to one per weight, for each layer of the block."""
        masks = {self.block.consumer: self.broadcast(groups)}
        for name, producer in self.producers.items():
            rows = self.rows(producer, groups)
            masks[name] = (rows if input_dim(producer) == 0 else rows.unsqueeze(1)).expand(producer.weight.shape)
        return masks

    def counts(self, num_pruned: int) -> dict[str, tuple[int, int]]:
        """Return, for each layer of the block, how many weights `num_pruned` groups have, and how many it has."""
        layers = {**self.producers, self.block.consumer: self.consumer}
        totals = {name: layer.weight.numel() for name, layer in layers.items()}
        return {name: (num_pruned * total // self.block.num_groups, total) for name, total in totals.items()}

    @torch.no_grad()
    def zero_producers(self, mask: torch.Tensor) -> None:
        """Zero the producers' weights of the pruned groups. The consumer does not read these, so no output changes."""
        pruned = ~mask
        for producer in self.producers.values():
            producer.weight.data.movedim(1 - input_dim(producer), 0)[self.rows(producer, pruned)] = 0


def input_dim(layer: nn.Module) -> int:
    """Return the input dimension of a linear layer's weight."""
    return 0 if isinstance(layer, Conv1D) else 1


def innermost(module: Any) -> Any:
    """Return the layer beneath any adapter layers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module
