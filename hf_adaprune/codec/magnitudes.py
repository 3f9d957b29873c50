"""Weight magnitudes that are the same for float32, bfloat16 and float16 copies of a base."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from ..files.fingerprint import is_rounded
from .rans import Array


# The number of levels per octave.
STEPS = 32


class Magnitudes:
    """Compute a canonical magnitude of each weight: an integer that copies in other dtypes have in common.

    |w| is rounded to bfloat16, and then to a level, its logarithm in steps of 1/32 octave. A float16 copy has been
    rounded once before. If that gave the midpoint between two bfloat16 numbers, the copy cannot tell which of them the
    original rounds to. This is stored for it, but only where it changes the context (`undecided`): for one weight in
    several hundred.

    If the masks were made on a float16 copy (`from_float16`), all copies are rounded to float16 first; a bfloat16 copy
    cannot be.

    Args:
        weight (`torch.Tensor`): Finite, of any shape, in any of the three dtypes.
        from_float16 (`bool`, *optional*):
            Whether the masks were made on a float16 copy. By default, whether `weight` is one.
    """

    def __init__(self, weight: torch.Tensor, from_float16: bool | None = None) -> None:
        self._weight = weight.detach().cpu().float()
        is_float16 = is_rounded(self._weight, torch.float16) and not is_rounded(self._weight, torch.bfloat16)
        self.from_float16 = is_float16 if from_float16 is None else from_float16
        self.is_undecided = is_float16 and not self.from_float16
        self._codes = _bits((self._weight.half() if self.from_float16 else self._weight).bfloat16())

    def levels(self) -> Array:
        """Return the levels: int16, of the weight's shape."""
        return _levels()[self._codes]

    def undecided(self, contexts: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
        """Return which weights a float16 copy cannot round by itself, and on which side of the midpoint they are.

        Args:
            contexts (`Callable`): Returns the contexts of weights, given their flat positions and levels.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: Flat positions in order, and for each whether it rounds up.
        """
        if self.from_float16:
            return np.empty(0, np.intp), np.empty(0, bool)
        halves, codes = _bits(self._weight.half()).reshape(-1), self._codes.reshape(-1)
        where = np.flatnonzero((halves & 7) == 4)
        lower = _lower_code(halves[where])
        matters = contexts(where, _levels()[lower]) != contexts(where, _levels()[lower + 1])
        return where[matters], codes[where[matters]] > lower[matters]

    def decide(self, where: Array, upper: Array) -> None:
        """Round weights that were `undecided` to the side on which they are in the original."""
        halves = _bits(self._weight.reshape(-1)[torch.from_numpy(where)].half())
        self._codes.reshape(-1)[where] = _lower_code(halves) + upper


def _bits(tensor: torch.Tensor) -> Array:
    bits: Array = tensor.contiguous().view(torch.int16).numpy()
    return bits & 0x7FFF


def _lower_code(halves: Array) -> Array:
    """Return the bits of the bfloat16 number below each float16 number that is a midpoint."""
    exponent, fraction = halves >> 10, (halves >> 3) & 0x7F
    # Subnormal numbers all have the lowest level, so any number of that level will do.
    return np.where(exponent > 0, ((exponent + 112) << 7) | fraction, 0)


@lru_cache(maxsize=1)
def _levels() -> Array:
    """Return the level of each bfloat16 number, by its bits without the sign."""
    codes = np.arange(1 << 15)
    # floor(32 log2(1 + m / 128)), in integers.
    fractions = np.array([((128 + m) ** STEPS).bit_length() - 1 - 7 * STEPS for m in range(128)])
    levels = ((codes >> 7) - 127) * STEPS + fractions[codes & 127]
    # Copies differ below the smallest normal float16 number.
    return np.maximum(levels, -14 * STEPS).astype(np.int16)
