"""An entropy coder for bits with known odds: range asymmetric numeral systems (Duda, arXiv 1311.2540) on arrays."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np


# Odds are powers of 5/4 up to this exponent, from 1:45,000 to 45,000:1. They are rational, so exact on every machine.
MAX_ODDS = 48

_PRECISION = 16  # bits of a probability, and of a word of the output
_LOWEST = 1 << _PRECISION  # the smallest value of a state

Array = np.ndarray[Any, np.dtype[Any]]


def _num_lanes(num_bytes: int) -> int:
    """Return the number of interleaved states: enough for fast array operations, at almost no cost in bytes."""
    return max(1, num_bytes >> 8)


def encode_bits(bits: Array, odds: Array) -> Array:
    """Encode bits, eight at a time.

    Args:
        bits (`numpy.ndarray`): 0 or 1, of shape `(n,)`; the code is shortest if the least certain come last.
        odds (`numpy.ndarray`):
            int8 in `[-MAX_ODDS, MAX_ODDS]`, of shape `(ceil(n / 8),)`: each bit of a group of eight is 1 with
            the odds `(5/4)^odds`.

    Returns:
        `numpy.ndarray`: uint8. `n` is not stored in it.
    """
    symbols = np.packbits(bits.astype(bool), bitorder="little")
    lanes = _num_lanes(len(symbols))
    num_coded = max(0, len(symbols) - 2 * lanes)
    # Initial states are in [2^16, 2^17): each holds two of the last bytes, which need no further coding.
    tail = np.zeros(2 * lanes, np.uint8)
    tail[: len(symbols) - num_coded] = symbols[num_coded:]
    states = tail.view("<u2").astype(np.uint64) + np.uint64(_LOWEST)
    words: list[Array] = []
    for start in reversed(range(0, num_coded, lanes)):
        stop = min(start + lanes, num_coded)
        index = _table_index(odds[start:stop]) * 256 + symbols[start:stop]
        width, low, state = (
            _widths()[index].astype(np.uint64),
            _lows()[index].astype(np.uint64),
            states[: stop - start],
        )
        full = state >= width << np.uint64(_PRECISION)
        words.append(state[full].astype("<u2"))
        state[full] >>= np.uint64(_PRECISION)
        state[:] = ((state // width) << np.uint64(_PRECISION)) + state % width + low
    return np.concatenate([_pack_states(states), *(chunk.view(np.uint8) for chunk in reversed(words))])


def decode_bits(coded: Array, odds: Array, num_bits: int) -> Array:
    """Decode what `encode_bits` returned.

    Args:
        coded (`numpy.ndarray`): uint8, the result of `encode_bits`.
        odds (`numpy.ndarray`): As given to `encode_bits`.
        num_bits (`int`): The number of encoded bits.

    Returns:
        `numpy.ndarray`: uint8, 0 or 1, of shape `(num_bits,)`: the encoded bits, or arbitrary ones if `coded` or
        `odds` are not those of the encoding.

    Raises:
        ValueError: If `coded` cannot be a result of `encode_bits`.
    """
    num_symbols = len(odds)
    lanes = _num_lanes(num_symbols)
    num_coded = max(0, num_symbols - 2 * lanes)
    states, words = _unpack_states(coded, lanes)
    symbols = np.empty(num_coded + 2 * lanes, np.uint8)
    tables, widths, lows = _tables(), _widths(), _lows()
    index, read = _table_index(odds[:num_coded]), 0
    slot_bases, symbol_bases = index << _PRECISION, index << 8
    shift, mask = np.uint32(_PRECISION), np.uint32(_LOWEST - 1)
    for start in range(0, num_coded, lanes):
        stop = min(start + lanes, num_coded)
        state = states[: stop - start]
        slot = state & mask
        symbol = tables.take(slot_bases[start:stop] + slot)
        symbols[start:stop] = symbol
        entry = symbol_bases[start:stop] + symbol
        state >>= shift
        state *= widths.take(entry)
        state += slot
        state -= lows.take(entry)
        empty = (state < _LOWEST).nonzero()[0]
        if read + len(empty) > len(words):
            raise ValueError("Coded bits end too early.")
        state[empty] = (state.take(empty) << shift) | words[read : read + len(empty)]
        read += len(empty)
    if read != len(words) or (states >> np.uint32(_PRECISION) != 1).any():
        raise ValueError("Coded bits do not end where they must.")
    symbols[num_coded:] = states.astype("<u2").view(np.uint8)
    return np.unpackbits(symbols, count=num_bits, bitorder="little")


def _pack_states(states: Array) -> Array:
    """Pack states: the lower half of each, the number of digits of its upper half, and these digits, mostly few."""
    upper = (states >> np.uint64(_PRECISION)).astype(np.int64)
    lengths = np.frexp(upper)[1] - 1  # without the leading 1
    digits = (upper[:, None] >> np.arange(_PRECISION)).astype(np.uint8) & 1
    bits = [(lengths[:, None] >> np.arange(4)) & 1, digits[np.arange(_PRECISION) < lengths[:, None]]]
    lower = (states & np.uint64(_LOWEST - 1)).astype("<u2").view(np.uint8)
    return np.concatenate([lower, *(np.packbits(part.astype(bool), axis=None) for part in bits)])


def _unpack_states(coded: Array, lanes: int) -> tuple[Array, Array]:
    """Return the states that `_pack_states` has packed, and the words that follow them."""
    lower, coded = coded[: 2 * lanes].view("<u2"), coded[2 * lanes :]
    at = -(-lanes // 2)
    if len(coded) < at:
        raise ValueError("Coded bits end too early.")
    lengths = (np.unpackbits(coded[:at], count=4 * lanes).reshape(lanes, 4) << np.arange(4)).sum(1)
    words = at + -(-int(lengths.sum()) // 8)
    if len(coded) < words or (len(coded) - words) % 2:
        raise ValueError("Coded bits end too early.")
    digits = np.zeros((lanes, _PRECISION), np.int64)
    digits[np.arange(_PRECISION) < lengths[:, None]] = np.unpackbits(coded[at:words], count=int(lengths.sum()))
    upper = (digits << np.arange(_PRECISION)).sum(1) + (1 << lengths)
    return (upper << _PRECISION).astype(np.uint32) | lower, coded[words:].view("<u2")


def _table_index(odds: Array) -> Array:
    return odds.astype(np.intp) + MAX_ODDS


@lru_cache(maxsize=1)
def _widths() -> Array:
    """Return each byte's probability for each odds, in units of 2^-16: of shape `(odds * 256,)`, none of them 0."""
    ones = [byte.bit_count() for byte in range(256)]
    rows = []
    for odds in range(-MAX_ODDS, MAX_ODDS + 1):
        one, zero = (5**odds, 4**odds) if odds >= 0 else (4**-odds, 5**-odds)
        whole = (one + zero) ** 8
        of_count = [1 + (_LOWEST - 256) * one**k * zero ** (8 - k) // whole for k in range(9)]
        row = [of_count[k] for k in ones]
        row[255 if odds > 0 else 0] += _LOWEST - sum(row)  # the likeliest byte gets the rounding remainder
        rows.append(row)
    return np.array(rows, np.uint32).reshape(-1)


@lru_cache(maxsize=1)
def _lows() -> Array:
    """Return where each byte's share of [0, 2^16) begins, for each odds."""
    widths = _widths().reshape(-1, 256)
    return (np.cumsum(widths, 1, dtype=np.uint32) - widths).reshape(-1)


@lru_cache(maxsize=1)
def _tables() -> Array:
    """Return the byte in whose share each number in [0, 2^16) is, for each odds."""
    return np.concatenate([np.repeat(np.arange(256, dtype=np.uint8), row) for row in _widths().reshape(-1, 256)])
