"""Models whose layers have shapes that no stock configuration describes, made known to transformers' Auto classes."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .shrink import shrink


MODEL_TYPE = "adaprune_compact"


class CompactConfig(PreTrainedConfig):
    """The configuration of a model that `compact` has made smaller, layer by layer.

    What is read is an instance of a subclass of the original model's own configuration, with these fields besides.

    Args:
        base_model_type (`str`): The original model's `model_type`.
        compact_widths (`dict[str, list[int]]`): For each linear layer that was shrunk its inputs and outputs.
        compact_heads (`dict[str, dict]`): For each attention module that lost heads how many it had, and which it has.
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a configuration, as an instance of the right subclass."""
        return config_class(config_dict["base_model_type"]).from_dict(config_dict, **kwargs)


@functools.cache
def config_class(base_model_type: str) -> Any:
    """Return the subclass of a model type's configuration that stands for compact models of this type.

    The first call makes, and registers with every Auto class that knows the type, the models that go with it.
    """
    base = type(AutoConfig.for_model(base_model_type))
    compact = type(f"Compact{base.__name__}", (base,), {"model_type": MODEL_TYPE, "__module__": __name__})
    for name in modeling_auto.__all__:
        auto = getattr(modeling_auto, name)
        mapping = getattr(auto, "_model_mapping", None)
        model = mapping[base] if mapping is not None and base in mapping else None
        if isinstance(model, type):
            auto.register(compact, model_class(model, compact))
    return compact


@functools.cache
def model_class(base: Any, config: Any) -> Any:
    """Return the subclass of a model's class that is built with the shapes its configuration tells of."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        shrink(self.base_model, config.compact_widths, config.compact_heads)

    # Of the same name: it is what pipelines and saved configurations go by.
    return type(base.__name__, (base,), {"__init__": build, "config_class": config, "__module__": __name__})


def plain_class(cls: Any) -> Any:
    """Return the class of transformers' own behind a model's class, which may be one of `model_class`."""
    return cls.__base__ if cls.__module__ == __name__ else cls


def _is_subclass(found: Any, cls: type) -> bool:
    return isinstance(found, type) and issubclass(found, cls)


def __getattr__(name: str) -> Any:
    """Make a class that a pickle names and that no model has needed yet."""
    stock: Any = getattr(transformers, name.removeprefix("Compact"), None)
    if name.startswith("Compact") and _is_subclass(stock, PreTrainedConfig):
        return config_class(stock.model_type)
    if _is_subclass(stock, PreTrainedModel):
        return model_class(stock, config_class(stock.config_class.model_type))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, CompactConfig)
