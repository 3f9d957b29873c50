"""What the weights tell of a mask before it is read: odds for each entry, fitted where the mask is known."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .magnitudes import STEPS
from .rans import MAX_ODDS


# How many levels are told apart; what is beyond is as good as the last.
WINDOW = 256

# What an edge between contexts costs, in bits: to be written; and to be told to copies in float16, which cannot place
# this share of the weights at a level that is one.
_EDGE_BITS = 16
_UNDECIDED = 2**-10.5 * 1.44 * STEPS

# How finely scales may be told, in levels; and in how many rounds they are fitted.
_UNITS = (2, 4)
_ROUNDS = 4

Array = np.ndarray[Any, np.dtype[Any]]


class Context(NamedTuple):
    """Hold what predicts a mask: a scale for each output and each input, and the odds over what |w| is in their unit.

    With the inputs' norms for scales, |w| is Wanda's importance (arXiv 2306.11695), which masks are started from; but
    scales are fitted to the mask itself, so that any start and any training is met.

    Args:
        rows (`numpy.ndarray`): Added to the levels of each row, in units of `step`: of shape `(rows,)`.
        columns (`numpy.ndarray`): Of each column: of shape `(columns,)`.
        step (`int`): How many levels a unit is.
        lowest (`int`): The level that the window begins at.
        edges (`numpy.ndarray`): Where in the window each context but the first begins, ascending, in `[1, WINDOW)`.
        odds (`numpy.ndarray`): What the odds of "kept" are in each, as powers of 5/4: int8, one more than `edges`.
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
    """Fit a context to a mask: the one by which it takes the fewest bits.

    Args:
        levels (`numpy.ndarray`): The levels of the weights: of two dimensions.
        mask (`numpy.ndarray`): Boolean, of the same shape.

    Returns:
        `Context`: The context. Equal masks may come out differently on other machines: it is stored, not fitted anew.
    """
    scales = _fit_scales(levels, mask)
    contexts = []
    for step in (0, *_UNITS):
        rows, columns = (np.round(scale * (STEPS / step if step else 0)).astype(np.int16) for scale in scales)
        contexts.append(_fit_odds(levels, mask, rows, columns, step))
    return min(contexts, key=lambda fitted: fitted[1])[0]


def _fit_odds(levels: Array, mask: Array, rows: Array, columns: Array, step: int) -> tuple[Context, float]:
    """Return the best context of given scales, and about how many bits the mask and they take."""
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
    """Fit a logistic regression on the level, a constant for each row and one for each column, in octaves.

    Newton's steps, on one after the other, and shrunk towards none.
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
        # z is in units of the slope here: the step is the slope's own, relative.
        slope *= np.float32(1 + np.clip(np.vdot(error, z) / (np.vdot(spread * z, z) + 1e-6), -0.5, 1))
    return rows - np.median(rows), columns - np.median(columns)


def _fit_edges(total: Array, kept: Array) -> tuple[Array, float]:
    """Return the edges that make entropy and edges together cheapest, and how many bits those take.

    By dynamic programming over where the last one is.
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
    """Return how many bits entries take of which so many are kept."""
    rest = total - kept
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -(kept * np.log2(kept / total) + rest * np.log2(rest / total))
    return np.where((kept > 0) & (rest > 0), bits, 0.0)
