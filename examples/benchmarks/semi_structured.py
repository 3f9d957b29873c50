"""Time a 2:4 mask on a GPU against the dense base, in turn and side by side:

    python examples/benchmarks/semi_structured.py --batch_sizes 1 8 32 128 --lengths 32 128 512

By default a random BERT of base size: speed does not depend on values. Prints a JSON line for each batch and length:
the quartiles of dense over 2:4 seconds (above 1 the mask is faster). Needs an NVIDIA GPU of compute
capability 8.0 or later, and says so elsewhere.
"""

import json
import statistics
from argparse import ArgumentParser
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForSequenceClassification, BertConfig

from hf_adaprune import AdaPruneConfig, Pruner, to_semi_structured
from hf_adaprune.errors import HardwareError
from hf_adaprune.merging import merged
from hf_adaprune.semi_structured import check_hardware


def seconds_of(model: Any, ids: torch.Tensor) -> float:
    """Return how long one forward pass takes on the GPU's own clock."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    model(input_ids=ids)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Name or folder of a model whose shape to take; by default BERT of base size.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128, 512])
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=5)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    try:
        check_hardware(torch.empty(0, device=device, dtype=dtype))
    except HardwareError as error:
        raise SystemExit(str(error)) from None
    config = AutoConfig.from_pretrained(args.model) if args.model else BertConfig()
    base = AutoModelForSequenceClassification.from_config(config).to(device, dtype)
    masked = get_peft_model(base, AdaPruneConfig(granularity="2:4", score_init="magnitude"))
    Pruner(masked, 1).step()
    models = {"dense": merged(masked), "2:4": to_semi_structured(masked)}
    for batch_size in args.batch_sizes:
        for length in args.lengths:
            ids = torch.randint(5, config.vocab_size, (batch_size, length), device=device)
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(args.warmup + args.repeats):
                for name, model in models.items():
                    seconds[name].append(seconds_of(model, ids))
            dense, sparse = (seconds[name][args.warmup :] for name in models)
            speed_up = statistics.quantiles([one / other for one, other in zip(dense, sparse, strict=True)], n=4)
            shape = {"batch_size": batch_size, "length": length, "dtype": args.dtype}
            gpu = torch.cuda.get_device_name()
            print(json.dumps({**shape, "device": gpu, "speed_up": [round(ratio, 3) for ratio in speed_up]}))


if __name__ == "__main__":
    main()
