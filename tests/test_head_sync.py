"""Many adapters on one base: each with its masks, its head and its labels, and the base as it was."""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from doors import label_names, load_base, logits_of, make_trainer, rows, save_base, train
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model
from tiny import make_batch, make_model, train_masks
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_adaprune import AdaPruneConfig, Pruner, merged
from hf_adaprune.errors import ConfigError, MergeError
from hf_adaprune.tuner.head_sync import head_sync_of
from hf_adaprune.tuner.masked_layers import adaprune_layers


pytestmark = pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning",
    "ignore:Adapter .* was active which is now deleted:UserWarning",
)


class Task(NamedTuple):
    """A trained adapter on disk, and what it computes."""

    path: str
    num_labels: int
    logits: torch.Tensor


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a base with a trained head of five labels."""
    folder = save_base(tmp_path_factory.mktemp("base"))
    load_base(folder, 5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("tasks")
    found = {}
    for name, num_labels in (("two", 2), ("three", 3), ("one", 1)):
        model = train(str(_headless(base, folder)), folder / "run", num_labels=num_labels).model
        model.save_pretrained(folder / name)
        found[name] = Task(str(folder / name), num_labels, logits_of(model))
    return found


def _headless(base: Path, folder: Path) -> Path:
    load_base(base, 5).base_model.save_pretrained(folder / "headless")
    return folder / "headless"


def open_plain(base: Path, tasks: dict[str, Task], *names: str) -> Any:
    model = load_base(base, 5)
    for name in names:
        model.load_adapter(tasks[name].path, adapter_name=name)
    return model


def open_wrapped(base: Path, tasks: dict[str, Task], *names: str) -> Any:
    model = PeftModel.from_pretrained(load_base(base, 5), tasks[names[0]].path, adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(tasks[name].path, adapter_name=name)
    return model


Open = Callable[..., Any]
both_doors = pytest.mark.parametrize("door", [open_plain, open_wrapped])


def disable(model: Any) -> None:
    (model.base_model.disable_adapter_layers if isinstance(model, PeftModel) else model.disable_adapters)()


def enable(model: Any) -> None:
    (model.base_model.enable_adapter_layers if isinstance(model, PeftModel) else model.enable_adapters)()


@both_doors
def test_masks_head_and_labels_are_switched_together(door: Open, base: Path, tasks: dict[str, Task]) -> None:
    model = door(base, tasks, "two", "three", "one")
    for name in ("two", "three", "one", "two"):
        model.set_adapter(name)
        assert model.config.id2label == label_names(tasks[name].num_labels)
        assert model.config.label2id == {label: number for number, label in model.config.id2label.items()}
        assert torch.equal(logits_of(model), tasks[name].logits)
        labels = torch.tensor([row["labels"] for row in rows(tasks[name].num_labels, 4)])
        loss = model(**make_batch() | {"labels": labels}).loss
        assert torch.isfinite(loss)
        kind = "regression" if name == "one" else "single_label_classification"
        assert model.config.problem_type == kind


def test_an_adapter_that_is_loaded_becomes_active_with_its_head(base: Path, tasks: dict[str, Task]) -> None:
    # So it is in transformers; in PEFT the first one stays active.
    model = open_plain(base, tasks, "two", "three")
    assert model.active_adapters() == ["three"]
    assert torch.equal(logits_of(model), tasks["three"].logits)
    model = open_wrapped(base, tasks, "two", "three")
    assert model.active_adapters == ["two"]
    assert model.config.num_labels == 2
    assert torch.equal(logits_of(model), tasks["two"].logits)


def test_nothing_is_reported_missing_when_adapters_are_loaded_one_after_the_other(
    base: Path, tasks: dict[str, Task], monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[Any] = []
    monkeypatch.setattr(
        "transformers.integrations.peft.log_state_dict_report",
        lambda loading_info, **kwargs: reported.append(loading_info),
    )
    model = load_base(base, 5)
    # transformers looks for an adapter's keys by its name, and "e" is in those of all layers.
    for name, task in {"e": "two", "three": "three", "one": "one"}.items():
        model.load_adapter(tasks[task].path, adapter_name=name, is_trainable=name == "one")
    assert len(reported) == 3
    assert not any(info.missing_keys or info.unexpected_keys or info.mismatched_keys for info in reported)


@both_doors
def test_without_adapters_the_base_has_its_own_head_and_labels(door: Open, base: Path, tasks: dict[str, Task]) -> None:
    own = load_base(base, 5)
    model = door(base, tasks, "two", "three")
    for name in ("two", "three"):
        model.set_adapter(name)
        disable(model)
        assert torch.equal(logits_of(model), logits_of(own))
        assert model.config.id2label == own.config.id2label
        enable(model)
        assert torch.equal(logits_of(model), tasks[name].logits)
        assert model.config.num_labels == tasks[name].num_labels
    for name in ("two", "three"):
        model.delete_adapter(name)
    model = model.base_model.model if isinstance(model, PeftModel) else model
    assert torch.equal(logits_of(model), logits_of(own))
    assert model.config.id2label == own.config.id2label
    assert not [key for key in model.state_dict() if "adaprune" in key]


@both_doors
def test_when_the_active_adapter_is_deleted_another_takes_its_place_whole(
    door: Open, base: Path, tasks: dict[str, Task]
) -> None:
    model = door(base, tasks, "two", "three")
    model.set_adapter("three")
    model.delete_adapter("three")
    assert torch.equal(logits_of(model), tasks["two"].logits)
    assert model.config.id2label == label_names(2)
    model.load_adapter(tasks["three"].path, adapter_name="three")
    model.set_adapter("three")
    assert torch.equal(logits_of(model), tasks["three"].logits)


def test_each_adapter_is_saved_with_its_own_labels(base: Path, tasks: dict[str, Task], tmp_path: Path) -> None:
    model = open_wrapped(base, tasks, "two", "three", "one")
    model.set_adapter("three")
    model.save_pretrained(tmp_path / "wrapped")
    plain = open_plain(base, tasks, "two", "three", "one")
    for name, task in tasks.items():
        plain.set_adapter(name)
        plain.save_pretrained(tmp_path / "plain" / name)
        for door in ("wrapped", "plain"):
            stored = json.loads((tmp_path / door / name / "adapter_config.json").read_text())["model_config"]
            assert list(stored["id2label"].values()) == list(label_names(task.num_labels).values())
            assert stored["problem_type"] == ("regression" if name == "one" else "single_label_classification")
            saved = task._replace(path=str(tmp_path / door / name))
            assert torch.equal(logits_of(open_plain(base, {"x": saved}, "x")), task.logits)


def test_a_label_that_is_renamed_is_that_of_the_active_adapter(base: Path, tasks: dict[str, Task]) -> None:
    model = open_wrapped(base, tasks, "two", "three")
    model.config.id2label = {0: "no", 1: "yes"}
    model.set_adapter("three")
    model.set_adapter("two")
    assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("door", [open_plain, open_wrapped])
def test_labels_that_do_not_fit_the_head_are_not_dropped_in_silence(
    door: Callable[..., Any], base: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    model = door(base, tasks, "two")
    model.config.id2label = {0: "no", 1: "yes", 2: "perhaps"}
    with pytest.warns(UserWarning, match="has 3 labels, but the head of adapter 'two' has 2"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("plain", [True, False])
def test_a_fresh_adapter_has_the_labels_that_the_model_is_given_for_it(
    plain: bool, base: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    model = (open_plain if plain else open_wrapped)(base, tasks, "two")
    for labels, name in (({0: "a", 1: "b"}, "same size"), ({0: "a", 1: "b", 2: "c", 3: "d"}, "four")):
        model.config.id2label, model.config.label2id = labels, {label: number for number, label in labels.items()}
        arguments = (AdaPruneConfig(), name)
        model.add_adapter(*arguments if plain else arguments[::-1])
        model.set_adapter(name)
        assert model.config.id2label == labels
        assert logits_of(model).shape == (4, len(labels))
        batch = make_batch() | {"labels": torch.zeros(4, dtype=torch.long)}
        model.train()(**batch).loss.backward()
        assert all(layer.adaprune_scores[name].grad.any() for _, layer in adaprune_layers(model))
        model.set_adapter("two")
        assert model.config.id2label == label_names(2)
        assert torch.equal(logits_of(model), tasks["two"].logits)


def test_labels_for_a_fresh_adapter_are_not_those_of_a_base_that_is_at_work(
    base: Path, tasks: dict[str, Task]
) -> None:
    model = open_wrapped(base, tasks, "two")
    disable(model)
    model.config.id2label = {0: "a", 1: "b", 2: "c", 3: "d"}
    model.add_adapter("four", AdaPruneConfig())
    assert model.config.id2label == load_base(base, 5).config.id2label
    enable(model)
    model.set_adapter("four")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c", 3: "d"}


def test_heads_of_two_kinds_share_a_base(base: Path, tasks: dict[str, Task], tmp_path: Path) -> None:
    found = dict(tasks)
    for name, num_labels in (("average", 3), ("another", 4)):
        model = get_peft_model(load_base(base, 5), AdaPruneConfig())  # its head is of another size
        model.config.id2label = label_names(num_labels)
        model.add_adapter(name, AdaPruneConfig(head="layer_average"))
        model.set_adapter(name)
        train_masks(model, adapter_name=name)
        model.save_pretrained(str(tmp_path))
        found[name] = Task(str(tmp_path / name), num_labels, logits_of(model))
    for door in (open_plain, open_wrapped):
        for names in (("two", "average", "another"), ("another", "two", "average")):
            model = door(base, found, *names)
            for name in (*names, names[0]):
                model.set_adapter(name)
                assert torch.equal(logits_of(model), found[name].logits)
                assert model.config.num_labels == found[name].num_labels
            disable(model)
            assert torch.equal(logits_of(model), logits_of(load_base(base, 5)))


@both_doors
def test_two_heads_are_never_active_at_once(door: Open, base: Path, tasks: dict[str, Task]) -> None:
    model = door(base, tasks, "two", "three")
    model.set_adapter("two")
    with pytest.raises(ValueError, match=r"\'two\', \'three\'\] each have a task head"):
        (model.base_model if isinstance(model, PeftModel) else model).set_adapter(["two", "three"])
    assert torch.equal(logits_of(model), tasks["two"].logits)


@both_doors
def test_a_name_that_is_taken_is_refused(door: Open, base: Path, tasks: dict[str, Task]) -> None:
    model = door(base, tasks, "two", "three")
    model.set_adapter("two")
    with pytest.raises(ValueError, match=r"'?two'? .*already"):
        model.load_adapter(tasks["three"].path, adapter_name="two")
    assert torch.equal(logits_of(model), tasks["two"].logits)
    model.delete_adapter("two")
    model.load_adapter(tasks["three"].path, adapter_name="two")
    model.set_adapter("two")
    assert torch.equal(logits_of(model), tasks["three"].logits)


@both_doors
def test_the_status_of_many_adapters_is_true(door: Open, base: Path, tasks: dict[str, Task]) -> None:
    model = door(base, tasks, "two", "three")
    model.set_adapter("three")
    status = get_model_status(model)
    assert status.available_adapters == ["three", "two"]
    assert (status.active_adapters, status.enabled, status.merged_adapters) == (["three"], True, [])
    assert {layer.available_adapters == ["three", "two"] for layer in get_layer_status(model)} == {True}
    disable(model)
    assert get_model_status(model).enabled is False
    enable(model)
    model(**make_batch())
    assert get_model_status(model).enabled is True
    model.delete_adapter("three")
    status = get_model_status(model)
    assert (status.available_adapters, status.active_adapters) == (["two"], ["two"])


def tensors_of(model: nn.Module) -> dict[int, torch.Tensor]:
    """Return every tensor that is reachable from a model, by its storage."""
    found: dict[int, torch.Tensor] = {}
    seen: set[int] = set()
    left: list[Any] = [vars(module) for module in model.modules()]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, (list, tuple, set)):
            left += item
        elif type(item).__module__.startswith("hf_adaprune"):
            left.append(vars(item))
    return found


def nbytes(model: nn.Module) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(model).values())


@both_doors
def test_ten_adapters_cost_ten_bits_a_weight_and_ten_heads(door: Open, base: Path, tasks: dict[str, Task]) -> None:
    before = nbytes(load_base(base, 5))
    names = [f"task {number}" for number in range(10)]
    model = door(base, dict.fromkeys(names, tasks["two"]), *names)
    masks = sum(-(-layer.base_weight.numel() // 8) for _, layer in adaprune_layers(model))
    head = sum(p.nbytes for name, p in model.named_parameters() if ".task 3." in name)
    assert nbytes(model) == before + 10 * (masks + head)
    weights = sum(layer.base_weight.nbytes for _, layer in adaprune_layers(model))
    for name in names:
        # What is computed with is built for one adapter at a time.
        model.set_adapter(name)
        logits_of(model)
        gc.collect()
        assert nbytes(model) == before + 10 * (masks + head) + weights


def test_nothing_of_ours_is_left_on_a_model_that_is_unloaded(base: Path, tasks: dict[str, Task]) -> None:
    model = open_wrapped(base, tasks, "two", "three")
    model.set_adapter("three")
    plain = model.merge_and_unload()
    assert head_sync_of(plain) is None
    assert plain.config.id2label == label_names(3)
    assert torch.equal(logits_of(plain), tasks["three"].logits)


@pytest.mark.parametrize("gone", ["unloaded", "deleted", "left beside"])
def test_an_adapter_of_another_method_has_its_own_head(
    gone: str, base: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    lora = LoraConfig(target_modules=["intermediate.dense"], modules_to_save=["pooler", "classifier"])
    model = open_wrapped(base, tasks, "two").unload() if gone == "unloaded" else open_plain(base, tasks, "two")
    if gone == "deleted":
        model.delete_adapter("two")
    model.add_adapter(lora, "lora")
    head = next(module for name, module in model.named_modules() if name.endswith("classifier.modules_to_save.lora"))
    before = logits_of(model)
    with torch.no_grad():
        head.bias += 1
    torch.testing.assert_close(logits_of(model), before + 1)
    model.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    if gone == "left beside":
        model.set_adapter("two")
        assert torch.equal(logits_of(model), tasks["two"].logits)
        model.set_adapter("lora")
        torch.testing.assert_close(logits_of(model), before + 1)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_an_ordinary_lora_goes_on_after_the_masks(base: Path, tasks: dict[str, Task]) -> None:
    model = open_plain(base, tasks, "two")
    model.add_adapter(LoraConfig(target_modules=["intermediate.dense"], init_lora_weights=False), "lora")
    logits: dict[str, torch.Tensor] = {}
    for names in ("two", "lora", ["two", "lora"]) * 2:
        model.set_adapter(names)
        found = logits.setdefault(str(names), logits_of(model))
        assert torch.equal(logits_of(model), found)
    assert torch.equal(logits["two"], tasks["two"].logits)
    assert not torch.equal(logits["['two', 'lora']"], logits["two"])
    assert logits["lora"].shape == (len(found), 5)  # the base's own head


def test_labels_that_are_changed_before_the_first_adapter_are_not_the_bases(tmp_path: Path) -> None:
    model = load_base(save_base(tmp_path / "base"), 5)
    model.config.id2label = {0: "no", 1: "yes"}
    model.add_adapter(AdaPruneConfig(), "two")
    batch = make_batch()
    assert model(**batch | {"labels": batch["labels"] % 2}).logits.shape[1] == 2
    model.disable_adapters()
    assert model(**batch).logits.shape[1] == model.config.num_labels == 5
    assert model.config.id2label[4] == "LABEL_4"


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 1)])
def test_the_kind_of_labels_is_not_handed_on_to_a_head_of_another_size(
    first: int, second: int, tmp_path: Path
) -> None:
    model, batch = load_base(save_base(tmp_path / "base"), first), make_batch()
    labels = {1: torch.rand(len(batch["labels"])), 3: batch["labels"] % 3}
    model.add_adapter(AdaPruneConfig(), "first")
    model(**batch | {"labels": labels[first]})
    model.config.num_labels = second
    model.add_adapter(AdaPruneConfig(), "second")
    model.set_adapter("second")
    assert model(**batch | {"labels": labels[second]}).loss.isfinite()
    assert model.config.problem_type == ("regression" if second == 1 else "single_label_classification")


def test_masks_that_another_method_is_put_around_are_saved_and_compute_as_before(tmp_path: Path) -> None:
    model = load_base(save_base(tmp_path / "base"))
    model.add_adapter(AdaPruneConfig())
    train_masks(model)
    logits = logits_of(model)
    lora = LoraConfig(target_modules=["query"], modules_to_save=["pooler", "classifier"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of several adapters
        model.add_adapter(lora, "lora")
    model.set_adapter("default")
    assert torch.equal(logits_of(model), logits)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")), logits)
    with pytest.raises(ConfigError, match=r"query' has an adapter of another method around it, a peft.tuners.lora"):
        model.add_adapter(AdaPruneConfig(), "second")
    assert torch.equal(logits_of(model), logits)


def test_a_model_without_labels_takes_many_adapters_too() -> None:
    model = get_peft_model(make_model(head="none"), AdaPruneConfig())
    model.add_adapter("second", AdaPruneConfig(target_modules=["query"]))
    model.set_adapter("second")
    assert model.active_adapters == ["second"]
    plain = get_peft_model(nn.Sequential(nn.Linear(3, 3)), AdaPruneConfig(target_modules=["0"]))
    plain.add_adapter("second", AdaPruneConfig(target_modules=["0"]))
    plain.set_adapter("second")
    assert plain(torch.ones(1, 3)).shape == (1, 3)


def test_a_head_stays_as_it_was_while_another_adapter_is_trained_over_its_masks(tasks: dict[str, Task]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tasks["two"].path)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]), "lora")
    model.set_adapter(["default", "lora"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_masks_that_no_file_has_are_not_forgotten_when_a_lora_over_them_is_saved(tmp_path: Path) -> None:
    model = load_base(save_base(tmp_path / "base"))
    model.add_adapter(AdaPruneConfig())
    train_masks(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]), "lora")
    model.set_adapter(["default", "lora"])
    with pytest.warns(UserWarning, match=r"Only the adapter \['lora'\] is saved: .* masks and head of \['default'\]"):
        model.save_pretrained(tmp_path / "lora")


def test_a_model_whose_last_adapter_was_deleted_is_saved_as_its_base(base: Path, tmp_path: Path) -> None:
    model = load_base(base, 5)
    logits = logits_of(model)
    for name in ("a", "b"):
        model.add_adapter(AdaPruneConfig(), name)
    train_masks(model, adapter_name="b")
    model.delete_adapter(["a", "b"])
    assert not list(adaprune_layers(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(model).from_pretrained(tmp_path)), logits)
    model.add_adapter(AdaPruneConfig(), "c")
    assert torch.equal(logits_of(model), logits)


def test_masks_inside_of_another_adapters_layers_are_not_merged() -> None:
    model = make_model()
    model.add_adapter(AdaPruneConfig())
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]), "lora")
    for name in ("default", ["default", "lora"]):
        model.set_adapter(name)
        with pytest.raises(MergeError, match="layers of another method around the masked ones"):
            merged(model)
    model.delete_adapter("lora")
    with pytest.raises(MergeError, match="There are, or were, layers of another method"):
        merged(model)


def test_masks_of_groups_keep_their_names_under_a_lora(base: Path, tmp_path: Path) -> None:
    model: Any = load_base(base, 5)
    model.add_adapter(AdaPruneConfig(granularity="neuron"))
    train_masks(model)
    model.save_pretrained(tmp_path / "alone")
    model.add_adapter(LoraConfig(r=2, target_modules=["output.dense"]), "lora")
    model.set_adapter("default")
    model.save_pretrained(tmp_path / "under")
    alone, under = (AdaPruneConfig.from_pretrained(str(tmp_path / name)) for name in ("alone", "under"))
    assert under.module_counts == alone.module_counts


def test_labels_of_which_only_the_names_were_given_have_their_numbers_too(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", num_labels=2)
    model: Any = AutoModelForSequenceClassification.from_pretrained(base, id2label={0: "bad", 1: "good"})
    model.add_adapter(AdaPruneConfig())
    Pruner(model, total_steps=1).step()
    model.save_pretrained(tmp_path / "adapter")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    for config in (model.config, opened.config):
        assert config.label2id == {"bad": 0, "good": 1}


def test_masks_that_were_just_trained_stay_as_they_are_under_a_lora_and_each_is_saved_by_itself(
    base: Path, tmp_path: Path
) -> None:
    model: Any = load_base(base, 5)
    model.add_adapter(AdaPruneConfig())
    train_masks(model)
    model.save_pretrained(tmp_path / "masks")
    before = logits_of(model)
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]), "lora")
    model.set_adapter(["default", "lora"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    make_trainer(model, tmp_path / "run", max_steps=4, save_strategy="steps", save_steps=2, learning_rate=1e-2).train()
    both = logits_of(model)
    assert not torch.equal(both, before)
    stored = json.loads((tmp_path / "run" / "checkpoint-4" / "adapter_config.json").read_text())
    assert stored["peft_type"] == "LORA"
    opened: Any = load_base(base, 5)
    opened.load_adapter(tmp_path / "masks")
    assert torch.equal(logits_of(opened), before)
    opened.load_adapter(tmp_path / "run" / "checkpoint-4", "lora")
    opened.set_adapter(["default", "lora"])
    torch.testing.assert_close(logits_of(opened), both)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("excluded", [None, r".*(pooler|classifier).*"])
def test_a_lora_inside_of_a_head_is_refused_where_that_would_be_saved(
    excluded: str | None, base: Path, tasks: dict[str, Task], tmp_path: Path
) -> None:
    model = open_plain(base, tasks, "two")
    model.add_adapter(LoraConfig(target_modules="all-linear", exclude_modules=excluded), "lora")
    model.set_adapter("two")
    if excluded:
        model.save_pretrained(tmp_path)
        again = open_plain(base, {"two": Task(str(tmp_path), 2, tasks["two"].logits)}, "two")
        assert torch.equal(logits_of(again), tasks["two"].logits)
    else:
        with pytest.raises(ConfigError, match=r"exclude_modules=r'\.\*\(bert\.pooler\|classifier\)"):
            model.save_pretrained(tmp_path)


def test_merging_an_adapter_by_name_brings_its_head_and_labels(base: Path, tasks: dict[str, Task]) -> None:
    model = open_wrapped(base, tasks, "two", "three")
    model.merge_adapter(["three"])
    torch.testing.assert_close(logits_of(model), tasks["three"].logits)
    assert model.config.id2label == label_names(3)
