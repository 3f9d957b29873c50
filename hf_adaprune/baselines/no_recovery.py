"""AdaPrune without connection recovery: pruned weights stay pruned."""

from __future__ import annotations

from typing import Final

import torch

from ..training.callback import AdaPruneCallback
from ..training.pruner import Pruner


# Below any score that training reaches, yet small enough for the sum over a matrix to stay finite in float32.
_GONE: Final = -1e9


class NoRecoveryPruner(Pruner):
    """Turn scores into masks from which weights are only ever removed."""

    @property
    def target_sparsity(self) -> float:
        """The scheduled sparsity; until it is the final one, every matrix keeps at least one weight yet to prune."""
        target, final = super().target_sparsity, self.config.final_sparsity
        if target == final:
            return target
        one_weight = 1 / min(layer.base_weight.numel() for layer in self.layers.values())
        return max(0.0, min(target, final - one_weight))

    @torch.no_grad()
    def step(self) -> None:
        """Update the masks, choosing among the weights that are not yet pruned."""
        before = self._selector.masks()
        for name, mask in before.items():
            self.layers[name].adaprune_scores[self.adapter_name].masked_fill_(~mask, _GONE)
        super().step()
        # Rounding to an exact total may lower the number to prune in one matrix by one weight, which must not return.
        self._set({name: mask & before[name] for name, mask in self._selector.masks().items()})


class NoRecoveryCallback(AdaPruneCallback):
    """Adapt the model of a `Trainer` by pruning alone, without recovery of pruned weights.

    Table 4 of "Adapting by Pruning" (arXiv 2105.03343), where a negative score stays negative. Here, under any
    configuration, a pruned weight stays pruned.
    """

    pruner_cls = NoRecoveryPruner
