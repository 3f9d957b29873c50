"""Plain models, written from a stored adapter: with zeros in place of masks, made smaller, or as ONNX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..errors import AdapterNotFoundError
from ..hub.model_card import CARD
from ..storage.stored_adapter import StoredAdapter
from ..structured.compaction import compact
from ..tuner.merging import merged
from .export import export_onnx


def save_merged(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Write a checkpoint that plain transformers opens, and the tokenizer if there is one: whole, or not at all.

    Args:
        adapter (`StoredAdapter`): What to merge.
        folder (`str` or `Path`): Where to; a new or an empty folder.
        base (`str`, *optional*): A copy of the adapter's base, if not at the place that it names.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        FileExistsError: If the folder holds something.
        MergeError: If a plain checkpoint would not compute what the adapter does.
    """
    with _whole(adapter, folder, base) as aside:
        model = adapter.open(base).merge_and_unload(safe_merge=True)
        model.save_pretrained(aside)
    return model


def save_compacted(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Write the checkpoint that `compact` makes, with the scores on the adapter's card; see `save_merged`.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        FileExistsError: If the folder holds something.
        CompactionError: If the adapter prunes no neuron and no head as a whole.
    """
    with _whole(adapter, folder, base) as aside:
        model = compact(adapter.open(base))
        model.save_pretrained(aside)
        if results := adapter.results():
            card = ModelCard.load(aside / CARD)
            card.data.eval_results = results
            card.save(aside / CARD)
    return model


def save_onnx(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Write the model as ONNX: without the neurons and heads that are pruned, or merged; see `save_merged`.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        FileExistsError: If the folder holds something.
        ExportError: If it cannot be exported.
    """
    with _whole(adapter, folder, base) as aside:
        opened = adapter.open(base)
        model = compact(opened) if adapter.config.is_structured else merged(opened)
        export_onnx(model, aside)
    return model


@contextmanager
def _whole(adapter: StoredAdapter, folder: str | Path, base: str | None) -> Iterator[Path]:
    """Give a folder to write to, of the same name, that takes its place at the end, with the tokenizer."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' must be a new or an empty folder: name another.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as temporary:
        aside = Path(temporary, folder.name)
        yield aside
        with suppress(AdapterNotFoundError):  # A checkpoint is whole without a tokenizer.
            adapter.tokenizer(base).save_pretrained(aside)
        os.replace(aside, folder)
