"""GLUE tasks (Wang et al., ICLR 2019): load their data, and score models on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

from .errors import TaskError
from .metrics import glue_metric
from .tuner.example_inputs import longest_input


GLUE_COLUMNS: dict[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence",),
    "stsb": ("sentence1", "sentence2"),
    "wnli": ("sentence1", "sentence2"),
}
"""The columns of each task that hold its texts."""

FILE_KINDS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""The suffixes that data files may have, and the `datasets` builder for each."""


def load_glue_split(task: str, split: str = "validation", data: str | Path | None = None) -> Dataset:
    """Load a labelled split of a GLUE task: from a file if one is given, else from the Hub or its cache.

    Args:
        task (`str`): One of `GLUE_COLUMNS`.
        split (`str`): Its name on the Hub; MNLI's `"validation"` is its `"validation_matched"`.
        data (`str` or `Path`, *optional*):
            A csv, json (lines) or parquet file with the task's columns and `label`; or a folder with
            `{split}.parquet`, directly or in a folder of the task's name.

    Returns:
        `datasets.Dataset`: The split.

    Raises:
        TaskError: If the task is unknown, the data cannot be read, or they lack a column.
    """
    if task not in GLUE_COLUMNS:
        raise TaskError(f"The task must be one of {sorted(GLUE_COLUMNS)}, got {task!r}.")
    if data is None:
        name = "validation_matched" if (task, split) == ("mnli", "validation") else split
        try:
            dataset = load_dataset("nyu-mll/glue", task, split=name)
        except (OSError, ValueError) as error:
            raise TaskError(
                f"The {name} split of {task} could not be loaded from the Hub; name a file or folder. ({error})"
            ) from None
    else:
        dataset = _read(Path(data), task, split)
    columns = (*GLUE_COLUMNS[task], "label")
    check_columns(dataset, columns, f"the data of {task}")
    kinds = {column: getattr(dataset.features[column], "dtype", "list") for column in columns}
    label = kinds.pop("label")
    if not all("string" in kind for kind in kinds.values()):
        raise TaskError(f"The columns {[*kinds]} of the data of {task} must be texts, got {[*kinds.values()]}.")
    if label in ("list", "dict") or (task == "stsb" and "string" in label):
        wanted = "a number" if task == "stsb" else "a name or a number"
        raise TaskError(f"`label` in the data of {task} must be {wanted} per row, got {label}.")
    return dataset


def check_columns(dataset: Dataset, columns: Sequence[str], what: str) -> None:
    """Check that data have all columns, and a value of each in every row.

    Args:
        dataset (`datasets.Dataset`): The data.
        columns (`Sequence[str]`): The names of the columns.
        what (`str`): What the data are, for the message.

    Raises:
        TaskError: If a column or a value is missing.
    """
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        raise TaskError(
            f"{missing} are missing from {what}, which must have the columns {[*columns]}, got "
            f"{dataset.column_names}: add or rename some."
        )
    for column in columns:
        empty = dataset.data.column(column).null_count
        if empty:
            raise TaskError(f"{empty} of {len(dataset)} rows of {what} have no `{column}`: remove them.")


def _read(path: Path, task: str, split: str) -> Dataset:
    if path.is_dir():
        names = (f"{split}.parquet", f"{split}_matched.parquet")
        found = [it / name for name in names for it in (path, path / task) if (it / name).is_file()]
        if not found:
            raise TaskError(f"There is neither {split}.parquet nor {task}/{split}.parquet in '{path}'.")
        path = found[0]
    return read_data_file(path)


def read_data_file(path: Path, cache_dir: str | None = None) -> Dataset:
    """Read a csv, json (lines) or parquet file.

    Args:
        path (`Path`): The file; its suffix must be one of `FILE_KINDS`.
        cache_dir (`str`, *optional*): The cache of `datasets`, by default its own.

    Returns:
        `datasets.Dataset`: The rows of the file.

    Raises:
        TaskError: If there is no such file, or it has no rows that can be read.
    """
    kind = FILE_KINDS.get(path.suffix)
    if kind is None or not path.is_file():
        raise TaskError(f"A data file must exist and end in one of {sorted(FILE_KINDS)}, got '{path}'.")
    # "None" and "NA" are texts and labels like any others: only an empty cell of a csv file is a missing one.
    missing = {"keep_default_na": False, "na_values": [""]} if kind == "csv" else {}
    try:
        return load_dataset(kind, data_files=str(path), split="train", cache_dir=cache_dir, **missing)
    except (ValueError, DatasetGenerationError, StopIteration) as error:  # the last of an empty file
        raise TaskError(
            f"There are no examples in '{path}' that can be read as {kind}: {error.__cause__ or error}"
        ) from None


def score_on_glue(
    model: Any, tokenizer: Any, task: str, dataset: Dataset, *, batch_size: int = 32, max_length: int = 128
) -> dict[str, float]:
    """Score a sequence classifier on a labelled split of a GLUE task.

    Args:
        model (`torch.nn.Module`): The model, on its device; left in evaluation mode.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        task (`str`): One of `GLUE_COLUMNS`.
        dataset (`datasets.Dataset`): The split, with the task's columns and `label`.
        batch_size (`int`): The number of examples per batch, >= 1.
        max_length (`int`): The number of tokens, >= 1, to which texts are truncated, or the model's maximum if less.

    Returns:
        `dict[str, float]`: The task's scores, those of `glue_metric`.

    Raises:
        TaskError: If the data have no labels, or the model's outputs or label names do not fit the task.
    """
    references = _references(model, task, dataset)
    columns = [dataset[column] for column in GLUE_COLUMNS[task]]
    length = [sum(len(text) for text in texts) for texts in zip(*columns, strict=True)]
    order = np.argsort(length, kind="stable")
    logits = np.empty((len(order), model.config.num_labels), dtype=np.float32)
    longest = min(max_length, longest_input(model))
    if longest <= tokenizer.num_special_tokens_to_add(pair=len(columns) > 1):
        raise TaskError(f"`max_length` must leave room for text beside the special tokens, got {max_length}.")
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = [[column[int(row)] for row in rows] for column in columns]
        tokens = tokenizer(*texts, truncation=True, max_length=longest, padding=True, return_tensors="pt")
        with torch.inference_mode():
            found: Any = getattr(model(**tokens.to(model.device)), "logits", None)
        if getattr(found, "shape", None) != (len(rows), logits.shape[1]):
            raise TaskError(f"{task} needs a model for sequence classification: this one has another kind of head.")
        logits[rows] = found.float().cpu().numpy()
    predictions = logits[:, 0] if task == "stsb" else logits.argmax(1)
    return glue_metric(task, keep_in_memory=True).compute(predictions=predictions, references=references)


def _references(model: Any, task: str, dataset: Dataset) -> list[float]:
    """Return the labels, as numbers in the model's numbering."""
    labels, outputs = list(dataset["label"]), model.config.num_labels
    if not labels or (task != "stsb" and not isinstance(labels[0], str) and min(labels) < 0):
        raise TaskError(f"The data of {task} have no labels to score against: name a labelled split.")
    if (outputs == 1) != (task == "stsb"):
        raise TaskError(
            f"{task} needs a head of {'one output' if task == 'stsb' else 'several outputs'}, got {outputs}."
        )
    if model.config.problem_type == "multi_label_classification":
        raise TaskError(f"{task} has one label per example, and the model any number: its outputs cannot be scored.")
    if task == "stsb":
        return labels
    kind, names = dataset.features["label"], list(model.config.id2label.values())
    if isinstance(kind, ClassLabel):
        labels, there = kind.int2str(labels), kind.names
    else:
        there = sorted(set(labels))
    if not isinstance(labels[0], str):
        numbers: dict[Any, int] = {number: number for number in range(outputs)}
    elif names == [f"LABEL_{number}" for number in range(len(there))]:
        # The model has default label names only, so labels are numbered in the order of the data's names.
        numbers = {name: number for number, name in enumerate(there)}
    else:
        numbers = {name: number for number, name in model.config.id2label.items()}
    if not set(there) <= numbers.keys():
        raise TaskError(f"The labels of {task} are {there}, those of the model {names}.")
    num_classes = 3 if task == "mnli" else 2
    if not isinstance(labels[0], str) and outputs != num_classes:
        raise TaskError(f"{task} has {num_classes} labels, the model {outputs}: its numbers may mean something else.")
    return [numbers[label] for label in labels]
