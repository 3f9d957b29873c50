"""Models on ONNX Runtime: any batch, any length, the logits of PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import make_batch, make_model
from torch import nn

from hf_adaprune import AdaPruneConfig, Pruner, compact
from hf_adaprune.deploy import export
from hf_adaprune.deploy.export import OnnxModel, export_onnx
from hf_adaprune.errors import ExportError, SizeError
from hf_adaprune.tuner.example_inputs import example_inputs


def pruned(architecture: str, head: str, config: AdaPruneConfig) -> Any:
    # ModernBERT's first layer attends globally, its second locally.
    layers = 2 if architecture == "modernbert" else 1
    model = get_peft_model(make_model(architecture, head, num_hidden_layers=layers), config)
    Pruner(model, 1).step()
    return model.eval()


@torch.no_grad()
def results_of(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [value for value in model(**batch).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("architecture", "head", "smaller"),
    [("bert", "none", False), ("modernbert", "token", True), ("mpnet", "question", True)],
)
def test_results_on_onnx_runtime_are_those_of_pytorch(
    architecture: str, head: str, smaller: bool, tmp_path: Path
) -> None:
    model = pruned(architecture, head, AdaPruneConfig(granularity="neuron+head"))
    path = export_onnx(compact(model) if smaller else model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.onnx"]
    exported = OnnxModel(path)
    for size, length in ((1, 1), (5, 3), (2, 20)):
        batch = make_batch("none", seed=length, size=size, length=length)
        batch["attention_mask"][0, :1] = 1
        if "token_type_ids" in exported.inputs:
            batch["token_type_ids"] = (batch["input_ids"] % 2).contiguous()
        for found, expected in zip(exported(**batch), results_of(model, batch), strict=True):
            attended = batch["attention_mask"].bool() if found.shape[:2] == (size, length) else ...
            torch.testing.assert_close(found[attended], expected[attended], rtol=1e-4, atol=1e-5)


def test_the_papers_head_is_exported_too(tmp_path: Path) -> None:
    model = pruned("bert", "sequence", AdaPruneConfig(head="layer_average"))
    inputs = example_inputs(model.get_base_model(), 2, 7)
    (found,), (expected,) = OnnxModel(export_onnx(model, tmp_path))(**inputs), results_of(model, inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("off_at", [(1, 2), (3, 5), (2, 32)])
def test_what_gives_other_results_is_not_written(
    off_at: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(num_hidden_layers=1).train()

    @torch.no_grad()
    def run(**inputs: torch.Tensor) -> list[torch.Tensor]:
        off = inputs["input_ids"].shape == off_at
        return [result * (1.01 if off else 1.0) for result in results_of(model, inputs)]

    monkeypatch.setattr(export, "_export", lambda model, path: path.touch())
    monkeypatch.setattr(export, "OnnxModel", lambda path: run)
    with pytest.raises(
        ExportError, match=r"same results on ONNX Runtime as in PyTorch, .* 0\.01 .* for {} rows of {}".format(*off_at)
    ):
        export_onnx(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_without_its_packages_one_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "_NEEDED", ("json", "no_such_package"))
    needed = r"needs no_such_package: run `pip install 'hf_adaprune\[onnx\]'`"
    with pytest.raises(ExportError, match=needed):
        export_onnx(make_model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ExportError, match=needed):
        OnnxModel(tmp_path / "model.onnx")


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="got a Linear"):
        export_onnx(nn.Linear(2, 2), tmp_path)
    with pytest.raises(ExportError, match=r"float32 on the CPU, got one in torch.bfloat16 on 'cpu'"):
        export_onnx(make_model().bfloat16(), tmp_path)
    model = make_model(num_hidden_layers=1)
    monkeypatch.setattr(model.bert.pooler, "forward", lambda states: torch.linalg.eig(states[0]).eigenvectors.real)
    with pytest.raises(ExportError, match="cannot export this BertForSequenceClassification"):
        export_onnx(model, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("architecture", "longest"), [("bert", 32), ("roberta", 30), ("mpnet", 30), ("llama", 32)])
def test_inputs_are_as_long_as_a_model_has_positions_for(architecture: str, longest: int) -> None:
    model = make_model(architecture)
    model(**example_inputs(model, 1, longest))
    for batch_size, length in ((1, longest + 1), (1, 0), (0, 1)):
        with pytest.raises(SizeError, match=rf"between 1 and {longest}, .* got {batch_size} and {length}\."):
            example_inputs(model, batch_size, length)
