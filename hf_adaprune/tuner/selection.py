"""Select the score entries to keep: single weights, n of every m, or whole groups, under shared thresholds."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import get_args

import numpy as np
import torch

from ..choices import Scope
from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..masks import topk_mask
from .groups import Groups
from .sharding import is_sharded, sharded_topk_masks


def threshold_scopes(names: Iterable[str], scope: Scope) -> list[list[str]]:
    """Group the modules that share one threshold.

    Args:
        names (`Iterable[str]`): Names of masked modules.
        scope (`str`): `"module"`, `"kind"` (a module's name without the number of its layer) or `"global"`.

    Returns:
        `list[list[str]]`: The names in each scope, in order.
    """
    together: dict[str, list[str]] = defaultdict(list)
    for name in names:
        key = {"global": "", "kind": re.sub(r"\.\d+(?=\.)", "", name)}.get(scope, name)
        together[key].append(name)
    return list(together.values())


def check_reachable(groups: Mapping[str, Groups], config: AdaPruneConfig) -> None:
    """Raise if whole groups cannot be pruned to the requested sparsity.

    Args:
        groups (`Mapping[str, Groups]`): The groups of each masked block, by the name of its consumer.
        config (`AdaPruneConfig`): The adapter's configuration; gives sparsity and scope.

    Raises:
        ConfigError: If a block would lose its last group, or nothing would be pruned.
    """
    sparsity = config.final_sparsity
    for names in threshold_scopes(groups, config.scope):
        blocks, sizes = [groups[name].block for name in names], [groups[name].size for name in names]
        total = sum(block.num_groups * size for block, size in zip(blocks, sizes, strict=True))
        most = total - sum(sizes)
        there = ", ".join(f"{block.num_groups} {block.kind}s in {block.consumer!r}" for block in blocks[:2])
        there += ", ..." if len(blocks) > 2 else ""
        wider = get_args(Scope)[get_args(Scope).index(config.scope) + 1 :]
        advice = f"Choose another `final_sparsity`{f', or a wider `scope`, of {list(wider)}' if wider else ''}."
        if most < sparsity * total - min(sizes) / 2:
            raise ConfigError(
                f"`final_sparsity={sparsity}` with `granularity={config.granularity!r}` would leave a block "
                f"empty: of {there}, one each is kept, so at most {most / total:.4g} can be pruned. {advice}"
            )
        if 0 < sparsity * total < min(sizes) / 2:
            raise ConfigError(
                f"`final_sparsity={sparsity}` is less than half a group: nothing of {there} would be pruned. {advice}"
            )


def topk_masks(
    scores: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    scopes: Sequence[Sequence[str]],
    num_kept: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Keep exactly the requested number of highest-scoring entries in each scope.

    Args:
        scores (`Mapping[str, torch.Tensor]`): Finite scores of each layer, whole or sharded over processes.
        weights (`Mapping[str, torch.Tensor]`): The layers' weights, by which ties are broken as in `topk_mask`.
        scopes (`Sequence[Sequence[str]]`): The layers that share a threshold; each is in one of them.
        num_kept (`Sequence[int]`): The number of entries to keep in each scope.

    Returns:
        `dict[str, torch.Tensor]`: A boolean mask for each layer, of the shape of its scores; whole in every process.
    """
    if is_sharded(scores.values()):
        return sharded_topk_masks(scores, weights, scopes, num_kept)
    masks = {}
    for names, count in zip(scopes, num_kept, strict=True):
        mask = topk_mask(_flat([scores[name] for name in names]), count, _flat([weights[name] for name in names]))
        parts = mask.split([scores[name].numel() for name in names])
        masks.update({name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)})
    return masks


def threshold_mask(scores: torch.Tensor, keeps_best: bool) -> torch.Tensor:
    """Keep positive scores, as Algorithm 1 of arXiv 2105.03343 does.

    Args:
        scores (`torch.Tensor`): Finite scores, of any shape.
        keeps_best (`bool`): Whether the highest score is always kept: a block must keep one of its groups.

    Returns:
        `torch.Tensor`: A boolean mask of the same shape.
    """
    mask = scores > 0
    return mask | (scores == scores.max()) if keeps_best else mask


def protect_best(scores: torch.Tensor, weight: torch.Tensor, n: int, m: int, input_dim: int) -> torch.Tensor:
    """Protect the `n` best of every `m` neighbouring weights of one output, by scores of infinity.

    The other weights are those that an n:m mask prunes: at any point of the schedule some of them are pruned, and at
    its end all of them, which gives the best pattern by score.

    Args:
        scores (`torch.Tensor`): Finite scores, of two dimensions.
        weight (`torch.Tensor`): Of the same shape: of equal scores the larger |w| is better, then the first.
        n (`int`): The number of weights kept in a group of `m`.
        m (`int`): The number of weights, adjacent along the inputs, in a group: 256 at most.
        input_dim (`int`): The dimension that the inputs run along; its length is a multiple of `m`.

    Returns:
        `torch.Tensor`: The scores, with infinity in place of the best.
    """
    grouped = scores.detach().movedim(input_dim, -1).unflatten(-1, (-1, m))
    sizes = weight.detach().movedim(input_dim, -1).unflatten(-1, (-1, m)).abs()
    better = torch.zeros_like(grouped, dtype=torch.uint8)
    for first in range(m):
        for second in range(first + 1, m):
            wins = grouped[..., first] > grouped[..., second]
            ties = grouped[..., first] == grouped[..., second]
            if ties.any():
                wins |= ties & (sizes[..., first] >= sizes[..., second])
            better[..., second] += wins
            better[..., first] += ~wins
    protected = grouped.masked_fill(better < n, float("inf"))
    return protected.flatten(-2).movedim(-1, input_dim)


def prune_groups(
    scores: list[torch.Tensor], magnitudes: list[torch.Tensor], sizes: list[int], sparsity: float
) -> list[torch.Tensor]:
    """Prune the lowest-scoring groups of several blocks that share one budget of weights.

    The lowest go first; a group larger than the rest of the budget is skipped. The best group of every block is kept.
    As long as groups of the smallest size are left to prune, the number of pruned weights is within half such a group
    of `sparsity` times all weights.

    Args:
        scores (`list[torch.Tensor]`): For each block one finite score per group.
        magnitudes (`list[torch.Tensor]`):
            For each block one value per group: of equal scores the one with the smaller value is pruned first, then
            the last.
        sizes (`list[int]`): For each block the number of weights in a group.
        sparsity (`float`): The fraction of the weights to prune, in [0, 1).

    Returns:
        `list[torch.Tensor]`: For each block its mask: boolean, True = kept.
    """
    lengths = [len(score) for score in scores]
    flat, magnitude = (np.concatenate([t.detach().cpu().numpy() for t in ts]) for ts in (scores, magnitudes))
    size = np.repeat(sizes, lengths)
    order = np.lexsort((-np.arange(len(flat)), magnitude, flat))
    block = np.repeat(np.arange(len(lengths)), lengths)[order]
    # The last position of each block in the order is that of its best group.
    best = len(order) - 1 - np.unique(block[::-1], return_index=True)[1]
    waiting = np.delete(order, best)
    budget = sparsity * float(size.sum()) + min(sizes) / 2
    kept = np.ones(len(order), dtype=bool)
    while len(waiting):
        fits = np.cumsum(size[waiting]) <= budget
        taken = len(waiting) if fits.all() else int(fits.argmin())
        kept[waiting[:taken]] = False
        budget -= float(size[waiting[:taken]].sum())
        waiting = waiting[taken:]
        waiting = waiting[size[waiting] <= budget]
    parts = torch.from_numpy(kept).split(lengths)
    return [part.to(score.device) for part, score in zip(parts, scores, strict=True)]


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
