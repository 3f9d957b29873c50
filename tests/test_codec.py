from __future__ import annotations

import base64
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hf_adaprune.codec import decode_mask, encode_mask
from hf_adaprune.codec.rans import MAX_ODDS, decode_bits, encode_bits
from hf_adaprune.errors import AdapterFileError
from hf_adaprune.masks import pack_mask


FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def likely_mask(weight: torch.Tensor, sharpness: float = 10, kept: float = 0.5) -> tuple[torch.Tensor, float]:
    """Return a mask as training makes them of Wanda's ranks, and how many bits there are in it, given all scales."""
    generator = torch.Generator().manual_seed(1)
    outputs, inputs = weight.shape
    scales = 0.5 * torch.randn(outputs, 1, generator=generator) + 0.5 * torch.randn(1, inputs, generator=generator)
    importance = weight.float().abs().log2() + scales
    z = (sharpness * (importance - importance.quantile(1 - kept))).double()
    mask = torch.rand(weight.shape, generator=generator) < z.sigmoid()
    bits = -(torch.nn.functional.logsigmoid(torch.where(mask, z, -z)) / np.log(2)).sum()
    return mask, bits.item()


@pytest.mark.parametrize("num_bits", [1, 7, 8, 9, 4000, 20_001])
@pytest.mark.parametrize("largest", [0, 5, MAX_ODDS])
def test_coded_bits_come_back(num_bits: int, largest: int) -> None:
    generator = np.random.default_rng(num_bits)
    odds = generator.integers(-largest, largest + 1, -(-num_bits // 8)).astype(np.int8)
    # Unlikely bits too: those cost, but they come back.
    bits = generator.integers(0, 2, num_bits).astype(np.uint8)

    assert np.array_equal(decode_bits(encode_bits(bits, odds), odds, num_bits), bits)


@pytest.mark.parametrize("odds", [-MAX_ODDS, -20, -8, 0, 3, 12])
def test_bits_cost_what_their_odds_say(odds: int) -> None:
    n, likelihood = 400_000, 1 / (1 + 1.25**-odds)
    bits = (np.random.default_rng(0).random(n) < likelihood).astype(np.uint8)
    ones = int(bits.sum())
    ideal = -(ones * np.log2(likelihood) + (n - ones) * np.log2(1 - likelihood))

    # No byte of eight is ever free; and of each 2048 bits 16 are written as they are, and four or five lost.
    assert 8 * len(encode_bits(bits, np.full(n // 8, odds, np.int8))) <= 1.01 * ideal + n / 8 / 128 + 21 * n / 2048


@pytest.mark.parametrize("shape", [(64, 200), (201, 64), (3, 1000)], ids=str)
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("input_dim", [0, 1, None])
def test_a_mask_comes_back_from_fewer_bytes(shape: tuple[int, int], kept: float, input_dim: int | None) -> None:
    weight = random_weight(*shape)
    mask, _ = likely_mask(weight, kept=kept)
    coded = encode_mask(mask, weight, input_dim)

    assert coded.numel() < 0.7 * pack_mask(mask).numel()
    assert torch.equal(decode_mask(coded, weight, input_dim), pack_mask(mask))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_mask_of_one_kind_takes_next_to_nothing(share: float) -> None:
    weight = random_weight(200, 300)
    mask = torch.full(weight.shape, share).bool()
    coded = encode_mask(mask, weight)

    assert coded.numel() < 200
    assert torch.equal(decode_mask(coded, weight), pack_mask(mask))


def test_what_cannot_be_predicted_is_packed() -> None:
    weight = random_weight(100, 101)
    mask = random_weight(100, 101, seed=1) > 0

    assert torch.equal(encode_mask(mask, weight), pack_mask(mask))
    assert torch.equal(decode_mask(pack_mask(mask), weight), pack_mask(mask))


def test_the_length_is_near_the_entropy_given_the_weights_and_all_scales() -> None:
    weight = random_weight(512, 1024)
    mask, bits = likely_mask(weight)

    # Scales are not known beforehand: four bits for each; and what copies in float16 must be told.
    assert 8 * encode_mask(mask, weight).numel() < 1.05 * bits + 4 * sum(weight.shape) + 0.006 * mask.numel()


@pytest.mark.parametrize("made_in", FLOATS, ids=str)
@pytest.mark.parametrize("read_in", FLOATS, ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-3], ids=["usual", "subnormal in float16"])
def test_copies_in_another_dtype_tell_the_same(made_in: torch.dtype, read_in: torch.dtype, size: float) -> None:
    original = size * random_weight(300, 400)
    weight = original.to(made_in)
    mask, _ = likely_mask(original)
    coded = encode_mask(mask, weight)

    # What was once rounded can be rounded further, or be given as float32.
    copies = [original.to(read_in), weight.to(read_in).float()]
    if {made_in, read_in} == {torch.bfloat16, torch.float16}:
        copies = copies[1:] if made_in == torch.float16 else [weight.float()]
    for copy in copies:
        assert torch.equal(decode_mask(coded, copy), pack_mask(mask))
    assert coded.numel() < 0.75 * pack_mask(mask).numel()


def test_copies_in_float16_and_in_bfloat16_are_told_apart_or_refused() -> None:
    original = random_weight(300, 400)
    mask, _ = likely_mask(original)

    with pytest.raises(AdapterFileError, match=r"a float16 copy cannot replace each other.*packed-bits-lsb"):
        decode_mask(encode_mask(mask, original.half()), original.bfloat16())


def test_other_weights_never_give_a_mask() -> None:
    weight = random_weight(64, 200)
    coded = encode_mask(likely_mask(weight)[0], weight)

    for other in (random_weight(64, 200, seed=5), weight.flip(0), weight * 1.01, torch.zeros_like(weight)):
        with pytest.raises(AdapterFileError, match="coded with other weights"):
            decode_mask(coded, other)


def damaged(coded: torch.Tensor) -> Iterator[torch.Tensor]:
    for length in range(0, coded.numel(), 29):
        yield coded[:length]
    for at in range(0, coded.numel(), 7):
        changed = coded.clone()
        changed[at] ^= 1 << at % 8
        yield changed


def test_damage_never_gives_another_mask() -> None:
    weight = random_weight(64, 200)
    mask, _ = likely_mask(weight)
    refused = 0

    for stored in damaged(encode_mask(mask, weight)):
        try:
            assert torch.equal(decode_mask(stored, weight), pack_mask(mask))
        except AdapterFileError:
            refused += 1

    assert refused > 50


def integer_weight() -> torch.Tensor:
    """Return a weight that is the same on every machine."""
    steps = torch.arange(48 * 96, dtype=torch.int64)
    return ((steps * 75_797 % 80_021 - 40_010).double() / 2**20).float().view(48, 96)


def test_what_was_stored_once_is_readable_for_ever() -> None:
    weight = integer_weight()
    stored = torch.frombuffer(bytearray(base64.b64decode(STORED)), dtype=torch.uint8)

    for copy in (weight, weight.bfloat16(), weight.half()):
        assert torch.equal(decode_mask(stored, copy), pack_mask(integer_mask(weight)))


def integer_mask(weight: torch.Tensor) -> torch.Tensor:
    """Return a mask of the weight that is the same on every machine, and that scales predict in part."""
    scales = 1 + torch.arange(weight.shape[0]).view(-1, 1) % 3 + torch.arange(weight.shape[1]) % 7
    unpredictable = torch.arange(weight.numel()).view(weight.shape) % 97 == 0
    return ((weight.abs() * scales) > 0.08) ^ unpredictable


STORED = """
AQAEBALC/g4AAACt/Gl7eH+DiOv3AAkUXQEAAGta3Ota1uty3WhNJInSES0iEWkgj0hFpITUiE5IhOkQlkSEWkQRciCOiQmophlo0xhl4lxh0p
xhuRfxD6ErkaxDpR+EKkC8QuBexS4RrUelIxgo73s3k1QkIMYWWH4NPMgmyd3hY28C6KOOEVRqX9LYMa3vvvhDzR10SsdP4V5yhKPx345T0/S4
fDIfEcRQpY76/Q5GxQnSgjHXyzAtvDqI3fZdKOn/1VUZbRqt2kiIGTc=
"""
