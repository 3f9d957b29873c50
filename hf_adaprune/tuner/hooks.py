"""The forward pre-hooks that the package registers on a model: found by their class, and removed together."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn


class PreHook:
    """A forward pre-hook of one model."""

    handle: Any = None

    def __call__(self, model: Any, args: Any) -> None:
        """Run before the forward pass."""
        raise NotImplementedError

    def attach(self, model: nn.Module) -> None:
        """Register the hook."""
        self.handle = model.register_forward_pre_hook(self)


Hook = TypeVar("Hook", bound=PreHook)


def pre_hooks(model: nn.Module, cls: type[Hook]) -> list[Hook]:
    """Return the hooks of a class on a module itself, in their order."""
    return [hook for hook in model._forward_pre_hooks.values() if isinstance(hook, cls)]


def remove_pre_hooks(model: nn.Module) -> None:
    """Remove all of the package's hooks from a model and its submodules."""
    for module in model.modules():
        for hook in pre_hooks(module, PreHook):
            hook.handle.remove()
