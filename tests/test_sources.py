"""Masks of stored adapters and of models in memory: the same, and without the base."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ARCHITECTURES, make_model, train_masks
from torch import nn

from hf_adaprune import AdaPruneConfig, compact
from hf_adaprune.analysis import load_masks, model_masks, model_weights, neuron_degrees, sparsity_report
from hf_adaprune.errors import AdapterFileError, AdapterNotFoundError, NoMatchingModuleError, NotPrunedError
from hf_adaprune.tuner.masked_layers import adaprune_layers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stored_adapter_has_the_masks_of_the_model_that_was_trained(architecture: str, tmp_path: Path) -> None:
    # No row is a multiple of eight long, and the base was never saved: nothing could be loaded of it.
    model = get_peft_model(
        make_model(architecture), AdaPruneConfig(mask_embeddings=True, final_sparsity=0.37, inference_mode=False)
    )
    train_masks(model)
    model.save_pretrained(tmp_path)
    expected, masks = model_masks(model), load_masks(tmp_path)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)
    assert all(mask.dtype == torch.bool and mask.dim() == 2 for mask in masks.values())
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    assert pruned == sparsity_report(model).num_pruned == sparsity_report(tmp_path).num_pruned


def test_masks_over_a_model_that_was_made_smaller_are_read_too(tmp_path: Path) -> None:
    whole = get_peft_model(make_model(), AdaPruneConfig(granularity="neuron+head", scope="global"))
    train_masks(whole)
    model = get_peft_model(compact(whole), AdaPruneConfig())
    train_masks(model)
    model.save_pretrained(tmp_path)
    expected, masks = model_masks(model), load_masks(tmp_path)
    assert list(masks) == list(expected)
    assert all(torch.equal(masks[name], expected[name]) for name in masks)


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_rows_are_outputs_and_weights_lie_as_their_masks_do(architecture: str) -> None:
    model = get_peft_model(make_model(architecture), AdaPruneConfig())
    train_masks(model)
    masks = model_masks(model)
    weights = model_weights(make_model(architecture), masks)
    for name, layer in adaprune_layers(model):
        key = name.removeprefix("base_model.model.")
        assert masks[key].shape == (layer.out_features, layer.in_features)
        computed = layer(torch.eye(layer.in_features)) - (0 if layer.bias is None else layer.bias)
        torch.testing.assert_close((weights[key] * masks[key]).T, computed)


def test_weights_come_from_a_base_with_or_without_a_head_or_from_the_adapted_model() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig())
    train_masks(model)
    masks = model_masks(model)
    expected = model_weights(make_model(), masks)
    assert all(torch.equal(weight, expected[name]) for name, weight in model_weights(model, masks).items())
    body = make_model().base_model
    assert all(torch.equal(weight, expected[name]) for name, weight in model_weights(body, masks).items())
    with pytest.raises(
        NoMatchingModuleError, match=r"no weights of the masks' size under \['bert.encoder.layer.0.att"
    ):
        model_weights(make_model(hidden_size=48), masks)


def test_a_plain_transformers_model_that_holds_an_adapter_has_the_same_names() -> None:
    wrapped, plain = get_peft_model(make_model(), AdaPruneConfig()), make_model()
    plain.add_adapter(AdaPruneConfig(), "other")
    assert list(model_masks(wrapped)) == list(model_masks(plain, "other"))
    assert list(model_masks(plain)) == list(model_masks(plain, "other"))
    with pytest.raises(NotPrunedError, match="under the adapter name 'default'"):
        model_masks(plain, "default")


def test_where_to_look_is_handed_on_to_the_hub(
    adapter_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    # PEFT looks at the names of the arguments.
    def download(
        name: str, filename: str, subfolder: str, revision: str | None = None, token: str | None = None, **hub: Any
    ) -> str:
        asked.append((name, filename, subfolder, revision, token))
        return str(adapter_path / filename)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("peft.config.hf_hub_download", download)
    monkeypatch.setattr("hf_adaprune.files.weights_file.hf_hub_download", download)
    masks = load_masks("me/adapter", subfolder="sst2", revision="v2", token="secret")
    assert {entry[0] for entry in asked} == {"me/adapter"}
    assert {entry[1] for entry in asked} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {entry[2:] for entry in asked} == {("sst2", "v2", "secret")}
    shutil.copytree(adapter_path, tmp_path / "local" / "sst2")
    local = load_masks(tmp_path / "local", subfolder="sst2")
    assert all(torch.equal(mask, local[name]) for name, mask in masks.items())


def test_an_adapter_of_a_model_unknown_to_transformers_has_flat_masks(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(7, 5), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.first(x)))

    model = get_peft_model(Net(), AdaPruneConfig(target_modules=["first"], modules_to_save=["head"]))
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    next(iter(adaprune_layers(model)))[1].set_mask("default", mask)
    model.save_pretrained(tmp_path)
    masks = load_masks(tmp_path)
    assert torch.equal(masks["first"], mask.flatten())
    with pytest.raises(ValueError, match=r"Masks must be matrices; got 1, of which these are not: \['first'\]"):
        neuron_degrees(masks)


def test_what_is_no_adapter_of_masks_is_refused(adapter_path: Path, tmp_path: Path) -> None:
    get_peft_model(make_model(), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterFileError, match="is an adapter of another method, LORA"):
        load_masks(tmp_path / "lora")
    with pytest.raises(AdapterNotFoundError, match=r"it has no adapter_config.json"):
        load_masks(tmp_path)


def test_masks_that_are_missing_or_pickled_are_refused(adapter_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_path, tmp_path / "adapter")
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file({key: tensor for key, tensor in tensors.items() if "layer.1.output" not in key}, weights)
    with pytest.raises(AdapterFileError, match=r"it has no \['bert.encoder.layer.1.output.dense.adaprune_mask'\]"):
        load_masks(folder)
    weights.unlink()
    with pytest.raises(AdapterFileError, match=r"There is no .*adapter_model.safetensors: the adapter has no masks"):
        load_masks(folder)
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="pickles are not read"):
        load_masks(folder)
