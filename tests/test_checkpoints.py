"""Killed, torn and poor checkpoints: a resumed run is the same run, or says why it is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from doors import make_trainer
from peft import LoraConfig, get_peft_model
from test_callback import STEPS, Kill, fresh, trainer
from tiny import logits_of, make_model
from torch import nn
from transformers import TrainerCallback

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, sparsity_report


RESUME = Path(__file__).parents[1] / "examples" / "benchmarks" / "resume.py"


@pytest.mark.parametrize(("options", "num_processes", "kills"), [("best", 1, 5), ("one_checkpoint", 2, 2)])
def test_a_run_killed_at_random_moments_ends_as_the_run_never_killed(
    options: str, num_processes: int, kills: int
) -> None:
    flags = ["--options", options, "--num_processes", str(num_processes), "--kills", str(kills)]
    done = subprocess.run([sys.executable, RESUME, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["kills"] == kills == sum(result["kills_at"].values())
    assert result["equal_runs"] == result["runs"] >= 1
    assert result["torn_checkpoints"] >= 1


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


@pytest.mark.parametrize("damage", [cut_short, Path.unlink])
@pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "rng_state.pth"])
def test_a_torn_checkpoint_is_never_picked_up(
    name: str, damage: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.checkpoints.logger.warning", said.append)
    whole = fresh()
    trainer(whole, tmp_path / "whole", AdaPruneCallback).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh(), tmp_path / "cut", AdaPruneCallback, Kill(12)).train()
    damage(tmp_path / "cut" / "checkpoint-10" / name)
    resumed = fresh()
    run = trainer(resumed, tmp_path / "cut", AdaPruneCallback)
    assert (tmp_path / "cut" / "torn-checkpoint-10").is_dir()
    assert not (tmp_path / "cut" / "checkpoint-10").exists()
    assert "checkpoint-10 is incomplete" in said[0]
    run.train(resume_from_checkpoint=True)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


def test_what_was_set_aside_before_stays(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "checkpoint-5").mkdir()
        (tmp_path / "checkpoint-5" / "notes.txt").write_text(str(number))
        (tmp_path / "checkpoint-5" / "training_state.safetensors").touch()
        trainer(fresh(), tmp_path, AdaPruneCallback)
    assert sorted(path.read_text() for path in tmp_path.glob("torn-*/notes.txt")) == ["0", "1", "2"]


def test_what_is_whole_or_no_checkpoint_of_a_trainer_stays_where_it_is(tmp_path: Path) -> None:
    trainer(fresh(), tmp_path, AdaPruneCallback, max_steps=10).train()
    trainer(fresh(), tmp_path / "fine-tuned", max_steps=5).train()
    (tmp_path / "fine-tuned" / "checkpoint-5").rename(tmp_path / "checkpoint-7")
    fresh().save_pretrained(tmp_path / "checkpoint-8")  # by hand: no state of a Trainer
    for name in ("checkpoint-of-mine", "checkpoint-10.bak"):
        (tmp_path / name).mkdir()
    before = {path: path.stat().st_mtime for path in tmp_path.glob("checkpoint-*")}
    assert len(before) == 6
    trainer(fresh(), tmp_path, AdaPruneCallback)
    assert {path: path.stat().st_mtime for path in tmp_path.glob("*checkpoint-*")} == before


def test_a_model_is_saved_by_keyword_while_it_trains_and_after_a_broken_run(tmp_path: Path) -> None:
    class Save(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.save_pretrained(save_directory=tmp_path / f"step {state.global_step}")

    model = fresh()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path, AdaPruneCallback, Save(), Kill(2)).train()
    model.save_pretrained(save_directory=tmp_path / "after")
    for name in ("step 1", "step 2", "after"):
        assert (tmp_path / name / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", ["mine/checkpoint-12", "run/checkpoint-7"])
def test_an_adapter_that_is_saved_by_hand_after_a_broken_run_is_no_checkpoint(name: str, tmp_path: Path) -> None:
    model = fresh()
    with pytest.raises(KeyboardInterrupt):
        trainer(model, tmp_path / "run", AdaPruneCallback, Kill(12)).train()
    model.save_pretrained(tmp_path / name)
    assert not (tmp_path / name / "training_state.safetensors").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_former_checkpoint_is_there_until_the_next_has_its_scores(
    wrapped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import trainer as module

    rotated: list[int] = []
    rotate = module.rotate_checkpoints

    def check(output_dir: str, **kwargs: Any) -> None:
        rotated.append(len(list(Path(output_dir).glob("checkpoint-*"))))
        assert all((path / "training_state.safetensors").is_file() for path in Path(output_dir).glob("checkpoint-*"))
        rotate(output_dir, **kwargs)

    monkeypatch.setattr(module, "rotate_checkpoints", check)
    model = fresh(wrapped)
    trainer(model, tmp_path, AdaPruneCallback, save_total_limit=1).train()
    assert rotated == [1, 2, 2, 2]
    # What is saved afterwards is the adapter alone.
    model.save_pretrained(tmp_path / "checkpoint-99")
    assert {path.name for path in (tmp_path / "checkpoint-99").glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_scores_that_were_not_yet_put_in_place_when_a_run_was_killed_are_not_lost(
    wrapped: bool, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError

    whole = fresh(wrapped)
    trainer(whole, tmp_path / "whole", AdaPruneCallback).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh(wrapped), tmp_path / "cut", AdaPruneCallback, Kill(12)).train()
    (tmp_path / "cut" / "checkpoint-10" / "model.safetensors").unlink()
    if not links:
        monkeypatch.setattr("hf_adaprune.training.checkpoints.os.link", refuse)
    resumed = fresh(wrapped)
    trainer(resumed, tmp_path / "cut", AdaPruneCallback).train(resume_from_checkpoint=True)
    for key, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], tensor), key


def test_a_run_in_the_folder_of_an_earlier_one_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(folder: str) -> None:
        raise KeyboardInterrupt

    trainer(fresh(), tmp_path, AdaPruneCallback, max_steps=5, seed=1).train()
    before = (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes()
    run = trainer(fresh(), tmp_path, AdaPruneCallback, max_steps=10)
    # Killed between the adapter and the Trainer's own state: what is there is of two runs.
    monkeypatch.setattr(run, "_save_optimizer_and_scheduler", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not (tmp_path / "checkpoint-5" / "trainer_state.json").exists()
    trainer(fresh(), tmp_path, AdaPruneCallback, max_steps=10).train()
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_run_that_saved_its_model_only_goes_on_from_its_masks_with_a_warning(wrapped: bool, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh(wrapped), tmp_path, AdaPruneCallback, Kill(7), save_only_model=True).train()
    model = fresh(wrapped)
    run = trainer(model, tmp_path, AdaPruneCallback, save_only_model=True)
    with pytest.warns(UserWarning, match="scores behind the masks are lost"):
        run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS
    assert sparsity_report(model).sparsity == 0.5


def test_a_checkpoint_is_marked_as_torn_before_anything_is_saved_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_adaprune.model_files.weights_first", die)
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh(), tmp_path, AdaPruneCallback).train()
    trainer(fresh(), tmp_path, AdaPruneCallback)
    assert [path.name for path in tmp_path.iterdir()] == ["torn-checkpoint-5"]


@pytest.mark.parametrize(
    "left", [[], ["README.md"], ["adapter_model.safetensors", "adapter_config.json"], ["rng_state.pth"]]
)
def test_what_is_left_of_a_checkpoint_that_was_being_created_or_deleted_is_torn(
    left: list[str], tmp_path: Path
) -> None:
    trainer(fresh(), tmp_path, AdaPruneCallback, max_steps=10).train()
    for path in (tmp_path / "checkpoint-10").iterdir():
        if path.name not in left:
            path.unlink()
    trainer(fresh(), tmp_path, AdaPruneCallback)
    assert sorted(path.name for path in (tmp_path / "torn-checkpoint-10").iterdir()) == sorted(left)


def test_a_configuration_that_is_cut_off_makes_a_checkpoint_torn(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "adapter_config.json").write_text('{"peft_type": "LO')
    trainer(fresh(), tmp_path, AdaPruneCallback)
    assert (tmp_path / "torn-checkpoint-10" / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["adapter", "lora", "notes"])
def test_a_folder_of_ones_own_that_is_named_like_a_checkpoint_stays(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    if kind == "notes":
        folder.mkdir()
        (folder / "predictions.json").write_text("[]")
    else:
        model = fresh()
        model.add_adapter(AdaPruneConfig() if kind == "adapter" else LoraConfig(target_modules=["query"]))
        model.save_pretrained(folder)
    before = sorted(folder.iterdir())
    trainer(fresh(), tmp_path, AdaPruneCallback)
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["default", "x"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_best_of_a_trial_of_a_search_is_loaded_and_resumed(name: str, wrapped: bool, tmp_path: Path) -> None:
    scores = iter([0.5, 0.5, 0.5, 1.0, 0.0])  # the best is the last but one
    seen: dict[int, torch.Tensor] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen[state.global_step] = logits_of(model)

    model = fresh()
    model = get_peft_model(model, AdaPruneConfig(), name) if wrapped else model
    options: dict[str, Any] = {"save_steps": 4, "eval_steps": 4, "max_steps": 20, "save_strategy": "steps"}
    options |= {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "eval_score"}
    run = trainer(model, tmp_path, AdaPruneCallback(adapter_name=name), Watch(), greater_is_better=True, **options)
    run.compute_metrics = lambda prediction: {"score": next(scores)}
    run._get_output_dir = lambda trial: str(tmp_path / "run-0")
    run.train()
    assert run.state.best_global_step == 16
    assert torch.equal(logits_of(model), seen[16])
    again = fresh()
    again = get_peft_model(again, AdaPruneConfig(), name) if wrapped else again
    rerun = trainer(again, tmp_path / "again", AdaPruneCallback(adapter_name=name), max_steps=20)
    rerun.train(resume_from_checkpoint=str(tmp_path / "run-0" / "checkpoint-16"))
    assert torch.equal(logits_of(again), seen[20])


def test_a_checkpoint_of_accelerate_is_none_of_a_trainer(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(2, 2))
    accelerator.save_state(str(tmp_path / "checkpoint-5"))
    before = sorted((tmp_path / "checkpoint-5").iterdir())
    trainer(fresh(), tmp_path, AdaPruneCallback)
    assert sorted((tmp_path / "checkpoint-5").iterdir()) == before


def with_statistics() -> Any:
    model = make_model()
    torch.manual_seed(0)
    model.classifier = nn.Sequential(nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 3))
    return model


def partly_frozen() -> Any:
    model = get_peft_model(make_model(), AdaPruneConfig())
    for name, parameter in model.named_parameters():
        if "layer.0." in name or "classifier" in name:
            parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("make", [with_statistics, partly_frozen])
def test_what_is_not_trained_of_head_and_scores_is_resumed_too(make: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(make(), tmp_path / "whole", AdaPruneCallback, **options)
    whole.train()
    resumed = make_trainer(make(), tmp_path / "resumed", AdaPruneCallback, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert expected.keys() == found.keys()
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


def test_a_run_that_is_resumed_at_its_end_stays_as_it_is(tmp_path: Path) -> None:
    config = AdaPruneConfig(settle=False)
    options: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    options["lr_scheduler_type"] = "constant"
    trainers = [make_trainer(make_model(), tmp_path, AdaPruneCallback(config), **options) for _ in range(2)]
    trainers[0].train()
    trainers[1].train(resume_from_checkpoint=True)
    models: list[Any] = [trainer.model for trainer in trainers]
    expected, found = (model.state_dict() for model in models)
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert models[1].peft_config["default"].training["num_steps"] == 6
