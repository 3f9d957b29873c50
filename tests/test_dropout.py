"""Dropout while masks are trained, and after."""

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import ARCHITECTURES, make_batch, make_model
from torch import nn

from hf_adaprune import AdaPruneConfig, Pruner
from hf_adaprune.errors import ConfigError


# Every way in which the configurations of transformers ask for dropout; each model takes the ones that it knows.
HALF: dict[str, Any] = dict.fromkeys(
    [
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "classifier_dropout",
        "classifier_dropout_prob",
        "dropout",
        "attention_dropout",
        "seq_classif_dropout",
        "embedding_dropout",
        "mlp_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
    ],
    0.5,
)


def dropping_model(architecture: str = "bert") -> nn.Module:
    return make_model(architecture, **HALF)


def logits(model: nn.Module, *, training: bool) -> torch.Tensor:
    with torch.no_grad():
        return model.train(training)(**make_batch()).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_drops_nothing_while_its_masks_are_trained_and_what_it_did_after(architecture: str) -> None:
    model = get_peft_model(dropping_model(architecture), AdaPruneConfig(target_modules="all-linear", dropout=0.0))
    expected = logits(model, training=False)
    assert not torch.equal(logits(model, training=True), expected)

    pruner = Pruner(model, total_steps=1)
    torch.testing.assert_close(logits(model, training=True), expected)

    pruner.prune_to(0.0)
    with pytest.warns(UserWarning, match="Training ended at a sparsity"):
        pruner.finalize()
    pruner.prune_to(0.0)
    assert not torch.equal(logits(model, training=True), expected)


def test_a_dropout_that_is_asked_for_is_everywhere() -> None:
    model = get_peft_model(dropping_model(), AdaPruneConfig(dropout=0.25))
    Pruner(model, total_steps=1)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.25}


def test_none_leaves_the_dropout_of_the_model() -> None:
    model = get_peft_model(dropping_model(), AdaPruneConfig(dropout=None))
    Pruner(model, total_steps=1)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {0.5}


def test_a_training_that_was_broken_off_and_begun_anew_loses_no_dropout() -> None:
    model = get_peft_model(dropping_model(), AdaPruneConfig(dropout=0.0))
    Pruner(model, total_steps=1)
    Pruner(model, total_steps=1)
    plain = model.unload()
    assert {module.p for module in plain.modules() if isinstance(module, nn.Dropout)} == {0.5}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"num_labels": 1}, 0.0),
        ({"num_labels": 2, "problem_type": "regression"}, 0.0),
        ({"num_labels": 1, "problem_type": "multi_label_classification"}, 0.5),
        ({"num_labels": 3}, 0.5),
    ],
)
def test_by_default_a_regression_drops_nothing_and_all_else_what_the_model_does(
    labels: dict[str, Any], expected: float
) -> None:
    model = get_peft_model(make_model("bert", **HALF, **labels), AdaPruneConfig())
    Pruner(model, total_steps=1)
    assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} == {expected}


@pytest.mark.parametrize("dropout", [-0.1, 1.0, "none"])
def test_a_dropout_out_of_range_is_refused(dropout: object) -> None:
    with pytest.raises(ConfigError, match="`dropout` must be"):
        AdaPruneConfig(dropout=dropout)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", ["masked_lm", "token", "none"])
def test_one_label_makes_a_regression_of_a_sequence_classifier_alone(head: str) -> None:
    model: Any = get_peft_model(make_model("bert", head, num_labels=1, hidden_dropout_prob=0.5), AdaPruneConfig())
    Pruner(model, total_steps=1)
    assert 0.5 in {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
