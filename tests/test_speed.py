"""What is measured of a pruned model's speed, and what is said about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import save_base
from huggingface_hub import ModelCard
from peft import PeftConfig, get_peft_model
from tiny import HEADS, logits_of, make_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from hf_adaprune import AdaPruneConfig, Pruner
from hf_adaprune.advice import speed_advice
from hf_adaprune.cli import app
from hf_adaprune.errors import NotPrunedError
from hf_adaprune.merging import merged
from hf_adaprune.model_card import write_model_card
from hf_adaprune.opening import auto_class, open_model
from hf_adaprune.speed import SpeedReport, Timing, measure_speed


def pruned(granularity: str = "neuron+head", head: str = "sequence") -> Any:
    model = get_peft_model(make_model("bert", head), AdaPruneConfig(granularity=granularity))
    Pruner(model, 1).step()
    return model.eval()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speed")
    base = save_base(folder / "base")
    model = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=3), AdaPruneConfig(granularity="neuron")
    )
    Pruner(model, 1).step()
    model.save_pretrained(folder / "adapter")
    write_model_card(folder / "adapter", metrics={"accuracy": 0.75}, dataset="some/data", picture=False)
    return folder / "adapter"


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
    report = measure_speed(model, batch_size=2, length=5, repeats=3, warmup=1)
    assert [timing.name for timing in report.timings] == forms
    assert all(len(timing.seconds) == 3 and min(timing.seconds) > 0 for timing in report.timings)
    assert report.timings[0].speed_up == (1.0, 1.0, 1.0)
    sizes = {timing.name: timing.num_bytes for timing in report.timings}
    assert sizes["base"] == sizes["merged"]
    assert sizes.get("compacted", 0) < sizes["base"]
    assert torch.equal(logits_of(model), before)


def test_the_forms_take_turns_and_warm_up_rounds_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order, clock = [], iter(range(1000))
    from hf_adaprune import speed

    monkeypatch.setattr("hf_adaprune.speed.time.perf_counter", lambda: next(clock))

    def run(name: str, ticks: int) -> Any:
        def forward(**inputs: torch.Tensor) -> None:
            order.append(name)
            for _ in range(ticks):
                next(clock)

        return forward

    inputs = {"input_ids": torch.zeros(1, 1)}
    seconds = speed._take_turns({"base": run("base", 3), "other": run("other", 1)}, inputs, repeats=2, warmup=1)
    assert order == ["base", "other"] * 3
    assert seconds == {"base": [4, 4], "other": [2, 2]}
    assert speed._quartiles(seconds["base"], seconds["other"]) == (2, 2, 2)


def test_onnx_is_timed_if_asked_for() -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    report = measure_speed(pruned("neuron"), length=5, repeats=2, warmup=0, onnx=True)
    assert [timing.name for timing in report.timings] == [
        "base",
        "merged",
        "compacted",
        "base, ONNX",
        "compacted, ONNX",
    ]
    assert 0 < report.timings[4].num_bytes < report.timings[3].num_bytes


def report_of(granularity: str, **speed_ups: tuple[float, float, float]) -> SpeedReport:
    timings = [Timing(name, 1, (1.0,), speed_up) for name, speed_up in {"base": (1.0, 1.0, 1.0), **speed_ups}.items()]
    return SpeedReport(tuple(timings), 8, 64, "a machine", AdaPruneConfig(granularity=granularity))


def test_a_difference_is_claimed_only_where_most_rounds_show_it() -> None:
    text = report_of(
        "neuron", merged=(0.97, 1.0, 1.03), compacted=(1.6, 1.7, 1.8), slow=(0.4, 0.5, 0.6), vague=(0.9, 1.3, 1.6)
    ).conclusion()
    assert "At batch 8 and length 64 on a machine: " in text
    assert "merged is no faster and no slower than the base" in text
    assert "compacted is faster than the base: 1.70 times" in text
    assert "slow is slower than the base: 0.50 times as fast" in text
    assert "vague is no faster and no slower" in text


@pytest.mark.parametrize(
    ("granularity", "promise", "instead"),
    [
        ("weight", "expect no speed-up", 'granularity="neuron+head"'),
        ("2:4", "Expect no speed-up on a CPU", "to_semi_structured"),
        ("1:4", "expect no speed-up", 'granularity="neuron+head"'),
        (
            "neuron+head",
            "Merged, the model computes as much as its base",
            "compact(model)` removes the pruned neurons and heads",
        ),
        ("head", "expect no speed-up", "removes the pruned heads"),
    ],
)
def test_report_and_card_say_what_to_expect_and_what_to_do(
    granularity: str, promise: str, instead: str, tmp_path: Path
) -> None:
    sparsity = 0.75 if granularity == "1:4" else 0.5
    config = AdaPruneConfig(granularity=granularity, final_sparsity=sparsity)
    advice = speed_advice(config)
    assert promise in advice
    assert instead in advice
    model = get_peft_model(make_model(), config)
    model.save_pretrained(tmp_path)
    assert advice in (tmp_path / "README.md").read_text()
    if granularity != "1:4":
        assert report_of(granularity).conclusion().endswith(advice)


def test_bad_sizes_and_models_without_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="`repeats` 2"):
        measure_speed(pruned(), repeats=1)
    with pytest.raises(ValueError, match="at least 1"):
        measure_speed(pruned(), length=0)
    with pytest.raises(NotPrunedError, match="nothing to compare"):
        measure_speed(make_model())


@pytest.mark.parametrize("head", HEADS)
def test_a_model_is_opened_with_its_head_by_its_name_alone(head: str, tmp_path: Path) -> None:
    architecture = "gpt2" if head == "causal_lm" else "bert"
    make_model(architecture, head).save_pretrained(tmp_path / "base")
    base = HEADS[head].from_pretrained(tmp_path / "base")
    assert type(open_model(str(tmp_path / "base"))) is type(base)
    model = get_peft_model(base, AdaPruneConfig(granularity="neuron"))
    Pruner(model, 1).step()
    model.save_pretrained(tmp_path / "adapter")
    opened = open_model(str(tmp_path / "adapter"))
    assert type(opened) is type(base)
    assert torch.equal(logits_of(opened, head), logits_of(model, head))


def test_auto_classes_go_by_the_end_of_a_name() -> None:
    assert auto_class("BertForMaskedLM") == "AutoModelForMaskedLM"
    assert auto_class("GPT2LMHeadModel") == "AutoModelForCausalLM"
    assert auto_class("BertModel") == "AutoModel"


def invoke(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_speed_prints_ratios_the_score_and_the_conclusion(adapter: Path) -> None:
    result = invoke("speed", str(adapter), "--length", "5", "--repeats", "2", "--threads", "1")
    assert result.exit_code == 0, result.output
    text = " ".join(result.output.split())
    assert "times as fast as the base" in text
    assert "compacted" in text
    assert "accuracy 0.75" in text
    assert speed_advice(PeftConfig.from_pretrained(str(adapter))) in text


def test_export_writes_the_smaller_model_with_tokenizer_and_scores(adapter: Path, tmp_path: Path) -> None:
    result = invoke("export", str(adapter), "--output-dir", str(tmp_path / "small"))
    assert result.exit_code == 0, result.output
    masked, small = open_model(str(adapter)), AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert json.loads((tmp_path / "small" / "config.json").read_text())["intermediate_size"] == 20
    torch.testing.assert_close(logits_of(small), logits_of(masked), rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("w7")["input_ids"] == [2, 7, 3]
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [("accuracy", 0.75)]


def test_export_leaves_zeros_in_place_if_asked_to(adapter: Path, tmp_path: Path) -> None:
    result = invoke("export", str(adapter), "--output-dir", str(tmp_path), "--keep-zeros")
    assert result.exit_code == 0, result.output
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.config.intermediate_size == 40
    assert torch.equal(logits_of(plain), logits_of(merged(open_model(str(adapter)))))


def test_export_as_onnx_writes_that_file(adapter: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = invoke("export", str(adapter), "--output-dir", str(tmp_path), "--onnx")
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer_config.json"} <= names
    assert "model.safetensors" not in names


@pytest.mark.parametrize("command", ["export", "speed"])
def test_a_name_that_there_is_not_ends_in_a_message(command: str, tmp_path: Path) -> None:
    result = invoke(command, str(tmp_path / "nowhere"))
    assert result.exit_code == 1
    assert "Error: " in result.output
    assert "Traceback" not in result.output
