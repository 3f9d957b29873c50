"""In which order the files of an adapter are put in place: a configuration never before the weights it goes with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


_put_off: ContextVar[list[tuple[Path, Callable[[], None]]] | None] = ContextVar("hf_adaprune_put_off", default=None)


def put_in_place(aside: Path, finish: Callable[[], None]) -> None:
    """Finish a file that was written aside: now, or after the weights if `weights_first` is at work."""
    waiting = _put_off.get()
    if waiting is None:
        finish()
    else:
        waiting.append((aside, finish))


@contextmanager
def weights_first() -> Iterator[None]:
    """Put off what `put_in_place` is given until the end of the block; drop it if the block fails.

    A new configuration that stands beside old weights is an adapter lost.
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
