"""Time a forward pass of the base, merged, compacted and, on request, ONNX model, in alternation:

    python examples/benchmarks/latency.py --batch_sizes 1 32 --lengths 32 128 --onnx
    python examples/benchmarks/latency.py --random_base --granularity 2:4 --dtype bfloat16 --batch_sizes 1 8 32 128

With `--adapter`, it measures what `hf-adaprune speed` measures. Otherwise it uses a granularity's initial masks, which
depend only on the base's weights. Prints a JSON line for each form and size; `speed_up` has the quartiles of the time
of the base over that of the form, pass by pass.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers.utils import logging

from hf_adaprune import AdaPruneConfig, Pruner, measure_speed, read_adapter
from hf_adaprune.demo.base import packaged_base


def prune(base: str | None, granularity: str, sparsity: float) -> Any:
    """Return a base with initial masks; by default a random base of BERT-base's shape."""
    torch.manual_seed(0)
    if base is None:
        model = AutoModelForSequenceClassification.from_config(BertConfig())
    else:
        model = AutoModelForSequenceClassification.from_pretrained(base)
    config = AdaPruneConfig(granularity=granularity, final_sparsity=sparsity, score_init="magnitude")
    model = get_peft_model(model, config)
    Pruner(model, 1).step()
    return model.eval()


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", help="Name or folder of a trained adapter.")
    parser.add_argument("--model", help="Name or folder of the base; by default the packaged MiniLM-L6.")
    parser.add_argument("--random_base", action="store_true", help="Use a random BERT of base size instead.")
    parser.add_argument("--granularity", default="neuron+head")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--onnx", action="store_true")
    parser.add_argument("--threads", type=int, help="Number of CPU threads; by default PyTorch's choice.")
    parser.add_argument("--cpu_time", action="store_true", help="Measure CPU time: for a machine with other load.")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    args = parser.parse_args()
    logging.set_verbosity_error()
    if args.adapter:
        model = read_adapter(args.adapter).open(args.model)
    else:
        if args.model is None and not args.random_base:
            args.model = packaged_base()
        model = prune(args.model, args.granularity, args.sparsity)
    reports = measure_speed(
        model.to(args.device, getattr(torch, args.dtype)),
        batch_sizes=args.batch_sizes,
        lengths=args.lengths,
        repeats=args.repeats,
        warmup=args.warmup,
        onnx=args.onnx,
        num_threads=args.threads,
        cpu_time=args.cpu_time,
    )
    for report in reports:
        for row in report.rows():
            print(json.dumps(row))


if __name__ == "__main__":
    main()
