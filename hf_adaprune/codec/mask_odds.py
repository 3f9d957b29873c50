"""Predict the odds of each mask entry from the weights, with parameters that are fitted when the mask is encoded."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .magnitudes import STEPS
from .rans import MAX_ODDS, Array


# The number of distinct levels; those outside of the window are clipped to it.
WINDOW = 256

# What an edge between contexts costs, in bits: its own storage, and one bit for each weight that a float16 copy cannot
# round, which is this share of the weights at the level of the edge.
_EDGE_BITS = 16
_UNDECIDED = 2**-10.5 * 1.44 * STEPS

# The units that scales may be stored in, in levels; and the number of rounds in which they are fitted.
_UNITS = (2, 4)
_ROUNDS = 4


class Context(NamedTuple):
    """The predictor of a mask: a scale for each output and each input, and odds as a function of scaled |w|.

    With the inputs' norms as scales, scaled |w| is Wanda's importance (arXiv 2306.11695), from which masks start. But
    scales are fitted to the mask itself, so that they suit any initialisation and any training.

    Args:
        rows (`numpy.ndarray`): Added to the levels of each row, in units of `step`; of shape `(rows,)`.
        columns (`numpy.ndarray`): Likewise for each column; of shape `(columns,)`.
        step (`int`): The number of levels per unit; 0 if there are no scales.
        lowest (`int`): The level at which the window begins.
        edges (`numpy.ndarray`): Where in the window each context but the first begins: ascending, in `[1, WINDOW)`.
        odds (`numpy.ndarray`): The odds of "kept" in each context, as exponents of 5/4: int8, one more than `edges`.
    """

    rows: Array
    columns: Array
    step: int
    lowest: int
    edges: Array
    odds: Array

    def of(self, levels: Array) -> Array:
        """Return the context of each entry: uint8, from the levels of a whole matrix."""
        offsets = (self.step * self.columns - self.lowest).astype(np.int16)
        return self._find(levels + offsets + (self.step * self.rows).astype(np.int16)[:, None])

    def at(self, where: Array, levels: Array) -> Array:
        """Return the contexts of the entries at some flat positions, from their levels."""
        row, column = np.divmod(where, len(self.columns))
        return self._find(levels + self.step * (self.rows[row] + self.columns[column]) - self.lowest)

    def _find(self, relative: Array) -> Array:
        table = np.searchsorted(self.edges, np.arange(WINDOW), side="right").astype(np.uint8)
        return table.take(relative, mode="clip")


def fit_context(levels: Array, mask: Array) -> Context:
    """Fit the context with which a mask takes the fewest bits.

    Args:
        levels (`numpy.ndarray`): The levels of the weights, of two dimensions.
        mask (`numpy.ndarray`): Boolean, of the same shape.

    Returns:
        `Context`: The context. It is stored with the mask, as the fit may differ on another machine.
    """
    scales = _fit_scales(levels, mask)
    contexts = []
    for step in (0, *_UNITS):
        rows, columns = (np.round(scale * (STEPS / step if step else 0)).astype(np.int16) for scale in scales)
        contexts.append(_fit_odds(levels, mask, rows, columns, step))
    return min(contexts, key=lambda fitted: fitted[1])[0]


def _fit_odds(levels: Array, mask: Array, rows: Array, columns: Array, step: int) -> tuple[Context, float]:
    """Return the best context for given scales, and the approximate number of bits of mask and context."""
    scaled = levels + (step * columns).astype(np.int16) + (step * rows).astype(np.int16)[:, None]
    num_pruned = mask.size - int(mask.sum())
    least = int(scaled.min())
    middle = least + int(np.searchsorted(np.bincount((scaled - least).reshape(-1)).cumsum(), num_pruned))
    lowest = middle - WINDOW // 2
    window = (scaled - lowest).clip(0, WINDOW - 1).reshape(-1)
    total, kept = np.bincount(window, minlength=WINDOW), np.bincount(window[mask.reshape(-1)], minlength=WINDOW)
    edges, bits = _fit_edges(total, kept)
    starts = np.concatenate([[0], edges])
    kept, total = np.add.reduceat(kept, starts), np.add.reduceat(total, starts)
    odds = np.log((kept + 0.1) / (total - kept + 0.1)) / np.log(1.25)
    if step:
        values = np.concatenate([rows, columns])
        counts = np.unique(values, return_counts=True)[1]
        bits -= float((counts * np.log2(counts / len(values))).sum())
    odds = odds.round().clip(-MAX_ODDS, MAX_ODDS).astype(np.int8)
    return Context(rows, columns, step, lowest, edges, odds), bits


def _fit_scales(levels: Array, mask: Array) -> tuple[Array, Array]:
    """Fit the scales by logistic regression on the level: a constant for each row and each column, in octaves.

    Damped Newton steps are taken for columns, rows and slope in turn.
    """
    octaves = levels.astype(np.float32) / np.float32(STEPS)
    columns, slope = np.zeros(levels.shape[1], np.float32), np.float32(6)
    kth = min(round((1 - mask.mean()) * levels.shape[1]), levels.shape[1] - 1)
    rows = -np.partition(octaves, kth, axis=1)[:, kth]
    for _ in range(_ROUNDS):
        for along in (0, 1):
            z = octaves + columns
            z += rows[:, None]
            z *= slope
            p = 1 / (1 + np.exp(-z.clip(-30, 30)))
            error, spread = mask - p, p * (1 - p)
            change = (error.sum(along) / (slope * spread.sum(along) + 1)).clip(-1, 1)
            columns, rows = (columns + change, rows) if along == 0 else (columns, rows + change)
        # `z` already contains the slope, so this Newton step is that of its relative change.
        slope *= np.float32(1 + np.clip(np.vdot(error, z) / (np.vdot(spread * z, z) + 1e-6), -0.5, 1))
    return rows - np.median(rows), columns - np.median(columns)


def _fit_edges(total: Array, kept: Array) -> tuple[Array, float]:
    """Return the edges that minimise the bits of entries and edges together, and that number of bits.

    It is found by dynamic programming over the position of the last edge.
    """
    n = np.concatenate([[0], np.cumsum(total)])
    k = np.concatenate([[0], np.cumsum(kept)])
    best, begin = np.zeros(WINDOW + 1), np.zeros(WINDOW + 1, int)
    price = np.where(np.arange(WINDOW) > 0, _EDGE_BITS + _UNDECIDED * total, 0)
    for end in range(1, WINDOW + 1):
        costs = best[:end] + price[:end] + _entropy(n[end] - n[:end], k[end] - k[:end])
        begin[end] = int(costs.argmin())
        best[end] = costs[begin[end]]
    edges, end = [], WINDOW
    while begin[end]:
        end = int(begin[end])
        edges.append(end)
    return np.array(edges[::-1], np.int64), float(best[WINDOW])


def _entropy(total: Array, kept: Array) -> Array:
    """Return the number of bits that `total` entries take if `kept` of them are kept."""
    rest = total - kept
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -(kept * np.log2(kept / total) + rest * np.log2(rest / total))
    return np.where((kept > 0) & (rest > 0), bits, 0.0)
