"""What the inputs of each masked layer are like, seen in the first step of training."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from ..tuner.layer import AdaPruneLayer


class InputMoments:
    """Watch the inputs of masked layers, where gradients are computed, until they are asked for or `close` is called.

    Args:
        layers (`Mapping[str, AdaPruneLayer]`): The layers by name; those that have no real inputs are left out.
        adapter_name (`str`): The adapter that is trained: where it masks groups, they are seen in pairs.
    """

    def __init__(self, layers: Mapping[str, AdaPruneLayer], adapter_name: str = "default") -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.input_dim is not None}
        self._totals: dict[str, torch.Tensor] = {}
        hooks: list[RemovableHandle] = []
        for name, layer in self._layers.items():
            shape = [layer.in_features] * (1 if layer.groups(adapter_name) is None else 2)
            self._totals[name] = torch.zeros(shape, device=layer.base_weight.device)
            hooks.append(layer.register_forward_pre_hook(self._watch(layer, self._totals[name])))
        # A run that is broken off in its first step leaves nothing behind either.
        self.close = weakref.finalize(self, _remove, hooks)

    def pop(self) -> dict[str, torch.Tensor]:
        """Watch no longer; return the sums, over all inputs that all processes have seen, of their products.

        Returns:
            `dict[str, torch.Tensor]`:
                Float32: of shape `(in_features,)` the squares, or of `(in_features, in_features)` all second moments
                where groups are masked. Layers that were not called are absent.
        """
        self.close()
        # The model may have been moved since.
        totals = {name: total.to(self._layers[name].base_weight.device) for name, total in self._totals.items()}
        if dist.is_available() and dist.is_initialized():
            for total in totals.values():
                dist.all_reduce(total)
        return {name: total for name, total in totals.items() if total.any()}

    @staticmethod
    def _watch(watched: AdaPruneLayer, total: torch.Tensor) -> Any:
        def hook(layer: AdaPruneLayer, args: tuple[Any, ...]) -> None:
            if layer is watched and torch.is_grad_enabled() and args:  # and not a copy that was made of it
                inputs = args[0].detach().reshape(-1, len(total)).float()
                # Autocast would multiply in half precision.
                with torch.autocast(inputs.device.type, enabled=False):
                    seen = inputs.square().sum(0) if total.dim() == 1 else inputs.T @ inputs
                total.add_(seen.to(total.device))

        return hook


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
