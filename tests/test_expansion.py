"""Masks over a smaller model, expanded: one adapter over the whole base, which is made smaller again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from test_compaction import difference, trained
from tiny import HEADS, logits_of, make_batch, make_model, save_model, train_masks
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner, compact, expand, sparsity_report
from hf_adaprune.deploy.speed import measure_speed
from hf_adaprune.errors import BaseMismatchError, CompactionError, ConfigError, NotPrunedError
from hf_adaprune.merging import unmasked
from hf_adaprune.tuner.masked_layers import adaprune_layers


def over_smaller(whole: Any, head: str = "sequence", **options: Any) -> Any:
    """Return the smaller model of one with masks of groups, with trained masks of single weights."""
    small = get_peft_model(compact(whole), AdaPruneConfig(score_init="normal", **options))
    train_masks(small, steps=2, head=head)
    return small


@pytest.mark.parametrize(
    "architecture", ["bert", "roberta", "distilbert", "mpnet", "modernbert", "gpt2", "deberta-v2"]
)
@pytest.mark.parametrize("granularity", ["neuron", "neuron+head"])
def test_one_adapter_over_the_base_computes_what_two_did(architecture: str, granularity: str) -> None:
    whole = trained(architecture, granularity, scope="global")
    removed = sparsity_report(whole)
    small = over_smaller(whole)
    left = sparsity_report(small)
    model = expand(small, whole)
    assert difference(model, small) < 1e-6
    report = sparsity_report(model)
    # Groups alone mask no more than the blocks of their kind.
    assert report.num_weights == left.num_weights + removed.num_pruned
    assert report.num_pruned == left.num_pruned + removed.num_pruned
    plain, base = unmasked(model), unmasked(whole)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.parametrize("codec", ["packed-bits-lsb", "auto"])
def test_it_is_stored_and_opened_like_any_other_and_made_smaller_again(tmp_path: Path, codec: str) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "base", num_attention_heads=4))
    base.add_adapter(AdaPruneConfig(granularity="neuron+head"))
    train_masks(base, steps=2)
    small = over_smaller(base, mask_codec=codec)
    model = expand(small, base)
    model.save_pretrained(tmp_path / "adapter")
    logits = logits_of(model)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(opened), logits)
    peft_model = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(peft_model), logits)
    assert torch.equal(logits_of(PeftModel.from_pretrained(unmasked(base), tmp_path / "adapter")), logits)
    again = compact(peft_model)
    assert difference(again, small) < 1e-6
    assert again.num_parameters() <= compact(base).num_parameters()
    forms = [timing.name for timing in measure_speed(opened, lengths=(8,), repeats=2)[0].timings]
    assert forms == ["base", "merged", "compacted"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "removes the pruned neurons and heads" in " ".join(card.split())
    assert "intersection of masks of neurons and heads" in " ".join(card.split())


def test_one_that_is_trained_on_keeps_the_sparsity_of_each_matrix(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    whole = get_peft_model(HEADS["sequence"].from_pretrained(base), AdaPruneConfig(granularity="neuron+head"))
    train_masks(whole, steps=2)
    expand(over_smaller(whole, scope="global"), whole).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(HEADS["sequence"].from_pretrained(base), tmp_path / "adapter", is_trainable=True)
    assert "intersection" in str(model.peft_config["default"].combination)
    pruner = Pruner(model.train(), total_steps=2)
    assert model.peft_config["default"].combination is None
    before = {name: layer.pruned_and_total("default") for name, layer in pruner.layers.items()}
    pruner.step()
    assert {name: layer.pruned_and_total("default") for name, layer in pruner.layers.items()} == before
    assert len({pruned / total for pruned, total in before.values()}) > 2


def test_head_and_labels_are_those_of_the_smaller_model() -> None:
    whole = trained("bert", "neuron")
    names = {0: "good", 1: "bad", 2: "neither"}
    plain = compact(whole)
    plain.config.id2label, plain.config.label2id = names, {name: number for number, name in names.items()}
    small = get_peft_model(plain, AdaPruneConfig(score_init="normal"))
    train_masks(small, steps=3, learning_rate=1e-2)
    model = expand(small, whole)
    assert model.config.id2label == names
    assert torch.equal(model.classifier.modules_to_save["default"].weight, small.classifier.weight)
    assert not torch.equal(model.classifier.original_module.weight, small.classifier.weight)


def test_what_was_expanded_is_made_smaller_and_expanded_once_more() -> None:
    whole = trained("bert", "neuron+head")
    first = expand(over_smaller(whole, final_sparsity=0.3), whole)
    second = over_smaller(first)
    model = expand(second, first)
    assert difference(model, second) < 1e-6
    assert sparsity_report(model).num_pruned > sparsity_report(first).num_pruned
    for name, layer in adaprune_layers(first):
        kept = dict(adaprune_layers(model))[name].mask("default")
        assert not (kept & ~layer.mask("default")).any()


def test_a_run_of_two_trainers_needs_no_folder_between_them(tmp_path: Path) -> None:
    rows = [{key: tensor[0] for key, tensor in make_batch(seed=seed, size=1).items()} for seed in range(16)]
    args = TrainingArguments(str(tmp_path), max_steps=4, report_to="none", save_strategy="no", use_cpu=True)
    groups = AdaPruneConfig(granularity="neuron+head", scope="global")
    first = Trainer(make_model(), args, train_dataset=rows, callbacks=[AdaPruneCallback(groups)])
    first.train()
    second = Trainer(compact(first.model), args, train_dataset=rows, callbacks=[AdaPruneCallback])
    second.train()
    model = expand(second.model, first.model)
    assert difference(model, second.model) < 1e-6
    left = 1 - sparsity_report(first.model).sparsity
    assert sparsity_report(model).sparsity == pytest.approx(1 - left / 2, abs=1e-3)


@pytest.mark.filterwarnings("ignore:The head is in torch.bfloat16")
@pytest.mark.parametrize("half", ["first", "second"])
def test_one_of_the_runs_may_be_in_half_precision(half: str) -> None:
    whole = trained("bert", "neuron+head").to(torch.bfloat16 if half == "first" else torch.float32)
    plain = compact(whole).to(torch.bfloat16 if half == "second" else torch.float32)
    small = get_peft_model(plain, AdaPruneConfig(score_init="normal"))
    train_masks(small, steps=2)
    model = expand(small, whole)
    assert model.dtype == whole.dtype
    assert difference(model.float(), small.float()) < 5e-2


def test_what_the_first_run_has_trained_besides_comes_along() -> None:
    whole = trained("bert", "neuron", modules_to_save=["LayerNorm"])
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            if "LayerNorm.modules_to_save.default" in name:
                parameter.add_(0.5)
    small = over_smaller(whole)
    model = expand(small, whole)
    assert difference(model, small) < 1e-6


def test_the_second_run_may_have_the_papers_recipe_and_head() -> None:
    whole = trained("bert", "neuron+head")
    small = get_peft_model(compact(whole), AdaPruneConfig.from_preset("paper", final_sparsity=0.2, drift=0.03))
    train_masks(small, steps=4, learning_rate=1e-4)
    model = expand(small, whole)
    assert difference(model, small) < 1e-6
    assert "bert.embeddings.word_embeddings" in dict(adaprune_layers(model))


def test_models_that_do_not_belong_together_are_refused() -> None:
    whole, other = trained("bert", "neuron"), trained("bert", "neuron", final_sparsity=0.2)
    small = over_smaller(whole)
    with pytest.raises(BaseMismatchError, match="compacted under its active masks, but a layer"):
        expand(small, other)
    with torch.no_grad():
        next(layer for _, layer in adaprune_layers(other)).get_base_layer().weight.mul_(2)
    with pytest.raises(BaseMismatchError, match="its hidden states differ by"):
        expand(over_smaller(other), trained("bert", "neuron", final_sparsity=0.2))
    with pytest.raises(CompactionError, match="nothing to remove"):
        expand(small, small)
    with pytest.raises(NotPrunedError, match=r"one active AdaPrune adapter, got \[\]"):
        expand(compact(whole), whole)
    headless = trained("bert", "neuron", head="none")
    several = over_smaller(headless, head="none")
    several.add_adapter("other", AdaPruneConfig())
    several.base_model.set_adapter(["default", "other"])
    with pytest.raises(NotPrunedError, match=r"got \['default', 'other'\]"):
        expand(several, headless)
    with pytest.raises(CompactionError, match="got a Linear"):
        expand(torch.nn.Linear(2, 2), whole)


def test_a_configuration_does_not_claim_groups_that_there_are_not() -> None:
    with pytest.raises(ConfigError, match=r"`whole_groups` must be one of \[None, 'neuron', 'head', 'neuron\+head'\]"):
        AdaPruneConfig(whole_groups="layers")


def test_a_layer_that_the_first_run_has_trained_takes_no_masks_from_the_second() -> None:
    whole = trained("bert", "neuron+head", modules_to_save=["bert.encoder.layer.1"])
    with pytest.raises(ConfigError, match=r"weights that the adapter of `whole` trained.*layer\.1"):
        expand(over_smaller(whole), whole)
