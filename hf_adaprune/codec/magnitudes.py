"""The magnitude of weights as all honest copies of a base tell it: in float32, bfloat16 and float16."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch


# Steps of a level to an octave.
STEPS = 32

Array = np.ndarray[Any, np.dtype[Any]]


class Magnitudes:
    """Tell a canonical magnitude of each weight: an integer that a copy in another dtype tells too.

    It is |w| rounded to bfloat16, and then to a level, the logarithm in steps of 1/32 octave. A copy in float16 was
    rounded before, and where that hit the middle between two bfloat16 numbers it cannot know which of them it is.
    Only there must it be told, and only where it matters (`undecided`): one weight in some hundred.

    Where the masks were made on a copy in float16 (`from_float16`), everyone rounds to that first; a copy in bfloat16
    cannot.

    Args:
        weight (`torch.Tensor`): Finite, of any shape, in any of the three dtypes.
        from_float16 (`bool`, *optional*):
            Whether the masks were made on a copy in float16. By default whether this is one.
    """

    def __init__(self, weight: torch.Tensor, from_float16: bool | None = None) -> None:
        self._weight = weight.detach().cpu().float()
        is_float16 = self._is_float16()
        self.from_float16 = is_float16 if from_float16 is None else from_float16
        self.is_undecided = is_float16 and not self.from_float16
        self._codes = _bits((self._weight.half() if self.from_float16 else self._weight).bfloat16())

    def _is_float16(self) -> bool:
        # Most often the first weights tell already.
        for part in (self._weight.reshape(-1)[:256], self._weight):
            if not torch.equal(part.half().float(), part):
                return False
        return not torch.equal(self._weight.bfloat16().float(), self._weight)

    def levels(self) -> Array:
        """Return the levels: int16, of the weight's shape."""
        return _levels()[self._codes]

    def undecided(self, contexts: Callable[[Array, Array], Array]) -> tuple[Array, Array]:
        """Return which weights a copy in float16 cannot place by itself, and on which side of the middle they are.

        Args:
            contexts (`Callable`): Gives the contexts of weights, from their flat positions and their levels.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: Flat positions in order, and for each whether it is the upper one.
        """
        halves, codes = _bits(self._weight.half()).reshape(-1), self._codes.reshape(-1)
        if self.from_float16:
            return np.empty(0, np.intp), np.empty(0, bool)
        where = np.flatnonzero((halves & 7) == 4)
        lower = _lower_code(halves[where])
        matters = contexts(where, _levels()[lower]) != contexts(where, _levels()[lower + 1])
        return where[matters], codes[where[matters]] > lower[matters]

    def decide(self, where: Array, upper: Array) -> None:
        """Put weights that were `undecided` on the side where they are in the original."""
        halves = _bits(self._weight.reshape(-1)[torch.from_numpy(where)].half())
        self._codes.reshape(-1)[where] = _lower_code(halves) + upper


def _bits(tensor: torch.Tensor) -> Array:
    bits: Array = tensor.contiguous().view(torch.int16).numpy()
    return bits & 0x7FFF


def _lower_code(halves: Array) -> Array:
    """Return the bits of the bfloat16 number below the middle that a float16 number is."""
    exponent, fraction = halves >> 10, (halves >> 3) & 0x7F
    # Subnormal numbers are all of the lowest level: any number of it will do.
    return np.where(exponent > 0, ((exponent + 112) << 7) | fraction, 0)


@lru_cache(maxsize=1)
def _levels() -> Array:
    """Return the level of each bfloat16 number, by its bits without the sign."""
    codes = np.arange(1 << 15)
    # floor(32 log2(1 + m / 128)), in integers.
    fractions = np.array([((128 + m) ** STEPS).bit_length() - 1 - 7 * STEPS for m in range(128)])
    levels = ((codes >> 7) - 127) * STEPS + fractions[codes & 127]
    # Below the least normal number of float16 copies differ.
    return np.maximum(levels, -14 * STEPS).astype(np.int16)
