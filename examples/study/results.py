"""The results file: one JSON line for each finished run."""

import json
import os
import statistics
from pathlib import Path
from typing import Any


# The rows of each method and sparsity, by task.
Cells = dict[tuple[str, float], dict[str, list[dict[str, Any]]]]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a results file, none if there is no file; skip a line that a killed run left incomplete."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def describe(values: list[float]) -> str:
    """Return mean, standard deviation and number of seeds; an empty string for no values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation} ({len(values)})"


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row on a new line, even if the last line of the file is incomplete."""
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
        cut_short = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * cut_short + json.dumps(row).encode() + b"\n")
