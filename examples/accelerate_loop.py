"""Prune in your own training loop, on one device or several:

    accelerate launch examples/accelerate_loop.py --output_dir adapter
    accelerate launch --config_file examples/accelerate_configs/ddp.yaml examples/accelerate_loop.py ...

The task is the demo's: short reviews, positive or negative. `--checkpoint_dir` makes the run resumable: started again
with the same flags, it resumes after the last epoch that was saved completely.
"""

import math
import shutil
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from peft import get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    get_linear_schedule_with_warmup,
)

from hf_adaprune import AdaPruneConfig, Pruner
from hf_adaprune.demo.base import packaged_base
from hf_adaprune.demo.reviews import make_reviews


def save_checkpoint(accelerator: Accelerator, folder: Path, epoch: int) -> None:
    """Write a checkpoint to a temporary folder, rename it when all processes are done, and delete the former one."""
    aside = folder / "unfinished"
    accelerator.save_state(str(aside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        former = list(folder.glob("epoch-*"))
        aside.rename(folder / f"epoch-{epoch}")
        for checkpoint in former:
            shutil.rmtree(checkpoint)
    accelerator.wait_for_everyone()


def find_checkpoint(folder: Path | None) -> Path | None:
    """Return the last complete checkpoint, if there is one."""
    found = folder.glob("epoch-*") if folder else ()
    return max(found, key=lambda path: int(path.name.removeprefix("epoch-")), default=None)


def main() -> None:
    """Train masks for the demo's reviews."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Name or folder of the base; by default the packaged MiniLM-L6.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--checkpoint_dir", type=Path, help="Save here after each epoch, and resume from here.")
    parser.add_argument("--final_sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num_train", type=int, default=1200, help="Number of reviews, a multiple of 6.")
    parser.add_argument("--batch_size", type=int, default=32, help="Per process.")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model is None:
        args.model = packaged_base()

    # `accelerate launch` sets the number of processes, the precision and the sharding.
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        # Each global batch has the same examples, whatever the number of processes.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    with accelerator.main_process_first():
        reviews = make_reviews(num_train=args.num_train, seed=args.seed).map(
            lambda batch: tokenizer(batch["sentence"]), batched=True, remove_columns=["sentence"]
        )
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(reviews["train"], args.batch_size, shuffle=True, collate_fn=collate)
    evaluation = DataLoader(reviews["validation"], 64, collate_fn=collate)

    model = AutoModelForSequenceClassification.from_pretrained(args.model)
    model = get_peft_model(model, AdaPruneConfig(final_sparsity=args.final_sparsity))
    if args.gradient_checkpointing:
        # The method was renamed in transformers 5.20.
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.0)
    model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
    steps_per_epoch = math.ceil(len(train) / accelerator.gradient_accumulation_steps)
    total_steps = steps_per_epoch * args.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, 0, total_steps)
    pruner = Pruner(model, total_steps)
    accelerator.register_for_checkpointing(schedule, pruner)
    checkpoint = find_checkpoint(args.checkpoint_dir)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))

    for epoch in range(pruner.num_steps // steps_per_epoch, args.epochs):
        model.train()
        train.set_epoch(epoch)
        for batch in tqdm(train, desc=f"epoch {epoch + 1}", disable=not accelerator.is_local_main_process):
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
                if accelerator.sync_gradients and accelerator.scaler is None:
                    pruner.check_gradients()
                optimizer.step()
                if accelerator.sync_gradients:
                    pruner.step()
                    schedule.step()
                optimizer.zero_grad()
        if args.checkpoint_dir:
            save_checkpoint(accelerator, args.checkpoint_dir, epoch + 1)
    pruner.finalize()

    model.eval()
    correct = []
    for batch in evaluation:
        with torch.no_grad():
            hits = model(**batch).logits.argmax(-1) == batch["labels"]
        correct.append(accelerator.gather_for_metrics(hits))
    accuracy = torch.cat(correct).float().mean().item()
    accelerator.print(f"accuracy {accuracy:.3f} with {pruner.sparsity:.1%} of the masked weights pruned")
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output_dir, state_dict=state_dict)
    accelerator.print(f"The adapter is in {args.output_dir}")


if __name__ == "__main__":
    main()
