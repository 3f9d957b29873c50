from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from doors import make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import logits_of, make_batch, make_model, train_masks
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, merged, sparsity_report
from hf_adaprune.baselines import LoraCallback, RandomMaskCallback
from hf_adaprune.errors import ConfigError, NonFiniteError, NotPrunedError
from hf_adaprune.training.callback import training_settings
from hf_adaprune.tuner.masked_layers import adaprune_layers


DATA = [
    {"input_ids": torch.randint(5, 64, (10,), generator=torch.Generator().manual_seed(i)), "labels": i % 3}
    for i in range(64)
]
STEPS = 16


class Kill(TrainerCallback):
    """Interrupt training after a number of steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class Reporter(TrainerCallback):
    """Keep what a reporter would be given."""

    def __init__(self) -> None:
        self.entries: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.entries.append(dict(logs))


def trainer(model: nn.Module, folder: Path, *callbacks: Any, **options: Any) -> Trainer:
    options = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "logging_steps": 4, "save_steps": 5} | options
    args = TrainingArguments(str(folder), report_to=[], disable_tqdm=True, use_cpu=True, **options)
    return Trainer(model, args, train_dataset=DATA, eval_dataset=DATA[:8], callbacks=list(callbacks))


def fresh(wrapped: bool = False, **options: Any) -> Any:
    set_seed(0)
    model = make_model("bert", "sequence")
    return get_peft_model(model, AdaPruneConfig(**options)) if wrapped else model


@pytest.mark.parametrize("given", ["class", "instance", "wrapped"])
def test_a_stock_trainer_prunes_to_the_target_and_changes_no_weight(given: str, tmp_path: Path) -> None:
    before = {name: parameter.clone() for name, parameter in fresh().named_parameters()}
    model = fresh(wrapped=given == "wrapped")
    callback = AdaPruneCallback(AdaPruneConfig(final_sparsity=0.5)) if given == "instance" else AdaPruneCallback
    trainer(model, tmp_path, callback).train()
    report = sparsity_report(model)
    assert report.num_pruned == round(0.5 * report.num_weights)
    for name, tensor in model.state_dict().items():
        plain = name.replace(".base_layer", "").replace(".original_module", "").removeprefix("base_model.model.")
        if plain in before:
            assert torch.equal(tensor, before.pop(plain)), name
    assert not before


def test_an_adapter_tells_how_it_was_trained(tmp_path: Path) -> None:
    options = {"learning_rate": 3e-5, "seed": 7, "gradient_accumulation_steps": 2, "optim": "adamw_torch"}
    run = trainer(fresh(), tmp_path, AdaPruneCallback, **options)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    for folder, steps in (("checkpoint-5", 5), ("adapter", 8)):
        told = AdaPruneConfig.from_pretrained(str(tmp_path / folder)).training
        assert told == {
            "num_steps": steps,
            "batch_size": 16,
            "num_examples": len(DATA),
            "learning_rate": 3e-5,
            "lr_scheduler_type": "linear",
            "optim": "adamw_torch",
            "seed": 7,
        }
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| num_examples | 64 |" in card
    assert "| seed | 7 |" in card


def test_an_adapter_does_not_tell_how_long_a_stream_is(tmp_path: Path) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return iter(DATA)

    run = trainer(fresh(), tmp_path, AdaPruneCallback, max_steps=2)
    run.train_dataset = Stream()
    run.train()
    # What each of several processes has of it: asked for its length it raises.
    for dataset in (Stream(), IterableDatasetShard(Stream())):
        told = training_settings(run.args, run.state, SimpleNamespace(dataset=dataset), run.optimizer)
        assert (told["num_steps"], told["num_examples"]) == (2, None)


def test_sparsity_and_flip_rate_are_logged_beside_the_loss(tmp_path: Path) -> None:
    reporter = Reporter()
    run = trainer(fresh(), tmp_path, AdaPruneCallback, reporter)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert [{**entry, "step": step} for entry, step in zip(reporter.entries, (4, 8, 12, 16), strict=False)] == logs
    assert len(logs) == STEPS // 4
    assert [entry["sparsity"] for entry in logs] == sorted(entry["sparsity"] for entry in logs)
    assert logs[-1]["sparsity"] == 0.5
    assert logs[0]["flip_rate"] == logs[0]["sparsity"]
    assert all(0 <= entry["flip_rate"] <= 1 for entry in logs)


@pytest.mark.parametrize("options", [{}, {"granularity": "2:4"}, {"granularity": "neuron+head", "scope": "global"}])
@pytest.mark.parametrize("killed_at", [7, 12])
def test_resumed_run_equals_uninterrupted_run(options: dict[str, Any], killed_at: int, tmp_path: Path) -> None:
    whole = fresh(True, **options)
    trainer(whole, tmp_path / "whole", AdaPruneCallback).train()
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh(True, **options), tmp_path / "cut", AdaPruneCallback, Kill(killed_at)).train()
    resumed = fresh(True, **options)
    run = trainer(resumed, tmp_path / "cut", AdaPruneCallback)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == STEPS
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_best_model_is_looked_for_among_those_that_are_pruned_as_asked(wrapped: bool, tmp_path: Path) -> None:
    model = fresh(wrapped)
    # The learning rate ruins the model step by step: unpruned it was best.
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, AdaPruneCallback, learning_rate=5e-4, **options)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    candidates = {step: loss for step, loss in losses.items() if step >= 0.6 * STEPS}
    best = min(candidates, key=lambda step: candidates[step])
    assert run.state.best_global_step == best
    assert sparsity_report(model).sparsity == 0.5
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[best], rel=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ["paper", "random"])
def test_where_sparsity_follows_no_ramp_the_best_is_a_model_as_sparse_as_asked(kind: str, tmp_path: Path) -> None:
    config = AdaPruneConfig.from_preset("paper", drift=0.03)
    callback = AdaPruneCallback(config) if kind == "paper" else RandomMaskCallback(0.5)
    model = fresh()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, callback, **options)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    if kind == "paper":
        # It ends itself by the step in which the target is exceeded.
        assert run.state.best_global_step == run.state.global_step == max(losses) < STEPS
    else:
        assert run.state.best_global_step == min(losses, key=lambda step: losses[step])
    assert sparsity_report(model).sparsity >= 0.5


@pytest.mark.parametrize("name", ["default", "another"])
def test_the_best_of_an_adapter_of_any_name_is_loaded(name: str, tmp_path: Path) -> None:
    steps = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "learning_rate": 5e-4}
    # The loss falls: were a high one better, the best would be long past.
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    model = get_peft_model(fresh(), AdaPruneConfig(), name)
    run = trainer(model, tmp_path, AdaPruneCallback(adapter_name=name), **steps, **best)
    run.train()
    assert 0.6 * STEPS <= run.state.best_global_step < STEPS
    assert run.evaluate()["eval_loss"] == run.state.best_metric
    assert model.peft_config[name].training["num_steps"] == run.state.best_global_step


def test_the_best_of_a_lora_run_is_loaded(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    run = trainer(fresh(), tmp_path, LoraCallback(), learning_rate=0.3, **options)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert run.state.best_global_step < STEPS
    assert run.evaluate()["eval_loss"] == pytest.approx(losses[run.state.best_global_step], rel=1e-6)


def largest_score(model: nn.Module) -> float:
    return max(layer.adaprune_scores["default"].max().item() for _, layer in adaprune_layers(model))


def test_after_the_best_model_is_loaded_scores_have_their_unit_again(tmp_path: Path) -> None:
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    runs = {
        best: trainer(fresh(), tmp_path / str(best), AdaPruneCallback, load_best_model_at_end=best, **options)
        for best in (False, True)
    }
    for run in runs.values():
        run.train()
    assert runs[True].state.best_global_step > 0.6 * STEPS
    assert largest_score(runs[True].model) == pytest.approx(largest_score(runs[False].model), rel=0.1)


def test_scores_that_have_settled_have_their_unit_again_when_a_run_is_resumed_to_be_longer(tmp_path: Path) -> None:
    trainer(fresh(), tmp_path, AdaPruneCallback, save_steps=STEPS).train()
    longer = trainer(fresh(), tmp_path, AdaPruneCallback, num_train_epochs=4)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 2 * STEPS
    assert largest_score(longer.model) == pytest.approx(0.02, rel=0.1)


def test_no_evaluation_of_the_ramp_is_the_best_or_ends_training_early(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 6, "load_best_model_at_end": True}
    # The loss falls: were a high one better, the first would be the best.
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    run = trainer(fresh(), tmp_path, AdaPruneCallback, EarlyStoppingCallback(4), learning_rate=5e-4, **options)
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    assert losses[2] == max(losses.values())
    assert run.state.best_global_step == max((loss, step) for step, loss in losses.items() if step >= 0.6 * STEPS)[1]
    assert run.state.global_step == STEPS


def test_algorithm_one_stops_the_trainer_once_its_target_is_exceeded(tmp_path: Path) -> None:
    config = AdaPruneConfig.from_preset("paper", final_sparsity=0.3, drift=0.03)
    model = fresh()
    run = trainer(model, tmp_path, AdaPruneCallback(config), learning_rate=1e-4)
    run.train()
    assert run.state.global_step < STEPS
    assert sparsity_report(model).sparsity > 0.3
    assert any("word_embeddings" in name for name, _ in adaprune_layers(model))


def test_a_learning_rate_that_makes_noise_of_the_masks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.callback.logger.warning", said.append)
    trainer(fresh(), tmp_path / "a", AdaPruneCallback, max_steps=2).train()
    assert not [message for message in said if "learning_rate" in message]
    trainer(fresh(), tmp_path / "b", AdaPruneCallback, max_steps=2, learning_rate=1e-2).train()
    assert "`learning_rate=0.01` moves a score by 1 a step, in a range of 2" in said[0]


def test_training_an_adapter_that_nothing_prunes_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.tuner.pruner_reminder.logger.warning", said.append)
    model = fresh(wrapped=True)
    trainer(model, tmp_path / "a", AdaPruneCallback, max_steps=12).train()
    # Another adapter, that waits: the first is trained on.
    model.add_adapter("waiting", AdaPruneConfig())
    trainer(model, tmp_path / "b", AdaPruneCallback, max_steps=12).train()
    # The base alone, and no masks at all.
    with model.disable_adapter():
        for _ in range(12):
            model(**make_batch())
    trainer(model.unload(), tmp_path / "c", max_steps=12).train()
    assert said == []
    for _ in range(2):
        trainer(fresh(wrapped=True), tmp_path / "d", max_steps=12).train()
    # A second run of an adapter whose first had the callback.
    again = fresh(wrapped=True)
    trainer(again, tmp_path / "e", AdaPruneCallback, max_steps=2).train()
    trainer(again, tmp_path / "f", max_steps=12).train()
    assert [message.split(":")[0] for message in said] == ["Adapter 'default' is being trained without a `Pruner`"] * 3


def test_the_best_of_a_second_adapter_is_its_own(tmp_path: Path) -> None:
    model = fresh(wrapped=True)
    model.config.num_labels = 4  # the second has another head
    callback = AdaPruneCallback(AdaPruneConfig(final_sparsity=0.25), adapter_name="second")
    options = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True}
    run = trainer(model, tmp_path, callback, **options)
    run.train()
    assert run.state.best_metric is not None
    assert run.evaluate()["eval_loss"] == pytest.approx(run.state.best_metric)
    assert sparsity_report(model, "second").sparsity == pytest.approx(0.25, abs=1e-3)
    assert "load_adapter" not in vars(model)


def test_a_run_that_is_resumed_at_its_last_step_is_pruned_to_its_target(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(fresh(), tmp_path, AdaPruneCallback, Kill(9), save_steps=8).train()
    model = fresh()
    with pytest.warns(UserWarning, match=r"Training ended at a sparsity of 0\.\d+, below `final_sparsity=0.5`"):
        trainer(model, tmp_path, AdaPruneCallback, num_train_epochs=1).train(resume_from_checkpoint=True)
    assert sparsity_report(model).sparsity == 0.5


def test_what_others_do_to_the_head_is_not_scaled(tmp_path: Path) -> None:
    class Fill(TrainerCallback):
        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            nn.init.constant_(model.classifier.modules_to_save["default"].bias, 0.5)

    model = fresh()
    trainer(model, tmp_path, AdaPruneCallback, Fill(), max_steps=1, learning_rate=1e-9).train()
    head: Any = model.classifier.modules_to_save["default"]
    torch.testing.assert_close(head.bias.detach(), torch.full_like(head.bias, 0.5))


def test_an_adapter_that_no_run_has_pruned_is_told_of_as_it_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.storage.adapter_state.logger.warning_once", said.append)
    # Early checkpoints of a run that prunes, and an adapter that is to prune nothing.
    config = AdaPruneConfig(pruning_start=0.5)
    trainer(fresh(), tmp_path, AdaPruneCallback(config), save_steps=2, max_steps=3).train()
    fresh(wrapped=True, final_sparsity=0.0).save_pretrained(tmp_path / "nothing")
    assert said == []
    fresh(wrapped=True).save_pretrained(tmp_path / "forgotten")
    assert [message.split(":")[0] for message in said] == ["The adapter is saved with nothing pruned"]


def test_an_optimizer_that_hardly_moves_scores_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.callback.logger.warning", said.append)
    for optim in ("adamw_torch", "adafactor", "sgd"):
        trainer(fresh(), tmp_path, AdaPruneCallback, optim=optim, max_steps=1).train()
    assert [message[:8] for message in said] == ["With SGD"]


def test_a_model_with_another_adapter_and_no_masks_is_refused_at_once(tmp_path: Path) -> None:
    model = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(NotPrunedError, match="is a PeftModel without masks: pass the plain model, or one that"):
        trainer(model, tmp_path, AdaPruneCallback)


def test_a_checkpoint_of_another_form_than_the_opened_adapter_is_refused(tmp_path: Path) -> None:
    model = fresh()
    model.save_pretrained(tmp_path / "base")
    plain = type(model).from_pretrained(tmp_path / "base")
    trainer(plain, tmp_path / "run", AdaPruneCallback).train()
    plain.save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True)
    with pytest.raises(NotPrunedError, match=r"its checkpoint has no masks under the names"):
        trainer(opened, tmp_path / "run", AdaPruneCallback).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-10")
        )


def test_the_best_masks_are_kept_where_no_whole_groups_come_to_the_target(tmp_path: Path) -> None:
    class Shake(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            generator = torch.Generator().manual_seed(state.global_step)
            for _, layer in adaprune_layers(model):
                scores = layer.adaprune_scores["default"]
                scores.data.copy_(torch.rand(scores.shape, generator=generator))

    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Watch(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            kept[state.global_step] = {name: layer.scored_mask("default") for name, layer in adaprune_layers(model)}

    config = AdaPruneConfig(granularity="neuron+head", scope="global", settle=False, score_init="magnitude")
    model = get_peft_model(make_model("llama"), config)
    every = {f"{what}_strategy": "steps" for what in ("eval", "save")} | {"eval_steps": 1, "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy"}
    run = trainer(model, tmp_path, Shake, AdaPruneCallback, Watch, max_steps=8, **every, **best)
    scores = iter([0.0] * 6 + [1.0, 0.0])
    run.compute_metrics = lambda output: {"accuracy": next(scores)}
    run.train()
    now = {name: layer.scored_mask("default") for name, layer in adaprune_layers(model)}
    assert run.state.best_global_step == 7
    assert all(torch.equal(now[name], mask) for name, mask in kept[7].items())
    assert not all(torch.equal(now[name], mask) for name, mask in kept[8].items())


def test_algorithm_one_resumed_where_it_ended_changes_nothing(tmp_path: Path) -> None:
    def run(**kwargs: Any) -> dict[str, torch.Tensor]:
        callback = AdaPruneCallback(AdaPruneConfig.from_preset("paper", final_sparsity=0.1))
        made = trainer(fresh(), tmp_path, callback, save_steps=1, learning_rate=1e-4)
        made.train(**kwargs)
        steps.append(made.state.global_step)
        return {name: tensor.clone() for name, tensor in made.model.state_dict().items()}

    steps: list[int] = []
    whole = run()
    assert 1 < steps[0] < STEPS
    resumed = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps[0]}"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_an_optimizer_that_was_made_before_the_masks_is_refused(tmp_path: Path) -> None:
    def run(model: Any) -> Trainer:
        optimizers = (torch.optim.AdamW(model.parameters(), lr=5e-5), None)
        args = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, max_steps=2)
        return Trainer(model, args, train_dataset=DATA, optimizers=optimizers, callbacks=[AdaPruneCallback])

    with pytest.raises(ConfigError, match="optimizer was created before the masks"):
        run(fresh()).train()
    model = fresh(wrapped=True)
    run(model).train()
    assert sparsity_report(model).sparsity == 0.5


def test_a_configuration_for_a_model_that_has_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="already has an adapter"):
        trainer(fresh(wrapped=True), tmp_path, AdaPruneCallback(AdaPruneConfig()))


def test_a_model_that_is_remade_for_training_is_refused_rather_than_trained_unpruned(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True)
    run = Trainer(model_init=lambda: fresh(), args=args, train_dataset=DATA, callbacks=[AdaPruneCallback])
    with pytest.raises(NotPrunedError, match=r"model has no masks: .*a `model_init` must return"):
        run.train()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_callback_adds_the_adapter_of_another_task_to_a_model(wrapped: bool, tmp_path: Path) -> None:
    model = fresh(wrapped)
    if not wrapped:
        model.add_adapter(AdaPruneConfig())
    callback = AdaPruneCallback(AdaPruneConfig(final_sparsity=0.75), adapter_name="second")
    trainer(model, tmp_path, callback).train()
    assert sparsity_report(model).sparsity == pytest.approx(0.75, abs=1e-3)
    assert sparsity_report(model, "default").sparsity == 0
    with pytest.raises(NotPrunedError, match=r"'third': it has \['default', 'second'\]"):
        sparsity_report(model, "third")


def test_a_callback_without_a_configuration_names_the_adapters_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no adapter 'other', but \['default'\]: set `adapter_name=`"):
        trainer(fresh(wrapped=True), tmp_path, AdaPruneCallback(adapter_name="other"))


@pytest.mark.parametrize("given", [0.8, AdaPruneConfig, LoraConfig()])
def test_a_callback_takes_a_configuration_of_its_own_kind(given: Any) -> None:
    with pytest.raises(ConfigError, match="`AdaPruneCallback` takes an `AdaPruneConfig`, got"):
        AdaPruneCallback(given)


@pytest.mark.parametrize("sparsity", [0.5, 0.01])
def test_a_checkpoint_of_another_form_of_model_is_refused(sparsity: float, tmp_path: Path) -> None:
    callback = AdaPruneCallback(AdaPruneConfig(final_sparsity=sparsity))
    trainer(fresh(), tmp_path, callback).train()
    with pytest.raises(NotPrunedError, match=r"after 10 of 16 steps, but its checkpoint has no masks under the names"):
        trainer(fresh(wrapped=True, final_sparsity=sparsity), tmp_path, AdaPruneCallback).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-10")
        )


def test_frozen_scores_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.callback.logger.warning", said.append)
    model = fresh()
    model.add_adapter(AdaPruneConfig())
    model.bert.requires_grad_(False)
    trainer(model, tmp_path, AdaPruneCallback).train()
    assert [message.split(":")[0] for message in said] == ["The scores of adapter 'default' are frozen"]


def test_a_second_callback_for_the_same_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be trained by one `Pruner`"):
        trainer(fresh(), tmp_path, AdaPruneCallback, AdaPruneCallback).train()


def test_the_card_of_a_model_init_is_the_adapters_own(tmp_path: Path) -> None:
    run = Trainer(
        None,
        TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, max_steps=4),
        train_dataset=DATA,
        model_init=lambda: fresh(wrapped=True),
        callbacks=[AdaPruneCallback],
    )
    run.train()
    run.save_model()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "generated text, overwritten at every save" in card
    assert "- adaprune\n" in card


def test_an_optimizer_that_was_passed_in_is_what_the_adapter_tells_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.callback.logger.warning", said.append)
    model = fresh(wrapped=True)
    optimizer = SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    run = trainer(model, tmp_path, AdaPruneCallback, max_steps=2)
    run.optimizer = optimizer
    run.train()
    training = model.peft_config["default"].training
    assert (training["learning_rate"], training["optim"]) == (1e-2, "SGD")
    assert [message[:20] for message in said] == ["`learning_rate=0.01`", "With SGD, scores bar"]


def test_an_optimizer_without_the_scores_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.callback.logger.warning", said.append)
    model = fresh(wrapped=True)
    head = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    run = trainer(model, tmp_path, AdaPruneCallback, max_steps=2)
    run.optimizer = AdamW(head, lr=1e-4)
    run.train()
    assert [message[:27] for message in said] == ["The optimizer has no scores"]


def test_the_configuration_of_a_stored_adapter_is_no_recipe_until_it_is_fresh(tmp_path: Path) -> None:
    trained = fresh(wrapped=True, final_sparsity=0.3)
    trainer(trained, tmp_path / "out", AdaPruneCallback, max_steps=2).train()
    trained.save_pretrained(tmp_path / "adapter")
    stored = AdaPruneConfig.from_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"for a new adapter with the same options, pass `config.fresh\(\)`"):
        AdaPruneCallback(stored)
    stored.inference_mode = False
    model = get_peft_model(make_model(), stored)
    with pytest.raises(NotPrunedError, match=r"stored adapter, but not its masks.*`config.fresh\(\)`"):
        model(**make_batch())
    for config, sparsity in ((stored.fresh(), 0.3), (trained.peft_config["default"].fresh(final_sparsity=0.6), 0.6)):
        again = fresh()
        trainer(again, tmp_path / "again", AdaPruneCallback(config), max_steps=2).train()
        assert sparsity_report(again).sparsity == pytest.approx(sparsity, abs=1e-4)


def test_a_plain_copy_computes_in_its_own_precision_after_mixed_precision(tmp_path: Path) -> None:
    model = fresh()
    trainer(model, tmp_path, AdaPruneCallback, bf16=True).train()
    plain = merged(model)
    plain.save_pretrained(tmp_path / "plain")
    reopened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits_of(plain), logits_of(reopened))


def test_another_run_leaves_no_record_of_the_former(tmp_path: Path) -> None:
    model = fresh()
    trainer(model, tmp_path, AdaPruneCallback).train()
    assert model.peft_config["default"].training["num_steps"] == STEPS
    train_masks(model)
    assert model.peft_config["default"].training is None


def test_labels_that_numpy_has_made_are_saved(tmp_path: Path) -> None:
    model, numbers = fresh(), np.unique(np.array([3, 5, 7]))
    model.config.id2label = dict(enumerate(numbers))
    model.config.label2id = {name: np.int64(number) for number, name in enumerate(numbers)}
    trainer(model, tmp_path, AdaPruneCallback).train()
    model.save_pretrained(tmp_path / "adapter")
    stored = AdaPruneConfig.from_pretrained(str(tmp_path / "adapter")).model_config or {}
    assert stored["id2label"] == {"0": 3, "1": 5, "2": 7}
    assert stored["label2id"] == {"3": 0, "5": 1, "7": 2}


def test_renamed_labels_are_renamed_in_both_directions(tmp_path: Path) -> None:
    model = fresh()
    model.add_adapter(AdaPruneConfig())
    train_masks(model)
    model.config.id2label = {0: "low", 1: "middle", 2: "high"}
    model.save_pretrained(tmp_path)
    stored = AdaPruneConfig.from_pretrained(str(tmp_path)).model_config or {}
    assert stored["label2id"] == {"low": 0, "middle": 1, "high": 2}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_no_pruner_is_missed_where_masks_are_not_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.tuner.pruner_reminder.logger.warning", said.append)
    model = fresh()
    trainer(model, tmp_path, AdaPruneCallback).train()
    model.add_adapter(LoraConfig(target_modules=["query"]), "lora")
    model.set_adapter(["default", "lora"])
    trainer(model, tmp_path / "lora", max_steps=12).train()
    assert not said


def test_a_nan_in_half_precision_on_a_cpu_stops_training_before_it_reaches_the_model(tmp_path: Path) -> None:
    class Broken(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step == 1 else loss

    trainer = make_trainer(make_model(), tmp_path, max_steps=3, fp16=True)
    broken = Broken(trainer.model, trainer.args, train_dataset=trainer.train_dataset, callbacks=[AdaPruneCallback])
    with pytest.raises(NonFiniteError):
        broken.train()
    assert all(parameter.isfinite().all() for parameter in broken.model.parameters())


def test_masks_of_all_processes_are_compared_at_each_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    monkeypatch.setattr("hf_adaprune.training.pruner.check_same_masks", lambda masks, step: compared.append(step))
    options: dict[str, Any] = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    make_trainer(make_model(), tmp_path, AdaPruneCallback, **options).train()
    assert compared == [2, 4, 5, 5]
