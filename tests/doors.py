"""Ways to train an adapter, and every door that opens one again, for a random BERT of 64 words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel, get_peft_model
from tiny import VOCAB, make_model
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertTokenizer,
    Trainer,
    TrainingArguments,
    pipeline,
    set_seed,
)

from hf_adaprune import AdaPruneCallback, AdaPruneConfig


TEXTS = ["w7 w8 w9", "w10 w20 w30 w40 w50", "w11"]
WAYS = ("class", "instance", "wrapped")


def save_base(folder: Path, **overrides: Any) -> Path:
    """Save a random BERT without a head, and a tokenizer; return the folder."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(5, VOCAB))]
    BertTokenizer(vocab={word: number for number, word in enumerate(words)}, model_max_length=32).save_pretrained(
        folder
    )
    make_model("bert", "none", **overrides).save_pretrained(folder)
    return folder


def label_names(num_labels: int) -> dict[int, str]:
    """Return the labels of a head: not those that a model makes up for itself."""
    return {number: f"name of {number}" for number in range(num_labels)}


def load_base(base: str | Path, num_labels: int = 3) -> Any:
    """Load a base with a fresh head of named outputs; the same every time."""
    set_seed(0)
    names = label_names(num_labels)
    ids = {name: number for number, name in names.items()}
    return AutoModelForSequenceClassification.from_pretrained(base, id2label=names, label2id=ids)


def rows(num_labels: int = 3, size: int = 16) -> list[dict[str, Any]]:
    """Return random rows to train on; the same every time."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCAB, (size, 8), generator=generator)
    labels = [number / size if num_labels == 1 else number % num_labels for number in range(size)]
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def make_trainer(model: nn.Module, folder: Path, *callbacks: Any, num_labels: int = 3, **options: Any) -> Trainer:
    """Return a quiet Trainer of four steps."""
    options = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "no"} | options
    args = TrainingArguments(
        str(folder), report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no", log_level="error", **options
    )
    return Trainer(model, args, train_dataset=rows(num_labels), callbacks=list(callbacks))


def train(base: str | Path, folder: Path, way: str = "class", num_labels: int = 3, **options: Any) -> Trainer:
    """Train an adapter in one of the three ways; return the Trainer, after training."""
    model = load_base(base, num_labels)
    if way == "wrapped":
        model = get_peft_model(model, AdaPruneConfig())
    callback = AdaPruneCallback(AdaPruneConfig(final_sparsity=0.6)) if way == "instance" else AdaPruneCallback
    trainer = make_trainer(model, folder, callback, num_labels=num_labels, **options)
    trainer.train()
    return trainer


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    """Return what a model computes in evaluation for a fixed batch whose rows are of two lengths."""
    ids = torch.randint(5, VOCAB, (4, 10), generator=torch.Generator().manual_seed(1))
    attended = torch.ones_like(ids)
    attended[0, 5:] = 0
    return model.eval()(input_ids=ids, attention_mask=attended).logits


def _peft(base: str, adapter: str, **options: Any) -> Any:
    return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), adapter, **options)


def _peft_with_its_labels(base: str, adapter: str, **options: Any) -> Any:
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter).get_base_model()
    return PeftModel.from_pretrained(load_base(base, model.config.num_labels), adapter, **options)


def _auto_peft(base: str, adapter: str, **options: Any) -> Any:
    return AutoPeftModelForSequenceClassification.from_pretrained(adapter, **options)


def _auto(base: str, adapter: str) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(adapter)


def _load_adapter(base: str, adapter: str, **options: Any) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base)
    model.load_adapter(adapter, **options)
    return model


def _named(base: str, adapter: str) -> Any:
    return _load_adapter(base, adapter, adapter_name="another")


def _pipeline(base: str, adapter: str) -> Any:
    return pipeline("text-classification", model=adapter).model


# Each takes the name or the path of the base and of the adapter. All but one are told nothing of the labels.
DOORS: dict[str, Callable[..., Any]] = {
    "PeftModel.from_pretrained": _peft,
    "PeftModel.from_pretrained on a base with the adapter's labels": _peft_with_its_labels,
    "AutoPeftModelForSequenceClassification": _auto_peft,
    "AutoModelForSequenceClassification": _auto,
    "model.load_adapter": _load_adapter,
    "model.load_adapter under another name": _named,
    "pipeline": _pipeline,
}
TRAINABLE_DOORS = (
    "PeftModel.from_pretrained",
    "AutoPeftModelForSequenceClassification",
    "model.load_adapter",
)
