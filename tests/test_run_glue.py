"""`examples/run_glue.py` from end to end, on a few made-up rows and a BERT of a few thousand weights."""

import importlib.util
import json
import runpy
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    TrainingArguments,
)

from hf_adaprune import compact
from hf_adaprune.errors import TaskError
from hf_adaprune.glue import read_data_file


SCRIPT = Path(__file__).parents[1] / "examples" / "run_glue.py"
WORDS = ["the", "film", "meal", "trip", "was", "is", "very", "not", "good", "bad", "fine", "dull", "great", "and"]
TEXTS = [f"the {thing} was {much} {how}" for thing in WORDS[1:4] for much in WORDS[6:8] for how in WORDS[8:13]]
NAMES = ["positive" if ("good" in text or "great" in text) else "negative" for text in TEXTS]
SCORES = [round(0.25 * (number % 7), 2) for number in range(len(TEXTS))]
MASKED = 2 * (4 * 16 * 16 + 2 * 16 * 32)  # the weights of the two layers of the BERT below
PAIRS: dict[str, list[Any]] = {"sentence1": TEXTS, "sentence2": TEXTS[::-1]}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("run_glue", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_glue"] = module  # where `HfArgumentParser` looks the types of the flags up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["run_glue"]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny-bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)}, model_max_length=32).save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture
def run(script: Any, model_path: Path, tmp_path: Path) -> Any:
    """Run the script; return its output folder and its `all_results.json`."""

    def run(*flags: Any, model: Path = model_path, out: str = "out") -> tuple[Path, dict[str, Any]]:
        given = ["--model_name_or_path", model, "--output_dir", tmp_path / out, "--cache_dir", tmp_path / "cache"]
        quick = ["--max_steps", 2, "--save_strategy", "no", "--report_to", "none", "--no_dataloader_pin_memory"]
        script.main([str(flag) for flag in (*given, *quick, "--disable_tqdm", "True", *flags)])
        results = tmp_path / out / "all_results.json"
        return tmp_path / out, json.loads(results.read_text()) if results.exists() else {}

    return run


def write(path: Path, columns: Mapping[str, Any]) -> Path:
    """Write rows in the format that the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = datasets.Dataset.from_dict(dict(columns))
    rows = dataset.to_list()
    if path.suffix == ".csv":
        lines = [",".join(columns), *(",".join("" if x is None else str(x) for x in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        dataset.to_parquet(path)
    return path


def own_files(folder: Path, columns: Mapping[str, Any], ending: str = "csv") -> list[Any]:
    train = write(folder / f"train.{ending}", columns)
    validation = write(folder / f"validation.{ending}", {name: values[::-1] for name, values in columns.items()})
    return ["--train_file", train, "--validation_file", validation]


def glue_folder(folder: Path, columns: Mapping[str, Any], splits: tuple[str, ...] = ("train", "validation")) -> Path:
    for split in splits:
        write(folder / f"{split}.parquet", columns)
    return folder


def test_what_reads_like_a_missing_value_may_be_a_label_or_a_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", {"text": ["NA", "nan", None], "label": ["None", "NA", "null"]})
    assert read_data_file(path).to_dict() == {"text": ["NA", "nan", None], "label": ["None", "NA", "null"]}


@pytest.mark.parametrize("ending", ["csv", "json", "jsonl", "parquet"])
def test_own_files_of_each_kind_are_learnt_from(run: Any, tmp_path: Path, ending: str) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES}, ending)
    out, results = run("--method", "finetune", "--do_train", "--do_eval", *files)
    assert {"eval_accuracy", "eval_loss", "train_loss", "train_runtime", "trainable_params"} <= set(results)
    assert results["train_samples"] == results["eval_samples"] == len(TEXTS)
    for name in (
        "train_results.json",
        "eval_results.json",
        "trainer_state.json",
        "model.safetensors",
        "tokenizer.json",
    ):
        assert (out / name).is_file()
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}


def test_float_labels_make_a_regression(run: Any, tmp_path: Path) -> None:
    out, results = run(
        "--method", "finetune", "--do_train", "--do_eval", *own_files(tmp_path, {**PAIRS, "label": SCORES})
    )
    assert {"eval_pearson", "eval_spearmanr", "eval_combined_score"} <= set(results)
    assert results["eval_combined_score"] == pytest.approx((results["eval_pearson"] + results["eval_spearmanr"]) / 2)
    assert load_file(out / "model.safetensors")["classifier.weight"].shape == (1, 16)
    assert json.loads((out / "config.json").read_text())["problem_type"] == "regression"


def test_finetuning_trains_everything_and_counts_it(run: Any, tmp_path: Path, model_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--method", "finetune", "--do_train", *files)
    model = BertForSequenceClassification.from_pretrained(model_path)
    assert results["trainable_params"] == sum(parameter.numel() for parameter in model.parameters())
    assert results["checkpoint_bytes"] == (out / "model.safetensors").stat().st_size


def test_feature_extraction_changes_pooler_and_classifier_only(run: Any, tmp_path: Path, model_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--method", "feature_extraction", "--do_train", "--learning_rate", "1e-3", *files)
    before, after = load_file(model_path / "model.safetensors"), load_file(out / "model.safetensors")
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[f"bert.{name}"])}
    assert changed == {"pooler.dense.weight", "pooler.dense.bias"}
    assert results["trainable_params"] == 16 * 16 + 16 + 16 * 2 + 2


def test_adaprune_writes_an_adapter_its_card_a_picture_and_its_sparsity(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--do_train", "--do_eval", "--final_sparsity", 0.25, "--max_steps", 5, *files)
    assert results["sparsity"] == pytest.approx(0.25, abs=0.01)
    assert 0 < results["sparsity_whole_model"] < results["sparsity"]
    assert results["adapter_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert not (out / "model.safetensors").exists()
    assert (out / "sparsity.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "README.md").is_file()


def test_a_trained_model_is_evaluated_again_to_the_same_score(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    for method in ("finetune", "adaprune"):
        out, first = run("--method", method, "--do_train", "--do_eval", "--learning_rate", "5e-4", *files, out=method)
        _, again = run("--method", method, "--do_eval", *files, model=out, out=f"{method}-again")
        assert again["eval_loss"] == pytest.approx(first["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("method", ["random", "smp", "no_recovery", "lora"])
def test_other_adapters_come_from_the_same_script(method: str, run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--method", method, "--do_train", "--do_eval", "--max_steps", 5, *files)
    assert "eval_accuracy" in results
    assert results["checkpoint_bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert not (out / "model.safetensors").exists()
    assert results.get("sparsity") == (None if method == "lora" else pytest.approx(0.5, abs=0.001))


@pytest.mark.parametrize("method", ["magnitude", "movement", "imp"])
def test_trained_weights_are_scored_as_trained_and_rewound(method: str, run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    flags = ["--do_eval", *files]
    out, results = run(
        "--method", method, "--do_train", "--max_steps", 5, "--final_sparsity", 0.8, "--learning_rate", "1e-2", *flags
    )
    weights = [tensor for name, tensor in load_file(out / "model.safetensors").items() if ".layer." in name]
    matrices = torch.cat([tensor.view(-1) for tensor in weights if tensor.dim() == 2])
    assert float((matrices == 0).float().mean()) == results["sparsity"] == pytest.approx(0.8, abs=0.001)
    assert results["checkpoint_bytes"] == (out / "model.safetensors").stat().st_size
    assert results["adapter_bytes"] == (out / "rewound" / "adapter_model.safetensors").stat().st_size
    for folder, key in ((out, "eval_loss"), (out / "rewound", "eval_rewound_loss")):
        _, again = run("--method", "finetune", *flags, model=folder, out=f"{folder.name}-again")
        assert again["eval_loss"] == pytest.approx(results[key], abs=1e-6)
    assert results["eval_loss"] != pytest.approx(results["eval_rewound_loss"], abs=1e-3)


DROPOUTS = [(), ("--dropout", 0), ("--dropout", 0.5)]


def test_ablations_are_scored_beside_the_run(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--ablate", "--do_train", "--do_eval", "--max_steps", 5, *files)
    assert {"eval_accuracy", "eval_shuffled_accuracy", "eval_shuffled_retrained_accuracy"} <= set(results)
    _, again = run("--do_eval", *files, model=out, out="again")
    assert again["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("method", ["finetune", "adaprune", "smp"])
def test_dropout_is_that_which_is_asked_for(run: Any, tmp_path: Path, method: str) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": [number / 10 for number in range(len(TEXTS))]})
    flags = ("--method", method, "--do_train", "--max_steps", 4, "--logging_steps", 1, *files)
    losses = [run(*flags, *dropout, out=f"{number}")[1]["train_loss"] for number, dropout in enumerate(DROPOUTS)]
    own, none, half = losses
    assert half not in (own, none)
    # Masks of a regression are trained without, and all else with the model's own.
    assert (own == none) == (method == "adaprune")


def test_what_comes_back_is_counted_beside_the_run(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    _, results = run("--count_recovery", "--do_train", "--max_steps", 8, "--learning_rate", 5e-3, *files)
    pruned, kept = results["recovered_of_pruned"], results["recovered_of_kept"]
    assert 0 < pruned < 1
    # Half are kept: of these, and of all that were ever pruned, it is the same number that came back.
    assert kept / (1 + kept) == pytest.approx(pruned, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_pushed_adapter_keeps_its_own_card(run: Any, tmp_path: Path, online: HubServer) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    run("--do_train", "--do_eval", "--max_steps", 5, "--push_to_hub", "--hub_model_id", "me/adapter", *files)
    pushed = online.files("me/adapter")
    assert {"README.md", "adapter_model.safetensors", "adapter_config.json", "all_results.json"} <= pushed.keys()
    assert b"## What was pruned" in pushed["README.md"]
    assert b"| accuracy |" in pushed["README.md"]


def test_the_papers_preset_runs(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--preset", "paper", "--do_train", "--do_eval", *files)
    assert results["sparsity"] >= 0.5
    assert json.loads((out / "adapter_config.json").read_text())["selection"] == "threshold"


@pytest.mark.parametrize("granularity", ["neuron+head", "2:4"])
def test_whole_groups_are_pruned_if_asked(run: Any, tmp_path: Path, granularity: str) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--granularity", granularity, "--do_train", "--do_eval", *files)
    assert results["sparsity"] == pytest.approx(0.5, abs=0.05)
    assert json.loads((out / "adapter_config.json").read_text())["granularity"] == granularity


@pytest.mark.parametrize(
    ("length", "first_steps"), [(("--max_steps", 3), 2), (("--max_steps", -1, "--num_train_epochs", 2), 4)]
)
def test_what_a_run_before_has_taken_out_counts_as_pruned(
    run: Any, tmp_path: Path, model_path: Path, length: tuple[Any, ...], first_steps: int
) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    out, results = run("--compact_first", 0.5, "--final_sparsity", 0.5, "--do_train", "--do_eval", *length, *files)
    assert json.loads((out / "groups" / "adapter_config.json").read_text())["training"]["num_steps"] == first_steps
    shrunk = compact(AutoModelForSequenceClassification.from_pretrained(out / "groups"))
    matrices = [
        weight.numel() for name, weight in shrunk.named_parameters() if ".layer." in name and weight.dim() == 2
    ]
    assert sum(matrices) == pytest.approx(0.5 * MASKED, rel=0.05)
    assert results["sparsity"] == 1 - (sum(matrices) - sum(matrices) // 2) / MASKED
    before = BertForSequenceClassification.from_pretrained(model_path).num_parameters()
    assert results["sparsity_whole_model"] == results["sparsity"] * MASKED / before
    assert results["checkpoint_bytes"] == (out / "adapter_model.safetensors").stat().st_size < 4 * MASKED
    for model in (out, out / "small"):
        _, again = run("--do_eval", *files, model=model, out="again")
        assert again["eval_loss"] == pytest.approx(results["eval_loss"], abs=1e-6)
    small = AutoModelForSequenceClassification.from_pretrained(out / "small")
    assert small.num_parameters() <= shrunk.num_parameters()


def test_a_second_run_that_was_broken_off_goes_on_without_the_first(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    flags = ["--compact_first", 0.5, "--do_train", "--max_steps", 6, "--save_strategy", "steps", "--save_steps", 3]
    out, _ = run(*flags, *files)
    saved = load_file(out / "adapter_model.safetensors")
    (out / "adapter_model.safetensors").unlink()
    before = (out / "groups" / "adapter_model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "checkpoint-6")
    run(*flags, "--resume_from_checkpoint", "True", *files)
    assert (out / "groups" / "adapter_model.safetensors").stat().st_mtime_ns == before
    again = load_file(out / "adapter_model.safetensors")
    assert all(torch.equal(tensor, saved[name]) for name, tensor in again.items())


def test_what_cannot_be_taken_out_or_pushed_is_refused(script: Any, run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    with pytest.raises(script.InputError, match=r"`--compact_first` must be in \[0, 1\).*got 1.0"):
        run("--compact_first", 1, "--do_train", *files)
    with pytest.raises(script.InputError, match=r"Run `hf-adaprune push .* NAME` afterwards"):
        run("--compact_first", 0.5, "--do_train", "--push_to_hub", *files)
    with pytest.raises(script.InputError, match="masks over frozen weights, got 'magnitude'"):
        run("--compact_first", 0.5, "--do_train", "--method", "magnitude", *files)
    with pytest.raises(script.InputError, match=r"`--preset paper` replaces the model's head"):
        run("--compact_first", 0.5, "--do_train", "--preset", "paper", *files)


@pytest.mark.parametrize("flags", [["--do_train"], ["--do_eval"], ["--do_train", "--do_eval", "--method", "lora"]])
def test_ablations_that_cannot_be_made_are_refused_before_training(run: Any, script: Any, flags: list[str]) -> None:
    with pytest.raises(script.InputError, match="`--ablate` needs `--do_train`, `--do_eval` and a method"):
        run("--ablate", *flags, "--train_file", "nowhere.csv")


@pytest.mark.parametrize("folder", ["glue/stsb", "glue"])
def test_a_glue_task_is_found_in_a_folder_or_below_it(run: Any, tmp_path: Path, folder: str) -> None:
    glue_folder(tmp_path / "glue" / "stsb", {**PAIRS, "label": SCORES, "idx": list(range(len(TEXTS)))})
    data = ["--task_name", "stsb", "--data_dir", tmp_path / folder]
    _, results = run("--method", "feature_extraction", "--do_train", "--do_eval", *data)
    assert {"eval_pearson", "eval_spearmanr"} <= set(results)


def test_both_validation_sets_of_mnli_are_scored_and_both_test_sets_predicted(run: Any, tmp_path: Path) -> None:
    columns = {"premise": TEXTS, "hypothesis": TEXTS[::-1], "label": [number % 3 for number in range(len(TEXTS))]}
    splits = ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched")
    data = ["--task_name", "mnli", "--data_dir", glue_folder(tmp_path / "mnli", columns, splits)]
    out, results = run("--method", "finetune", "--do_train", "--do_eval", "--do_predict", *data)
    assert {"eval_accuracy", "eval_accuracy_mm"} <= set(results)
    assert results["eval_accuracy"] == results["eval_accuracy_mm"]  # here they are the same rows
    matched, mismatched = ((out / f"predict_results_{name}.txt").read_text() for name in ("mnli", "mnli-mm"))
    assert matched == mismatched


def test_predictions_are_names_in_the_order_of_the_rows(run: Any, script: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    test_file = write(tmp_path / "test.jsonl", {"text": TEXTS})
    flags = ["--method", "finetune", "--learning_rate", "1e-2", "--max_steps", 30]
    out, _ = run(*flags, "--do_train", "--do_predict", "--test_file", test_file, *files)
    header, *lines = (out / "predict_results_custom.txt").read_text().splitlines()
    assert header == "index\tprediction"
    assert [line.split("\t")[0] for line in lines] == [str(number) for number in range(len(TEXTS))]
    assert [line.split("\t")[1] for line in lines] == NAMES  # so easy a task is learnt whole


@pytest.mark.parametrize(("method", "rate"), [("finetune", 1e-2), ("adaprune", 2e-3)])
def test_a_trained_model_is_scored_by_the_names_of_its_labels(
    run: Any, tmp_path: Path, method: str, rate: float
) -> None:
    other_order = datasets.ClassLabel(names=["positive", "negative"])
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": NAMES}).cast_column("label", other_order)
    rows.to_parquet(tmp_path / "rows.parquet")
    trained = ["--method", method, "--learning_rate", rate, "--max_steps", 60, "--do_train"]
    out, _ = run(*trained, "--train_file", tmp_path / "rows.parquet")
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    flags = ["--do_eval", "--do_predict", "--test_file", files[-1], *files]
    scored, results = run(*flags, model=out, out="scored")
    predicted = [line.split("\t")[1] for line in (scored / "predict_results_custom.txt").read_text().splitlines()[1:]]
    right = sum(name == said for name, said in zip(NAMES[::-1], predicted, strict=True)) / len(NAMES)
    assert results["eval_accuracy"] == pytest.approx(right)
    assert results["eval_accuracy"] > 0.5  # of the labels .6 are negative


def test_data_that_do_not_fit_the_head_of_a_trained_model_are_refused(run: Any, script: Any, tmp_path: Path) -> None:
    out, _ = run("--method", "finetune", "--do_train", *own_files(tmp_path, {"text": TEXTS, "label": NAMES}))
    three = own_files(tmp_path / "three", {"text": TEXTS, "label": [f"class {number % 3}" for number in range(30)]})
    with pytest.raises(script.InputError, match=r"must be \['negative', 'positive'\], got \['class"):
        run("--do_eval", *three, model=out)
    with pytest.raises(script.InputError, match="must have 1 outputs for labels that are numbers, got 2"):
        run("--do_eval", *own_files(tmp_path / "scores", {"text": TEXTS, "label": SCORES}), model=out)
    with pytest.raises(script.InputError, match="No model could be loaded"):
        run("--do_train", *three, model=out)


def test_predictions_of_a_regression_have_three_decimals(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {**PAIRS, "label": SCORES})
    out, _ = run("--method", "finetune", "--do_train", "--do_predict", *files, "--test_file", files[-1])
    lines = (out / "predict_results_custom.txt").read_text().splitlines()[1:]
    assert all(len(line.split("\t")[1].split(".")[1]) == 3 for line in lines)


def task_of(script: Any, tmp_path: Path, **flags: Any) -> Any:
    arguments = script.DataArguments(**{name: str(value) for name, value in flags.items()})
    return script.load_task(arguments, ["train", "validation"], str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("labels", "names"),
    [([5, 1, 3], ["1", "3", "5"]), (["b", "c", "a"], ["a", "b", "c"]), ([10, 9, 1], ["1", "9", "10"])],
)
def test_labels_are_numbered_in_their_order_and_alike_in_all_splits(
    script: Any, tmp_path: Path, labels: list[Any], names: list[str]
) -> None:
    train = write(tmp_path / "train.jsonl", {"text": TEXTS[:3], "label": labels})
    validation = write(tmp_path / "validation.jsonl", {"text": TEXTS[:2], "label": labels[1:]})
    task = task_of(script, tmp_path, train_file=train, validation_file=validation)
    assert task.label_names == names
    assert task.splits["train"]["label"][:] == [names.index(str(label)) for label in labels]
    assert task.splits["validation"]["label"][:] == [names.index(str(label)) for label in labels[1:]]


def test_two_text_columns_keep_the_order_of_the_file(script: Any, tmp_path: Path) -> None:
    columns = {"question": TEXTS, "label": NAMES, "answer": TEXTS[::-1], "number": list(range(len(TEXTS)))}
    files = own_files(tmp_path, columns)
    task = task_of(script, tmp_path, train_file=files[1], validation_file=files[3])
    assert task.columns == ["question", "answer"]


def test_texts_are_padded_by_batch_or_to_the_length_asked_for(script: Any, tmp_path: Path, model_path: Path) -> None:
    files = own_files(tmp_path, {"text": ["good", *TEXTS[:3]], "label": NAMES[:4]})
    task = task_of(script, tmp_path, train_file=files[1], validation_file=files[3])
    tokenizer = BertTokenizer.from_pretrained(model_path)

    def lengths(**flags: Any) -> list[int]:
        arguments = script.DataArguments(train_file="train.csv", **flags)
        return [len(ids) for ids in script.tokenize(task, "train", tokenizer, arguments)["input_ids"]]

    assert lengths() == [3, 7, 7, 7]
    assert lengths(max_seq_length=5) == [3, 5, 5, 5]
    assert lengths(max_seq_length=9, pad_to_max_length=True) == [9, 9, 9, 9]
    assert lengths(pad_to_max_length=True) == [32, 32, 32, 32]  # no more than the model takes


def test_samples_are_drawn_at_random_and_fixed_by_their_own_seed(
    script: Any, tmp_path: Path, model_path: Path
) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": SCORES})
    task = task_of(script, tmp_path, train_file=files[1], validation_file=files[3])
    tokenizer = BertTokenizer.from_pretrained(model_path)

    def sample(**flags: Any) -> list[list[int]]:
        arguments = script.DataArguments(train_file="train.csv", **flags)
        return script.tokenize(task, "train", tokenizer, arguments)["input_ids"][:]

    everything = sample()
    ten = sample(max_train_samples=10)
    assert len(ten) == 10
    assert ten != everything[:10]
    assert all(row in everything for row in ten)
    torch.manual_seed(1)
    assert sample(max_train_samples=10) == ten
    assert sample(max_train_samples=10, sample_seed=1) != ten
    assert sample(max_train_samples=1000) == everything
    assert sample(max_eval_samples=10) == everything


def test_a_task_by_name_comes_from_the_hub(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> datasets.DatasetDict:
        asked.append(arguments)
        labels = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
        )
        labelled = datasets.Dataset.from_dict({"sentence": TEXTS[:2], "label": [1, 0]}, features=labels)
        hidden = datasets.Dataset.from_dict({"sentence": TEXTS[:2], "label": [-1, -1]}, features=labels)
        return datasets.DatasetDict(train=labelled, validation=labelled, test=hidden)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = task_of(script, tmp_path, task_name="sst2")
    assert asked == [("nyu-mll/glue", "sst2")]
    assert (task.label_names, list(task.splits)) == (["negative", "positive"], ["train", "validation", "test"])


def test_without_a_network_the_error_says_what_to_do(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(script.InputError, match=r"Give its Parquet files as `--data_dir`.*Couldn't reach"):
        task_of(script, tmp_path, task_name="rte")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--do_train", "--task_name", "sts-b"], r"`--task_name` must be one of \['cola', .*got 'sts-b'"),
        (["--do_train", "--task_name", "rte", "--train_file", "a.csv"], r"got \['--task_name', '--train_file'\]"),
        (
            ["--do_train", "--data_dir", "a", "--validation_file", "a.csv"],
            r"got \['--data_dir', '--validation_file'\]",
        ),
        (["--do_eval", "--validation_file", "a.csv"], r"`--train_file` \(from which label names are read"),
        (["--do_train"], r"Give `--task_name`, .* got \[\]"),
        (
            ["--do_train", "--task_name", "rte", "--resume_from_checkpoint", "True"],
            r"must be the folder of a checkpoint, or `True` for the last one in .* got 'True': there is none",
        ),
        (["--task_name", "rte"], "There is nothing to do: give `--do_train`"),
        (
            ["--do_train", "--task_name", "rte", "--max_train_samples", 0],
            "`--max_train_samples` must be at least 1, got 0",
        ),
        (
            ["--do_train", "--train_file", "a.txt"],
            r"end in one of \['.csv', '.json', '.jsonl', '.parquet'\], got 'a.txt'",
        ),
        (["--do_train", "--train_file", "nowhere.csv"], "must exist .* got 'nowhere.csv'"),
        (["--do_train", "--task_name", "rte", "--data_dir", "nowhere"], r"must be \['train'\] data .* got \[\]"),
    ],
)
def test_flags_that_cannot_be_met_are_refused(run: Any, script: Any, flags: list[Any], message: str) -> None:
    with pytest.raises((script.InputError, TaskError), match=message):
        run(*flags)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": TEXTS, "labels": NAMES}, r"must have the columns \['text', 'labels', 'label'\]"),
        (
            {"text": TEXTS, "target": SCORES},
            r"\['label'\] are missing .* columns \['text', 'label'\], got \['text', 'target'\]: add or rename some",
        ),
        ({"a": TEXTS, "b": TEXTS, "c": TEXTS, "label": NAMES}, r"one or two text columns .* got \['a', 'b', 'c'\]"),
        ({"number": SCORES, "label": NAMES}, r"one or two text columns beside `label`, got \[\]"),
        ({"text": TEXTS, "label": ["same"] * len(TEXTS)}, r"not always the same, got \['same'\]"),
        ({"text": [None, *TEXTS[1:]], "label": NAMES}, "1 of 30 rows of the train data have no `text`"),
        ({"text": TEXTS, "label": [None, *NAMES[1:]]}, "1 of 30 rows of the train data have no `label`"),
    ],
)
def test_files_that_cannot_be_learnt_from_are_refused(
    run: Any, script: Any, tmp_path: Path, columns: dict[str, list[Any]], message: str
) -> None:
    with pytest.raises((script.InputError, TaskError), match=message):
        run("--do_train", "--do_eval", *own_files(tmp_path, columns))


@pytest.mark.parametrize("method", ["adaprune", "finetune", "lora", "smp"])
def test_training_does_not_start_from_an_adapter(method: str, run: Any, tmp_path: Path, script: Any) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    adapter, _ = run("--do_train", *files)
    with pytest.raises(script.InputError, match=r"is an adapter: run `hf-adaprune merge .*adapter FOLDER`"):
        run("--do_train", "--method", method, *files, model=adapter.rename(tmp_path / "adapter"), out="again")


def test_lists_are_no_labels(run: Any, tmp_path: Path, script: Any) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": [[0] for _ in TEXTS]}, "parquet")
    with pytest.raises(script.InputError, match="must be one number or name per row"):
        run("--do_train", *files)


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (["a", "b"], ["a", "z"], r"validation labels must be \['a', 'b'\], got \['z'\]"),
        ([1, 5], [5, 0], r"validation labels must be \['1', '5'\], got \[0\]"),  # 0 is no number of a class here
        ([0.5, 1.5], ["a", "b"], r"validation labels must be finite numbers, got \['a', 'b'\]"),
        ([0.5, 1.5], [0.5, float("nan")], r"validation labels must be finite numbers, got \[nan\]"),
    ],
)
def test_labels_that_the_training_data_lack_are_refused(
    script: Any, tmp_path: Path, train: list[Any], validation: list[Any], message: str
) -> None:
    files = [write(tmp_path / "train.parquet", {"text": TEXTS[:2], "label": train})]
    files.append(write(tmp_path / "validation.parquet", {"text": TEXTS[:2], "label": validation}))
    with pytest.raises(script.InputError, match=message):
        task_of(script, tmp_path, train_file=files[0], validation_file=files[1])


def test_a_file_that_is_not_what_its_name_says_is_refused(script: Any, tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_text("text,label\n")
    with pytest.raises(TaskError, match=r"train.parquet' that can be read as parquet"):
        task_of(script, tmp_path, train_file=tmp_path / "train.parquet")


def test_a_split_that_is_asked_for_but_missing_is_named(run: Any, script: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    with pytest.raises(script.InputError, match=r"There must be \['test'\] data .* give `--test_file`"):
        run("--do_predict", *files)


def test_an_impossible_sparsity_is_refused_before_any_data_are_read(run: Any) -> None:
    with pytest.raises(ValueError, match=r"`final_sparsity` must be in \[0, 1\), got 1.0"):
        run("--do_train", "--train_file", "nowhere.csv", "--final_sparsity", 1.0)


def test_the_command_line_shows_a_plain_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--model_name_or_path", "x", "--output_dir", str(tmp_path / "out"), "--do_train", "--task_name", "x"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags])
    with pytest.raises(SystemExit, match=r"run_glue.py: error: `--task_name` must be one of") as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(caught.value.code, str)


def test_an_earlier_runs_results_do_not_mix_with_a_new_ones(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "all_results.json").write_text('{"sparsity": 0.9}')
    _, results = run("--method", "finetune", "--do_train", *files)
    assert "sparsity" not in results


def test_the_flags_that_users_know_are_there(script: Any) -> None:
    known = {"model_name_or_path", "task_name", "max_seq_length", "pad_to_max_length", "max_train_samples"}
    known |= {
        "max_eval_samples",
        "train_file",
        "validation_file",
        "test_file",
        "output_dir",
        "do_train",
        "push_to_hub",
    }
    kinds = (script.ModelArguments, script.DataArguments, TrainingArguments)
    assert known <= {name for kind in kinds for name in kind.__dataclass_fields__}


def test_only_scores_are_put_on_the_card(script: Any, adapter_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(adapter_path, tmp_path / "adapter")
    measured = {"accuracy": 0.5, "loss": 1.1, "runtime": 0.1, "samples": 30.0, "samples_per_second": 9.0}
    evaluated = {f"eval_{name}{ending}": value for name, value in measured.items() for ending in ("", "_mm")}
    task = SimpleNamespace(name="mnli")
    script.write_card(folder, task, evaluated | {"epoch": 1.0, "epoch_mm": 1.0})
    card: Any = ModelCard.load(folder / "README.md")
    assert [result.metric_type for result in card.data.eval_results] == ["accuracy", "accuracy_mm"]


def test_a_folder_holds_what_the_last_run_has_saved(run: Any, tmp_path: Path) -> None:
    files = own_files(tmp_path, {"text": TEXTS, "label": NAMES})
    for method in ("adaprune", "finetune", "adaprune"):
        out, _ = run("--method", method, "--do_train", "--max_steps", 2, *files)
        model = AutoModelForSequenceClassification.from_pretrained(out)
        assert hasattr(model, "peft_config") == (method == "adaprune")
