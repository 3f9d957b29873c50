"""Which weights a mask belongs to, and whether a stored adapter is what was saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


_checked: ContextVar[bool] = ContextVar("hf_adaprune_fingerprints_checked", default=True)


def fingerprint(tensors: Iterable[torch.Tensor], exact: bool = False) -> str:
    """Return a digest of the tensors' shapes and values, in order, that copies in lower precision can be held against.

    It is two digests, of the values rounded to bfloat16 and to float16, and the precision that the values have. A copy
    in either has one of the digests in common with its original; the roundings of one original to the two have none
    (two roundings are not one), which `matches` then says.

    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of any shape and dtype.
        exact (`bool`): Whether a copy in float32 must have the very same values, not only the same roundings.

    Returns:
        `str`:
            Twice 32 hexadecimal digits, and `"float32"`, `"bfloat16"` or `"float16"`, with dots between; if exact, 32
            digits more, of the values themselves.
    """
    tensors = list(tensors)
    parts = [_digest(tensors, torch.bfloat16), _digest(tensors, torch.float16), _precision(tensors)]
    return ".".join([*parts, _digest(tensors, torch.float32)] if exact else parts)


def matches(tensors: Iterable[torch.Tensor], expected: str) -> bool | None:
    """Return whether tensors have a fingerprint, in whatever precision they and its original are.

    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of any shape and dtype.
        expected (`str`): What `fingerprint` has returned for the original, or, in earlier versions, its first digest.

    Returns:
        `bool`, *optional*: `None` if it cannot be told: the one is in bfloat16, the other in float16.
    """
    tensors = list(tensors)
    bfloat16, float16, made_in, values = [*expected.split("."), "", "", ""][:4]
    if values and _precision(tensors) == "float32":
        return _digest(tensors, torch.float32) == values
    if _digest(tensors, torch.bfloat16) == bfloat16 or (float16 and _digest(tensors, torch.float16) == float16):
        return True
    made_in = made_in or "bfloat16"
    return None if {_precision(tensors), made_in} == {"bfloat16", "float16"} else False


def same_origin(first: str, second: str) -> bool | None:
    """Return whether two fingerprints are of copies of one original; `None` if it cannot be told, as by `matches`."""
    one, other = first.split("."), second.split(".")
    if any(digest == another for digest, another in zip(one[:2], other[:2], strict=False)):
        return True
    return None if {(one[2:] or [""])[0], (other[2:] or [""])[0]} == {"bfloat16", "float16"} else False


def _digest(tensors: list[torch.Tensor], dtype: torch.dtype) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(dtype).view(torch.int32 if dtype == torch.float32 else torch.int16)
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


def _precision(tensors: list[torch.Tensor]) -> str:
    floating = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        # In float32 too, what was once rounded shows it.
        rounded = (
            tensor.dtype == dtype or torch.equal(tensor, tensor.to(dtype).to(tensor.dtype)) for tensor in floating
        )
        if any(tensor.dtype == dtype for tensor in floating) or (floating and all(rounded)):
            return name
    return "float32"


@contextmanager
def skip_fingerprint_check() -> Iterator[None]:
    """Open adapters on whatever base they are given, by any door, inside this context.

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
    """Return whether we are outside of every `skip_fingerprint_check`."""
    return _checked.get()
