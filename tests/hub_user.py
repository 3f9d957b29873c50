"""What somebody does with the Hub, in a process of their own: `python hub_user.py push|open FOLDER`."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from doors import DOORS, TEXTS, logits_of, save_base, train
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, pipeline


NUM_LABELS = 77
BASE = "me/base"
# The name of the adapter -> how it is trained; how it is pushed is in `push`.
ADAPTERS = {"me/by-model": "class", "me/by-trainer": "instance", "me/by-peft-model": "wrapped"}
PICKLED = "me/pickled"
RESULTS, ANSWERS = "logits.safetensors", "answers.json"


def push(folder: Path) -> None:
    """Push a base and, each in its own way, the adapters that were trained on it; note what they compute."""
    local = save_base(folder / "base")
    AutoModel.from_pretrained(local).push_to_hub(BASE)
    AutoTokenizer.from_pretrained(local).push_to_hub(BASE)
    logits = {}
    for name, way in ADAPTERS.items():
        trainer = train(BASE, folder / name, way, NUM_LABELS, hub_model_id=name, hub_private_repo=True)
        logits[name] = logits_of(trainer.model)
        if name == "me/by-trainer":
            trainer.push_to_hub()
        else:
            trainer.model.push_to_hub(name, private=True)
    save_file(logits, folder / RESULTS)
    # The same masks again, in a file that is not to be read.
    trainer.model.save_pretrained(folder / "pickled")
    weights = folder / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    HfApi().create_repo(PICKLED)
    HfApi().upload_folder(repo_id=PICKLED, folder_path=folder / "pickled")


def open_again(folder: Path) -> None:
    """Open the adapters by name through every door; note what they compute, what they say, and what went wrong."""
    logits: dict[str, torch.Tensor] = {}
    answers: dict[str, Any] = {}
    for name in (*ADAPTERS, PICKLED):
        for door in DOORS:
            try:
                logits[f"{name} {door}"] = logits_of(DOORS[door](BASE, name))
            except Exception as error:
                answers[f"{name} {door}"] = f"{type(error).__name__}: {error}"
    for name in ADAPTERS:
        # Without a task `pipeline` asks the Hub for that of the base, and not of the adapter.
        answers[name] = pipeline("text-classification", model=name)(TEXTS, top_k=None)
    save_file(logits, folder / RESULTS)
    (folder / ANSWERS).write_text(json.dumps(answers))


if __name__ == "__main__":
    {"push": push, "open": open_again}[sys.argv[1]](Path(sys.argv[2]))
