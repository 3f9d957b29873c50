"""Check that an adapter fits its base, and that a loaded adapter is the one that was saved."""

from __future__ import annotations

import re
import reprlib
import warnings
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import AdaPruneConfig
from ..errors import AdapterFileError, BaseMismatchError, ConfigError, NotPrunedError
from ..files.fingerprint import fingerprint, fingerprints_are_checked, matches
from ..masks import packed_size
from ..tuner.head import PEFT_HEADS, body_name, head_modules, head_wrappers
from ..tuner.hooks import PreHook, pre_hooks
from ..tuner.masked_layers import adaprune_layers, added_parameters, has_foreign_layers, module_counts
from ..tuner.sharding import is_sharded


# Fields of a model's configuration that do not change what it computes in evaluation, like those on dropout; the
# vocabulary is compared with the weights.
_WITHOUT_EFFECT = {*PreTrainedConfig().to_dict(), "use_cache", "vocab_size"}


def check_base(model: nn.Module, adapter_name: str, config: AdaPruneConfig) -> None:
    """Compare a base with the one that an adapter was made for; for a new adapter, record the base's fingerprint.

    Args:
        model (`torch.nn.Module`): The model that the adapter will be added to; not changed.
        adapter_name (`str`): The adapter's name.
        config (`AdaPruneConfig`): Its configuration; `base_fingerprint` is changed in place.

    Raises:
        AdapterFileError: If a stored configuration lacks one of its fingerprints.
        BaseMismatchError: If the base has other weights than those that the adapter was made for.
    """
    complete = config.base_fingerprint and config.adapter_fingerprint and config.has_checked_labels
    if config.is_stored and not complete and fingerprints_are_checked():
        raise AdapterFileError(
            f"The configuration of adapter {adapter_name!r} must have the fingerprints of its base, its masks and its "
            "labels that it was saved with, and lacks one. Fetch the adapter again, or open it unchecked inside "
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
            "the other way round: the two roundings cannot be compared. Make sure that the base is "
            f"{config.base_model_name_or_path!r}.",
            stacklevel=2,
        )
    if fits is False and fingerprints_are_checked():
        raise BaseMismatchError(
            f"The masks of adapter {adapter_name!r} were made for other weights: their fingerprint is "
            f"{config.base_fingerprint}, that of the model's weights is {fingerprint(weights)}. Load the adapter's "
            f"own base, in any precision: {config.base_model_name_or_path!r}"
            f"{f', revision {config.revision!r},' if config.revision else ''} according to its configuration or, if "
            "that was resized, merged or compacted before masks were added, the model that was saved after that. "
            "(Weights that transformers reports as MISSING in the base are random at each load: save the model "
            "before adding masks, and use the saved model as the base.) To open the adapter on this model anyway, "
            "use `hf_adaprune.skip_fingerprint_check()`."
        )


def options_problem(model: nn.Module, config: AdaPruneConfig) -> str:
    """Return which options a model must be loaded with to compute what the adapter was trained on; `""` if it was."""
    trained: dict[str, Any] = config.model_config or {}
    if not isinstance(model, PreTrainedModel) or trained.get("model_type") != model.config.model_type:
        return ""
    current, plain = model.config.to_dict(), (bool, int, float, str, type(None))
    options = [
        f"{field}={reprlib.repr(value)}"
        for field, value in trained.items()
        if field in current.keys() - _WITHOUT_EFFECT
        and not re.search("drop|initializer", field)
        and isinstance(value, plain)
        and isinstance(current[field], plain)
        and value != current[field]
    ]
    if not options:
        return ""
    return (
        f"The adapter was trained on a base loaded with {', '.join(options)}: on this one it computes something else. "
        "Pass these options to `from_pretrained`, or save a base that has them and open the adapter on that."
    )


def check_coded_sizes(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if a stored configuration declares a larger mask than the model's own layers justify: it is allocated.

    Raises:
        AdapterFileError: If a coded mask does not take less than one bit per weight of its layer.
    """
    modules = dict(model.named_modules())
    for name, size in (config.mask_bytes or {}).items():
        weight = getattr(getattr(modules.get(name), "base_layer", modules.get(name)), "weight", None)
        if weight is not None and size >= packed_size(weight.numel()):
            raise AdapterFileError(
                f"The mask of {name!r} must take less than one bit for each of its {weight.numel()} weights, the "
                f"stored configuration declares {size} bytes. Fetch the adapter again."
            )


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the vocabulary size of a transformers model; `None` for other models."""
    return getattr(model.config, "vocab_size", None) if isinstance(model, PreTrainedModel) else None


class CheckOnce(PreHook):
    """Verify the fingerprint of a loaded adapter at its first forward pass.

    Not every loading path signals when it is done, but each is followed by a forward pass.
    """

    def __init__(self, adapter_name: str, config: AdaPruneConfig) -> None:
        self.adapter_name = adapter_name
        self.config = config

    def __call__(self, model: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
            return
        # A `DataParallel` replica has no parameters, and a sharded model has no whole ones.
        if getattr(model, "_is_replica", False) or is_sharded(model.parameters()):
            return
        expected = self.config.adapter_fingerprint
        # The adapter may have been deleted or replaced; a training state, once loaded, clears its fingerprint.
        if expected is None or getattr(model, "peft_config", {}).get(self.adapter_name) is not self.config:
            self.handle.remove()
            return
        state = model.state_dict()
        head = [state[key] for key in head_keys(model, self.adapter_name)]
        masks = [layer.packed_mask(self.adapter_name) for _, layer in adaprune_layers(model, self.adapter_name)]
        if any(tensor.is_meta for tensor in (*masks, *head)):
            return  # offloaded: the masked layers will say so
        if matches([*masks, *head], expected) is False:
            if not any(pruned for pruned, _ in module_counts(model, self.adapter_name).values()):
                raise NotPrunedError(
                    f"Adapter {self.adapter_name!r} has the configuration of a stored adapter, but not its masks: "
                    "open it by `PeftModel.from_pretrained`, or use `config.fresh()` for a new one like it."
                )
            raise AdapterFileError(
                f"The masks or the head of adapter {self.adapter_name!r} are not those that were saved: its files are "
                "damaged, incomplete or edited by hand, or the head was changed after it was opened. Fetch it again "
                "or, to change the head, open it inside `hf_adaprune.skip_fingerprint_check()`."
            )
        # Only on success: a damaged adapter must fail at every forward pass.
        self.handle.remove()


def base_fits(model: nn.Module, config: AdaPruneConfig) -> bool | None:
    """Return whether a model has the weights that an adapter was made for; `None` if undecidable, as in `matches`."""
    return matches(_body_weights(model, config), config.base_fingerprint or "")


def run_checks(model: nn.Module) -> None:
    """Run all pending fingerprint checks of a model and its submodules.

    Raises:
        AdapterFileError: If a loaded adapter is not the one that was saved.
        NotPrunedError: If an adapter has the configuration of a stored one, but not its masks.
    """
    for module in model.modules():
        for check in pre_hooks(module, CheckOnce):
            check(module, ())


def head_keys(model: nn.Module, adapter_name: str) -> list[str]:
    """Return the keys of an adapter's head in the model's state dict.

    Raises:
        ConfigError: If an adapter of another method has layers in that head: PEFT cannot save one within the other.
    """
    wrappers = {name: it for name, it in head_wrappers(model).items() if adapter_name in it.modules_to_save}
    heads = {name: wrapper.modules_to_save[adapter_name] for name, wrapper in wrappers.items()}
    adapted = [name for name, head in heads.items() if has_foreign_layers(head)]
    if adapted:
        raise ConfigError(
            f"{adapted} belong to the head of adapter {adapter_name!r}, and cannot be saved with the layers that "
            f"another adapter has added to them. Add that one with `exclude_modules=r'.*({'|'.join(adapted)}).*'`."
        )
    keys = {name: head.state_dict() for name, head in heads.items()}
    return [f"{name}.modules_to_save.{adapter_name}.{key}" for name in keys for key in keys[name]]


def _body_weights(model: nn.Module, config: AdaPruneConfig) -> list[torch.Tensor]:
    """Return the parameters that come from the base checkpoint.

    These are all except the task head, this adapter's `modules_to_save`, and what adapters added.
    """
    own = tuple(set(config.modules_to_save or ()) - PEFT_HEADS)  # names or name endings, as in PEFT
    saved = [name for name, _ in model.named_modules() if name.endswith(own)]
    head = tuple(f"{name}." for name in (*head_modules(model), *saved))
    if not body_name(model):
        # In a model without a head, many checkpoints lack the pooler.
        head += ("pooler.",)
    added = added_parameters(model)
    return [p for name, p in model.named_parameters() if not name.startswith(head) and id(p) not in added]
