"""Masks found by Eq. 4 against the best of all masks, on problems small enough to try them all."""

import sys
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_adaprune.tuner import binarize, layer


EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS = ("least squares", "logistic")

Gradient = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def convex() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield import_module("convex")


@pytest.fixture(scope="module")
def problems(convex: Any) -> Any:
    return convex.make_problems("least squares", 150, 10)


def median_gap(convex: Any, problems: Any, **options: Any) -> float:
    masks = convex.adapt(problems, **{"steps": 300, **options})
    return convex.gaps(masks, problems.all_risks()).median().item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_masks_found_are_near_the_best_of_all(convex: Any, kind: str) -> None:
    problems = convex.make_problems(kind, 150, 10)
    gaps = convex.gaps(convex.adapt(problems, steps=300), problems.all_risks())
    assert gaps.median() < 0.1
    assert (gaps == 0).double().mean() > 0.1
    assert gaps.quantile(0.9) < 0.6


# What a gradient that is wrong in a single place scores: each of these trains without an error.
WRONG: dict[str, Gradient] = {
    "its sign": lambda grad, weight, mask, slope: -grad * weight * slope,
    "no weight": lambda grad, weight, mask, slope: grad * slope,
    "the weight's magnitude": lambda grad, weight, mask, slope: grad * weight.abs() * slope,
    "none for what is pruned": lambda grad, weight, mask, slope: grad * weight * mask * slope,
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_gradient_would_be_seen(
    convex: Any, problems: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, WRONG[what](grad_outputs[0], *ctx.saved_tensors), None, None

    monkeypatch.setattr(binarize._MaskWeight, "backward", staticmethod(backward))
    assert median_gap(convex, problems) > 0.2


def test_swapped_temperatures_would_be_seen(convex: Any, problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = binarize.sigmoid_relaxation

    def swapped(*args: Any, backward_temperature: float, forward_temperature: float, **options: Any) -> torch.Tensor:
        return right(
            *args, backward_temperature=forward_temperature, forward_temperature=backward_temperature, **options
        )

    monkeypatch.setattr(layer, "sigmoid_relaxation", swapped)
    assert median_gap(convex, problems) > 0.5


def test_a_run_is_the_same_for_the_same_seed_and_follows_its_start(convex: Any, problems: Any) -> None:
    assert torch.equal(convex.adapt(problems, steps=20, seed=1), convex.adapt(problems, steps=20, seed=1))
    far = torch.full_like(problems.weight, -1e3)
    assert not convex.adapt(problems, steps=20, start=far).any()
    assert convex.adapt(problems, steps=20, start=-far).all()


@pytest.mark.parametrize("kind", KINDS)
def test_risks_and_gaps_are_those_of_trying_every_mask_by_hand(convex: Any, kind: str) -> None:
    problems = convex.make_problems(kind, 3, 4, num_samples=7, seed=5)
    masks = [torch.tensor(bits) for bits in product([False, True], repeat=4)]
    risks = problems.all_risks()
    for number in range(3):
        by_hand = []
        for mask in masks:
            output = (problems.x[number] * (problems.weight[number] * mask)).sum(1)
            y = problems.y[number]
            error = (output - y) ** 2 if kind == "least squares" else torch.log(1 + torch.exp(-output * (2 * y - 1)))
            by_hand.append(error.mean().item())
        assert sorted(by_hand) == pytest.approx(sorted(risks[number].tolist()))
        best, mean = min(by_hand), np.mean(by_hand)
        for mask, risk in zip(masks, by_hand, strict=True):
            every = mask.expand(3, 4)
            assert convex.gaps(every, risks)[number].item() == pytest.approx((risk - best) / (mean - best))
            assert problems.risk(every)[number].item() == pytest.approx(risk)


@pytest.mark.parametrize("kind", KINDS)
def test_no_mask_is_better_than_the_best_relaxed_one(convex: Any, kind: str) -> None:
    problems = convex.make_problems(kind, 20, 6)
    relaxed = problems.relaxed_optimum()
    assert relaxed.min() >= 0
    assert relaxed.max() <= 1
    least = problems.risk(relaxed)
    assert (least <= problems.all_risks().amin(1)).all()
    # It is a minimum: no step to any side inside of the box goes below it.
    for sign, entry in product((-1e-3, 1e-3), range(6)):
        moved = relaxed.clone()
        moved[:, entry] = (moved[:, entry] + sign).clamp(0, 1)
        assert (problems.risk(moved) >= least - 1e-7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_is_larger_than_the_theorem_is_told(convex: Any, kind: str) -> None:
    problems = convex.make_problems(kind, 20, 4)
    largest = torch.zeros(20, dtype=torch.float64)
    for mask in product((0.0, 0.3, 1.0), repeat=4):
        masks = torch.tensor(mask, dtype=torch.float64).expand(20, 4).clone().requires_grad_()
        terms = problems.x * problems.weight.unsqueeze(1)
        losses = problems.loss(torch.einsum("bnd,bd->bn", terms, masks), problems.y)
        for sample in range(0, 64, 7):
            (gradient,) = torch.autograd.grad(losses[:, sample].sum(), masks, retain_graph=True)
            largest = largest.maximum(gradient.square().sum(1))
    bound = problems.squared_gradient()
    assert (largest <= bound * (1 + 1e-9)).all()
    assert (largest > bound / 20).all()


def test_the_bound_is_that_of_the_theorem(convex: Any) -> None:
    # By hand: g(1) = 1/4 at M = 0, so C = 1 - 2/16 + 1/256.
    expected = 1 / (0.1 * 10) + 0.1 * 50 * (2 - 2 / 16 + 1 / 256) * (1 + np.log(100)) / 100
    assert convex.theorem_bound(100, 0.1, 50.0, 1.0, 1.0, 0.0) == pytest.approx(expected)
    # At the paper's temperatures C is (t_l t_s / 16)^2, about 4e7.
    steep = convex.theorem_bound(100, 0.1, 50.0, 1e5, 1.0, 0.01)
    assert steep == pytest.approx(0.1 * 50 * 1e10 / 256 * (1 + np.log(100)) / 100, rel=1e-3)


def test_the_example_prints_its_tables_and_draws(
    convex: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = import_module("near_optimality")
    small = {"steps": 3}
    monkeypatch.setattr(example, "adapt", lambda problems, **options: convex.adapt(problems, **small | options))
    monkeypatch.setattr(example, "make_problems", lambda *args, **kw: convex.make_problems(args[0], 5, 4, **kw))
    monkeypatch.setattr(example, "FORWARD", (1.0, 1e5))
    monkeypatch.setattr(example, "BACKWARD", (1.0,))
    monkeypatch.setattr(example, "RECORDED", (2, 3))
    monkeypatch.setattr(example, "LAST", {1.0: 3, 1e5: 2})
    monkeypatch.setattr(sys, "argv", ["near_optimality.py", "--figure", str(tmp_path / "new" / "gap.png")])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| the paper's method | ") for line in lines) == 1
    # The steep run ends before the other: its last cell is empty.
    bounds = [line.split("|") for line in lines if line.startswith("| bound, t_l = 100000 | ")]
    assert [(float(cells[2]) > 1e6, cells[3].strip()) for cells in bounds] == [(True, "")] * 2
    assert (tmp_path / "new" / "gap.png").stat().st_size > 1000
