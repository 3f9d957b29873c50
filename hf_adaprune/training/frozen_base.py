"""Check that training changes nothing outside of what an adapter stores."""

from __future__ import annotations

import warnings

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..storage.checks import vocabulary_size
from ..tuner.masked_layers import added_parameters


def check_vocabulary(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if a model's vocabulary was resized after masks were added: the new embeddings would not be saved.

    Raises:
        ConfigError: If the vocabulary size has changed.
    """
    sizes, before = {vocabulary_size(module) for module in model.modules()} - {None}, config.in_memory.vocab_size
    if sizes and before is not None and before not in sizes:
        raise ConfigError(
            f"The model has {sizes.pop()} tokens, but had {before} when masks were added: an adapter stores no "
            "embeddings, so no base would fit it. Call `resize_token_embeddings` before adding masks, save the model, "
            "and use the saved model as the base."
        )


def check_statistics(model: nn.Module) -> None:
    """Raise if the base has batch normalization: training would change its running statistics.

    Raises:
        ConfigError: If a BatchNorm layer outside of `modules_to_save` tracks running statistics.
    """
    kept_apart = {"modules_to_save", "original_module"}
    changing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not kept_apart & {*name.split(".")}
    ]
    if changing:
        raise ConfigError(
            f"{changing} update running statistics during training, so the base would not stay frozen. Add them to "
            "`modules_to_save`."
        )


def warn_of_unsaved(model: nn.Module) -> None:
    """Warn if parameters of an adapted model will be trained that no adapter stores."""
    adapted = [module for module in model.modules() if "peft_config" in vars(module)]
    trained = {id(p): name for module in adapted for name, p in module.named_parameters() if p.requires_grad}
    unsaved = [trained[key] for key in trained.keys() - added_parameters(model)]
    if unsaved:
        warnings.warn(
            f"{len(unsaved)} parameters of the base are trained too, such as {min(unsaved)!r}, but not saved with an "
            "adapter: a reloaded model will compute something else. Freeze them by `requires_grad_(False)`, or name "
            "their modules in `modules_to_save`.",
            stacklevel=3,
        )
