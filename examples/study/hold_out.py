"""Hold out part of a task's training data to choose settings on; the dev set is only for reporting."""

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset


SHARE = 0.15
MOST = 3_000


@contextmanager
def held_out(data_dir: str, tasks: Collection[str]) -> Iterator[str]:
    """Yield a temporary folder like `data_dir`, in which `validation` is a part of the training data.

    Args:
        data_dir (`str`): A folder with `{task}/train.parquet`.
        tasks (`Collection[str]`): The tasks.
    """
    with TemporaryDirectory() as folder:
        for task in tasks:
            rows = Dataset.from_parquet(str(Path(data_dir, task, "train.parquet")), cache_dir=f"{folder}/cache")
            train, held = split(rows)
            rows.select(train).to_parquet(Path(folder, task, "train.parquet"))
            rows.select(held).to_parquet(Path(folder, task, "validation.parquet"))
        yield folder


def split(rows: Dataset, seed: int = 0) -> tuple[list[int], list[int]]:
    """Return the rows to train on, and the rows to hold out: a sample of 15 %, at most 3,000.

    Some rows of SST-2 are phrases of others. If a row is a single sentence, rows that are part of another one are
    therefore never held out, and rows that are part of a held-out one are in neither set.
    """
    words = [tuple(text.split()) for text in rows["sentence"]] if "sentence" in rows.column_names else []
    phrases = {part for sentence in words for part in _parts(sentence) if part != sentence}
    whole = [row for row in range(len(rows)) if not words or words[row] not in phrases]
    held = sorted(random.Random(seed).sample(whole, min(MOST, round(SHARE * len(rows)), len(whole))))
    seen = {part for row in held for part in _parts(words[row])} if words else set()
    taken = set(held)
    train = [row for row in range(len(rows)) if row not in taken and not (words and words[row] in seen)]
    return train, held


def _parts(words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield every contiguous part of a sentence, including the sentence itself."""
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            yield words[start:end]
