"""Warn when an adapter is trained without a `Pruner`: its masks never change, and only the head learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from .hooks import PreHook
from .layer import AdaPruneLayer
from .masked_layers import adaprune_layers


logger = logging.get_logger(__name__)

# Fewer training passes than this may be a mere test of the model.
_PATIENCE = 10


class PrunerReminder(PreHook):
    """Count the training passes of an adapter, and log a warning if they are made without a `Pruner`."""

    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name
        self.num_passes = 0

    def __call__(self, model: nn.Module, args: Any) -> None:
        if not (model.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return
        self.num_passes += 1
        if self.num_passes < _PATIENCE:
            return
        self.num_passes = 0
        layers = [layer for _, layer in adaprune_layers(model, self.adapter_name)]
        if any(_is_trained_alone(layer, self.adapter_name) for layer in layers):
            logger.warning(
                f"Adapter {self.adapter_name!r} is being trained without a `Pruner`: its masks do not change. Pass "
                "`callbacks=[AdaPruneCallback]` to the Trainer, or use a `Pruner` in your own training loop."
            )
            self.handle.remove()


def _is_trained_alone(layer: AdaPruneLayer, adapter_name: str) -> bool:
    is_active = adapter_name in layer.active_adapters and not layer.disable_adapters
    has_pruner = layer.config(adapter_name).in_memory.pruner_token is not None
    return is_active and layer.is_trained(adapter_name) and not has_pruner
