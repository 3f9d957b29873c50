"""How far the head goes in a step, where the optimizer has one learning rate for everything."""

from __future__ import annotations

import warnings

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn


class HeadLearningRate:
    """Carry on what the optimizer does to the head, in its direction.

    For every optimizer whose step is proportional to the learning rate, that is a larger learning rate; a stock
    `Trainer` has one for all.

    Args:
        model (`torch.nn.Module`): The model, wrapped for training or not.
        adapter_name (`str`): Whose head it is; it may be none.
        ratio (`float`): How many times as far as the optimizer goes, > 0.
    """

    def __init__(self, model: nn.Module, adapter_name: str, ratio: float) -> None:
        self.ratio = ratio
        wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
        heads = [
            wrapper.modules_to_save[adapter_name] for wrapper in wrappers if adapter_name in wrapper.modules_to_save
        ]
        self.parameters = [parameter for head in heads for parameter in head.parameters()]
        # A head that is loaded has not been moved by the optimizer.
        self._handles = [head.register_load_state_dict_post_hook(self._loaded) for head in heads]
        coarse = {p.dtype for p in self.parameters} & {torch.bfloat16, torch.float16}
        if coarse:
            warnings.warn(
                f"The head is in {coarse.pop()}, where many of its weights are too coarse for the steps of training "
                "and stand still. Load the model with `dtype=torch.float32`; `TrainingArguments(bf16=True)` computes "
                "in half precision all the same.",
                stacklevel=3,
            )
        self.remember()

    def remember(self) -> None:
        """Take the head as it is now for the one that the next step sets out from."""
        self._previous = [parameter.detach().clone() for parameter in self.parameters]

    def close(self) -> None:
        """Leave the head alone from here on."""
        for handle in self._handles:
            handle.remove()

    def _loaded(self, head: nn.Module, incompatible_keys: object) -> None:
        self.remember()

    @torch.no_grad()
    def scale_last_step(self) -> None:
        """Make the step that the optimizer has just taken `ratio` times as long."""
        if self.ratio != 1:
            for parameter, previous in zip(self.parameters, self._previous, strict=True):
                parameter.copy_(previous + self.ratio * (parameter - previous))
                previous.copy_(parameter)
