"""Masked weights, with gradient estimators for the scores: a step function has no useful gradient."""

from typing import Any

import torch
import torch.nn.functional as F

from ..masks import apply_mask


class _MaskWeight(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        scores: torch.Tensor,
        mask: torch.Tensor,
        slope: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight, mask, slope)
        ctx.scores_dtype = scores.dtype
        return apply_mask(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        weight, mask, slope = ctx.saved_tensors
        grad_weight = apply_mask(grad, mask) if ctx.needs_input_grad[0] else None
        grad_scores = None
        if ctx.needs_input_grad[1]:
            grad_scores = (grad * weight).to(ctx.scores_dtype)
            if slope is not None:
                grad_scores = grad_scores * slope
        return grad_weight, grad_scores, None, None


def straight_through(weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mask a weight; pass the gradient on to the scores as if the mask were the scores.

    The forward pass is `weight * mask` to the last bit. The gradient is `dloss/dscores = weight * dloss/dW`, the
    straight-through estimator (Bengio et al., arXiv 1308.3432) as used for masks by Mallya et al. (arXiv 1801.06519).

    Args:
        weight (`torch.Tensor`): Frozen weight.
        scores (`torch.Tensor`): Trainable scores, same shape.
        mask (`torch.Tensor`): Boolean mask, same shape.

    Returns:
        `torch.Tensor`: The masked weight, in the dtype of `weight`.
    """
    return _MaskWeight.apply(weight, scores, mask, None)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scores: torch.Tensor,
        mask: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight, mask)
        ctx.scores_dtype = scores.dtype
        return F.linear(x, apply_mask(weight, mask).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, mask = ctx.saved_tensors
        grad_x = grad_scores = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ apply_mask(weight, mask).to(grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_weight = grad.t() @ x
            grad_scores = grad_weight.to(ctx.scores_dtype).mul_(weight)
        if ctx.needs_input_grad[4]:
            grad_bias = grad.sum(0)
        return grad_x, None, grad_scores, None, grad_bias


def masked_linear(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Compute `F.linear(x, straight_through(weight, scores, mask), bias)` without saving the masked weight.

    The backward pass rebuilds it, which saves the memory of a copy of all masked weights and costs one multiplication
    per weight.

    Args:
        x (`torch.Tensor`): Inputs, of shape `(*, in_features)`.
        weight (`torch.Tensor`): Frozen weight, of shape `(out_features, in_features)`.
        scores (`torch.Tensor`): Trainable scores, same shape.
        mask (`torch.Tensor`): Boolean mask, same shape.
        bias (`torch.Tensor`, *optional*): Of shape `(out_features,)`.

    Returns:
        `torch.Tensor`: Of shape `(*, out_features)`, in the dtype of `x`, or autocast's if that is enabled.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
    # Flattened to rows: with more dimensions the output would be a view, which a model could not modify in place.
    output: torch.Tensor = _MaskedLinear.apply(x.reshape(-1, x.shape[-1]), weight, scores, mask, bias)
    return output.view(*x.shape[:-1], output.shape[-1])


def sigmoid_relaxation(
    weight: torch.Tensor,
    scores: torch.Tensor,
    mask: torch.Tensor,
    *,
    backward_temperature: float,
    forward_temperature: float | None = None,
    score_scale: float = 1.0,
) -> torch.Tensor:
    """Mask a weight; pass the gradient on to the scores through a sigmoid with its own temperature.

    Eq. 4 of "Adapting by Pruning" (arXiv 2105.03343), with theta = `score_scale * scores`, `t_l` the forward and
    `t_s` the backward temperature:

        dloss/dtheta = weight * dloss/dW * t_s * s * (1 - s),    s = sigmoid(t_s * theta)

    Args:
        weight (`torch.Tensor`): Frozen weight.
        scores (`torch.Tensor`): Trainable scores, same shape.
        mask (`torch.Tensor`): Boolean mask, same shape; used where `forward_temperature` is `None`.
        backward_temperature (`float`): `t_s` > 0.
        forward_temperature (`float`, *optional*):
            `t_l` > 0: the forward pass multiplies by `sigmoid(t_l * theta)`. `None` is its limit, the mask itself.
        score_scale (`float`): Factor from `scores` to theta.

    Returns:
        `torch.Tensor`: The masked weight, in the dtype of `weight`.
    """
    theta = scores.detach() * score_scale
    sigmoid = torch.sigmoid(backward_temperature * theta)
    slope = backward_temperature * sigmoid * (1 - sigmoid)
    if forward_temperature is not None:
        mask = torch.sigmoid(forward_temperature * theta).to(weight.dtype)
    return _MaskWeight.apply(weight, scores, mask, slope)
