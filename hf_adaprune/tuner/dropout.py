"""Change a model's dropout for the duration of training.

Dropout that a model reads from its configuration in each pass, as the attention of Persimmon or Falcon does, stays.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


_FORMER = "_adaprune_former_dropout"


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set all dropout probabilities of a model, and remember the original ones for `restore_dropout`.

    Args:
        model (`torch.nn.Module`): The model, wrapped for training or not.
        probability (`float`): In [0, 1).
    """
    for module in model.modules():
        former = dict(_probabilities(module))
        if former:
            vars(module).setdefault(_FORMER, former)
    change_dropout(model, probability)


def change_dropout(model: nn.Module, probability: float) -> None:
    """Set all dropout probabilities of a model permanently."""
    for module in model.modules():
        for name in dict(_probabilities(module)):
            setattr(module, name, probability)


def restore_dropout(model: nn.Module) -> None:
    """Restore the dropout that a model had before `set_dropout`."""
    for module in model.modules():
        for name, probability in vars(module).pop(_FORMER, {}).items():
            setattr(module, name, probability)


def _probabilities(module: nn.Module) -> Iterator[tuple[str, float]]:
    """Yield the dropout attributes of a module: `p` of PyTorch's layers, and floats that attention passes on."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        yield "p", module.p
    for name, value in vars(module).items():
        if "dropout" in name and isinstance(value, float):
            yield name, value
