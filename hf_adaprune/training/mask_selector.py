"""Select masks from the scores of all layers of a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..config import AdaPruneConfig
from ..tuner.layer import AdaPruneLayer
from ..tuner.selection import protect_best, prune_groups, threshold_mask, threshold_scopes, topk_masks
from ..tuner.sharding import full_tensor


Masks = dict[str, torch.Tensor]


class MaskSelector:
    """Turn the scores of all layers into masks: by their sign, or by thresholds that layers may share.

    Args:
        layers (`Mapping[str, AdaPruneLayer]`): The masked layers, by name.
        adapter_name (`str`): The adapter that the scores belong to.
        config (`AdaPruneConfig`): The adapter's configuration.
    """

    def __init__(self, layers: Mapping[str, AdaPruneLayer], adapter_name: str, config: AdaPruneConfig) -> None:
        self.layers, self.adapter_name, self.config = layers, adapter_name, config
        self._group_magnitudes: dict[str, torch.Tensor] = {}

    def scores(self) -> dict[str, torch.Tensor]:
        """Return the scores of each layer, as they are stored."""
        return {name: layer.adaprune_scores[self.adapter_name] for name, layer in self.layers.items()}

    def masks(self) -> Masks:
        """Return the current masks of the layers, one entry per score."""
        return {name: layer.scored_mask(self.adapter_name) for name, layer in self.layers.items()}

    def by_sign(self) -> Masks:
        """Return the masks of Algorithm 1, which keep positive scores."""
        keeps_best = bool(self.config.group_kinds)
        return {name: full_tensor(threshold_mask(score, keeps_best)) for name, score in self.scores().items()}

    def at_sparsity(self, sparsity: float) -> Masks:
        """Return the masks that prune the lowest scores, exactly a fraction `sparsity`, in [0, 1], of all weights.

        Whole groups are pruned to the nearest number possible.
        """
        scopes = threshold_scopes(self.layers, self.config.scope)
        if self.config.group_kinds:
            return self._group_masks(scopes, sparsity)
        scores, num_kept, seen, pruned = self.scores(), [], 0, 0
        for names in scopes:
            # Rounding the running total, not each scope, makes the overall number exact.
            size = sum(scores[name].numel() for name in names)
            seen += size
            to_prune, pruned = round(sparsity * seen) - pruned, round(sparsity * seen)
            num_kept.append(size - to_prune)
        return topk_masks(self._protected(scores), self._magnitudes(), scopes, num_kept)

    def agrees(self) -> bool:
        """Return whether the scores reproduce the current masks of the layers."""
        masks = self.masks()
        if self.config.selection == "threshold":
            made = self.by_sign()
        else:
            # Groups are compared within each block: across blocks, one too large for the budget is skipped.
            scopes = threshold_scopes(self.layers, "module" if self.config.group_kinds else self.config.scope)
            num_kept = [sum(int(masks[name].count_nonzero()) for name in names) for names in scopes]
            made = topk_masks(self._protected(self.scores()), self._magnitudes(), scopes, num_kept)
        return all(torch.equal(made[name], mask) for name, mask in masks.items())

    def _group_masks(self, scopes: list[list[str]], sparsity: float) -> Masks:
        scores, magnitudes = self.scores(), self._magnitudes()
        masks: Masks = {}
        for names in scopes:
            groups = [self.layers[name].groups(self.adapter_name) for name in names]
            sizes = [1 if group is None else group.size for group in groups]
            chosen = prune_groups(
                [scores[name] for name in names], [magnitudes[name] for name in names], sizes, sparsity
            )
            masks.update(zip(names, chosen, strict=True))
        return masks

    def _magnitudes(self) -> dict[str, torch.Tensor]:
        """Return the values that break ties: the weights, or |w| summed over each group."""
        if not self.config.group_kinds:
            return {name: layer.base_weight for name, layer in self.layers.items()}
        if not self._group_magnitudes:
            self._group_magnitudes = {
                name: layer.entry_weights(self.adapter_name) for name, layer in self.layers.items()
            }
        return self._group_magnitudes

    def _protected(self, scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Protect the `n` best of every `m` weights from pruning, under an n:m granularity."""
        pattern = self.config.n_of_m
        if pattern is None:
            return scores
        protected = {}
        for name, layer in self.layers.items():
            assert layer.input_dim is not None  # embeddings cannot have an n:m pattern
            protected[name] = protect_best(scores[name], layer.base_weight, *pattern, layer.input_dim)
        return protected
