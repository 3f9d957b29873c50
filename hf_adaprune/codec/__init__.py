"""Masks in less than a bit a weight: what their weights tell of them is not stored."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import torch

from ..errors import AdapterFileError
from ..tuner.masks import PACKED_BITS, pack_mask, packed_size
from .magnitudes import Magnitudes
from .mask_odds import Context, fit_context
from .rans import decode_bits, encode_bits


# Version, from float16 or not, step, edges, Rice's parameter, lowest level, bits that decide, the packed mask's CRC.
_HEADER = struct.Struct("<BBBBBhIL")
_VERSION = 1

Array = np.ndarray[Any, np.dtype[Any]]


def encode_mask(mask: torch.Tensor, weight: torch.Tensor, input_dim: int | None = None) -> torch.Tensor:
    """Code a mask by the weights that it is over, or pack it where that is no longer.

    Each entry is coded with the odds that |w| gives it, times a scale of its output and one of its input (`Context`):
    contexts are the same for all honest copies of the weights (`Magnitudes`), and integers on every machine.

    Args:
        mask (`torch.Tensor`): Boolean, with `n` entries.
        weight (`torch.Tensor`): Finite, of the mask's shape, of two dimensions.
        input_dim (`int`, *optional*): Which dimension the inputs run along: the last, by default.

    Returns:
        `torch.Tensor`: uint8, of less than `ceil(n / 8)` bytes; or of as many, what `pack_mask` returns.
    """
    packed = pack_mask(mask.cpu())
    kept = _rows_first(mask.cpu(), input_dim).numpy()
    magnitudes = Magnitudes(_rows_first(weight, input_dim))
    coded = _encode(kept, magnitudes, packed)
    return torch.from_numpy(coded) if len(coded) < len(packed) else packed


def decode_mask(coded: torch.Tensor, weight: torch.Tensor, input_dim: int | None = None) -> torch.Tensor:
    """Undo `encode_mask`.

    Args:
        coded (`torch.Tensor`): uint8, what it returned; packed bits are returned as they are.
        weight (`torch.Tensor`): The weights that it was given, or a copy of them in float32, bfloat16 or float16.
        input_dim (`int`, *optional*): What it was given.

    Returns:
        `torch.Tensor`: The packed mask, uint8 of shape `(ceil(n / 8),)`, on the device of `coded`.

    Raises:
        AdapterFileError: If the weights are others, or `coded` is damaged: a checksum tells.
    """
    if not is_coded(coded, weight.numel()):
        return coded
    if weight.is_meta:
        raise AdapterFileError("A coded mask needs the weights that it is over, and they are not in memory.")
    try:
        packed = _decode(coded.cpu().numpy(), _rows_first(weight, input_dim), input_dim)
    except (ValueError, IndexError, struct.error) as error:
        raise AdapterFileError(
            f"The mask of a weight of shape {tuple(weight.shape)} cannot be read ({error}): it is coded by that "
            "weight, and this is another one, or the file is damaged. Open the adapter on its own base, in float32, "
            "bfloat16 or float16 (one that was made on a copy in float16 not in bfloat16); or have it saved with "
            f'`mask_codec="{PACKED_BITS}"`, which any weights can be under.'
        ) from None
    return packed.to(coded.device)


def is_coded(stored: torch.Tensor, num_entries: int) -> bool:
    """Return whether a stored mask is shorter than packed bits, and so is none."""
    return stored.numel() < packed_size(num_entries)


def _encode(mask: Array, magnitudes: Magnitudes, packed: torch.Tensor) -> Array:
    context = fit_context(magnitudes.levels(), mask)
    order, odds = _in_order(magnitudes.levels(), context)
    _, upper = magnitudes.undecided(context.at)
    scales = np.concatenate([context.rows, context.columns]) if context.step else np.empty(0, np.int16)
    rice, parameter = _encode_scales(scales)
    header = _HEADER.pack(
        _VERSION,
        magnitudes.from_float16,
        context.step,
        len(context.edges),
        parameter,
        context.lowest,
        len(upper),
        zlib.crc32(packed.numpy().data),
    )
    told = [context.edges.astype(np.uint8).tobytes(), context.odds.tobytes(), rice, np.packbits(upper).tobytes()]
    return np.concatenate(
        [np.frombuffer(b"".join([header, *told]), np.uint8), encode_bits(mask.reshape(-1)[order], odds)]
    )


def _decode(stored: Array, weight: torch.Tensor, input_dim: int | None) -> torch.Tensor:
    version, from_float16, step, num_edges, parameter, lowest, num_upper, checksum = _HEADER.unpack_from(stored.data)
    if version != _VERSION:
        raise ValueError(f"its version is {version}, and this hf_adaprune reads {_VERSION}: upgrade hf_adaprune")
    rest = _Reader(stored, _HEADER.size)
    edges, odds = rest.take(num_edges).astype(np.int64), rest.take(num_edges + 1).view(np.int8)
    rows, columns = (np.zeros(size, np.int16) for size in weight.shape)
    if step:
        rows, columns = np.split(_decode_scales(rest, sum(weight.shape), parameter), [len(rows)])
    context = Context(rows, columns, step, lowest, edges, odds)
    magnitudes = Magnitudes(weight, bool(from_float16))
    upper = np.unpackbits(rest.take(-(-num_upper // 8)), count=num_upper)
    if magnitudes.is_undecided:
        where, _ = magnitudes.undecided(context.at)
        magnitudes.decide(where, upper)
    order, each = _in_order(magnitudes.levels(), context)
    mask = np.empty(weight.numel(), bool)
    mask[order] = decode_bits(rest.take(None), each, mask.size)
    kept = torch.from_numpy(mask.reshape(weight.shape))
    packed = pack_mask(kept.T if input_dim == 0 else kept)
    if zlib.crc32(packed.numpy().data) != checksum:
        raise ValueError("its checksum is wrong")
    return packed


def _in_order(levels: Array, context: Context) -> tuple[Array, Array]:
    """Return the entries' flat positions, the least certain last, and the odds of each eight of them."""
    certainty = np.argsort(-np.abs(context.odds.astype(int)), kind="stable")
    place = np.empty(len(certainty), np.uint8)
    place[certainty] = np.arange(len(certainty))
    places = place[context.of(levels).reshape(-1)]
    order = np.argsort(places, kind="stable")
    return order, context.odds[certainty][places[order[::8]]]


def _encode_scales(values: Array) -> tuple[bytes, int]:
    """Write integers in Rice's code, of whichever parameter is shortest; return that too."""
    folded = np.where(values < 0, -2 * values - 1, 2 * values).astype(np.int64)
    if not len(folded):
        return b"", 0
    parameter = min(range(8), key=lambda k: int((folded >> k).sum()) + k * len(folded))
    ends = np.cumsum((folded >> parameter) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, bool)
    unary[ends] = True
    low = (folded[:, None] >> np.arange(parameter)) & 1
    return struct.pack("<L", len(unary)) + np.packbits(unary).tobytes() + np.packbits(
        low.astype(bool)
    ).tobytes(), parameter


def _decode_scales(rest: _Reader, count: int, parameter: int) -> Array:
    (num_bits,) = struct.unpack("<L", rest.take(4).tobytes())
    ends = np.flatnonzero(np.unpackbits(rest.take(-(-num_bits // 8)), count=num_bits))
    if len(ends) != count:
        raise ValueError(f"it has scales for {len(ends)} inputs and outputs, not {count}")
    low = np.unpackbits(rest.take(-(-count * parameter // 8)), count=count * parameter).reshape(count, parameter)
    folded = ((np.diff(ends, prepend=-1) - 1) << parameter) + (low.astype(np.int64) << np.arange(parameter)).sum(1)
    return np.where(folded & 1, -(folded + 1) // 2, folded // 2).astype(np.int16)


class _Reader:
    """Take bytes off the front of some, and no more than there are."""

    def __init__(self, data: Array, start: int) -> None:
        self._data, self._at = data, start

    def take(self, count: int | None) -> Array:
        """Return the next bytes; all that are left, if no number is given."""
        stop = len(self._data) if count is None else self._at + count
        if stop > len(self._data):
            raise ValueError("it ends too early")
        taken, self._at = self._data[self._at : stop], stop
        return taken


def _rows_first(tensor: torch.Tensor, input_dim: int | None) -> torch.Tensor:
    return tensor.T if input_dim == 0 else tensor
