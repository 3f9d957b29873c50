import pytest
import torch

from hf_adaprune import AdaPruneConfig
from hf_adaprune.choices import ScoreInit
from hf_adaprune.tuner.scores import (
    elimination_ranks,
    initial_scores,
    magnitude_ranks,
    scores_from_mask,
    wanda_ranks,
)


def test_ranks_follow_magnitude_and_spread_evenly_over_their_range() -> None:
    ranks = magnitude_ranks(torch.tensor([[-0.5, 0.1], [0.3, -0.2], [0.0, 0.4]]))
    torch.testing.assert_close(ranks, torch.tensor([[2.0, 0.4], [1.2, 0.8], [0.0, 1.6]]))


def test_weights_of_one_output_are_ranked_by_what_they_pass_on() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0], [-2.0, 0.5, 0.1]])
    norm = torch.tensor([10.0, 1.0, 2.0])
    expected = torch.tensor([[2.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    torch.testing.assert_close(wanda_ranks(weight, norm, input_dim=1), expected)
    torch.testing.assert_close(wanda_ranks(weight.T, norm, input_dim=0), expected.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_float32_whatever_the_default(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8)
    kinds: tuple[ScoreInit, ...] = ("magnitude", "constant", "normal")
    torch.set_default_dtype(dtype)
    try:
        scores = [initial_scores(weight, AdaPruneConfig(score_init=kind)) for kind in kinds]
        scores += [wanda_ranks(weight, weight[0].abs(), input_dim=1), elimination_ranks(weight @ weight.T)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert {score.dtype for score in scores} == {torch.float32}


def test_groups_that_make_up_for_each_other_leave_together() -> None:
    # What three groups put into two outputs: the first two are opposed, the third is larger than either.
    outputs = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 5.0]])
    assert elimination_ranks(outputs @ outputs.T).tolist() == [0.0, 1.0, 2.0]
    apart = torch.tensor([[3.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    assert elimination_ranks(apart @ apart.T).tolist() == [0.0, 2.0, 1.0]


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_scores_made_from_a_mask_stand_for_it(preset: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 8, generator=generator)
    mask = weight.abs() < weight.abs().median()  # the largest are pruned
    scores = scores_from_mask(weight, mask, AdaPruneConfig.from_preset(preset))
    assert scores[mask].min() > scores[~mask].max()
    if preset == "paper":
        assert torch.equal(scores > 0, mask)


def test_scores_made_from_a_mask_tell_the_lowest_rank_from_the_highest() -> None:
    scores = scores_from_mask(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), AdaPruneConfig())
    assert scores[0] > scores[1]


def test_the_papers_scores_start_above_zero_around_a_hundredth() -> None:
    torch.manual_seed(0)
    scores = initial_scores(torch.zeros(200, 200), AdaPruneConfig.from_preset("paper"))
    assert scores.mean().item() == pytest.approx(0.01, rel=0.01)
    assert scores.std().item() == pytest.approx(0.001, rel=0.02)
    assert (scores > 0).all()


def test_stored_scores_are_scaled_down_by_their_learning_rate_ratio() -> None:
    weight = torch.randn(9, generator=torch.Generator().manual_seed(0))
    for ratio in (1.0, 100.0):
        scores = initial_scores(weight, AdaPruneConfig(score_lr_ratio=ratio))
        torch.testing.assert_close(scores * ratio, magnitude_ranks(weight))
