"""Measure the cost of adapters in use, each figure as a ratio of two measurements taken in alternation:

    python examples/benchmarks/serving.py                 # the packaged MiniLM-L6
    python examples/benchmarks/serving.py --bert_base     # BERT-base's shape, random weights

`inference_1` and `inference_32`: a forward pass with an active adapter over one of the base, for batches of 1 and 32.
`switching`: `set_adapter` and building the masked weights, over copying the masked weights once. `memory_of_ten`: the
bytes of a model with ten adapters over those of the base, in parameters and buffers, before any of them is used;
`memory_in_use` after. `mixed_batch`: 4 tasks in one batch of 32 over the same rows task by task. `opening`: from the
path of an adapter to the end of the first forward pass, over the same for PEFT's LoRA of rank 8; `opening_coded`: the
same for an adapter with `mask_codec="auto"`. `bytes`: an adapter's file over one bit per masked weight plus the head.
Times are CPU times: medians of ratios, with quartiles. Prints one JSON line.
"""

import functools
import json
import statistics
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hf_adaprune import AdaPruneConfig, Pruner, mixed_batch
from hf_adaprune.demo.base import packaged_base
from hf_adaprune.tuner.masked_layers import adaprune_layers


def ratios(pairs: int, first: Callable[[], Any], second: Callable[[], Any]) -> list[float]:
    """Return median and quartiles of the time of one function over that of another, called in alternation."""
    found = []
    for number in range(pairs + 1):
        times = []
        for function in (first, second) if number % 2 else (second, first):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        if number:  # the first pair warms up
            found.append(times[0] / times[1] if number % 2 else times[1] / times[0])
    quartiles = statistics.quantiles(found, n=4)
    return [round(quartiles[index], 3) for index in (1, 0, 2)]


def save_base(folder: Path) -> str:
    """Save a BERT-base with random weights; return its folder."""
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig()).save_pretrained(folder)
    return str(folder)


def save_adapters(base: str, folder: Path) -> dict[str, str]:
    """Save an adapter with half of the weights pruned, one with coded masks, and a LoRA; return their folders."""
    configs: dict[str, Any] = {
        "masks": AdaPruneConfig(),
        "coded": AdaPruneConfig(mask_codec="auto"),
        "lora": LoraConfig(r=8, target_modules="all-linear", task_type=TaskType.SEQ_CLS),
    }
    for name, config in configs.items():
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
        tuned = get_peft_model(model, config)
        if name != "lora":
            for _, layer in adaprune_layers(tuned):
                # Move scores about as far as training does.
                scores = layer.adaprune_scores["default"].data
                scores += 0.07 / config.score_lr_ratio * torch.randn(scores.shape)
            Pruner(tuned, 1).prune_to(0.5)
        tuned.save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


def size_of(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, buffers and cached masked weights, each counted once."""
    tensors = [*model.parameters(), *model.buffers()]
    for _, layer in adaprune_layers(model):
        tensors += [] if layer._cached is None else [layer._cached.product]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def open_adapter(base: str, path: str, batch: dict[str, torch.Tensor]) -> None:
    """Open an adapter and compute with it."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    PeftModel.from_pretrained(model, path).eval()(**batch)


@torch.no_grad()
def measure(base: str, folder: Path, length: int, pairs: int) -> dict[str, Any]:
    """Measure everything on one base."""
    paths = save_adapters(base, folder)
    plain, model = (AutoModelForSequenceClassification.from_pretrained(base, num_labels=2).eval() for _ in range(2))
    ids = torch.randint(1000, plain.config.vocab_size, (32, length), generator=torch.Generator().manual_seed(0))
    big, small = {"input_ids": ids}, {"input_ids": ids[:1]}
    results: dict[str, Any] = {}

    alone = size_of(plain)
    names = [f"task{number}" for number in range(10)]
    for name in names:
        model.load_adapter(paths["masks"], adapter_name=name)
    results["memory_of_ten"] = round(size_of(model) / alone, 4)
    model.set_adapter(names[0])
    model.eval()
    model(**small)
    results["memory_in_use"] = round(size_of(model) / alone, 4)

    results["inference_1"] = ratios(10 * pairs, lambda: model(**small), lambda: plain(**small))
    results["inference_32"] = ratios(pairs, lambda: model(**big), lambda: plain(**big))

    layers = [layer for _, layer in adaprune_layers(model)]
    turns = iter(range(10**9))

    def switch() -> None:
        model.set_adapter(names[next(turns) % 2])
        for layer in layers:
            layer.effective_weight()

    copies = [layer.base_weight.clone() for layer in layers]

    def copy() -> None:
        for layer, target in zip(layers, copies, strict=True):
            target.copy_(layer.base_weight)

    results["switching"] = ratios(3 * pairs, switch, copy)

    per_row = [names[number % 4] for number in range(len(ids))]

    def mixed() -> None:
        with mixed_batch(model, per_row):
            model(**big)

    def apart() -> None:
        for name in names[:4]:
            model.set_adapter(name)
            model(input_ids=ids[[number for number, other in enumerate(per_row) if other == name]])

    results["mixed_batch"] = ratios(pairs, mixed, apart)
    for name, key in (("masks", "opening"), ("coded", "opening_coded")):
        ours, lora = (functools.partial(open_adapter, base, paths[other], small) for other in (name, "lora"))
        results[key] = ratios(pairs, ours, lora)

    weights = sum(layer.base_weight.numel() for layer in layers)
    head = sum(p.numel() for n, p in model.named_parameters() if f".modules_to_save.{names[0]}." in n)
    size = Path(paths["masks"], "adapter_model.safetensors").stat().st_size
    results["bytes"] = round(size / (weights / 8 + 4 * head), 4)
    return results


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Name or folder of the base; by default the packaged MiniLM-L6.")
    parser.add_argument("--bert_base", action="store_true", help="BERT-base's shape, with random weights, instead.")
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=10, help="How often the slower things are measured.")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        base = args.model
        if args.bert_base:
            base = save_base(Path(folder, "base"))
        elif base is None:
            base = packaged_base()
        results = measure(base, Path(folder), args.length, args.pairs)
    print(json.dumps({"model": "BERT-base's shape" if args.bert_base else args.model or "MiniLM-L6", **results}))


if __name__ == "__main__":
    main()
