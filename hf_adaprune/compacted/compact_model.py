"""Compacted models with layer shapes that no stock configuration describes, registered with the Auto classes."""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .shrink import shrink


MODEL_TYPE = "adaprune_compact"


class CompactConfig(PreTrainedConfig):
    """Configuration of a model whose layers `compact` has shrunk to individual shapes.

    Reading it returns an instance of a subclass of the original model's configuration class, with these additional
    fields.

    Args:
        base_model_type (`str`): The original model's `model_type`.
        compact_widths (`dict[str, list[int]]`): The number of inputs and outputs of each linear layer that was shrunk.
        compact_heads (`dict[str, dict]`):
            For each attention module that lost heads, how many it had (`"of"`) and which are left (`"kept"`).
    """

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build a configuration as an instance of the subclass for its `base_model_type`."""
        return config_class(config_dict["base_model_type"]).from_dict(config_dict, **kwargs)


@functools.cache
def config_class(base_model_type: str) -> Any:
    """Return the configuration class of compacted models of a model type, a subclass of the type's own.

    The first call for a type also creates its compacted model classes, and registers them with every Auto class that
    supports the type.
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
    """Return a subclass of a model class that is built with the layer shapes in its configuration."""

    def build(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, config, *args, **kwargs)
        shrink(self.base_model, config.compact_widths, config.compact_heads)

    # The name stays the same: pipelines and saved configurations identify classes by name.
    return type(base.__name__, (base,), {"__init__": build, "config_class": config, "__module__": __name__})


def plain_class(cls: Any) -> Any:
    """Return the stock transformers class of a model, whose class may come from `model_class`."""
    return cls.__base__ if cls.__module__ == __name__ else cls


def stock_class(name: str | None) -> Any:
    """Return the class of transformers models of a name, or `None` if there is none."""
    found = getattr(transformers, name or "", None)
    return found if _is_subclass(found, PreTrainedModel) else None


def class_for(stock: Any, config: Any) -> Any:
    """Return the class that builds a configuration: the stock one, or its subclass for a compacted model."""
    special: Any = type(config)
    return model_class(stock, special) if config.model_type == MODEL_TYPE else stock


def _is_subclass(found: Any, cls: type) -> bool:
    return isinstance(found, type) and issubclass(found, cls)


def __getattr__(name: str) -> Any:
    """Create a class that unpickling looks up by name before any model has needed it."""
    stock: Any = getattr(transformers, name.removeprefix("Compact"), None)
    if name.startswith("Compact") and _is_subclass(stock, PreTrainedConfig):
        return config_class(stock.model_type)
    if _is_subclass(stock, PreTrainedModel):
        return model_class(stock, config_class(stock.config_class.model_type))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, CompactConfig)
