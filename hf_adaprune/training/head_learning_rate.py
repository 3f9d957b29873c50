"""A learning rate of its own for the head, where the optimizer has one for all parameters."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from ..tuner.head import head_wrappers


class HeadLearningRate:
    """Scale the optimizer's steps of the head.

    For every optimizer whose step is proportional to the learning rate, this equals another learning rate for the
    head; a stock `Trainer` has one for all parameters.

    Args:
        model (`torch.nn.Module`): The model, wrapped for training or not.
        adapter_name (`str`): The adapter that the head belongs to; it may have none.
        ratio (`float`): The factor of the steps, > 0.
    """

    def __init__(self, model: nn.Module, adapter_name: str, ratio: float) -> None:
        self.ratio = ratio
        copies = [wrapper.modules_to_save for wrapper in head_wrappers(model).values()]
        heads = [copies_of_one[adapter_name] for copies_of_one in copies if adapter_name in copies_of_one]
        self.parameters = [parameter for head in heads for parameter in head.parameters()]
        # Loading a head is not a step of the optimizer.
        self._handles = [head.register_load_state_dict_post_hook(self._loaded) for head in heads]
        coarse = {p.dtype for p in self.parameters} & {torch.bfloat16, torch.float16}
        if coarse:
            warnings.warn(
                f"The head is in {coarse.pop()}, which is too coarse for the steps of training: many of its weights "
                "do not change. Load the model with `dtype=torch.float32`; `TrainingArguments(bf16=True)` still "
                "computes in half precision.",
                stacklevel=3,
            )
        self._previous = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def remember(self) -> None:
        """Record the current head as the starting point of the next step."""
        for parameter, previous in zip(self.parameters, self._previous, strict=True):
            previous.copy_(parameter)

    def close(self) -> None:
        """Remove the hooks from the head."""
        for handle in self._handles:
            handle.remove()

    def _loaded(self, head: nn.Module, incompatible_keys: object) -> None:
        self.remember()

    @torch.no_grad()
    def scale_last_step(self) -> None:
        """Multiply the step that the optimizer has just taken by `ratio`."""
        if self.ratio != 1:
            for parameter, previous in zip(self.parameters, self._previous, strict=True):
                parameter.copy_(previous + self.ratio * (parameter - previous))
                previous.copy_(parameter)
