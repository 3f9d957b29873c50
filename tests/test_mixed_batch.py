"""Mixed-task batches equal the runs apart, for every architecture and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import load_base, save_base, train
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import CASES, make_batch, make_model, train_masks
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from hf_adaprune import AdaPruneConfig, mixed_batch
from hf_adaprune.errors import MixedBatchError
from hf_adaprune.tuner.masked_layers import adaprune_layers
from hf_adaprune.tuner.mixed_batch import _put_together, _take


NAMES = ["y", "x", "__base__", "y", "z", "x", "__base__", "y"]


def prune_at_random(model: nn.Module, adapter_name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, layer in adaprune_layers(model, adapter_name):
        layer.set_mask(adapter_name, torch.rand(layer.base_weight.shape, generator=generator) < 0.5)


def randomize_heads(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def make_mixed(architecture: str = "bert", head: str = "sequence", **options: Any) -> Any:
    """Return a model with three adapters, each with masks and a head of its own."""
    model = get_peft_model(make_model(architecture, head), AdaPruneConfig(**options), "x")
    for name in ("y", "z"):
        model.add_adapter(name, AdaPruneConfig(**options))
    for seed, name in enumerate("xyz"):
        prune_at_random(model, name, seed)
    randomize_heads(model)
    return model.eval()


def rows_of(batch: dict[str, torch.Tensor], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    return {key: value[list(rows)] for key, value in batch.items()}


@torch.no_grad()
def run_alone(model: Any, batch: dict[str, torch.Tensor], name: str) -> ModelOutput:
    if name == "__base__":
        with model.disable_adapter():
            return model(**batch)
    model.set_adapter(name)
    return model(**batch)


def assert_equal_to_runs_apart(model: Any, batch: dict[str, torch.Tensor], names: list[str]) -> None:
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names)
    for row, name in enumerate(names):
        alone = run_alone(model, rows_of(batch, [row]), name)
        for key, value in alone.items():
            if isinstance(value, torch.Tensor) and value.dim():
                torch.testing.assert_close(mixed[key][row], value[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("architecture", "head"), CASES)
def test_each_sample_is_computed_as_it_is_alone(architecture: str, head: str) -> None:
    model = make_mixed(architecture, head)
    batch = {key: value for key, value in make_batch(head, size=8).items() if key in ("input_ids", "attention_mask")}
    assert_equal_to_runs_apart(model, batch, NAMES)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_masked_embeddings_are_mixed_too(architecture: str) -> None:
    model = make_mixed(architecture, mask_embeddings=True)
    batch = {key: value for key, value in make_batch(size=8).items() if key != "labels"}
    assert_equal_to_runs_apart(model, batch, NAMES)


def test_a_group_is_bit_for_bit_its_own_run() -> None:
    model, batch = make_mixed(), make_batch(size=8)
    del batch["labels"]
    mixed = model(**batch, adapter_names=NAMES).logits
    for name in set(NAMES):
        rows = [row for row, it in enumerate(NAMES) if it == name]
        assert torch.equal(mixed[rows], run_alone(model, rows_of(batch, rows), name).logits)


def test_heads_of_two_kinds_and_one_size_are_mixed() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(), "x")
    model.add_adapter("y", AdaPruneConfig(head="layer_average"))
    for seed, name in enumerate("xy"):
        prune_at_random(model, name, seed)
    randomize_heads(model)
    batch = {key: value for key, value in make_batch(size=4).items() if key != "labels"}
    assert_equal_to_runs_apart(model.eval(), batch, ["y", "x", "__base__", "y"])


def test_a_plain_transformers_model_is_mixed_by_a_context() -> None:
    model = make_mixed()
    plain, batch = model.base_model.model, make_batch(size=8)
    del batch["labels"]
    with mixed_batch(plain, NAMES):
        mixed = plain(**batch).logits
    assert torch.equal(mixed, model(**batch, adapter_names=NAMES).logits)
    assert "forward" not in vars(plain)


@pytest.mark.parametrize("head", ["sequence", "token", "masked_lm"])
def test_the_loss_is_the_mean_over_the_whole_batch(head: str) -> None:
    model, batch = make_mixed(head=head), make_batch(head, size=8)
    if head != "sequence":
        batch["labels"][2, 4:] = -100
        batch["labels"][6] = -100
    output = model(**batch, adapter_names=NAMES)
    classes = output.logits.shape[-1]
    wanted = nn.functional.cross_entropy(output.logits.view(-1, classes), batch["labels"].view(-1))
    torch.testing.assert_close(output.loss, wanted)


def test_without_any_label_the_loss_is_that_of_a_plain_batch() -> None:
    model, batch = make_mixed(head="token"), make_batch("token", size=8)
    batch["labels"].fill_(-100)
    assert model(**batch, adapter_names=NAMES).loss.isnan()


def test_the_loss_of_a_language_model_counts_the_tokens_that_are_predicted() -> None:
    model, batch = make_mixed("gpt2", "causal_lm"), make_batch("causal_lm", size=8)
    batch["labels"][1, 3:] = -100
    output = model(**batch, adapter_names=NAMES)
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    wanted = nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    torch.testing.assert_close(output.loss, wanted)
    assert output.past_key_values is None


def test_whatever_else_is_asked_for_is_put_together() -> None:
    model, batch = make_mixed(), make_batch(size=8)
    del batch["labels"]
    batch["token_type_ids"] = torch.arange(8)[:, None].remainder(2).expand(8, 10)
    options = {"output_hidden_states": True}
    mixed = model(**batch, **options, adapter_names=NAMES)
    as_tuple = model(**batch, **options, adapter_names=NAMES, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], mixed.logits)
    assert len(mixed.hidden_states) == 3
    for row, name in enumerate(NAMES):
        alone = run_alone(model, rows_of(batch, [row]), name)
        torch.testing.assert_close(mixed.logits[row], alone.logits[0], atol=2e-5, rtol=1e-4)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    del batch["input_ids"]
    by_vectors = model(inputs_embeds=embedded, **batch, adapter_names=NAMES)
    assert torch.equal(by_vectors.logits, mixed.logits)


def test_a_mixed_batch_leaves_the_model_as_it_was() -> None:
    model, batch = make_mixed(), make_batch(size=8)
    model.set_adapter("z")
    before = model(**batch).logits
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    active = [(layer.active_adapters, layer.disable_adapters) for _, layer in adaprune_layers(model)]
    model(**batch, adapter_names=NAMES)
    with pytest.raises(MixedBatchError):
        model(**batch, adapter_names=NAMES[1:])
    assert torch.equal(model(**batch).logits, before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert [(layer.active_adapters, layer.disable_adapters) for _, layer in adaprune_layers(model)] == active
    assert model.active_adapters == ["z"]


def test_what_cannot_be_mixed_is_refused(tmp_path: Path) -> None:
    model, batch = make_mixed(), make_batch(size=8)
    for names, said in (
        (["x"] * 7, "a name for each sample, got 7 names for 8 samples"),
        (["x"] * 9, "got 9 names for 8 samples"),
        ([], "got 0 names for 8 samples"),
        (["x"] * 7 + ["d"], r"no adapter \['d'\]; use \['x', 'y', 'z'\], or '__base__'"),
        ("x", "must be a list"),
    ):
        with pytest.raises(MixedBatchError, match=said):
            model(**batch, adapter_names=names)
    with pytest.raises(MixedBatchError, match=r"training mode: call `model.eval\(\)`"):
        model.train()(**batch, adapter_names=NAMES)
    model.eval().merge_adapter()
    with pytest.raises(MixedBatchError, match="unmerge_adapter"):
        model(**batch, adapter_names=NAMES)
    language_model = make_mixed("gpt2", "causal_lm")
    with pytest.raises(MixedBatchError, match="generate for each adapter separately"):
        language_model.generate(input_ids=batch["input_ids"], max_new_tokens=3, adapter_names=NAMES)


def test_heads_of_different_sizes_are_refused_and_told(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    model: Any = None
    for num_labels in (2, 3, 77):
        train(base, tmp_path / "run", num_labels=num_labels).model.save_pretrained(tmp_path / str(num_labels))
    model = PeftModel.from_pretrained(load_base(base, 3), tmp_path / "2", adapter_name="two")
    model.load_adapter(tmp_path / "3", "three")
    model.load_adapter(tmp_path / "77", "many")
    batch = {key: value for key, value in make_batch(size=4).items() if key != "labels"}
    with pytest.raises(MixedBatchError, match=r"one size, got \{'two': 2, 'three': 3, '__base__': 3\}"):
        model.eval()(**batch, adapter_names=["two", "three", "__base__", "two"])
    assert_equal_to_runs_apart(model, batch, ["three", "__base__", "__base__", "three"])
    assert_equal_to_runs_apart(model, batch, ["many"] * 4)
    assert_equal_to_runs_apart(model, batch, ["two"] * 4)


def test_an_adapter_that_masks_other_modules_is_mixed() -> None:
    model = get_peft_model(make_model(head="none"), AdaPruneConfig(), "x")
    model.add_adapter("y", AdaPruneConfig(target_modules=["query"]))
    prune_at_random(model, "x", 0)
    prune_at_random(model, "y", 1)
    assert_equal_to_runs_apart(model.eval(), make_batch("none", size=4), ["y", "x", "__base__", "y"])


def test_a_model_of_ones_own_is_mixed() -> None:
    base = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    model = get_peft_model(base, AdaPruneConfig(target_modules=["0"], modules_to_save=["2"]), "x")
    model.add_adapter("y", AdaPruneConfig(target_modules=["0"], modules_to_save=["2"]))
    prune_at_random(model, "x", 0)
    prune_at_random(model, "y", 1)
    randomize_heads(model)
    x = torch.randn(3, 5)
    mixed = model.eval()(x, adapter_names=["y", "__base__", "x"])
    for row, name in enumerate(["y", "__base__", "x"]):
        if name == "__base__":
            with model.disable_adapter():
                wanted = model(x[[row]])
        else:
            model.set_adapter(name)
            wanted = model(x[[row]])
        torch.testing.assert_close(mixed[row], wanted[0])


def test_only_the_models_own_forward_pass_is_mixed() -> None:
    model, batch = make_mixed(), make_batch(size=len(NAMES))
    plain = model.get_base_model()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with mixed_batch(plain, NAMES):
        with pytest.raises(MixedBatchError, match="only the model's own forward pass"):
            plain.bert(**inputs)
        plain(**batch)
    plain.bert(**inputs)


def test_adapters_in_training_are_mixed_as_they_stand() -> None:
    model = get_peft_model(make_model(head="none"), AdaPruneConfig(), "x")
    train_masks(model, head="none", adapter_name="x")
    model.add_adapter("y", AdaPruneConfig())
    assert_equal_to_runs_apart(model.eval(), make_batch("none", size=4), ["y", "x", "__base__", "y"])


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_an_active_adapter_of_another_method_is_refused() -> None:
    model = make_model()
    for name in ("x", "y"):
        model.add_adapter(AdaPruneConfig(), name)
        prune_at_random(model, name, 0)
    model.add_adapter(LoraConfig(target_modules=["query"]), "lora")
    model.set_adapter(["x", "lora"])
    batch = make_batch(size=2)
    with (
        pytest.raises(MixedBatchError, match="An adapter of another method is active"),
        mixed_batch(model.eval(), ["x", "y"]),
    ):
        model(**batch)
    model.set_adapter("x")
    with mixed_batch(model, ["x", "y"]):
        model(**batch)


def test_rows_of_an_encoders_output_are_still_one() -> None:
    output = BaseModelOutput(last_hidden_state=torch.arange(6.0).view(3, 2))
    taken = _take(output, torch.tensor([2, 0]), 3)
    assert isinstance(taken, BaseModelOutput)
    assert taken[0].tolist() == [[4.0, 5.0], [0.0, 1.0]]


def test_outputs_that_have_no_row_for_each_sample_are_refused() -> None:
    routed = [torch.ones(8, 2), torch.ones(16, 2)]  # one row for each token, as the routers of a mixture have
    with pytest.raises(MixedBatchError, match="one row per sample, got 24 rows for 3 samples"):
        _put_together(routed, [1, 2], torch.tensor([0, 2, 1]))
