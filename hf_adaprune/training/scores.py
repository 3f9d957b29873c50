"""Where scores start: from the weights and the inputs they meet, or from a mask."""

import torch

from ..config import AdaPruneConfig


def magnitude_ranks(weight: torch.Tensor) -> torch.Tensor:
    """Return the ranks of |w|, ties in order of position, spread evenly over [0, 2] (float32, the weight's shape)."""
    flat = weight.detach().reshape(-1).abs()
    ranks = torch.empty(flat.numel(), dtype=torch.float32, device=flat.device)
    ranks[flat.argsort(stable=True)] = torch.linspace(0, 2, flat.numel(), device=flat.device)
    return ranks.view(weight.shape)


def wanda_ranks(weight: torch.Tensor, input_norm: torch.Tensor, input_dim: int) -> torch.Tensor:
    """Return the ranks of |w| times the norm of the input that w multiplies, each output's spread over [0, 2].

    The importance is that of Wanda (Sun et al., arXiv 2306.11695), and so is comparing the weights of one output.

    Args:
        weight (`torch.Tensor`): Of two dimensions.
        input_norm (`torch.Tensor`): The norms, of shape `(weight.shape[input_dim],)`.
        input_dim (`int`): Which dimension of the weight the inputs run along: 1 in a `torch.nn.Linear`.

    Returns:
        `torch.Tensor`: float32, of the weight's shape.
    """
    importance = weight.detach().float().abs().movedim(input_dim, -1) * input_norm
    num_inputs = importance.shape[-1]
    spread = torch.linspace(0, 2, num_inputs, device=weight.device).expand_as(importance)
    ranks = torch.empty_like(importance).scatter_(-1, importance.argsort(dim=-1, stable=True), spread)
    return ranks.movedim(-1, input_dim).contiguous()


def elimination_ranks(interactions: torch.Tensor) -> torch.Tensor:
    """Return in which order groups leave, always the one whose leaving adds least to the error, spread over [0, 2].

    Without the groups S a layer's output is off by the sum of what they put there. Its squared error, over the inputs
    that were seen, is the sum of `interactions` over S x S: groups that make up for each other leave together.

    Args:
        interactions (`torch.Tensor`): The inner products of what any two groups put there, `(groups, groups)`.

    Returns:
        `torch.Tensor`: float32, of shape `(groups,)`; 2 for the group that stays longest.
    """
    num_groups = len(interactions)
    order = torch.empty(num_groups, dtype=torch.long, device=interactions.device)
    added = interactions.diagonal().clone()  # to the error, by each group that is left
    for place in range(num_groups):
        order[place] = group = added.argmin()
        added += 2 * interactions[group]
        added[group] = torch.inf
    ranks = torch.empty(num_groups, device=interactions.device)
    ranks[order] = torch.linspace(0, 2, num_groups, device=interactions.device)
    return ranks


def initial_scores(weight: torch.Tensor, config: AdaPruneConfig) -> torch.Tensor:
    """Return the scores that an adapter starts from, as they are stored: divided by `config.score_lr_ratio`.

    Adam moves every parameter by about the learning rate whatever the size of its gradient, so the smaller the stored
    scores, the larger the step in their own unit.

    Args:
        weight (`torch.Tensor`): The weight to be masked.
        config (`AdaPruneConfig`): Names the start (`score_init`).

    Returns:
        `torch.Tensor`: float32, of the weight's shape.
    """
    if weight.is_meta:
        return torch.empty(weight.shape, dtype=torch.float32, device="meta")
    if config.score_init in ("magnitude", "wanda"):
        # Wanda's ranks take the place of these once there are inputs (`Pruner.step`).
        scores = magnitude_ranks(weight)
    elif config.score_init == "constant":
        scores = torch.full(weight.shape, 0.01, device=weight.device)
    else:
        scores = torch.normal(0.01, 0.001, weight.shape, device=weight.device)
    return scores / config.score_lr_ratio


def scores_from_mask(weight: torch.Tensor, mask: torch.Tensor, config: AdaPruneConfig) -> torch.Tensor:
    """Return scores that stand for a mask: every kept weight above every pruned one, as far apart as fresh scores are.

    Args:
        weight (`torch.Tensor`): The masked weight.
        mask (`torch.Tensor`): Boolean, of the weight's shape.
        config (`AdaPruneConfig`): Names the start (`score_init`).

    Returns:
        `torch.Tensor`: float32, of the weight's shape, divided by `config.score_lr_ratio`.
    """
    fresh = initial_scores(weight, config)
    if config.selection == "threshold":
        return fresh.abs() * torch.where(mask, 1.0, -1.0)
    # Less than half: the best of the pruned must not tie with the worst of the kept.
    return 0.49 * fresh + mask / config.score_lr_ratio
