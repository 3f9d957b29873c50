import numpy as np
import pytest
import torch

from hf_adaprune.masks import apply_mask, pack_mask, packed_ones, sparsity_of, topk_mask, unpack_mask


def naive_topk(scores: torch.Tensor, num_kept: int, weight: torch.Tensor) -> torch.Tensor:
    flat, ties = scores.flatten().tolist(), weight.abs().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (-flat[i], -ties[i], i))
    mask = torch.zeros(len(flat), dtype=torch.bool)
    mask[order[:num_kept]] = True
    return mask.view(scores.shape)


@pytest.mark.parametrize("seed", range(20))
def test_topk_keeps_the_highest_scores_as_a_full_sort_would(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few distinct values, so that ties are everywhere.
    scores = torch.randint(0, 4, (7, 5), generator=generator).float()
    ties = torch.randint(-2, 3, (7, 5), generator=generator).float()
    for num_kept in range(36):
        mask = topk_mask(scores, num_kept, ties)
        assert torch.equal(mask, naive_topk(scores, num_kept, ties))
        assert int(mask.sum()) == num_kept


_NORMAL = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
_PATTERNED = _NORMAL + 10 * (torch.arange(20_000) % 61 == 0)  # in step with the sample by which thresholds are found
SCORES = {
    "normal": _NORMAL,
    "in order": _NORMAL.sort().values,
    "patterned": _PATTERNED,
    "tied": (_NORMAL * 3).round(),
    "equal": torch.full((20_000,), -0.1),
    "half out of reach": _NORMAL.where(torch.arange(20_000) % 4 < 2, float("inf")),
    "few": _NORMAL[:10],
}


@pytest.mark.parametrize("kind", SCORES)
def test_thresholds_are_those_of_a_full_sort_in_whatever_order_scores_are(kind: str) -> None:
    scores = SCORES[kind]
    weight = _NORMAL.flip(0)[: len(scores)]
    order = np.lexsort((np.arange(len(scores)), -weight.abs().numpy(), -scores.numpy()))
    for share in (0, 1e-4, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999, 1):
        num_kept = round(share * len(scores))
        wanted = torch.zeros(len(scores), dtype=torch.bool)
        wanted[order[:num_kept].copy()] = True
        assert torch.equal(topk_mask(scores, num_kept, weight), wanted), share


def test_constant_scores_keep_exactly_as_many_and_the_largest_weights() -> None:
    weight = torch.tensor([[0.3, -0.9], [0.1, 0.5]])
    mask = topk_mask(torch.full((2, 2), 0.01), 2, weight)
    assert mask.tolist() == [[False, True], [False, True]]


def test_topk_selects_the_same_in_half_precision_as_its_float32_copy() -> None:
    scores = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    ties = torch.zeros_like(scores)
    assert torch.equal(topk_mask(scores, 100, ties), topk_mask(scores.float(), 100, ties.float()))


@pytest.mark.parametrize("num_kept", [-1, 7])
def test_topk_refuses_to_keep_more_than_there_is_or_less_than_nothing(num_kept: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 6\], got {num_kept}"):
        topk_mask(torch.zeros(6), num_kept, torch.zeros(6))


@pytest.mark.parametrize("shape", [(1,), (8,), (9,), (3, 5), (4, 16), (7, 3, 2)])
def test_packing_restores_every_mask_and_takes_one_bit_a_weight(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, mask.shape), mask)


@pytest.mark.parametrize("num_entries", [1, 7, 8, 9, 64])
def test_packed_ones_are_a_packed_mask_of_ones(num_entries: int) -> None:
    assert torch.equal(packed_ones(num_entries), pack_mask(torch.ones(num_entries, dtype=torch.bool)))


def test_bits_are_packed_from_the_least_significant() -> None:
    mask = torch.tensor([True, False, False, True, False, False, False, False, False, True])
    assert pack_mask(mask).tolist() == [0b00001001, 0b00000010]


def test_an_accelerator_packs_and_unpacks_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(2)) < 0.5
    expected = np.packbits(mask.numpy().ravel(), bitorder="little").tolist()
    monkeypatch.setattr("hf_adaprune.masks._on_cpu", lambda tensor: False)
    assert pack_mask(mask).tolist() == expected
    assert torch.equal(unpack_mask(pack_mask(mask), mask.shape), mask)
    scores = torch.randn(40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(topk_mask(scores, 11, scores), naive_topk(scores, 11, scores))


def test_unpacking_refuses_a_mask_of_the_wrong_length() -> None:
    with pytest.raises(ValueError, match="A mask of 9 entries takes 2 bytes, got 1"):
        unpack_mask(torch.zeros(1, dtype=torch.uint8), torch.Size([9]))


def test_sparsity_counts_all_masks_together() -> None:
    assert sparsity_of([torch.tensor([True, False]), torch.tensor([False] * 6)]) == 7 / 8
    assert sparsity_of([]) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_mask_is_applied_to_the_last_bit(dtype: torch.dtype) -> None:
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    mask = torch.arange(63).view(7, 9) % 3 == 0

    masked = apply_mask(weight, mask)
    assert masked.dtype == dtype
    assert torch.equal(masked, torch.where(mask, weight, 0))
    # A mask that is laid out otherwise, and one that is not of zeros and ones.
    assert torch.equal(apply_mask(weight.T, mask.T), masked.T)
    assert torch.equal(apply_mask(weight, torch.full_like(weight, 0.5)), weight * 0.5)
