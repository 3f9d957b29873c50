"""2:4 masks on sparse tensor cores: here, where there are none, what is refused and what would be converted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import logits_of, make_model, train_masks

from hf_adaprune import AdaPruneConfig, to_semi_structured
from hf_adaprune.errors import HardwareError, NotPrunedError
from hf_adaprune.structured import semi_structured


def pruned(granularity: str = "2:4", **options: Any) -> Any:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity=granularity, **options))
    train_masks(model)
    return model


def pretend(monkeypatch: pytest.MonkeyPatch, refused: tuple[int, ...] = ()) -> list[torch.Size]:
    """Take every machine for one that has the kernels, and what is converted for sparse; note the shapes."""
    seen: list[torch.Size] = []

    def convert(weight: torch.Tensor) -> torch.Tensor:
        if weight.shape[1] in refused:
            raise RuntimeError("unsupported shape")
        seen.append(weight.shape)
        return weight

    monkeypatch.setattr(semi_structured, "check_hardware", lambda tensor: None)
    monkeypatch.setattr(semi_structured, "to_sparse_semi_structured", convert)
    return seen


def test_a_cpu_is_refused_and_told_what_to_do_instead() -> None:
    with pytest.raises(HardwareError, match=r"NVIDIA GPU of compute capability 8.0.*on 'cpu'.*compact"):
        to_semi_structured(pruned())


class Elsewhere:
    """Stands for a tensor on a device that is not here."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device("cuda"), dtype


@pytest.mark.parametrize(
    ("capability", "dtype", "message"),
    [((7, 5), torch.float16, "Old GPU has 7.5"), ((8, 0), torch.float32, "needs float16 or bfloat16.*float32")],
)
def test_old_gpus_and_full_precision_are_refused(
    capability: tuple[int, int], dtype: torch.dtype, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(HardwareError, match=message):
        semi_structured.check_hardware(Elsewhere(dtype))  # type: ignore[arg-type]


def test_every_layer_with_a_mask_is_converted_and_the_logits_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, model = pretend(monkeypatch), pruned()
    plain = to_semi_structured(model)
    assert len(seen) == 12
    assert torch.equal(logits_of(plain), logits_of(model))


def test_layers_that_the_kernels_do_not_take_stay_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pretend(monkeypatch, refused=(40,))
    to_semi_structured(pruned())
    assert {shape[1] for shape in seen} == {32}
    assert len(seen) == 10


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_masks_of_another_kind_are_refused(granularity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(NotPrunedError, match='granularity="2:4"'):
        to_semi_structured(pruned(granularity))


def test_a_mask_half_way_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = pretend(monkeypatch)
    with pytest.raises(NotPrunedError, match="not 2:4 along its inputs"):
        to_semi_structured(get_peft_model(make_model(), AdaPruneConfig(granularity="2:4")))
    assert seen == []


def test_the_pattern_is_looked_for_along_the_inputs() -> None:
    weight = torch.tensor([[1.0, 1, 0, 0, 0, 1, 0, 1]]).repeat(4, 1)
    assert semi_structured.is_semi_structured(weight)
    assert not semi_structured.is_semi_structured(weight.T.contiguous())
    assert not semi_structured.is_semi_structured(torch.ones(4, 4))
    assert not semi_structured.is_semi_structured(torch.zeros(4, 6))
