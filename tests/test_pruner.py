import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from tiny import make_batch, make_model, save_model, train_masks
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_adaprune import AdaPruneConfig, Pruner, sparsity_report
from hf_adaprune.analysis import model_masks
from hf_adaprune.errors import ConfigError, MergeError, NonFiniteError, NotPrunedError, UnsupportedShardingError
from hf_adaprune.masks import topk_mask
from hf_adaprune.tuner.masked_layers import adaprune_layers
from hf_adaprune.tuner.scores import wanda_ranks


class Net(nn.Module):
    """Two layers whose sizes make every rounding of a sparsity visible."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"modules_to_save": ["head"], "target_modules": ["first", "0", "1"]} | options
    return get_peft_model(Net(), AdaPruneConfig(**options))


def train(model: nn.Module, pruner: Pruner, steps: int, lr: float = 1e-3, seed: int = 0) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, 7, generator=generator)
        nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
        pruner.check_gradients()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()


def pruned_count(model: nn.Module) -> int:
    return sum(layer.pruned_and_total("default")[0] for _, layer in adaprune_layers(model))


def test_an_adapter_that_is_not_active_is_not_pruned() -> None:
    model = make()
    model.add_adapter("second", AdaPruneConfig(modules_to_save=["head"], target_modules=["first"]))
    with pytest.raises(NotPrunedError, match=r"'second' is not active.* call `model.set_adapter\('second'\)`"):
        Pruner(model, 4, "second")
    model.set_adapter("second")
    Pruner(model, 4, "second")


@pytest.mark.parametrize("scope", ["module", "kind", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.37, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("score_init", ["wanda", "magnitude", "constant"])
def test_the_sparsity_asked_for_is_the_sparsity_got(scope: str, sparsity: float, score_init: str) -> None:
    model = make(final_sparsity=sparsity, scope=scope, score_init=score_init)
    pruner = Pruner(model, total_steps=10)
    train(model, pruner, steps=10)
    pruner.finalize()
    assert pruned_count(model) == round(sparsity * (7 * 5 + 25 + 25))
    assert pruner.sparsity == pruned_count(model) / 85


def test_base_weights_never_change() -> None:
    torch.manual_seed(0)
    before = {name: parameter.clone() for name, parameter in Net().named_parameters()}
    model = make()
    train(model, Pruner(model, total_steps=10), steps=10)
    for name, parameter in model.unload().named_parameters():
        if not name.startswith("head"):
            assert torch.equal(parameter, before[name]), name


def test_a_run_that_is_cut_short_ends_at_its_target_with_a_warning() -> None:
    model = make(final_sparsity=0.8)
    pruner = Pruner(model, total_steps=100)
    train(model, pruner, steps=10)
    assert pruner.sparsity < 0.8
    with pytest.warns(UserWarning, match=r"Training ended at a sparsity of 0\.\d+, below `final_sparsity=0.8`"):
        pruner.finalize()
    assert pruned_count(model) == round(0.8 * 85)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pruner.finalize()


def test_scores_follow_the_optimizer_by_their_ratio_and_so_does_the_head() -> None:
    slow, fast = make(), make(score_lr_ratio=1.0, head_lr_ratio=1.0)
    pruners = [Pruner(model, total_steps=1) for model in (slow, fast)]
    before = slow.base_model.model.head.modules_to_save["default"].weight.detach().clone()
    # AdamW's first step is the learning rate times the sign: 100 and 4 times as large in the fast model's units.
    train(slow, pruners[0], steps=1, lr=1e-5)
    train(fast, pruners[1], steps=1, lr=1e-3)
    name = "base_model.model.first"
    moved = [model.get_submodule(name).adaprune_scores["default"].detach() for model in (slow, fast)]
    torch.testing.assert_close(moved[0] * 100, moved[1], rtol=0, atol=1e-5)
    head = slow.base_model.model.head.modules_to_save["default"].weight
    torch.testing.assert_close((head - before).abs(), torch.full_like(before, 4 * 1e-5), rtol=1e-2, atol=1e-7)


def test_a_resumed_run_equals_an_uninterrupted_one() -> None:
    whole = make()
    pruner = Pruner(whole, total_steps=12)
    optimizer = adam(whole)
    for step in range(12):
        if step == 7:
            saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), pruner.state_dict()))
        one_step(whole, optimizer, pruner, step)

    resumed = make()
    pruner = Pruner(resumed, total_steps=12)
    optimizer = adam(resumed)
    incompatible = resumed.load_state_dict(saved[0])
    assert not incompatible.missing_keys
    assert not incompatible.unexpected_keys
    optimizer.load_state_dict(saved[1])
    pruner.load_state_dict(saved[2])
    for step in range(7, 12):
        one_step(resumed, optimizer, pruner, step)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: Pruner, step: int) -> None:
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step))
    nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long()).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()


def scores_of(model: Any, name: str = "first") -> torch.Tensor:
    scores: torch.Tensor = model.get_submodule(f"base_model.model.{name}").adaprune_scores["default"]
    return scores


def test_scores_start_from_the_inputs_of_all_batches_of_the_first_step() -> None:
    model = make(score_lr_ratio=10.0)
    pruner = Pruner(model, total_steps=10)
    batches = [torch.randn(8, 7, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    with torch.no_grad():
        model(100 * torch.rand(8, 7))
    for batch in batches[:2]:
        model(batch)
    pruner.step()
    layer = model.get_submodule("base_model.model.first")
    norm = torch.cat(batches[:2]).norm(dim=0)
    torch.testing.assert_close(scores_of(model) * 10, wanda_ranks(layer.base_weight, norm, input_dim=1))
    before = scores_of(model).clone()
    model(batches[2])
    pruner.step()
    assert torch.equal(scores_of(model), before)
    assert not layer._forward_pre_hooks


def test_a_model_that_is_not_called_keeps_the_scores_of_its_magnitudes() -> None:
    model = make()
    before = scores_of(model).clone()
    Pruner(model, total_steps=10).step()
    assert torch.equal(scores_of(model), before)


def test_inputs_are_seen_in_evaluation_mode_too() -> None:
    model = make().eval()
    pruner = Pruner(model, total_steps=10)
    seen = torch.randn(8, 7)
    model(seen)
    pruner.step()
    layer = model.get_submodule("base_model.model.first")
    torch.testing.assert_close(scores_of(model) * 100, wanda_ranks(layer.base_weight, seen.norm(dim=0), input_dim=1))


def test_a_run_that_is_broken_off_before_its_first_step_leaves_no_hook() -> None:
    model = make()
    layer = model.get_submodule("base_model.model.first")
    pruner = Pruner(model, total_steps=10)
    assert len(layer._forward_pre_hooks) == 1
    del pruner
    assert not layer._forward_pre_hooks
    with pytest.warns(UserWarning, match="Training ended at a sparsity of 0.0000"):
        Pruner(model, total_steps=10).finalize()
    assert not layer._forward_pre_hooks


def test_a_run_that_goes_on_does_not_start_its_scores_anew() -> None:
    model = make(pruning_start=0.5)
    pruner = Pruner(model, total_steps=10)
    pruner.load_state_dict({"num_steps": 3})
    before = scores_of(model).clone()
    model(torch.randn(8, 7))
    pruner.step()
    assert pruner.sparsity == 0
    assert torch.equal(scores_of(model), before)


def test_scores_that_were_cast_with_their_model_are_trained_in_float32() -> None:
    model = make().to(torch.bfloat16)
    assert scores_of(model).dtype == torch.bfloat16
    with pytest.warns(UserWarning, match="The head is in torch.bfloat16, which is too coarse"):
        Pruner(model, total_steps=10)
    assert scores_of(model).dtype == torch.float32
    assert model.get_submodule("base_model.model.first").weight.dtype == torch.bfloat16


def test_flip_rate_counts_what_changed_since_it_was_last_asked() -> None:
    model = make(final_sparsity=0.5, pruning_end=0.1)
    pruner = Pruner(model, total_steps=10)
    assert pruner.pop_flip_rate() == 0.0
    train(model, pruner, steps=1)
    assert pruner.pop_flip_rate() == round(0.5 * 85) / 85
    assert pruner.pop_flip_rate() == 0.0


def test_algorithm_one_prunes_what_falls_below_zero_and_ends_when_the_target_is_exceeded() -> None:
    model = make(
        final_sparsity=0.4,
        selection="threshold",
        estimator="sigmoid",
        score_init="normal",
        score_lr_ratio=1.0,
        drift=0.1,
    )
    pruner = Pruner(model, total_steps=100)
    steps = 0
    while not pruner.finished and steps < 100:
        train(model, pruner, steps=1, lr=1e-4, seed=steps)
        steps += 1
    assert 0 < steps < 100
    assert pruner.sparsity > 0.4
    for _, layer in adaprune_layers(model):
        assert torch.equal(layer.mask("default"), layer.adaprune_scores["default"] > 0)


@pytest.mark.parametrize("settle", [True, False])
def test_a_score_ends_at_the_mean_of_its_path_since_the_ramp(settle: bool) -> None:
    model = make(score_init="magnitude", pruning_end=0.6, settle=settle)
    pruner = Pruner(model, total_steps=10)
    layer = pruner.layers["base_model.model.first"]
    scores = layer.adaprune_scores["default"]
    path = [scores.detach().clone()]
    for step in torch.randn(10, *scores.shape, generator=torch.Generator().manual_seed(0)):
        path.append(path[-1] + 0.01 * step)
        scores.data += 0.01 * step
        pruner.step()
    expected = torch.stack(path[7:]).mean(0) if settle else path[-1]
    pruner.finalize()
    torch.testing.assert_close(scores.detach(), expected)
    num_kept = scores.numel() - round(scores.numel() / 2)
    assert torch.equal(layer.mask("default"), topk_mask(expected, num_kept, layer.base_weight))


@pytest.mark.parametrize(
    "options", [{"estimator": "sigmoid"}, {"selection": "threshold", "score_init": "normal"}, {"settle": False}]
)
def test_scores_whose_size_counts_do_not_settle(options: dict[str, Any]) -> None:
    model = make(pruning_end=0.2, **({"score_init": "magnitude"} | options))
    pruner = Pruner(model, total_steps=5)
    before = [score.detach().clone() for score in pruner._selector.scores().values()]
    for _ in range(5):
        pruner.step()
    assert all(map(torch.equal, pruner._selector.scores().values(), before))


def test_scores_that_are_lost_settle_as_far_as_the_run_has_come() -> None:
    model = make(score_init="magnitude")
    first = Pruner(model, total_steps=10)
    for _ in range(8):
        first.step()
    before = {name: score.detach().clone() for name, score in first._selector.scores().items()}
    for layer in first.layers.values():
        layer.adaprune_scores["default"].data.neg_()
    second = Pruner(model, total_steps=10)
    with pytest.warns(UserWarning, match=r"scores behind the masks are lost: .* continues from the masks"):
        second.load_state_dict(first.state_dict())
    for name, score in second._selector.scores().items():
        # Half of what comes after the ramp is done: steps are half as long, scores twice as large.
        assert score.max().item() == pytest.approx(before[name].max().item(), rel=0.1)


def test_scores_that_a_checkpoint_restores_are_not_reported_as_lost(tmp_path: Path) -> None:
    def continued() -> tuple[Any, Pruner]:
        base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        model: Any = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
        return model, Pruner(model, total_steps=4)

    model = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "base"))
    model.add_adapter(AdaPruneConfig())
    train_masks(model)
    model.save_pretrained(tmp_path / "adapter")
    trained, pruner = continued()
    for layer in pruner.layers.values():
        layer.adaprune_scores["default"].data.neg_()  # the scores of a run whose masks have changed since
    pruner.step()
    model, resumed = continued()
    model.load_state_dict(trained.state_dict())
    resumed.load_state_dict(pruner.state_dict())
    model, resumed = continued()
    with pytest.warns(UserWarning, match="scores behind the masks are lost"):
        resumed.load_state_dict(pruner.state_dict())


def test_a_run_that_was_broken_off_leaves_the_next_one_scores_in_their_unit() -> None:
    model = make(score_init="magnitude")
    before = {name: layer.adaprune_scores["default"].detach().clone() for name, layer in adaprune_layers(model)}
    first = Pruner(model, total_steps=10)
    for _ in range(9):
        first.step()
    second = Pruner(model, total_steps=10)
    second.step()
    for name, layer in adaprune_layers(model):
        torch.testing.assert_close(layer.adaprune_scores["default"].detach(), before[name])


def test_scores_that_share_a_threshold_are_made_anew_together(tmp_path: Path) -> None:
    model = make(scope="global", score_init="constant")
    masks = {name: layer.scored_mask("default").clone() for name, layer in adaprune_layers(model)}
    for name, layer in adaprune_layers(model):
        if not name.endswith("first"):  # which keeps all: any scores would do for it alone
            masks[name][:, ::2] = False
        layer.set_mask("default", masks[name])
    model.peft_config["default"].final_sparsity = sum(int((~mask).sum()) for mask in masks.values()) / 85
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    opened: Any = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    pruner = Pruner(opened, 4)
    pruner.step()
    for name, layer in adaprune_layers(opened):
        assert torch.equal(layer.scored_mask("default"), masks[name]), name


def test_a_run_that_has_ended_itself_prunes_no_further() -> None:
    model = make(selection="threshold", score_init="normal", final_sparsity=0.1)
    pruner = Pruner(model, total_steps=10)
    for layer in pruner.layers.values():
        layer.adaprune_scores["default"].data[0] = -1
    pruner.step()
    assert pruner.finished
    before = pruner.sparsity
    for layer in pruner.layers.values():
        layer.adaprune_scores["default"].data.fill_(-1)
    pruner.step()
    assert (pruner.sparsity, pruner.num_steps) == (before, 1)


def test_masks_that_are_past_their_end_are_not_trained_in_silence() -> None:
    model = make(selection="threshold", score_init="normal", final_sparsity=0.1)
    for layer in (pruner := Pruner(model, total_steps=10)).layers.values():
        layer.adaprune_scores["default"].data[0] = -1
    pruner.step()
    assert pruner.finished
    with pytest.raises(NotPrunedError, match=r"pruned before the first step, more than `final_sparsity=0.1`"):
        Pruner(model, total_steps=10).step()


def test_a_run_is_at_its_target_at_the_same_step_resumed_or_not() -> None:
    model = make()
    whole = Pruner(model, total_steps=200)
    reached = []
    for _ in range(130):
        model(torch.ones(1, 7))
        whole.step()
        resumed = Pruner(copy.deepcopy(model), total_steps=200)
        resumed.load_state_dict(whole.state_dict())
        assert resumed.at_target == whole.at_target, whole.num_steps
        reached.append(whole.at_target)
    assert (reached[0], reached[-1]) == (False, True)


def test_more_steps_than_there_are_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("hf_adaprune.training.pruner.logger.warning_once", said.append)
    model = make()
    model(torch.ones(1, 7))
    pruner = Pruner(model, total_steps=2)
    for _ in range(2):
        model(torch.ones(1, 7))
        pruner.step()
    assert not said
    pruner.step()
    assert said[0].startswith("The optimizer has made more steps than `total_steps=2`: the masks stay as they are")


def test_drift_lowers_every_score_alike_over_the_run() -> None:
    model = make(selection="threshold", score_init="normal", drift=5e-4, score_lr_ratio=10.0)
    pruner = Pruner(model, total_steps=5)
    scores = model.get_submodule("base_model.model.first").adaprune_scores["default"]
    before = scores.detach().clone()
    for _ in range(3):
        pruner.step()
    torch.testing.assert_close((before - scores) * 10.0, torch.full_like(before, 3e-4), rtol=1e-3, atol=1e-9)


def test_a_gradient_that_is_not_finite_stops_training_before_the_step() -> None:
    model = make()
    pruner = Pruner(model, total_steps=5)
    train(model, pruner, steps=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model(torch.full((2, 7), torch.nan)).sum().backward()
    with pytest.raises(NonFiniteError, match="after step 2 of 5; the model is as it was"):
        pruner.check_gradients()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_score_that_is_not_finite_leaves_the_last_masks() -> None:
    model = make()
    pruner = Pruner(model, total_steps=5)
    train(model, pruner, steps=2)
    masks = {name: layer.mask("default").clone() for name, layer in adaprune_layers(model)}
    model.get_submodule("base_model.model.layers.1").adaprune_scores["default"].data[0, 0] = torch.nan
    with pytest.raises(
        NonFiniteError, match=r"The scores of 'base_model.model.layers.1' are NaN or infinite at step 3"
    ):
        pruner.step()
    assert all(torch.equal(layer.mask("default"), masks[name]) for name, layer in adaprune_layers(model))


def test_a_model_without_trainable_masks_is_refused() -> None:
    with pytest.raises(NotPrunedError, match="The model has no masks: add them by"):
        Pruner(Net(), total_steps=5)
    with pytest.raises(NotPrunedError, match="adapter name 'other'"):
        Pruner(make(), total_steps=5, adapter_name="other")
    with pytest.raises(ValueError, match="`total_steps` must be an integer >= 1, got 0"):
        Pruner(make(), total_steps=0)
    wrong: Any
    for wrong in (2.5, "10", float("inf")):
        with pytest.raises(ValueError, match=f"must be an integer >= 1, got {wrong!r}"):
            Pruner(make(), total_steps=wrong)


def test_deepspeed_is_refused_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr("hf_adaprune.tuner.sharding.is_initialized", lambda: True)
    monkeypatch.setattr("hf_adaprune.tuner.sharding.AcceleratorState", lambda: state)
    with pytest.raises(UnsupportedShardingError, match="DeepSpeed updates internal copies of the parameters"):
        Pruner(make(), total_steps=5)


def test_masks_that_are_merged_or_disabled_are_not_trained() -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig())
    with model.disable_adapter(), pytest.raises(MergeError, match="its masks would not be trained"):
        Pruner(model, 4)
    model.merge_adapter()
    with pytest.raises(MergeError, match="call `unmerge_adapter\\(\\)`"):
        Pruner(model, 4)


def test_masks_may_move_before_the_first_forward_pass(tmp_path: Path) -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig())
    train_masks(model)
    model.save_pretrained(str(tmp_path))
    opened: Any = PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True)
    pruner = Pruner(opened, 4)
    pruner.prune_to(0.9)
    opened(**make_batch())
    assert sparsity_report(opened).sparsity == pytest.approx(0.9, abs=1e-3)


def test_a_copy_of_a_model_in_its_first_step_adds_nothing_to_what_is_seen() -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig())
    pruner = Pruner(model.train(), 4)
    copy.deepcopy(model)(**make_batch())
    assert pruner._inputs is not None
    assert not any(total.any() for total in pruner._inputs._totals.values())


def test_a_head_that_is_loaded_while_a_run_goes_on_is_not_taken_for_a_step() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    pruner = Pruner(model, 10)
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for parameter in pruner._head.parameters:
        parameter.data += 1
    pruner.step()
    model.load_state_dict(best)
    optimizer.step()  # without gradients: nothing moves
    pruner.step()
    for name, tensor in model.state_dict().items():
        if ".modules_to_save." in name:
            assert torch.equal(tensor, best[name]), name


def test_a_model_of_two_adapted_models_needs_two_pruners() -> None:
    both = nn.ModuleDict({name: get_peft_model(make_model(), AdaPruneConfig()) for name in ("query", "passage")})
    with pytest.raises(ConfigError, match="create one `Pruner` for each"):
        Pruner(both, total_steps=1)
    Pruner(both["query"], total_steps=1)


def test_the_active_adapter_is_trained_unless_another_is_named() -> None:
    model = make()
    model.add_adapter("second", AdaPruneConfig(modules_to_save=["head"], target_modules=["first"]))
    model.set_adapter("second")
    pruner = Pruner(model, total_steps=5)
    assert pruner.adapter_name == "second"
    pruner.close()


def test_of_several_active_adapters_one_must_be_named() -> None:
    model: Any = get_peft_model(make_model(head="none"), AdaPruneConfig(), "first")
    model.add_adapter("second", AdaPruneConfig())
    model.base_model.set_adapter(["first", "second"])
    message = r"None of the adapters \['first', 'second'\] is active: name one"
    model.base_model.set_adapter([])
    with pytest.raises(NotPrunedError, match=message):
        sparsity_report(model)
    model.base_model.set_adapter(["first", "second"])
    for use in (lambda: Pruner(model, 5), lambda: sparsity_report(model), lambda: model_masks(model)):
        with pytest.raises(NotPrunedError, match=r"Several adapters are active, \['first', 'second'\]: name one"):
            use()
    assert sparsity_report(model, "second").sparsity == 0


def test_a_mask_takes_one_bit_per_weight_again_after_training() -> None:
    model = make()
    pruner = Pruner(model, total_steps=5)
    train(model, pruner, steps=5)
    pruner.finalize()
    for _, layer in adaprune_layers(model):
        assert not layer._unpacked
        assert layer.adaprune_mask["default"].numel() == -(-layer.base_weight.numel() // 8)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)


def test_parameters_that_no_adapter_stores_are_not_trained_in_silence() -> None:
    model = make()
    norm = next(name for name, parameter in model.named_parameters() if name.endswith("base_layer.bias"))
    model.get_parameter(norm).requires_grad_(True)
    with pytest.warns(UserWarning, match=r"1 parameters of the base are trained too, such as '.*base_layer\.bias'"):
        Pruner(model, total_steps=5)


def test_scores_start_from_the_inputs_of_all_replicas(replicate: Any) -> None:
    x, scores = torch.randn(8, 7, generator=torch.Generator().manual_seed(0)), []
    for num_replicas in (1, 2):
        model = make()
        pruner = Pruner(model, total_steps=5)
        replicas = replicate(model, range(num_replicas)) if num_replicas > 1 else [model]
        for replica, rows in zip(replicas, x.chunk(num_replicas), strict=True):
            replica(rows)
        pruner.step()
        scores.append([layer.adaprune_scores["default"].detach().clone() for _, layer in adaprune_layers(model)])
    assert all(torch.equal(one, other) for one, other in zip(*scores, strict=True))


def test_closing_a_pruner_leaves_the_run_of_a_later_one_as_it_is() -> None:
    model = make_model(num_labels=1)
    model.add_adapter(AdaPruneConfig())
    first = Pruner(model, total_steps=5)
    Pruner(model, total_steps=5)
    first.close()
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.0}


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
@pytest.mark.parametrize("sparsity", [-0.1, 1.5])
def test_a_sparsity_that_is_no_fraction_is_refused(granularity: str, sparsity: float) -> None:
    pruner = Pruner(get_peft_model(make_model(), AdaPruneConfig(granularity=granularity)), 1)
    with pytest.raises(ValueError, match=rf"`sparsity` must be in \[0, 1\], got {sparsity}"):
        pruner.prune_to(sparsity)


def test_masks_of_all_processes_are_compared_every_hundred_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    monkeypatch.setattr("hf_adaprune.training.pruner.check_same_masks", lambda masks, step: compared.append(step))
    pruner = Pruner(make(), total_steps=250)
    for _ in range(250):
        pruner.step()
    assert compared == [100, 200]
    pruner.finalize()
    assert compared == [100, 200, 250]


def test_groups_whose_scores_would_be_sharded_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(distributed_type=DistributedType.FSDP)
    monkeypatch.setattr("hf_adaprune.tuner.sharding.is_initialized", lambda: True)
    monkeypatch.setattr("hf_adaprune.tuner.sharding.AcceleratorState", lambda: state)
    with pytest.raises(UnsupportedShardingError, match='`granularity="neuron"` needs all scores of a layer in one'):
        Pruner(get_peft_model(make_model(), AdaPruneConfig(granularity="neuron")), total_steps=5)
