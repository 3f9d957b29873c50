"""The examples and the command line, on a tiny model."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_the_step_time_benchmark_prints_ratios(
    example: Any, base_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--model", base_path, "--batch_size", 2, "--length", 8, "--steps", 3, "--warmup", 1, "--device", "cpu"]
    randint = torch.randint
    monkeypatch.setattr(torch, "randint", lambda low, high, *args, **kwargs: randint(5, 40, *args, **kwargs))
    example("benchmarks/step_time.py", *flags)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(result["adaprune_over_finetune"]) == 3
    assert all(ratio > 0 for ratio in result["lora_over_finetune"])


def test_the_grid_skips_what_is_there_and_the_report_tells_what_is(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "study"))
    grid, report = import_module("run"), import_module("report")
    results, done = tmp_path / "results.jsonl", []

    def execute(run: Any, model: str, data_dir: str) -> dict[str, Any]:
        done.append(run)
        row = {"task": run.task, "method": run.method, "sparsity_asked": run.sparsity, "seed": run.seed}
        scores = {"eval_accuracy": 0.8 + run.seed / 100, "eval_combined_score": 0.9}
        return row | scores | {"sparsity": run.sparsity, "sparsity_whole_model": 0.2, "checkpoint_bytes": 1000}

    monkeypatch.setattr(grid, "execute", execute)
    monkeypatch.setattr(sys, "argv", ["run.py", "--data_dir", "glue", "--results", str(results)])
    grid.main()
    assert len(done) == len(grid.grid()) == 36
    results.write_text("\n".join(results.read_text().splitlines()[:-2]) + "\n")
    grid.main()
    assert len(done) == 38
    table = report.table(results)
    assert "| fine-tuning | 0 | 0 | 1,000 | 0.810 ± 0.010 (3) | 1.000 | 0.900 ± 0.000 (3) | 1.000 |" in table
    assert len(table.splitlines()) == 2 + 6


def test_the_command_line_says_what_it_can_do() -> None:
    from hf_adaprune.cli import app

    shown = CliRunner().invoke(app, ["demo", "--help"])
    assert shown.exit_code == 0
    assert "no network" in shown.output


def test_the_demo_compares_saves_and_opens_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_adaprune.demo import run as demo

    base = save_base(tmp_path / "base")
    monkeypatch.setattr(demo, "_base", lambda: str(base))
    monkeypatch.setattr(demo, "make_reviews", lambda seed: make_reviews(48, 48, seed))
    rows = demo.run_demo(tmp_path / "out", seed=1)
    assert list(rows) == ["fine-tuning", "frozen encoder", "pruned, 50 %"]
    assert rows["pruned, 50 %"]["bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert {"README.md", "sparsity.png", "adapter_config.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    assert "the predictions agree" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "out") is not None
