"""Which differences between methods are more than the luck of seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from results import Cells
from scipy import stats


LEVEL = 0.01  # the paper's
SAME = "ablations"  # AdaPrune's own runs once more


@dataclass(frozen=True)
class Comparison:
    """Two methods on one task, at one sparsity.

    Args:
        task (`str`): The task.
        sparsity (`float`): That of the first method; the second's is the same, or 0 where it does not prune.
        other (`str`): The second method.
        difference (`float`): The first one's mean score minus the second's.
        p (`float`, *optional*):
            Of the two-tailed t-test over seeds, Welch's: variances need not be equal. `None` where a method has one
            seed only, or no score varies.
    """

    task: str
    sparsity: float
    other: str
    difference: float
    p: float | None

    @property
    def cell(self) -> str:
        """The difference, with a star if it is significant, and p, if there is one."""
        if self.p is None:
            return f"{self.difference:+.3f}"
        star = "*" if self.p < LEVEL else ""
        return f"{self.difference:+.3f}{star} ({f'p = {self.p:.3f}' if self.p >= 0.001 else 'p < .001'})"


def p_value(first: list[float], second: list[float]) -> float | None:
    """Return p of a two-tailed t-test for equal means, or `None` where there is nothing to test with."""
    if min(len(first), len(second)) < 2 or statistics.stdev(first) == statistics.stdev(second) == 0:
        return None
    # From the moments: given values that are all equal, scipy warns.
    moments = [(statistics.fmean(values), statistics.stdev(values), len(values)) for values in (first, second)]
    return float(stats.ttest_ind_from_stats(*moments[0], *moments[1], equal_var=False).pvalue)


def compare(cells: Cells, method: str = "adaprune") -> list[Comparison]:
    """Compare a method with each other one, wherever both have run."""
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
    """Return which share of the masked weights a cell's runs have pruned, whatever they were asked for."""
    return round(next(iter(by_task.values()))[0]["sparsity"], 2)


def significance_table(comparisons: list[Comparison], names: Mapping[str, str], tasks: list[str]) -> str:
    """Return a table of differences, one row for each sparsity and other method, in the order of `names`."""
    cells = {(one.sparsity, one.other, one.task): one.cell for one in comparisons}
    order = list(names)
    rows = sorted({(one.sparsity, one.other) for one in comparisons}, key=lambda row: (row[0], order.index(row[1])))
    lines = ["| sparsity | minus | " + " | ".join(tasks) + " |", "| --- | --- |" + " --- |" * len(tasks)]
    for sparsity, other in rows:
        columns = [cells.get((sparsity, other, task), "") for task in tasks]
        lines.append(f"| {sparsity:g} | {names[other]} | {' | '.join(columns)} |")
    return "\n".join(lines)
