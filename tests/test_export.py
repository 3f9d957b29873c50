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
from hf_adaprune.errors import ExportError


def pruned(
    architecture: str = "bert", head: str = "sequence", granularity: str = "neuron+head", **options: Any
) -> Any:
    model = get_peft_model(make_model(architecture, head, **options), AdaPruneConfig(granularity=granularity))
    Pruner(model, 1).step()
    return model.eval()


@torch.no_grad()
def results_of(model: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    output = model(**batch)
    names = ("logits", "start_logits", "end_logits", "last_hidden_state")
    return [output[name] for name in names if name in output]


@pytest.mark.parametrize(
    ("architecture", "head", "smaller"),
    [("bert", "sequence", False), ("modernbert", "token", True), ("mpnet", "question", True)],
)
def test_logits_on_onnx_runtime_are_those_of_pytorch(
    architecture: str, head: str, smaller: bool, tmp_path: Path
) -> None:
    export = pytest.importorskip("hf_adaprune.export")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = pruned(architecture, head)
    path = export.export_onnx(compact(model) if smaller else model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.onnx"]
    exported = export.OnnxModel(path)
    for size, length in ((1, 1), (5, 3), (2, 20)):
        batch = make_batch("none", seed=length, size=size, length=length)
        batch["attention_mask"][0, :1] = 1
        if architecture == "bert":
            batch["token_type_ids"] = (batch["input_ids"] % 2).contiguous()
        for found, expected in zip(exported(**batch), results_of(model, batch), strict=True):
            attended = batch["attention_mask"].bool() if head != "sequence" else ...
            torch.testing.assert_close(found[attended], expected[attended], rtol=1e-4, atol=1e-5)


def test_what_gives_other_results_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    from hf_adaprune import export

    class Wrong(export.OnnxModel):
        def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(output * 1.01 for output in super().__call__(**inputs))

    monkeypatch.setattr(export, "OnnxModel", Wrong)
    model = pruned(num_hidden_layers=1).train()
    with pytest.raises(ExportError, match="BertForSequenceClassification gives other results"):
        export.export_onnx(model, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert model.training


def test_without_its_packages_exporting_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_adaprune import export

    monkeypatch.setattr(export, "_NEEDED", ("json", "no_such_package"))
    with pytest.raises(ExportError, match=r"needs no_such_package: run `pip install 'hf_adaprune\[onnx\]'`"):
        export.export_onnx(make_model(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_model_that_is_none_of_transformers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_adaprune import export

    monkeypatch.setattr(export, "_NEEDED", ())
    with pytest.raises(ExportError, match="got a Linear"):
        export.export_onnx(nn.Linear(2, 2), tmp_path)
