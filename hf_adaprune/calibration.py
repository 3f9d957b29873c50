"""How strong the inputs of each masked layer are, seen in the first step of training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from .layer import AdaPruneLayer


class InputNorms:
    """Watch the inputs of masked layers in training, from now until they are asked for.

    Args:
        layers (`Mapping[str, AdaPruneLayer]`): The layers by name; those that have no real inputs are left out.
    """

    def __init__(self, layers: Mapping[str, AdaPruneLayer]) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.input_dim is not None}
        self._sums: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._hooks = [
            layer.register_forward_pre_hook(self._watch(name, layer.in_features))
            for name, layer in self._layers.items()
        ]

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def pop(self) -> dict[str, torch.Tensor]:
        """Watch no longer; return the norm of each layer's inputs over all that was seen, by all processes together.

        Returns:
            `dict[str, torch.Tensor]`: Float32, of shape `(in_features,)`; layers that were not called are absent.
        """
        self.close()
        if not self._layers:
            return {}
        totals = {
            name: sum((seen.to(layer.weight.device) for seen in self._sums[name]), self._zeros(layer))
            for name, layer in self._layers.items()
        }
        flat = torch.cat(list(totals.values()))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(flat)
        parts = flat.sqrt().split([total.numel() for total in totals.values()])
        return {name: norm for name, norm in zip(totals, parts, strict=True) if norm.any()}

    @staticmethod
    def _zeros(layer: AdaPruneLayer) -> torch.Tensor:
        return torch.zeros(layer.in_features, device=layer.weight.device)

    def _watch(self, name: str, in_features: int) -> Any:
        def hook(layer: AdaPruneLayer, args: tuple[Any, ...]) -> None:
            if layer.training and args:
                inputs = args[0].detach().reshape(-1, in_features)
                self._sums[name].append(inputs.float().square().sum(0))

        return hook
