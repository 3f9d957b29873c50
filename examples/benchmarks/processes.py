"""Train on the same global batches in one process and in several, and compare the results:

    python examples/benchmarks/processes.py --num_processes 1 2 4
    python examples/benchmarks/processes.py --config fsdp2 --num_processes 2 4       # on that many GPUs

Prints a JSON line per run: the accuracy, the sparsity, and the share of mask entries that equal the first run's.
Without a GPU, the processes share the CPU, over gloo.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from tqdm import tqdm

from hf_adaprune.analysis import load_masks


EXAMPLES = Path(__file__).parents[1]


def run(config: str, num_processes: int, global_batch: int, folder: Path, flags: list[str]) -> float:
    """Train in the given number of processes; return the accuracy."""
    script = [str(EXAMPLES / "accelerate_loop.py"), "--output_dir", str(folder), *flags]
    script += ["--batch_size", str(global_batch // num_processes)]
    launcher = [sys.executable]
    if num_processes > 1:
        path = EXAMPLES / "accelerate_configs" / f"{config}.yaml"
        launcher += ["-m", "accelerate.commands.launch", "--config_file", str(path)]
        launcher += ["--num_processes", str(num_processes), "--main_process_port", "0"]
    env = os.environ | ({} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"})
    done = subprocess.run([*launcher, *script], env=env, capture_output=True, text=True)
    found = re.search(r"accuracy ([\d.]+)", done.stdout)
    if found is None:
        sys.exit(f"The run in {num_processes} processes failed:\n{done.stderr}")
    return float(found[1])


def main() -> None:
    """Run, compare and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ddp", help="A file in examples/accelerate_configs, without its ending.")
    parser.add_argument("--num_processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--global_batch", type=int, default=32)
    args, flags = parser.parse_known_args()
    reference = None
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(args.num_processes, unit="run"):
            path = Path(folder, str(number))
            accuracy = run(args.config, number, args.global_batch, path, flags)
            masks = torch.cat([mask.reshape(-1) for mask in load_masks(path).values()])
            reference = masks if reference is None else reference
            row = {"config": args.config, "num_processes": number, "accuracy": accuracy}
            row["sparsity"] = 1 - masks.count_nonzero().item() / masks.numel()
            row["agreement"] = (masks == reference).float().mean().item()
            print(json.dumps(row))


if __name__ == "__main__":
    main()
