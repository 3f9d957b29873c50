"""An adapter whose masks are coded is, at every door, the same as one whose masks are packed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import DOORS, TRAINABLE_DOORS, load_base, logits_of, make_trainer, save_base
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, Pruner, combine_adapters, skip_fingerprint_check
from hf_adaprune.analysis import load_masks
from hf_adaprune.cli import app
from hf_adaprune.errors import AdapterFileError, AdapterNotFoundError, ConfigError
from hf_adaprune.storage.stored_adapter import read_adapter
from hf_adaprune.tuner.masked_layers import adaprune_layers


WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save one adapter twice: with its masks coded, and packed."""
    folder = tmp_path_factory.mktemp("adapters")
    model = get_peft_model(load_base(base), AdaPruneConfig(mask_codec="auto"))
    make_trainer(model, folder / "run", AdaPruneCallback).train()
    model.save_pretrained(folder / "coded")
    model.peft_config["default"].mask_codec = "packed-bits-lsb"
    model.save_pretrained(folder / "packed")
    return {name: folder / name for name in ("coded", "packed")}


def masks_in(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in load_file(folder / WEIGHTS).items() if key.endswith("adaprune_mask")}


def test_coded_masks_are_smaller_and_their_sizes_declared(adapters: dict[str, Path]) -> None:
    coded, packed = masks_in(adapters["coded"]), masks_in(adapters["packed"])
    declared = json.loads((adapters["coded"] / "adapter_config.json").read_text())["mask_bytes"]

    assert sum(mask.numel() for mask in coded.values()) < 0.7 * sum(mask.numel() for mask in packed.values())
    assert {f"base_model.model.{name}.adaprune_mask": size for name, size in declared.items()} == {
        key: mask.numel() for key, mask in coded.items() if mask.numel() < packed[key].numel()
    }
    assert read_adapter(adapters["coded"]).mask_bytes == sum(mask.numel() for mask in coded.values())
    assert "less than one bit per weight" in (adapters["coded"] / "README.md").read_text()
    assert "mask takes one bit per weight" in (adapters["packed"] / "README.md").read_text()


@pytest.mark.parametrize("door", DOORS)
def test_each_door_opens_the_same_model(door: str, base: Path, adapters: dict[str, Path]) -> None:
    models = [DOORS[door](str(base), str(adapters[name])) for name in ("coded", "packed")]

    assert torch.equal(*(logits_of(model) for model in models))
    # And it costs as much in memory.
    sizes = [
        [mask.numel() for _, layer in adaprune_layers(model) for mask in layer.adaprune_mask.values()]
        for model in models
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_of_the_base_in_lower_precision_open_it(
    dtype: torch.dtype, base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    AutoModelForSequenceClassification.from_pretrained(base, dtype=dtype).save_pretrained(
        tmp_path, max_shard_size="50KB"
    )
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    for options in ({}, {"dtype": torch.float32}):
        models = [
            PeftModel.from_pretrained(
                AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, **options), adapters[name]
            )
            for name in ("coded", "packed")
        ]
        assert torch.equal(*(logits_of(model) for model in models))


def test_low_memory_loading_and_a_state_of_packed_bits(base: Path, adapters: dict[str, Path]) -> None:
    packed = DOORS["PeftModel.from_pretrained"](str(base), str(adapters["packed"]))
    coded = DOORS["PeftModel.from_pretrained"](str(base), str(adapters["coded"]), low_cpu_mem_usage=True)

    assert torch.equal(logits_of(coded), logits_of(packed))
    state = packed.state_dict()
    assert {key: tensor.shape for key, tensor in coded.state_dict().items()} == {k: t.shape for k, t in state.items()}


@pytest.mark.parametrize("door", TRAINABLE_DOORS)
def test_training_goes_on_from_coded_masks(door: str, base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    states = []
    for name in ("coded", "packed"):
        model = DOORS[door](str(base), str(adapters[name]), is_trainable=True)
        Pruner(model, 2)
        states.append({key: value for key, value in model.state_dict().items() if "scores" in key})

    assert states[0]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])


def test_an_adapter_in_training_takes_coded_masks(base: Path, adapters: dict[str, Path]) -> None:
    # As the Trainer does that loads its best checkpoint.
    model = get_peft_model(load_base(base), AdaPruneConfig(mask_codec="auto"))
    model.load_adapter(str(adapters["coded"]), "default", is_trainable=True)
    packed = DOORS["PeftModel.from_pretrained"](str(base), str(adapters["packed"]))

    assert torch.equal(logits_of(model), logits_of(packed))


def test_saving_again_and_combining(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    model = DOORS["PeftModel.from_pretrained"](str(base), str(adapters["coded"]))
    model.load_adapter(str(adapters["packed"]), "other")
    combine_adapters(model, ["default", "other"], "union", "both", head="default")
    model.save_pretrained(tmp_path)

    assert {key: mask.tolist() for key, mask in masks_in(tmp_path).items()} == {
        key: mask.tolist() for key, mask in masks_in(adapters["coded"]).items()
    }
    assert masks_in(tmp_path / "both").keys() == masks_in(tmp_path).keys()
    expected = load_masks(adapters["packed"])
    for name, mask in load_masks(tmp_path / "both").items():
        assert torch.equal(mask, expected[name])


def test_a_merged_adapter_is_saved_after_the_model_was_cast(
    base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    model = DOORS["PeftModel.from_pretrained"](str(base), str(adapters["coded"]))
    logits_of(model)
    model.merge_adapter()
    model.half().save_pretrained(tmp_path)
    with skip_fingerprint_check():
        reopened = DOORS["PeftModel.from_pretrained"](str(base), str(tmp_path))
    for (_, layer), (_, former) in zip(
        adaprune_layers(reopened.base_model.model), adaprune_layers(model.base_model.model), strict=True
    ):
        assert torch.equal(layer.mask("default"), former.mask("default"))


def test_an_adapter_that_is_merged_hides_nothing_from_one_that_is_not_decoded(
    base: Path, adapters: dict[str, Path]
) -> None:
    model = DOORS["PeftModel.from_pretrained"](str(base), str(adapters["packed"]))
    layers = dict(adaprune_layers(model.base_model.model))
    expected = {name: layer.packed_mask("default").clone() for name, layer in layers.items()}
    model.merge_adapter()

    coded = masks_in(adapters["coded"])
    for name, layer in layers.items():
        stored = coded[f"base_model.model.{name}.adaprune_mask"]
        assert torch.equal(layer.decode("default", stored), expected[name])


def test_masks_are_read_by_the_base_which_must_be_there(adapters: dict[str, Path], tmp_path: Path) -> None:
    packed = load_masks(adapters["packed"])
    coded = load_masks(adapters["coded"])
    assert list(coded) == list(packed)
    assert all(torch.equal(coded[name], mask) for name, mask in packed.items())

    moved = shutil.copytree(adapters["coded"], tmp_path / "moved")
    config = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "no")}))
    with pytest.raises(AdapterNotFoundError, match="cannot be opened"):
        load_masks(moved)


def test_the_command_line_reads_it(base: Path, adapters: dict[str, Path]) -> None:
    answers: dict[str, list[dict[str, Any]]] = {"inspect": [], "verify": []}
    for command, results in answers.items():
        for name in ("coded", "packed"):
            done = CliRunner().invoke(app, [command, str(adapters[name]), "--json"])
            assert done.exit_code == 0, done.output
            results.append(json.loads(done.stdout))

    coded, packed = answers["inspect"]
    assert coded["mask_bytes"] < 0.7 * packed["mask_bytes"]
    assert coded["modules"] == packed["modules"]
    # The masks are the same, however they are stored.
    assert coded["adapter_fingerprint"] == packed["adapter_fingerprint"]


def test_another_base_is_refused_even_unchecked(base: Path, adapters: dict[str, Path]) -> None:
    other = load_base(base)
    other.bert.encoder.layer[0].output.dense.weight.data *= 1.01
    with skip_fingerprint_check(), pytest.raises(AdapterFileError, match="coded with other weights"):
        PeftModel.from_pretrained(other, adapters["coded"])


@pytest.mark.parametrize("size", [0, -1, 10**15])
def test_a_mask_that_declares_more_bytes_than_a_bit_a_weight_or_none_is_refused(
    size: int, adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["coded"], tmp_path / "copy"))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["mask_bytes"] = dict.fromkeys(config["mask_bytes"], size)
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="`mask_bytes` must map masks to sizes below one bit per weight"):
        load_base(base).load_adapter(str(folder))


def test_no_more_memory_is_taken_for_a_mask_than_the_base_itself_justifies(
    adapters: dict[str, Path], base: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapters["coded"], tmp_path / "copy"))
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["module_counts"] = {name: [0, 2**47] for name in config["module_counts"]}
    config["mask_bytes"] = dict.fromkeys(config["mask_bytes"], 2**43)
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="must take less than one bit for each of its"):
        load_base(base).load_adapter(str(folder))
