"""The masked weight that a layer reuses between forward passes in inference."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch


if TYPE_CHECKING:
    from .layer import AdaPruneLayer


class CachedWeight:
    """Keep a masked weight until anything that it was built from changes, other than through `.data`.

    Args:
        product (`torch.Tensor`): The masked weight.
        weight (`torch.Tensor`): The base layer's weight, of the same shape.
        active (`str` or `list[str]`): The names of all active adapters.
        masks (`Mapping[str, torch.Tensor]`): The layer's mask buffers of those that have one.
    """

    def __init__(
        self, product: torch.Tensor, weight: torch.Tensor, active: str | list[str], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.product = product
        self._active = copy.copy(active)
        self._weight, self._pointer, self._version = weight, weight.data_ptr(), _version(weight)
        self._masks = [(name, mask, _version(mask)) for name, mask in masks.items()]

    def is_valid(self, layer: AdaPruneLayer) -> bool:
        """Return whether rebuilding the product would give the same result.

        Training updates and merging are not detected; the layer clears the cache for those. Runs for every layer on
        every forward pass, hence inlined, without helper functions.
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
    # Inference tensors have no version counter.
    return None if tensor.is_inference() else tensor._version
