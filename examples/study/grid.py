"""The grid of the study: its runs, their flags for `examples/run_glue.py`, and their order."""

from collections.abc import Iterable
from dataclasses import dataclass


# Batches of 32. On SST-2 sentences of similar length are grouped, which saves padding. On STS-B, where the length
# reveals the source, grouping costs fine-tuning three points: there, and on all tasks where this was not measured,
# batches are random, and each is split by length into four parts.
GROUPED = "--per_device_train_batch_size 32 --train_sampling_strategy group_by_length"
REBALANCED = (
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 4 --train_sampling_strategy batch_rebalance"
)
# The Trainer's default batch size: four times the steps in the same number of epochs.
BATCHES_OF_8 = "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --train_sampling_strategy random"
TASKS = {
    "stsb": f"--task_name stsb {REBALANCED}",
    "sst2-8k": f"--task_name sst2 --max_train_samples 8000 {GROUPED}",
    "mrpc": f"--task_name mrpc {REBALANCED}",
    "cola": f"--task_name cola {REBALANCED}",
    "rte": f"--task_name rte {REBALANCED}",
    "sst2": f"--task_name sst2 {GROUPED}",
}
EPOCHS = dict.fromkeys(TASKS, 3) | {"mrpc": 5, "rte": 8}  # more on the small tasks: no run has fewer than 500 steps
COMMON = "--do_train --do_eval --per_device_eval_batch_size 64 --save_strategy no --logging_steps 50 --report_to none"

# Learning rates: the Trainer's 5e-5 where none is given; 1e-3 if only the head is trained; 2e-3 for LoRA, since the
# 5e-4 of its paper on SST-2 is too low for a base this small (.846, not .856). Scores have their own: 1e-2 in movement
# pruning and 2e-2 in SMP, from the papers.
ALL_WEIGHTS = "--learning_rate 1e-4"  # for a base this small; the BERT paper uses 2e-5 to 5e-5 for BERT-base
METHODS = {
    "finetune": f"--method finetune {ALL_WEIGHTS}",
    "adaprune": "--method adaprune",
    "feature_extraction": "--method feature_extraction --learning_rate 1e-3",
    "lora": "--method lora --learning_rate 2e-3",
    "random": "--method random --learning_rate 1e-3",
    "magnitude": f"--method magnitude {ALL_WEIGHTS}",
    "movement": f"--method movement {ALL_WEIGHTS}",
    "smp": "--method smp",
    "paper": "--method adaprune --preset paper --learning_rate 1e-4 --count_recovery",
    "no_recovery": "--method no_recovery",
    "ablations": "--method adaprune --ablate",
    "neurons_heads": "--method adaprune --granularity neuron+head",
    "smaller": "--method adaprune --compact_first 0.5",  # half of the encoder, then half of the rest
    "longer": "--method adaprune",
    "small_batches": f"--method adaprune {BATCHES_OF_8}",
    "longer_small_batches": f"--method adaprune {BATCHES_OF_8}",
    "finetune_small_batches": f"--method finetune --learning_rate 5e-5 {BATCHES_OF_8}",
    "two_of_four": "--method adaprune --granularity 2:4",
    "imp": f"--method imp {ALL_WEIGHTS}",  # 5 trainings to reach .5, 12 to reach .9: it runs last
}
# By default masks for regression are trained without dropout; these variants do the same for other methods.
METHODS |= {f"{name}_no_dropout": f"{METHODS[name]} --dropout 0" for name in ("finetune", "lora", "smp", "magnitude")}
NO_DROPOUT = tuple(name for name in METHODS if name.endswith("_no_dropout"))
TWICE_THE_EPOCHS = ("smaller", "longer", "longer_small_batches")
SMALL_BATCHES = ("finetune_small_batches", "small_batches", "longer_small_batches")
UNPRUNED = (
    "finetune",
    "finetune_no_dropout",
    "finetune_small_batches",
    "feature_extraction",
    "lora",
    "lora_no_dropout",
)
STRUCTURED = ("neurons_heads", "smaller", "two_of_four")  # only with half of the weights pruned

# Tried on held-out data (`run.py --tuning`); scores have their own learning rate: see recipe.md.
LEARNING_RATES = {"finetune": (5e-5, 1e-4, 2e-4, 4e-4), "lora": (5e-4, 1e-3, 2e-3, 4e-3)}

CORE = ("stsb", "sst2-8k", "mrpc")
OTHERS = ("cola", "rte", "sst2")
SPARSITIES = (0.2, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
TELLING = (0.5, 0.9)
REST = tuple(sparsity for sparsity in SPARSITIES if sparsity not in TELLING)
CURVES = ("random", "magnitude", "movement", "smp", "paper", "imp")  # in addition to AdaPrune
SPECIAL = (*STRUCTURED, *NO_DROPOUT, *SMALL_BATCHES, "longer")  # not run for every task, or not at every sparsity


@dataclass(frozen=True)
class Run:
    """One cell of the grid, one seed; `sparsity` is 0 without pruning, `learning_rate` replaces the method's own."""

    task: str
    method: str
    sparsity: float
    seed: int
    learning_rate: float | None = None

    @property
    def name(self) -> str:
        """The name that `--only` is matched with, for example `stsb/adaprune/0.5/0` or `stsb/lora/0.0/0/0.001`."""
        rate = "" if self.learning_rate is None else f"/{self.learning_rate}"
        return f"{self.task}/{self.method}/{self.sparsity}/{self.seed}{rate}"

    @property
    def dataset(self) -> str:
        """The name of the task in GLUE."""
        return self.task.removesuffix("-8k")

    def command(self, model: str, data_dir: str | None, output_dir: str) -> list[str]:
        """Return the arguments of `run_glue.py`, which fetches the data from the Hub if no folder is given."""
        where = ["--model_name_or_path", model, "--output_dir", output_dir]
        where += ["--data_dir", data_dir] if data_dir else []
        epochs = EPOCHS[self.task] * (2 if self.method in TWICE_THE_EPOCHS else 1)
        what = f"{TASKS[self.task]} --num_train_epochs {epochs} {METHODS[self.method]} --seed {self.seed} {COMMON}"
        what += f" --final_sparsity {self.sparsity}" if self.sparsity else ""
        what += f" --learning_rate {self.learning_rate}" if self.learning_rate is not None else ""
        return [*where, *what.split()]


def grid() -> list[Run]:
    """Return all runs, the most informative first; in each block, all cells of one seed come before the next seed."""

    def cells(*sparsities: float, methods: Iterable[str] = METHODS.keys() - SPECIAL) -> list[tuple[str, float]]:
        known = [method for method in METHODS if method in methods]
        return [(method, level) for method in known for level in ((0.0,) if method in UNPRUNED else sparsities)]

    blocks: list[tuple[tuple[str, ...], list[tuple[str, float]], range]] = [
        (CORE, cells(*TELLING), range(3)),
        (("stsb",), cells(0.5, methods=NO_DROPOUT), range(3)),
        (CORE, [("adaprune", sparsity) for sparsity in REST], range(3)),
        ((*CORE, "cola", "rte"), [(method, 0.5) for method in STRUCTURED], range(3)),
        ((*CORE, "cola", "rte"), cells(0.5, 0.8, 0.9, methods=("longer", *SMALL_BATCHES)), range(3)),
        (OTHERS, cells(*TELLING), range(3)),
        (OTHERS, [("adaprune", sparsity) for sparsity in REST], range(3)),
        (CORE, [(method, sparsity) for method in CURVES for sparsity in REST], range(3)),
        (CORE, cells(0.5), range(3, 5)),
    ]
    return [
        Run(task, *cell, seed) for tasks, block, seeds in blocks for seed in seeds for cell in block for task in tasks
    ]


def tuning_grid() -> list[Run]:
    """Return the runs, scored on data held out of the training split, that select the learning rates."""
    return [
        Run(task, method, 0.0, 0, rate)
        for method, rates in LEARNING_RATES.items()
        for task in (*CORE, "cola", "rte")
        for rate in rates
    ]
