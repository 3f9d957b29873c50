"""Measure the cost of one training step over the number of masked weights:

    python examples/benchmarks/growth.py --weights 10 30 100 300 1000 --figure growth.png       # millions

The model is a stack of masked square linear layers, with normalisation in between, trained on random rows. Each size
is measured in its own process: the median seconds of a step, of the choice of masks in it, and of a save; and the peak
memory in bytes per masked weight. Prints a JSON line per size, and plots them. No result depends on what is learned.
"""

import copy
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from peft import get_peft_model
from torch import nn
from tqdm import tqdm

from hf_adaprune import AdaPruneConfig, Pruner


PANELS = {
    "step_seconds": "a step, s",
    "selection_seconds": "choice of masks in it, s",
    "save_seconds": "a save, s",
    "bytes_per_weight": "memory, bytes a weight",
}


def measure(num_weights: int, width: int, num_rows: int, num_steps: int, device: str) -> dict[str, float]:
    """Train a stack of masked layers for some steps, and save it; return times and memory."""
    before = _peak()
    num_layers = max(1, round(num_weights / width**2))
    torch.manual_seed(0)
    with torch.device(device):
        # Normalised, as a deep stack would otherwise compute with subnormal numbers, which are many times slower.
        block = (nn.Linear(width, width, bias=False), nn.LayerNorm(width, elementwise_affine=False))
        stack: Any = nn.Sequential(*(copy.deepcopy(layer) for _ in range(num_layers) for layer in block))
        rows = torch.randn(num_rows, width)
    model = get_peft_model(stack, AdaPruneConfig())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5, fused=True)
    # The sparsity grows in each step, so all masks are chosen again.
    pruner = Pruner(model, 2 * (num_steps + 1))
    steps, selections, saves = [], [], []
    for number in range(num_steps + 1):
        start = _now(device)
        (model(rows) - rows).square().mean().backward()
        pruner.check_gradients()
        optimizer.step()
        chosen = _now(device)
        pruner.step()
        end = _now(device)
        optimizer.zero_grad()
        if number:  # the first step creates the optimizer's state, and calibrates
            steps.append(end - start)
            selections.append(end - chosen)
    for _ in range(3):
        with tempfile.TemporaryDirectory() as folder:
            start = _now(device)
            model.save_pretrained(folder)
            saves.append(_now(device) - start)
    total = num_layers * width**2
    peak = torch.cuda.max_memory_allocated() if rows.is_cuda else _peak() - before
    return {
        "weights": total,
        "step_seconds": round(statistics.median(steps), 4),
        "selection_seconds": round(statistics.median(selections), 4),
        "save_seconds": round(statistics.median(saves), 4),
        "bytes_per_weight": round(peak / total, 1),
    }


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak() -> int:
    # Not `getrusage`, whose peak a process inherits from its parent. Linux only.
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Plot each measurement over the number of weights, with a line of proportional growth from the first."""
    figure = Figure(figsize=(9, 2.6), layout="constrained")
    weights = [row["weights"] for row in rows]
    for axes, (key, label) in zip(figure.subplots(1, len(PANELS)), PANELS.items(), strict=True):
        values = [row[key] for row in rows]
        axes.loglog(weights, values, "o-")
        if key != "bytes_per_weight":
            axes.loglog(weights, [values[0] * weight / weights[0] for weight in weights], ":", color="grey")
        else:
            axes.set_yscale("linear")
            axes.set_ylim(bottom=0)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("masked weights")
        axes.set_title(label, fontsize=10)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure each size in its own process, print and plot."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=float, nargs="+", default=[10, 30, 100, 300, 1000], help="In millions.")
    parser.add_argument("--width", type=int, default=1024, help="Width of a layer.")
    parser.add_argument("--rows", type=int, default=256, help="Rows of a batch.")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--here", action="store_true", help="Measure one size, in this process.")
    args = parser.parse_args()
    shared = {"width": args.width, "rows": args.rows, "steps": args.steps, "device": args.device}
    if args.here:
        print(json.dumps(measure(round(args.weights[0] * 1e6), *shared.values())))
        return
    rows = []
    flags = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in shared.items())
    command = [sys.executable, str(Path(__file__)), "--here", *flags, "--weights"]
    for size in tqdm(args.weights, unit="size"):
        done = subprocess.run([*command, str(size)], capture_output=True, text=True)
        if done.returncode:
            print(f"{size:g} million weights failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            break
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps({**rows[-1], **shared, "threads": torch.get_num_threads()}), flush=True)
    if args.figure is not None and rows:
        draw(rows, args.figure)


if __name__ == "__main__":
    main()
