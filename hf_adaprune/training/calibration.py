"""Input statistics of each masked layer, collected in the first step of training."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from ..tuner.layer import AdaPruneLayer


class InputMoments:
    """Sum products of masked layers' inputs over forward passes with gradients, until `pop` or `close` is called.

    Args:
        layers (`Mapping[str, AdaPruneLayer]`): The layers by name; embeddings are left out.
        adapter_name (`str`): The adapter in training; where it masks groups, inputs are multiplied in pairs.
    """

    def __init__(self, layers: Mapping[str, AdaPruneLayer], adapter_name: str) -> None:
        self._layers = {name: layer for name, layer in layers.items() if layer.input_dim is not None}
        self._totals: dict[str, torch.Tensor] = {}
        hooks: list[RemovableHandle] = []
        for name, layer in self._layers.items():
            shape = [layer.in_features] * (1 if layer.groups(adapter_name) is None else 2)
            self._totals[name] = torch.zeros(shape, dtype=torch.float32, device=layer.base_weight.device)
            hooks.append(layer.register_forward_pre_hook(self._watch(layer, self._totals[name])))
        # No hooks remain even if a run is interrupted in its first step.
        self.close = weakref.finalize(self, _remove, hooks)

    def pop(self) -> dict[str, torch.Tensor]:
        """Remove the hooks, and return the sums of products over the inputs of all processes.

        Returns:
            `dict[str, torch.Tensor]`:
                Float32: sums of squares, of shape `(in_features,)`, or sums of the products of all pairs, of shape
                `(in_features, in_features)`, where groups are masked. Layers that were not called are absent.
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
        lock = threading.Lock()

        def hook(layer: AdaPruneLayer, args: tuple[Any, ...]) -> None:
            # Not a copy of it, unless that is a replica in another thread, for one of several devices.
            is_replica = getattr(layer, "_is_replica", False)
            if (layer is watched or is_replica) and torch.is_grad_enabled() and args:
                inputs = args[0].detach().reshape(-1, len(total)).float()
                # Autocast would multiply in half precision.
                with torch.autocast(inputs.device.type, enabled=False):
                    seen = inputs.square().sum(0) if total.dim() == 1 else inputs.T @ inputs
                with lock if is_replica else nullcontext():  # a compiled model could not trace the lock
                    total.add_(seen.to(total.device))

        return hook


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
