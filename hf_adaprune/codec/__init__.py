"""Compress masks below one bit per weight: entropy coding with probabilities predicted from weight magnitudes."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import torch

from ..errors import AdapterFileError
from ..masks import PACKED_BITS, pack_mask, packed_size
from .magnitudes import Magnitudes
from .mask_odds import Context, fit_context
from .rans import Array, decode_bits, encode_bits


# Version, made on float16 or not, unit of the scales, number of edges, Rice parameter, lowest level, number of bits
# that decide roundings, CRC-32 of the packed mask.
_HEADER = struct.Struct("<BBBBBhIL")
_VERSION = 1


def encode_mask(mask: torch.Tensor, weight: torch.Tensor, input_dim: int | None = None) -> torch.Tensor:
    """Entropy-code a mask with the weights under it, or pack it if packed bits are no longer than that.

    Each entry is coded with odds predicted from |w| times a scale of its output and one of its input (`Context`).
    Contexts are computed in integers, so they are the same on every machine, and from `Magnitudes`, so they are the
    same for all faithful copies of the weights.

    Args:
        mask (`torch.Tensor`): Boolean, with `n` entries.
        weight (`torch.Tensor`): Finite, of two dimensions, of the mask's shape.
        input_dim (`int`, *optional*): The dimension that the inputs run along; by default the last.

    Returns:
        `torch.Tensor`: uint8: the coded mask, of less than `ceil(n / 8)` bytes, or else the packed mask.
    """
    packed = pack_mask(mask.cpu())
    kept = _rows_first(mask.cpu(), input_dim).numpy()
    magnitudes = Magnitudes(_rows_first(weight, input_dim))
    coded = _encode(kept, magnitudes, packed)
    return torch.from_numpy(coded) if len(coded) < len(packed) else packed


def decode_mask(coded: torch.Tensor, weight: torch.Tensor, input_dim: int | None = None) -> torch.Tensor:
    """Decode what `encode_mask` returned.

    Args:
        coded (`torch.Tensor`): uint8, the result of `encode_mask`; packed bits are returned as they are.
        weight (`torch.Tensor`): The weights given to `encode_mask`, or a copy in float32, bfloat16 or float16.
        input_dim (`int`, *optional*): As given to `encode_mask`.

    Returns:
        `torch.Tensor`: The packed mask, uint8 of shape `(ceil(n / 8),)`, on the device of `coded`.

    Raises:
        AdapterFileError: If a checksum shows that `coded` is damaged or belongs to other weights, or `weight` is on
            the meta device.
    """
    if not is_coded(coded, weight.numel()):
        return coded
    if weight.is_meta:
        raise AdapterFileError(
            "A coded mask can only be read together with the weights under it, which are on the meta device: load "
            "them first."
        )
    try:
        packed = _decode(coded.cpu().numpy(), _rows_first(weight, input_dim), input_dim)
    except (ValueError, IndexError, struct.error) as error:
        raise AdapterFileError(
            f"The mask of a weight of shape {tuple(weight.shape)} cannot be read ({error}): it was coded with "
            "other weights, or the file is damaged. Open the adapter on its own base, in float32, bfloat16 or float16 "
            "(but a bfloat16 and a float16 copy cannot replace each other); or have it saved with "
            f'`mask_codec="{PACKED_BITS}"`, which does not depend on the weights.'
        ) from None
    return packed.to(coded.device)


def is_coded(stored: torch.Tensor, num_entries: int) -> bool:
    """Return whether a stored mask is entropy-coded: it is if it is shorter than packed bits."""
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
    packed = pack_mask(_rows_first(kept, input_dim))
    if zlib.crc32(packed.numpy().data) != checksum:
        raise ValueError("its checksum is wrong")
    return packed


def _in_order(levels: Array, context: Context) -> tuple[Array, Array]:
    """Return the entries' flat positions, the least certain last, and the odds of each group of eight."""
    certainty = np.argsort(-np.abs(context.odds.astype(int)), kind="stable")
    place = np.empty(len(certainty), np.uint8)
    place[certainty] = np.arange(len(certainty))
    places = place[context.of(levels).reshape(-1)]
    order = np.argsort(places, kind="stable")
    return order, context.odds[certainty][places[order[::8]]]


def _encode_scales(values: Array) -> tuple[bytes, int]:
    """Write integers in a Rice code, with the parameter that makes it shortest; return the parameter too."""
    folded = np.where(values < 0, -2 * values - 1, 2 * values).astype(np.int64)
    if not len(folded):
        return b"", 0
    parameter = min(range(8), key=lambda k: int((folded >> k).sum()) + k * len(folded))
    ends = np.cumsum((folded >> parameter) + 1) - 1
    unary = np.zeros(int(ends[-1]) + 1, bool)
    unary[ends] = True
    low = ((folded[:, None] >> np.arange(parameter)) & 1).astype(bool)
    parts = struct.pack("<L", len(unary)), np.packbits(unary).tobytes(), np.packbits(low).tobytes()
    return b"".join(parts), parameter


def _decode_scales(rest: _Reader, count: int, parameter: int) -> Array:
    (num_bits,) = struct.unpack("<L", rest.take(4).tobytes())
    ends = np.flatnonzero(np.unpackbits(rest.take(-(-num_bits // 8)), count=num_bits))
    if len(ends) != count:
        raise ValueError(f"it has scales for {len(ends)} inputs and outputs, not {count}")
    low = np.unpackbits(rest.take(-(-count * parameter // 8)), count=count * parameter).reshape(count, parameter)
    folded = ((np.diff(ends, prepend=-1) - 1) << parameter) + (low.astype(np.int64) << np.arange(parameter)).sum(1)
    return np.where(folded & 1, -(folded + 1) // 2, folded // 2).astype(np.int16)


class _Reader:
    """Read an array of bytes from front to back; raise a `ValueError` if it ends too early."""

    def __init__(self, data: Array, start: int) -> None:
        self._data, self._at = data, start

    def take(self, count: int | None) -> Array:
        """Return the next `count` bytes, or all remaining ones if it is `None`."""
        stop = len(self._data) if count is None else self._at + count
        if stop > len(self._data):
            raise ValueError("it ends too early")
        taken, self._at = self._data[self._at : stop], stop
        return taken


def _rows_first(tensor: torch.Tensor, input_dim: int | None) -> torch.Tensor:
    return tensor.T if input_dim == 0 else tensor
