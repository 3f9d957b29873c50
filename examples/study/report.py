"""Turn the lines of the results file into a page of tables, and figures: `python examples/study/report.py`."""

import statistics
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import defaultdict
from pathlib import Path

from figures import draw_all
from grid import CORE, CURVES, NO_DROPOUT, TASKS, TELLING, UNPRUNED
from published import ablation_table, beside_published
from results import Cells, describe, read_rows
from significance import SAME, compare, significance_table


SCORES = dict.fromkeys(TASKS, "accuracy") | {
    "stsb": "combined_score",
    "mrpc": "combined_score",
    "cola": "matthews_correlation",
}
TITLES = {"stsb": "STS-B", "sst2-8k": "SST-2", "mrpc": "MRPC"}
NAMES = {
    "finetune": "fine-tuning",
    "feature_extraction": "frozen encoder, trained head",
    "lora": "LoRA, r = 8",
    "adaprune": "masks",
    "longer": "masks, twice the epochs",
    "small_batches": "masks, batches of 8",
    "neurons_heads": "masks of neurons and heads",
    "smaller": "neurons and heads taken out, then masks, three times the epochs",
    "two_of_four": "masks, 2:4",
    "no_recovery": "masks, no recovery",
    "ablations": "masks, then ablated",
    "paper": 'masks, `"paper"` preset',
    "smp": "masks, SMP's recipe",
    "random": "random masks",
    "magnitude": "magnitude pruning",
    "imp": "iterative magnitude pruning",
    "movement": "movement pruning",
}
NAMES |= {method: f"{NAMES[method.removesuffix('_no_dropout')]}, no dropout" for method in NO_DROPOUT}
# The second score of methods that train weights: those masks over the pre-trained ones.
REWOUND = {f"{method}, rewound": f"{name}, pre-trained weights" for method, name in NAMES.items()}
ORDER = sorted(
    (name for method in NAMES for name in (method, f"{method}, rewound")),
    key=lambda name: list(NAMES).index(name.split(", ")[0].removesuffix("_no_dropout")),
)

HEAD = """# Results

Written by `python examples/study/report.py` from [`results.jsonl`](results.jsonl). How they were
measured is in [`README.md`](README.md), what they say in [`findings.md`](findings.md). STS-B: mean of Pearson
and Spearman; MRPC: mean of accuracy and F1; CoLA: Matthews' correlation; the others: accuracy; all on the dev sets.
What is not pruned has one score for all sparsities.
"""


def load(results: Path) -> Cells:
    """Return the rows of each method and sparsity by task, each with its `score` and its `bytes`."""
    cells: Cells = defaultdict(lambda: defaultdict(list))
    for row in read_rows(results):
        for prefix, ending in (("eval", ""), ("eval_rewound", ", rewound")):
            score = row.get(f"{prefix}_{SCORES[row['task']]}")
            if score is not None:
                size = row["adapter_bytes" if ending else "checkpoint_bytes"]
                row = row | {"score": score, "bytes": size}
                cells[row["method"] + ending, row["sparsity_asked"]][row["task"]].append(row)
    return cells


def tasks_of(cells: Cells) -> list[str]:
    """Return the tasks that any run is of."""
    return [task for task in TASKS if any(task in by_task for by_task in cells.values())]


def table(results: Path) -> str:
    """Return the table of scores, one row a method and sparsity."""
    cells = load(results)
    tasks = tasks_of(cells)
    lines = ["| method | pruned, of the masked weights | of the model | bytes |", "| --- | --- | --- | --- |"]
    lines[0] += "".join(f" {task} | of fine-tuning |" for task in tasks)
    lines[1] += " --- | --- |" * len(tasks)
    tuned = cells.get(("finetune", 0.0), {})
    reference = {task: [row["score"] for row in tuned.get(task, [])] for task in tasks}
    told = [cell for cell in cells if cell[0] != SAME]
    for method, sparsity in sorted(told, key=lambda cell: (ORDER.index(cell[0]), cell[1])):
        by_task = cells[method, sparsity]
        first = next(iter(by_task.values()))[0]
        pruned = [f"{first['sparsity']:.3f}", f"{first['sparsity_whole_model']:.3f}"] if sparsity else ["0", "0"]
        columns = [(NAMES | REWOUND)[method], *pruned, f"{first['bytes']:,}"]
        for task in tasks:
            values = [row["score"] for row in by_task[task]]
            share = (
                statistics.fmean(values) / statistics.fmean(reference[task]) if values and reference[task] else None
            )
            columns += [describe(values), f"{share:.3f}" if share else ""]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def summary(cells: Cells) -> str:
    """Return the table of the telling cells alone: a row a method, for each core task a column a sparsity."""
    compared = (*UNPRUNED, "adaprune", *CURVES, *NO_DROPOUT)
    header = [f"{TITLES[task]}, {sparsity:.0%}" for task in CORE for sparsity in TELLING]
    lines = [f"| {' | '.join(['', *header])} |", "| --- " * (len(header) + 1) + "|"]
    for method in ORDER:
        kind = method.removesuffix(", rewound")
        levels = [0.0 if kind in UNPRUNED else sparsity for sparsity in TELLING]
        columns = [
            describe([row["score"] for row in cells.get((method, level), {}).get(task, [])])
            for task in CORE
            for level in levels
        ]
        if kind in compared and any(columns):
            lines.append(f"| {' | '.join([(NAMES | REWOUND)[method], *columns])} |")
    return "\n".join(lines)


def tuning_table(tuning: Path) -> str:
    """Return the scores on held-out data, a row for each method and learning rate; a task's best is in bold."""
    scores: dict[tuple[str, float], dict[str, float]] = defaultdict(dict)
    for row in read_rows(tuning):
        scores[row["method"], row["learning_rate_asked"]][row["task"]] = row[f"eval_{SCORES[row['task']]}"]
    tasks = [task for task in TASKS if any(task in by_task for by_task in scores.values())]
    lines = [f"| {' | '.join(['method', 'learning rate', *tasks])} |", "| --- " * (len(tasks) + 2) + "|"]
    for method, rate in sorted(scores, key=lambda cell: (ORDER.index(cell[0]), cell[1])):
        columns = [NAMES[method], f"{rate:g}"]
        for task in tasks:
            score = scores[method, rate].get(task)
            best = max(by_task.get(task, -1.0) for (other, _), by_task in scores.items() if other == method)
            columns.append("" if score is None else f"**{score:.3f}**" if score == best else f"{score:.3f}")
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def main(results: Path, page: Path, figures: Path) -> None:
    """Write the tables and draw the figures."""
    cells, names = load(results), NAMES | REWOUND
    tasks = tasks_of(cells)
    sections = {
        "Methods, at a half and nine tenths pruned: mean ± deviation (seeds)": summary(cells),
        "All scores": table(results),
        "Masks minus the other method; *: p < .01, two-tailed t-test over seeds (Welch's)": significance_table(
            compare(cells), names, tasks
        ),
        "Shares of fine-tuning, beside those of the paper's BERT-base": beside_published(cells),
        "Masks trained, then changed": ablation_table(cells, SCORES),
        "Learning rates, scored on data held out of the training split": tuning_table(
            results.with_name("tuning.jsonl")
        ),
    }
    told = [f"## {title}\n\n{lines}\n" for title, lines in sections.items() if lines.count("\n") > 1]
    page.write_text("\n".join([HEAD, *told]), encoding="utf-8")
    for path in (page, *draw_all(cells, names, tasks, figures)):
        print(path)


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--page", type=Path, default=Path(__file__).with_name("results.md"))
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_name("figures"))
    args = parser.parse_args()
    main(args.results, args.page, args.figures)
