import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftConfig, get_peft_model
from tiny import logits_of, make_model, save_model, train_masks
from transformers import AutoModelForSequenceClassification

from hf_adaprune import AdaPruneConfig, sparsity_report
from hf_adaprune.errors import AdapterFileError, CardError
from hf_adaprune.hub.model_card import BEGIN, END, describe_base, write_model_card
from hf_adaprune.training.trainer_card import _TRAINER_BEGIN as TRAINER


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    root = tmp_path_factory.mktemp("card")
    model = AutoModelForSequenceClassification.from_pretrained(save_model(root / "base"))
    tuned: Any = get_peft_model(model, AdaPruneConfig(final_sparsity=0.6))
    train_masks(tuned)
    tuned.save_pretrained(str(root / "adapter"))
    return root / "adapter", logits_of(tuned)


def save_adapter(folder: Path, final_sparsity: float = 0.5, **options: Any) -> Any:
    model: Any = get_peft_model(make_model(), AdaPruneConfig(final_sparsity=final_sparsity))
    train_masks(model)
    model.save_pretrained(str(folder))
    return write_model_card(folder, picture=False, **options)


def test_a_card_says_what_was_pruned_and_is_valid(adapter: tuple[Path, torch.Tensor]) -> None:
    card: Any = write_model_card(adapter[0], metrics={"accuracy": 0.91234}, dataset="nyu-mll/glue")
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.base_model is None, "a local path is no name on the Hub"
    assert card.data.eval_results[0].metric_value == 0.9123
    text = (adapter[0] / "README.md").read_text(encoding="utf-8")
    assert "60.0 % of the masked weights" in " ".join(text.split())
    assert "60.0 % of each of the 12 masked matrices." in text
    assert "| accuracy | 0.9123 |" in text
    assert (adapter[0] / "sparsity.png").stat().st_size > 5000


def test_a_card_tells_what_differs_between_components_and_layers(tmp_path: Path) -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig(final_sparsity=0.6, scope="global"))
    train_masks(model)
    model.save_pretrained(str(tmp_path))
    text, report = (tmp_path / "README.md").read_text(encoding="utf-8"), sparsity_report(model)
    for part, share in (report.by_component() | report.by_layer()).items():
        assert f"| {part} | {share:.3f} |" in text
    assert "of each of the" not in text


def test_only_a_card_of_an_adapter_with_a_head_tells_of_one(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    model: Any = get_peft_model(make_model("gpt2", "causal_lm"), AdaPruneConfig())
    train_masks(model, head="causal_lm")
    model.save_pretrained(str(tmp_path))
    assert "task head" in (adapter[0] / "README.md").read_text(encoding="utf-8")
    assert "task head" not in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_card_of_a_masked_language_model_names_its_pipeline(tmp_path: Path) -> None:
    model: Any = get_peft_model(make_model("bert", "masked_lm"), AdaPruneConfig())
    train_masks(model, head="masked_lm")
    model.save_pretrained(str(tmp_path))
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "fill-mask"


def test_the_code_in_a_card_opens_the_adapter(adapter: tuple[Path, torch.Tensor]) -> None:
    card: Any = write_model_card(adapter[0], name=str(adapter[0]))
    code = card.text.split("```python")[1].split("```")[0]
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert torch.equal(logits_of(scope["model"]), adapter[1])


def test_what_a_person_wrote_around_our_part_survives(adapter: tuple[Path, torch.Tensor]) -> None:
    write_model_card(adapter[0])
    path = adapter[0] / "README.md"
    card = ModelCard.load(path)
    card.text, card.data.license = f"Read this first.\n{card.text}\nAnd this last.\n", "mit"
    card.save(path)
    write_model_card(adapter[0], metrics={"accuracy": 0.5})
    written = ModelCard.load(path)
    assert written.text.strip().startswith("Read this first.")
    assert written.text.strip().endswith("And this last.")
    assert written.text.count("## What was pruned") == 1
    assert "| accuracy | 0.5000 |" in written.text
    assert written.data.license == "mit"


def test_only_a_blank_template_is_replaced(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter[0], tmp_path / "adapter"))
    card, blank = folder / "README.md", ModelCard.from_template(ModelCardData())
    for text, survives in (
        (f"{card.read_text(encoding='utf-8')}\n## Limits\n\n[More Information Needed]\n", "## Limits"),
        (str(blank).replace("[More Information Needed]", "Not for medical use.", 1), "Not for medical use."),
        (str(blank), ""),
    ):
        card.write_text(text, encoding="utf-8")
        written = str(write_model_card(folder))
        assert "## What was pruned" in written
        assert survives in written
    assert "[More Information Needed]" not in written


def test_a_second_save_adds_nothing_of_pefts_own(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    model = AutoPeftModelForSequenceClassification.from_pretrained(adapter[0])
    cards = []
    for _ in range(3):
        model.save_pretrained(tmp_path / "saved")
        cards.append((tmp_path / "saved" / "README.md").read_text(encoding="utf-8"))
    assert cards[0] == cards[1] == cards[2]
    # PEFT enters the base's folder as its name.
    assert str(adapter[0].parent) not in cards[0]


def test_a_base_on_the_hub_is_named_in_the_metadata(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    config = AdaPruneConfig.from_pretrained(str(adapter[0]))
    config.base_model_name_or_path = "google-bert/bert-base-uncased"
    config.save_pretrained(str(tmp_path))
    card: Any = write_model_card(tmp_path)
    assert card.data.base_model == "google-bert/bert-base-uncased"
    assert card.data.base_model_relation == "adapter"


def test_scores_on_a_card_keep_the_data_and_the_split_that_they_are_of(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    shutil.copytree(adapter[0], tmp_path / "adapter")
    write_model_card(tmp_path / "adapter", metrics={"accuracy": 0.87}, dataset="nyu-mll/glue", picture=False)
    card: Any = ModelCard.load(tmp_path / "adapter" / "README.md")
    (result,) = card.data.eval_results
    assert result.dataset_type == "nyu-mll/glue"
    held = dataclasses.replace(result, dataset_split="test", metric_value="91 %")
    card.data.eval_results = [result, held]
    card.save(tmp_path / "adapter" / "README.md")
    for _ in range(2):
        again: Any = write_model_card(tmp_path / "adapter", name="me/sst2", picture=False)
        kept = [(it.dataset_type, it.dataset_split, it.metric_value) for it in again.data.eval_results]
        assert kept == [("nyu-mll/glue", None, 0.87), ("nyu-mll/glue", "test", "91 %")]
    new: Any = write_model_card(tmp_path / "adapter", metrics={"accuracy": 0.5}, picture=False)
    assert [it.metric_value for it in new.data.eval_results] == [0.5]
    cleared: Any = write_model_card(tmp_path / "adapter", metrics={}, picture=False)
    assert cleared.data.eval_results is None


def test_a_folder_is_no_name_on_the_hub_and_lora_has_no_masks(tmp_path: Path) -> None:
    assert [describe_base(name)[0] for name in ("../bert", "./bert", "me/bert", "bert")] == [
        None,
        None,
        "me/bert",
        "bert",
    ]
    LoraConfig(target_modules=["query"]).save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="of another method, LORA: open it with peft alone"):
        write_model_card(tmp_path)


def test_a_fresh_model_has_no_card_to_write(tmp_path: Path) -> None:
    AdaPruneConfig().save_pretrained(str(tmp_path))
    with pytest.raises(AdapterFileError, match="an adapter that was never saved: it has no masks"):
        write_model_card(tmp_path)


def test_layers_are_told_in_order_also_when_there_are_more_than_ten(tmp_path: Path) -> None:
    counts = {f"bert.encoder.layer.{number}.output.dense": [1, 2] for number in range(12)}
    counts["1²1"] = [1, 2]  # digits, and not a number: a file may have any name
    AdaPruneConfig(module_counts=counts, num_parameters=26).save_pretrained(str(tmp_path))
    report = sparsity_report(PeftConfig.from_pretrained(str(tmp_path)))
    assert list(report.by_layer()) == ["embeddings", *(str(number) for number in range(12))]


def test_a_card_of_an_adapter_that_names_no_base_says_how_to_open_it(tmp_path: Path) -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig())
    train_masks(model)
    model.save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "The adapter names no base: open it on the model that it was trained on (fingerprint" in text
    assert "```python" not in text


def test_a_metric_that_is_no_number_is_refused(adapter: tuple[Path, torch.Tensor]) -> None:
    for value in (None, float("nan"), float("inf")):
        metrics: Any = {"accuracy": value, "f1": 0.5}
        with pytest.raises(CardError, match=rf"`metrics` must be finite numbers, got \{{'accuracy': {value}\}}"):
            write_model_card(adapter[0], metrics=metrics)


def test_a_metric_may_be_a_scalar_of_numpy(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter[0], tmp_path / "adapter"))
    accuracy: Any = np.float64(0.875)
    card: Any = write_model_card(folder, metrics={"accuracy": accuracy})
    assert [it.metric_value for it in card.data.eval_results] == [0.875]
    assert "| accuracy | 0.8750 |" in (folder / "README.md").read_text(encoding="utf-8")


def test_metadata_that_cannot_be_read_is_named_and_the_card_stays(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(adapter[0], tmp_path / "adapter"))
    text = "---\nlicense: [mit\nlanguage: en: de\n---\nMine.\n"
    (folder / "README.md").write_text(text, encoding="utf-8")
    with pytest.raises(CardError, match=r"README.md' must be valid YAML: correct it"):
        write_model_card(folder)
    assert (folder / "README.md").read_text(encoding="utf-8") == text


def test_scores_of_another_adapter_do_not_stay_on_a_card(tmp_path: Path) -> None:
    for sparsity in (0.5, 0.9):
        model: Any = get_peft_model(make_model(), AdaPruneConfig(final_sparsity=sparsity))
        train_masks(model)
        model.save_pretrained(str(tmp_path))
        card: Any = ModelCard.load(tmp_path / "README.md")
        assert card.data.eval_results is None
        write_model_card(tmp_path, metrics={"accuracy": sparsity}, picture=False)
        model.save_pretrained(str(tmp_path))  # once more
        kept: Any = ModelCard.load(tmp_path / "README.md")
        assert [it.metric_value for it in kept.data.eval_results] == [sparsity]


def test_metadata_without_a_text_are_kept(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    shutil.copytree(adapter[0], tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\ntags: [1, mine]\n---\n")
    card: Any = write_model_card(tmp_path / "adapter", picture=False)
    assert card.data.license == "mit"
    assert {"1", "mine", "adaprune"} <= {*card.data.tags}


def test_what_is_said_of_one_adapter_is_not_said_of_another(tmp_path: Path) -> None:
    for dataset in ("x/first", "x/second"):
        card: Any = save_adapter(tmp_path, metrics={"accuracy": 0.5}, dataset=dataset)
        assert card.data.datasets == [dataset]
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    told = f"{TRAINER}\n## Training procedure\n\n- Accuracy: 0.99\n{END}\n\nMy notes."
    (tmp_path / "README.md").write_text(f"{text}\n{told}\n", encoding="utf-8")
    same: Any = save_adapter(tmp_path)
    assert same.data.datasets == ["x/second"]
    assert "Accuracy: 0.99" in same.text
    other: Any = save_adapter(tmp_path, final_sparsity=0.9)
    assert other.data.datasets is None
    assert "Accuracy: 0.99" not in other.text
    assert "My notes." in other.text


def test_a_lost_comment_line_costs_no_text(adapter: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    shutil.copytree(adapter[0], tmp_path / "adapter")
    path = tmp_path / "adapter" / "README.md"
    path.write_text(path.read_text(encoding="utf-8").replace(END, "My notes."), encoding="utf-8")
    for _ in range(3):
        card: Any = write_model_card(tmp_path / "adapter", picture=False)
        assert "My notes." in card.text
        assert card.text.count(BEGIN) == card.text.count(END) == 1
