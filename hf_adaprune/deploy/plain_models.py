"""Write plain models from a stored adapter: merged with zeros, compacted, or as ONNX."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from ..errors import AdapterNotFoundError, MergeError
from ..hub.model_card import CARD
from ..merging import merged
from ..storage.stored_adapter import StoredAdapter
from ..structured.compaction import compact
from .export import export_onnx


def save_merged(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Write a merged checkpoint that plain transformers opens, with the tokenizer if there is one.

    The files are put in place only once they are complete.

    Args:
        adapter (`StoredAdapter`): The adapter to merge.
        folder (`str` or `Path`): A new or empty folder to write to.
        base (`str`, *optional*): A copy of the adapter's base, if not the one that the adapter names.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        FileExistsError: If the folder is not new or empty.
        MergeError: If a plain checkpoint would not compute what the adapter does.
    """
    with _replacing(adapter, folder, base) as aside:
        model = adapter.open(base).merge_and_unload(safe_merge=True)
        model.save_pretrained(aside)
    return model


def save_compacted(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Write a checkpoint of the compacted model, with the scores from the adapter's card; see `save_merged`.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        FileExistsError: If the folder is not new or empty.
        CompactionError: If the model cannot be compacted; see `compact`.
    """
    with _replacing(adapter, folder, base) as aside:
        model = compact(adapter.open(base))
        model.save_pretrained(aside)
        if results := adapter.results():
            card = ModelCard.load(aside / CARD)
            card.data.eval_results = results
            card.save(aside / CARD)
    return model


def save_onnx(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> PreTrainedModel:
    """Write the model as ONNX, compacted if neurons or heads are masked, else merged; see `save_merged`.

    Returns:
        `transformers.PreTrainedModel`: The model.

    Raises:
        FileExistsError: If the folder is not new or empty.
        CompactionError: If neurons or heads are masked and the model cannot be compacted.
        ExportError: If the model cannot be exported.
    """
    with _replacing(adapter, folder, base) as aside:
        opened = adapter.open(base)
        model = compact(opened) if adapter.config.is_structured else merged(opened)
        export_onnx(model, aside)
    return model


@contextmanager
def _replacing(adapter: StoredAdapter, folder: str | Path, base: str | None) -> Iterator[Path]:
    """Yield a temporary folder of the same name whose files are those of `folder` at the end, with the tokenizer."""
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' must be a new or empty folder: choose another.")
    if adapter.is_sentence_transformer:
        raise MergeError(
            f"{adapter.name!r} is a SentenceTransformer, of which only the transformer would be written: open it as "
            "`SentenceTransformer`, and save `hf_adaprune.merged(model)`, which keeps the other modules."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    is_new = not folder.exists()
    with TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent if is_new else folder) as temporary:
        aside = Path(temporary, folder.name)
        yield aside
        with suppress(AdapterNotFoundError):  # The tokenizer is optional.
            adapter.tokenizer(base).save_pretrained(aside)
        if is_new:
            os.replace(aside, folder)
        else:
            # It may be the current folder, a link or a mount point. Without its weights, a checkpoint does not open.
            for path in sorted(aside.iterdir(), key=lambda path: path.suffix == ".safetensors"):
                os.replace(path, folder / path.name)
