"""Validation of a configuration, which may come from an untrusted file, before it is used."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from .choices import AUTO, FORMAT_VERSION, GRANULARITIES, MAX_PATTERN
from .files.fingerprint import fingerprints_are_checked
from .labels import labels_fingerprint, problems_of_labels
from .masks import packed_size


if TYPE_CHECKING:
    from .config import AdaPruneConfig

# No matrix has more weights; larger numbers in a file could only exhaust the time or memory of its reader.
_MAX_WEIGHTS = 2**48
_MAX_DEPTH = 20


def mistyped(config: AdaPruneConfig) -> list[str]:
    """Return a message for each field whose value is not of the annotated type, or too deeply nested."""
    annotations = {spec.name: str(spec.type) for spec in fields(config)} | _INHERITED
    problems = []
    for name, annotation in annotations.items():
        kinds = [kind for kind in annotation.split(" | ") if kind in _KINDS]
        value = getattr(config, name, None)
        if _is_deep(value):
            problems.append(f"`{name}` must not be nested more than {_MAX_DEPTH} levels deep.")
        elif kinds and not any(_KINDS[kind](value) for kind in kinds):
            wanted = " or ".join(_SPOKEN.get(kind, kind) for kind in kinds if kind != "None")
            problems.append(f"`{name}` must be of type {wanted}, got {reprlib.repr(value)}.")
    return problems


def problems_of_storage(config: AdaPruneConfig) -> list[str]:
    """Return a message for each problem with the fields that are written when an adapter is created or saved."""
    problems = [
        f"`{field}` must map names to [number pruned, total number], got {name!r}: {counts!r}. "
        "Fetch the adapter again."
        for field in ("module_counts", "group_counts")
        for name, counts in (getattr(config, field) or {}).items()
        if not _are_counts(counts)
    ]
    packed = {name: packed_size(length) for name, length in config.mask_entries.items()} if not problems else {}
    problems += [
        f"`mask_bytes` must map masks to sizes below one bit per weight and > 0, got {name!r}: {size}. "
        "Fetch the adapter again."
        for name, size in (config.mask_bytes or {}).items()
        if not 0 < size < packed.get(name, 0)
    ]
    if config.is_stored and bool(config.group_kinds) != bool(config.group_counts):
        problems.append(
            f"`granularity={config.granularity!r}` does not fit `group_counts`: adapters with masks of neurons or "
            "heads have this field, and others do not. Fetch the adapter again."
        )
    if config.is_stored and config.has_patterns:
        problems.append(
            "A stored adapter must list its `target_modules` by name: regular expressions are not read. Save it again."
        )
    if config.model_config is not None:
        architectures = config.model_config.get("architectures", ["PreTrainedModel"])
        if architectures is not None and not (architectures and _is_list_of(str, architectures)):
            problems.append(f"`model_config['architectures']` must be a list of names, got {architectures!r}.")
        problems += problems_of_labels(config.model_config)
    if problems or config.labels_fingerprint is None or not fingerprints_are_checked():
        return problems
    if config.model_config is None or config.labels_fingerprint != labels_fingerprint(config.model_config):
        return ["The labels in `model_config` are not those that were saved: fetch the adapter again."]
    return []


def problems_of_values(config: AdaPruneConfig) -> list[str]:
    """Return a message for each field whose value is out of range or conflicts with another; see `mistyped`."""
    problems: list[str] = []
    if not 0 <= config.final_sparsity < 1:
        problems.append(f"`final_sparsity` must be in [0, 1), got {config.final_sparsity}.")
    if not 0 <= config.pruning_start < config.pruning_end <= 1:
        problems.append(
            "`pruning_start` and `pruning_end` are fractions of training and must satisfy "
            f"0 <= pruning_start < pruning_end <= 1, got {config.pruning_start} and {config.pruning_end}."
        )
    for name in ("score_lr_ratio", "head_lr_ratio", "backward_temperature", "forward_temperature"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            problems.append(f"`{name}` must be positive and finite, got {value}.")
    is_rate = isinstance(config.dropout, (float, int)) and 0 <= config.dropout < 1
    if not (is_rate or config.dropout in (None, AUTO)):
        problems.append(f"`dropout` must be in [0, 1), {AUTO!r}, or None for the model's own; got {config.dropout!r}.")
    if not 0 <= config.drift < float("inf"):
        problems.append(f"`drift` must be finite and >= 0, got {config.drift}.")
    if config.forward_temperature is not None and (config.estimator, config.selection) != ("sigmoid", "threshold"):
        problems.append(
            "`forward_temperature` needs `estimator='sigmoid'` and `selection='threshold'`, where weights are kept if "
            f"their score is above 0; got {config.estimator!r} and {config.selection!r}."
        )
    if config.drift and config.selection != "threshold":
        problems.append(
            f"`drift` needs `selection='threshold'`, got {config.selection!r}: it does not change the order of scores."
        )
    for name in ("target_modules", "exclude_modules"):
        problems += _problems_of_pattern(name, getattr(config, name))
    hints = get_type_hints(type(config))
    choices = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    choices["whole_groups"] = (None, *GRANULARITIES[1:])
    for name, allowed in choices.items():
        if getattr(config, name) not in allowed:
            problems.append(f"`{name}` must be one of {list(allowed)}, got {getattr(config, name)!r}.")
    problems += _problems_of_granularity(config)
    if config.format_version > FORMAT_VERSION:
        problems.append(
            f"The adapter has format version {config.format_version}, this hf_adaprune reads up to "
            f"{FORMAT_VERSION}: upgrade hf_adaprune to open it."
        )
    if config.layers_to_transform is not None and not isinstance(config.target_modules, (set, list, tuple)):
        problems.append("`layers_to_transform` needs `target_modules` as a list of names.")
    if config.layers_pattern and config.layers_to_transform is None:
        problems.append("`layers_pattern` needs `layers_to_transform`.")
    return problems


def _problems_of_pattern(name: str, value: Any) -> list[str]:
    try:
        re.compile(value if isinstance(value, str) else "")
    except re.error as error:
        return [f"`{name}` must be a list of names or a regular expression, got {value!r}: {error}."]
    return []


def _problems_of_granularity(config: AdaPruneConfig) -> list[str]:
    problems, pattern = [], config.n_of_m
    if config.granularity not in GRANULARITIES and not (pattern and 0 < pattern[0] < pattern[1] <= MAX_PATTERN):
        return [
            f"`granularity` must be one of {list(GRANULARITIES)}, or 'n:m' with 0 < n < m <= {MAX_PATTERN}, as in "
            f"'2:4'; got {config.granularity!r}."
        ]
    if pattern and abs(config.final_sparsity - (1 - pattern[0] / pattern[1])) > 1e-9:
        problems.append(
            f"`granularity={config.granularity!r}` prunes {1 - pattern[0] / pattern[1]:g} of the weights: "
            f"`final_sparsity` must equal that, got {config.final_sparsity}."
        )
    if pattern and config.selection != "topk":
        problems.append(f"`granularity={config.granularity!r}` needs `selection='topk'`, got {config.selection!r}.")
    if config.granularity != "weight" and config.mask_embeddings:
        problems.append(f"`granularity={config.granularity!r}` masks no embeddings: leave `mask_embeddings` False.")
    return problems


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        containers = [it.values() if isinstance(it, dict) else it for it in level if isinstance(it, (dict, list))]
        level = [inner for container in containers for inner in container]
    return bool(level)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(it, kind) and not isinstance(it, bool) for it in value)


def _are_counts(value: Any) -> bool:
    return _is_list_of(int, value) and len(value) == 2 and 0 <= value[0] <= value[1] and 0 < value[1] < _MAX_WEIGHTS


_KINDS: dict[str, Callable[[Any], bool]] = {
    "None": lambda value: value is None,
    "bool": lambda value: isinstance(value, bool),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, (int, float)) and not isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "set[str]": lambda value: isinstance(value, set) and _is_list_of(str, [*value]),
    "list[str]": lambda value: _is_list_of(str, value),
    "list[int]": lambda value: _is_list_of(int, value),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "dict[str, list[int]]": lambda value: isinstance(value, dict),
    "dict[str, int]": lambda value: isinstance(value, dict) and _is_list_of(int, [*value.values()]),
}
_SPOKEN = {"float": "number"} | dict.fromkeys(["dict[str, Any]", "dict[str, list[int]]", "dict[str, int]"], "dict")

# PEFT's own fields that are read from a stored adapter.
_INHERITED = {
    "base_model_name_or_path": "str | None",
    "revision": "str | None",
    "inference_mode": "bool",
    "auto_mapping": "dict[str, Any] | None",
    "peft_version": "str | None",
}
