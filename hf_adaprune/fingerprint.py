"""Which weights a mask belongs to, and whether a stored adapter is what was saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch


_checked: ContextVar[bool] = ContextVar("hf_adaprune_fingerprints_checked", default=True)


def fingerprint(tensors: Iterable[torch.Tensor]) -> str:
    """Return a digest of the tensors' shapes and values, in order.

    Floating-point values are rounded to bfloat16 first: a float32 model and its bfloat16 copy have one fingerprint.
    (A float16 copy has not: two roundings are not one.)

    Args:
        tensors (`Iterable[torch.Tensor]`): Tensors of any shape and dtype.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(str(tuple(tensor.shape)).encode())
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16).view(torch.int16)
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:32]


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
