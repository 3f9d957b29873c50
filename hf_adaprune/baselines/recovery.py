"""AdaPrune without connection recovery: what is pruned once stays pruned."""

from __future__ import annotations

from typing import Final

import torch

from ..training.callback import AdaPruneCallback
from ..training.pruner import Pruner


# Below any score that training reaches, and far enough from the limits of float32 for a sum over a matrix.
_GONE: Final = -1e9


class NoRecoveryPruner(Pruner):
    """Turn scores into masks that only ever lose weights."""

    @property
    def target_sparsity(self) -> float:
        """The fraction that the schedule wants pruned now; short of the end it leaves each matrix one weight to go."""
        target, final = super().target_sparsity, self.config.final_sparsity
        if target == final:
            return target
        one_weight = 1 / min(layer.base_weight.numel() for layer in self.layers.values())
        return max(0.0, min(target, final - one_weight))

    @torch.no_grad()
    def step(self) -> None:
        """Make the next masks, from the weights that are left."""
        before = self._selector.masks()
        for name, mask in before.items():
            self.layers[name].adaprune_scores[self.adapter_name].masked_fill_(~mask, _GONE)
        super().step()
        # So that all matrices together are pruned exactly, what one of them has to lose may shrink by one weight.
        self._set({name: mask & before[name] for name, mask in self._selector.masks().items()})


class NoRecoveryCallback(AdaPruneCallback):
    """Adapt the model of a `Trainer` by pruning alone, with no way back for a pruned weight.

    Table 4 of "Adapting by Pruning" (arXiv 2105.03343): a score that is negative stays negative. Here, for any
    configuration, a weight that is pruned stays pruned.
    """

    pruner_cls = NoRecoveryPruner
