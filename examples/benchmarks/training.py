"""Measure the cost of training: a step with masks against one of full fine-tuning and one of LoRA (r=8):

    python examples/benchmarks/training.py                                     # MiniLM-L6, 32 x 32, float32
    python examples/benchmarks/training.py --shapes minilm base large --batches 8x32 32x32 64x128 --dtypes fp32 bf16

A step is forward, backward, clipping, AdamW and, with masks, the choice of the next ones; bf16 is autocast, as in the
Trainer. `adafactor` also trains masks, with the optimizer of the smallest state (`optim="adafactor"`). The methods'
steps alternate in random order, so that a machine that slows down slows all of them. Prints a JSON line per cell:
quartiles of the ratio of each round's times to those of fine-tuning; the share of a step spent on choosing masks; and,
from a separate process for each method, the peak growth of its memory in MiB, with the parts that are weights,
gradients, optimizer state and masks. `floor` is the time that the matrix products of a fine-tuning step would take at
the speed of one large product, over the time of the step.
"""

import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import Adafactor, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hf_adaprune import AdaPruneConfig, Pruner
from hf_adaprune.tuner.masked_layers import adaprune_layers


METHODS = ("finetune", "adaprune", "adafactor", "lora")
SHAPES = {
    "tiny": (16, 1, 2),
    "minilm": (384, 6, 12),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
MIB = 2**20


class Training:
    """Train a random BERT of a given shape on random sentences with one method, a step at a time."""

    def __init__(self, method: str, shape: str, batch: str, dtype: str, device: str, total_steps: int) -> None:
        hidden, num_layers, num_heads = SHAPES[shape]
        config = BertConfig(
            hidden_size=hidden,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            intermediate_size=4 * hidden,
        )
        torch.manual_seed(0)
        model: Any = BertForSequenceClassification(config)
        is_masked = method in ("adaprune", "adafactor")
        if is_masked:
            model = get_peft_model(model, AdaPruneConfig())
        elif method == "lora":
            model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type=TaskType.SEQ_CLS))
        self.model = model.to(device).train()
        self.pruner = Pruner(model, total_steps) if is_masked else None
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: torch.optim.Optimizer
        if method == "adafactor":
            self.optimizer = Adafactor(self.trained, lr=5e-5, scale_parameter=False, relative_step=False)
        else:
            self.optimizer = torch.optim.AdamW(self.trained, lr=5e-5, fused=True)
        size, length = map(int, batch.split("x"))
        ids = torch.randint(1000, 20000, (size, length), generator=torch.Generator().manual_seed(0))
        batch_of = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
        self.batch = {name: tensor.to(device) for name, tensor in batch_of.items()}
        self.autocast = torch.autocast(torch.device(device).type, DTYPES[dtype], enabled=dtype != "fp32")
        self.choosing = 0.0  # seconds of the last step spent on the choice of masks
        # Multiplications and additions in the encoder's matrices: one forward and two backward products.
        self.num_operations = 6 * 12 * hidden**2 * num_layers * size * length

    def step(self) -> float:
        """Train one step; return its time in seconds."""
        start = self._now()
        with self.autocast:
            loss = self.model(**self.batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        if self.pruner is not None:
            self.pruner.check_gradients()
        self.optimizer.step()
        before = self._now()
        if self.pruner is not None:
            self.pruner.step()
        end = self._now()
        self.choosing = end - before
        self.optimizer.zero_grad()
        return end - start

    def _now(self) -> float:
        if self.batch["input_ids"].is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def held(self) -> dict[str, float]:
        """Return the MiB of the tensors kept between steps, and of a step's gradients."""
        masks = [layer.scored_mask("default") for _, layer in adaprune_layers(self.model)]
        state = [tensor for values in self.optimizer.state.values() for tensor in values.values()]
        return {
            "weights": _mib(self.model.parameters()) + _mib(self.model.buffers()),
            "gradients": _mib(self.trained),
            "optimizer": _mib(tensor for tensor in state if isinstance(tensor, torch.Tensor)),
            "masks": _mib(masks),
        }


def _mib(tensors: Iterable[torch.Tensor]) -> float:
    return sum(tensor.nbytes for tensor in tensors) / MIB


def compare(shape: str, batch: str, dtype: str, args: Namespace) -> dict[str, object]:
    """Train with all methods in alternation; return ratios of their times."""
    total_steps = args.rounds + args.warmup
    runs = {method: Training(method, shape, batch, dtype, args.device, total_steps) for method in METHODS}
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    choosing = []
    for number in tqdm(range(total_steps), desc=f"{shape} {batch} {dtype}", unit="round", leave=False):
        for method in random.Random(number).sample(METHODS, len(METHODS)):
            taken = runs[method].step()
            if number >= args.warmup:
                seconds[method].append(taken)
                choosing += [runs[method].choosing / taken] * (method == "adaprune")
    result: dict[str, object] = {"finetune_seconds": round(statistics.median(seconds["finetune"]), 4)}
    for method in METHODS[1:]:
        ratios = [one / other for one, other in zip(seconds[method], seconds["finetune"], strict=True)]
        result[f"{method}_over_finetune"] = [round(ratio, 3) for ratio in statistics.quantiles(ratios, n=4)]
    result["choosing_masks"] = round(statistics.median(choosing), 4)
    floor = runs["finetune"].num_operations * seconds_per_operation(args.device, DTYPES[dtype])
    result["floor"] = round(floor / statistics.median(seconds["finetune"]), 3)
    return result


def seconds_per_operation(device: str, dtype: torch.dtype, size: int = 1024) -> float:
    """Return the seconds per multiplication or addition in the product of two large matrices."""
    matrix = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        if matrix.is_cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best / (2 * size**3)


def measure_memory(method: str, shape: str, batch: str, dtype: str, device: str) -> dict[str, float]:
    """Return the peak growth of this process, in MiB, while it builds a model and trains three steps."""
    before = _peak_of_process()
    training = Training(method, shape, batch, dtype, device, total_steps=3)
    on_gpu = training.batch["input_ids"].is_cuda
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        training.step()
    peak = torch.cuda.max_memory_allocated() / MIB if on_gpu else _peak_of_process() - before
    return {"peak": round(peak, 1), **{what: round(mib, 1) for what, mib in training.held().items()}}


def _peak_of_process() -> float:
    # Not `getrusage`, whose peak a process inherits from its parent. Linux only.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def in_own_process(method: str, *cell: str) -> dict[str, float]:
    """Measure a method's memory in a new process."""
    command = [sys.executable, str(Path(__file__)), "--memory_of", method, *cell]
    # Return freed memory to the system at once (glibc): holes in the heap would count too, and they vary.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"Measuring the memory of {method} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["minilm"])
    parser.add_argument("--batches", nargs="+", default=["32x32"], help="Sentences x tokens.")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--no_memory", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory_of", nargs=5, help="Only measure the memory of one cell, in this process.")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.memory_of:
        print(json.dumps(measure_memory(*args.memory_of)))
        return
    for shape, batch, dtype in itertools.product(args.shapes, args.batches, args.dtypes):
        cell = {"shape": shape, "batch": batch, "dtype": dtype, "device": args.device}
        row: dict[str, Any] = {**cell, "threads": torch.get_num_threads(), **compare(shape, batch, dtype, args)}
        if not args.no_memory:
            row["mib"] = {method: in_own_process(method, *cell.values()) for method in METHODS}
            for method in METHODS[1:]:
                # A tiny model may fit into memory that the process already had.
                ratio = row["mib"][method]["peak"] / (row["mib"]["finetune"]["peak"] or float("inf"))
                row[f"{method}_memory_over_finetune"] = round(ratio, 3)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
