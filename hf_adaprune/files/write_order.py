"""Write order of an adapter's files: a configuration is never put in place before its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


_put_off: ContextVar[list[tuple[Path, Callable[[], None]]] | None] = ContextVar("hf_adaprune_put_off", default=None)


def put_in_place(aside: Path, finish: Callable[[], None]) -> None:
    """Put a file that was written aside in place: now, or inside `weights_first` after the weights."""
    waiting = _put_off.get()
    if waiting is None:
        finish()
    else:
        waiting.append((aside, finish))


@contextmanager
def weights_first() -> Iterator[None]:
    """Defer all calls of `put_in_place` to the end of the block; discard them if the block fails.

    An adapter with a new configuration and old weights could not be opened.
    """
    waiting: list[tuple[Path, Callable[[], None]]] = []
    token = _put_off.set(waiting)
    try:
        yield
    except BaseException:
        for aside, _ in waiting:
            aside.unlink(missing_ok=True)
        raise
    finally:
        _put_off.reset(token)
    for _, finish in waiting:
        finish()
