"""Architectures that are built in a way of their own: beside those that are promised, what others stumbled over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import AutoPeftModel, AutoPeftModelForQuestionAnswering, PeftModel, get_peft_model
from tiny import ARCHITECTURES, VOCAB, make_batch, make_model, train_masks
from transformers import BertConfig, CLIPConfig, CLIPModel, EncoderDecoderConfig, EncoderDecoderModel

from hf_adaprune import AdaPruneConfig, Pruner, compact, sparsity_report
from hf_adaprune.deploy.export import OnnxModel, export_onnx
from hf_adaprune.errors import CompactionError, MergeError, NoMatchingModuleError, StructureError
from hf_adaprune.tuner.example_inputs import example_inputs, longest_input
from hf_adaprune.tuner.masked_layers import adaprune_layers


_T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 16, "d_ff": 40, "num_layers": 2, "num_heads": 2}
_BIG_BIRD = ARCHITECTURES["bert"] | {"max_position_embeddings": 128, "block_size": 4, "num_random_blocks": 1}
MODELS: dict[str, dict[str, Any]] = {
    "T5EncoderModel": _T5,
    "T5ForQuestionAnswering": _T5 | {"decoder_start_token_id": 0},
    "BigBirdForSequenceClassification": _BIG_BIRD | {"sep_token_id": 2},
    "BigBirdForQuestionAnswering": _BIG_BIRD | {"sep_token_id": 2},
    "CanineForSequenceClassification": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 40,
        "num_hash_buckets": 16,
    },
    "XLNetForSequenceClassification": {"vocab_size": VOCAB, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 40},
    "FunnelForSequenceClassification": {"vocab_size": VOCAB, "block_sizes": [1, 1], "d_model": 32, "n_head": 2},
    "BertForMultipleChoice": ARCHITECTURES["bert"],
}


def build(name: str) -> Any:
    """Return a random model of a class of transformers; the same every time."""
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    return cls(cls.config_class(**MODELS[name])).eval()


def train_and_save(name: str, folder: Path) -> tuple[PeftModel, torch.Tensor]:
    """Train an adapter for a model, save both, and return what the model computes."""
    base = build(name)
    base.save_pretrained(folder / "base")
    base.config._name_or_path = base.name_or_path = str(folder / "base")
    model = get_peft_model(base, AdaPruneConfig())
    train_masks(model, head="question" if name.endswith("QuestionAnswering") else "none")
    model.save_pretrained(str(folder / "adapter"))
    return model, outputs_of(model)


@torch.no_grad()
def outputs_of(model: Any, length: int = 10) -> torch.Tensor:
    return model.eval()(**make_batch("none", length=length))[0]


def keep(model: Any, kind: str, mask: torch.Tensor) -> None:
    """Set the mask over the groups of a kind, in each block."""
    for _, layer in adaprune_layers(model):
        groups = layer.groups("default")
        if groups is not None and groups.block.kind == kind:
            layer.set_mask("default", mask)


@pytest.mark.parametrize(
    ("name", "auto"),
    [
        ("T5EncoderModel", AutoPeftModel),  # AutoModel builds another class
        ("T5ForQuestionAnswering", AutoPeftModelForQuestionAnswering),
        ("BigBirdForQuestionAnswering", AutoPeftModel),  # its head holds a module that PEFT takes for the head
    ],
)
def test_heads_and_bodies_of_other_build_are_opened_again(name: str, auto: Any, tmp_path: Path) -> None:
    model, outputs = train_and_save(name, tmp_path)
    base = getattr(transformers, name).from_pretrained(tmp_path / "base")
    assert torch.equal(outputs_of(PeftModel.from_pretrained(base, tmp_path / "adapter")), outputs)
    opened = auto.from_pretrained(tmp_path / "adapter")
    assert type(opened.get_base_model()).__name__ == name
    assert torch.equal(outputs_of(opened), outputs)
    assert not any("qa_outputs" in module for module, _ in adaprune_layers(model))


@pytest.mark.parametrize(
    ("name", "there"),
    [("T5EncoderModel", r"\['shared', 'encoder.embed_tokens'\]"), ("CanineForSequenceClassification", "none")],
)
def test_embeddings_are_masked_only_where_one_module_looks_them_up(name: str, there: str) -> None:
    with pytest.raises(NoMatchingModuleError, match=rf"{name} has {there}\. Name in `target_modules`"):
        get_peft_model(build(name), AdaPruneConfig(mask_embeddings=True))


def test_masked_embeddings_are_found_by_a_second_adapter() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(mask_embeddings=True), "x")
    model.add_adapter("y", AdaPruneConfig(mask_embeddings=True))
    assert "bert.embeddings.word_embeddings" in dict(adaprune_layers(model.get_base_model(), "y"))


def test_a_second_adapter_masks_no_embeddings_because_the_first_did() -> None:
    alone = get_peft_model(make_model(), AdaPruneConfig())
    model = get_peft_model(make_model(), AdaPruneConfig(mask_embeddings=True), "x")
    model.add_adapter("y", AdaPruneConfig())
    assert sparsity_report(model, "y").num_weights == sparsity_report(alone).num_weights
    model.add_adapter("two of four", AdaPruneConfig(granularity="2:4"))
    model.set_adapter("two of four")
    train_masks(model, adapter_name="two of four")
    assert sparsity_report(model, "two of four").sparsity == 0.5
    with pytest.raises(StructureError, match=r"these are embeddings: \['.*word_embeddings'\]"):
        model.add_adapter("z", AdaPruneConfig(granularity="2:4", target_modules=["query", "word_embeddings"]))


def test_sparse_attention_is_still_sparse_after_neurons_and_heads_were_looked_for_and_removed() -> None:
    base = build("BigBirdForSequenceClassification")
    expected = outputs_of(base, length=100)
    model = get_peft_model(base, AdaPruneConfig(granularity="neuron+head"))
    assert base.bert.attention_type == "block_sparse"
    assert torch.equal(outputs_of(base, length=100), expected)
    keep(model, "neuron", torch.arange(40) < 30)
    small = compact(model)
    assert small.bert.attention_type == "block_sparse"
    torch.testing.assert_close(outputs_of(small, length=100), outputs_of(model, length=100))
    keep(model, "head", torch.tensor([True, False]))
    with pytest.raises(CompactionError, match="BigBirdForSequenceClassification cannot be compacted"):
        compact(model)


def test_a_merged_model_with_the_papers_head_is_not_saved_as_what_it_is_not(tmp_path: Path) -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(head="layer_average"))
    plain = model.merge_and_unload()
    for save in (plain.save_pretrained, plain.push_to_hub):
        with pytest.raises(MergeError, match='the head "layer_average", which the BertForSequenceClassification'):
            save(str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()
    get_peft_model(make_model(), AdaPruneConfig()).merge_and_unload().save_pretrained(tmp_path / "merged")


def test_the_papers_head_leaves_nothing_on_the_body_when_it_is_deleted() -> None:
    model = make_model()
    model.add_adapter(AdaPruneConfig(head="layer_average"))
    model.delete_adapter("default")
    body = model.base_model
    assert not any([body._forward_hooks, body._forward_pre_hooks, body._forward_pre_hooks_with_kwargs])
    assert type(body(make_batch()["input_ids"], return_dict=False)) is tuple


def test_what_a_user_has_put_on_a_model_is_there_again_after_the_adapter(tmp_path: Path) -> None:
    model = make_model()
    saved: list[Path] = []
    model.save_pretrained = saved.append
    model.add_adapter(AdaPruneConfig())
    model.delete_adapter("default")
    model.save_pretrained(tmp_path)
    assert saved == [tmp_path]


@pytest.mark.parametrize(
    "name", ["T5EncoderModel", "XLNetForSequenceClassification", "FunnelForSequenceClassification"]
)
def test_relative_positions_set_no_limit_to_a_row(name: str) -> None:
    model = build(name)
    assert longest_input(model) == 1024
    assert outputs_of(model, length=40).isfinite().all()
    model(**example_inputs(model, 2, 40))


def test_models_of_multiple_choice_are_run_and_exported(tmp_path: Path) -> None:
    model = build("BertForMultipleChoice")
    inputs = example_inputs(model, 3, 8)
    expected = model(**inputs).logits
    assert expected.shape == (3, 2)
    exported = OnnxModel(export_onnx(model, tmp_path))
    torch.testing.assert_close(exported(**inputs)[0], expected.detach(), atol=1e-5, rtol=1e-4)
    assert exported.session.get_inputs()[0].shape == ["batch", "choices", "length"]


def test_a_model_of_sounds_has_no_embeddings_to_leave_out(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    convolutions = {"conv_dim": [8], "conv_kernel": [4], "conv_stride": [2], "num_feat_extract_layers": 1}
    config = transformers.Wav2Vec2Config(
        **sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2
    )
    torch.manual_seed(0)
    base = transformers.Wav2Vec2ForSequenceClassification(config).eval()
    base.save_pretrained(tmp_path / "base")
    sound = torch.randn(2, 400)
    model = type(base).from_pretrained(tmp_path / "base")
    model.add_adapter(AdaPruneConfig())
    Pruner(model, 1).prune_to(0.5)
    model.save_pretrained(tmp_path / "adapter")
    opened: Any = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        assert torch.equal(opened.get_base_model()(sound).logits, model(sound).logits)


def test_neurons_are_not_looked_for_where_tokens_alone_are_no_input() -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(config, config))
    with pytest.raises(StructureError, match="forward pass over tokens, which EncoderDecoderModel refused"):
        get_peft_model(model, AdaPruneConfig(granularity="neuron"))


def test_a_model_of_pictures_and_words_is_opened_by_peft_too(tmp_path: Path) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 50}, vision_config=small | {"image_size": 8, "patch_size": 4}
    )
    CLIPModel(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(CLIPModel.from_pretrained(tmp_path / "base"), AdaPruneConfig())
    inputs = {"input_ids": torch.ones(1, 4, dtype=torch.long), "pixel_values": torch.zeros(1, 3, 8, 8)}
    model.eval()
    expected = model(**inputs).logits_per_image
    model.save_pretrained(tmp_path / "adapter")
    opened = PeftModel.from_pretrained(CLIPModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    assert torch.equal(opened(**inputs).logits_per_image, expected)
