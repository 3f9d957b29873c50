"""Bad input makes a clear error, and nothing is lost."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from doors import DOORS, load_base, logits_of, make_trainer, rows, save_base, train
from peft import PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import make_model, save_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainerCallback,
)

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner, skip_fingerprint_check, sparsity_report
from hf_adaprune.analysis import load_masks
from hf_adaprune.errors import (
    AdaPruneError,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    NoMatchingModuleError,
    NonFiniteError,
)
from hf_adaprune.tuner.masked_layers import adaprune_layers


PEFT_DOORS = ("PeftModel.from_pretrained", "AutoPeftModelForSequenceClassification")
TRANSFORMERS_DOORS = ("AutoModelForSequenceClassification", "model.load_adapter")
DOORS_THAT_SAVE = ("PeftModel.from_pretrained", "model.load_adapter")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HEAD = "base_model.model.classifier"


def snapshot(model: nn.Module) -> tuple[dict[str, torch.Tensor], set[str]]:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_untouched(model: Any, before: tuple[dict[str, torch.Tensor], set[str]]) -> None:
    """Assert that a model is as it was, and takes an adapter of the name that could not be made."""
    state, trainable = snapshot(model)
    assert state.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in state.items())
    assert trainable == before[1]
    assert not getattr(model, "peft_config", None)
    get_peft_model(model, AdaPruneConfig())


# What is asked for


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_what_was_refused_may_be_asked_for_again_rightly() -> None:
    model = make_model()
    with pytest.raises(NoMatchingModuleError):
        model.add_adapter(AdaPruneConfig(target_modules=["qurey"]))
    with pytest.raises(ConfigError, match=r"name must not be empty or contain a dot, got 'v1.0'"):
        model.add_adapter(AdaPruneConfig(), "v1.0")
    model.add_adapter(AdaPruneConfig(target_modules=["query"]))
    with pytest.raises(NoMatchingModuleError):
        model.add_adapter(AdaPruneConfig(target_modules=["qurey"]), "second")
    assert model.active_adapters() == ["default"]


def by_callback(model: Any, config: AdaPruneConfig, folder: Path) -> None:
    make_trainer(model, folder, AdaPruneCallback(config))


def by_get_peft_model(model: Any, config: AdaPruneConfig, folder: Path) -> None:
    get_peft_model(model, config)


@pytest.mark.parametrize("make", [by_callback, by_get_peft_model])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"target_modules": ["qurey"]},
            r"No module matched `target_modules=\['qurey'\]`. Linear modules end in: .*'query'",
        ),
        ({"target_modules": ["query", "qurey"]}, r"No module matched `target_modules=\['qurey'\]`"),
        ({"target_modules": ".*qurey"}, r"No module matched `target_modules='.*qurey'`. Linear modules end in"),
        ({"target_modules": []}, r"No module matched `target_modules=\[\]`. Linear modules end in"),
        ({"target_modules": ["query"], "layers_to_transform": [7]}, "No module matched"),
        ({"target_modules": ["query", "LayerNorm"]}, r"^`target_modules` matched '.*LayerNorm', a LayerNorm. Only"),
        ({"target_modules": ["query", "intermediate"]}, r"^`target_modules` matched '.*intermediate', a BertInterm"),
        ({"target_modules": ["qurey"], "head": "layer_average"}, "No module matched"),
    ],
    ids=str,
)
def test_targets_that_are_not_there_are_named_beside_those_that_are(
    options: dict[str, Any], said: str, make: Callable[..., None], base_path: Path, tmp_path: Path
) -> None:
    model = load_base(base_path)
    before = snapshot(model)
    with pytest.raises(NoMatchingPeftModuleError, match=said) as error:
        make(model, AdaPruneConfig(**options), tmp_path)
    assert isinstance(error.value, AdaPruneError)
    assert_untouched(model, before)


def stopped_trainer(model: Any, folder: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    make_trainer(model, folder, AdaPruneCallback, Stop).train()


def short_loop(model: Any, folder: Path) -> None:
    model.add_adapter(AdaPruneConfig())
    pruner = Pruner(model, total_steps=100)
    pruner.step()
    pruner.finalize()


def idle_threshold(model: Any, folder: Path) -> None:
    make_trainer(model, folder, AdaPruneCallback(AdaPruneConfig.from_preset("paper", drift=0.0))).train()


@pytest.mark.parametrize("run", [stopped_trainer, short_loop, idle_threshold])
def test_a_schedule_that_is_longer_than_the_run_ends_at_its_target_and_says_so(
    run: Callable[..., None], base_path: Path, tmp_path: Path
) -> None:
    model = load_base(base_path)
    with pytest.warns(UserWarning, match=r"sparsity of 0\.\d+, below `final_sparsity=0.5`.*Train longer, or lower"):
        run(model, tmp_path)
    report = sparsity_report(model)
    assert report.num_pruned == round(0.5 * report.num_weights)


# What it is put on


def reseeded(base: nn.Module) -> None:
    base.load_state_dict(make_model("bert", "none", seed=1).state_dict())


def with_other_embeddings(base: Any) -> None:
    base.embeddings.word_embeddings.weight.data += 1


def with_other_biases(base: Any) -> None:
    base.encoder.layer[0].attention.self.query.bias.data += 1


def with_another_norm(base: Any) -> None:
    base.encoder.layer[1].output.LayerNorm.weight.data *= 2


CHANGES = {
    "seed": reseeded,
    "embeddings": with_other_embeddings,
    "biases": with_other_biases,
    "norm": with_another_norm,
}
SHAPES: dict[str, dict[str, int]] = {
    "hidden size": {"hidden_size": 16},
    "fewer layers": {"num_hidden_layers": 1},
    "more layers": {"num_hidden_layers": 4},
}


def save_other_base(what: str, folder: Path) -> Path:
    save_base(folder, **SHAPES.get(what, {}))
    if what in CHANGES:
        base = AutoModel.from_pretrained(folder)
        CHANGES[what](base)
        base.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("what", [*CHANGES, *SHAPES])
def test_an_adapter_for_another_base_is_refused(
    what: str, is_trainable: bool, adapter_path: Path, base_path: Path, tmp_path: Path
) -> None:
    base = save_other_base(what, tmp_path / "base")
    said = (
        rf"(?s)made for other weights.*fingerprint.*own base.*'{base_path}'.*`hf_adaprune.skip_fingerprint_check\(\)`"
    )
    for put in (
        lambda model: PeftModel.from_pretrained(model, str(adapter_path), is_trainable=is_trainable),
        lambda model: model.load_adapter(str(adapter_path), is_trainable=is_trainable),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(base)
        before = snapshot(model)
        with pytest.raises(BaseMismatchError, match=said):
            put(model)
        assert_untouched(model, before)


@pytest.mark.parametrize("door", [*PEFT_DOORS, *TRANSFORMERS_DOORS, "pipeline"])
def test_a_base_that_has_changed_since_is_refused_by_every_door_but_one(door: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    trained = train(base, tmp_path / "run").model
    trained.save_pretrained(tmp_path / "adapter")
    save_other_base("biases", base)
    # `pipeline` tries another class next, and then tells of all that went wrong in a `ValueError`.
    with pytest.raises(BaseMismatchError if door != "pipeline" else ValueError, match="made for other weights"):
        DOORS[door](str(base), str(tmp_path / "adapter"))
    with skip_fingerprint_check():
        opened = DOORS[door](str(base), str(tmp_path / "adapter"))
    masks = dict(adaprune_layers(trained))
    for name, layer in adaprune_layers(opened):
        wanted = masks[name.removeprefix("base_model.model.")]
        assert torch.equal(layer.mask("default"), wanted.mask("default"))
    assert not torch.equal(logits_of(opened), logits_of(trained))


def test_modules_to_save_inside_of_each_other_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"'bert.pooler.dense' in 'bert.pooler'"):
        get_peft_model(make_model(), AdaPruneConfig(modules_to_save=["pooler.dense"]))


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForTokenClassification])
def test_an_adapter_for_another_head_is_refused(auto_class: Any, base_path: Path, adapter_path: Path) -> None:
    for put in (
        lambda model: PeftModel.from_pretrained(model, str(adapter_path)),
        lambda model: model.load_adapter(str(adapter_path)),
    ):
        model = auto_class.from_pretrained(base_path)
        before = snapshot(model)
        with pytest.raises(BaseMismatchError, match=r"made for a BertForSequenceClassification.*Open the adapter"):
            put(model)
        assert_untouched(model, before)


def test_an_adapter_for_another_architecture_is_refused(adapter_path: Path, tmp_path: Path) -> None:
    base = save_model(tmp_path, "roberta", "none")
    said = "made for a BertForSequenceClassification, the model is a RobertaForSequenceClassification"
    with pytest.raises(BaseMismatchError, match=said):
        AutoModelForSequenceClassification.from_pretrained(base).load_adapter(str(adapter_path))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_a_failed_load_leaves_the_adapters_that_are_there(base_path: Path, adapter_path: Path, tmp_path: Path) -> None:
    other = train(save_other_base("biases", tmp_path / "base"), tmp_path / "run").model
    other.save_pretrained(tmp_path / "other")
    model = DOORS["model.load_adapter"](str(base_path), str(adapter_path))
    before = logits_of(model)
    for _ in range(2):  # the name stays free
        with pytest.raises(BaseMismatchError):
            model.load_adapter(str(tmp_path / "other"), adapter_name="other")
    assert torch.equal(logits_of(model), before)


# The files of an adapter


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config |= fields
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def first_mask(tensors: dict[str, torch.Tensor]) -> str:
    return min(name for name in tensors if "adaprune_mask" in name)


def cut_short(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def foreign_file(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + bytes(5000))


def foreign_tensors(folder: Path) -> None:
    save_file({"base_model.model.bert.encoder.layer.0.lora_A.weight": torch.zeros(8, 32)}, folder / WEIGHTS)


def without_head(folder: Path) -> None:
    edit_tensors(folder, lambda it: [it.pop(name) for name in list(it) if "adaprune_mask" not in name])


def without_classifier_bias(folder: Path) -> None:
    edit_tensors(folder, lambda it: it.pop(f"{HEAD}.bias"))


def without_a_mask(folder: Path) -> None:
    edit_tensors(folder, lambda it: it.pop(first_mask(it)))


def with_a_short_mask(folder: Path) -> None:
    edit_tensors(folder, lambda it: it.update({first_mask(it): it[first_mask(it)][:-1].clone()}))


def with_a_flipped_bit(folder: Path) -> None:
    edit_tensors(folder, lambda it: it[first_mask(it)][:1].bitwise_xor_(torch.ones(1, dtype=torch.uint8)))


def with_another_head(folder: Path) -> None:
    edit_tensors(folder, lambda it: it[f"{HEAD}.weight"].add_(1))


def with_a_last_bit_of_the_head_flipped(folder: Path) -> None:
    edit_tensors(
        folder, lambda it: it[f"{HEAD}.weight"].view(torch.int32).bitwise_xor_(torch.ones(1, dtype=torch.int32))
    )


def with_a_weight_of_the_base(folder: Path) -> None:
    name = "base_model.model.bert.embeddings.LayerNorm.weight"
    edit_tensors(folder, lambda it: it.update({name: torch.zeros(32)}))


def with_scores(folder: Path) -> None:
    edit_tensors(folder, lambda it: it.update({first_mask(it).replace("mask", "scores.default"): torch.zeros(32, 32)}))


def with_a_head_of_another_size(folder: Path) -> None:
    edit_tensors(folder, lambda it: it.update({f"{HEAD}.weight": it[f"{HEAD}.weight"].T.contiguous()}))


def with_more_to_save(folder: Path) -> None:
    edit_config(folder, modules_to_save=["classifier", "embeddings"])


def without_fingerprints(folder: Path) -> None:
    edit_config(folder, adapter_fingerprint=..., base_fingerprint=...)


def with_another_fingerprint(folder: Path) -> None:
    edit_config(folder, adapter_fingerprint="0" * 32)


def with_half_the_targets(folder: Path) -> None:
    edit_config(folder, target_modules=["query", "key"])


def without_the_labels_fingerprint(folder: Path) -> None:
    edit_config(folder, labels_fingerprint=None)


def only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


# What is done to the files -> what is said of it, at the latest at the first forward pass.
DAMAGES: dict[Callable[[Path], None], str] = {
    cut_short: "cannot be read.*truncated.*Fetch",
    emptied: "cannot be read.*truncated.*Fetch",
    foreign_file: "cannot be read.*not a safetensors file.*Fetch",
    foreign_tensors: "does not match its configuration.*has no .*adaprune_mask.*Fetch",
    without_head: "has no .*classifier.weight.*Fetch",
    without_classifier_bias: "has no .*classifier.bias.*Fetch",
    without_a_mask: "has no .*adaprune_mask.*Fetch",
    with_a_short_mask: "masks of the wrong size.*adaprune_mask.*Fetch",
    with_a_flipped_bit: "not those that were saved.*Fetch",
    with_another_head: "not those that were saved.*Fetch",
    with_a_last_bit_of_the_head_flipped: "not those that were saved.*Fetch",
    with_a_weight_of_the_base: "has unexpected .*LayerNorm.weight.*Fetch",
    with_scores: "has unexpected .*adaprune_scores.*Fetch",
    with_a_head_of_another_size: "does not fit the head.*classifier.weight.*Fetch",
    with_more_to_save: "require the tensors .*embeddings.*does not list.*Fetch",
    without_fingerprints: "must have the fingerprints.*lacks one.*Fetch.*skip_fingerprint_check",
    without_the_labels_fingerprint: "must have the fingerprints.*lacks one.*Fetch.*skip_fingerprint_check",
    with_another_fingerprint: "not those that were saved.*Fetch",
    with_half_the_targets: "not those that were saved.*Fetch",
    only_pickled: "adapter_model.bin is a pickle, and pickles are not read.*safe_serialization",
}


@pytest.mark.parametrize("door", [*PEFT_DOORS, *TRANSFORMERS_DOORS])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_adapter_never_computes(
    damage: Callable[[Path], None], door: str, base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter_path, tmp_path / "adapter")
    damage(tmp_path / "adapter")
    if damage is only_pickled and door in TRANSFORMERS_DOORS:
        pytest.skip("transformers looks for a pickle on the Hub only: see test_hub.py")
    model = None
    with pytest.raises(AdapterFileError, match=f"(?s){DAMAGES[damage]}"):
        logits_of(model := DOORS[door](str(base_path), str(tmp_path / "adapter")))
    if model is not None:
        # Nor does it the second time.
        with pytest.raises(AdapterFileError, match="not those that were saved"):
            logits_of(model)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"final_sparsity": 2}, r"`final_sparsity` must be in \[0, 1\), got 2"),
        ({"estimator": "ste"}, "`estimator` must be one of .* got 'ste'"),
        ({"mask_codec": "rle"}, r"`mask_codec` must be one of \['packed-bits-lsb', 'auto'\], got 'rle'"),
        ({"format_version": 2}, "format version 2, this hf_adaprune reads up to 1: upgrade"),
        ({"model_config": "bert"}, "`model_config` must be of type dict, got 'bert'"),
        ({"model_config": {"architectures": 5}}, r"`model_config\['architectures'\]` must be a list of names, got 5"),
        ({"model_config": {"id2label": {"a": "b"}}}, r"must number its labels from 0, got \['a'\]"),
        ({"model_config": None}, "labels in `model_config` are not those that were saved"),
        ({"labels_fingerprint": "0" * 32}, "labels in `model_config` are not those that were saved"),
        ({"module_counts": {"bert": [2, 1]}}, r"`module_counts` must map names to .* got 'bert': \[2, 1\]"),
        ({"module_counts": {"bert": [0, 0]}}, r"`module_counts` must map names to .* got 'bert': \[0, 0\]"),
        ({"modules_to_save": [1]}, r"`modules_to_save` must be of type list\[str\], got \[1\]"),
        ({"target_modules": r"(\w+\.?)+ "}, "regular expressions are not read"),
        ({"task_type": "CAUSAL_LM"}, "needs a model that generates text, got a BertForSequenceClassification"),
        ({"target_modules": ["qurey"]}, r"No module matched `target_modules=\['qurey'\]`. Linear modules end in"),
    ],
    ids=str,
)
@pytest.mark.parametrize("door", [PEFT_DOORS[0], TRANSFORMERS_DOORS[0]])
def test_a_configuration_that_was_edited_by_hand_is_refused_in_words(
    fields: dict[str, Any], said: str, door: str, base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter_path, tmp_path / "adapter")
    edit_config(tmp_path / "adapter", **fields)
    with pytest.raises(AdaPruneError, match=said):
        DOORS[door](str(base_path), str(tmp_path / "adapter"))


def test_what_an_adapter_tells_of_its_base_decides_on_no_size_and_loads_no_code(
    base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    wanted = logits_of(DOORS["pipeline"](str(base_path), str(adapter_path)))
    shutil.copytree(adapter_path, tmp_path / "adapter")
    config = json.loads((adapter_path / CONFIG).read_text())
    huge = {"num_labels": 10**12, "num_hidden_layers": 10**9, "attn_implementation": "somebody/kernel"}
    edit_config(tmp_path / "adapter", model_config=config["model_config"] | huge)
    for door in (*PEFT_DOORS, *TRANSFORMERS_DOORS):
        with pytest.warns(UserWarning, match="num_hidden_layers=1000000000: on this one it computes something else"):
            assert torch.equal(logits_of(DOORS[door](str(base_path), str(tmp_path / "adapter"))), wanted)
    with pytest.raises(AdapterFileError, match="1000000000 layers"):
        load_masks(tmp_path / "adapter")


def test_what_is_stored_names_its_modules_in_full(base_path: Path, tmp_path: Path) -> None:
    config = AdaPruneConfig(target_modules=r".*\.(query|key|value)", exclude_modules=r".*layer\.0.*")
    model = get_peft_model(load_base(base_path), config)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    names = [f"bert.encoder.layer.1.attention.self.{name}" for name in ("key", "query", "value")]
    assert (stored["target_modules"], stored["exclude_modules"]) == (names, None)
    opened = DOORS["PeftModel.from_pretrained"](str(base_path), str(tmp_path))
    assert [name for name, _ in adaprune_layers(opened)] == [name for name, _ in adaprune_layers(model)]


class Trap:
    """Leave a mark wherever it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("door", [*PEFT_DOORS, *TRANSFORMERS_DOORS, "pipeline"])
def test_no_pickle_is_executed(door: str, base_path: Path, adapter_path: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter_path, tmp_path / "adapter")
    torch.save({"mask": Trap(tmp_path / "mark")}, tmp_path / "adapter" / "adapter_model.bin")
    wanted = logits_of(DOORS[door](str(base_path), str(adapter_path)))
    # Beside the safetensors file it is not looked at.
    assert torch.equal(logits_of(DOORS[door](str(base_path), str(tmp_path / "adapter"))), wanted)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    with pytest.raises((AdapterFileError, FileNotFoundError, ValueError), match=r"adapter_model\.safetensors"):
        DOORS[door](str(base_path), str(tmp_path / "adapter"))
    assert not (tmp_path / "mark").exists()


# Training


@pytest.mark.parametrize("way", ["class", "wrapped"])
def test_a_nan_loss_stops_training_and_the_last_good_state_can_be_saved(
    way: str, base_path: Path, tmp_path: Path
) -> None:
    def make(data: list[dict[str, Any]], folder: Path, **options: Any) -> Trainer:
        model = load_base(base_path, 1)
        model = get_peft_model(model, AdaPruneConfig()) if way == "wrapped" else model
        trainer = make_trainer(model, folder, AdaPruneCallback, num_labels=1, save_steps=2, **options)
        trainer.train_dataset = data
        return trainer

    options = {"save_strategy": "steps", "max_steps": 8, "train_sampling_strategy": "sequential"}
    good = rows(1, size=32)
    # One example of the third batch.
    bad = [row | {"labels": math.nan} if number == 10 else row for number, row in enumerate(good)]
    trainer = make(bad, tmp_path / "bad", **options)
    with pytest.raises(NonFiniteError, match=r"(?s)NaN or infinite after step 2 of 8.*can be saved.*Lower the"):
        trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    opened = logits_of(DOORS["pipeline"](str(base_path), str(tmp_path / "saved")))
    assert torch.equal(opened, logits_of(trainer.model))
    assert torch.equal(opened, logits_of(DOORS["pipeline"](str(base_path), str(tmp_path / "bad" / "checkpoint-2"))))
    # With the data put right, the run goes on from there as if nothing had been.
    (resumed := make(good, tmp_path / "bad", **options)).train(resume_from_checkpoint=True)
    (whole := make(good, tmp_path / "good", **options)).train()
    assert torch.equal(logits_of(resumed.model), logits_of(whole.model))


# Saving


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """Fail to write any file past a size, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("door", DOORS_THAT_SAVE)
def test_the_former_adapter_survives_a_full_disk(
    door: str, base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    model = DOORS[door](str(base_path), str(adapter_path), is_trainable=True)
    former = logits_of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * parameter.requires_grad
    changed = logits_of(model)
    folder = tmp_path / "adapter"
    failed = 0
    for size in range(0, 10_000, 900):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(adapter_path, folder)
        try:
            with room_for(size):
                model.save_pretrained(folder)
            wanted = changed
        except (OSError, SafetensorError):
            failed, wanted = failed + 1, former
        assert torch.equal(logits_of(DOORS["pipeline"](str(base_path), str(folder))), wanted), size
    assert failed > 8
    assert torch.equal(wanted, changed)
    assert {path.name for path in folder.iterdir()} == {CONFIG, WEIGHTS, "README.md"}


def test_the_former_adapter_survives_a_kill(base_path: Path, adapter_path: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_saves.py")
    # It forks, which is safe with one thread only.
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-W", "ignore", script, adapter_path, tmp_path], check=True, env=env)
    former = logits_of(DOORS["pipeline"](str(base_path), str(adapter_path)))
    for door in DOORS_THAT_SAVE:
        name = door.split(".")[0]
        changed = logits_of(DOORS["pipeline"](str(base_path), str(tmp_path / name)))
        found = []
        left = sorted(tmp_path.glob(f"{name}-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for folder in left:
            try:
                logits = logits_of(DOORS["pipeline"](str(base_path), str(folder)))
                found.append("former" if torch.equal(logits, former) else "new")
                assert torch.equal(logits, former) or torch.equal(logits, changed)
            except AdapterFileError:
                # The new weights are there, and the new configuration not yet.
                found.append("refused")
                with skip_fingerprint_check():
                    logits = logits_of(DOORS["pipeline"](str(base_path), str(folder)))
                assert torch.equal(logits, changed)
        assert found[0] == "former"
        assert found[-1] == "new"
        assert re.fullmatch("(former )+(refused ){0,3}(new ?)+", " ".join(found)), found


@pytest.mark.parametrize("name", ["classifier", "dense", "weight", "0", "keys", "a.b"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_name_that_an_adapter_could_not_be_opened_under_is_refused(name: str, wrapped: bool) -> None:
    model = make_model()
    add = functools.partial(get_peft_model, model) if wrapped else model.add_adapter
    with pytest.raises(ConfigError, match=r"An adapter('s name|\snamed)"):
        add(AdaPruneConfig(), name)
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize("target", ["classifier", "pooler.dense"])
def test_who_targets_the_head_is_told_that_it_is_trained(target: str) -> None:
    with pytest.raises(NoMatchingModuleError, match="the head is trained, and not masked") as caught:
        make_model().add_adapter(AdaPruneConfig(target_modules=[target]))
    assert "'classifier', 'dense'" not in str(caught.value)


def test_a_base_that_accelerate_has_dispatched_is_refused() -> None:
    model = make_model()
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    with pytest.raises(ConfigError, match="must be on one device: accelerate has dispatched or offloaded it"):
        model.add_adapter(AdaPruneConfig())


@pytest.mark.parametrize("used_before", [False, True])
def test_a_model_with_masks_that_accelerate_offloads_is_refused(
    used_before: bool, base_path: Path, adapter_path: Path
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(adapter_path).eval()
    if used_before:
        logits_of(model)
    cpu_offload(model)
    with pytest.raises(ConfigError, match="accelerate has offloaded them"):
        logits_of(model)
