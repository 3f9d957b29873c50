"""Adapt a BERT to a GLUE task or to your own texts: by pruning alone, by fine-tuning, or by training only a head.

A task from the Hub (cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, wnli), half of the masked weights pruned:

    python run_glue.py --model_name_or_path google-bert/bert-base-uncased --task_name sst2 --do_train --do_eval \\
        --final_sparsity 0.5 --num_train_epochs 3 --per_device_train_batch_size 32 --output_dir sst2-adaprune

The same without a network, from glue/sst2/train.parquet and glue/sst2/validation.parquet:

    python run_glue.py ... --task_name sst2 --data_dir glue

Your own csv, json (lines) or parquet, with one or two text columns and `label` (float labels make it a regression):

    python run_glue.py ... --train_file train.csv --validation_file validation.csv

A model that is also smaller and faster: one run prunes half of the weights as neurons and heads, and a second one,
twice as long, half of the remaining weights. One adapter has both masks; the folder `small` has the model without the
pruned neurons and heads:

    python run_glue.py ... --compact_first 0.5 --final_sparsity 0.5

For comparison, `--method` selects a method of `hf_adaprune.baselines`. Suitable learning rates: 5e-5 (the default) for
adaprune, no_recovery and smp; 5e-5 to 1e-4 where all weights are trained: finetune, magnitude, movement, imp; 5e-4 to
2e-3 for lora; 1e-3 where only the head is trained: feature_extraction, random. Methods that prune trained weights are
scored twice: as trained, and (`eval_rewound_...`) with the pre-trained values under the same masks; the adapter of
these masks is saved in `rewound`.

All flags of `TrainingArguments` work too: --eval_strategy epoch, --bf16, --seed, --push_to_hub ... To resume an
interrupted run from its last checkpoint, repeat the command with --resume_from_checkpoint True, or name a checkpoint:
--resume_from_checkpoint sst2-adaprune/checkpoint-500
"""

import dataclasses
import logging
import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, compact, expand, sparsity_report, write_model_card
from hf_adaprune.analysis import RecoveryCallback
from hf_adaprune.baselines import METHODS, TrainedWeightsCallback, ablate, make_callback
from hf_adaprune.errors import AdaPruneError
from hf_adaprune.glue import GLUE_COLUMNS, check_columns, read_data_file
from hf_adaprune.metrics import glue_metric
from hf_adaprune.tuner.dropout import change_dropout


logger = logging.getLogger("run_glue")

SPLIT_OF_FLAG = {"do_train": "train", "do_eval": "validation", "do_predict": "test"}
GROUPS, SMALL = "groups", "small"  # subfolders of the output: masks of neurons and heads; the model without these
SPLITS = ("train", "validation", "validation_mismatched", "test", "test_mismatched")


class InputError(ValueError):
    """Raised for unusable input from the user; the message says why, and what to do."""


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Show default values, and keep the line breaks of the examples above."""


def flag(help: str, default: Any = None) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    model_name_or_path: str = field(metadata={"help": "A pre-trained model: a name on the Hub, or a folder."})
    method: str = field(
        default="adaprune",
        metadata={"help": "The training method: see above.", "choices": list(METHODS)},
    )
    final_sparsity: float = flag("The fraction of the masked weights to remove, in [0, 1).", 0.5)
    preset: Literal["default", "paper"] = flag(
        "adaprune, no_recovery: the package's recipe, or Algorithm 1 of arXiv 2105.03343.", "default"
    )
    granularity: str = flag(
        'adaprune: what is pruned as a whole: "weight", "neuron", "head", "neuron+head"; or "2:4", any "n:m".',
        "weight",
    )
    compact_first: float = flag(
        "adaprune, no_recovery, smp, random: first prune this fraction of the masked weights as neurons and heads.",
        0.0,
    )
    dropout: float | None = flag(
        "Train with this dropout, in [0, 1); by default the model's own, or none for masks of a regression."
    )
    ablate: bool = flag("Also score the trained masks when shuffled, and over other weights.", False)
    count_recovery: bool = flag("Count, in each step, the weights that were pruned and came back.", False)
    tokenizer_name: str | None = flag("A tokenizer other than the model's own: a name or a folder.")
    model_revision: str = flag("Branch, tag or commit of the model on the Hub.", "main")
    cache_dir: str | None = flag("The cache folder for models and data sets.")

    def __post_init__(self) -> None:
        if not 0 <= self.compact_first < 1:
            raise InputError(f"`--compact_first` must be in [0, 1), where 0 turns it off, got {self.compact_first}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise InputError(f"`--dropout` must be in [0, 1), got {self.dropout}.")


@dataclass
class DataArguments:
    task_name: str | None = flag(f"A GLUE task: {', '.join(GLUE_COLUMNS)}.")
    data_dir: str | None = flag("Folder with train.parquet and validation.parquet, or with one such folder per task.")
    train_file: str | None = flag("Your own csv, json (lines) or parquet.")
    validation_file: str | None = flag("The same, to evaluate on.")
    test_file: str | None = flag("The same, to predict, labels not needed; also for a GLUE task.")
    max_seq_length: int = flag("Texts are truncated to this number of tokens.", 128)
    pad_to_max_length: bool = flag("Pad to `max_seq_length`, not to the longest text of each batch.", False)
    max_train_samples: int | None = flag("Train on this number of examples, drawn at random.")
    max_eval_samples: int | None = flag("Evaluate on this number of examples, drawn at random.")
    sample_seed: int = flag("Seed of these draws; `--seed` does not change them.", 42)

    def __post_init__(self) -> None:
        if self.task_name is not None and self.task_name not in GLUE_COLUMNS:
            raise InputError(f"`--task_name` must be one of {sorted(GLUE_COLUMNS)}, got {self.task_name!r}.")
        glue = [f"--{name}" for name in ("task_name", "data_dir") if getattr(self, name)]
        own = [f"--{name}" for name in ("train_file", "validation_file") if getattr(self, name)]
        if bool(glue) == bool(own) or own == ["--validation_file"]:
            raise InputError(
                "Give `--task_name`, `--data_dir` or both for a GLUE task, or else `--train_file` (from which label "
                "names are read, so for evaluation too) and `--validation_file` for your own data, got "
                f"{[*glue, *own]}."
            )
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"`--{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass
class Task:
    """Hold the data of a task; `label_names` is `None` for a regression."""

    name: str
    splits: dict[str, datasets.Dataset]
    columns: Sequence[str]
    label_names: list[str] | None


def read_splits(args: DataArguments, cache_dir: str | None) -> dict[str, datasets.Dataset]:
    """Read all splits, from files or from the Hub; MNLI's matched splits become `validation` and `test`."""
    name, found = args.task_name, {}
    if args.data_dir:
        folder = Path(args.data_dir)
        folder = folder / name if name and (folder / name).is_dir() else folder
        found = {path.stem: read_data_file(path, cache_dir) for path in folder.glob("*.parquet")}
    elif name:
        try:
            found = dict(datasets.load_dataset("nyu-mll/glue", name, cache_dir=cache_dir))
        except OSError as error:
            raise InputError(f"Loading {name} failed. Give its Parquet files as `--data_dir`. ({error})") from error
    files = {"train": args.train_file, "validation": args.validation_file, "test": args.test_file}
    found |= {split: read_data_file(Path(path), cache_dir) for split, path in files.items() if path}
    found = {split.removesuffix("_matched"): dataset for split, dataset in found.items()}
    return {split: found[split] for split in SPLITS if split in found}


def find_text_columns(dataset: datasets.Dataset) -> list[str]:
    kinds = {name: getattr(kind, "dtype", "") for name, kind in dataset.features.items() if name != "label"}
    texts = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if len(texts) not in (1, 2):
        raise InputError(f"There must be one or two text columns beside `label`, got {texts}: add or remove some.")
    return texts


def number_labels(splits: dict[str, datasets.Dataset], known: list[str] | None) -> list[str] | None:
    """Number the labels in all splits, and return their names; for a regression, return `None`.

    They are numbered as in `known`, the names that a trained model gives its outputs, or else as in the first split.
    """
    first = next(iter(splits.values()))
    kind, names = first.features["label"], None
    is_single = isinstance(kind, (datasets.Value, datasets.ClassLabel))
    values = first.unique("label") if is_single else first[:5]["label"]
    if not is_single or len(values) < 2:
        raise InputError(f"`label` must be one number or name per row, and not always the same, got {values[:5]}.")
    if not kind.dtype.startswith("float"):
        names = kind.names if isinstance(kind, datasets.ClassLabel) else [str(value) for value in sorted(values)]
        if known:
            # Data may number their labels, as the model does, instead of naming them.
            numbered = [str(number) for number in range(len(known))]
            names = numbered if {*names} <= {*numbered} - {*known} else known
    target = datasets.Value("float32") if names is None else datasets.ClassLabel(names=names)
    for split, dataset in splits.items():
        kind, values = dataset.features["label"], dataset.unique("label")
        name_of = kind.int2str if isinstance(kind, datasets.ClassLabel) else str
        if names is None:
            numbers = {value: value for value in values if not isinstance(value, str) and np.isfinite(value)}
        else:
            numbers = {value: names.index(name_of(value)) for value in values if name_of(value) in names}
        unknown = [value for value in values if value not in numbers]
        if unknown:
            raise InputError(f"The {split} labels must be {names or 'finite numbers'}, got {unknown[:5]}.")
        if kind != target:
            labels = [numbers[value] for value in dataset["label"][:]]
            splits[split] = dataset.remove_columns("label").add_column("label", labels, feature=target)
    return names


def load_task(args: DataArguments, asked: list[str], cache_dir: str | None, known: list[str] | None = None) -> Task:
    """Read the data, and determine its text columns and labels; see `number_labels` for `known`."""
    splits = read_splits(args, cache_dir)
    labelled = {split: dataset for split, dataset in splits.items() if not split.startswith("test")}
    missing = [split for split in asked if split not in splits] or ([] if labelled else ["train"])
    if missing:
        raise InputError(
            f"There must be {missing} data for the requested actions, got {list(splits)}: add {missing[0]}.parquet to "
            f"`--data_dir`, or give `--{missing[0]}_file`."
        )
    columns = GLUE_COLUMNS.get(args.task_name or "") or find_text_columns(next(iter(splits.values())))
    for split, dataset in splits.items():
        check_columns(dataset, [*columns, "label"] if split in labelled else columns, f"the {split} data")
    names = number_labels(labelled, known)
    return Task(args.task_name or "custom", splits | labelled, columns, names)


def tokenize(task: Task, split: str, tokenizer: Any, args: DataArguments) -> datasets.Dataset:
    """Draw a sample of a split if requested, and tokenize its texts."""
    dataset = task.splits[split]
    count = {"train": args.max_train_samples, "validation": args.max_eval_samples}.get(split.split("_")[0])
    if count is not None and count < len(dataset):
        dataset = dataset.shuffle(seed=args.sample_seed).select(range(count))
    options = {"padding": "max_length" if args.pad_to_max_length else False, "truncation": True}
    options["max_length"] = min(args.max_seq_length, tokenizer.model_max_length)
    unused = [name for name in dataset.column_names if name != "label" or split.startswith("test")]
    return dataset.map(
        lambda batch: tokenizer(*(batch[column] for column in task.columns), **options),
        batched=True,
        remove_columns=unused,
        desc=f"Tokenizing {split}",
    )


def load_model(args: ModelArguments, **labels: Any) -> tuple[Any, Any]:
    """Return the model, with the labels that it has or those that are given, and the tokenizer."""
    hub = {"revision": args.model_revision, "cache_dir": args.cache_dir}
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name or args.model_name_or_path, **hub)
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, **labels, **hub)
    except (OSError, RuntimeError) as error:  # the latter if the checkpoint has a head for other labels
        raise InputError(f"No model could be loaded from {args.model_name_or_path!r}: {error}") from error
    return model, tokenizer


def label_fields(names: list[str] | None) -> dict[str, Any]:
    """Return the fields of a model's configuration that describe its labels, or a regression for `None`."""
    if names is None:
        return {"num_labels": 1, "problem_type": "regression"}
    label2id = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": label2id, "problem_type": "single_label_classification"}


def known_labels(model: Any) -> list[str] | None:
    """Return the names that a trained model gives its outputs; `None` if it has none of its own."""
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    return None if names == [f"LABEL_{number}" for number in range(len(names))] else names


def check_plain(model: Any, name: str) -> None:
    if getattr(model, "peft_config", None):
        raise InputError(
            f"Training must start from a plain model, and {name!r} is an adapter: run `hf-adaprune merge {name} "
            "FOLDER`, and use the folder that it wrote as `--model_name_or_path`."
        )


def check_outputs(model: Any, task: Task) -> None:
    needed = 1 if task.label_names is None else len(task.label_names)
    if model.config.num_labels != needed:
        raise InputError(
            f"The model must have {needed} outputs for labels that are {task.label_names or 'numbers'}, got "
            f"{model.config.num_labels}: give `--do_train`, or a model that was trained on such data."
        )


def decide(logits: Any, task: Task) -> np.ndarray:
    logits = logits[0] if isinstance(logits, tuple) else logits
    return logits[:, 0] if task.label_names is None else logits.argmax(axis=1)


def make_compute_metrics(task: Task) -> Callable[[Any], dict[str, float]]:
    # Own data are scored like one of these tasks: by correlation, or by accuracy.
    scored_as = task.name if task.name in GLUE_COLUMNS else "stsb" if task.label_names is None else "sst2"
    metric = glue_metric(scored_as, keep_in_memory=True)

    def compute_metrics(output: Any) -> dict[str, float]:
        scores = metric.compute(predictions=decide(output.predictions, task), references=output.label_ids)
        return scores if len(scores) == 1 else {**scores, "combined_score": float(np.mean(list(scores.values())))}

    return compute_metrics


def count_bytes(folder: Path, name: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(f"{name}*.safetensors"))


def prune_groups(model: Any, sparsity: float, options: dict[str, Any]) -> Any:
    """Prune neurons and heads in a separate run; return the model with their masks."""
    args, folder = options["args"], Path(options["args"].output_dir, GROUPS)
    if args.resume_from_checkpoint and (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder)
    # Few groups need few steps. Checkpoints would be taken for those of the main run.
    shorter: dict[str, float] = {"num_train_epochs": args.num_train_epochs / 2}
    shorter |= {"max_steps": (args.max_steps + 1) // 2} if args.max_steps > 0 else {}
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False}
    first = dataclasses.replace(args, output_dir=str(folder), **shorter, **unsaved)
    config = AdaPruneConfig(granularity="neuron+head", final_sparsity=sparsity)
    trainer = Trainer(model, **options | {"args": first}, callbacks=[AdaPruneCallback(config)])
    trainer.train()
    trainer.save_model()
    return trainer.model


def train(trainer: Trainer, callback: TrainerCallback | None, whole: Any = None) -> Any:
    """Train and save; return the model with the masks, a copy with pre-trained weights if weights were trained.

    If `whole`, a model with masks of neurons and heads, is given, the trainer's model is compacted from it: the
    adapter that is saved combines both masks, over the base of `whole`.
    """
    folder = Path(trainer.args.output_dir)
    trainable = trainer.get_num_trainable_parameters()
    (folder / "all_results.json").unlink(missing_ok=True)  # of an earlier run
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    for _ in range(1, getattr(callback, "num_rounds", 1)):
        metrics = trainer.train().metrics
    if whole is not None:
        trainer.model = expand(trainer.model, whole)
    trainer.save_model()
    if whole is not None and trainer.args.should_save:
        compact(trainer.model).save_pretrained(folder / SMALL)
        trainer.processing_class.save_pretrained(folder / SMALL)
    is_adapter, masked = hasattr(trainer.model, "peft_config"), trainer.model
    if trainer.args.should_save:
        # A folder holds either a model or an adapter; an earlier run may have left the other.
        former = ("config.json", "model") if is_adapter else ("adapter_config.json", "adapter_model")
        for name in (former[0], f"{former[1]}.safetensors"):
            (folder / name).unlink(missing_ok=True)
    metrics |= {"train_samples": len(trainer.train_dataset), "trainable_params": trainable}
    metrics["checkpoint_bytes"] = count_bytes(folder, "adapter_model" if is_adapter else "model")
    if isinstance(callback, TrainedWeightsCallback):
        masked = callback.rewound(trainer.model)
        if trainer.args.should_save:
            masked.save_pretrained(folder / "rewound")
            trainer.processing_class.save_pretrained(folder / "rewound")
    if isinstance(callback, AdaPruneCallback):
        report = sparsity_report(masked)
        metrics |= {"sparsity": report.sparsity, "sparsity_whole_model": report.sparsity_whole_model}
        metrics["adapter_bytes"] = count_bytes(folder if is_adapter else folder / "rewound", "adapter_model")
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()
    return masked


def evaluate(trainer: Trainer, data: dict[str, datasets.Dataset], prefix: str = "eval") -> dict[str, float]:
    """Score each validation split; metric names of MNLI's mismatched split end in `_mm`."""
    metrics: dict[str, float] = {}
    for split, ending in (("validation", ""), ("validation_mismatched", "_mm")):
        if split in data:
            scores = trainer.evaluate(data[split], metric_key_prefix=prefix)
            scores[f"{prefix}_samples"] = len(data[split])
            metrics |= {name + ending: value for name, value in scores.items()}
    trainer.log_metrics(prefix, metrics)
    trainer.save_metrics(prefix, metrics)
    return metrics


def predict(trainer: Trainer, data: dict[str, datasets.Dataset], task: Task) -> None:
    for split, ending in (("test", ""), ("test_mismatched", "-mm")):
        if split in data:
            answers = decide(trainer.predict(data[split], metric_key_prefix="predict").predictions, task)
            if trainer.is_world_process_zero():
                names = task.label_names
                texts = [f"{answer:.3f}" if names is None else names[answer] for answer in answers]
                lines = ["index\tprediction", *(f"{index}\t{text}" for index, text in enumerate(texts)), ""]
                path = Path(trainer.args.output_dir, f"predict_results_{task.name}{ending}.txt")
                path.write_text("\n".join(lines), encoding="utf-8")


def parse(argv: list[str] | None) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    kinds = (ModelArguments, DataArguments, TrainingArguments)
    usage = "%(prog)s --model_name_or_path MODEL --output_dir FOLDER [flags]"
    parser = HfArgumentParser(kinds, description=__doc__, formatter_class=HelpFormatter, usage=usage)
    model_args, data_args, args, unknown = parser.parse_args_into_dataclasses(args=argv, return_remaining_strings=True)
    if unknown:
        raise InputError(f"Unknown flags: {' '.join(unknown)}. `--help` lists all flags.")
    if not (args.do_train or args.do_eval or args.do_predict):
        raise InputError("There is nothing to do: give `--do_train`, `--do_eval` or `--do_predict`.")
    resumed = args.resume_from_checkpoint
    if resumed == "True" and any(Path(args.output_dir).glob("checkpoint-*")):
        args.resume_from_checkpoint = True  # the Trainer finds the last one, once incomplete ones are set aside
    elif resumed and not Path(resumed).is_dir():
        raise InputError(
            "`--resume_from_checkpoint` must be the folder of a checkpoint, or `True` for the last one in "
            f"{args.output_dir!r}, got {resumed!r}: there is none. To start from the beginning, leave it out."
        )
    return model_args, data_args, args


def check_combination(model_args: ModelArguments, args: TrainingArguments, callback: TrainerCallback | None) -> None:
    """Raise if flags cannot be combined, before any data are read."""
    is_frozen = isinstance(callback, AdaPruneCallback) and not isinstance(callback, TrainedWeightsCallback)
    if model_args.compact_first and args.push_to_hub:
        raise InputError(
            "`--push_to_hub` cannot be combined with `--compact_first`: during training, the base of the adapter is a "
            f"smaller model that is not on the Hub. Run `hf-adaprune push {args.output_dir} NAME` afterwards."
        )
    if model_args.compact_first and args.do_train and not is_frozen:
        raise InputError(
            f"`--compact_first` needs a method that trains masks over frozen weights, got {model_args.method!r}. "
            "Train with `--granularity neuron+head`, run `hf-adaprune export`, and use the folder that it wrote as "
            "`--model_name_or_path`."
        )
    if model_args.compact_first and model_args.preset == "paper":
        raise InputError(
            "`--preset paper` replaces the model's head, which `--compact_first` needs: leave one of the two out."
        )
    if model_args.ablate and not (is_frozen and args.do_eval and not model_args.compact_first):
        raise InputError(
            "`--ablate` needs `--do_train`, `--do_eval` and a method that trains masks over frozen weights, without "
            f"`--compact_first`; got `--method {model_args.method}`."
        )


def write_card(folder: str, task: Task, evaluated: dict[str, float]) -> None:
    unscored = ("loss", "runtime", "samples", "per_second", "epoch")
    scores = {name[5:]: value for name, value in evaluated.items() if not name.removesuffix("_mm").endswith(unscored)}
    of: dict[str, Any] = {"dataset": "nyu-mll/glue", "dataset_config": task.name, "dataset_split": "validation"}
    write_model_card(folder, metrics=scores, **(of if task.name in GLUE_COLUMNS else {}))


def main(argv: list[str] | None = None) -> None:
    """Run the script with the flags in `argv`, by default those of the command line."""
    model_args, data_args, args = parse(argv)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logger.setLevel(logging.INFO if args.should_log else logging.WARNING)
    config = AdaPruneConfig.from_preset(
        model_args.preset,
        final_sparsity=model_args.final_sparsity,
        granularity=model_args.granularity,
        **({} if model_args.dropout is None else {"dropout": None}),  # the model's own, which is changed below
    )
    callback = make_callback(model_args.method, config) if args.do_train else None
    check_combination(model_args, args, callback)
    asked = [split for flag, split in SPLIT_OF_FLAG.items() if getattr(args, flag)]
    set_seed(args.seed)
    with args.main_process_first(desc="reading the data"):
        if args.do_train:
            task = load_task(data_args, asked, model_args.cache_dir)
            model, tokenizer = load_model(model_args, **label_fields(task.label_names))
            check_plain(model, model_args.model_name_or_path)
        else:
            model, tokenizer = load_model(model_args)
            task = load_task(data_args, asked, model_args.cache_dir, known_labels(model))
            check_outputs(model, task)
        wanted = [split for split in task.splits if split.split("_")[0] in asked]
        data = {split: tokenize(task, split, tokenizer, data_args) for split in wanted}
    if model_args.dropout is not None:
        change_dropout(model, model_args.dropout)
    options = {"args": args, "processing_class": tokenizer, "compute_metrics": make_compute_metrics(task)}
    options |= {"train_dataset": data.get("train"), "eval_dataset": data.get("validation")}
    whole = None
    if args.do_train and model_args.compact_first:
        whole = prune_groups(model, model_args.compact_first, options)
        model = compact(whole)
    watch = RecoveryCallback()
    watching = [watch] if model_args.count_recovery and isinstance(callback, AdaPruneCallback) else []
    trainer = Trainer(model, **options, callbacks=[*([callback] if callback else []), *watching])
    masked = train(trainer, callback, whole) if args.do_train else model
    evaluated = evaluate(trainer, data) if args.do_eval else {}
    if args.do_eval and masked is not trainer.model:
        evaluate(Trainer(masked, **options), data, "eval_rewound")
    if args.do_predict:
        predict(trainer, data, task)
    pruned_alone = isinstance(callback, AdaPruneCallback) and masked is trainer.model
    if pruned_alone and trainer.is_world_process_zero():
        write_card(args.output_dir, task, evaluated)
    if args.do_eval and model_args.ablate:
        trainer.save_metrics("ablations", ablate(trainer))
    if watching:
        shares = {"of_kept": watch.recovery.share_of_kept, "of_pruned": watch.recovery.share_of_pruned}
        trainer.save_metrics("recovery", {f"recovered_{name}": share for name, share in shares.items()})
    if args.push_to_hub:
        source = "nyu-mll/glue" if data_args.task_name else None
        trainer.push_to_hub(tasks="text-classification", dataset=task.name, dataset_tags=source)
    names = sorted(path.name for path in Path(args.output_dir).iterdir())
    logger.info("Results are in %s: %s", args.output_dir, ", ".join(names))


if __name__ == "__main__":
    try:
        main()
    except (InputError, AdaPruneError) as error:
        sys.exit(f"run_glue.py: error: {error}")
