"""Replace methods of single models, and restore what a model had in their place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


class Override(functools.partial):
    """A function in the place of a model's method; `former` is what the model itself had there, if anything."""

    former: Any = None


def override(model: Any, name: str, function: Callable[..., Any], *args: Any) -> None:
    """Make a method of one model call `function(*args, ...)` until `restore`; repeated, it replaces the arguments."""
    made, former = Override(function, *args), vars(model).get(name)
    again = isinstance(former, Override) and former.func is function
    made.former = former.former if again else former
    setattr(model, name, made)


def restore(model: Any, name: str, function: Callable[..., Any] | None = None) -> None:
    """Undo every `override` of a method; with `function`, only the latest, and only if that is by this function."""
    while isinstance(made := vars(model).get(name), Override) and function in (None, made.func):
        delattr(model, name)
        if made.former is not None:
            setattr(model, name, made.former)
