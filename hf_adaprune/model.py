"""The tuner: puts masks on a model, takes them off, and says what of them is stored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .config import AdaPruneConfig
from .errors import AdapterFileError, BaseMismatchError, MergeError, NoMatchingModuleError
from .fingerprint import fingerprint, fingerprints_are_checked
from .head import prepare_head
from .layer import AdaPruneLayer, Embedding, wrap
from .targets import linear_endings, no_match, resolve_targets


def adaprune_layers(model: nn.Module, adapter_name: str | None = None) -> Iterator[tuple[str, AdaPruneLayer]]:
    """Yield the names and masked layers of a model, all or those that have an adapter of the given name."""
    for name, module in model.named_modules():
        if isinstance(module, AdaPruneLayer) and (adapter_name is None or adapter_name in module.adaprune_mask):
            yield name, module


class AdaPruneModel(BaseTuner):
    """Adapt a frozen model by masks over its weights (arXiv 2105.03343). Made by `peft.get_peft_model`."""

    prefix = "adaprune_"
    tuner_layer_cls = AdaPruneLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put an adapter on the model: PEFT's own injection, on a checked configuration and a checked base."""
        # What is written into it is of this adapter alone: the caller's own may be used again.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        if config.num_parameters is None:
            config.num_parameters = _count_parameters(model)
        prepare_head(model, config)
        if state_dict is not None:
            config.target_modules = {key.rpartition(f".{self.prefix}")[0] for key in state_dict if self.prefix in key}
        resolve_targets(model, config)
        stored, targets = config.adapter_fingerprint is not None, config.target_modules
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except NoMatchingModuleError:
            raise
        except NoMatchingPeftModuleError as error:
            message = no_match(config.target_modules, linear_endings(model))
            raise NoMatchingModuleError(f"{message} ({error})") from None
        # PEFT shortens long lists, and a bare `embed_tokens` means "save the embeddings whole" to it.
        config.target_modules = targets
        _check_base(model, adapter_name, config)
        if stored and fingerprints_are_checked():
            check = _CheckOnce(adapter_name, config)
            check.handle = model.register_forward_pre_hook(check)

    def _create_and_replace(
        self,
        peft_config: AdaPruneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, AdaPruneLayer):
            target.update_layer(adapter_name, peft_config)
            return
        layer = wrap(target, adapter_name, peft_config)
        if layer is None:
            raise NoMatchingModuleError(
                f"`target_modules` matched {current_key!r}, a {type(target).__name__}. Only `torch.nn.Linear`, "
                "`torch.nn.Embedding` and transformers' `Conv1D` can be masked: list it in `exclude_modules`."
            )
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT would hand over `weight` and `bias`, which a head of several layers does not have.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, from layers too whose names contain PEFT's prefix for this method."""
        super().delete_adapter(adapter_name)
        for _, layer in adaprune_layers(self.model, adapter_name):
            layer.delete_adapter(adapter_name)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        for hook in list(self.model._forward_pre_hooks.values()):
            if isinstance(hook, _CheckOnce):
                if merge:
                    hook(self.model, ())
                hook.handle.remove()
        return super()._unload_and_optionally_merge(merge, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        for name, layer in adaprune_layers(self.model):
            shared = [
                key
                for key, parameter in self.model.named_parameters(remove_duplicate=False)
                if parameter is layer.weight and not key.startswith(f"{name}.")
            ]
            if isinstance(layer, Embedding) and shared:
                raise MergeError(
                    f"{name!r} shares its weight with {shared}, which is not masked: merging would prune both. "
                    "Load the base with `tie_word_embeddings=False` and copy the weight, or leave the masks unmerged."
                )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdaPruneConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, torch.Tensor]:
        layers = dict(adaprune_layers(model, adapter_name))
        for key in [key for name in layers for key in state_dict if key.startswith(f"{name}.base_layer.")]:
            # PEFT saves the weight of an embedding that is targeted. The base has it.
            del state_dict[key]
        masks = {key: state_dict[key] for key in (f"{name}.adaprune_mask.{adapter_name}" for name in layers)}
        config.module_counts = {_plain(name): list(layer.count(adapter_name)) for name, layer in layers.items()}
        head = [state_dict[key] for key in _head_keys(model, adapter_name)]
        config.adapter_fingerprint = fingerprint([*masks.values(), *head])
        return masks

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaPruneConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        problems = []
        for name, layer in adaprune_layers(model, adapter_name):
            key, size = f"{name}.adaprune_mask.{adapter_name}", -(-layer.weight.numel() // 8)
            mask = remapped.get(key)
            if mask is None:
                problems.append(f"no mask for {name!r}")
            elif mask.dtype != torch.uint8 or tuple(mask.shape) != (size,):
                problems.append(
                    f"the mask for {name!r} is {tuple(mask.shape)} {mask.dtype}, not ({size},) torch.uint8"
                )
        if problems:
            raise AdapterFileError(
                f"The adapter's file does not fit the model: {'; '.join(problems)}. "
                "Fetch the adapter again, or open it on the base that it was made for."
            )
        return remapped


def _count_parameters(model: nn.Module) -> int:
    added = {"adaprune_scores", "modules_to_save"}
    return sum(p.numel() for name, p in model.named_parameters() if not added & set(name.split(".")))


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _head_keys(model: nn.Module, adapter_name: str) -> list[str]:
    return [
        f"{name}.modules_to_save.{adapter_name}.{key}"
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
        for key in wrapper.modules_to_save[adapter_name].state_dict()
    ]


def _check_base(model: nn.Module, adapter_name: str, config: AdaPruneConfig) -> None:
    weights = [layer.weight for _, layer in adaprune_layers(model, adapter_name)]
    if any(weight.is_meta for weight in weights):
        return
    if config.base_fingerprint is not None and any(weight.dtype == torch.float16 for weight in weights):
        warnings.warn(
            "The base model is in float16, where its fingerprint cannot be checked: make sure that it is "
            f"{config.base_model_name_or_path!r}.",
            stacklevel=2,
        )
        return
    found = fingerprint(weights)
    if config.base_fingerprint is None:
        config.base_fingerprint = found
    elif found != config.base_fingerprint and fingerprints_are_checked():
        raise BaseMismatchError(
            f"The masks of adapter {adapter_name!r} were made for other weights: those of "
            f"{config.base_model_name_or_path!r} have the fingerprint {config.base_fingerprint}, the model's have "
            f"{found}. Load the adapter's own base, in float32 or bfloat16; or, to open it here all the same, do so "
            "inside `hf_adaprune.skip_fingerprint_check()`."
        )


class _CheckOnce:
    """At the first forward pass after loading, hold what was loaded against what was saved.

    Not every door tells when it has finished loading; but none can lead to a forward pass unseen.
    """

    def __init__(self, adapter_name: str, config: AdaPruneConfig) -> None:
        self.adapter_name = adapter_name
        self.config = config
        self.handle: Any = None

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        self.handle.remove()
        expected = self.config.adapter_fingerprint
        # The adapter may be gone, another may have its name, and a state of training may have been loaded into it.
        if expected is None or getattr(model, "peft_config", {}).get(self.adapter_name) is not self.config:
            return
        state = model.state_dict()
        head = [state[key] for key in _head_keys(model, self.adapter_name)]
        if any(tensor.dtype == torch.float16 for tensor in head):
            return
        masks = [layer.adaprune_mask[self.adapter_name] for _, layer in adaprune_layers(model, self.adapter_name)]
        if fingerprint([*masks, *head]) != expected:
            raise AdapterFileError(
                f"The masks or the head of adapter {self.adapter_name!r} are not those that were saved: its files are "
                "damaged, incomplete or edited by hand, or a head of the wrong size was skipped. Fetch it again."
            )
