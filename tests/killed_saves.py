"""Save an adapter over another, killed before each of its operations on files in turn.

Run as `python killed_saves.py ADAPTER FOLDER`: `FOLDER/DOOR-NUMBER` is what a kill before the operation of that number
left of a copy of `ADAPTER`, and `FOLDER/DOOR` is the new adapter, saved in peace.
"""

import os
import shutil
import signal
import sys
from itertools import count
from pathlib import Path
from typing import Any

import torch
from doors import DOORS, logits_of
from peft import PeftConfig


WRITES = ("os.mkdir", "os.remove", "os.rename")


def die_before(operation: int, folder: Path) -> None:
    """Arrange that the process is killed before its `operation`-th write in a folder, counted from 0."""
    left = operation

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        writes = event in WRITES or (event == "open" and isinstance(args[1], str) and not args[1].startswith("r"))
        if writes and str(args[0]).startswith(str(folder)):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def main(adapter: Path, folder: Path) -> None:
    base = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    for door in ("PeftModel.from_pretrained", "model.load_adapter"):
        name = door.split(".")[0]
        model = DOORS[door](base, str(adapter), is_trainable=True)
        logits_of(model)  # this checks what was loaded, before it changes
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * parameter.requires_grad
        model.save_pretrained(folder / name)
        for number in count():
            target = folder / f"{name}-{number}"
            shutil.copytree(adapter, target)
            child = os.fork()
            if child == 0:
                die_before(number, target)
                model.save_pretrained(target)
                os._exit(0)
            if os.waitpid(child, 0)[1] == 0:
                break


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
