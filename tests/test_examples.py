"""The examples and the command line, on a tiny model."""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module, metadata
from itertools import pairwise, takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from doors import save_base
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer
from typer.testing import CliRunner

from hf_adaprune import sparsity_report
from hf_adaprune.demo.reviews import make_reviews


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs an example's `main` on a command line."""

    def run(name: str, *arguments: object) -> Any:
        monkeypatch.syspath_prepend(str((EXAMPLES / name).parent))
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        module = import_module(Path(name).stem)
        module.main()
        return module

    return run


def test_a_loop_of_ones_own_prunes_to_the_target(example: Any, base_path: Path, tmp_path: Path) -> None:
    flags = ["--model", base_path, "--num_train", 96, "--epochs", 2, "--final_sparsity", 0.6]
    example("accelerate_loop.py", *flags, "--output_dir", tmp_path)
    model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path)
    assert sparsity_report(model).sparsity == pytest.approx(0.6, abs=1e-3)


def test_a_loop_that_is_resumed_ends_where_the_whole_one_does(example: Any, base_path: Path, tmp_path: Path) -> None:
    flags = ["--model", base_path, "--num_train", 96, "--epochs", 2]
    example("accelerate_loop.py", *flags, "--output_dir", tmp_path / "whole")
    module = import_module("accelerate_loop")

    def interrupt(self: Any, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        raise KeyboardInterrupt

    save = module.Accelerator.save_state
    checkpoint = ["--checkpoint_dir", tmp_path / "checkpoint"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Accelerator, "save_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            example("accelerate_loop.py", *flags, *checkpoint, "--output_dir", tmp_path / "cut")
    example("accelerate_loop.py", *flags, *checkpoint, "--output_dir", tmp_path / "cut")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # One that was cut short, and two that a kill before the former's deletion left.
    for name in ("unfinished", "epoch-9", "epoch-10"):
        (tmp_path / "left" / name).mkdir(parents=True)
    assert module.find_checkpoint(tmp_path / "left") == tmp_path / "left" / "epoch-10"
    assert module.find_checkpoint(tmp_path / "none") is None


def in_this_process(command: list[str]) -> Any:
    """Do what `subprocess.run` does with a Python script, without another import of everything."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.setattr(sys, "argv", command[1:])
        import_module(Path(command[1]).stem).main()
    return SimpleNamespace(returncode=0, stdout=said.getvalue(), stderr="")


def test_the_benchmark_of_training_compares_times_and_memory(
    example: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **options: in_this_process(command))
    flags = ["--shapes", "tiny", "--batches", "2x8", "--rounds", 3, "--warmup", 1, "--device", "cpu"]
    example("benchmarks/training.py", *flags, "--dtypes", "fp32", "bf16")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        assert len(row["adaprune_over_finetune"]) == len(row["adafactor_over_finetune"]) == 3
        assert all(ratio > 0 for ratio in row["lora_over_finetune"])
        assert 0 < row["choosing_masks"] < 1
        held = row["mib"]["adaprune"]
        # Frozen: neither the word embeddings, which are nearly all here, nor anything else of the base.
        assert held["gradients"] < 0.1 * row["mib"]["finetune"]["gradients"]
        assert held["optimizer"] == pytest.approx(2 * held["gradients"], abs=0.1)


def test_the_benchmark_of_growth_measures_and_draws_each_size(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda command, **options: in_this_process(command))
    flags = ["--width", 16, "--rows", 4, "--steps", 2, "--device", "cpu", "--figure", tmp_path / "growth.png"]
    example("benchmarks/growth.py", "--weights", 0.001, 0.003, *flags)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["weights"] for row in rows] == [1024, 3072]
    assert all(row["selection_seconds"] <= row["step_seconds"] for row in rows)
    assert (tmp_path / "growth.png").stat().st_size > 5_000


def test_the_latency_benchmark_prints_a_line_for_each_form_and_size(
    example: Any, base_path: Path, adapter_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--batch_sizes", 2, "--lengths", 3, 5, "--repeats", 2, "--warmup", 0, "--device", "cpu", "--threads", 1]

    def lines(*which: object) -> list[dict[str, Any]]:
        example("benchmarks/latency.py", *which, *flags)
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    fresh = lines("--model", base_path)
    assert [(row["length"], row["form"]) for row in fresh] == [
        (length, form) for length in (3, 5) for form in ("base", "merged", "compacted")
    ]
    base, _, small = fresh[:3]
    assert small["bytes"] < base["bytes"]
    assert len(small["speed_up"]) == 3
    assert [row["form"] for row in lines("--adapter", adapter_path)] == ["base", "merged"] * 2


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Return the runner's module; `study.go` runs it, with runs that take no time and are listed in `study.done`."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "study"))
    runner = import_module("run")
    done: list[Any] = []
    flags_given: list[list[str]] = []

    def execute(run: Any, model: str, data_dir: str, keep: Path | None, flags: list[str]) -> dict[str, Any]:
        done.append(run)
        flags_given.append(flags)
        if (run.task, run.seed) == ("rte", 2) and runner.fails:
            raise RuntimeError(f"{run.name} failed")
        row = {"task": run.task, "method": run.method, "sparsity_asked": run.sparsity, "seed": run.seed}
        row |= {} if run.learning_rate is None else {"learning_rate_asked": run.learning_rate}
        row |= {"model": model, "sparsity": run.sparsity, "sparsity_whole_model": 0.2, "checkpoint_bytes": 1000}
        scores = {"eval_accuracy": 0.8 + run.seed / 100, "eval_combined_score": 0.9, "eval_matthews_correlation": 0.3}
        if run.method == "magnitude":
            scores |= {"eval_rewound_combined_score": 0.45, "adapter_bytes": 100}
        return row | scores

    def go(*flags: str) -> int:
        done.clear()
        monkeypatch.setattr(sys, "argv", ["run.py", "--data_dir", "glue", "--results", str(runner.results), *flags])
        runner.main()
        return len(done)

    monkeypatch.setattr(runner, "execute", execute)
    extra = {"flags_given": flags_given, "fails": False}
    for name, value in {"go": go, "done": done, "results": tmp_path / "results.jsonl", **extra}.items():
        monkeypatch.setattr(runner, name, value, raising=False)
    return runner


def test_the_grid_skips_what_is_there_and_the_report_tells_what_is(study: Any) -> None:
    size = len(study.grid())
    assert study.go() == size == len(set(study.grid()))
    lines = study.results.read_text().splitlines()
    # A kill in the middle of a line: that run and the one that is missing are done again, and the line is mended.
    study.results.write_text("\n".join(lines[:-2]) + "\n" + lines[-2][:40])
    assert study.go() == 2
    assert study.go() == 0
    table = import_module("report").table(study.results)
    assert "| fine-tuning | 0 | 0 | 1,000 | 0.900 ± 0.000 (5) | 1.000 | 0.820 ± 0.016 (5) | 1.000 |" in table
    assert "| magnitude pruning, pre-trained weights | 0.500 | 0.200 | 100 | 0.450 ± 0.000 (5) | 0.500 |" in table


def test_runs_can_be_in_bf16(study: Any) -> None:
    study.go("--only", "stsb/finetune/0.0/0", "--bf16")
    study.go("--only", "stsb/finetune/0.0/1")
    assert study.flags_given == [["--bf16"], []]


def test_learning_rates_are_tried_on_data_held_out_of_the_training_split(study: Any, tmp_path: Path) -> None:
    texts = [f"w{number} w{number + 1} ." for number in range(100)]
    (tmp_path / "cola").mkdir()
    data = datasets.Dataset.from_dict({"sentence": texts, "label": [number % 2 for number in range(100)]})
    data.to_parquet(tmp_path / "cola" / "train.parquet")
    flags = ("--tuning", "--data_dir", str(tmp_path), "--only", "cola/finetune/*")
    assert study.go(*flags) == 4
    assert [run.name for run in study.done][:2] == ["cola/finetune/0.0/0/5e-05", "cola/finetune/0.0/0/0.0001"]
    assert study.done[0].command("base", None, "out")[-2:] == ["--learning_rate", "5e-05"]
    assert study.go(*flags) == 0
    shutil.move(study.results, study.results.with_name("tuning.jsonl"))
    table = import_module("report").tuning_table(study.results.with_name("tuning.jsonl"))
    assert "| fine-tuning | 0.0002 | **0.300** |" in table
    with pytest.raises(SystemExit):
        study.go("--tuning", "--data_dir", "")


def test_what_is_held_out_is_part_of_no_other_sentence_and_no_part_of_it_is_trained_on(study: Any) -> None:
    sentences = [" ".join(f"w{row}_{word}" for word in range(6)) for row in range(40)]
    phrases = [" ".join(sentence.split()[start : start + 3]) for sentence in sentences for start in (0, 2)]
    rows = datasets.Dataset.from_dict({"sentence": phrases + sentences})
    train, held = import_module("hold_out").split(rows)
    assert len(held) == round(0.15 * len(rows)) == 18
    assert all(row >= len(phrases) for row in held)
    assert len(train) == len(rows) - 3 * 18
    pairs = datasets.Dataset.from_dict({"sentence1": sentences, "sentence2": sentences})
    train, held = import_module("hold_out").split(pairs)
    assert (len(held), sorted([*train, *held])) == (6, list(range(40)))


def test_a_run_is_a_command_that_leaves_its_line_and_what_it_saved(base_path: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES / "study"))
        runner = import_module("run")
    texts = [f"w{number} w{number + 1}" for number in range(5, 21)]
    data = {"sentence1": texts, "sentence2": texts[::-1], "label": [number % 2 for number in range(16)]}
    (tmp_path / "rte").mkdir()
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(data).to_parquet(tmp_path / "rte" / f"{split}.parquet")
    run = runner.Run("rte", "magnitude", 0.9, 3)
    row = runner.execute(run, str(base_path), str(tmp_path), keep=tmp_path / "kept")
    assert (row["task"], row["method"], row["sparsity_asked"], row["seed"]) == ("rte", "magnitude", 0.9, 3)
    assert {"eval_accuracy", "eval_rewound_accuracy", "seconds", "versions", "revision", "device"} <= set(row)
    pruned, total = (sum(counts) for counts in zip(*row["module_counts"].values(), strict=True))
    assert pruned / total == row["sparsity"] == pytest.approx(0.9, abs=1e-4)
    assert "--task_name rte" in row["command"]
    assert str(tmp_path) not in row["command"]
    assert (tmp_path / "kept" / run.name / "rewound" / "adapter_model.safetensors").is_file()


def test_rows_of_another_base_are_other_runs_and_rows_that_name_none_are_of_the_packaged_one(study: Any) -> None:
    first = "stsb/*/0.*/0"
    count = study.go("--only", first)
    rows = [json.loads(line) for line in study.results.read_text().splitlines()]
    unnamed = [{key: value for key, value in row.items() if key != "model"} for row in rows]
    study.results.write_text("".join(json.dumps(row) + "\n" for row in unnamed))
    assert study.go("--only", first) == 0
    assert study.go("--only", first, "--model", "another") == count


def test_what_tells_most_comes_first_and_each_cell_before_a_second_seed(study: Any) -> None:
    names = [run.name for run in study.grid()]
    assert names[:4] == ["stsb/finetune/0.0/0", "sst2-8k/finetune/0.0/0", "mrpc/finetune/0.0/0", "stsb/adaprune/0.5/0"]
    core = {run for run in study.grid() if run.sparsity in (0.0, 0.5, 0.9) and run.task in ("stsb", "sst2-8k", "mrpc")}
    later = ("neurons_heads", "smaller", "longer", "two_of_four"), ("_no_dropout", "small_batches")
    core = {run for run in core if run.method not in later[0] and not run.method.endswith(later[1])}
    assert set(takewhile(lambda run: run.seed == 0, study.grid())) == {run for run in core if run.seed == 0}


def test_some_methods_take_twice_the_epochs_of_their_task(study: Any) -> None:
    commands = {run.method: run.command("base", None, "out") for run in study.grid() if run.task == "mrpc"}
    epochs = {method: flags[flags.index("--num_train_epochs") + 1] for method, flags in commands.items()}
    twice = {"longer", "smaller", "longer_small_batches"}
    assert {epochs[method] for method in twice} == {"10"}
    assert {epochs[method] for method in epochs.keys() - twice} == {"5"}


def test_small_batches_are_small_whatever_the_batches_of_their_task(study: Any) -> None:
    for run in study.grid():
        flags = run.command("base", None, "out")
        last = dict(pairwise(flags))  # of a flag that is given twice the last counts
        size = int(last["--per_device_train_batch_size"]) * int(last.get("--gradient_accumulation_steps", 1))
        assert size == (8 if run.method.endswith("small_batches") else 32)


def test_a_filter_picks_runs_and_a_failed_run_stops_no_other(study: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert study.go("--only", "mrpc/imp/*/0", "*/adaprune/0.5/1") == 7 + 6
    study.fails = True
    with pytest.raises(SystemExit) as caught:
        study.go("--only", "rte/*/0.5/*", "--workers", "2")
    assert caught.value.code == 1
    assert "rte/adaprune/0.5/2 failed" in capsys.readouterr().err
    study.fails = False
    assert {run.seed for run in study.done} == {0, 1, 2}
    study.go("--only", "rte/*/0.5/*")
    assert {run.seed for run in study.done} == {2}


def test_the_command_line_says_what_it_can_do() -> None:
    from hf_adaprune.cli import app

    assert CliRunner().invoke(app, ["--version"]).output.strip() == metadata.version("hf_adaprune")
    shown = CliRunner().invoke(app, ["demo", "--help"])
    assert shown.exit_code == 0
    assert "no network" in shown.output


def test_the_demo_compares_saves_and_opens_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_adaprune.demo import run as demo

    base = save_base(tmp_path / "base")
    monkeypatch.setattr(demo, "packaged_base", lambda: str(base))
    monkeypatch.setattr(demo, "make_reviews", lambda seed: make_reviews(48, 48, seed))
    rows = demo.run_demo(tmp_path / "out", seed=1)
    assert list(rows) == ["fine-tuning", "frozen encoder", "pruned, 50 %"]
    assert rows["pruned, 50 %"]["bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert {"README.md", "sparsity.png", "adapter_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "the predictions agree" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out") is not None


def test_the_benchmark_of_the_codec_finds_coded_masks_within_their_bounds(
    example: Any, adapter_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example("benchmarks/codec.py", adapter_path, "--figure", tmp_path / "bytes.png", "--repeats", 1)
    row = json.loads(capsys.readouterr().out)

    assert row["scaled"] < row["coded"] <= 1
    assert row["bytes"]["coded"] <= row["bytes"]["packed"] < row["bytes"]["checkpoint"]
    assert (tmp_path / "bytes.png").stat().st_size > 10_000
