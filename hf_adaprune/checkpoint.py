"""A plain checkpoint, with zeros in place of masks."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

from .errors import AdapterNotFoundError, MergeError
from .stored import StoredAdapter


def save_merged(adapter: StoredAdapter, folder: str | Path, base: str | None = None) -> None:
    """Write a checkpoint that plain transformers opens, and the tokenizer if there is one: whole, or not at all.

    Args:
        adapter (`StoredAdapter`): What to merge.
        folder (`str` or `Path`): Where to; a new or an empty folder.
        base (`str`, *optional*): A copy of the adapter's base, if not at the place that it names.

    Raises:
        FileExistsError: If the folder holds something.
        MergeError: If a plain checkpoint would not compute what the adapter does.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' must be a new or an empty folder: name another.")
    if adapter.config.head == "layer_average":
        raise MergeError(
            f'{adapter.name!r} has the head "layer_average", which no plain transformers model has: it can be merged '
            "in memory only, by `merge_and_unload()`."
        )
    model = adapter.open(base).merge_and_unload(safe_merge=True)
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed run has left
    aside.mkdir(parents=True)
    try:
        model.save_pretrained(aside)
        with suppress(AdapterNotFoundError):  # A checkpoint is whole without a tokenizer.
            adapter.tokenizer(base).save_pretrained(aside)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
