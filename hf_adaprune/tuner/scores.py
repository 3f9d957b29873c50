"""Initial scores: from the weights and their inputs, or from a mask."""

import torch

from ..config import AdaPruneConfig


def magnitude_ranks(weight: torch.Tensor) -> torch.Tensor:
    """Return the ranks of |w|, ties in order of position, spread evenly over [0, 2] (float32, the weight's shape)."""
    return _ranks(weight.detach().reshape(-1).abs().argsort(stable=True)).view(weight.shape)


def wanda_ranks(weight: torch.Tensor, input_norm: torch.Tensor, input_dim: int) -> torch.Tensor:
    """Return the ranks, within each output, of |w| times the norm of the input that w multiplies.

    They are spread evenly over [0, 2]. Both the importance and its comparison within one output are those of Wanda
    (Sun et al., arXiv 2306.11695).

    Args:
        weight (`torch.Tensor`): The weight, of two dimensions.
        input_norm (`torch.Tensor`): The norms of the inputs, of shape `(weight.shape[input_dim],)`.
        input_dim (`int`): The dimension of the weight that the inputs run along: 1 in a `torch.nn.Linear`.

    Returns:
        `torch.Tensor`: float32, of the weight's shape.
    """
    importance = weight.detach().float().abs().movedim(input_dim, -1) * input_norm
    return _ranks(importance.argsort(dim=-1, stable=True)).movedim(-1, input_dim).contiguous()


def elimination_ranks(interactions: torch.Tensor) -> torch.Tensor:
    """Return the ranks of groups in greedy elimination, where the group that adds least to the error goes next.

    They are spread evenly over [0, 2]. Removing the groups S changes a layer's output by the sum of their
    contributions. The squared error over the inputs seen is the sum of `interactions` over S x S, so groups that
    compensate for each other are removed together.

    Args:
        interactions (`torch.Tensor`):
            The inner products of the contributions of any two groups, of shape `(groups, groups)`.

    Returns:
        `torch.Tensor`: float32, of shape `(groups,)`; 2 for the group that is removed last.
    """
    num_groups = len(interactions)
    order = torch.empty(num_groups, dtype=torch.long, device=interactions.device)
    added = interactions.diagonal().clone()  # to the error, by removing each remaining group
    for place in range(num_groups):
        order[place] = group = added.argmin()
        added += 2 * interactions[group]
        added[group] = torch.inf
    return _ranks(order)


def _ranks(order: torch.Tensor) -> torch.Tensor:
    """Return the rank of each entry, spread evenly over [0, 2], from the order of entries along the last dimension."""
    spread = torch.linspace(0, 2, order.shape[-1], dtype=torch.float32, device=order.device)
    return torch.empty_like(order, dtype=torch.float32).scatter_(-1, order, spread.expand_as(order))


def initial_scores(weight: torch.Tensor, config: AdaPruneConfig) -> torch.Tensor:
    """Return an adapter's initial scores as they are stored: divided by `config.score_lr_ratio`.

    Adam moves every parameter by about the learning rate, whatever the size of its gradient. Dividing the scores by
    the ratio thus makes its steps larger by that ratio, relative to the scores.

    Args:
        weight (`torch.Tensor`): The weight to be masked.
        config (`AdaPruneConfig`): The adapter's configuration; its `score_init` and `score_lr_ratio` are used.

    Returns:
        `torch.Tensor`: float32, of the weight's shape.
    """
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    if config.score_init in ("magnitude", "wanda"):
        # Replaced by Wanda's ranks when inputs are known (`Pruner.step`).
        scores = magnitude_ranks(weight)
    elif config.score_init == "constant":
        scores = torch.full(weight.shape, 0.01, dtype=torch.float32, device=weight.device)
    else:
        scores = torch.normal(0.01, 0.001, weight.shape, dtype=torch.float32, device=weight.device)
    return scores / config.score_lr_ratio


def scores_from_mask(weight: torch.Tensor, mask: torch.Tensor, config: AdaPruneConfig) -> torch.Tensor:
    """Return scores that reproduce a mask, every kept entry above every pruned one, in the range of initial scores.

    Args:
        weight (`torch.Tensor`): The masked weight.
        mask (`torch.Tensor`): Boolean, of the weight's shape.
        config (`AdaPruneConfig`): The adapter's configuration; its `score_init` and `score_lr_ratio` are used.

    Returns:
        `torch.Tensor`: float32, of the weight's shape, divided by `config.score_lr_ratio`.
    """
    fresh = initial_scores(weight, config)
    if config.selection == "threshold":
        return fresh.abs() * torch.where(mask, 1.0, -1.0)
    # Less than half, so that the highest pruned score does not tie with the lowest kept one.
    return 0.49 * fresh + mask / config.score_lr_ratio
