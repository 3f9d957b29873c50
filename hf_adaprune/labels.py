"""The labels of an adapter's head, as stored in its configuration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np


LABEL_FIELDS = ("id2label", "label2id", "problem_type")
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def stored_labels(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the labels in a stored model configuration, in the form that they have in memory.

    Other fields are ignored: an untrusted file must not determine any other size or load code.

    Args:
        model_config (`Mapping[str, Any]`): `AdaPruneConfig.model_config`, if `problems_of_labels` returns nothing.

    Returns:
        `dict[str, Any]`:
            `id2label`, `label2id` and `problem_type`. Without `id2label` there are two labels, transformers' default.
    """
    labels: dict[str, Any] = {field: model_config.get(field) for field in LABEL_FIELDS}
    if labels["id2label"] is None:
        labels |= default_labels(2)
    labels["id2label"] = {int(number): name for number, name in labels["id2label"].items()}
    return labels


def plain_labels(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return label fields of a model's configuration in a form that JSON can store: without numpy's scalars."""

    def plain(value: Any) -> Any:
        return value.item() if isinstance(value, np.generic) else value

    return {
        field: {plain(key): plain(it) for key, it in value.items()} if isinstance(value, Mapping) else value
        for field, value in labels.items()
    }


def default_labels(num_labels: int) -> dict[str, Any]:
    """Return the `id2label` and `label2id` that transformers gives to unnamed labels."""
    names = {number: f"LABEL_{number}" for number in range(num_labels)}
    return {"id2label": names, "label2id": {name: number for number, name in names.items()}}


def is_regression(model_config: Mapping[str, Any]) -> bool:
    """Return whether `problem_type` is regression or, where it is not given, a sequence classifier has one label."""
    labels = stored_labels(model_config)
    if labels["problem_type"] is not None:
        return bool(labels["problem_type"] == "regression")
    architecture: str = (model_config.get("architectures") or [""])[0]
    return architecture.endswith("ForSequenceClassification") and len(labels["id2label"]) == 1


def problems_of_labels(model_config: Mapping[str, Any]) -> list[str]:
    """Return a message for each problem with the labels in a stored model configuration."""
    labels = {field: model_config.get(field) for field in LABEL_FIELDS}
    problems = [
        f"`model_config[{field!r}]` must be of type dict, got {labels[field]!r}."
        for field in ("id2label", "label2id")
        if not isinstance(labels[field], (dict, type(None)))
    ]
    if not problems and labels["id2label"] is not None:
        numbers = [str(number) for number in labels["id2label"]]
        if sorted(numbers) != sorted(str(number) for number in range(len(numbers))) or not numbers:
            problems.append(f"`model_config['id2label']` must number its labels from 0, got {numbers}.")
    if labels["problem_type"] not in (None, *_PROBLEM_TYPES):
        problems.append(
            f"`model_config['problem_type']` must be one of {list(_PROBLEM_TYPES)}, got {labels['problem_type']!r}."
        )
    return problems


def labels_fingerprint(model_config: Mapping[str, Any]) -> str:
    """Return a digest of the labels in a stored model configuration: 32 hexadecimal digits."""
    text = json.dumps(stored_labels(model_config), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
