"""The tuner: adds masks to a model, removes them, and selects what is stored."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .config import AdaPruneConfig, InMemory
from .errors import ConfigError, MergeError, NoMatchingModuleError
from .files.fingerprint import fingerprints_are_checked
from .hub.publish import push_with_card
from .model_files import load_checked, restore_loading, save_weights_first
from .overrides import override, restore
from .storage.adapter_state import check_loaded, head_shapes, masks_to_store
from .storage.checks import CheckOnce, check_base, check_coded_sizes, options_problem, run_checks, vocabulary_size
from .tuner.dropout import restore_dropout
from .tuner.groups import Groups
from .tuner.head import check_architecture, check_modules_to_save, fitting_head, has_outdated_problem_type, plan_head
from .tuner.head_sync import (
    HeadSync,
    check_one_head,
    detached_labels,
    head_sync_of,
    keep_in_sync,
    still_active,
)
from .tuner.hooks import remove_pre_hooks
from .tuner.layer import AdaPruneLayer
from .tuner.layer_average import refuse_to_save, remove_couriers
from .tuner.layer_types import wrap
from .tuner.masked_layers import adaprune_layers, added_parameters, has_foreign_layers
from .tuner.mixed_batch import mixed_batch
from .tuner.pruner_reminder import PrunerReminder
from .tuner.selection import check_reachable
from .tuner.structure import check_patterns, plan_blocks
from .tuner.targets import (
    check_adapter_name,
    check_on_one_device,
    check_targets,
    linear_endings,
    no_match,
    resolve_targets,
)


class AdaPruneModel(BaseTuner):
    """Adapt a frozen model by masks over its weights (arXiv 2105.03343). Created by `peft.get_peft_model`."""

    prefix = "adaprune_"
    tuner_layer_cls = AdaPruneLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    @classmethod
    def around(cls, model: nn.Module) -> AdaPruneModel:
        """Wrap a model that already has adapters, such as ones added by transformers."""
        tuner = cls.__new__(cls)
        nn.Module.__init__(tuner)
        tuner.model = model
        return tuner

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add an adapter to the model by PEFT's injection, after checking the configuration and the base."""
        # Copied, as fields are filled in for this adapter, and the caller may use the original again.
        config = self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        # The configuration may be that of another adapter, used again.
        config.in_memory = InMemory(vocab_size=vocabulary_size(model))
        try:
            self._inject(model, adapter_name, config, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            if "peft_config" not in vars(model):
                vars(model).pop("_hf_peft_config_loaded", None)  # set by transformers; a second try needs it unset
            raise

    def _inject(
        self,
        model: Any,
        adapter_name: str,
        config: AdaPruneConfig,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        state_dict: dict[str, torch.Tensor] | None,
    ) -> None:
        # All checks come before the first change to the model.
        check_adapter_name(model, adapter_name)
        check_on_one_device(model)
        if any(layer.merged for _, layer in adaprune_layers(model)):
            raise MergeError(
                f"The masks of an adapter are merged into the base; adapter {adapter_name!r} needs the unmerged base: "
                "call `unmerge_adapter()` first."
            )
        check_architecture(model, config)
        outdated = config.model_config is None and has_outdated_problem_type(model)
        plan_head(model, config)
        check_modules_to_save(model, config)
        check_base(model, adapter_name, config)
        check_coded_sizes(model, config)
        if config.is_stored and fingerprints_are_checked() and (problem := options_problem(model, config)):
            warnings.warn(problem, stacklevel=2)
        if config.num_parameters is None:
            config.num_parameters = _count_parameters(model)
        if state_dict is not None:
            config.target_modules = {key.rpartition(f".{self.prefix}")[0] for key in state_dict if self.prefix in key}
        self._plan(model, config)
        if outdated:
            model.config.problem_type = None
        targets = config.target_modules
        head_sync = (head_sync_of(model) or HeadSync(model)) if isinstance(model, PreTrainedModel) else None
        num_labels = None if head_sync is None else head_sync.base_num_labels
        try:
            with fitting_head(model, config, num_labels), detached_labels(head_sync):
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        except NoMatchingPeftModuleError as error:
            message = no_match(config.target_modules, linear_endings(model))
            raise NoMatchingModuleError(f"{message} ({error})") from None
        # PEFT shortens long lists, and takes a bare `embed_tokens` as a request to save the whole embeddings.
        config.target_modules = targets
        if head_sync is not None:
            keep_in_sync(model, head_sync, self.peft_config, _unwrap_layers)
            override(model, "save_pretrained", save_weights_first, model)
            if config.is_stored:
                shapes = head_shapes(model, adapter_name)
                override(model, "_load_pretrained_model", load_checked, config, shapes)
        if not config.inference_mode:
            PrunerReminder(adapter_name).attach(model)
        if config.is_stored and fingerprints_are_checked():
            CheckOnce(adapter_name, config).attach(model)

    def _plan(self, model: nn.Module, config: AdaPruneConfig) -> None:
        """Resolve which modules are masked, and find their groups if the granularity is structured."""
        everywhere = resolve_targets(model, config)
        blocks = plan_blocks(model, config, everywhere)
        self._groups = {name: Groups(block, model) for name, block in blocks.items()}
        if not config.inference_mode:
            check_reachable(self._groups, config)
        check_patterns(model, config)
        check_targets(model, config)

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
        groups, mask_bytes = self._groups.get(current_key), (peft_config.mask_bytes or {}).get(current_key)
        if isinstance(target, AdaPruneLayer):
            target.update_layer(adapter_name, peft_config, groups, mask_bytes)
            return
        layer = wrap(target, adapter_name, peft_config, groups, mask_bytes)
        assert layer is not None  # `check_targets` has refused other types
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        _, first = next(adaprune_layers(self.model), (None, layer))
        layer._disable_adapters = first.disable_adapters
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AuxiliaryTrainingWrapper):
            # PEFT would hand over `weight` and `bias`, which a head of several layers does not have.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter, with its head and its labels, or several, whose masks are multiplied."""
        if head_sync := head_sync_of(self.model):
            check_one_head(head_sync.heads, adapter_name)
        super().set_adapter(adapter_name, inference_mode)
        self._follow()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.get("adapter_names")
        with nullcontext() if names is None else mixed_batch(self.model, names):
            yield

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        super()._enable_adapter_layers(enabled)
        self._follow()

    def _follow(self) -> None:
        if head_sync := head_sync_of(self.model):
            head_sync(self.model)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, also from layers whose names contain `prefix`, which PEFT skips."""
        active = [*self.active_adapters]
        super().delete_adapter(adapter_name)
        for _, layer in adaprune_layers(self.model, adapter_name):
            layer.delete_adapter(adapter_name)
        if names := still_active(active, self.peft_config):
            self.set_adapter(names, all(self.peft_config[name].inference_mode for name in names))
        self._follow()

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge the masks of the active adapters, or of the given ones, which are activated with head and labels."""
        run_checks(self.model)
        if adapter_names:
            self.set_adapter(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        self._check_alone()
        if merge:
            run_checks(self.model)
            self._enable_adapter_layers()  # so that weights, head and labels belong together
            if kwargs.get("adapter_names"):
                unknown = sorted({*kwargs["adapter_names"]} - {*self.peft_config})
                if unknown:
                    raise MergeError(f"The model has no adapter {unknown} to merge; it has {[*self.peft_config]}.")
                # This activates head and labels along with the masks.
                self.set_adapter(kwargs["adapter_names"])
            self._check_merge_allowed()  # before anything is zeroed
            self._zero_producers(kwargs.get("adapter_names"))
        remove_pre_hooks(self.model)
        plain = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        restore_dropout(plain)
        for module in plain.modules():
            for name in list(vars(module)):
                restore(module, name)
        refuse_to_save(plain)
        remove_couriers(plain)
        return plain

    def _zero_producers(self, adapter_names: list[str] | None) -> None:
        for _, layer in adaprune_layers(self.model):
            for name in {*(adapter_names or layer.active_adapters), *layer.merged_adapters}:
                groups = layer.groups(name)
                if groups is not None:
                    groups.zero_producers(layer.scored_mask(name))

    def _check_alone(self) -> None:
        if has_foreign_layers(self.model):
            raise MergeError(
                "There are, or were, layers of another method around the masked ones: the masks cannot be merged or "
                "removed separately. Open the masks' adapter on a fresh copy of its base, without the other adapter."
            )

    def _check_merge_allowed(self) -> None:
        # Layers unmerge in the order in which they merged: the masked ones would put back weights with a LoRA added.
        self._check_alone()
        for name, layer in adaprune_layers(self.model):
            if not {*layer.merged_adapters, *layer.active_adapters} & {*layer.adaprune_mask}:
                continue  # merging does not change its weight
            shared = [
                key
                for key, parameter in self.model.named_parameters(remove_duplicate=False)
                if parameter is layer.base_weight and not key.startswith(f"{name}.")
            ]
            if shared:
                raise MergeError(
                    f"{name!r} shares its weight with {shared}, under another mask or none: merging would prune both. "
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
        push_with_card(model)
        return masks_to_store(model, config, adapter_name, state_dict)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdaPruneConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        restore_loading(model)  # it is for loading by transformers; PEFT has loaded this file itself
        if config.in_memory.masks_loaded and config.inference_mode:
            # In training this is allowed: the Trainer loads its best checkpoint in the same way.
            raise ConfigError(
                f"There is an adapter {adapter_name!r} on the model already. Load this one under another name, or "
                f"call `delete_adapter({adapter_name!r})` first."
            )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return check_loaded(model, config, adapter_name, remapped)


def _unwrap_layers(model: PreTrainedModel) -> None:
    """Restore the original layers of a model whose last adapter was deleted, so that it is saved as a plain model."""
    if not has_foreign_layers(model):
        AdaPruneModel.around(model).unload()


def _count_parameters(model: nn.Module) -> int:
    added = added_parameters(model)
    return sum(p.numel() for p in model.parameters() if id(p) not in added)
