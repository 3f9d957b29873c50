"""What each process of a distributed run does; run as `accelerate launch ... ranks.py BASE FOLDER`.

Every scenario leaves its files in `FOLDER`, for `test_accelerate.py` to look at. In one process, without a launcher,
the same functions make what is compared.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import get_peft_model
from safetensors.torch import save_file
from tiny import make_batch, make_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import BertTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments, set_seed

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner
from hf_adaprune.demo.reviews import make_reviews
from hf_adaprune.errors import DivergenceError, UnsupportedShardingError
from hf_adaprune.masks import pack_mask
from hf_adaprune.training.calibration import InputMoments
from hf_adaprune.tuner.masked_layers import adaprune_layers
from hf_adaprune.tuner.selection import topk_masks


EXAMPLES = Path(__file__).parents[1] / "examples"
GLOBAL_BATCH = 16
# Without dropout, whose noise falls on other examples when they are dealt to more processes.
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# What is tried on the loop: flags, and what the configuration file of `accelerate launch` sets.
LOOPS: dict[str, tuple[list[str], dict[str, str]]] = {
    "plain": ([], {}),
    "accumulated": ([], {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}),
    "bf16": ([], {"ACCELERATE_MIXED_PRECISION": "bf16"}),
    "checkpointed": (["--gradient_checkpointing"], {}),
}


def world() -> tuple[int, int]:
    """Return this process's number, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def packed_masks(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the masks that a model in training has here, in this process."""
    return {
        name.rpartition("base_model.model.")[2]: pack_mask(layer.mask("default"))
        for name, layer in adaprune_layers(model)
    }


def save_reviewer(folder: Path) -> Path:
    """Save a random BERT that knows the words of the demo's reviews."""
    words = sorted(
        {word for text in make_reviews(96, 96)["train"]["sentence"] for word in re.findall(r"\w+", text.lower())}
    )
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder)
    make_model("bert", "none", vocab_size=len(vocabulary), initializer_range=0.1, **NO_DROPOUT).save_pretrained(folder)
    return folder


def run_trainer(base: str, folder: Path) -> None:
    """Prune with a stock Trainer, the same global batches whatever the number of processes."""
    set_seed(0)
    model = make_model(**NO_DROPOUT)
    rows = [{key: values[0] for key, values in make_batch(seed=seed, size=1).items()} for seed in range(96)]
    PartialState(cpu=True)
    args = TrainingArguments(
        str(folder / "run"),
        per_device_train_batch_size=GLOBAL_BATCH // world()[1],
        num_train_epochs=2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        # Else it multiplies the loss of a classifier, a mean already, by the number of processes.
        average_tokens_across_devices=False,
    )
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[AdaPruneCallback])
    trainer.train()
    trainer.save_model(str(folder / "trainer"))
    save_file(packed_masks(model), folder / f"trainer-rank{world()[0]}.safetensors")


def run_loop(name: str, base: str, folder: Path) -> None:
    """Prune with the example of a loop of one's own."""
    flags, environment = LOOPS[name]
    accumulated = int(environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", 1))
    batch = GLOBAL_BATCH // world()[1] // accumulated
    kept: list[nn.Module] = []

    class Keep(Pruner):
        def __init__(self, model: nn.Module, total_steps: int) -> None:
            kept.append(model)
            super().__init__(model, total_steps)

    # To one length: else each process pads its part of a batch to another, and what pads is an input too.
    collate = partial(DataCollatorWithPadding, padding="max_length", max_length=24)
    arguments = ["accelerate_loop.py", "--model", base, "--output_dir", str(folder / name), "--num_train", "96"]
    arguments += ["--epochs", "2", "--batch_size", str(batch), *flags]
    with (
        mock.patch.object(sys, "path", [str(EXAMPLES), *sys.path]),
        mock.patch.object(sys, "argv", arguments),
        mock.patch.dict(os.environ, environment),
    ):
        example = import_module("accelerate_loop")
        with mock.patch.multiple(example, Pruner=Keep, DataCollatorWithPadding=collate):
            example.main()
    AcceleratorState._reset_state()
    GradientState._reset_state()
    save_file(packed_masks(kept[0]), folder / f"{name}-rank{world()[0]}.safetensors")


def run_calibration(base: str, folder: Path) -> None:
    """Watch the inputs of a part of a batch; write down the moments of the whole."""
    batch, (rank, size) = make_batch(size=GLOBAL_BATCH), world()
    seen: dict[str, torch.Tensor] = {}
    for granularity in ("weight", "neuron+head"):
        config = AdaPruneConfig(granularity=granularity)
        model = get_peft_model(make_model(**NO_DROPOUT), config).train()
        moments = InputMoments(dict(adaprune_layers(model)), "default")
        model(**{key: values.chunk(size)[rank] for key, values in batch.items()})
        seen |= {f"{granularity}.{name}": total for name, total in moments.pop().items()}
    save_file(seen, folder / f"moments-rank{rank}.safetensors")


def run_divergence(base: str, folder: Path) -> None:
    """Change a score in one process only; write down what is said of it."""
    model = get_peft_model(make_model(**NO_DROPOUT), AdaPruneConfig()).train()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    pruner = Pruner(wrapped, total_steps=2)
    wrapped(**make_batch()).loss.backward()
    pruner.step()
    pruner.check_masks()
    layer = model.get_submodule("base_model.model.bert.encoder.layer.1.attention.self.key")
    if world()[0] == 1:
        layer.adaprune_scores["default"].data[0].neg_()
    pruner.step()
    try:
        pruner.finalize()
        said = ""
    except DivergenceError as error:
        said = str(error)
    (folder / f"divergence-rank{world()[0]}.json").write_text(json.dumps(said))


def run_replicated(base: str, folder: Path) -> None:
    """Train a model that every process has whole, by hand."""
    model = get_peft_model(make_model(**NO_DROPOUT), AdaPruneConfig(scope="kind"))
    _train_by_hand(model, DistributedDataParallel(model, find_unused_parameters=True), folder / "replicated")


def run_sharded(base: str, folder: Path) -> None:
    """Train the same model with weights and scores sharded over the processes (FSDP2)."""
    model = get_peft_model(make_model(**NO_DROPOUT), AdaPruneConfig(scope="kind"))
    mesh = init_device_mesh("cpu", (world()[1],))
    for layer in model.get_submodule("base_model.model.bert.encoder.layer"):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _train_by_hand(model, model, folder / "sharded")


def _train_by_hand(model: Any, wrapped: nn.Module, path: Path) -> None:
    wrapped.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    pruner = Pruner(wrapped, total_steps=5)
    rank, size = world()
    for step in range(5):
        batch = make_batch(seed=step, size=GLOBAL_BATCH)
        wrapped(**{key: values.chunk(size)[rank] for key, values in batch.items()}).loss.backward()
        pruner.check_gradients()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    pruner.finalize()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(path, state_dict=state)
    save_file(packed_masks(model), path.with_name(f"{path.name}-rank{rank}.safetensors"))


def run_selection(base: str, folder: Path) -> None:
    """Choose from scores of every kind, sharded; write down the first choice that is not `topk_masks`'s."""
    gather, gathered = DTensor.full_tensor, set[torch.dtype]()

    def note(tensor: DTensor, **options: Any) -> torch.Tensor:
        gathered.add(tensor.dtype)
        return gather(tensor, **options)

    mesh = init_device_mesh("cpu", (world()[1],))
    shapes = {"a": (7, 5), "b": (1, 4), "c": (3, 8)}
    wrong = ""
    generator = torch.Generator().manual_seed(0)
    for trial in range(40):
        # Spread out, and all but equal: then the weights decide, and then the position.
        made: list[dict[str, torch.Tensor]] = [
            {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)
        ]
        for values in made[: trial % 3]:
            values.update({name: values[name].round() * -0.0 + values[name].sign() for name in values})
        groups = [["a", "c"], ["b"]] if trial % 2 else [["a", "b", "c"]]
        sizes = [sum(made[0][name].numel() for name in group) for group in groups]
        kept = [int(torch.randint(size + 1, (), generator=generator)) for size in sizes]
        sharded = [{name: distribute_tensor(values[name], mesh, [Shard(0)]) for name in values} for values in made]
        with mock.patch.object(DTensor, "full_tensor", note):
            found = topk_masks(sharded[0], sharded[1], groups, kept)
        wanted = topk_masks(made[0], made[1], groups, kept)
        if any(not torch.equal(found[name], wanted[name]) for name in shapes) and not wrong:
            wrong = f"trial {trial}: {groups}, {kept}"
    if gathered != {torch.uint8}:
        wrong = f"not only masks are gathered, but tensors of {gathered}"
    (folder / f"selection-rank{world()[0]}.json").write_text(json.dumps(wrong))


def run_flattened(base: str, folder: Path) -> None:
    """Hand a model under FSDP1 to a pruner; write down what is said of it."""
    model = get_peft_model(make_model(**NO_DROPOUT), AdaPruneConfig())
    wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    try:
        Pruner(wrapped, total_steps=1)
        said = ""
    except UnsupportedShardingError as error:
        said = str(error)
    (folder / f"flattened-rank{world()[0]}.json").write_text(json.dumps(said))


SCENARIOS: list[Callable[[str, Path], None]] = [
    run_trainer,
    run_calibration,
    run_divergence,
    run_replicated,
    run_sharded,
    run_selection,
    run_flattened,
]


def main(base: str, folder: Path) -> None:
    for scenario in SCENARIOS:
        scenario(base, folder)
    for name in LOOPS:
        run_loop(name, base, folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    # All results are on disk. What the scenarios leave behind still holds process groups, whose threads have aborted
    # the interpreter's orderly exit ("terminate called without an active exception").
    sys.stderr.flush()
    os._exit(0)
