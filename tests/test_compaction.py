"""Models made smaller: the same logits, fewer parameters, opened with and without this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import save_base
from hub_server import HubServer
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import HEADS, logits_of, make_batch, make_model, save_model, train_masks
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_adaprune import AdaPruneConfig, Pruner, compact, sparsity_report
from hf_adaprune.errors import BaseMismatchError, CompactionError, NotPrunedError
from hf_adaprune.masks import pack_mask
from hf_adaprune.merging import merged
from hf_adaprune.tuner.masked_layers import adaprune_layers


ARCHITECTURES = ("bert", "roberta", "distilbert", "electra", "mpnet", "modernbert")

# What runs where this package is not: it fails to import.
STOCK_USER = """
import sys
import warnings
sys.modules["hf_adaprune"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification
folder = sys.argv[1]
model = AutoModelForSequenceClassification.from_pretrained(folder)
with torch.no_grad():
    logits = model.eval()(**load_file(folder + "/batch.safetensors")).logits
save_file({"logits": logits}, folder + "/logits.safetensors")
assert not [name for name in sys.modules if name.startswith(("peft.tuners.adaprune", "hf_adaprune."))]
"""


def trained(
    architecture: str = "bert", granularity: str = "neuron+head", head: str = "sequence", **options: Any
) -> Any:
    overrides = {"n_heads" if architecture == "distilbert" else "num_attention_heads": 4}
    config = AdaPruneConfig(granularity=granularity, score_init="normal", **options)
    model = get_peft_model(make_model(architecture, head, **overrides), config)
    # Heads and neurons of its own in each layer, and biases that are not zero.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaprune_scores" in name:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) / 50)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 5)
    train_masks(model, steps=2, head=head)
    return model


def difference(model: Any, other: Any, head: str = "sequence") -> float:
    return float((logits_of(model, head) - logits_of(other, head)).abs().max())


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "gpt2", "deberta-v2"])
def test_neurons_and_heads_are_gone_and_the_logits_are_the_same(architecture: str, tmp_path: Path) -> None:
    model = trained(architecture, scope="global")
    report = sparsity_report(model)
    small = compact(model)
    assert difference(small, model) < 1e-6
    # As many weights fewer, and the biases that went with them.
    plain = merged(model)
    biases = sum(p.numel() for n, p in plain.named_parameters() if n.endswith("bias"))
    biases -= sum(p.numel() for n, p in small.named_parameters() if n.endswith("bias"))
    assert plain.num_parameters() - small.num_parameters() == report.num_pruned + biases
    small.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits_of(small))


@pytest.mark.parametrize("granularity", ["neuron", "neuron+head"])
def test_a_smaller_model_is_a_base_like_any_other(granularity: str, tmp_path: Path) -> None:
    compact(trained("bert", granularity)).save_pretrained(tmp_path / "small")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    model = get_peft_model(small, AdaPruneConfig(final_sparsity=0.3))
    train_masks(model, steps=2)
    report = sparsity_report(model)
    assert report.num_pruned == round(0.3 * report.num_weights)
    model.save_pretrained(tmp_path / "adapter")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(opened), logits_of(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_as_many_neurons_in_every_layer_it_is_a_stock_model(architecture: str, tmp_path: Path) -> None:
    model = trained(architecture, "neuron", final_sparsity=0.33)
    small = compact(model)
    assert type(small).__module__.startswith("transformers.models.")
    assert difference(small, model) < 1e-6
    small.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert 27 in stored.values()
    assert not [key for key in stored if "compact" in key or "adaprune" in key]
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(opened) is type(small)
    assert torch.equal(logits_of(opened), logits_of(small))


@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_a_stock_model_is_opened_where_this_package_cannot_be_imported(architecture: str, tmp_path: Path) -> None:
    model = trained(architecture, "neuron", final_sparsity=0.7)
    compact(model).save_pretrained(tmp_path)
    batch = make_batch()
    del batch["labels"]
    save_file(batch, tmp_path / "batch.safetensors")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", STOCK_USER, str(tmp_path)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(found, logits_of(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["none", "token", "question", "masked_lm"])
def test_every_head_comes_along(head: str, tmp_path: Path) -> None:
    model = trained("bert", head=head, scope="kind")
    small = compact(model)
    assert difference(small, model, head) < 1e-6
    small.save_pretrained(tmp_path)
    opened = HEADS[head].from_pretrained(tmp_path)
    assert type(opened) is type(small)
    assert torch.equal(logits_of(opened, head), logits_of(small, head))


def test_the_body_of_a_smaller_classifier_opens_alone(tmp_path: Path) -> None:
    small = compact(trained())
    small.save_pretrained(tmp_path)
    ids = make_batch()["input_ids"]
    with torch.no_grad():
        alone = AutoModel.from_pretrained(tmp_path)(ids).last_hidden_state
        torch.testing.assert_close(alone, small.bert(ids).last_hidden_state)


def test_a_smaller_model_is_one_of_its_own_class_and_works_in_a_pipeline(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    plain = AutoModelForSequenceClassification.from_pretrained(base, **labels)
    model = get_peft_model(plain, AdaPruneConfig(granularity="neuron+head"))
    Pruner(model, 1).step()
    small = compact(model)
    assert small.config.id2label == {0: "bad", 1: "good"}
    small.save_pretrained(tmp_path / "small")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "small")
    answer = pipeline("text-classification", model=str(tmp_path / "small"))("w7 w8")
    assert answer[0]["label"] in ("bad", "good")
    assert any(cls.__name__ == "BertForSequenceClassification" for cls in type(small).__mro__)


def test_the_masked_model_stays_as_it_was() -> None:
    model = trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = logits_of(model)
    compact(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits_of(model), logits)
    assert dict(adaprune_layers(model)) != {}


def test_an_adapter_put_on_by_transformers_is_applied_too(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.add_adapter(AdaPruneConfig(granularity="neuron+head"))
    Pruner(model, 1).step()
    model.save_pretrained(tmp_path / "adapter")
    for held in (model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")):
        small = compact(held)
        assert small.num_parameters() < make_model().num_parameters()
        assert difference(small, model) < 1e-6
        small.save_pretrained(tmp_path / "small")
        assert not (tmp_path / "small" / "adapter_config.json").exists()
        opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
        assert torch.equal(logits_of(opened), logits_of(small))


def test_a_smaller_model_is_trained_and_saved_like_any_other(tmp_path: Path) -> None:
    small = compact(trained()).train()
    small(**make_batch()).loss.backward()
    assert not [name for name, parameter in small.named_parameters() if parameter.grad is None]
    torch.optim.SGD(small.parameters(), 0.1).step()
    small.save_pretrained(tmp_path)
    assert torch.equal(logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path)), logits_of(small))


def test_two_active_masks_leave_what_both_keep() -> None:
    model = trained("bert", "neuron", head="none")
    model.add_adapter("other", AdaPruneConfig(granularity="neuron", final_sparsity=0.2, score_init="constant"))
    model.set_adapter("other")
    train_masks(model, steps=2, head="none", adapter_name="other")
    model.base_model.set_adapter(["default", "other"])
    kept = [
        int((layer.scored_mask("default") & layer.scored_mask("other")).sum()) for _, layer in adaprune_layers(model)
    ]
    small = compact(model)
    assert [layer.intermediate.dense.out_features for layer in small.encoder.layer] == kept
    assert difference(small, model, "none") < 1e-6


def test_the_adapter_does_not_go_on_the_smaller_model_nor_the_reverse(tmp_path: Path) -> None:
    model = trained()
    model.save_pretrained(tmp_path / "adapter")
    small = compact(model)
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(small, tmp_path / "adapter")
    again = get_peft_model(compact(model), AdaPruneConfig(granularity="neuron"))
    train_masks(again, steps=2)
    again.save_pretrained(tmp_path / "again")
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(make_model("bert", num_attention_heads=4), tmp_path / "again")
    opened = PeftModel.from_pretrained(compact(model), tmp_path / "again")
    assert torch.equal(logits_of(opened), logits_of(again))


@pytest.mark.parametrize("granularity", ["weight", "2:4"])
def test_masks_of_single_weights_have_nothing_to_remove(granularity: str) -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity=granularity))
    with pytest.raises(CompactionError, match="nothing to remove"):
        compact(model)


def test_another_field_of_the_same_value_as_the_width_is_passed_over() -> None:
    model = make_model(intermediate_size=32)  # and so is `hidden_size`
    model.add_adapter(AdaPruneConfig(granularity="neuron", inference_mode=True))
    for _, layer in adaprune_layers(model):
        layer.adaprune_mask["default"].copy_(pack_mask(torch.arange(32) < 21))
    assert compact(model).config.intermediate_size == 21


def test_what_cannot_be_made_smaller_is_refused() -> None:
    with pytest.raises(NotPrunedError, match="no active AdaPrune adapter"):
        compact(make_model())
    with pytest.raises(NotPrunedError, match="has no masks: open or train an adapter"):
        merged(make_model())
    with pytest.raises(CompactionError, match="got a Linear"):
        compact(torch.nn.Linear(2, 2))
    model = get_peft_model(make_model(), AdaPruneConfig(granularity="neuron", head="layer_average"))
    with pytest.raises(CompactionError, match="layer_average"):
        compact(model)


def test_a_model_that_does_not_compute_the_same_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("mpnet")
    # Without it the bias by position, of one part a head, is added to the wrong heads, or to none.
    monkeypatch.setattr("hf_adaprune.structured.compaction.keep_heads", lambda *args: None)
    with pytest.raises(CompactionError, match="MPNetForSequenceClassification cannot be compacted"):
        compact(model)


def test_the_card_tells_what_is_left_and_how_to_open_it(tmp_path: Path) -> None:
    model = trained("bert", "neuron", final_sparsity=0.25)
    compact(model).save_pretrained(tmp_path / "stock")
    card = ModelCard.load(tmp_path / "stock" / "README.md")
    assert "import hf_adaprune" not in card.text
    assert "| bert.encoder.layer.1.output.dense | 30 of 40 neurons |" in card.text
    assert 'AutoModelForSequenceClassification.from_pretrained("stock")' in card.text
    assert card.data.library_name == "transformers"
    small = compact(trained("bert", "neuron+head"))
    small.save_pretrained(tmp_path / "special")
    card = ModelCard.load(tmp_path / "special" / "README.md")
    assert "import hf_adaprune" in card.text
    (tmp_path / "special" / "README.md").write_text(f"{card}\nMine.")
    small.save_pretrained(tmp_path / "special")
    assert "Mine." in (tmp_path / "special" / "README.md").read_text()


def test_the_card_outlives_an_adapter_on_the_smaller_model(tmp_path: Path) -> None:
    small = compact(trained())
    small.add_adapter(AdaPruneConfig())
    small.delete_adapter("default")
    small.save_pretrained(tmp_path, True, small.state_dict())
    assert "without the neurons and attention heads" in (tmp_path / "README.md").read_text()


def _numbers(files: dict[str, bytes]) -> list[bytes]:
    """Return the rows of a card's table: how many groups each block has kept."""
    return [line for line in files["README.md"].splitlines() if b" of " in line and line.startswith(b"|")]


def test_a_push_takes_the_card_along(tmp_path: Path) -> None:
    script = f"""
import sys
import warnings
sys.path[:0] = {[str(Path(__file__).parents[1]), str(Path(__file__).parent)]!r}
from huggingface_hub import HfApi, ModelCard
from test_compaction import AdaPruneConfig, compact, trained
small = compact(trained())
small.push_to_hub("me/small")
HfApi().upload_file(repo_id="me/small", path_in_repo="README.md", path_or_fileobj=(
    "Mine.\\n" + ModelCard.load("me/small").text
).encode())
other = compact(trained(final_sparsity=0.25))
other.push_to_hub("me/small")
other.push_to_hub("me/small", revision="next")
other.push_to_hub("me/suggested", create_pr=True)
small.save_pretrained("{tmp_path}/saved", push_to_hub=True, repo_id="me/saved")
small.add_adapter(AdaPruneConfig())
small.push_to_hub("me/adapter")
"""
    with HubServer() as hub:
        environment = os.environ | hub.client_env(tmp_path / "home", hub.write_token) | {"HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-W", "ignore", "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        files, saved, adapter = (hub.files(f"me/{name}") for name in ("small", "saved", "adapter"))
        branch, main, pull_request = (
            hub.files(*where) for where in (("me/small", "next"), ("me/suggested",), ("me/suggested", "refs/pr/1"))
        )
    # What people wrote stays, what we wrote tells of the latest push.
    assert b"Mine." in files["README.md"]
    assert _numbers(files) == _numbers(branch) == _numbers(pull_request) != _numbers(saved)
    assert "README.md" not in main
    assert b"without the neurons and attention heads" in files["README.md"]
    assert json.loads(files["config.json"])["model_type"] == "adaprune_compact"
    assert len(files["model.safetensors"]) < 4 * make_model().num_parameters()
    assert saved.keys() == files.keys()
    assert b"without the neurons and attention heads" in saved["README.md"]
    assert b"without the neurons and attention heads" not in adapter["README.md"]
    assert "model.safetensors" not in adapter


def test_where_this_package_is_not_imported_a_special_model_says_what_it_is(tmp_path: Path) -> None:
    compact(trained()).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "adaprune_compact"
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.hidden_size == 32
    assert config.base_model_type == "bert"


def test_a_smaller_model_is_made_smaller_again(tmp_path: Path) -> None:
    model = trained("mpnet", scope="global")
    again = get_peft_model(compact(model), AdaPruneConfig(granularity="neuron+head", scope="global"))
    train_masks(again, steps=2)
    small = compact(again)
    assert small.num_parameters() < compact(model).num_parameters()
    assert difference(small, again) < 1e-6
    small.save_pretrained(tmp_path)
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits_of(opened), logits_of(small))


def test_a_smaller_model_has_a_pickle_that_another_process_opens(tmp_path: Path) -> None:
    small = compact(trained("mpnet"))
    torch.save(small, tmp_path / "small.pt")
    script = f"""
import sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from tiny import logits_of
model = torch.load({str(tmp_path / "small.pt")!r}, weights_only=False)
torch.save(logits_of(model), {str(tmp_path / "logits.pt")!r})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], env=environment, check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits_of(small))


def test_a_model_with_an_adapter_of_another_method_is_not_made_smaller(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.add_adapter(AdaPruneConfig(granularity="neuron"))
    Pruner(model, 1).step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of several adapters
        model.add_adapter(LoraConfig(target_modules=["query"], modules_to_save=["pooler", "classifier"]), "lora")
    model.set_adapter("default")
    with pytest.raises(CompactionError, match="adapter of another method too"):
        compact(model)


def test_a_width_that_the_configuration_leaves_open_is_written_into_it() -> None:
    model = trained("gpt2", "neuron")
    assert model.config.n_inner is None
    dense = compact(model)
    assert dense.config.model_type == "gpt2"
    assert dense.config.n_inner == dense.transformer.h[0].mlp.c_fc.weight.shape[1] < 128
