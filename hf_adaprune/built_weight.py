"""The masked weight that a layer computes with in inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch


class BuiltWeight:
    """Keep a masked weight for as long as nothing changes that it was built from.

    Args:
        product (`torch.Tensor`): The masked weight.
        weight (`torch.Tensor`): The base layer's, of the same shape.
        active (`list[str]`): The names of all active adapters.
        masks (`Mapping[str, torch.Tensor]`): The masks of those that have one here, in any form.
    """

    def __init__(
        self, product: torch.Tensor, weight: torch.Tensor, active: list[str], masks: Mapping[str, torch.Tensor]
    ) -> None:
        self.product = product
        self._weight, self._pointer = weight, weight.data_ptr()
        self._active, self._masks = list(active), masks
        # Tensors of inference mode do not count their changes.
        self._counted = [tensor for tensor in (weight, *masks.values()) if not tensor.is_inference()]
        self._counts = [tensor._version for tensor in self._counted]

    def holds(self, weight: torch.Tensor, active: list[str], mask_of: Callable[[str], torch.Tensor]) -> bool:
        """Return whether the product would be the same again: every layer asks in every forward pass.

        Args:
            weight (`torch.Tensor`): The base layer's weight now.
            active (`list[str]`): The names of all active adapters now.
            mask_of (`Callable`): Returns the mask that an adapter has now, in the same form.
        """
        return (
            weight is self._weight
            and active == self._active
            and all(mask_of(name) is mask for name, mask in self._masks.items())
            and [tensor._version for tensor in self._counted] == self._counts
            and weight.data_ptr() == self._pointer
        )
