"""The study's report: tables, tests of significance and figures, from lines of results."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from doors import train
from matplotlib.container import BarContainer
from scipy.stats import t
from transformers import AutoModel

from hf_adaprune.analysis import load_masks, magnitude_masks, mask_overlap, model_weights


STUDY = Path(__file__).parents[1] / "examples" / "study"
MODULES = {
    "bert.embeddings.word_embeddings": 800,
    **{f"bert.encoder.layer.{layer}.attention.self.query": 100 for layer in range(11)},
    **{f"bert.encoder.layer.{layer}.output.dense": 400 for layer in range(11)},
}
TASKS = ("stsb", "sst2-8k")
SCORES = {"finetune": 0.9, "feature_extraction": 0.5, "adaprune": 0.88, "paper": 0.8, "magnitude": 0.7, "random": 0.3}


def make_rows() -> list[dict[str, Any]]:
    """Return rows as the runner writes them; the scores of a cell's three seeds are .01 apart."""
    rows = []
    for task in TASKS:
        for method, score in SCORES.items():
            for sparsity in (0.0,) if method in ("finetune", "feature_extraction") else (0.2, 0.5, 0.99):
                for seed in range(3):
                    value = score - sparsity / 10 + (seed - 1) / 100
                    row = {"task": task, "method": method, "sparsity_asked": sparsity, "seed": seed}
                    row |= {"sparsity": sparsity, "sparsity_whole_model": sparsity / 2, "checkpoint_bytes": 1000}
                    row |= {"eval_accuracy": value, "eval_combined_score": value, "adapter_bytes": 10}
                    if method == "magnitude":
                        row |= {"eval_rewound_accuracy": value / 2, "eval_rewound_combined_score": value / 2}
                    if sparsity:
                        row["module_counts"] = {
                            name: [round(total * (1 if "embed" in name else sparsity)), total]
                            for name, total in sorted(MODULES.items())
                            if method == "paper" or "embed" not in name
                        }
                    rows.append(row)
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a module of the study."""
    monkeypatch.syspath_prepend(str(STUDY))
    return import_module


@pytest.fixture
def cells(study: Any, tmp_path: Path) -> Any:
    return study("report").load(write(tmp_path / "results.jsonl", make_rows()))


# --- significance


def test_p_is_that_of_welchs_test(study: Any) -> None:
    first, second = [0.85, 0.86, 0.84, 0.87], [0.80, 0.83, 0.79]
    variances = [np.var(values, ddof=1) / len(values) for values in (first, second)]
    statistic = (np.mean(first) - np.mean(second)) / sum(variances) ** 0.5
    freedom = sum(variances) ** 2 / (variances[0] ** 2 / 3 + variances[1] ** 2 / 2)
    assert study("significance").p_value(first, second) == pytest.approx(2 * t.sf(abs(statistic), freedom))
    assert study("significance").p_value(second, first) == pytest.approx(2 * t.sf(abs(statistic), freedom))


def test_there_is_no_p_where_there_is_nothing_to_test_with(study: Any) -> None:
    p_value = study("significance").p_value
    assert p_value([0.8], [0.7, 0.71]) is None
    assert p_value([0.8, 0.8], [0.7, 0.7]) is None
    assert p_value([0.8, 0.8, 0.8], [0.7, 0.71, 0.69]) < 0.01


def test_masks_are_compared_with_every_other_method_at_their_own_sparsity(study: Any, cells: Any) -> None:
    found = study("significance").compare(cells)
    at_half = {one.other: one for one in found if (one.task, one.sparsity) == ("stsb", 0.5)}
    assert set(at_half) == {"finetune", "feature_extraction", "paper", "magnitude", "magnitude, rewound", "random"}
    assert at_half["paper"].difference == pytest.approx(0.08)
    assert at_half["finetune"].difference == pytest.approx(-0.07)
    assert at_half["random"].cell == "+0.580* (p < .001)"
    barely = study("significance").Comparison("stsb", 0.5, "paper", -0.0312, 0.04)
    assert barely.cell == "-0.031 (p = 0.040)"
    table = study("significance").significance_table(found, study("report").NAMES | study("report").REWOUND, TASKS)
    assert table.splitlines()[2].startswith("| 0.2 | fine-tuning | -0.040* (p = 0.008) |")
    assert len(table.splitlines()) == 2 + 3 * 6


def test_what_has_pruned_more_than_it_was_asked_to_is_not_compared(study: Any, cells: Any) -> None:
    rows = [row | {"sparsity": 0.75} for row in cells["magnitude", 0.5]["stsb"]]
    cells["smaller", 0.5] = {"stsb": rows}
    assert "smaller" not in {one.other for one in study("significance").compare(cells)}


def test_the_table_leaves_shares_of_fine_tuning_out_where_that_has_not_run(study: Any, tmp_path: Path) -> None:
    rows = [row for row in make_rows() if row["method"] != "finetune"]
    table = study("report").table(write(tmp_path / "results.jsonl", rows))
    assert "| fine-tuning |" not in table
    assert "| masks | 0.500 |" in table


def test_averages_are_over_the_methods_that_were_run_on_all_five_tasks(study: Any, cells: Any) -> None:
    assert study("report").averages(cells).count("\n") == 1
    for method, sparsity, score in (("finetune", 0.0, 0.5), ("adaprune", 0.5, 0.55), ("smp", 0.5, 0.6)):
        cells[method, sparsity] = {task: [{"score": score}] * 3 for task in ("stsb", "mrpc", "cola", "rte", "sst2")}
    cells["adaprune", 0.5]["mrpc"] = [{"score": 0.3}]
    del cells["smp", 0.5]["cola"]
    assert study("report").averages(cells).splitlines()[2:] == [
        "| whole | fine-tuning | 0 | 0.500 | 1.000 | 3 or more |",
        "| whole | masks | 0.5 | 0.500 | 1.000 | 1 or more |",
    ]


def test_a_repetition_of_the_masks_own_runs_is_not_compared_with_them(study: Any, cells: Any) -> None:
    cells["ablations", 0.5] = cells["adaprune", 0.5]
    assert "ablations" not in {one.other for one in study("significance").compare(cells)}


# --- beside the paper


def test_shares_of_fine_tuning_stand_beside_the_papers(study: Any, cells: Any) -> None:
    lines = study("published").beside_published(cells).splitlines()
    # .126 / .855, .25 / .9, .707 / .855, not run, .706 / .855, .325 / .9, .837 / .855, .75 / .9, .83 / .9
    assert lines[3] == "| stsb | 0.5 | 0.147 | 0.278 | 0.827 |  | 0.826 | 0.361 | 0.979 | 0.833 | 0.922 |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        [f"| {task}", level] for task in TASKS for level in ("0.2", "0.5", "0.99")
    ]


def test_changed_masks_and_weights_are_scored_beside_the_papers(study: Any, cells: Any) -> None:
    row = {"score": 0.8, "eval_shuffled_combined_score": 0.1, "eval_shuffled_retrained_combined_score": 0.3}
    cells["ablations", 0.5] = {"stsb": [row, row | {"eval_shuffled_retrained_combined_score": 0.5}]}
    lines = study("published").ablation_table(cells, study("report").SCORES).splitlines()
    shuffled = "| stsb | 0.5 | mask shuffled in each matrix | 0.312 | 0.400 ± 0.141 (2) | 0.100 ± 0.000 (2) |"
    assert lines[2:] == [shuffled]


# --- figures


def test_the_curves_are_the_means_of_the_seeds_and_the_bands_their_deviation(study: Any, cells: Any) -> None:
    names = study("report").NAMES | study("report").REWOUND
    figure = study("figures").plot_scores(cells, names, TASKS)
    assert [axes.get_title() for axes in figure.axes] == list(TASKS)
    color = study("figures").CURVES["adaprune"][0]
    (curve,) = (line for line in figure.axes[0].lines if line.get_color() == color)
    assert curve.get_ydata() == pytest.approx([0.86, 0.83, 0.781])
    band = next(band for band in figure.axes[0].collections if band.get_label() != "")
    heights = {round(y, 3) for path in band.get_paths() for y in path.vertices[:, 1]}
    assert {0.87, 0.85} <= heights
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["20", "50", "99"]
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown[:2] == ["fine-tuning", "frozen encoder, trained head"]
    assert "magnitude pruning, pre-trained weights" in shown


@pytest.mark.parametrize("missing", ["finetune", "adaprune"])
def test_a_task_is_drawn_once_there_are_two_sparsities_and_fine_tuning_to_compare_with(
    missing: str, study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in make_rows() if (row["task"], row["method"]) != ("stsb", missing)]
    figures, drawn = study("figures"), Mock(wraps=study("figures").plot_scores)
    monkeypatch.setattr(figures, "plot_scores", drawn)
    study("report").main(write(tmp_path / "results.jsonl", rows), tmp_path / "page.md", tmp_path / "figures")
    assert drawn.call_args.args[2] == ["sst2-8k"]


def test_a_fourth_task_begins_a_second_row(study: Any, cells: Any) -> None:
    names = study("report").NAMES | study("report").REWOUND
    figure = study("figures").plot_scores(cells, names, ["stsb", "sst2-8k", "mrpc", "cola"])
    assert len(figure.axes) == 4


def test_the_bars_are_the_shares_pruned_with_the_embeddings_first(study: Any, cells: Any) -> None:
    figures = study("figures")
    figure = figures.plot_pruned(cells, study("report").NAMES, "stsb", [0.2, 0.99])
    components, layers = figure.axes[0], figure.axes[1]
    assert [label.get_text() for label in components.get_xticklabels()] == ["embed-\ndings", "query", "FFN out"]
    assert [label.get_text() for label in layers.get_xticklabels()] == ["embed-\ndings", *map(str, range(11))]
    bars = [container for container in components.containers if isinstance(container, BarContainer)]
    heights = [[bar.get_height() for bar in container] for container in bars]
    assert heights == [pytest.approx(expected) for expected in ([0.2, 0.2], [1, 0.2, 0.2], [0.2, 0.2])]
    # Magnitude pruning and its second score are one mask: one bar.
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["masks", 'masks, "paper" preset', "magnitude pruning"]
    assert figure.axes[2].get_ylim()[0] > 0.9
    with pytest.raises(ValueError, match="No row of 'mrpc' at the sparsities"):
        figures.plot_pruned(cells, {}, "mrpc", [0.5])


def test_the_report_writes_its_tables_and_draws_its_figures(study: Any, tmp_path: Path) -> None:
    results, page = write(tmp_path / "results.jsonl", make_rows()), tmp_path / "results.md"
    study("report").main(results, page, tmp_path / "figures")
    out = page.read_text()
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        *("scores.png", "pruned_stsb.png", "pruned_sst2-8k.png")
    }
    assert out.count("fine-tuning |") >= 4
    assert "| masks | 0.830 ± 0.010 (3) |  | 0.830 ± 0.010 (3) |  |  |  |" in out
    # There are no ablations: no empty table is written.
    assert "Ablations" not in out
    # One line of results, of a method that does not prune, is enough for a report.
    study("report").main(write(tmp_path / "one.jsonl", make_rows()[:1]), page, tmp_path / "one")
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"scores.png"}


def test_topology_tells_adapters_apart_and_draws_them(
    study: Any,
    base_path: Path,
    adapter_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = train(base_path, tmp_path / "run", "instance", learning_rate=1e-2)
    other.model.save_pretrained(tmp_path / "other")
    one, again = (shutil.copytree(adapter_path, tmp_path / name) for name in ("one", "again"))
    flags = [one, again, tmp_path / "other", "--base", base_path, "--figures", tmp_path / "figures"]
    monkeypatch.setattr(sys, "argv", ["topology.py", *map(str, flags)])
    study("topology").main()
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[0] in ("one", "again", "other")]
    assert [row[:2] for row in rows[:3]] == [["one", "0.500"], ["again", "0.500"], ["other", "0.600"]]
    masks = load_masks(one)
    magnitude = magnitude_masks(masks, model_weights(AutoModel.from_pretrained(base_path), masks))
    assert rows[0][2] == rows[1][2] == f"{mask_overlap(masks, magnitude).whole.agreement:.3f}" != rows[2][2]
    kappa = [float(row[2]) for row in rows[3:]]
    assert kappa[0] == 1 > max(kappa[1:])
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {f"topology_{name}.png" for name in ("overlap", "departures", "degrees", "heads", "spectrum")}
    monkeypatch.setattr(sys, "argv", ["topology.py", str(again), "--base", str(base_path), "--spectrum", "qurey"])
    with pytest.raises(SystemExit):
        study("topology").main()
    assert "No module that all adapters mask ends in 'qurey'" in capsys.readouterr().err


def test_paths_are_shown_by_what_differs(study: Any) -> None:
    short = study("topology").short_names
    assert short(["kept/stsb/adaprune/0.5/0", "kept/mrpc/adaprune/0.5/0"]) == ["stsb", "mrpc"]
    assert short(["a/stsb/adaprune/0.5/0", "a/mrpc/adaprune/0.9/0"]) == ["stsb 0.5", "mrpc 0.9"]
    assert short(["me/one", "me/two"]) == ["one", "two"]
    assert short(["me/one", "/some/where/else/here"]) == ["me/one", "/some/where/else/here"]
    assert short(["me/one"]) == ["me/one"]


def speed_row(method: str, seed: int, form: str, median: float, size: int, task: str = "stsb") -> dict[str, Any]:
    run = {"task": task, "method": method, "sparsity_asked": 0.5, "seed": seed}
    spread = [median - 0.1, median, median + 0.2]
    batch = {"batch_size": 1, "length": 32, "device": "a machine"}
    return run | batch | {"form": form, "speed_up": spread, "milliseconds": 1.0, "bytes": size}


def test_scores_stand_over_the_speed_up_of_the_smallest_form(study: Any, cells: Any) -> None:
    speeds = [
        speed_row(method, seed, form, median + seed / 10, size)
        for method, smaller in (("adaprune", 1.0), ("paper", 2.0))
        for seed in range(3)
        for form, median, size in (
            *(("base", 1.0, 8), ("merged", 1.0, 8)),
            *((("compacted", smaller, 4), ("compacted, ONNX", 9.0, 3)) if method == "paper" else ()),
        )
    ]
    speeds.append(speed_row("imp", 0, "merged", 1.0, 8))  # its score is not there
    figure = study("speed_up").plot_speed_up(cells, speeds, study("report").NAMES)
    (axes,) = figure.axes
    assert axes.get_title() == "batch 1, length 32\na machine"
    star, *points = [line for line in axes.lines if line.get_marker() in ("*", "o")]
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([1], [1])
    # Scores .83 and .75 of .9; medians 1, 1.1, 1.2 and one more.
    assert [list(line.get_xdata()) for line in points] == [pytest.approx([1.1]), pytest.approx([2.1])]
    assert [list(line.get_ydata()) for line in points] == [pytest.approx([0.83 / 0.9]), pytest.approx([0.75 / 0.9])]
    bars = [container.lines[2] for container in axes.containers]
    across, up = (bar.get_segments()[0] for bar in bars[0])
    assert across[:, 0] == pytest.approx([1.0, 1.3])
    assert up[:, 1] == pytest.approx([0.82 / 0.9, 0.84 / 0.9])
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["fine-tuned base", "masks", 'masks, "paper" preset']
    with pytest.raises(ValueError, match="nothing to draw"):
        study("speed_up").plot_speed_up(cells, speeds[-1:], {})


def test_adapters_that_were_kept_are_measured_once(
    study: Any, adapter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        shutil.copytree(adapter_path, tmp_path / "kept" / "stsb" / "adaprune" / "0.5" / str(seed))
    results, speeds = write(tmp_path / "results.jsonl", make_rows()), tmp_path / "speeds.jsonl"
    flags = [
        "--keep",
        tmp_path / "kept",
        "--results",
        results,
        "--speeds",
        speeds,
        "--figure",
        tmp_path / "new" / "a.png",
    ]
    flags += ["--batch_sizes", 2, "--lengths", 5, "--repeats", 2]
    monkeypatch.setattr(sys, "argv", ["speed_up.py", *map(str, flags)])
    study("speed_up").main()
    rows = [json.loads(line) for line in speeds.read_text().splitlines()]
    assert [(row["seed"], row["form"]) for row in rows] == [(s, form) for s in (0, 1) for form in ("base", "merged")]
    assert {(row["task"], row["method"], row["sparsity_asked"]) for row in rows} == {("stsb", "adaprune", 0.5)}
    assert (tmp_path / "new" / "a.png").is_file()
    shutil.copytree(adapter_path, tmp_path / "kept" / "stsb" / "adaprune" / "0.5" / "2")
    study("speed_up").main()
    again = [json.loads(line) for line in speeds.read_text().splitlines()]
    assert again[:4] == rows
    assert [row["seed"] for row in again[4:]] == [2, 2]


def test_the_committed_results_make_a_report(study: Any, tmp_path: Path) -> None:
    study("report").main(STUDY / "results.jsonl", tmp_path / "results.md", tmp_path)
    assert (tmp_path / "scores.png").is_file()
    assert (tmp_path / "results.md").read_text() == (STUDY / "results.md").read_text()
    assert (tmp_path / "results.md").read_text() == (STUDY / "results.md").read_text()
