"""Measure the speed-up of the study's adapters, and draw their scores against it.

    python examples/study/run.py --data_dir glue --keep kept        # keeps the adapters
    python examples/study/speed_up.py --keep kept --batch_sizes 1 32 --lengths 32 128

Measurements are appended to a separate file, one line for each form of a model and batch size; adapters that already
have lines there are skipped. Without `--keep` only the figure is drawn, from the existing lines.
"""

import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from report import NAMES, REWOUND, load
from results import Cells, append_row, read_rows
from tqdm import tqdm
from transformers.utils import logging

from hf_adaprune import measure_speed, read_adapter
from hf_adaprune.deploy.speed import BASE


RUN = ("task", "method", "sparsity_asked", "seed")


def measure(keep: Path, path: Path, base: str | None, **options: Any) -> None:
    """Measure the adapters that are not in the file yet; `options` are those of `measure_speed`."""
    done = {tuple(row[key] for key in RUN) for row in read_rows(path)}
    for folder in tqdm(sorted(keep.glob("*/*/*/*")), unit="run"):
        task, method, sparsity, seed = folder.relative_to(keep).parts
        run = (task, method, float(sparsity), int(seed))
        if run not in done and (folder / "adapter_config.json").is_file():
            for report in measure_speed(read_adapter(folder).open(base), **options):
                for row in report.rows():
                    append_row(path, dict(zip(RUN, run, strict=True)) | row)


def plot_speed_up(cells: Cells, speeds: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> Figure:
    """Draw scores relative to fine-tuning against speed-ups on PyTorch, one panel per batch size and length.

    A point is a method at one sparsity. Its y is the mean over tasks, with the standard deviation over seeds; its x is
    the median speed-up of its smallest form, with quartiles, averaged over its runs. The fine-tuned base is at (1, 1).

    Args:
        cells (`Cells`): Rows, each with its `score`, by method and sparsity, and by task.
        speeds (`Sequence[Mapping[str, Any]]`): The rows that `measure` has written.
        names (`Mapping[str, str]`): The displayed name of each method.

    Returns:
        `matplotlib.figure.Figure`: The figure.

    Raises:
        ValueError: If no adapter has a measured speed, a score, and a fine-tuning score to compare with.
    """
    shares = _shares(cells)
    points: dict[Any, dict[Any, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for run, size, speed_up in _smallest(speeds):
        _, method, sparsity, seed = run
        if run in shares:
            points[size][method, sparsity].append((seed, shares[run], speed_up))
    if not points:
        raise ValueError("There is nothing to draw: no adapter has both a measured speed-up and a score.")
    figure = Figure(figsize=(3.8 * len(points), 3.9), layout="constrained")
    methods = sorted({method for found in points.values() for method, _ in found})
    panels = figure.subplots(1, len(points), squeeze=False).flat
    handles: dict[str, Any] = {}
    for axes, (size, found) in zip(panels, sorted(points.items()), strict=True):
        (handles["fine-tuned base"],) = axes.plot(1, 1, "k*", markersize=10)
        for number, method in enumerate(methods):
            curve = [_point(runs) for (name, _), runs in sorted(found.items()) if name == method]
            if curve:
                x, x_spread, y, y_spread = zip(*curve, strict=True)
                spreads = {"xerr": list(zip(*x_spread, strict=True)), "yerr": y_spread, "capsize": 2}
                label = names.get(method, method).replace("`", "")
                handles[label] = axes.errorbar(x, y, **spreads, color=f"C{number}", marker="o", markersize=4)
        axes.axvline(1, color="black", linewidth=0.7, linestyle=":")
        axes.set_title("batch {}, length {}\n{}".format(*size), fontsize=10)
        axes.set_xlabel("times as fast as the base")
        axes.spines[["right", "top"]].set_visible(False)
    figure.axes[0].set_ylabel("score, share of fine-tuning's")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _shares(cells: Cells) -> dict[tuple[Any, ...], float]:
    """Return for each run its score divided by the mean score of fine-tuning on the same task."""
    tuned = {task: statistics.fmean(row["score"] for row in rows) for task, rows in cells["finetune", 0.0].items()}
    return {
        (task, method, sparsity, row["seed"]): row["score"] / tuned[task]
        for (method, sparsity), by_task in cells.items()
        for task, rows in by_task.items()
        for row in rows
        if tuned.get(task)
    }


def _smallest(speeds: Sequence[Mapping[str, Any]]) -> list[tuple[Any, Any, list[float]]]:
    """Return run, batch size and speed-up quartiles of the PyTorch form with the fewest bytes of each run."""
    best: dict[Any, Mapping[str, Any]] = {}
    for row in speeds:
        key = tuple(row[key] for key in RUN), (row["batch_size"], row["length"], row["device"])
        if row["form"] != BASE and "ONNX" not in row["form"] and row["bytes"] <= best.get(key, row)["bytes"]:
            best[key] = row
    return [(*key, row["speed_up"]) for key, row in best.items()]


def _point(runs: Sequence[tuple[int, float, Sequence[float]]]) -> tuple[float, tuple[float, float], float, float]:
    low, median, high = (statistics.fmean(column) for column in zip(*(speed_up for *_, speed_up in runs), strict=True))
    by_seed = defaultdict(list)
    for seed, share, _ in runs:
        by_seed[seed].append(share)
    means = [statistics.fmean(shares) for shares in by_seed.values()]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return median, (median - low, high - median), statistics.fmean(means), spread


def main() -> None:
    """Measure the adapters that have no lines yet, and draw the figure."""
    here = Path(__file__)
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="The folder given to `run.py --keep`.")
    parser.add_argument("--model", help="A copy of the adapters' base, if it is not at the path they name.")
    parser.add_argument("--results", type=Path, default=here.with_name("results.jsonl"))
    parser.add_argument("--speeds", type=Path, default=here.with_name("speed_up.jsonl"))
    parser.add_argument("--figure", type=Path, default=here.parent / "figures" / "speed_up.png")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--threads", type=int, help="Number of CPU threads; by default PyTorch's choice.")
    parser.add_argument("--cpu_time", action="store_true", help="Measure processor time: for a busy machine.")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.keep:
        options = {"batch_sizes": args.batch_sizes, "lengths": args.lengths, "repeats": args.repeats}
        options |= {"onnx": args.onnx, "num_threads": args.threads, "cpu_time": args.cpu_time}
        measure(args.keep, args.speeds, args.model, **options)
    figure = plot_speed_up(load(args.results), read_rows(args.speeds), NAMES | REWOUND)
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.figure, dpi=150)
    print(args.figure)


if __name__ == "__main__":
    main()
