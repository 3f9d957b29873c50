from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from hf_adaprune.tuner.binarize import masked_linear, sigmoid_relaxation, straight_through


def tensors(shape: tuple[int, ...] = (5, 3)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight, theta, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return weight, theta.requires_grad_(), theta.detach() > 0, upstream


def test_the_forward_pass_multiplies_exactly_by_zero_or_one() -> None:
    weight, theta, mask, _ = tensors((64, 64))
    weight = weight.float() * 1e3
    expected = torch.where(mask, weight, torch.zeros(()))
    assert torch.equal(straight_through(weight, theta, mask), expected)
    assert torch.equal(sigmoid_relaxation(weight, theta, mask, backward_temperature=1.0), expected)


def test_the_straight_through_gradient_is_weight_times_upstream() -> None:
    weight, theta, mask, upstream = tensors()
    straight_through(weight, theta, mask).backward(upstream)
    assert theta.grad is not None
    torch.testing.assert_close(theta.grad, weight * upstream)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_equation_four_holds_against_its_closed_form(temperature: float, scale: float) -> None:
    weight, theta, mask, upstream = tensors()
    scores = (theta.detach() / scale).requires_grad_()
    sigmoid_relaxation(weight, scores, mask, backward_temperature=temperature, score_scale=scale).backward(upstream)
    s = 1 / (1 + torch.exp(-temperature * theta.detach()))
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, weight * upstream * temperature * s * (1 - s))


def test_equation_four_with_equal_temperatures_is_the_true_derivative() -> None:
    weight, theta, mask, upstream = tensors()
    relaxed = sigmoid_relaxation(weight, theta, mask, backward_temperature=2.0, forward_temperature=2.0)
    relaxed.backward(upstream)
    reference = theta.detach().clone().requires_grad_()
    (weight * torch.sigmoid(2.0 * reference)).backward(upstream)
    torch.testing.assert_close(relaxed, weight * torch.sigmoid(2.0 * theta))
    torch.testing.assert_close(theta.grad, reference.grad)


def test_a_high_forward_temperature_is_the_mask_itself() -> None:
    weight, theta, mask, _ = tensors()
    relaxed = sigmoid_relaxation(weight, theta, mask, backward_temperature=1.0, forward_temperature=1e5)
    assert torch.equal(relaxed, weight * mask)


def test_a_trained_weight_gets_the_gradient_of_what_is_kept() -> None:
    weight, theta, mask, upstream = tensors()
    weight.requires_grad_()
    straight_through(weight, theta, mask).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream * mask)


def test_scores_keep_their_precision_under_a_half_precision_weight() -> None:
    weight, theta, mask, upstream = tensors()
    masked = straight_through(weight.bfloat16(), theta, mask)
    assert masked.dtype == torch.bfloat16
    masked.backward(upstream.bfloat16())
    assert theta.grad is not None
    assert theta.grad.dtype == torch.float64


def plain_linear(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    return F.linear(x, straight_through(weight, scores, mask), bias)


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 4, 3)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_a_masked_linear_layer_is_a_linear_layer_with_a_masked_weight(
    shape: tuple[int, ...], has_bias: bool, transposed: bool, autocast: bool
) -> None:
    weight, theta, mask, _ = tensors((3, 5) if transposed else (5, 3))
    generator = torch.Generator().manual_seed(1)
    x, bias = (torch.randn(size, generator=generator) for size in (shape, (5,)))
    upstream = torch.randn(*shape[:-1], 5, generator=generator)
    found = []
    for function in (masked_linear, plain_linear):
        leaves = [it.detach().float().requires_grad_() for it in (x, theta, bias)]
        w, s, m = (it.t() if transposed else it for it in (weight.float(), leaves[1], mask))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = function(leaves[0], w, s, m, leaves[2] if has_bias else None)
        output.backward(upstream.to(output.dtype))
        assert output.dtype == (torch.bfloat16 if autocast else torch.float32)
        found.append([output, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
        assert len(found[-1]) == 3 + has_bias
    assert all(one.dtype == other.dtype for one, other in zip(*found, strict=True))
    torch.testing.assert_close(*found)


def test_what_a_masked_linear_layer_puts_out_may_be_changed_in_place() -> None:
    weight, x = torch.randn(4, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    mask = torch.rand(4, 3) < 0.5

    def gradient(triple: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        scores = torch.zeros_like(weight, requires_grad=True)
        triple(masked_linear(x, weight, scores, mask, None)).square().sum().backward()
        assert scores.grad is not None
        return scores.grad

    assert torch.equal(gradient(lambda output: output.mul_(3.0)), gradient(lambda output: 3.0 * output))


def test_a_masked_linear_layer_keeps_no_masked_weight_for_its_backward_pass() -> None:
    weight, theta, mask, _ = tensors((5, 3))
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        masked_linear(torch.ones(2, 3, dtype=torch.float64), weight, theta, mask, None)
    real = [tensor for tensor in kept if tensor.numel() == 15 and tensor.is_floating_point()]
    assert [tensor.data_ptr() for tensor in real] == [weight.data_ptr()]
