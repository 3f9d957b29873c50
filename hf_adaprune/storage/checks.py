"""Whether an adapter and a base belong together, and whether what was loaded is what was saved."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from ..config import AdaPruneConfig
from ..errors import AdapterFileError, BaseMismatchError, ConfigError
from ..training.sharding import is_sharded
from ..tuner.head import PEFT_HEADS, body_name, head_modules
from ..tuner.masked_layers import adaprune_layers
from .fingerprint import fingerprint, fingerprints_are_checked, matches


def check_base(model: nn.Module, adapter_name: str, config: AdaPruneConfig) -> None:
    """Hold a base against the one that an adapter was made for; for a fresh adapter, write down which that is.

    Args:
        model (`torch.nn.Module`): The model that the adapter is about to be put on; not changed.
        adapter_name (`str`): The adapter's name.
        config (`AdaPruneConfig`): Its configuration; `base_fingerprint` is changed in place.

    Raises:
        AdapterFileError: If the configuration was stored and has lost its fingerprints.
        BaseMismatchError: If the weights are others.
    """
    unchecked = config.is_stored and not (config.base_fingerprint and config.adapter_fingerprint)
    if unchecked and fingerprints_are_checked():
        raise AdapterFileError(
            f"The configuration of adapter {adapter_name!r} was saved with fingerprints of its base and of its masks, "
            "and has them no more. Fetch it again; or, to open it unchecked, do so inside "
            "`hf_adaprune.skip_fingerprint_check()`."
        )
    weights = _body_weights(model, config)
    if any(weight.is_meta for weight in weights):
        return
    if config.base_fingerprint is None:
        config.base_fingerprint = fingerprint(weights)
        return
    fits = matches(weights, config.base_fingerprint)
    if fits is None:
        warnings.warn(
            f"The masks of adapter {adapter_name!r} were made on a base in bfloat16 and this one is in float16, or "
            "the other way round: two roundings cannot be held against each other. Make sure that it is "
            f"{config.base_model_name_or_path!r}.",
            stacklevel=2,
        )
    if fits is False and fingerprints_are_checked():
        raise BaseMismatchError(
            f"The masks of adapter {adapter_name!r} were made for other weights: for some with the fingerprint "
            f"{config.base_fingerprint}; the model's have {fingerprint(weights)}. Load the adapter's own base, in any "
            f"precision: by its configuration {config.base_model_name_or_path!r}, or, where that was resized, merged "
            "or made smaller before there were masks, what was saved of it then. (If transformers tells of weights "
            "that are MISSING in that base, these are random each time it is loaded: save the model before masks are "
            "put on it, and use that as the base.) Or, to open the adapter here all the same, do so inside "
            "`hf_adaprune.skip_fingerprint_check()`."
        )


def check_vocabulary(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if a model has other tokens than when masks were put on it: they would be stored nowhere.

    Raises:
        ConfigError: If it has.
    """
    sizes = {vocabulary_size(module) for module in model.modules()} - {None}
    if sizes and config.vocab_size is not None and config.vocab_size not in sizes:
        raise ConfigError(
            f"The model has {sizes.pop()} tokens, and had {config.vocab_size} when masks were put on it: an adapter "
            "holds no embeddings, and could be opened on no base. Call `resize_token_embeddings` before that, save "
            "the model, and use what was saved as the base."
        )


def check_statistics(model: nn.Module) -> None:
    """Raise if training changes a part of the base that no optimizer moves: means and variances of what it has seen.

    Raises:
        ConfigError: If it does.
    """
    kept_apart = {"modules_to_save", "original_module"}
    changing = [
        name
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats and not kept_apart & {*name.split(".")}
    ]
    if changing:
        raise ConfigError(
            f"The base would change while it is trained on: {changing} take means of every batch, frozen or not. "
            "Name them in `modules_to_save`, and they are stored with the adapter."
        )


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many tokens a transformers model knows, `None` of others."""
    return getattr(model.config, "vocab_size", None) if isinstance(model, PreTrainedModel) else None


class CheckOnce:
    """At the first forward pass after loading, hold what was loaded against what was saved.

    Not every door tells when it has finished loading; but none can lead to a forward pass unseen.
    """

    def __init__(self, adapter_name: str, config: AdaPruneConfig) -> None:
        self.adapter_name = adapter_name
        self.config = config
        self.handle: Any = None

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        # A replica of `DataParallel` has no parameters to look at, and a model that is sharded has none whole.
        if getattr(model, "_is_replica", False) or is_sharded(model.parameters()):
            return
        expected = self.config.adapter_fingerprint
        # The adapter may be gone, another may have its name, and a state of training may have been loaded into it.
        if expected is None or getattr(model, "peft_config", {}).get(self.adapter_name) is not self.config:
            self.handle.remove()
            return
        state = model.state_dict()
        head = [state[key] for key in head_keys(model, self.adapter_name)]
        masks = [layer.packed_mask(self.adapter_name) for _, layer in adaprune_layers(model, self.adapter_name)]
        if matches([*masks, *head], expected) is False:
            raise AdapterFileError(
                f"The masks or the head of adapter {self.adapter_name!r} are not those that were saved: its files are "
                "damaged, incomplete or edited by hand, or a head of the wrong size was skipped. Fetch it again."
            )
        # Only now: what is damaged is so at the second forward pass too.
        self.handle.remove()


def base_fits(model: nn.Module, config: AdaPruneConfig) -> bool | None:
    """Return whether a model holds the weights that an adapter was made for; `None` if it cannot be told."""
    return matches(_body_weights(model, config), config.base_fingerprint or "")


def run_checks(model: nn.Module) -> None:
    """Check now the adapters of a model, or of one inside of it, that have not been checked yet.

    Raises:
        AdapterFileError: If what was loaded is not what was saved.
    """
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, CheckOnce):
                hook(module, ())


def head_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the keys of an adapter's head in the model's state dict."""
    return [
        f"{name}.modules_to_save.{adapter_name}.{key}"
        for name, wrapper in model.named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save
        for key in wrapper.modules_to_save[adapter_name].state_dict()
    ]


def _body_weights(model: nn.Module, config: AdaPruneConfig) -> list[torch.Tensor]:
    """Return what every door takes from the base's checkpoint: all but what this adapter holds, or others added."""
    own = tuple(set(config.modules_to_save or ()) - PEFT_HEADS)  # names or their endings, as PEFT takes them
    saved = [name for name, _ in model.named_modules() if own and name.endswith(own)]
    head = tuple(f"{name}." for name in (*head_modules(model), *saved))
    if not body_name(model):
        # The pooler of a model without a head, which many checkpoints lack.
        head += ("pooler.",)
    added: set[int] = set()
    for module in model.modules():
        original = {BaseTunerLayer: "base_layer.", AuxiliaryTrainingWrapper: "original_module."}
        for cls, prefix in original.items():
            if isinstance(module, cls):
                added.update(id(p) for name, p in module.named_parameters() if not name.startswith(prefix))
    return [p for name, p in model.named_parameters() if not name.startswith(head) and id(p) not in added]
