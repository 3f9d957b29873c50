"""Kill a run at random moments, resume it each time, and compare its result with that of an uninterrupted run:

    python examples/benchmarks/resume.py --kills 20
    python examples/benchmarks/resume.py --kills 20 --options best
    python examples/benchmarks/resume.py --kills 20 --num_processes 2

A stock `Trainer` trains a random BERT of two layers on random rows, with dropout. Moments of SIGKILL are counted in
events: those of the Trainer, within and between steps, and those of files, during a save, with a file half written.
Prints a JSON line: the number of kills, where they fell, how many checkpoints they left incomplete, and in how many
runs masks, scores and head ended the same to the last bit.
"""

import io
import json
import os
import random
import signal
import socket
import sys
import tempfile
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_adaprune import AdaPruneCallback


STEPS = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_checkpoint": {"save_total_limit": 1},
    "best": {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 2},
}
FILE_EVENTS = ("os.mkdir", "os.remove", "os.rename", "os.rmdir")


class Clock(TrainerCallback):
    """Count the events of a run, and end it by SIGKILL at a given one."""

    def __init__(self, folder: Path, moment: int | None, log: Path) -> None:
        self.folder, self.moment, self.log, self.count = str(folder), moment, log, 0
        save = torch.save

        def save_in_two(data: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            buffer = io.BytesIO()
            save(data, buffer, *args, **kwargs)
            Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])
            self.tick(f"half of {Path(path).name}")
            Path(path).write_bytes(buffer.getvalue())

        mock.patch.object(torch, "save", save_in_two).start()
        sys.addaudithook(self.watch_files)
        for event in (
            "step_begin",
            "pre_optimizer_step",
            "optimizer_step",
            "step_end",
            "evaluate",
            "save",
            "train_end",
        ):
            setattr(self, f"on_{event}", self.make_handler(event))

    def make_handler(self, event: str) -> Callable[..., None]:
        """Return the handler of an event of the Trainer."""
        return lambda *args, **kwargs: self.tick(event)

    def watch_files(self, event: str, args: tuple[Any, ...]) -> None:
        """Count changes of files in the run's folder as events."""
        writes = event in FILE_EVENTS or (event == "open" and isinstance(args[1], str) and not args[1].startswith("r"))
        if writes and str(args[0]).startswith(self.folder):
            if Path(str(args[1])).name.startswith("torn-"):
                self.write("torn")
            self.tick(f"{event} {Path(str(args[0])).name}")

    def tick(self, event: str) -> None:
        """Count an event, and end the process if it is the given one."""
        self.count += 1
        if self.count == self.moment:
            self.write(event)
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, line: str) -> None:
        """Add a line to the log."""
        os.write(os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), f"{line}\n".encode())


def train(folder: Path, options: dict[str, Any], num_processes: int, *callbacks: TrainerCallback) -> None:
    """Start or resume a run in a folder; save its final state there."""
    set_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(5, 64, (8 * STEPS, 10), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": number % 3} for number, row in enumerate(ids)]
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=16 // num_processes,
        num_train_epochs=2,
        save_strategy="steps",
        logging_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"save_steps": 2, **options},
    )
    trainer = Trainer(
        model, args, train_dataset=rows, eval_dataset=rows[:16], callbacks=[AdaPruneCallback, *callbacks]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if folder.exists() else None)
    if args.should_save:
        state = {name: tensor for name, tensor in model.state_dict().items() if "base_layer" not in name}
        save_file(state, folder / "end.tmp")
        (folder / "end.tmp").rename(folder / "end.safetensors")


def in_children(work: Callable[[int], None], num_processes: int) -> bool:
    """Run a function in one forked process per rank; return whether it was completed.

    Forked processes need not import the libraries again, and a kill ends no other process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num_processes):
        child = os.fork()
        if child == 0:
            if num_processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_processes, "MASTER_PORT": port}
                os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
            try:
                work(rank)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    # Only the first process kills itself; the others would wait for it forever.
    status = os.waitpid(children[0], 0)[1]
    for child in children[1:]:
        if status:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if status and os.waitstatus_to_exitcode(status) != -signal.SIGKILL:
        raise RuntimeError("The run failed: see the error above.")
    return status == 0


def run_killed(folder: Path, options: dict[str, Any], num_processes: int, moments: list[int], log: Path) -> int:
    """Run to the end, with a kill at each moment, counted from the last resumption; return the number of kills."""
    kills = 0
    for moment in [*moments, None]:

        def work(rank: int, moment: int | None = moment) -> None:
            clock = [Clock(folder, moment, log)] if rank == 0 else []
            train(folder, options, num_processes, *clock)

        if in_children(work, num_processes):
            break
        kills += 1
    return kills


def same(one: Path, other: Path) -> bool:
    """Return whether two runs ended with the same tensors, to the last bit."""
    first, second = load_file(one / "end.safetensors"), load_file(other / "end.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def main() -> None:
    """Run, kill, compare and print."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--options", choices=sorted(OPTIONS), default="plain")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--longest", type=int, default=60, help="Events, at most, from a resumption to the next kill.")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # A fork must not inherit threads.
    torch.set_num_threads(1)
    options, draw = OPTIONS[args.options], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        in_children(lambda rank: train(folder / "whole", options, args.num_processes), args.num_processes)
        kills = runs = equal = 0
        with tqdm(total=args.kills, unit="kill") as progress:
            while kills < args.kills:
                run = folder / f"run-{runs}"
                moments = [draw.randrange(1, args.longest) for _ in range(args.kills - kills)]
                found = run_killed(run, options, args.num_processes, moments, folder / "log")
                kills, runs = kills + found, runs + 1
                equal += same(folder / "whole", run)
                progress.update(found)
        fell = Counter((folder / "log").read_text().splitlines())
    torn = fell.pop("torn", 0)
    print(json.dumps({"kills": kills, "runs": runs, "equal_runs": equal, "torn_checkpoints": torn, "kills_at": fell}))


if __name__ == "__main__":
    main()
