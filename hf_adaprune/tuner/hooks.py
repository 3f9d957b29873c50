"""The hooks that the package registers on a model, found by their class."""

from typing import TypeVar

from torch import nn


Hook = TypeVar("Hook")


def pre_hooks(module: nn.Module, cls: type[Hook]) -> list[Hook]:
    """Return the forward pre-hooks of a class that are registered on a module itself, in their order."""
    return [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, cls)]
