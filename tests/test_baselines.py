import copy
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import load_base, logits_of, make_trainer
from peft import LoraConfig, PeftModel, get_peft_model
from test_callback import Kill
from tiny import HEADS, make_batch, make_model, save_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner, sparsity_report
from hf_adaprune.analysis import Recovery, RecoveryCallback
from hf_adaprune.baselines import (
    ABLATIONS,
    METHODS,
    FixedMaskCallback,
    IterativeMagnitudeCallback,
    MagnitudeCallback,
    MovementCallback,
    NoRecoveryCallback,
    RandomMaskCallback,
    SMPCallback,
    TrainedWeightsCallback,
    ablate,
    make_callback,
)
from hf_adaprune.baselines.ablations import redraw_weight, scale_weight, shuffle_mask
from hf_adaprune.baselines.magnitude import MagnitudePruner
from hf_adaprune.choices import Scope
from hf_adaprune.errors import ConfigError, NotPrunedError
from hf_adaprune.tuner.layer import AdaPruneLayer
from hf_adaprune.tuner.masked_layers import adaprune_layers


MASKED_ONLY = ("adaprune", "no_recovery", "smp", "random")
TRAINED = ("magnitude", "imp", "movement")
HEAD = ("bert.pooler", "classifier")

State = dict[str, torch.Tensor]


class Watch(TrainerCallback):
    """Keep what a function makes of the model at one of the Trainer's events."""

    def __init__(self, event: str, look: Callable[[Any], Any]) -> None:
        self.seen: list[Any] = []
        setattr(self, event, lambda args, state, control, model=None, **kwargs: self.seen.append(look(model)))


def state_of(model: nn.Module) -> State:
    """Return the weights of a model under the names that they have in a plain one."""
    added = (".adaprune_", ".lora_", ".original_module")
    state = {
        name.replace(".base_layer", "").replace(".modules_to_save.default", ""): tensor.detach().clone()
        for name, tensor in model.state_dict().items()
        if not any(part in name for part in added)
    }
    return state


def masks_of(model: nn.Module) -> State:
    return {name: layer.mask("default").clone() for name, layer in adaprune_layers(model)}


def train(
    method: str | TrainerCallback, folder: Path, sparsity: float = 0.6, watch: Any = None, **options: Any
) -> tuple[Any, State, Trainer]:
    """Train a random BERT by a method; return the callback, the weights it began with, and the Trainer."""
    callback = make_callback(method, AdaPruneConfig(final_sparsity=sparsity)) if isinstance(method, str) else method
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    before = state_of(model)
    options = {"max_steps": 10, "learning_rate": 1e-3 if method in TRAINED else 5e-5} | options
    trainer = make_trainer(model, folder, *(each for each in (callback, watch) if each), **options)
    for _ in range(getattr(callback, "num_rounds", 1)):
        trainer.train()
    return callback, before, trainer


def changed(before: State, after: State) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@pytest.mark.parametrize("method", [method for method in METHODS if method not in {*TRAINED, "finetune"}])
def test_the_body_is_frozen_and_the_head_is_trained(method: str, tmp_path: Path) -> None:
    _, before, trainer = train(method, tmp_path)
    assert changed(before, state_of(trainer.model)) == {name for name in before if name.startswith(HEAD)}


def test_fine_tuning_trains_everything(tmp_path: Path) -> None:
    _, before, trainer = train("finetune", tmp_path)
    assert changed(before, state_of(trainer.model)) == before.keys()


@pytest.mark.parametrize("method", MASKED_ONLY)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_masks_end_at_exactly_the_sparsity_asked_for(method: str, sparsity: float, tmp_path: Path) -> None:
    _, _, trainer = train(method, tmp_path, sparsity, max_steps=5)
    report = sparsity_report(trainer.model)
    assert report.num_pruned == round(sparsity * report.num_weights)


@pytest.mark.parametrize("method", TRAINED)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_trained_weights_end_as_a_plain_model_with_exactly_so_many_zeros(
    method: str, sparsity: float, tmp_path: Path
) -> None:
    callback, before, trainer = train(method, tmp_path, sparsity, max_steps=5)
    after = state_of(trainer.model)
    assert set(trainer.model.state_dict()) == set(make_model().state_dict())
    assert not any(isinstance(module, AdaPruneLayer) for module in trainer.model.modules())
    weights = [after[f"{name}.weight"] for name in callback.masks]
    num_zeros = sum(int((weight == 0).count_nonzero()) for weight in weights)
    assert num_zeros == round(sparsity * sum(weight.numel() for weight in weights))
    assert changed(before, after) == set(before)


def test_the_sparsity_of_the_whole_model_is_known_while_its_weights_are_trained(tmp_path: Path) -> None:
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            report = sparsity_report(model)
            seen.append(report.sparsity_whole_model * report.num_parameters - report.num_pruned)

    callback, _, trainer = train("magnitude", tmp_path, watch=Watch(), max_steps=3)
    assert seen == pytest.approx([0, 0, 0])
    assert sparsity_report(callback.rewound(trainer.model)).num_parameters == make_model().num_parameters()


@pytest.mark.parametrize("method", TRAINED)
def test_rewinding_restores_the_pretrained_weights_to_the_bit_and_keeps_masks_and_head(
    method: str, tmp_path: Path
) -> None:
    callback, before, trainer = train(method, tmp_path)
    trained = state_of(trainer.model)
    rewound = callback.rewound(trainer.model)
    after = state_of(rewound)
    head = {name for name in before if name.startswith(HEAD)}
    assert changed(before, after) == head
    assert not changed({name: trained[name] for name in head}, {name: after[name] for name in head})
    for name, mask in masks_of(rewound).items():
        assert torch.equal(mask, trained[f"{name}.weight"] != 0)
    assert not changed(trained, state_of(trainer.model))
    plain = copy.deepcopy(trainer.model)
    plain.load_state_dict({name: value * masked(callback, name) for name, value in after.items()})
    assert torch.equal(logits_of(rewound), logits_of(plain))


def masked(callback: TrainedWeightsCallback, name: str) -> torch.Tensor:
    return callback.masks.get(name.removesuffix(".weight"), torch.tensor(1))


def test_a_rewound_model_is_an_adapter_that_opens_on_the_base(base_path: Path, tmp_path: Path) -> None:
    callback = MovementCallback(0.5)
    trainer = make_trainer(load_base(base_path), tmp_path, callback)
    trainer.train()
    rewound = callback.rewound(trainer.model)
    rewound.save_pretrained(tmp_path / "adapter")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(opened), logits_of(rewound))
    assert sparsity_report(opened).sparsity == 0.5


@pytest.mark.parametrize("method", ["magnitude", "movement", "smp", "random", "no_recovery", "lora"])
def test_a_resumed_baseline_equals_an_uninterrupted_one(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5}
    _, _, whole = train(method, tmp_path, **options)
    callback = make_callback(method, AdaPruneConfig(final_sparsity=0.6))
    assert callback is not None
    model = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    learning_rate = whole.args.learning_rate
    resumed = make_trainer(model, tmp_path, callback, max_steps=10, learning_rate=learning_rate, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not changed(state_of(whole.model), state_of(resumed.model))
    assert not changed(masks_of(whole.model), masks_of(resumed.model))
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_random_masks_are_drawn_by_the_seed_and_spare_no_layer(tmp_path: Path) -> None:
    first, again, other = (
        train("random", tmp_path / str(number), seed=seed)[2].model for number, seed in enumerate((1, 1, 2))
    )
    assert not changed(masks_of(first), masks_of(again))
    assert changed(masks_of(first), masks_of(other)) == set(masks_of(first))
    for module in sparsity_report(first).modules:
        # Five deviations of a share of so many draws.
        assert abs(module.sparsity - 0.6) < 5 * math.sqrt(0.6 * 0.4 / module.num_weights)


def test_of_random_masks_only_the_head_is_given_to_the_optimizer(tmp_path: Path) -> None:
    model = make_model()
    trainer = make_trainer(model, tmp_path, RandomMaskCallback())
    size = sum(p.numel() for name in HEAD for p in make_model().get_submodule(name).parameters())
    assert trainer.get_num_trainable_parameters() == size


def test_fixed_masks_past_their_threshold_do_not_end_training(tmp_path: Path) -> None:
    config = AdaPruneConfig.from_preset("paper", final_sparsity=0.1)
    _, _, first = train(AdaPruneCallback(config), tmp_path, learning_rate=1e-2)
    assert first.state.global_step < 10
    masks = masks_of(first.model)
    again = make_trainer(first.model, tmp_path, FixedMaskCallback(), max_steps=10)
    again.train()
    assert again.state.global_step == 10
    assert not changed(masks, masks_of(again.model))


@pytest.mark.parametrize("method", MASKED_ONLY)
def test_a_finished_run_leaves_no_hook_on_the_head(method: str, tmp_path: Path) -> None:
    head = train(method, tmp_path, max_steps=2)[2].model.get_submodule("classifier").modules_to_save["default"]
    assert not head._load_state_dict_post_hooks


def test_over_fixed_masks_the_head_learns_at_the_rate_it_is_given(tmp_path: Path) -> None:
    _, before, trainer = train("random", tmp_path, max_steps=1, learning_rate=1e-3)
    after = state_of(trainer.model)
    # The first step of Adam is the learning rate, wherever the gradient is not too small.
    assert max(float((after[name] - before[name]).abs().max()) for name in before) == pytest.approx(1e-3, rel=1e-2)


def test_lora_is_put_on_what_adaprune_masks(tmp_path: Path) -> None:
    _, _, trainer = train("lora", tmp_path)
    _, _, pruned = train("adaprune", tmp_path)
    adapted = {name.partition(".lora_A")[0] for name in trainer.model.state_dict() if ".lora_A" in name}
    assert adapted == set(masks_of(pruned.model))
    matrices = [p for name, p in trainer.model.named_parameters() if "lora_" in name]
    assert all(8 in matrix.shape for matrix in matrices)


def begin(callback: AdaPruneCallback, folder: Path, **options: Any) -> tuple[Any, Pruner]:
    """Return the model and the pruner of a run of 200 steps that is about to begin."""
    trainer = make_trainer(make_model(), folder, callback, max_steps=200, **options)
    trainer.state.max_steps = 200
    trainer.callback_handler.optimizer = trainer.create_optimizer()
    trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
    assert callback.pruner is not None
    return trainer.model, callback.pruner


def test_magnitude_pruning_keeps_the_largest_of_all_and_stops_with_its_ramp(tmp_path: Path) -> None:
    model, pruner = begin(MagnitudeCallback(0.5), tmp_path)
    assert isinstance(pruner, MagnitudePruner)
    layers = dict(adaprune_layers(model))
    generator = torch.Generator().manual_seed(0)
    sparsities, masks = [], []
    for _ in range(200):
        with torch.no_grad():
            for layer in layers.values():
                layer.base_weight.copy_(torch.randn(layer.base_weight.shape, generator=generator))
        pruner.step()
        sparsities.append(pruner.sparsity)
        masks.append(masks_of(model))
        if len(masks) == 100:
            kept, pruned = (
                torch.cat([layer.base_weight.abs()[layer.mask("default") ^ flip] for layer in layers.values()])
                for flip in (False, True)
            )
            assert pruned.max() < kept.min()
    assert sparsities[19] == 0
    # Half of the ramp between .1 and .8 is at .45.
    assert sparsities[89] == pytest.approx(0.5 * (1 - 0.5**3), abs=1e-4)
    assert sparsities[159] == sparsities[199] == 0.5
    assert [index + 1 for index in range(1, 200) if changed(masks[index - 1], masks[index])] == list(range(22, 162, 2))


@pytest.mark.parametrize(
    ("sparsity", "rate", "rounds"),
    [
        (0.0, 0.2, [0]),
        (0.2, 0.2, [0, 0.2]),
        (0.5, 0.2, [0, 0.2, 0.36, 0.488, 0.5]),
        (0.75, 0.5, [0, 0.5, 0.75]),
    ],
)
def test_each_round_prunes_a_share_of_the_rest_and_the_last_one_what_is_missing(
    sparsity: float, rate: float, rounds: list[float], tmp_path: Path
) -> None:
    callback = IterativeMagnitudeCallback(sparsity, rate)
    watch = Watch("on_step_end", masks_of)
    # A learning rate at which what is left shrinks below what was pruned.
    train(callback, tmp_path, watch=watch, max_steps=2, learning_rate=0.05)
    watch.seen = watch.seen[::2]
    assert callback.num_rounds == len(watch.seen) == len(rounds)
    shares = [1 - float(torch.cat([mask.view(-1) for mask in masks.values()]).float().mean()) for masks in watch.seen]
    assert shares == pytest.approx(rounds, abs=1e-4)
    for before, after in zip(watch.seen, watch.seen[1:], strict=False):
        assert all((mask <= before[name]).all() for name, mask in after.items())


@pytest.mark.parametrize("method", ["magnitude", "movement"])
def test_recovery_is_counted_where_weights_are_trained(method: str, tmp_path: Path) -> None:
    recovery, masks = RecoveryCallback(), Watch("on_step_end", masks_of)
    callback: Any = make_callback(method, AdaPruneConfig(final_sparsity=0.6))
    options: dict[str, Any] = {"max_steps": 10, "learning_rate": 1e-2}
    make_trainer(make_model(), tmp_path, callback, recovery, masks, **options).train()
    expected = Recovery.of(masks.seen)
    assert 0 < recovery.recovery.share_of_kept == expected.share_of_kept < 1
    assert recovery.recovery.recovered().keys() == expected.recovered().keys() == callback.masks.keys()


def test_a_round_that_was_interrupted_is_repeated(tmp_path: Path) -> None:
    callback, interrupt = IterativeMagnitudeCallback(0.36, 0.2), Kill(1)
    watch = Watch("on_step_end", masks_of)
    trainer = make_trainer(make_model(), tmp_path, callback, watch, interrupt, max_steps=2, learning_rate=1e-3)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        interrupt.step = 0
        trainer.train()
        interrupt.step = 1
    interrupt.step = 0
    trainer.train()
    shares = [1 - float(torch.cat([mask.view(-1) for mask in masks.values()]).float().mean()) for masks in watch.seen]
    assert shares == pytest.approx([0] * 3 + [0.2] * 3 + [0.36] * 2, abs=1e-4)
    assert not isinstance(trainer.model.get_submodule("bert.encoder.layer.0.output.dense"), AdaPruneLayer)


def test_what_is_pruned_after_a_round_is_what_that_round_has_made_small(tmp_path: Path) -> None:
    trained, masks = Watch("on_train_end", state_of), Watch("on_step_begin", masks_of)
    callback = IterativeMagnitudeCallback(0.3, rate=0.3)
    model = make_model()
    trainer = make_trainer(model, tmp_path, callback, trained, masks, max_steps=1, learning_rate=0.1)
    trainer.train()
    trainer.train()
    sizes = {name: trained.seen[0][f"{name}.weight"].abs() for name in masks.seen[1]}
    kept, pruned = (
        torch.cat([sizes[name][mask ^ flip] for name, mask in masks.seen[1].items()]) for flip in (False, True)
    )
    assert pruned.max() < kept.min()


def test_each_round_starts_over_as_if_there_had_been_none(tmp_path: Path) -> None:
    starts = Watch("on_step_begin", state_of)
    callback, before, trainer = train(IterativeMagnitudeCallback(0.5), tmp_path, watch=starts, learning_rate=1e-3)
    for start in starts.seen[::10]:
        assert not changed(before, start)

    class Given(IterativeMagnitudeCallback):
        """Train one round, with the masks that the other run has found."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            for name, layer in adaprune_layers(model):
                layer.set_mask("default", callback.masks[name])
                layer.adaprune_scores["default"].data.copy_(callback.masks[name])
            super().on_train_begin(args, state, control, model, **kwargs)

    _, _, once = train(Given(0.0), tmp_path, learning_rate=1e-3)
    assert not changed(state_of(trainer.model), state_of(once.model))


def test_rounds_are_not_resumed(tmp_path: Path) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 5, "max_steps": 10}
    make_trainer(make_model(), tmp_path, IterativeMagnitudeCallback(), **options).train()
    trainer = make_trainer(make_model(), tmp_path, IterativeMagnitudeCallback(), **options)
    with pytest.raises(ConfigError, match="train without `resume_from_checkpoint`"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_gradient_of_a_movement_score_is_the_weight_times_that_of_the_masked_weight(tmp_path: Path) -> None:
    model, _ = begin(MovementCallback(), tmp_path)
    model.eval()
    reference = make_model()
    generator = torch.Generator().manual_seed(0)
    for name, layer in adaprune_layers(model):
        mask = torch.rand(layer.base_weight.shape, generator=generator) < 0.5
        layer.set_mask("default", mask)
        reference.get_submodule(name).weight.data.mul_(mask)
    reference(**make_batch()).loss.backward()
    model(**make_batch()).loss.backward()
    for name, layer in adaprune_layers(model):
        dense = reference.get_submodule(name).weight.grad
        close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-9)
        close(layer.adaprune_scores["default"].grad, layer.base_weight * dense)
        close(layer.base_weight.grad, layer.mask("default") * dense)


@pytest.mark.parametrize(("callback", "step"), [(MovementCallback(), 1e-2), (SMPCallback(), 2e-2)])
def test_scores_move_by_their_own_learning_rate(callback: Any, step: float, tmp_path: Path) -> None:
    watch = Watch(
        "on_step_end", lambda model: [layer.adaprune_scores["default"] for _, layer in adaprune_layers(model)]
    )
    train(callback, tmp_path, watch=watch, max_steps=1, learning_rate=3e-4)
    stored = torch.cat([scores.detach().view(-1) for scores in watch.seen[0]]) * callback.config.score_lr_ratio
    # The first step of Adam is the learning rate, wherever the gradient is not too small.
    assert float((stored - 0.01).abs().max()) == pytest.approx(step, rel=1e-2)


def test_the_penalty_of_smp_has_its_closed_form_and_grows_cubically(tmp_path: Path) -> None:
    callback = SMPCallback(max_penalty=100.0)
    model, pruner = begin(callback, tmp_path)
    layers = dict(adaprune_layers(model))
    generator = torch.Generator().manual_seed(0)
    means, slopes = [], {}
    for name, layer in layers.items():
        theta = torch.randn(layer.base_weight.shape, generator=generator)
        layer.adaprune_scores["default"].data.copy_(theta / callback.config.score_lr_ratio)
        sigmoid = theta.sigmoid()
        means.append(float(sigmoid.mean()))
        slopes[name] = sigmoid * (1 - sigmoid) / (sigmoid.numel() * len(layers))
    for num_steps, factor in ((0, 0.0), (50, 100 * (1 - 0.75**3)), (200, 100.0)):
        pruner.num_steps = num_steps
        model.zero_grad()
        penalty = callback.penalty()
        penalty.backward()
        assert penalty.item() == pytest.approx(factor * sum(means) / len(means), rel=1e-4)
        for name, layer in layers.items():
            torch.testing.assert_close(layer.adaprune_scores["default"].grad, factor * slopes[name])


def test_the_penalty_is_in_the_loss_of_training_alone(tmp_path: Path) -> None:
    callback = SMPCallback()
    model, pruner = begin(callback, tmp_path)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    pruner.num_steps = 100
    model.train()
    trained = model(**make_batch()).loss.item()
    model.eval()
    evaluated = model(**make_batch()).loss.item()
    assert trained - evaluated == pytest.approx(callback.penalty().item(), rel=1e-4)
    pruner.prune_to(0.5)
    callback.on_train_end(TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl(), model=model)
    ended = [model.train(training)(**make_batch()).loss.item() for training in (False, True)]
    assert ended[0] == pytest.approx(ended[1])


def test_smp_prunes_each_kind_of_matrix_alike_and_its_layers_unlike(tmp_path: Path) -> None:
    _, _, trainer = train("smp", tmp_path, 0.5)
    report = sparsity_report(trainer.model)
    assert set(report.by_component().values()) == {0.5}
    assert {module.sparsity for module in report.modules} != {0.5}


def test_smp_without_a_loss_to_add_to_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without `label_smoothing_factor`"):
        train("smp", tmp_path, label_smoothing_factor=0.1)


@pytest.mark.parametrize("preset", ["default", "paper"])
def test_what_is_pruned_never_comes_back_without_recovery(preset: str, tmp_path: Path) -> None:
    config = AdaPruneConfig.from_preset(preset, final_sparsity=0.4)
    came_back = {}
    for callback in (NoRecoveryCallback(config), AdaPruneCallback(config)):
        watch = Watch("on_step_end", masks_of)
        train(callback, tmp_path, watch=watch, learning_rate=2e-4 if preset == "default" else 1e-2, max_steps=20)
        came_back[type(callback)] = sum(
            int((mask & ~before[name]).count_nonzero())
            for before, after in zip(watch.seen, watch.seen[1:], strict=False)
            for name, mask in after.items()
        )
    assert came_back[NoRecoveryCallback] == 0
    assert came_back[AdaPruneCallback] > 0


@pytest.mark.parametrize("scope", ["module", "kind", "global"])
@pytest.mark.parametrize("sparsity", [0.001, 0.37])
def test_scores_that_leap_bring_nothing_back_and_end_at_the_target(
    scope: Scope, sparsity: float, tmp_path: Path
) -> None:
    model, pruner = begin(NoRecoveryCallback(AdaPruneConfig(final_sparsity=sparsity, scope=scope)), tmp_path)
    generator = torch.Generator().manual_seed(0)
    masks = [masks_of(model)]
    for _ in range(200):
        for _, layer in adaprune_layers(model):
            scores = layer.adaprune_scores["default"].data
            scores.copy_(torch.rand(scores.shape, generator=generator))
        pruner.step()
        masks.append(masks_of(model))
        assert all((mask <= masks[-2][name]).all() for name, mask in masks[-1].items())
    num_weights = sum(mask.numel() for mask in masks[-1].values())
    assert sum(int((~mask).sum()) for mask in masks[-1].values()) == round(sparsity * num_weights)
    # Half-way up the ramp, within a weight a matrix.
    halfway = sum(int((~mask).sum()) for mask in masks[60].values())
    assert halfway == pytest.approx((1 - 0.5**3) * sparsity * num_weights, abs=len(masks[0]))


@pytest.fixture
def layers(tmp_path: Path) -> dict[str, AdaPruneLayer]:
    """The masked layers of a trained model."""
    _, _, trainer = train("adaprune", tmp_path)
    return dict(adaprune_layers(trainer.model))


def test_shuffling_keeps_the_sparsity_of_each_matrix_and_nothing_else(layers: dict[str, AdaPruneLayer]) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        before = layer.mask("default").clone()
        shuffle_mask(layer, "default", generator)
        after = layer.mask("default")
        assert after.sum() == before.sum()
        # Two masks of .6 that know nothing of each other agree in .52 of their entries.
        assert (after == before).float().mean() == pytest.approx(0.52, abs=0.08)


def test_weights_are_scaled_and_redrawn_as_their_names_say(layers: dict[str, AdaPruneLayer]) -> None:
    generator = torch.Generator().manual_seed(0)
    for layer in layers.values():
        before = layer.base_weight.clone()
        scale_weight(0.1)(layer, "default", generator)
        ratio = layer.base_weight / before
        assert (float(ratio.mean()), float(ratio.std())) == pytest.approx((1.0, 0.1), abs=0.02)
        redraw_weight(layer, "default", generator)
        assert float(layer.base_weight.std()) == pytest.approx(float(before.std()), rel=0.1)
        assert abs(torch.corrcoef(torch.stack([layer.base_weight.view(-1), before.view(-1)]))[0, 1]) < 0.15


def test_ablations_are_scored_with_the_head_as_it_was_and_trained_on_and_leave_no_trace(tmp_path: Path) -> None:
    _, _, trainer = train("adaprune", tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    state, masks, loss = state_of(trainer.model), masks_of(trainer.model), trainer.evaluate()["eval_loss"]
    metrics = ablate(trainer, head_learning_rate=1e-2)
    assert not changed(state, state_of(trainer.model))
    assert not changed(masks, masks_of(trainer.model))
    assert trainer.evaluate()["eval_loss"] == loss
    for name in ABLATIONS:
        assert metrics[f"eval_{name}_loss"] != loss
        # It is the data that the head is trained on.
        assert metrics[f"eval_{name}_retrained_loss"] < metrics[f"eval_{name}_loss"]


def test_masks_of_groups_are_ablated_too_and_dropout_is_put_back(tmp_path: Path) -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity="neuron+head", dropout=0.25))
    trainer = make_trainer(model, tmp_path, AdaPruneCallback)
    trainer.train()
    trainer.eval_dataset = trainer.train_dataset
    masks, rates = masks_of(model), dropout_of(model)
    ablate(trainer)
    assert not changed(masks, masks_of(model))
    assert dropout_of(model) == rates
    assert 0.25 not in rates.values()


def test_an_adapter_that_was_opened_is_ablated_and_saved_again(tmp_path: Path) -> None:
    save_model(tmp_path / "base")
    model: Any = get_peft_model(HEADS["sequence"].from_pretrained(tmp_path / "base"), AdaPruneConfig())
    make_trainer(model, tmp_path, AdaPruneCallback).train()
    model.save_pretrained(tmp_path / "adapter")
    base = HEADS["sequence"].from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    trainer = make_trainer(opened, tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    masks = masks_of(opened)
    ablate(trainer)
    assert not changed(masks, masks_of(opened))
    opened.save_pretrained(tmp_path / "again")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_masks_under_a_lora_are_ablated(tmp_path: Path) -> None:
    model = make_model()
    make_trainer(model, tmp_path, AdaPruneCallback).train()
    model.add_adapter(LoraConfig(target_modules=["query"]), "other")
    model.set_adapter(["default", "other"])
    trainer = make_trainer(model, tmp_path)
    trainer.eval_dataset = trainer.train_dataset
    assert ablate(trainer).keys() >= {f"eval_{name}_loss" for name in ABLATIONS}


@pytest.mark.parametrize("callback", [SMPCallback, MovementCallback])
def test_steps_of_scores_must_be_positive(callback: Any, tmp_path: Path) -> None:
    for wrong in (-1.0, 0.0, float("nan")):
        with pytest.raises(ConfigError, match="`score_learning_rate` must be greater than 0"):
            callback(score_learning_rate=wrong)
    with pytest.raises(ConfigError, match=r"`learning_rate` must be greater than 0, got 0\.0"):
        make_trainer(make_model(), tmp_path, callback(), learning_rate=0.0)
    with pytest.raises(ConfigError, match="`max_penalty` must not be negative, got -5"):
        SMPCallback(max_penalty=-5)


def dropout_of(model: nn.Module) -> dict[str, float]:
    return {name: module.p for name, module in model.named_modules() if isinstance(module, nn.Dropout)}


def test_only_what_has_masks_is_ablated(tmp_path: Path) -> None:
    with pytest.raises(NotPrunedError, match="The model has no masks: add them by"):
        ablate(make_trainer(make_model(), tmp_path))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of \['adaprune', .*'smp'\], got 'magic'"):
        make_callback("magic")


def test_an_impossible_rate_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`rate` must be in \(0, 1\), got 1.0"):
        IterativeMagnitudeCallback(rate=1.0)


def test_weights_are_trained_of_plain_models_only(tmp_path: Path) -> None:
    wrapped = get_peft_model(make_model(), AdaPruneConfig())
    with pytest.raises(NotPrunedError, match="`MovementCallback` trains the weights of a plain transformers model"):
        make_trainer(wrapped, tmp_path, MovementCallback())
    adapted = make_model()
    adapted.add_adapter(AdaPruneConfig())
    with pytest.raises(NotPrunedError, match="got a BertForSequenceClassification with masks or an adapter"):
        make_trainer(adapted, tmp_path, MagnitudeCallback())


def test_there_is_nothing_to_rewind_before_training() -> None:
    with pytest.raises(NotPrunedError, match=r"call `Trainer.train` first"):
        MagnitudeCallback().rewound(make_model())


def test_rounds_begin_anew_for_another_trainer(tmp_path: Path) -> None:
    callback = IterativeMagnitudeCallback()
    zeros = []
    for _ in range(2):
        _, _, trainer = train(callback, tmp_path, max_steps=2)
        zeros.append(sum(int((weight == 0).sum()) for weight in trainer.model.parameters() if weight.dim() == 2))
    assert zeros[0] == zeros[1] > 0


@pytest.mark.parametrize("method", ["lora", "feature_extraction", "magnitude"])
def test_a_baseline_trains_no_other_model_than_the_one_that_it_has_prepared(method: str, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, max_steps=1)
    callback = make_callback(method, AdaPruneConfig())
    data = make_trainer(make_model(), tmp_path).train_dataset
    with pytest.raises(ConfigError, match="not `model_init=`, and create one callback for each Trainer"):
        Trainer(model_init=lambda: make_model(), args=args, train_dataset=data, callbacks=[callback]).train()
    callback = make_callback(method, AdaPruneConfig())
    first, _ = (make_trainer(make_model(), tmp_path, callback, max_steps=1) for _ in range(2))
    with pytest.raises(ConfigError, match="create one callback for each Trainer"):
        first.train()


def test_a_second_run_over_trained_weights_needs_a_new_trainer(tmp_path: Path) -> None:
    _, _, trainer = train("magnitude", tmp_path)
    with pytest.raises(ConfigError, match="The run has ended, and the model is a plain one"):
        trainer.train()


def test_where_nothing_can_be_trained_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="The BertForMaskedLM has no head"):
        make_trainer(make_model(head="masked_lm"), tmp_path, make_callback("feature_extraction", AdaPruneConfig()))
    trainer = make_trainer(make_model(head="masked_lm"), tmp_path, RandomMaskCallback(0.5), max_steps=1)
    with pytest.raises(ConfigError, match="Nothing of the BertForMaskedLM can be trained"):
        trainer.train()


def test_each_round_has_the_whole_schedule_even_if_that_was_passed_in(tmp_path: Path) -> None:
    model = make_model()
    rates: list[float] = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=3)
    watch = Watch("on_step_begin", lambda model: rates.append(optimizer.param_groups[0]["lr"]))
    callback = IterativeMagnitudeCallback(0.36)
    args = TrainingArguments(str(tmp_path), max_steps=3, save_strategy="no", report_to=[], use_cpu=True)
    data = make_trainer(model, tmp_path).train_dataset
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback, watch], optimizers=(optimizer, schedule))
    for _ in range(callback.num_rounds):
        trainer.train()
    assert rates == pytest.approx(3 * [1e-3, 2e-3 / 3, 1e-3 / 3])


def test_the_penalty_of_a_run_that_raised_is_not_in_the_loss_of_the_next(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(model, tmp_path, SMPCallback(0.5, max_penalty=1e6), Kill(2), max_steps=4).train()
    assert make_trainer(model, tmp_path, AdaPruneCallback, max_steps=4).train().training_loss < 10


def test_ablations_train_and_score_the_head_as_the_trainer_does(tmp_path: Path) -> None:
    losses: list[int] = []

    def loss_func(outputs: Any, labels: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        losses.append(len(labels))
        return nn.functional.cross_entropy(outputs.logits, labels)

    trainer = make_trainer(make_model(), tmp_path, AdaPruneCallback, max_steps=2)
    trainer = Trainer(
        trainer.model,
        trainer.args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.train_dataset,
        compute_loss_func=loss_func,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        compute_metrics=lambda output: {"accuracy": float((output.predictions == output.label_ids).mean())},
        callbacks=[AdaPruneCallback],
    )
    trainer.train()
    trained = len(losses)
    assert all(f"eval_{name}_retrained_accuracy" in ablate(trainer) for name in ABLATIONS)
    assert len(losses) - trained > 2 * len(ABLATIONS) * len(ABLATIONS)
