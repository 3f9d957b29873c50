from __future__ import annotations

import json
import shutil
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import load_base, logits_of, train
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import make_model
from transformers import AutoModel, AutoModelForSequenceClassification

from hf_adaprune import AdaPruneConfig
from hf_adaprune.errors import AdaPruneError, AdapterFileError, BaseMismatchError
from hf_adaprune.files.fingerprint import (
    fingerprint,
    fingerprints_are_checked,
    matches,
    same_origin,
    skip_fingerprint_check,
)


COPIES = {
    "float32": lambda weight: weight,
    "bfloat16": lambda weight: weight.bfloat16(),
    "float16": lambda weight: weight.half(),
    "float32 of bfloat16": lambda weight: weight.bfloat16().float(),
    "float32 of float16": lambda weight: weight.half().float(),
}


def weights(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(40, 3, generator=generator), torch.randn(7, generator=generator), torch.ones(5)]
    # Entries that overflow float16, and that are subnormal in it.
    values[1][:2] = torch.tensor([1e5, 1e-7])
    return values


@pytest.mark.parametrize(("made", "opened"), list(product(COPIES, COPIES)))
def test_every_copy_matches_unless_it_is_the_other_rounding(made: str, opened: str) -> None:
    original = fingerprint(map(COPIES[made], weights()))
    copy = [COPIES[opened](weight) for weight in weights()]
    roundings = {name.rpartition(" ")[2] for name in (made, opened)}
    expected = None if roundings == {"bfloat16", "float16"} else True
    assert matches(copy, original) is expected
    assert same_origin(fingerprint(copy), original) is expected


@pytest.mark.parametrize(("made", "opened"), list(product(COPIES, COPIES)))
def test_other_weights_never_match(made: str, opened: str) -> None:
    original = fingerprint(map(COPIES[made], weights()))
    others = [weights(seed=1), weights()[::-1], [weights()[0].view(3, 40), *weights()[1:]]]
    for change in (lambda value: value.mul_(1.02), lambda value: value.add_(0.01), lambda value: value.neg_()):
        # One value of many is enough.
        others.append(weights())
        change(others[-1][0][5, 1:2])
    for other in others:
        copy = [COPIES[opened](weight) for weight in other]
        assert not matches(copy, original)
        assert not same_origin(fingerprint(copy), original)
        roundings = {name.rpartition(" ")[2] for name in (made, opened)}
        assert matches(copy, original) is (None if roundings == {"bfloat16", "float16"} else False)


def test_a_change_below_the_rounding_shows_in_float32_alone() -> None:
    original = fingerprint(weights())
    other = weights()
    other[0][5, 1] = torch.nextafter(other[0][5, 1], torch.tensor(torch.inf))
    assert matches(other, original) is False
    assert matches([weight.bfloat16() for weight in other], original) is True


def test_masks_are_compared_as_they_are() -> None:
    masks = [torch.randint(0, 256, (9,), dtype=torch.uint8)]
    original = fingerprint(masks)
    assert matches(masks, original) is True
    masks[0][4] ^= 1
    assert matches(masks, original) is False


def test_the_check_is_off_only_inside_its_context() -> None:
    with skip_fingerprint_check():
        assert not fingerprints_are_checked()
    assert fingerprints_are_checked()


@pytest.fixture(scope="module")
def copies(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save copies of one base under other names: in each precision, and in shards."""
    folder = tmp_path_factory.mktemp("copies")
    for name in ("float32", "bfloat16", "float16"):
        AutoModel.from_pretrained(base_path, dtype=getattr(torch, name)).save_pretrained(folder / name)
    AutoModel.from_pretrained(base_path).save_pretrained(folder / "shards", max_shard_size="20KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 1
    return {name: folder / name for name in ("float32", "bfloat16", "float16", "shards")}


def open_on(base: Path, adapter: Path, **options: Any) -> Any:
    return PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base, **options), adapter)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_opens_on_every_copy_of_its_base_and_is_checked_there(
    dtype: torch.dtype | None, copies: dict[str, Path], adapter_path: Path
) -> None:
    for name, copy in copies.items():
        if dtype is not None and name in ("bfloat16", "float16") and dtype != torch.float32:
            continue  # a rounding of a rounding
        logits_of(open_on(copy, adapter_path, dtype=dtype))


@pytest.mark.filterwarnings("ignore:The head is in torch.bfloat16")
@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_an_adapter_that_was_made_in_low_precision_opens_on_the_original(
    name: str, copies: dict[str, Path], tmp_path: Path
) -> None:
    model = train(copies[name], tmp_path / "run").model if name == "bfloat16" else load_base(copies[name])
    if name == "float16":
        model.add_adapter(AdaPruneConfig())
    model.save_pretrained(tmp_path / "adapter")
    for copy in ("float32", name, "shards"):
        open_on(copies[copy], tmp_path / "adapter")
    other = "float16" if name == "bfloat16" else "bfloat16"
    with pytest.warns(UserWarning, match="the two roundings cannot be compared"):
        open_on(copies[other], tmp_path / "adapter")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_weights_are_refused_in_every_precision(dtype: torch.dtype, adapter_path: Path, tmp_path: Path) -> None:
    make_model("bert", "none", seed=1).to(dtype).save_pretrained(tmp_path)
    with pytest.raises(BaseMismatchError, match="made for other weights"):
        open_on(tmp_path, adapter_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_damaged_head_is_found_in_every_precision(dtype: torch.dtype, base_path: Path, adapter_path: Path) -> None:
    model = open_on(base_path, adapter_path, dtype=dtype)
    with torch.no_grad():
        model.base_model.model.classifier.modules_to_save["default"].weight[0, 0] += 0.25
    with pytest.raises(AdapterFileError, match="not those that were saved"):
        logits_of(model)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_damaged_adapter_is_not_saved_as_if_it_were_intact(
    wrapped: bool, base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(adapter_path, tmp_path / "damaged"))
    weights = load_file(damaged / "adapter_model.safetensors")
    weights["base_model.model.classifier.weight"] *= -1
    save_file(weights, damaged / "adapter_model.safetensors", metadata={"format": "pt"})
    model: Any = (
        open_on(base_path, damaged) if wrapped else AutoModelForSequenceClassification.from_pretrained(damaged)
    )
    with pytest.raises(AdapterFileError, match="not those that were saved"):
        model.save_pretrained(tmp_path / "again")
    if wrapped:
        with pytest.raises(AdapterFileError, match="not those that were saved"):
            model.merge_adapter()


def test_the_revision_of_the_base_is_named_where_another_was_opened(
    base_path: Path, adapter_path: Path, tmp_path: Path
) -> None:
    config = AdaPruneConfig.from_pretrained(str(adapter_path))
    config.revision = "v2"
    shutil.copytree(adapter_path, tmp_path / "adapter")
    config.save_pretrained(str(tmp_path / "adapter"))
    make_model("bert", "none", seed=1).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="revision 'v2', according to its configuration"):
        open_on(tmp_path / "other", tmp_path / "adapter")


def test_no_comparison_is_made_inside_the_context(base_path: Path, adapter_path: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["model_config"] |= {"id2label": {"0": "x", "1": "y", "2": "z"}, "hidden_act": "relu"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdaPruneError, match="not those that were saved"):
        open_on(base_path, adapter)
    with skip_fingerprint_check(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        open_on(base_path, adapter)
