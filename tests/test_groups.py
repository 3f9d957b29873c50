"""Masks of whole neurons, heads and n:m patterns: what they compute, how they learn, what is saved."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file
from test_architectures import DOORS, Trained, train
from tiny import HEADS, logits_of, loss_of, make_batch, make_model, train_masks

from hf_adaprune import AdaPruneConfig, Pruner, sparsity_report
from hf_adaprune.analysis import load_masks, model_masks
from hf_adaprune.choices import Estimator, Scope
from hf_adaprune.masks import topk_mask
from hf_adaprune.tuner.masked_layers import adaprune_layers
from hf_adaprune.tuner.selection import protect_best, prune_groups


ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "mpnet", "modernbert")
CASES = [(architecture, "neuron+head") for architecture in ARCHITECTURES]
CASES += [("bert", "neuron"), ("distilbert", "head"), ("bert", "2:4"), ("modernbert", "2:4")]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    architecture, granularity = request.param
    config = AdaPruneConfig(granularity=granularity)
    return train(architecture, "sequence", tmp_path_factory.mktemp("adapter"), config)


def scored_masks(model: Any, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    return {name: layer.scored_mask(adapter_name) for name, layer in adaprune_layers(model, adapter_name)}


def test_half_of_the_weights_is_pruned_in_whole_groups(trained: Trained) -> None:
    report = sparsity_report(trained.model)
    assert report.num_pruned * 2 == report.num_weights
    assert {module.sparsity for module in report.modules} == {0.5}
    assert trained.pruner.sparsity == 0.5


def test_a_saved_adapter_computes_the_same_through_every_door(trained: Trained) -> None:
    for door in DOORS:
        model = trained.open(door)
        assert torch.equal(trained.logits_of(model), trained.logits), door
        assert not [name for name, _ in model.named_parameters() if "adaprune_scores" in name], door


def test_a_mask_of_groups_is_stored_once_with_one_bit_a_group(trained: Trained) -> None:
    masks = {k: v for k, v in load_file(trained.adapter / "adapter_model.safetensors").items() if "adaprune" in k}
    granularity = trained.model.peft_config["default"].granularity
    if granularity == "2:4":
        assert sum(len(mask) for mask in masks.values()) == sparsity_report(trained.model).num_weights // 8
    else:
        kinds = granularity.split("+")
        assert sorted(len(mask) for mask in masks.values()) == sorted({"head": 1, "neuron": 5}[k] for k in kinds * 2)


def test_merging_zeroes_every_weight_of_what_is_pruned_and_no_other(trained: Trained, tmp_path: Path) -> None:
    report = sparsity_report(trained.model)
    merged = trained.open("PeftModel").merge_and_unload()
    assert torch.equal(trained.logits_of(merged), trained.logits)
    for module in report.modules:
        name = module.name.removeprefix("base_model.model.")
        weight, before = merged.get_submodule(name).weight, trained.before[f"{name}.weight"]
        assert int((weight == 0).sum()) == module.num_pruned, name
        assert torch.equal(weight[weight != 0], before[weight != 0])
    merged.save_pretrained(tmp_path)
    assert torch.equal(trained.logits_of(HEADS["sequence"].from_pretrained(tmp_path)), trained.logits)


def test_merging_for_a_while_leaves_no_trace(trained: Trained) -> None:
    model = trained.open("PeftModel")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.merge_adapter()
    assert torch.equal(trained.logits_of(model), trained.logits)
    model.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_goes_on_from_the_mask_of_a_stored_adapter(trained: Trained) -> None:
    model = PeftModel.from_pretrained(trained.load_base(), trained.adapter, is_trainable=True)
    pruner = Pruner(model, 4)
    stored = scored_masks(trained.model)
    assert all(torch.equal(mask, stored[name]) for name, mask in scored_masks(model).items())
    pruner.step()
    assert all(torch.equal(mask, stored[name]) for name, mask in scored_masks(model).items())


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2"])
def test_a_pruned_group_has_no_effect_and_a_kept_one_has(architecture: str) -> None:
    model = get_peft_model(make_model(architecture), AdaPruneConfig(granularity="neuron+head"))
    train_masks(model)
    before = logits_of(model)
    for name, layer in adaprune_layers(model):
        groups, mask = layer.groups("default"), layer.scored_mask("default")
        assert groups is not None
        for touched, changed in ((~mask, False), (mask, True)):
            other = copy.deepcopy(model)
            copied = dict(adaprune_layers(other))[name].groups("default")
            assert copied is not None
            for producer in copied.producers.values():
                rows = copied.rows(producer, touched)
                weight = producer.weight.data
                (weight.T if architecture == "gpt2" else weight)[rows] *= 5.0
            assert torch.equal(logits_of(other), before) is not changed, (name, changed)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "gpt2"])
@pytest.mark.parametrize("estimator", ["straight_through", "sigmoid"])
def test_gradients_of_groups_are_those_of_finite_differences(
    architecture: str, estimator: Estimator, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AdaPruneConfig(granularity="neuron+head", estimator=estimator, backward_temperature=0.5)
    model = get_peft_model(make_model(architecture).double(), config)
    train_masks(model, steps=3)
    model.eval().zero_grad()
    batch = make_batch()
    loss_of(model(**batch)).backward()
    for name, layer in adaprune_layers(model):
        groups, mask, weight = layer.groups("default"), layer.scored_mask("default"), layer.base_weight.data
        scores = layer.adaprune_scores["default"]
        assert groups is not None
        sigmoid = (0.5 * scores.detach() * config.score_lr_ratio).sigmoid()
        slope = torch.ones(len(mask)) if estimator == "straight_through" else 0.5 * sigmoid * (1 - sigmoid)
        # A kept and a pruned group of each block.
        for group in (int(mask.nonzero()[0]), int((~mask).nonzero()[0])):
            gate, losses = mask.double(), []
            for step in (1e-4, -1e-4):
                gate[group] = float(mask[group]) + step
                gated = weight * groups.broadcast(gate)
                monkeypatch.setattr(layer, "_cached", None)
                monkeypatch.setattr(layer, "effective_weight", lambda gated=gated: gated)
                with torch.no_grad():
                    losses.append(loss_of(model(**batch)).item())
            monkeypatch.undo()
            expected = (losses[0] - losses[1]) / 2e-4
            assert float(scores.grad[group] / slope[group]) == pytest.approx(expected, rel=1e-4, abs=1e-9), name


@pytest.mark.parametrize("granularity", ["neuron", "head", "neuron+head"])
def test_a_score_is_stepped_by_the_learning_rate_as_one_of_a_weight_is(granularity: str) -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity=granularity, score_init="magnitude")).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 5e-5)
    before = {name: layer.adaprune_scores["default"].detach().clone() for name, layer in adaprune_layers(model)}
    loss_of(model(**make_batch())).backward()
    optimizer.step()
    for name, layer in adaprune_layers(model):
        moved = (layer.adaprune_scores["default"].detach() - before[name]).abs() * 100
        assert float(moved.max()) == pytest.approx(5e-3, rel=1e-2)


def test_scores_start_as_the_ranks_of_what_belongs_to_a_group() -> None:
    base = make_model()
    layer0 = base.bert.encoder.layer[0]
    neurons = layer0.intermediate.dense.weight.abs().sum(1) + layer0.output.dense.weight.abs().sum(0)
    parts = [layer0.attention.self.query, layer0.attention.self.key, layer0.attention.self.value]
    heads = sum(part.weight.abs().view(2, -1).sum(1) for part in parts)
    heads = heads + layer0.attention.output.dense.weight.abs().T.reshape(2, -1).sum(1)
    get_peft_model(base, AdaPruneConfig(granularity="neuron+head", score_init="magnitude"))
    for module, importance in ((layer0.output.dense, neurons), (layer0.attention.output.dense, heads)):
        scores = module.adaprune_scores["default"] * 100
        assert torch.equal(scores.argsort(), importance.argsort())
        torch.testing.assert_close(scores.sort().values, torch.linspace(0, 2, len(importance)))


def test_groups_start_in_the_order_in_which_the_output_misses_them_least() -> None:
    base = make_model(num_hidden_layers=1).train()
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    seen: dict[str, torch.Tensor] = {}
    layer0 = base.bert.encoder.layer[0]
    watched = {"neuron": layer0.output.dense, "head": layer0.attention.output.dense}
    handles = [
        module.register_forward_pre_hook(lambda m, args, key=key: seen.__setitem__(key, args[0].detach()))
        for key, module in watched.items()
    ]
    batch = make_batch()
    base(**batch)
    for handle in handles:
        handle.remove()
    weights = {key: module.weight.detach().clone() for key, module in watched.items()}
    model = get_peft_model(base, AdaPruneConfig(granularity="neuron+head")).train()
    pruner = Pruner(model, 10)
    model(**batch)
    pruner.step()
    for key, module in (("neuron", layer0.output.dense), ("head", layer0.attention.output.dense)):
        order = module.adaprune_scores["default"].argsort().tolist()
        inputs = seen[key].reshape(-1, len(order), seen[key].shape[-1] // len(order)).double()
        weight = weights[key].T.reshape(*inputs.shape[1:], -1).double()
        outputs = torch.einsum("tgw,gwo->gto", inputs, weight)  # what each group puts into the output, token by token
        missed = torch.zeros_like(outputs[0])
        for place, group in enumerate(order):
            left = torch.stack([(missed + outputs[other]).square().sum() for other in order[place:]])
            assert left[0] <= left.min() * (1 + 1e-5), (key, place)
            missed += outputs[group]


def test_every_layer_keeps_as_many_neurons_unless_the_scope_is_wider() -> None:
    kept = {}
    for scope in ("module", "kind", "global"):
        base = make_model(num_hidden_layers=3)
        with torch.no_grad():
            base.bert.encoder.layer[1].output.dense.weight *= 0.01
        # Constant scores: the magnitudes decide, and these differ between the layers.
        config = AdaPruneConfig(granularity="neuron", final_sparsity=0.33, scope=scope, score_init="constant")
        model = get_peft_model(base, config)
        Pruner(model, 1).step()
        kept[scope] = [int(mask.sum()) for mask in scored_masks(model).values()]
    assert kept["module"] == [27, 27, 27]
    assert sum(kept["kind"]) == sum(kept["global"]) == 80
    assert len(set(kept["kind"])) > 1


def test_neurons_and_heads_share_a_budget_of_weights() -> None:
    config = AdaPruneConfig(granularity="neuron+head", scope="global", score_init="constant")
    base = make_model(num_attention_heads=4)
    with torch.no_grad():
        for layer in base.bert.encoder.layer:
            layer.intermediate.dense.weight *= 100.0
    model = get_peft_model(base, config)
    Pruner(model, 1).step()
    report = sparsity_report(model)
    assert abs(report.num_pruned - 0.5 * report.num_weights) <= 32
    shares = report.by_component()
    assert shares["attention.self.query"] == 0.75 > shares["output.dense"] > 0
    assert shares["attention.self.query"] == shares["attention.output.dense"]


def reference_prune(scores: list[list[float]], sizes: list[int], sparsity: float) -> list[list[bool]]:
    """Walk over all groups, the lowest first, and take what fits."""
    total = sum(len(block) * size for block, size in zip(scores, sizes, strict=True))
    budget = sparsity * total + min(sizes) / 2
    kept = [[True] * len(block) for block in scores]
    for score, i, j in sorted((s, i, j) for i, block in enumerate(scores) for j, s in enumerate(block)):
        if score != max(scores[i]) and sizes[i] <= budget:
            kept[i][j] = False
            budget -= sizes[i]
    return kept


@pytest.mark.parametrize("seed", range(20))
def test_groups_are_pruned_lowest_first_within_the_budget(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sizes = [64, 96, 512, 64]
    scores = [torch.rand(length, generator=generator) for length in (40, 30, 8, 5)]
    for sparsity in (0.0, 0.1, 0.5, 0.77, 0.9):
        masks = prune_groups(scores, [torch.ones_like(s) for s in scores], sizes, sparsity)
        expected = reference_prune([s.tolist() for s in scores], sizes, sparsity)
        assert [mask.tolist() for mask in masks] == expected
        assert all(mask.any() for mask in masks)


def test_of_groups_with_equal_scores_the_smallest_go_first_and_then_the_last() -> None:
    masks = prune_groups([torch.ones(4)], [torch.tensor([3.0, 1.0, 2.0, 2.0])], [1], 0.5)
    assert masks[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8)])
@pytest.mark.parametrize("input_dim", [0, 1])
def test_the_best_pattern_of_every_group_of_weights_is_kept(n: int, m: int, input_dim: int) -> None:
    generator = torch.Generator().manual_seed(n * m)
    # Few values, so that there are ties; of these the larger weight is better.
    scores = torch.randint(0, 3, (16, 16), generator=generator).float()
    weight = torch.rand(16, 16, generator=generator)
    mask = protect_best(scores, weight, n, m, input_dim) == float("inf")
    value = (scores + weight * 1e-3).movedim(input_dim, -1).reshape(-1, m)
    kept = mask.movedim(input_dim, -1).reshape(-1, m)
    patterns = [list(pattern) for pattern in itertools.combinations(range(m), n)]
    best = torch.stack([value[:, pattern].sum(1) for pattern in patterns]).argmax(0)
    assert (kept.sum(1) == n).all()
    assert all(kept[i].nonzero().squeeze(1).tolist() == patterns[best[i]] for i in range(len(kept)))


@pytest.mark.parametrize("scope", ["module", "kind", "global"])
def test_two_of_four_are_kept_everywhere_and_on_the_way_no_pattern_is_overdrawn(scope: Scope) -> None:
    model = get_peft_model(make_model("gpt2"), AdaPruneConfig(granularity="2:4", scope=scope, pruning_end=1.0))
    pruner = Pruner(model, 5)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    for step in range(5):
        loss_of(model(**make_batch(seed=step))).backward()
        optimizer.step()
        pruner.step()
        pruned = torch.cat([(~layer.mask("default")).T.reshape(-1, 4).sum(1) for layer in pruner.layers.values()])
        assert pruned.max() <= 2
        assert int(pruned.sum()) == round(pruner.target_sparsity * 4 * len(pruned))
    assert (pruned == 2).all()


def test_a_block_keeps_its_best_group_when_scores_fall_below_zero() -> None:
    config = AdaPruneConfig(granularity="neuron+head", selection="threshold", score_init="normal", drift=1.0)
    model = get_peft_model(make_model(), config)
    pruner = Pruner(model, 1)
    pruner.step()
    assert [int(mask.sum()) for mask in scored_masks(model).values()] == [1, 1, 1, 1]
    assert pruner.finished


def test_a_run_that_is_cut_short_is_pruned_to_whole_groups(recwarn: pytest.WarningsRecorder) -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity="neuron", final_sparsity=0.33))
    pruner = Pruner(model, 100)
    pruner.step()
    with pytest.warns(UserWarning, match="lowest scores were pruned"):
        pruner.finalize()
    assert [int(mask.sum()) for mask in scored_masks(model).values()] == [27, 27]
    pruner.finalize()
    assert [int(mask.sum()) for mask in scored_masks(model).values()] == [27, 27]


def test_masks_of_weights_and_of_groups_stand_side_by_side_on_one_base() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity="neuron+head"))
    train_masks(model)
    groups = logits_of(model)
    model.add_adapter("weights", AdaPruneConfig(final_sparsity=0.7))
    model.set_adapter("weights")
    train_masks(model, adapter_name="weights")
    weights = logits_of(model)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), groups)
    model.add_adapter("third", AdaPruneConfig(granularity="neuron"))
    model.set_adapter("third")
    train_masks(model, adapter_name="third")
    assert sorted(get_peft_model_state_dict(model, adapter_name="third"))[0].endswith(
        "layer.0.output.dense.adaprune_mask"
    )
    model.delete_adapter("default")
    model.set_adapter("weights")
    assert torch.equal(logits_of(model), weights)
    assert [layer.groups("default") for _, layer in adaprune_layers(model)] == [None] * 12


def test_an_adapter_goes_in_from_its_state_alone(trained: Trained) -> None:
    state = get_peft_model_state_dict(trained.model)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    config = trained.model.peft_config["default"]
    fresh = AdaPruneConfig(granularity=config.granularity, inference_mode=True)
    model = inject_adapter_in_model(fresh, trained.load_base(), state_dict=state)
    assert [name for name, _ in adaprune_layers(model)] == [
        name.removeprefix("base_model.model.") for name, _ in adaprune_layers(trained.model)
    ]


def test_masks_of_groups_pick_the_highest_scores_of_their_block() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity="neuron", final_sparsity=0.25))
    train_masks(model)
    for _, layer in adaprune_layers(model):
        scores = layer.adaprune_scores["default"].detach()
        assert torch.equal(layer.scored_mask("default"), topk_mask(scores, 30, layer.entry_weights("default")))


def test_masks_of_groups_are_read_without_their_base_as_masks_of_all_their_weights(trained: Trained) -> None:
    masks, counts = load_masks(trained.adapter), sparsity_report(trained.model).modules
    assert {name: (~mask).sum() for name, mask in masks.items()} == {
        module.name.removeprefix("base_model.model."): module.num_pruned for module in counts
    }
    held = model_masks(trained.model)
    assert list(held) == list(masks)
    assert all(torch.equal(held[name], mask) for name, mask in masks.items())
    merged = trained.open("PeftModel").merge_and_unload()
    assert all(torch.equal(mask, merged.get_submodule(name).weight != 0) for name, mask in masks.items())
