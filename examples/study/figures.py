"""The study's figures: scores against sparsity (the paper's Fig. 2), and the share pruned by module (its Fig. 3)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from results import Cells

from hf_adaprune import AdaPruneConfig, sparsity_report


# Each method looks the same in all figures. Baselines that keep pre-trained weights, as in the paper, are solid lines.
CURVES = {
    "adaprune": ("tab:blue", "-"),
    "longer": ("tab:blue", "--"),
    "small_batches": ("tab:blue", ":"),
    "paper": ("tab:purple", "-"),
    "smp": ("tab:cyan", "-"),
    "no_recovery": ("tab:pink", "-"),
    "random": ("tab:grey", "-"),
    "magnitude, rewound": ("tab:orange", "-"),
    "imp, rewound": ("tab:red", "-"),
    "movement, rewound": ("tab:olive", "-"),
    "magnitude": ("tab:orange", ":"),
    "imp": ("tab:red", ":"),
    "movement": ("tab:olive", ":"),
}
LINES = {"finetune": "-", "lora": "-.", "feature_extraction": "--"}  # methods that do not prune

# The methods shown by module. A method that prunes all matrices equally has nothing to show there, and one that trains
# weights has the same masks under either score.
BARS = ("adaprune", "paper", "smp", "movement", "magnitude", "imp")
LABELS = {
    "embeddings": "embed-\ndings",
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "attention\noutput",
    "intermediate.dense": "FFN in",
    "output.dense": "FFN out",
}


def plot_scores(cells: Cells, names: Mapping[str, str], tasks: Sequence[str]) -> Figure:
    """Draw scores against sparsity for each task; bands are one standard deviation over seeds to each side.

    Args:
        cells (`Cells`): Rows, each with its `score`, by method and sparsity, and by task.
        names (`Mapping[str, str]`): The displayed name of each method.
        tasks (`Sequence[str]`): The tasks, one panel each.

    Returns:
        `matplotlib.figure.Figure`: The figure.
    """
    sparsities = sorted({sparsity for method, sparsity in cells if method in CURVES})
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.5 * columns + 0.4, 2.9 * rows + 1.4), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    handles: dict[str, Any] = {}
    for axes, task in zip(panels, tasks, strict=False):
        for method, style in LINES.items():
            if scores := _scores(cells, method, 0.0, task):
                handles[method] = _draw_line(axes, scores, style)
        for method in CURVES:
            found = {
                position: scores
                for position, sparsity in enumerate(sparsities)
                if (scores := _scores(cells, method, sparsity, task))
            }
            if found:
                handles[method] = _draw_curve(axes, found, method)
        axes.set_xticks(range(len(sparsities)), [f"{100 * sparsity:g}" for sparsity in sparsities])
        axes.set_xlim(-0.3, len(sparsities) - 0.7)
        axes.set_title(task, fontsize=11)
        axes.spines[["right", "top"]].set_visible(False)
    for axes in panels[len(tasks) :]:
        axes.remove()
    for number, axes in enumerate(panels[: len(tasks)]):
        axes.set_ylabel("" if number % columns else "score")
        axes.set_xlabel("" if number + columns < len(tasks) else "pruned, % of the masked weights")
    _draw_legend(figure, {method: handles[method] for method in (*LINES, *CURVES) if method in handles}, names)
    return figure


def _draw_line(axes: Any, scores: Sequence[float], style: str) -> Any:
    mean, spread = _mean_and_spread(scores)
    axes.axhspan(mean - spread, mean + spread, color="black", alpha=0.1, linewidth=0)
    return axes.axhline(mean, color="black", linestyle=style, linewidth=1)


def _draw_curve(axes: Any, found: Mapping[int, Sequence[float]], method: str) -> Any:
    color, style = CURVES[method]
    means, spreads = zip(*map(_mean_and_spread, found.values()), strict=True)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(list(found), low, high, color=color, alpha=0.15, linewidth=0)
    (line,) = axes.plot(list(found), means, marker="o", markersize=4, color=color, linestyle=style)
    return line


def _draw_legend(figure: Figure, handles: Mapping[str, Any], names: Mapping[str, str]) -> None:
    labels = [names[method].replace("`", "") for method in handles]
    # The longest name is about three and a half inches wide.
    ncols = max(1, min(len(labels), int(figure.get_figwidth() / 3.5)))
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)


def plot_pruned(cells: Cells, names: Mapping[str, str], task: str, sparsities: Sequence[float]) -> Figure:
    """Draw the share pruned by component and by layer; whiskers are one standard deviation over seeds to each side.

    Args:
        cells (`Cells`): Rows by method and sparsity, and by task; rows with `module_counts` are drawn.
        names (`Mapping[str, str]`): The displayed name of each method.
        task (`str`): The task.
        sparsities (`Sequence[float]`): The sparsities, one row of panels each.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ValueError: If no row of the task has `module_counts`.
    """
    shares = {
        (method, sparsity): found
        for sparsity in sparsities
        for method in BARS
        if any(found := _shares(cells.get((method, sparsity), {}).get(task, [])))
    }
    if not shares:
        raise ValueError(f"No row of {task!r} at the sparsities {list(sparsities)} has `module_counts`.")
    methods = [method for method in BARS if any(key[0] == method for key in shares)]
    groups = [_in_order({name for found in shares.values() for name in found[side]}) for side in (0, 1)]
    figure = Figure(figsize=(10.5, 1.0 + 2.2 * len(sparsities)), layout="constrained")
    widths = [len(group) + 0.6 for group in groups]
    panels = figure.subplots(len(sparsities), 2, squeeze=False, sharey="row", width_ratios=widths)
    handles: dict[str, Any] = {}
    for row, sparsity in zip(panels, sparsities, strict=True):
        for side, (axes, group) in enumerate(zip(row, groups, strict=True)):
            for number, method in enumerate(methods):
                if (method, sparsity) in shares:
                    shift = (number - (len(methods) - 1) / 2) * 0.8 / len(methods)
                    values = shares[method, sparsity][side]
                    places = {place + shift: values[name] for place, name in enumerate(group) if name in values}
                    handles[method] = _draw_bars(axes, places, 0.8 / len(methods), method)
            axes.axhline(sparsity, color="black", linewidth=0.7, linestyle=":")
            axes.set_xticks(range(len(group)), [LABELS.get(name, name) for name in group], fontsize=9)
            axes.set_xlim(-0.6, len(group) - 0.4)
            axes.spines[["right", "top"]].set_visible(False)
        row[0].set_ylabel(f"share pruned\n({sparsity:g} of all)")
        if sparsity > 0.75:
            # On an axis from zero, differences would be invisible: show a range around the lowest share, up to one.
            sides = [side for key, found in shares.items() if key[1] == sparsity for side in found]
            least = min(statistics.fmean(values) for side in sides for values in side.values())
            row[0].set_ylim(1 - 1.3 * (1 - min(least, sparsity)), 1)
    panels[-1][0].set_xlabel("component")
    panels[-1][1].set_xlabel("layer")
    _draw_legend(figure, {method: handles[method] for method in methods}, names)
    return figure


def _draw_bars(axes: Any, places: Mapping[float, Sequence[float]], width: float, method: str) -> Any:
    means, spreads = zip(*map(_mean_and_spread, places.values()), strict=True)
    color, _ = CURVES[method]
    return axes.bar(list(places), means, width, yerr=spreads, color=color, error_kw={"linewidth": 0.8})


def _in_order(names: set[str]) -> list[str]:
    known = list(LABELS)
    return sorted(names, key=lambda name: (known.index(name), "") if name in known else (len(known), name.zfill(4)))


def _shares(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return the shares pruned by component and by layer, one value for each row with `module_counts`."""
    sides: tuple[dict[str, list[float]], dict[str, list[float]]] = defaultdict(list), defaultdict(list)
    for row in rows:
        if row.get("module_counts"):
            report = sparsity_report(AdaPruneConfig(module_counts=row["module_counts"]))
            for side, found in zip(sides, (report.by_component(), report.by_layer()), strict=True):
                for name, share in found.items():
                    side["embeddings" if "embeddings" in name else name].append(share)
    return sides


def _varies(row: Mapping[str, Any]) -> bool:
    """Return whether the shares pruned of a run's modules differ by more than a hundredth."""
    shares = [pruned / total for pruned, total in row.get("module_counts", {}).values()]
    return max(shares, default=0) - min(shares, default=0) > 0.01


def _scores(cells: Cells, method: str, sparsity: float, task: str) -> list[float]:
    return [row["score"] for row in cells.get((method, sparsity), {}).get(task, [])]


def _mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _has_curve(cells: Cells, task: str) -> bool:
    """Return whether there are masks at two or more sparsities to draw, and fine-tuning to compare with."""
    sparsities = [
        sparsity for (method, sparsity), by_task in cells.items() if method == "adaprune" and task in by_task
    ]
    return len(sparsities) > 1 and bool(_scores(cells, "finetune", 0.0, task))


def draw_all(cells: Cells, names: Mapping[str, str], tasks: Sequence[str], folder: Path) -> list[Path]:
    """Draw every figure for which there are enough rows; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [task for task in tasks if _has_curve(cells, task)]
    figures = {"scores": plot_scores(cells, names, drawn or tasks)}
    for task in tasks:
        told = {
            sparsity
            for (method, sparsity), by_task in cells.items()
            if method in CURVES and any(_varies(row) for row in by_task.get(task, []))
        }
        # The paper's two sparsities and the two at which methods are compared, or the nearest that were run.
        if told:
            wanted = sorted({min(told, key=lambda sparsity: abs(sparsity - end)) for end in (0.2, 0.5, 0.9, 0.99)})
            figures[f"pruned_{task}"] = plot_pruned(cells, names, task, wanted)
    paths = [folder / f"{name}.png" for name in figures]
    for figure, path in zip(figures.values(), paths, strict=True):
        figure.savefig(path, dpi=150)
    return paths
