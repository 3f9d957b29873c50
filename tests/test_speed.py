"""What is measured of a pruned model's speed, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import logits_of, make_model, train_masks

from hf_adaprune import AdaPruneConfig, Pruner
from hf_adaprune.deploy import speed
from hf_adaprune.deploy.speed import SpeedReport, Timing, measure_speed
from hf_adaprune.errors import ExportError, HardwareError, NotPrunedError, SizeError
from hf_adaprune.hub.advice import speed_advice
from hf_adaprune.merging import unmasked


def pruned(granularity: str = "neuron+head") -> Any:
    model = get_peft_model(make_model(), AdaPruneConfig(granularity=granularity))
    Pruner(model, 1).step()
    return model.eval()


@pytest.mark.parametrize(
    ("granularity", "forms"),
    [
        ("weight", ["base", "merged"]),
        ("2:4", ["base", "merged"]),
        ("neuron", ["base", "merged", "compacted"]),
        ("neuron+head", ["base", "merged", "compacted"]),
    ],
)
def test_every_form_that_a_mask_allows_is_timed_beside_the_base(granularity: str, forms: list[str]) -> None:
    model = pruned(granularity)
    before = logits_of(model)
    reports = measure_speed(model, batch_sizes=(1, 2), lengths=(3, 5), repeats=3, warmup=1, num_threads=1)
    assert [(report.batch_size, report.length) for report in reports] == [(1, 3), (1, 5), (2, 3), (2, 5)]
    for report in reports:
        assert report.device == "1 CPU thread(s)"
        assert [timing.name for timing in report.timings] == forms
        assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in report.timings)
        assert report.timings[0].speed_up == (1.0, 1.0, 1.0)
        sizes = {timing.name: timing.num_bytes for timing in report.timings}
        assert sizes["base"] == sizes["merged"] == 4 * make_model().num_parameters()
        assert sizes.get("compacted", 0) < sizes["base"]
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("cpu_time", [False, True])
def test_the_clock_or_the_processors_time_is_counted(cpu_time: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = {"perf_counter": iter(range(1000)), "process_time": iter(range(0, 3000, 3))}
    for name, values in ticks.items():
        monkeypatch.setattr(f"hf_adaprune.deploy.speed.time.{name}", lambda values=values: next(values))
    (report,) = measure_speed(pruned("weight"), lengths=(5,), repeats=2, warmup=0, num_threads=1, cpu_time=cpu_time)
    assert list(report.timings[0].seconds) == [3 if cpu_time else 1] * 2
    assert ("processor time" in report.device) == cpu_time


def test_threads_are_set_for_the_time_of_the_measurement() -> None:
    before = torch.get_num_threads()
    for asked, expected in ((before + 1, before + 1), (None, before)):
        with speed._threads(asked):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == before


@pytest.mark.parametrize("is_merged", [False, True])
def test_the_base_has_its_own_weights_and_head(is_merged: bool) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    peft_model = get_peft_model(model, AdaPruneConfig())
    train_masks(peft_model, learning_rate=1e-2)
    if is_merged:
        peft_model.merge_adapter()
    logits = logits_of(peft_model)
    plain = unmasked(peft_model)
    assert plain.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(logits_of(peft_model), logits)


def test_a_tied_weight_is_counted_once() -> None:
    model = make_model("gpt2", head="causal_lm")
    assert speed._num_bytes(model) == 4 * model.num_parameters()


def test_the_forms_take_turns_and_warm_up_rounds_do_not_count() -> None:
    order, clock = [], iter(range(1000))

    def run(name: str, ticks: int) -> Any:
        def forward(**inputs: torch.Tensor) -> None:
            order.append(name)
            for _ in range(ticks * (3 if len(order) < 3 else 1)):  # the first round is slower
                next(clock)

        return forward

    inputs = {"input_ids": torch.zeros(1, 1)}
    forms = {"base": speed.Form(run("base", 3), 8), "other": speed.Form(run("other", 1), 4)}
    base, other = speed._time(forms, inputs, 2, 1, lambda: next(clock))
    assert order == ["base", "other"] * 3
    assert (base.seconds, other.seconds) == ((4, 4), (2, 2))
    assert (base.speed_up, other.speed_up) == ((1, 1, 1), (2, 2, 2))
    assert (base.num_bytes, other.num_bytes) == (8, 4)


def test_base_and_smallest_form_are_timed_on_onnx_runtime_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    exported = []

    def export(model: Any, folder: str) -> Path:
        exported.append(model.num_parameters())
        path = Path(folder, "model.onnx")
        path.write_bytes(bytes(model.num_parameters()))
        return path

    monkeypatch.setattr(speed, "export_onnx", export)
    monkeypatch.setattr(speed, "OnnxModel", lambda path, num_threads: lambda **inputs: None)
    (report,) = measure_speed(pruned("neuron"), lengths=(5,), repeats=2, warmup=0, onnx=True)
    sizes = {timing.name: timing.num_bytes for timing in report.timings}
    assert list(sizes) == ["base", "merged", "compacted", "base, ONNX", "compacted, ONNX"]
    assert exported == [sizes["base, ONNX"], sizes["compacted, ONNX"]]
    assert exported[1] < exported[0] == make_model().num_parameters()


def test_a_difference_is_claimed_only_where_most_rounds_show_it() -> None:
    speed_ups = {
        "base": (1.0, 1.0, 1.0),
        "merged": (0.97, 1.0, 1.03),
        "compacted": (1.6, 1.7, 1.8),
        "slow": (0.4, 0.5, 0.6),
        "vague": (0.9, 1.3, 1.6),
    }
    report = SpeedReport(
        tuple(Timing(name, 1, (1.0, 3.0), speed_up) for name, speed_up in speed_ups.items()), 8, 64, "a machine"
    )
    assert str(report) == (
        "At batch 8 and length 64 on a machine: merged is no faster and no slower than the base; compacted is faster "
        "than the base: 1.70 times; slow is slower than the base: 0.50 times as fast; vague is no faster and no "
        "slower than the base."
    )
    assert report.rows()[2] == {
        **{"batch_size": 8, "length": 64, "device": "a machine", "form": "compacted"},
        **{"speed_up": [1.6, 1.7, 1.8], "milliseconds": 2000.0, "bytes": 1},
    }


@pytest.mark.parametrize(
    ("granularity", "promise", "instead"),
    [
        ("weight", "expect no speed-up", 'granularity="neuron+head"'),
        ("2:4", "Expect no speed-up on a CPU", "hf_adaprune.to_semi_structured(model)"),
        ("1:4", "expect no speed-up", 'granularity="neuron+head"'),
        ("neuron+head", "Merged, the model computes as much as its base", "the pruned neurons and heads"),
        ("head", "expect no speed-up", "removes the pruned heads"),
    ],
)
def test_the_card_says_what_to_expect_and_what_to_do(
    granularity: str, promise: str, instead: str, tmp_path: Path
) -> None:
    config = AdaPruneConfig(granularity=granularity, final_sparsity=0.75 if granularity == "1:4" else 0.5)
    advice = speed_advice(config)
    assert promise in advice
    assert instead in advice
    get_peft_model(make_model(), config).save_pretrained(tmp_path)
    assert advice in (tmp_path / "README.md").read_text()


def test_what_cannot_be_measured_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SizeError, match="`repeats` must be at least 2"):
        measure_speed(pruned(), repeats=1)
    with pytest.raises(SizeError, match="between 1 and 32"):
        measure_speed(pruned(), lengths=(5, 33))
    with pytest.raises(SizeError, match="needs one thread"):
        measure_speed(pruned(), lengths=(5,), cpu_time=True, num_threads=2)
    with pytest.raises(NotPrunedError, match="no active AdaPrune adapter"):
        measure_speed(make_model())
    with pytest.raises(ExportError, match="float32"):
        measure_speed(pruned().bfloat16(), lengths=(5,), onnx=True)
    monkeypatch.setattr(speed, "_plain_forms", lambda model: {"base": model})
    with pytest.raises(HardwareError, match="measured on a CPU; the model is on 'meta'"):
        measure_speed(make_model().to("meta"), onnx=True)
