"""Convex problems small enough to find the best mask by enumeration: masked least squares and logistic regression.

They are adapted with the package itself: its layer with Eq. 4, and `Pruner` with the rule of Eq. 5 (arXiv 2105.03343).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import get_peft_model
from scipy.optimize import minimize
from torch import nn

from hf_adaprune import AdaPruneConfig, Pruner


@dataclass(frozen=True)
class Problems:
    """Hold many problems of one kind: frozen weights to find a mask for, and data of another task.

    Args:
        kind (`str`): `"least squares"` or `"logistic"`: the loss, convex in a mask relaxed to [0, 1].
        weight (`torch.Tensor`): The frozen weights, of shape `(problems, d)`.
        x (`torch.Tensor`): The inputs, of shape `(problems, samples, d)`.
        y (`torch.Tensor`): The targets, of shape `(problems, samples)`; zeros and ones if logistic.
    """

    kind: str
    weight: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor

    def loss(self, output: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return the loss of each output, in the broadcast shape of the arguments."""
        if self.kind == "least squares":
            return (output - y).square()
        return F.softplus(output) - output * y

    def risk(self, masks: torch.Tensor) -> torch.Tensor:
        """Return the mean loss under masks in [0, 1], of shape `(problems, ..., d)`, as `(problems, ...)`."""
        return torch.stack([self._risk(number, mask) for number, mask in enumerate(masks)])

    def all_risks(self) -> torch.Tensor:
        """Return the mean loss of every mask, shape `(problems, 2^d)`; bit `j` of a mask's number is entry `j`."""
        dim = self.weight.shape[1]
        masks = (torch.arange(2**dim).unsqueeze(1) >> torch.arange(dim) & 1).to(self.weight.dtype)
        return torch.stack([self._risk(number, masks) for number in range(len(self.weight))])

    def _risk(self, number: int, masks: torch.Tensor) -> torch.Tensor:
        output = masks.to(self.weight.dtype) @ (self.x[number] * self.weight[number]).T
        return self.loss(output, self.y[number]).mean(-1)

    def relaxed_optimum(self) -> torch.Tensor:
        """Return the best mask in [0, 1], of shape `(problems, d)`."""
        return torch.stack([self._relaxed_optimum(number) for number in range(len(self.weight))])

    def _relaxed_optimum(self, number: int) -> torch.Tensor:
        dim = self.weight.shape[1]

        def value_and_gradient(values: np.ndarray) -> tuple[float, np.ndarray]:
            mask = torch.tensor(values, requires_grad=True)
            risk = self._risk(number, mask)
            risk.backward()
            assert mask.grad is not None
            return float(risk.detach()), mask.grad.numpy()

        found = minimize(value_and_gradient, np.full(dim, 0.5), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * dim)
        return torch.from_numpy(found.x)

    def squared_gradient(self) -> torch.Tensor:
        """Return G^2 of the theorem for each problem: a bound on any sample's squared gradient norm over [0, 1]^d."""
        terms = self.x * self.weight.unsqueeze(1)
        # The slope of both losses is monotonic in the output, so it is extreme where the output is.
        ends = torch.stack([terms.clamp(max=0).sum(-1), terms.clamp(min=0).sum(-1)])
        slopes = 2 * (ends - self.y) if self.kind == "least squares" else torch.sigmoid(ends) - self.y
        return (slopes.square().amax(0) * terms.square().sum(-1)).amax(-1)


def make_problems(
    kind: str, num_problems: int, dim: int, *, num_samples: int = 64, correlation: float = 0.0, seed: int = 0
) -> Problems:
    """Draw random problems.

    The weights are normal. Those of the task are correlated with them (0.5), so the best mask keeps about half.

    Args:
        kind (`str`): `"least squares"` (with noise of deviation 0.3) or `"logistic"` (labels drawn).
        num_problems (`int`): The number of problems.
        dim (`int`): The number of weights of each, d <= 16.
        num_samples (`int`): The number of samples of each.
        correlation (`float`): The correlation of each pair of inputs, in [0, 1).
        seed (`int`): The random seed.

    Returns:
        `Problems`: In float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weight = normal(num_problems, dim)
    task = 0.5 * weight + 0.75**0.5 * normal(num_problems, dim)
    own, common = normal(num_problems, num_samples, dim), normal(num_problems, num_samples, 1)
    x = (1 - correlation) ** 0.5 * own + correlation**0.5 * common
    output = torch.einsum("bnd,bd->bn", x, task)
    if kind == "least squares":
        y = output + 0.3 * normal(num_problems, num_samples)
    else:
        y = (torch.rand(output.shape, generator=generator) < torch.sigmoid(output)).to(x.dtype)
    return Problems(kind, weight, x, y)


class _Net(nn.Module):
    """Apply one row of weights for each problem."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.linear.weight.data.copy_(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.linear.effective_weight()  # type: ignore[operator]
        return torch.einsum("bnd,bd->bn", x, weight)


def adapt(problems: Problems, **options: Any) -> torch.Tensor:
    """Return the masks that `iterate` ends with: boolean, of shape `(problems, d)`."""
    ((masks, _),) = deque(iterate(problems, **options), maxlen=1)
    return masks


def iterate(
    problems: Problems,
    *,
    steps: int = 500,
    learning_rate: float = 0.1,
    batch_size: int = 8,
    forward_temperature: float = 1e5,
    backward_temperature: float = 1.0,
    start: torch.Tensor | None = None,
    seed: int = 0,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Run Algorithm 1 on all problems at once: plain SGD, alpha_i = c / sqrt(i) as in Theorem 1, no drift and no stop.

    Args:
        problems (`Problems`): The problems to adapt to.
        steps (`int`): T.
        learning_rate (`float`): c > 0.
        batch_size (`int`): Samples per step, drawn uniformly; 1 in Theorem 1.
        forward_temperature (`float`): t_l.
        backward_temperature (`float`): t_s.
        start (`torch.Tensor`, *optional*): The scores to start from; by default the paper's, N(0.01, 0.001^2).
        seed (`int`): The random seed of the start and of the samples.

    Yields:
        `tuple[torch.Tensor, torch.Tensor]`:
            After each step the boolean masks and the scores, both of shape `(problems, d)`.
    """
    torch.manual_seed(seed)
    config = AdaPruneConfig.from_preset(
        "paper",
        target_modules=["linear"],
        forward_temperature=forward_temperature,
        backward_temperature=backward_temperature,
        mask_embeddings=False,
        head="model",
        drift=0.0,
    )
    model = get_peft_model(_Net(problems.weight), config).train()
    layer = model.get_submodule("base_model.model.linear")
    pruner, scores = Pruner(model, steps), layer.adaprune_scores["default"]
    if start is not None:
        scores.data.copy_(start)
    optimizer = torch.optim.SGD([scores], learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) ** -0.5)
    rows, num_samples = torch.arange(len(problems.x)).unsqueeze(1), problems.x.shape[1]
    for _ in range(steps):
        drawn = torch.randint(num_samples, (len(problems.x), batch_size))
        problems.loss(model(problems.x[rows, drawn]), problems.y[rows, drawn]).mean(1).sum().backward()
        optimizer.step()
        pruner.step()
        schedule.step()
        optimizer.zero_grad()
        yield layer.mask("default"), scores.detach()


def gaps(masks: torch.Tensor, risks: torch.Tensor) -> torch.Tensor:
    """Return how far masks are from the best: 0 for the best mask, 1 for the mean risk of all masks.

    Args:
        masks (`torch.Tensor`): Boolean, of shape `(problems, d)`.
        risks (`torch.Tensor`): The result of `all_risks`.

    Returns:
        `torch.Tensor`: Of shape `(problems,)`; exactly 0 where the mask is the best.
    """
    numbers = (masks.long() << torch.arange(masks.shape[1])).sum(1, keepdim=True)
    best = risks.amin(1)
    return (risks.gather(1, numbers).squeeze(1) - best) / (risks.mean(1) - best)


def theorem_bound(
    steps: int, learning_rate: float, squared_gradient: float, t_l: float, t_s: float, m: float
) -> float:
    """Return the right-hand side of Theorem 1, as it is printed.

    Args:
        steps (`int`): T.
        learning_rate (`float`): c.
        squared_gradient (`float`): G^2.
        t_l (`float`): The forward temperature.
        t_s (`float`): The backward temperature.
        m (`float`): M, the largest |theta|.

    Returns:
        `float`: A bound on L_tl(theta_T) - L_tl(theta*), in the unit of the loss.
    """
    g = [1 / (2 + 2 * np.cosh(min(t * m, 700.0))) for t in (t_l, t_s)]  # sigmoid(tM) (1 - sigmoid(tM))
    both = t_l * t_s
    constant = both * (1 / both - 2 * g[0] * g[1] + both / 16**2)
    first = 1 / (learning_rate * steps**0.5)
    return float(first + learning_rate * squared_gradient * (1 + constant) * (1 + np.log(steps)) / steps)
