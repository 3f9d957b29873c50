"""Adapt a sentence encoder by pruning alone, with the Trainer of sentence-transformers.

    pip install "hf_adaprune[sentence-transformers]"
    python examples/sentence_embeddings.py --model sentence-transformers/all-MiniLM-L6-v2 --output_dir stsb

Trains on STS-B (from the Hub, or from `--data_dir`, a folder that holds `stsb/{train,validation}.parquet`), saves an
adapter that `SentenceTransformer("stsb")` opens, and prints Spearman's correlation of similarities with human scores,
on the validation set: of the base, of the adapted model, and of the saved adapter after opening it again.
"""

import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter

from datasets import Dataset, load_dataset
from scipy.stats import spearmanr
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)

from hf_adaprune import AdaPruneCallback, AdaPruneConfig


def load_pairs(split: str, data_dir: str | None) -> Dataset:
    """Return pairs of sentences with their score, in [0, 1]."""
    if data_dir is None:
        data = load_dataset("nyu-mll/glue", "stsb", split=split)
    else:
        data = load_dataset("parquet", data_files={split: f"{data_dir}/stsb/{split}.parquet"}, split=split)
    return data.map(lambda row: {"score": row["label"] / 5}).select_columns(["sentence1", "sentence2", "score"])


def spearman(model: SentenceTransformer, pairs: Dataset) -> float:
    """Return Spearman's correlation of a model's similarities with the scores of pairs."""
    first, second = (model.encode(pairs[column], batch_size=64) for column in ("sentence1", "sentence2"))
    return float(spearmanr(model.similarity_pairwise(first, second), pairs["score"]).statistic)


def main() -> None:
    """Train, save and open the adapter, and print the scores as one line of JSON."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="sentence-transformers/all-MiniLM-L6-v2", help="Name or folder of the base."
    )
    parser.add_argument("--data_dir", help="Folder of the Parquet files of STS-B; by default from the Hub.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--final_sparsity", type=float, default=0.5)
    parser.add_argument("--num_train_epochs", type=float, default=3)
    parser.add_argument("--max_steps", type=int, default=-1)
    parser.add_argument("--max_eval_samples", type=int)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    validation = load_pairs("validation", args.data_dir)
    validation = validation.select(range(min(args.max_eval_samples or len(validation), len(validation))))
    model = SentenceTransformer(args.model)
    results = {"base": spearman(model, validation)}

    training = SentenceTransformerTrainingArguments(
        args.output_dir,
        num_train_epochs=args.num_train_epochs,
        max_steps=args.max_steps,
        per_device_train_batch_size=32,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = SentenceTransformerTrainer(
        model,
        training,
        train_dataset=load_pairs("train", args.data_dir),
        callbacks=[AdaPruneCallback(AdaPruneConfig(final_sparsity=args.final_sparsity, mask_codec="auto"))],
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    results["adapted"] = spearman(model, validation)
    results["opened again"] = spearman(SentenceTransformer(args.output_dir), validation)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
