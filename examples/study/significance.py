"""Significance tests: which differences between methods exceed the variation between seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from results import Cells
from scipy import stats


LEVEL = 0.01  # as in the paper
SAME = "ablations"  # repeats of AdaPrune's own runs


@dataclass(frozen=True)
class Comparison:
    """Two methods on one task, at one sparsity.

    Args:
        task (`str`): The task.
        sparsity (`float`): Of the first method; the second method has the same, or 0 if it does not prune.
        other (`str`): The second method.
        difference (`float`): The first one's mean score minus the second's.
        p (`float`, *optional*):
            Of the two-tailed Welch t-test over seeds, which does not assume equal variances. `None` if a method has
            only one seed, or if no score varies.
    """

    task: str
    sparsity: float
    other: str
    difference: float
    p: float | None

    @property
    def cell(self) -> str:
        """The table cell: the difference, a star if it is significant, and p if there is one."""
        if self.p is None:
            return f"{self.difference:+.3f}"
        star = "*" if self.p < LEVEL else ""
        return f"{self.difference:+.3f}{star} ({f'p = {self.p:.3f}' if self.p >= 0.001 else 'p < .001'})"


def p_value(first: list[float], second: list[float]) -> float | None:
    """Return p of a two-tailed Welch t-test for equal means, or `None` if the test is undefined."""
    if min(len(first), len(second)) < 2 or statistics.stdev(first) == statistics.stdev(second) == 0:
        return None
    # Computed from the moments, because scipy warns if all values are equal.
    moments = [(statistics.fmean(values), statistics.stdev(values), len(values)) for values in (first, second)]
    return float(stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False).pvalue)


def compare(cells: Cells, method: str = "adaprune") -> list[Comparison]:
    """Compare a method with every other one, wherever both have been run."""
    found = []
    for (name, sparsity), by_task in sorted(cells.items()):
        if name != method:
            continue
        for (other, level), theirs in cells.items():
            if other in (method, SAME) or (level and _pruned(theirs) != _pruned(by_task)):
                continue
            for task in by_task:
                if by_task[task] and theirs.get(task):
                    ours, others = ([row["score"] for row in rows] for rows in (by_task[task], theirs[task]))
                    difference = statistics.fmean(ours) - statistics.fmean(others)
                    found.append(Comparison(task, sparsity, other, difference, p_value(ours, others)))
    return found


def _pruned(by_task: Mapping[str, list[dict[str, Any]]]) -> float:
    """Return the share of the masked weights that a cell's runs pruned, which may differ from the target."""
    return round(next(iter(by_task.values()))[0]["sparsity"], 2)


def significance_table(comparisons: list[Comparison], names: Mapping[str, str], tasks: list[str]) -> str:
    """Return a table of differences, one row for each sparsity and other method, in the order of `names`."""
    cells = {(one.sparsity, one.other, one.task): one.cell for one in comparisons}
    order = list(names)
    rows = sorted({(one.sparsity, one.other) for one in comparisons}, key=lambda row: (row[0], order.index(row[1])))
    lines = ["| sparsity | compared with | " + " | ".join(tasks) + " |", "| --- | --- |" + " --- |" * len(tasks)]
    for sparsity, other in rows:
        columns = [cells.get((sparsity, other, task), "") for task in tasks]
        lines.append(f"| {sparsity:g} | {names[other]} | {' | '.join(columns)} |")
    return "\n".join(lines)
