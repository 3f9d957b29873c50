"""Keep the head and the labels of a model in sync with the adapter whose masks are active."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..config import AdaPruneConfig
from ..labels import LABEL_FIELDS, default_labels, plain_labels, stored_labels
from ..overrides import override
from .head import head_wrappers
from .hooks import PreHook, pre_hooks
from .layer import AdaPruneLayer
from .masked_layers import adaprune_layers


# The methods by which transformers switches adapters, besides `set_adapter`.
_SWITCH_METHODS = ("enable_adapters", "disable_adapters", "delete_adapter")


class HeadSync(PreHook):
    """Forward pre-hook that sets a model's head, and the labels in its configuration, to those of the active masks.

    There are many ways to switch adapters. Not all of them switch the head with the masks, and none switches the
    labels, but all are followed by a forward pass.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.base_labels = {field: getattr(model.config, field, None) for field in LABEL_FIELDS}
        self.base_num_labels: int = getattr(model, "num_labels", model.config.num_labels)
        if len(self.base_labels["id2label"] or {}) != self.base_num_labels:
            # They were already changed for the adapter to be added: the base's own are no longer known.
            self.base_labels = default_labels(self.base_num_labels) | {"problem_type": None}
        self.layers: list[AdaPruneLayer] = []
        self.heads: list[ModulesToSaveWrapper] = []
        self.shown: AdaPruneConfig | None = None
        self.on_last_adapter_deleted: Callable[[Any], object] = lambda model: None

    def __call__(self, model: Any, args: Any = ()) -> None:
        if not torch.compiler.is_compiling():
            self.follow(model, getattr(model, "peft_config", {}))

    def follow(self, model: Any, configs: Mapping[str, Any]) -> None:
        """Set head and labels to those of the active masks."""
        enabled = not self.layers[0].disable_adapters
        names = [name for name in self.layers[0].active_adapters if _is_ours(configs.get(name))]
        for head in self.heads:
            if any(name in configs and not _is_ours(configs[name]) for name in head.active_adapters):
                continue  # an adapter of another method controls this head
            if head.disable_adapters == enabled:
                head.enable_adapters(enabled)
            active = [name for name in names if name in head.modules_to_save]
            if head.active_adapters != active:
                frozen = not enabled or all(configs[name].inference_mode for name in active)
                head.set_adapter(active, inference_mode=frozen)
        config = configs[names[0]] if enabled and names else None
        if config is not self.shown:
            self.record(model)
            self.show(model, config)

    def record(self, model: Any) -> None:
        """Copy the labels in the model's configuration to the configuration of the adapter that they belong to."""
        stored = getattr(self.shown, "model_config", None)
        if stored is not None and self._describes_head(model.config.num_labels):
            current = plain_labels({field: getattr(model.config, field, None) for field in LABEL_FIELDS})
            former = stored_labels(stored)
            if current["id2label"] != former["id2label"] and current["label2id"] == former["label2id"]:
                current["label2id"] = {name: number for number, name in (current["id2label"] or {}).items()}
            stored |= {field: value for field, value in current.items() if value is not None}

    def _describes_head(self, num_labels: int) -> bool:
        """Return whether labels of this number are those of the adapter whose labels are shown.

        A number that has changed since may be that of an adapter to be added, or of a head that was put in its place.
        """
        former = self.num_labels(self.shown)
        heads = [head.modules_to_save[name] for head in self.heads for name in head.active_adapters]
        sizes = {len(parameter) for head in heads for parameter in head.parameters()}
        return num_labels == former or (num_labels in sizes and former not in sizes)

    def show(self, model: Any, config: AdaPruneConfig | None) -> None:
        """Write the labels of an adapter into the model's configuration; without one, those of the base."""
        self.shown = config
        for field, value in (_labels(config) or self.base_labels).items():
            setattr(model.config, field, value)
        if hasattr(model, "num_labels"):
            model.num_labels = model.config.num_labels

    def num_labels(self, config: AdaPruneConfig | None) -> int:
        """Return the number of labels of an adapter's head; without an adapter, of the base's."""
        labels = _labels(config)
        return self.base_num_labels if labels is None else len(labels["id2label"])


def _is_ours(config: Any) -> bool:
    return isinstance(config, AdaPruneConfig)


def _labels(config: AdaPruneConfig | None) -> dict[str, Any] | None:
    stored = getattr(config, "model_config", None)
    if stored is None:
        return None
    labels = stored_labels(stored)
    # transformers does not derive it if `id2label` alone is given.
    labels["label2id"] = labels["label2id"] or {name: number for number, name in labels["id2label"].items()}
    return labels


def head_sync_of(model: nn.Module) -> HeadSync | None:
    """Return the `HeadSync` of a model; `None` if it has no masks, or is not a transformers model."""
    return next(iter(pre_hooks(model, HeadSync)), None)


@contextmanager
def active_only(model: nn.Module, adapter_name: str | None) -> Iterator[None]:
    """Activate one adapter, with its head and labels, within the context; without a name, the base."""
    modules = [module for module in model.modules() if isinstance(module, (AdaPruneLayer, ModulesToSaveWrapper))]
    before = [(module._active_adapter, module._disable_adapters) for module in modules]
    head_sync = head_sync_of(model)
    try:
        for module in modules:
            has_it = isinstance(module, AdaPruneLayer) or adapter_name in module.modules_to_save
            module._active_adapter = [adapter_name] if adapter_name is not None and has_it else []
            module._disable_adapters = adapter_name is None
        if head_sync is not None:
            head_sync(model)
        yield
    finally:
        for module, (active, disabled) in zip(modules, before, strict=True):
            module._active_adapter, module._disable_adapters = active, disabled
        if head_sync is not None:
            head_sync(model)


def keep_in_sync(
    model: PreTrainedModel,
    head_sync: HeadSync,
    configs: Mapping[str, Any],
    on_last_adapter_deleted: Callable[[Any], object],
) -> None:
    """Keep head and labels in sync with the masks from here on, including those of a new adapter.

    Args:
        model (`transformers.PreTrainedModel`): A model to which an adapter has just been added.
        head_sync (`HeadSync`): The model's, or a new one that was created before the adapter was added.
        configs (`Mapping[str, Any]`): The configuration of each of its adapters.
        on_last_adapter_deleted (`Callable`): Removes the masked layers from a model that no longer has an adapter.
    """
    if head_sync.handle is None:
        head_sync.on_last_adapter_deleted = on_last_adapter_deleted
        head_sync.attach(model)
        override(model, "set_adapter", _set_adapter, model, head_sync)
        for name in _SWITCH_METHODS:
            override(model, name, _switch, name, model, head_sync)
    head_sync.layers = [layer for _, layer in adaprune_layers(model)]
    head_sync.heads = list(head_wrappers(model).values())
    # The labels now in the model's configuration may be meant for the new adapter only.
    head_sync.show(model, None)
    head_sync.follow(model, configs)


@contextmanager
def detached_labels(head_sync: HeadSync | None) -> Iterator[None]:
    """Detach the labels in the model's configuration from the active adapter: they may be those of one to be added.

    If the block raises, they are attached to the active adapter again.
    """
    if head_sync is None:
        yield
        return
    shown, head_sync.shown = head_sync.shown, None
    try:
        yield
    except BaseException:
        head_sync.shown = shown
        raise


def check_one_head(heads: Iterable[ModulesToSaveWrapper], names: str | Sequence[str]) -> None:
    """Raise if more than one of the adapters that are to be active together has a head.

    Raises:
        ValueError: If more than one of the adapters has a head.
    """
    names = [names] if isinstance(names, str) else list(names)
    own = [name for name in names if any(name in head.modules_to_save for head in heads)]
    if len(own) > 1:
        raise ValueError(
            f"{own} each have a task head; only one can be active. Combine them into one adapter with "
            "`combine_adapters`, which lets you choose the head."
        )


def still_active(active: Sequence[str], configs: Mapping[str, Any]) -> list[str]:
    """Return the adapters to activate in all layers after a deletion: those left, or the one that PEFT would choose.

    PEFT leaves the choice to each layer, but layers do not all have the same adapters.
    """
    if not active:
        return []
    return [name for name in active if name in configs] or sorted(configs)[:1]


def _switch(name: str, model: Any, head_sync: HeadSync, *args: Any, **kwargs: Any) -> None:
    """Call transformers' method, and update head and labels at once.

    They cannot wait for the next forward pass: the backward pass of an earlier loss may come first.
    """
    active = [*head_sync.layers[0].active_adapters]
    getattr(type(model), name)(model, *args, **kwargs)
    if name == "delete_adapter" and (left := still_active(active, getattr(model, "peft_config", {}))):
        _set_adapter(model, head_sync, left)
    head_sync(model)
    if not getattr(model, "peft_config", {}):
        head_sync.on_last_adapter_deleted(model)


def _set_adapter(model: Any, head_sync: HeadSync, adapter_name: str | list[str]) -> None:
    """Do what transformers does, which fails midway if an adapter has no head, or only a part of another's."""
    names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
    configs = getattr(model, "peft_config", {})
    missing = [name for name in names if name not in configs]
    if missing:
        raise ValueError(f"The model has no adapter {missing}; it has {sorted(configs)}.")
    check_one_head(head_sync.heads, names)
    # An adapter of another method is saved separately: masks and head are not trained under it.
    frozen = not all(_is_ours(configs[name]) for name in names)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_adapter(adapter_name, inference_mode=frozen and isinstance(module, AdaPruneLayer))
        elif isinstance(module, ModulesToSaveWrapper):
            own = [name for name in names if name in module.modules_to_save]
            # Whether this head is trained does not depend on other active adapters.
            stays = all(configs[name].inference_mode or (frozen and _is_ours(configs[name])) for name in own)
            module.set_adapter(own, inference_mode=stays)
    head_sync(model)
