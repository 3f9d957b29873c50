"""Fingerprints that identify the weights of a base, and the masks and head of a stored adapter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import xxhash


_checked: ContextVar[bool] = ContextVar("hf_adaprune_fingerprints_checked", default=True)


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """Return a digest of the tensors' shapes and values, in order, that lower-precision copies can be compared with.

    It consists of three digests (of the values rounded to bfloat16, rounded to float16, and unrounded) and of the
    precision of the values. A copy in bfloat16 or float16 shares one of the first two digests with its original. A
    bfloat16 and a float16 copy of one original share none, as rounding twice is not rounding once; `matches` then
    returns `None`.

    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of any shape and dtype.

    Returns:
        `str`:
            Two digests of 32 hexadecimal digits, `"float32"`, `"bfloat16"` or `"float16"`, and a third digest,
            separated by dots.
    """
    tensors = list(tensors)
    rounded = [_digest(tensors, dtype) for dtype in (torch.bfloat16, torch.float16)]
    return ".".join([*rounded, _precision(tensors), _digest(tensors, torch.float32)])


def matches(tensors: Iterable[torch.Tensor], expected: str) -> bool | None:
    """Return whether tensors match a fingerprint, whatever the precision of either.

    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of any shape and dtype.
        expected (`str`): The result of `fingerprint` for the original.

    Returns:
        `bool`, *optional*: `None` if undecidable: one is in bfloat16, the other in float16.
    """
    tensors = list(tensors)
    bfloat16, float16, made_in, values = [*expected.split("."), "", "", ""][:4]
    precision = _precision(tensors)
    if made_in == precision == "float32":
        return _digest(tensors, torch.float32) == values
    if _digest(tensors, torch.bfloat16) == bfloat16 or _digest(tensors, torch.float16) == float16:
        return True
    return None if {precision, made_in} == {"bfloat16", "float16"} else False


def same_origin(first: str, second: str) -> bool | None:
    """Return whether two fingerprints are of copies of one original; `None` if undecidable, as in `matches`."""
    one, other = first.split("."), second.split(".")
    if any(digest == another for digest, another in zip(one[:2], other[:2], strict=False)):
        return True
    return None if {(one[2:] or [""])[0], (other[2:] or [""])[0]} == {"bfloat16", "float16"} else False


def _digest(tensors: list[torch.Tensor], dtype: torch.dtype) -> str:
    # Fast, but not cryptographic: whoever can forge the base's weights can forge the adapter too.
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def _precision(tensors: list[torch.Tensor]) -> str:
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        # Rounded values are recognized in float32 too.
        rounded = (tensor.dtype == dtype or is_rounded(tensor, dtype) for tensor in floating)
        if any(tensor.dtype == dtype for tensor in floating) or (floating and all(rounded)):
            return name
    return "float32"


def is_rounded(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether all values of a tensor can be represented in another dtype."""
    # The last few values usually suffice. The first ones may be those of a padding token, all zero.
    parts = (tensor.reshape(-1)[-256:], tensor)
    return all(torch.equal(part, part.to(dtype).to(part.dtype)) for part in parts)


@contextmanager
def skip_fingerprint_check() -> Iterator[None]:
    """Skip all comparisons of fingerprints inside this context, however an adapter is loaded.

    Neither the base nor the masks, the head and the labels are compared with what was saved, so a damaged adapter may
    open without an error.

    Example:

        >>> with skip_fingerprint_check():
        ...     model = PeftModel.from_pretrained(another_base, "me/my-adapter")
    """
    token = _checked.set(False)
    try:
        yield
    finally:
        _checked.reset(token)


def fingerprints_are_checked() -> bool:
    """Return whether fingerprints are checked, that is, no `skip_fingerprint_check` is active."""
    return _checked.get()
