"""Models that somebody has made, or changed, before there are masks: resized embeddings, modules of their own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_callback import trainer
from tiny import logits_of, make_batch, make_model, save_model, train_masks
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertForSequenceClassification

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner, sparsity_report
from hf_adaprune.errors import BaseMismatchError, ConfigError


class Own(nn.Module):
    """A BERT with a head under a name that neither transformers nor PEFT knows."""

    def __init__(self, base: Path) -> None:
        super().__init__()
        self.bert = AutoModel.from_pretrained(base)
        self.my_head = nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **inputs: Any) -> dict[str, Any]:
        logits = self.my_head(self.bert(input_ids=input_ids, **inputs).last_hidden_state[:, 0])
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


@pytest.fixture(scope="module")
def resized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a base that has got six tokens more."""
    folder = tmp_path_factory.mktemp("base")
    model = AutoModelForSequenceClassification.from_pretrained(save_model(folder / "small"))
    model.resize_token_embeddings(model.config.vocab_size + 6)
    model.save_pretrained(folder / "resized")
    return folder / "resized"


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("options", [{}, {"mask_embeddings": True}, {"modules_to_save": ["word_embeddings"]}], ids=str)
def test_an_adapter_of_a_resized_model_opens_on_it(options: dict[str, Any], resized: Path, tmp_path: Path) -> None:
    model: Any = get_peft_model(AutoModelForSequenceClassification.from_pretrained(resized), AdaPruneConfig(**options))
    train_masks(model)
    model.save_pretrained(str(tmp_path))
    stored = load_file(tmp_path / "adapter_model.safetensors")
    saved_whole = any("word_embeddings" in name and not name.endswith("mask") for name in stored)
    assert saved_whole == ("modules_to_save" in options)
    opened = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(resized), tmp_path)
    assert torch.equal(logits_of(opened), logits_of(model))


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_an_adapter_of_a_model_that_was_resized_in_memory_says_what_it_belongs_to(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 6)
    tuned = get_peft_model(model, AdaPruneConfig())
    train_masks(tuned)
    tuned.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(BaseMismatchError, match="if that was resized, merged or compacted before"):
        PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), tmp_path / "adapter")


class Layers(nn.Module):
    """A model with a module whose name begins as PEFT's name for what an adapter is around."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layers[1](torch.relu(self.base_layers[0](x)))


def test_a_module_may_be_called_base_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Layers(), torch.randn(4, 8)
    model: Any = get_peft_model(copy.deepcopy(base), AdaPruneConfig(target_modules=["0", "1"]))
    pruner = Pruner(model, 1)
    model(x).sum().backward()
    pruner.step()
    model.save_pretrained(str(tmp_path))
    opened = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(opened.eval()(x), model.eval()(x))


def test_a_head_that_is_named_in_modules_to_save_is_no_part_of_the_base(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none")
    config = AdaPruneConfig(target_modules=["query", "key", "value"], modules_to_save=["my_head"])
    model: Any = get_peft_model(Own(base), config)
    trainer(model, tmp_path / "run", AdaPruneCallback).train()
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.manual_seed(1)
    opened = PeftModel.from_pretrained(Own(base), tmp_path / "adapter")
    with torch.no_grad():
        found, expected = (it.eval()(**make_batch())["logits"] for it in (opened, model))
    assert torch.equal(found, expected)


def test_a_model_of_ones_own_around_a_masked_bert_is_trained(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none")

    def make() -> Own:
        torch.manual_seed(0)
        model = Own(base)
        model.bert.add_adapter(AdaPruneConfig())
        return model

    whole, resumed = make(), make()
    trainer(whole, tmp_path / "run", AdaPruneCallback).train()
    trainer(resumed, tmp_path / "run", AdaPruneCallback).train(
        resume_from_checkpoint=str(tmp_path / "run/checkpoint-10")
    )
    assert sparsity_report(whole).sparsity == pytest.approx(0.5, abs=1e-4)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_parameters_of_no_module_are_warned_of() -> None:
    class Loose(BertForSequenceClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.warns(UserWarning, match=r"\['scale'\] of Loose are in no submodule.*neither trained nor saved"):
        Loose(make_model().config).add_adapter(AdaPruneConfig())


def test_a_head_goes_on_learning_while_the_base_teaches(tmp_path: Path) -> None:
    model = make_model()
    model.add_adapter(AdaPruneConfig())
    head = copy.deepcopy(model.classifier.modules_to_save["default"].state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    pruner = Pruner(model.train(), total_steps=2)
    for _ in range(2):
        student = model(**make_batch())
        with torch.no_grad():
            model.disable_adapters()
            teacher = model(**make_batch()).logits
            model.enable_adapters()
        (student.loss + (student.logits - teacher).square().mean()).backward()
        optimizer.step()
        pruner.step()
    for name, tensor in model.classifier.modules_to_save["default"].state_dict().items():
        assert not torch.equal(tensor, head[name]), name


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_tokens_that_are_added_after_the_masks_are_refused_before_training(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(save_model(tmp_path / "base"))
    model.add_adapter(AdaPruneConfig())
    known = model.config.vocab_size
    model.resize_token_embeddings(known + 6)
    with pytest.raises(ConfigError, match=rf"has {known + 6} tokens, but had {known} when masks were added"):
        trainer(model, tmp_path / "run", AdaPruneCallback).train()


def test_a_base_that_changes_by_being_trained_on_is_refused() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.linear(x))

    with pytest.raises(ConfigError, match=r"\['base_model.model.norm'\] update running statistics"):
        Pruner(get_peft_model(Normed(), AdaPruneConfig(target_modules=["linear"])), 4)
    model = get_peft_model(Normed(), AdaPruneConfig(target_modules=["linear"], modules_to_save=["norm"]))
    pruner, before = Pruner(model.train(), 4), model.base_model.model.norm.original_module.running_mean.clone()
    model(torch.randn(8, 4))
    pruner.step()
    assert torch.equal(model.base_model.model.norm.original_module.running_mean, before)
