"""Turn the lines of the results file into tables: `python examples/study/report.py`."""

import json
import statistics
from argparse import ArgumentParser
from collections import defaultdict
from pathlib import Path


SCORES = {"sst2-8k": "eval_accuracy", "stsb": "eval_combined_score"}
METHODS = {
    "finetune": "fine-tuning",
    "feature_extraction": "frozen encoder, trained head",
    "adaprune": "masks",
    "paper": 'masks, `"paper"` preset',
}


def load(results: Path) -> dict[tuple[str, float], dict[str, list[dict[str, float]]]]:
    """Return the rows of each method and sparsity by task."""
    cells: dict[tuple[str, float], dict[str, list[dict[str, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in results.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        cells[row["method"], row["sparsity_asked"]][row["task"]].append(row)
    return cells


def describe(values: list[float]) -> str:
    """Return mean, deviation and number of seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation} ({len(values)})"


def table(results: Path) -> str:
    """Return the table of scores, one row a method and sparsity."""
    cells = load(results)
    lines = ["| method | pruned, of the masked weights | of the model | bytes |", "| --- | --- | --- | --- |"]
    lines[0] += "".join(f" {task} | of fine-tuning |" for task in SCORES)
    lines[1] += " --- | --- |" * len(SCORES)
    reference = {task: [row[key] for row in cells["finetune", 0.0][task]] for task, key in SCORES.items()}
    for (method, sparsity), by_task in sorted(
        cells.items(), key=lambda cell: (list(METHODS).index(cell[0][0]), cell[0][1])
    ):
        first = next(iter(by_task.values()))[0]
        pruned = [f"{first['sparsity']:.3f}", f"{first['sparsity_whole_model']:.3f}"] if sparsity else ["0", "0"]
        columns = [METHODS[method], *pruned, f"{first['checkpoint_bytes']:,}"]
        for task, key in SCORES.items():
            values = [row[key] for row in by_task[task]]
            share = (
                statistics.fmean(values) / statistics.fmean(reference[task]) if values and reference[task] else None
            )
            columns += [describe(values) if values else "", f"{share:.3f}" if share else ""]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
    print(table(parser.parse_args().results))
