"""The masked weight that a layer computes with in inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .layer import AdaPruneLayer


class CachedWeight:
    """Keep a masked weight for as long as nothing changes that it was built from.

    Args:
        product (`torch.Tensor`): The masked weight.
        weight (`torch.Tensor`): The base layer's, of the same shape.
        active (`str` or `list[str]`): The names of all active adapters.
        masks (`Mapping[str, torch.Tensor]`): The layer's buffers of those that have a mask in it.
    """

    def __init__(
        self, product: torch.Tensor, weight: torch.Tensor, active: str | list[str], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.product = product
        self._active = copy.copy(active)
        self._weight, self._pointer, self._version = weight, weight.data_ptr(), _version(weight)
        self._masks = [(name, mask, _version(mask)) for name, mask in masks.items()]

    def is_valid(self, layer: AdaPruneLayer) -> bool:
        """Return whether the product is what would be built again.

        A new mask of training, and merging, are not seen: the layer drops the product then. Every layer asks in every
        forward pass, when nothing that it needs is in the processor's cache any more: so all is looked at here, and
        nothing else is called.
        """
        weight = layer._modules["base_layer"]._parameters.get("weight")  # type: ignore[union-attr]
        if (
            weight is not self._weight
            or layer._disable_adapters
            or layer._active_adapter != self._active
            or weight.data_ptr() != self._pointer
            or (self._version is not None and weight._version != self._version)
        ):
            return False
        buffers = layer._modules["adaprune_mask"]._buffers  # type: ignore[union-attr]
        for name, mask, version in self._masks:
            if buffers[name] is not mask or (version is not None and mask._version != version):
                return False
        return True


def _version(tensor: torch.Tensor) -> int | None:
    # Tensors of inference mode do not count their changes.
    return None if tensor.is_inference() else tensor._version
