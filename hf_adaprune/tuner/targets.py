"""Which modules of a model are masked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import AdaPruneConfig
from ..errors import ConfigError, NoMatchingModuleError
from .head import PEFT_HEADS, body_name, head_modules, output_embeddings
from .layer import AdaPruneLayer
from .layer_types import Conv1DLinear, Linear, masked_class
from .masked_layers import added_parameters, is_foreign


def resolve_targets(model: Any, config: AdaPruneConfig) -> bool:
    """Check the module names in the configuration, and set `target_modules` where the user left it open.

    Args:
        model (`torch.nn.Module`): The model.
        config (`AdaPruneConfig`): The configuration; `target_modules` is changed in place.

    Returns:
        `bool`: Whether `target_modules` asked for every linear layer of the body, by default or as `"all-linear"`.

    Raises:
        NoMatchingModuleError: If there is nothing to mask, or one of the names in `target_modules`, `exclude_modules`
            or `modules_to_save` matches no module.
    """
    _check_names(model, "exclude_modules", config.exclude_modules)
    _check_names(model, "modules_to_save", set(config.modules_to_save or ()) - PEFT_HEADS)
    names = config.target_modules
    everywhere = names is None or (isinstance(names, str) and names.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND)
    if everywhere:
        trained = [*(config.modules_to_save or []), *head_modules(model)]
        found = {name for name, module in linear_layers(model) if not _is_under(name, trained)}
        names = {name for name in found if name.startswith(body_name(model))} - _headless_pooler(model)
    if config.mask_embeddings:
        embeddings = _input_embeddings(model)
        names = names | {embeddings} if isinstance(names, set) else f"(?:{names})|{re.escape(embeddings)}"
    if isinstance(names, set):
        unmatched = _unmatched(names, [name for name, _ in model.named_modules()])
        if unmatched or config.target_modules == set():
            raise NoMatchingModuleError(no_match(unmatched, linear_endings(model)))
        if not names:
            raise NoMatchingModuleError(
                f"{type(model).__name__} has no linear layer in its body, so the modules to mask must be named in "
                "`target_modules`: `torch.nn.Linear`, `torch.nn.Embedding` and transformers' `Conv1D` can be masked."
            )
    config.target_modules = names
    return everywhere


def _input_embeddings(model: Any) -> str:
    """Return the name of the input embeddings, which must be a single module."""
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        found = None
    plain = getattr(found, "base_layer", found)
    tables = {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    sharing = [name for name, table in tables.items() if plain is not None and table.weight is plain.weight]
    if len(sharing) != 1:
        raise NoMatchingModuleError(
            f"`mask_embeddings=True` needs a model whose input embeddings are one module, {type(model).__name__} has "
            f"{sharing or 'none'}. Name in `target_modules` the modules to mask instead."
        )
    return sharing[0].removesuffix(".base_layer")


def _check_names(model: nn.Module, field: str, names: Collection[str] | str | None) -> None:
    modules = [name for name, _ in model.named_modules()]
    if isinstance(names, str):
        unmatched = [] if any(re.fullmatch(names, module) for module in modules) else [names]
    else:
        unmatched = _unmatched(names or (), modules)
    if unmatched:
        endings = {".".join(module.split(".")[-length:]) for module in modules for length in (1, 2, 3)}
        near = sorted({near for name in unmatched for near in get_close_matches(name, endings, n=2)})
        raise NoMatchingModuleError(
            f"No module matched `{field}={unmatched}`. "
            + (f"Close matches: {', '.join(map(repr, near))}." if near else "Give names of modules, or their endings.")
        )


def _unmatched(names: Collection[str], modules: Collection[str]) -> list[str]:
    return sorted(name for name in names if not any(_ends_with(module, name) for module in modules))


def check_adapter_name(model: nn.Module, adapter_name: str) -> None:
    """Raise if an adapter of the given name could not be saved and opened again.

    PEFT finds an adapter's tensors by its name, as one of the parts of their keys, and removes that part.

    Raises:
        ConfigError: If the name is empty, contains a dot, is a part of a module's or parameter's name, or is an
            attribute of `torch.nn.ModuleDict` or `torch.nn.ParameterDict`.
    """
    if not adapter_name or "." in adapter_name:
        raise ConfigError(f"An adapter's name must not be empty or contain a dot, got {adapter_name!r}.")
    added = added_parameters(model)
    names = [name for name, parameter in model.named_parameters() if id(parameter) not in added]
    taken = [name for name in names if adapter_name in name.split(".")]
    if taken or hasattr(nn.ModuleDict, adapter_name) or hasattr(nn.ParameterDict, adapter_name):
        raise ConfigError(
            f"An adapter named {adapter_name!r} could not be opened again: "
            + (f"{taken[0]!r} of the model contains that name." if taken else "that name is reserved.")
            + " Choose another."
        )


def check_on_one_device(model: nn.Module) -> None:
    """Raise if accelerate moves weights only when their layer is called: masked layers do not call the base layer.

    Raises:
        ConfigError: If a linear layer or an embedding has one of accelerate's hooks.
    """
    hooked = next((name for name, module in model.named_modules() if _is_dispatched(module)), None)
    if hooked is not None:
        raise ConfigError(
            f"The base must be on one device: accelerate has dispatched or offloaded it, for example {hooked!r}. Load "
            "it without a `device_map`, or with one that names a single device."
        )


def _is_dispatched(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, nn.Embedding)) and hasattr(module, "_hf_hook")


def check_targets(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if a configuration targets modules that cannot be masked.

    Raises:
        ConfigError: If a targeted module has an adapter of another method around it.
        NoMatchingModuleError: If a targeted module is of a type that cannot be masked.
    """
    targets = config.target_modules if isinstance(config.target_modules, set) else set()
    for name, module in model.named_modules():
        inside = any(target.startswith(f"{name}.") for target in targets)
        if is_foreign(module) and (inside or check_target_module_exists(config, name)):
            raise ConfigError(
                f"{name!r} has an adapter of another method around it, a {type(module).__module__} layer: add the "
                "masks to the model first and the other adapter afterwards, or name in `target_modules` only layers "
                "without another adapter."
            )
    for name, module in model.named_modules():
        can_be = isinstance(module, BaseTunerLayer) or masked_class(module)
        if not can_be and check_target_module_exists(config, name):
            raise NoMatchingModuleError(
                f"`target_modules` matched {name!r}, a {type(module).__name__}. Only `torch.nn.Embedding`, and "
                "`torch.nn.Linear` and transformers' `Conv1D` without a forward pass of their own can be masked: list "
                "it in `exclude_modules`."
            )


def no_match(names: object, endings: list[str]) -> str:
    """Return the message for names that match no module, listing the name endings of the linear modules."""
    there = (
        f"Linear modules end in: {', '.join(map(repr, endings))}; the head is trained, and not masked."
        if endings
        else "The model has no linear module."
    )
    return f"No module matched `target_modules={names!r}`. {there}"


def linear_endings(model: nn.Module) -> list[str]:
    """Return the last parts of the names of all modules that can be masked by default."""
    head = head_modules(model)
    return sorted({name.rpartition(".")[2] for name, _ in linear_layers(model) if not _is_under(name, head)})


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules of all maskable linear layers except a language model's output layer."""
    head = output_embeddings(model)
    wrapped: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(wrapped):
            continue
        if isinstance(module, AdaPruneLayer):
            wrapped += (f"{name}.",)
            if module.input_dim is None:  # an embedding
                continue
        elif masked_class(module) not in (Linear, Conv1DLinear):
            continue
        if module is not head and name:
            yield name, module


def _headless_pooler(model: nn.Module) -> set[str]:
    # The pooler of a model without a head gets no gradient from most losses: it is not masked.
    if body_name(model):
        return set()
    return {name for name, _ in linear_layers(model) if name == "pooler" or name.startswith("pooler.")}


def _ends_with(module: str, name: str) -> bool:
    return module == name or module.endswith(f".{name}")


def _is_under(module: str, parents: list[str]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)
