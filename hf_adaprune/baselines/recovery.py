"""AdaPrune without connection recovery: what is pruned once stays pruned."""

from __future__ import annotations

from typing import Final

import torch

from ..callback import AdaPruneCallback
from ..pruner import Pruner


# Below any score that training reaches, and far enough from the limits of float32 for a sum over a matrix.
_GONE: Final = -1e9


class NoRecoveryPruner(Pruner):
    """Turn scores into masks that only ever lose weights."""

    @torch.no_grad()
    def step(self) -> None:
        """Make the next masks, from the weights that are left."""
        for layer in self.layers.values():
            layer.adaprune_scores[self.adapter_name].masked_fill_(~layer.mask(self.adapter_name), _GONE)
        super().step()


class NoRecoveryCallback(AdaPruneCallback):
    """Adapt the model of a `Trainer` by pruning alone, with no way back for a pruned weight.

    Table 4 of "Adapting by Pruning" (arXiv 2105.03343): a score that is negative stays negative. Here, for any
    configuration, a weight that is pruned stays pruned.
    """

    pruner_cls = NoRecoveryPruner
