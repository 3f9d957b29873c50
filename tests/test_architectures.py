"""Every architecture that is promised, with every head: trained to the end of its schedule, saved, opened again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.save_and_load import get_base_model_state_dict
from tiny import ARCHITECTURES, CASES, HEADS, NUM_LABELS, logits_of, make_model, save_model, train_masks
from torch import nn

from hf_adaprune import AdaPruneConfig, Pruner
from hf_adaprune.errors import ConfigError, MergeError, NoMatchingModuleError
from hf_adaprune.tuner.masked_layers import adaprune_layers


# What a user expects to be masked: where a layer is (its number left open), and the matrices in it.
_BERT = (
    "encoder.layer.{}.",
    "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense "
    "output.dense",
)
MASKED = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "electra": _BERT,
    "distilbert": (
        "transformer.layer.{}.",
        "attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2",
    ),
    "albert": (
        "encoder.albert_layer_groups.0.albert_layers.0.",
        "attention.query attention.key attention.value attention.dense ffn ffn_output",
    ),
    "deberta-v2": (
        "encoder.layer.{}.",
        "attention.self.query_proj attention.self.key_proj attention.self.value_proj attention.output.dense "
        "intermediate.dense output.dense",
    ),
    "mpnet": (
        "encoder.layer.{}.",
        "attention.attn.q attention.attn.k attention.attn.v attention.attn.o intermediate.dense output.dense",
    ),
    "modernbert": ("layers.{}.", "attn.Wqkv attn.Wo mlp.Wi mlp.Wo"),
    "gpt2": ("h.{}.", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "llama": (
        "layers.{}.",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj",
    ),
}
OUTSIDE_OF_LAYERS = {"electra": "embeddings_project", "albert": "encoder.embedding_hidden_mapping_in"}

LANGUAGE_MODELS = [case for case in CASES if case[1].endswith("_lm")]
CLASSIFIERS = [case for case in CASES if case[1] == "sequence"]
DOORS = ["PeftModel", "AutoPeftModel", "load_adapter", "from_pretrained"]


@dataclass
class Trained:
    """A trained adapter, in memory and saved."""

    architecture: str
    head: str
    base: Path
    adapter: Path
    model: Any
    pruner: Pruner
    before: dict[str, torch.Tensor]
    logits: torch.Tensor

    def load_base(self, **options: Any) -> Any:
        """Open the base as its user does, who says how many labels there are."""
        if self.head in ("sequence", "token"):
            options = {"num_labels": NUM_LABELS} | options
        return HEADS[self.head].from_pretrained(self.base, **options)

    def open(self, door: str, **options: Any) -> Any:
        """Open the adapter by one of the doors there are."""
        if door == "PeftModel":
            return PeftModel.from_pretrained(self.load_base(**options), self.adapter)
        if door == "AutoPeftModel":
            name = HEADS[self.head].__name__.replace("AutoModel", "AutoPeftModel")
            name = {"none": "AutoPeftModelForFeatureExtraction"}.get(self.head, name)
            return getattr(peft, name, peft.AutoPeftModel).from_pretrained(self.adapter, **options)
        if door == "load_adapter":
            model = self.load_base(**options)
            model.load_adapter(self.adapter)
            return model
        return HEADS[self.head].from_pretrained(self.adapter, **options)

    def logits_of(self, model: nn.Module) -> torch.Tensor:
        return logits_of(model, self.head)


def train(
    architecture: str,
    head: str,
    folder: Path,
    config: AdaPruneConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> Trained:
    # A checkpoint as they are on the Hub: a pre-trained body, with the output layer of a language model or none.
    kept = head if head.endswith("_lm") else "none"
    base = save_model(folder / "base", architecture, kept, num_labels=2)
    trained = Trained(architecture, head, base, folder / "adapter", None, None, {}, torch.empty(0))  # type: ignore[arg-type]
    model = trained.load_base(dtype=dtype)
    trained.before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained.model = get_peft_model(model, config or AdaPruneConfig())
    trained.pruner = train_masks(trained.model, head=head)
    trained.model.save_pretrained(trained.adapter)
    trained.logits = trained.logits_of(trained.model)
    return trained


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    architecture, head = request.param
    return train(architecture, head, tmp_path_factory.mktemp(f"{architecture}-{head}"))


def masked_names(model: nn.Module) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, _ in adaprune_layers(model)}


def test_every_linear_layer_of_the_body_is_masked_and_no_other(trained: Trained) -> None:
    place, matrices = MASKED[trained.architecture]
    body = trained.model.get_base_model().base_model_prefix + "." if trained.head != "none" else ""
    expected = {f"{body}{place.format(number)}{matrix}" for number in range(2) for matrix in matrices.split()}
    if trained.architecture in OUTSIDE_OF_LAYERS:
        expected.add(body + OUTSIDE_OF_LAYERS[trained.architecture])
    assert masked_names(trained.model) == expected


def test_base_weights_never_change(trained: Trained) -> None:
    after = get_base_model_state_dict(trained.model)
    assert after.keys() == trained.before.keys()
    assert [name for name in after if not torch.equal(after[name], trained.before[name])] == []


def test_what_is_pruned_is_what_was_asked_for_to_the_last_weight(trained: Trained) -> None:
    counts = [layer.pruned_and_total("default") for _, layer in adaprune_layers(trained.model)]
    pruned, total = (sum(column) for column in zip(*counts, strict=True))
    assert pruned == round(0.5 * total)


def test_every_mask_is_trained(trained: Trained) -> None:
    gradients = {name: layer.adaprune_scores["default"].grad for name, layer in adaprune_layers(trained.model)}
    assert [name for name, grad in gradients.items() if grad is None or not grad.any()] == []


def test_only_scores_and_the_head_are_trained(trained: Trained) -> None:
    trainable = {name for name, parameter in trained.model.named_parameters() if parameter.requires_grad}
    head = {name for name in trainable if ".modules_to_save.default." in name}
    scores = {f"{name}.adaprune_scores.default" for name, _ in adaprune_layers(trained.model)}
    assert trainable == head | scores
    assert bool(head) == (trained.head in ("sequence", "token", "question"))


@pytest.mark.parametrize("door", DOORS)
def test_a_saved_adapter_computes_the_same_through_every_door(trained: Trained, door: str) -> None:
    model = trained.open(door)
    assert torch.equal(trained.logits_of(model), trained.logits)
    assert not torch.equal(trained.logits, trained.logits_of(trained.load_base()))


def test_merging_gives_a_plain_model_that_computes_the_same(trained: Trained, tmp_path: Path) -> None:
    merged = trained.open("PeftModel").merge_and_unload()
    assert merged.state_dict().keys() == trained.before.keys()
    assert not any(type(module).__module__.startswith(("peft", "hf_adaprune")) for module in merged.modules())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in merged.modules())
    assert torch.equal(trained.logits_of(merged), trained.logits)
    merged.save_pretrained(tmp_path)
    assert torch.equal(trained.logits_of(HEADS[trained.head].from_pretrained(tmp_path)), trained.logits)


def test_the_modules_of_a_bert_are_the_twelve_matrices_of_its_layers() -> None:
    model = get_peft_model(make_model("bert", "sequence"), AdaPruneConfig())
    assert masked_names(model) == {
        "bert.encoder.layer.0.attention.self.query",
        "bert.encoder.layer.0.attention.self.key",
        "bert.encoder.layer.0.attention.self.value",
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.encoder.layer.1.attention.self.query",
        "bert.encoder.layer.1.attention.self.key",
        "bert.encoder.layer.1.attention.self.value",
        "bert.encoder.layer.1.attention.output.dense",
        "bert.encoder.layer.1.intermediate.dense",
        "bert.encoder.layer.1.output.dense",
    }
    assert model.peft_config["default"].modules_to_save == ["bert.pooler", "classifier"]


@pytest.mark.parametrize(("architecture", "head"), CLASSIFIERS)
def test_masked_input_embeddings_are_trained_saved_and_merged(architecture: str, head: str, tmp_path: Path) -> None:
    trained = train(architecture, head, tmp_path, AdaPruneConfig(mask_embeddings=True))
    embeddings = trained.model.get_input_embeddings()
    assert embeddings.pruned_and_total("default")[0] == round(0.5 * embeddings.weight.numel())
    assert embeddings.adaprune_scores["default"].grad.any()
    saved = get_peft_model_state_dict(trained.model)
    assert [key for key in saved if "embed" in key and not key.endswith(".adaprune_mask")] == []
    for door in DOORS:
        assert torch.equal(trained.logits_of(trained.open(door)), trained.logits), door
    assert torch.equal(trained.logits_of(trained.open("PeftModel").merge_and_unload()), trained.logits)


@pytest.mark.parametrize(("architecture", "head"), LANGUAGE_MODELS)
def test_masked_embeddings_that_are_tied_work_unmerged_and_refuse_to_merge(
    architecture: str, head: str, tmp_path: Path
) -> None:
    trained = train(architecture, head, tmp_path, AdaPruneConfig(mask_embeddings=True))
    base = trained.load_base()
    for door in DOORS:
        model = trained.open(door)
        assert torch.equal(trained.logits_of(model), trained.logits), door
        # The output layer still has every weight.
        assert torch.equal(model.get_output_embeddings().weight, base.get_output_embeddings().weight), door
    model = trained.open("PeftModel")
    if base.get_input_embeddings().weight is base.get_output_embeddings().weight:
        for merge in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(MergeError, match="shares its weight"):
                merge()
        assert torch.equal(trained.logits_of(model), trained.logits)
    else:
        assert architecture == "llama"
        assert torch.equal(trained.logits_of(model.merge_and_unload()), trained.logits)


@pytest.mark.parametrize(("architecture", "head"), [case for case in CLASSIFIERS if case[0] not in ("gpt2", "llama")])
def test_the_papers_head_works_on_every_classifier(architecture: str, head: str, tmp_path: Path) -> None:
    trained = train(architecture, head, tmp_path, AdaPruneConfig(head="layer_average"))
    assert trained.model.peft_config["default"].modules_to_save == ["classifier"]
    assert not any("pooler" in name for name in masked_names(trained.model))
    test_every_mask_is_trained(trained)
    weights = trained.model.get_base_model().classifier.layer_weights
    assert weights.shape == (3,)
    assert weights.grad.any()
    for door in DOORS:
        assert torch.equal(trained.logits_of(trained.open(door)), trained.logits), door
    assert torch.equal(trained.logits_of(trained.open("PeftModel").merge_and_unload()), trained.logits)


@pytest.mark.parametrize(
    ("architecture", "head"),
    [(a, h) for a, h in CASES if a in ("gpt2", "llama") or (a == "bert" and h != "sequence")],
)
def test_the_papers_head_is_refused_where_there_is_no_sequence_classifier(architecture: str, head: str) -> None:
    with pytest.raises(ConfigError, match="sequence classification"):
        get_peft_model(make_model(architecture, head), AdaPruneConfig(head="layer_average"))


@pytest.mark.filterwarnings("ignore:The head is in torch.bfloat16")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_base_in_bfloat16_is_pruned_and_opened_again(architecture: str, tmp_path: Path) -> None:
    trained = train(architecture, "sequence", tmp_path, dtype=torch.bfloat16)
    assert trained.logits.dtype == torch.bfloat16
    test_base_weights_never_change(trained)
    test_what_is_pruned_is_what_was_asked_for_to_the_last_weight(trained)
    test_every_mask_is_trained(trained)
    assert {layer.adaprune_scores["default"].dtype for _, layer in adaprune_layers(trained.model)} == {torch.float32}
    for door in DOORS:
        assert torch.equal(trained.logits_of(trained.open(door, dtype=torch.bfloat16)), trained.logits), door
    merged = trained.open("PeftModel", dtype=torch.bfloat16).merge_and_unload()
    assert torch.equal(trained.logits_of(merged), trained.logits)


def test_a_model_where_nothing_matches_is_refused_and_told_what_would() -> None:
    with pytest.raises(NoMatchingModuleError, match=r"\['qurey'\].*'dense', 'key', 'query', 'value'"):
        get_peft_model(make_model(), AdaPruneConfig(target_modules=["qurey"]))
    with pytest.raises(NoMatchingModuleError, match=r"qurey.*'dense', 'key', 'query', 'value'"):
        get_peft_model(make_model(), AdaPruneConfig(target_modules=".*qurey"))
    with pytest.raises(NoMatchingModuleError, match="'c_attn', 'c_fc', 'c_proj'"):
        get_peft_model(make_model("gpt2"), AdaPruneConfig(target_modules=["query"]))
    with pytest.raises(NoMatchingModuleError, match=r"no linear layer in its body, .* named in `target_modules`"):
        get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 1)), AdaPruneConfig())
