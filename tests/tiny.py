"""Random models of every kind, small enough to train in a few milliseconds, and a batch for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_adaprune import Pruner


VOCAB = 64
NUM_LABELS = 3

HEADS: dict[str, Any] = {
    "none": AutoModel,
    "sequence": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "question": AutoModelForQuestionAnswering,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}

_BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
    "num_labels": NUM_LABELS,
}
_DISTILBERT = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 40, "num_labels": NUM_LABELS}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "num_labels": NUM_LABELS}
# As in `microsoft/deberta-v3-base`.
_DEBERTA = {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"], "share_att_key": True}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": {**_DISTILBERT, "max_position_embeddings": 32},
    "electra": {**_BERT, "embedding_size": 16},
    "albert": {**_BERT, "embedding_size": 16},
    "deberta-v2": {**_BERT, **_DEBERTA, "norm_rel_ebd": "layer_norm", "position_biased_input": False},
    "mpnet": _BERT,
    "modernbert": {**_BERT, **_TOKENS, "cls_token_id": 1, "sep_token_id": 2, "local_attention": 8},
    "gpt2": {**_GPT2, **_TOKENS},
    "llama": {**_BERT, **_TOKENS},
}

CASES = [
    (architecture, head)
    for architecture in ARCHITECTURES
    for head in HEADS
    if head != ("masked_lm" if architecture in ("gpt2", "llama") else "causal_lm")
]


def make_model(architecture: str = "bert", head: str = "sequence", seed: int = 0, **overrides: Any) -> Any:
    """Return a random model; the same for the same seed."""
    labels = {"num_labels": 2} if head == "question" else {}
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **labels, **overrides})
    torch.manual_seed(seed)
    return HEADS[head].from_config(config).eval()


def save_model(path: Path, architecture: str = "bert", head: str = "sequence", **overrides: Any) -> Path:
    """Save a random model; return its folder."""
    make_model(architecture, head, **overrides).save_pretrained(path)
    return path


def make_batch(head: str = "sequence", seed: int = 0, size: int = 4, length: int = 10) -> dict[str, torch.Tensor]:
    """Return a random batch with the labels that a head wants; its rows are of several lengths."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids, mask = integers(5, VOCAB, size, length), torch.ones(size, length, dtype=torch.long)
    mask[0, length // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if head == "sequence":
        batch["labels"] = integers(0, NUM_LABELS, size)
    elif head == "token":
        batch["labels"] = integers(0, NUM_LABELS, size, length)
    elif head == "question":
        batch |= {"start_positions": integers(0, length, size), "end_positions": integers(0, length, size)}
    elif head in ("masked_lm", "causal_lm"):
        batch["labels"] = ids.clone()
    return batch


def loss_of(output: Any) -> torch.Tensor:
    """Return the loss of a model's output; for a model without a head, a quadratic one."""
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss
    wanted = torch.linspace(-1, 1, output.last_hidden_state.numel()).view_as(output.last_hidden_state)
    return (output.last_hidden_state - wanted).square().mean()


@torch.no_grad()
def logits_of(model: nn.Module, head: str = "sequence") -> torch.Tensor:
    """Return what a model computes in evaluation, as one tensor."""
    was_training = model.training
    output = model.eval()(**make_batch(head))
    model.train(was_training)
    if head == "question":
        return torch.stack([output.start_logits, output.end_logits])
    return output.last_hidden_state if head == "none" else output.logits


def train_masks(
    model: nn.Module,
    steps: int = 4,
    head: str = "sequence",
    adapter_name: str = "default",
    learning_rate: float = 5e-5,
) -> Pruner:
    """Train an adapter for a few steps of AdamW, to the end of its schedule."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], learning_rate, weight_decay=0)
    pruner = Pruner(model, steps, adapter_name)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(**make_batch(head, seed=step))).backward()
        pruner.check_gradients()
        optimizer.step()
        pruner.step()
    pruner.finalize()
    model.eval()
    return pruner
