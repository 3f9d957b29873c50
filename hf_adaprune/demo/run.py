"""A small demonstration: fine-tuning, a frozen encoder and pruning compared on the same BERT."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from ..analysis import sparsity_report
from ..baselines import FeatureExtractionCallback
from ..hub.model_card import write_model_card
from ..training.callback import AdaPruneCallback
from .base import packaged_base
from .reviews import make_reviews


EPOCHS = 3
PRUNED = "pruned, 50 %"
METHODS: dict[str, tuple[float, list[type[TrainerCallback]]]] = {  # learning rate and callbacks of each
    "fine-tuning": (1e-4, []),
    "frozen encoder": (1e-3, [FeatureExtractionCallback]),
    PRUNED: (5e-5, [AdaPruneCallback]),
}

_RELOAD = """
import json, sys, hf_adaprune, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
folder, sentences = sys.argv[1], json.load(sys.stdin)
model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
tokens = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")
with torch.no_grad():
    print(json.dumps(model(**tokens).logits.tolist()))
"""


def run_demo(output_dir: Path, seed: int = 0) -> dict[str, dict[str, float]]:
    """Train and compare the methods, save the adapter, and reopen it in a fresh process.

    Args:
        output_dir (`Path`): Where to write the adapter, its card and its picture.
        seed (`int`): Seed of the task and of training.

    Returns:
        `dict[str, dict[str, float]]`: For each row of the table its `accuracy`, `pruned` (share of all weights) and
        `bytes`.

    Raises:
        ImportError: If the package that holds the demo's BERT is not installed.
        RuntimeError: If the adapter cannot be reopened, or then predicts differently.
    """
    console = Console()
    base = packaged_base()
    tokenizer = AutoTokenizer.from_pretrained(base)
    reviews = make_reviews(seed=seed)
    tokens = reviews.map(lambda batch: tokenizer(batch["sentence"]), batched=True, remove_columns=["sentence"])
    logging.set_verbosity_error()
    output_dir.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, float]] = {}
    for method, (learning_rate, callbacks) in METHODS.items():
        console.print(f"\n[bold]{method}[/bold]")
        trainer = _trainer(base, learning_rate, callbacks, tokens, tokenizer, output_dir, seed)
        trainer.train()
        accuracy = trainer.evaluate()["eval_accuracy"]
        rows[method] = {
            "accuracy": accuracy,
            "pruned": 0.0,
            "bytes": trainer.model.get_memory_footprint(return_buffers=False),
        }
    # The pruned model is trained last, so the trainer still holds it.
    report = sparsity_report(trainer.model)
    trainer.save_model(str(output_dir))
    write_model_card(output_dir, metrics={"accuracy": rows[PRUNED]["accuracy"]})
    adapter = output_dir / "adapter_model.safetensors"
    rows[PRUNED] |= {"pruned": report.sparsity_whole_model, "bytes": adapter.stat().st_size}
    console.print(_table(rows, report.sparsity))
    _check_reload(trainer.model, tokenizer, output_dir, reviews["validation"]["sentence"][:64])
    console.print("\nReopened by path in a fresh process: the predictions agree.")
    for name, what in (("", "adapter"), ("README.md", "card"), ("sparsity.png", "picture")):
        console.print(f"{what}: {output_dir / name}")
    return rows


def _trainer(
    base: str,
    learning_rate: float,
    callbacks: list[type[TrainerCallback]],
    tokens: DatasetDict,
    tokenizer: Any,
    output_dir: Path,
    seed: int,
) -> Trainer:
    set_seed(seed)
    names = tokens["train"].features["label"].names
    model = AutoModelForSequenceClassification.from_pretrained(base, id2label=dict(enumerate(names)))
    args = TrainingArguments(
        str(output_dir),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        learning_rate=learning_rate,
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_steps=50,
        report_to="none",
        disable_tqdm=False,
        seed=seed,
    )
    return Trainer(
        model,
        args,
        train_dataset=tokens["train"],
        eval_dataset=tokens["validation"],
        processing_class=tokenizer,
        compute_metrics=_accuracy,
        callbacks=list(callbacks),
    )


def _accuracy(output: Any) -> dict[str, float]:
    return {"accuracy": float((output.predictions.argmax(-1) == output.label_ids).mean())}


def _table(rows: dict[str, dict[str, float]], sparsity: float) -> Table:
    table = Table(title="The same BERT, the same reviews", title_justify="left")
    table.add_column("")
    for column in ("accuracy", "weights pruned", "bytes to share"):
        table.add_column(column, justify="right")
    for method, row in rows.items():
        pruned = f"{sparsity:.1%} of the encoder, {row['pruned']:.1%} of all" if row["pruned"] else "none"
        table.add_row(method, f"{row['accuracy']:.3f}", pruned, f"{row['bytes']:,.0f}")
    return table


def _check_reload(model: PreTrainedModel, tokenizer: Any, folder: Path, sentences: list[str]) -> None:
    command = [sys.executable, "-c", _RELOAD, str(folder)]
    done = subprocess.run(command, input=json.dumps(list(sentences)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The adapter in {folder} could not be opened in a fresh process:\n{done.stderr}")
    with torch.no_grad():
        here = model.eval()(**tokenizer(list(sentences), padding=True, return_tensors="pt").to(model.device)).logits
    there = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    if not torch.allclose(here.cpu(), there, atol=1e-5):
        raise RuntimeError(f"The adapter in {folder} predicts differently in a fresh process; please report this.")
