"""The command line: what it prints for people and for programs, and its exit codes."""

from __future__ import annotations

import json
import re
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.utils.hub
from datasets import Dataset
from doors import DOORS, TEXTS, load_base, logits_of, save_base, train
from hub_server import HubServer
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, get_peft_model
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file, save_file
from tiny import HEADS, make_model, save_model, train_masks
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner, Result

from hf_adaprune import Pruner, compact, measure_speed, sparsity_report
from hf_adaprune.analysis import load_masks
from hf_adaprune.cli import app
from hf_adaprune.cli.answer import Answer, answering
from hf_adaprune.config import AdaPruneConfig
from hf_adaprune.deploy import plain_models
from hf_adaprune.hub.advice import speed_advice
from hf_adaprune.hub.model_card import write_model_card


# The client warns of its own way to send a file to LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = "adapter_model.safetensors"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> dict[str, Any]:
    """Run a command with `--json`; return what it prints, which is all that it prints."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(code: int, error: str, *arguments: object) -> str:
    """Run a command that fails, both ways; return its message."""
    result = run(*arguments, "--json")
    reason = json.loads(result.stderr.splitlines()[-1])
    assert (result.exit_code, reason["exit_code"], reason["error"], result.stdout) == (code, code, error, "")
    plain = run(*arguments)
    assert plain.exit_code == code
    assert f"error: {reason['message']}" in plain.stderr
    assert not plain.stdout
    return reason["message"]


@pytest.fixture
def adapter(adapter_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(adapter_path, tmp_path / "sst2"))


def test_inspect_tells_what_is_pruned(adapter: Path, base_path: Path) -> None:
    config = AdaPruneConfig.from_pretrained(str(adapter))
    report = sparsity_report(config)
    told = answer("inspect", adapter)
    assert told["base"] == str(base_path)
    assert told["architecture"] == "BertForSequenceClassification"
    assert (told["base_fingerprint"], told["adapter_fingerprint"]) == (
        config.base_fingerprint,
        config.adapter_fingerprint,
    )
    assert told["bytes"] == (adapter / WEIGHTS).stat().st_size
    masks = [tensor for key, tensor in load_file(adapter / WEIGHTS).items() if "adaprune_mask" in key]
    assert told["mask_bytes"] == sum(mask.nbytes for mask in masks)
    assert told["weights_pruned"] == sum(
        mask.numel() * 8 - sum(int(byte).bit_count() for byte in mask) for mask in masks
    )
    assert (told["sparsity"], told["sparsity_whole_model"]) == (report.sparsity, report.sparsity_whole_model)
    assert (told["components"], told["layers"]) == (report.by_component(), report.by_layer())
    assert len(told["modules"]) == 12
    shown = run("inspect", adapter)
    assert shown.exit_code == 0
    unfolded = "".join(shown.stdout.split())
    for text in ("query", "50.0", config.base_fingerprint):
        assert str(text) in unfolded
    # In a terminal of 80 columns nothing is cut off.
    assert "…" not in shown.stdout
    assert shown.stdout.count("50.0") >= 12


def test_inspect_tells_how_an_adapter_was_trained_and_names_as_they_are(adapter: Path) -> None:
    assert answer("inspect", adapter)["training"]["num_examples"] == 16
    path = adapter / CONFIG_NAME
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored |= {"training": {"seed": 7, "optim": "[/bold]"}, "base_model_name_or_path": "runs/[red]base"}
    path.write_text(json.dumps(stored), encoding="utf-8")
    assert answer("inspect", adapter)["training"] == stored["training"]
    shown = run("inspect", adapter).stdout
    for text in ("seed", "[/bold]", "runs/[red]base"):
        assert text in shown


def test_what_a_machine_cannot_do_is_refused_in_words(adapter: Path, tmp_path: Path) -> None:
    assert "The model cannot be moved to 'nowhere' here" in refusal(
        1, "HardwareError", "speed", adapter, "--device", "nowhere"
    )
    copy = shutil.copytree(adapter, tmp_path / "copy")
    figure = copy / WEIGHTS / "overlap.png"
    assert WEIGHTS in refusal(1, "FileExistsError", "compare", adapter, copy, "--figure", figure)


def test_a_folder_without_an_adapter_is_told_as_such(tmp_path: Path) -> None:
    assert "it has no adapter_config.json" in refusal(3, "AdapterNotFoundError", "inspect", tmp_path)


def test_what_succeeds_says_nothing_on_stderr(adapter: Path) -> None:
    verified = run("verify", adapter)
    assert verified.exit_code == 0
    assert not verified.stderr
    assert "True" in verified.stdout


def test_a_connection_that_breaks_is_told_as_such(adapter: Path, online: HubServer) -> None:
    answer("push", adapter, "me/sst2")
    online.fail_next(WEIGHTS, times=20)
    assert "could not be fetched" in refusal(3, "AdapterNotFoundError", "inspect", "me/sst2")


def test_inspect_reads_headers_only(adapter: Path, online: HubServer) -> None:
    assert answer("push", adapter, "me/sst2")["url"].startswith(online.url)
    online.requests.clear()
    told = answer("inspect", "me/sst2")
    assert told["bytes"] == (adapter / WEIGHTS).stat().st_size
    assert told["sparsity"] == answer("inspect", adapter)["sparsity"]
    fetched = [line for line in online.requests if line[0] == "GET" and line[1].endswith(WEIGHTS)]
    assert len(fetched) == 1
    assert not list(Path(constants.HF_HUB_CACHE).rglob(WEIGHTS))
    # What the cache holds is not asked for again.
    DOORS["AutoPeftModelForSequenceClassification"]("", "me/sst2")
    online.requests.clear()
    assert answer("inspect", "me/sst2") == told
    assert not [line for line in online.requests if line[1].endswith(WEIGHTS)]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_parameters", None, "lacks the `num_parameters`"),
        ("labels_fingerprint", "0", "labels in `model_config` are not those that were saved"),
        ("scope", "layer", "`scope` must be one of"),
        ("granularity", "neuron", "does not fit `group_counts`"),
    ],
)
def test_a_damaged_configuration_is_a_damaged_adapter(field: str, value: Any, said: str, adapter: Path) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert said in refusal(4, "AdapterFileError", "inspect", adapter)


def test_verify_says_yes_to_a_copy_of_the_base_and_no_to_another(
    adapter: Path, base_path: Path, tmp_path: Path
) -> None:
    told = answer("verify", adapter)
    assert (told["fits"], told["base"]) == (True, str(base_path))
    AutoModel.from_pretrained(base_path, dtype=torch.bfloat16).save_pretrained(tmp_path / "copy")
    assert answer("verify", adapter, "--base", tmp_path / "copy")["fits"] is True
    make_model("bert", "none", seed=1).save_pretrained(tmp_path / "other")
    said = refusal(5, "BaseMismatchError", "verify", adapter, "--base", tmp_path / "other")
    assert "made for other weights" in said


@pytest.mark.filterwarnings("ignore:The masks of adapter 'default' were made on a base in bfloat16:UserWarning")
def test_verify_does_not_say_yes_to_what_it_cannot_tell(base_path: Path, tmp_path: Path) -> None:
    for name in ("bfloat16", "float16"):
        AutoModel.from_pretrained(base_path, dtype=getattr(torch, name)).save_pretrained(tmp_path / name)
    get_peft_model(load_base(tmp_path / "bfloat16"), AdaPruneConfig()).save_pretrained(str(tmp_path / "adapter"))
    for base in (tmp_path / "bfloat16", base_path):
        assert answer("verify", tmp_path / "adapter", "--base", base)["fits"] is True
    said = refusal(5, "BaseMismatchError", "verify", tmp_path / "adapter", "--base", tmp_path / "float16")
    assert "cannot be compared" in said


def test_verify_finds_a_single_wrong_bit(adapter: Path) -> None:
    tensors = load_file(adapter / WEIGHTS)
    tensors[min(key for key in tensors if "adaprune_mask" in key)][0] ^= 1
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    assert "not those that were saved" in refusal(4, "AdapterFileError", "verify", adapter)


def test_merge_writes_what_plain_transformers_opens(adapter: Path, base_path: Path, tmp_path: Path) -> None:
    told = answer("merge", adapter, tmp_path / "a" / "merged")
    assert told["bytes"] > 50_000
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "a" / "merged")
    assert not getattr(plain, "peft_config", None)
    assert plain.config.id2label[2] == "name of 2"
    masked = DOORS["AutoModelForSequenceClassification"](str(base_path), str(adapter))
    assert torch.equal(logits_of(plain), logits_of(masked))
    tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base_path, tmp_path / "a" / "merged")]
    assert tokenizers[0](TEXTS).input_ids == tokenizers[1](TEXTS).input_ids
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"merged"}


def test_merge_overwrites_nothing_and_leaves_nothing_half_done(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    assert run("merge", adapter, tmp_path / "full").exit_code == 2
    make_model("bert", "none", seed=1).save_pretrained(tmp_path / "other")
    refusal(5, "BaseMismatchError", "merge", adapter, tmp_path / "out", "--base", tmp_path / "other")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.tmp").exists()


def test_merge_fills_an_empty_folder_that_is_the_current_one_or_a_link(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    monkeypatch.chdir(tmp_path / "here")
    for folder, output in (("here", "."), ("target", tmp_path / "link")):
        answer("merge", adapter, output)
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
        assert not [path for path in (tmp_path / folder).iterdir() if path.is_dir()]
    assert Path.cwd() == tmp_path / "here"


def test_a_tokenizer_is_not_invented(tmp_path: Path) -> None:
    model = get_peft_model(load_base(save_model(tmp_path / "base", head="none")), AdaPruneConfig())
    model.save_pretrained(str(tmp_path / "adapter"))
    answer("merge", tmp_path / "adapter", tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("tokenizer*"))
    data = tmp_path / "data.csv"
    data.write_text("sentence,label\nw7 w8,0\nw9,1\n")
    arguments = "eval", tmp_path / "adapter", "--task", "sst2", "--data", data
    assert "has a tokenizer" in refusal(3, "AdapterNotFoundError", *arguments)


def test_merge_refuses_a_head_that_plain_transformers_lacks(base_path: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(base_path)
    get_peft_model(model, AdaPruneConfig(head="layer_average")).save_pretrained(str(tmp_path / "adapter"))
    assert "layer_average" in refusal(1, "MergeError", "merge", tmp_path / "adapter", tmp_path / "out")


@pytest.fixture(scope="module")
def group_adapter(base_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("groups")
    model = get_peft_model(load_base(base_path), AdaPruneConfig(granularity="neuron"))
    Pruner(model, 1).step()
    model.save_pretrained(folder)
    write_model_card(folder, metrics={"accuracy": 0.75}, dataset="some/data", picture=False)
    return folder


def test_export_writes_the_smaller_model_with_tokenizer_and_scores(group_adapter: Path, tmp_path: Path) -> None:
    told = answer("export", group_adapter, tmp_path / "small")
    masked = DOORS["AutoModelForSequenceClassification"]("", str(group_adapter))
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert small.config.intermediate_size == 20
    assert told["parameters"] == small.num_parameters() < masked.num_parameters()
    torch.testing.assert_close(logits_of(small), logits_of(masked), rtol=0, atol=1e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "small")("w7")["input_ids"] == [2, 7, 3]
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert [(score.metric_type, score.metric_value) for score in card.data.eval_results] == [("accuracy", 0.75)]
    assert "\n# small\n" in card.text
    assert {path.name for path in tmp_path.iterdir()} == {"small"}


def test_export_as_onnx_merges_masks_of_weights_and_takes_groups_out(
    adapter: Path, group_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def export(model: Any, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"onnx")

    monkeypatch.setattr(plain_models, "export_onnx", export)
    whole = answer("export", adapter, tmp_path / "merged", "--onnx")
    small = answer("export", group_adapter, tmp_path / "small", "--onnx")
    assert whole["parameters"] == make_model().num_parameters() > small["parameters"]
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"model.onnx", "tokenizer_config.json"} <= names
    assert "model.safetensors" not in names


def test_export_refuses_what_it_cannot_make_smaller(adapter: Path, group_adapter: Path, tmp_path: Path) -> None:
    assert "nothing to remove" in refusal(1, "CompactionError", "export", adapter, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    assert run("export", group_adapter, tmp_path / "full").exit_code == 2


def test_speed_measures_every_size_and_says_what_to_expect(group_adapter: Path) -> None:
    sizes = ("--length", "3", "--length", "5", "--repeats", "2", "--threads", "1", "--device", "cpu")
    told = answer("speed", group_adapter, *sizes)
    measured = [(row["batch_size"], row["length"], row["form"]) for row in told["measured"]]
    assert measured == [(1, length, form) for length in (3, 5) for form in ("base", "merged", "compacted")]
    assert told["scores"] == {"accuracy": 0.75}
    assert told["conclusion"][-1] == speed_advice(AdaPruneConfig(granularity="neuron"))
    shown = " ".join(run("speed", group_adapter, *sizes).stdout.split())
    for text in ("times as fast", "At batch 1 and length 5 on 1 CPU thread(s): merged is", "accuracy 0.75"):
        assert text in shown


def test_speed_refuses_sizes_that_the_model_lacks(adapter: Path) -> None:
    assert "between 1 and 32" in refusal(1, "SizeError", "speed", adapter, "--length", "33", "--device", "cpu")
    assert run("speed", adapter, "--repeats", "1").exit_code == 2
    refusal(3, "AdapterNotFoundError", "speed", adapter / "nowhere")


def test_compare_measures_against_chance(adapter: Path, base_path: Path, tmp_path: Path) -> None:
    train(base_path, tmp_path / "run", "instance").model.save_pretrained(tmp_path / "other")
    names = [str(adapter), str(tmp_path / "other")]
    masks = [torch.cat([mask.flatten() for mask in load_masks(name).values()]) for name in names]
    told = answer("compare", *names, "--figure", tmp_path / "overlap.png")
    (pair,) = told["pairs"]
    assert pair["names"] == names
    assert pair["agreement"] == pytest.approx(float((masks[0] == masks[1]).float().mean()))
    assert pair["jaccard"] == pytest.approx(float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum()))
    assert pair["chance_agreement"] == pytest.approx(0.5 * 0.4 + 0.5 * 0.6, abs=1e-3)
    assert (len(pair["components"]), len(pair["layers"])) == (6, 2)
    assert (tmp_path / "overlap.png").stat().st_size > 1000
    assert f"{pair['kappa']:.3f}" in run("compare", *names).stdout


def test_compare_refuses_what_cannot_be_compared(adapter: Path, base_path: Path, tmp_path: Path) -> None:
    assert run("compare", adapter).exit_code == 2
    assert run("compare", adapter, adapter).exit_code == 2
    assert run("compare", adapter, tmp_path, "--figure", tmp_path / "overlap.txt").exit_code == 2
    other = load_base(base_path)
    part = get_peft_model(other, AdaPruneConfig(target_modules=["query"]))
    part.save_pretrained(str(tmp_path / "part"))
    assert "over other modules" in refusal(5, "BaseMismatchError", "compare", adapter, tmp_path / "part")
    make_model("bert", "none", seed=1).save_pretrained(tmp_path / "base")
    get_peft_model(load_base(tmp_path / "base"), AdaPruneConfig()).save_pretrained(str(tmp_path / "other"))
    assert "of another base" in refusal(5, "BaseMismatchError", "compare", adapter, tmp_path / "other")


def test_push_is_one_commit_of_the_adapter_and_its_card(adapter: Path, online: HubServer) -> None:
    scores = ("training_state.safetensors", "model.safetensors")
    for left in ("training_args.bin", "README.tmp", "checkpoint-1/optimizer.pt", *scores):
        (adapter / left).parent.mkdir(exist_ok=True)
        (adapter / left).write_bytes(b"left")
    told = answer("push", adapter, "me/sst2", "--private", "--message", "Masks")
    repo = online.repos["me/sst2"]
    assert repo.private
    assert [commit.title for commit in repo.at("main").history] == ["initial commit"]
    assert (repo.at("main").title, repo.at("main").oid) == ("Masks", told["commit"])
    assert online.files("me/sst2").keys() == {
        *(".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "sparsity.png")
    }
    card = online.files("me/sst2")["README.md"].decode()
    assert '.from_pretrained("me/sst2")' in card


def test_push_goes_to_a_branch_or_a_pull_request(adapter: Path, online: HubServer) -> None:
    answer("push", adapter, "me/sst2", "--revision", "v2")
    assert online.files("me/sst2").keys() == {".gitattributes"}
    assert WEIGHTS in online.files("me/sst2", "v2")
    assert "/discussions/1" in answer("push", adapter, "me/sst2", "--create-pr")["url"]
    assert online.files("me/sst2").keys() == {".gitattributes"}
    assert answer("inspect", "me/sst2", "--revision", "v2") == answer("inspect", "me/sst2", "--revision", "refs/pr/1")


def test_a_push_that_is_refused_or_interrupted_changes_nothing(
    adapter: Path, online: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("push", adapter, "me/sst2")
    before = online.repos["me/sst2"].at("main").oid
    with (adapter / "README.md").open("a") as card:
        card.write("Something new.\n")
    online.fail_next("/commit/", times=2)
    refusal(6, "PushError", "push", adapter, "me/sst2")
    online.fail_next("/commit/", status=500, times=2)
    refusal(6, "PushError", "push", adapter, "me/sst2")
    monkeypatch.setenv("HF_TOKEN", online.read_token)
    assert "403" in refusal(6, "PushError", "push", adapter, "me/sst2")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refusal(6, "PushError", "push", adapter, "me/sst2")
    assert online.repos["me/sst2"].at("main").oid == before
    monkeypatch.setenv("HF_TOKEN", online.write_token)
    answer("push", adapter, "me/sst2")
    assert b"Something new." in online.files("me/sst2")["README.md"]


def test_a_damaged_adapter_is_not_pushed(adapter: Path, online: HubServer) -> None:
    path = adapter / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    refusal(4, "AdapterFileError", "push", adapter, "me/sst2")
    assert not online.repos


def test_before_anything_is_created_on_the_hub_the_card_is_read(adapter: Path, online: HubServer) -> None:
    (adapter / "README.md").write_text("---\nlicense: [mit\n---\nMine.\n", encoding="utf-8")
    assert "must be valid YAML" in refusal(1, "CardError", "push", adapter, "me/sst2")
    assert not online.repos


def test_eval_scores_as_a_plain_loop_does(adapter: Path, base_path: Path, tmp_path: Path) -> None:
    rows = [{"premise": text, "hypothesis": TEXTS[0], "label": number % 3} for number, text in enumerate(TEXTS * 3)]
    (tmp_path / "mnli").mkdir()
    path = tmp_path / "mnli" / "validation.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = answer("eval", adapter, "--task", "mnli", "--data", path, "--batch-size", "2")
    model = DOORS["AutoPeftModelForSequenceClassification"](str(base_path), str(adapter)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base_path)
    right = 0
    for row in rows:
        tokens = tokenizer(row["premise"], row["hypothesis"], return_tensors="pt")
        right += int(model(**tokens).logits.argmax()) == row["label"]
    assert (told["examples"], told["scores"]) == (9, {"accuracy": right / 9})
    shown = run("eval", adapter, "--task", "mnli", "--data", path)
    assert f"{right / 9:.4f}" in shown.stdout


@pytest.mark.parametrize(
    ("task", "row", "said"),
    [
        ("sst3", {}, "must be one of .*got 'sst3'"),
        ("sst2", {"text": "w7", "label": 1}, r"\['sentence'\] are missing from the data of sst2"),
        ("sst2", {"sentence": "w7", "label": 5}, r"labels of sst2 are \[5\]"),
        (
            "sst2",
            {"sentence": "w7", "label": "good"},
            r"labels of sst2 are \['good'\], those of the model \['name of 0'",
        ),
        (
            "sst2",
            {"sentence": 7, "label": 1},
            r"columns .* of sst2 must be texts, got \['int64'\]",
        ),
        ("sst2", {"sentence": ["w7"], "label": 1}, r"must be texts, got \['list'\]"),
        ("sst2", {"sentence": "w7", "label": [1]}, "`label` in the data of sst2 must be a name or a number per row"),
        (
            "stsb",
            {"sentence1": "w7", "sentence2": "w8", "label": "high"},
            "`label` in the data of stsb must be a number per row, got string",
        ),
        ("sst2", {"sentence": "w7", "label": -1}, "no labels to score against"),
        ("sst2", {"sentence": "w7", "label": 1}, "sst2 has 2 labels, the model 3"),
        ("stsb", {"sentence1": "w7", "sentence2": "w8", "label": 0.5}, "stsb needs a head of one output, got 3"),
    ],
)
def test_eval_refuses_what_it_cannot_score(
    task: str, row: dict[str, Any], said: str, adapter: Path, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    message = refusal(3, "TaskError", "eval", adapter, "--task", task, "--data", path)
    assert re.search(said, message), message


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("token", {"num_labels": 2}, "needs a model for sequence classification"),
        ("question", {}, "needs a model for sequence classification"),
        ("none", {"num_labels": 2}, "needs a model for sequence classification"),
        ("sequence", {"num_labels": 2, "problem_type": "multi_label_classification"}, "has one label per example"),
    ],
)
def test_eval_refuses_an_adapter_for_another_kind_of_task(
    kind: str, options: dict[str, Any], said: str, base_path: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_path, tmp_path / "base")  # for its tokenizer
    save_model(tmp_path / "base", "bert", kind, **options)
    model: Any = get_peft_model(HEADS[kind].from_pretrained(tmp_path / "base"), AdaPruneConfig())
    model.save_pretrained(str(tmp_path / "adapter"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"sentence": "w7", "label": 1}) + "\n")
    assert said in refusal(3, "TaskError", "eval", tmp_path / "adapter", "--task", "sst2", "--data", path)


def test_eval_refuses_a_file_without_examples(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("sentence,label\n")
    assert "no examples" in refusal(3, "TaskError", "eval", adapter, "--task", "sst2", "--data", path)


def test_eval_cuts_texts_to_what_the_model_has_positions_for(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"premise": "w7 " * 100, "hypothesis": "w7", "label": 1}) + "\n")
    told = answer("eval", adapter, "--task", "mnli", "--data", path, "--max-length", 200)
    assert told["examples"] == 1


def test_eval_finds_the_matched_split_in_a_folder(adapter: Path, tmp_path: Path) -> None:
    row = {"premise": ["w7 w8"], "hypothesis": ["w7"], "label": [1]}
    Dataset.from_dict(row).to_parquet(tmp_path / "validation_matched.parquet")
    assert answer("eval", adapter, "--task", "mnli", "--data", tmp_path)["examples"] == 1
    message = refusal(3, "TaskError", "eval", adapter, "--task", "mnli", "--data", tmp_path, "--max-length", 3)
    assert "must leave room for text beside the special tokens, got 3" in message


def test_a_base_of_another_kind_is_another_base(adapter: Path, tmp_path: Path) -> None:
    other = save_model(tmp_path / "other", "distilbert", "none")
    said = refusal(5, "BaseMismatchError", "verify", adapter, "--base", other)
    assert "must be a BertForSequenceClassification" in said


def test_an_adapter_over_a_smaller_model_is_opened_like_any_other(group_adapter: Path, tmp_path: Path) -> None:
    compact(AutoModelForSequenceClassification.from_pretrained(group_adapter)).save_pretrained(tmp_path / "small")
    small = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    small.add_adapter(AdaPruneConfig())
    train_masks(small)
    small.save_pretrained(tmp_path / "second")
    assert answer("verify", tmp_path / "second")["fits"] is True


def test_what_is_no_adapter_of_ours_is_told_apart(adapter: Path, tmp_path: Path, online: HubServer) -> None:
    assert "404" in refusal(3, "AdapterNotFoundError", "inspect", "me/nothing")
    refusal(3, "AdapterNotFoundError", "inspect", tmp_path)
    get_peft_model(make_model(), LoraConfig(target_modules=["query"])).save_pretrained(str(tmp_path / "lora"))
    assert "another method, LORA" in refusal(4, "AdapterFileError", "inspect", tmp_path / "lora")
    AdaPruneConfig().save_pretrained(str(tmp_path / "fresh"))
    assert "never saved" in refusal(4, "AdapterFileError", "verify", tmp_path / "fresh")
    (adapter / "adapter_config.json").write_text("{")
    assert "not a valid adapter configuration" in refusal(4, "AdapterFileError", "inspect", adapter)


def test_a_base_that_is_out_of_reach_is_named(adapter: Path, base_path: Path, tmp_path: Path) -> None:
    said = refusal(3, "AdapterNotFoundError", "verify", adapter, "--base", tmp_path / "nowhere")
    assert "nowhere" in said
    save_base(tmp_path / "base")
    assert answer("verify", adapter, "--base", tmp_path / "base")["fits"]


def test_without_a_network_the_cache_is_used(
    adapter: Path, online: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer("push", adapter, "me/sst2")
    assert answer("verify", "me/sst2")["fits"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert answer("inspect", "me/sst2")["mask_bytes"] > 0
    assert answer("verify", "me/sst2")["fits"]
    assert "connection" in refusal(3, "AdapterNotFoundError", "inspect", "me/unknown")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    nowhere = "http://127.0.0.1:9"
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(online.url, nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    assert answer("verify", "me/sst2")["fits"]
    assert "connection" in refusal(3, "AdapterNotFoundError", "inspect", "me/unknown")


def test_exit_codes_are_told() -> None:
    shown = run("--help")
    assert shown.exit_code == 0
    assert "5 wrong base" in " ".join(shown.stdout.split())
    assert run("inspect").exit_code == 2
    assert run("inspect", "x", "--jsn").exit_code == 2


def test_only_the_answer_is_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    @answering
    def talkative(as_json: bool) -> Answer:
        sys.stdout.write("a library says something\n")
        return Answer({"a": float("nan")}, [])

    talkative(as_json=True)
    assert json.loads(capsys.readouterr().out) == {"a": None}


def test_options_reach_what_they_are_for(
    adapter: Path, base_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((adapter / CONFIG_NAME).read_text())
    (adapter / CONFIG_NAME).write_text(json.dumps(config | {"base_model_name_or_path": "nowhere/base"}))
    folder = Path(shutil.move(adapter, tmp_path / "all" / "sub")).parent
    where = [folder, "--subfolder", "sub", "--base", base_path]
    Dataset.from_dict({"premise": TEXTS, "hypothesis": TEXTS, "label": [0] * len(TEXTS)}).to_parquet(
        tmp_path / "train.parquet"
    )
    told = answer("eval", *where, "--task", "mnli", "--split", "train", "--data", tmp_path)
    assert (told["split"], told["examples"]) == ("train", len(TEXTS))
    asked: dict[str, Any] = {}

    def measure(model: Any, **options: Any) -> list[Any]:
        asked.update(options, dtype=model.dtype)
        return measure_speed(model, lengths=[4], repeats=2)

    monkeypatch.setattr(import_module("hf_adaprune.cli.app"), "measure_speed", measure)
    sizes = ["--batch-size", 2, "--batch-size", 3, "--length", 9, "--repeats", 4, "--threads", 1]
    answer("speed", *where, *sizes, "--bf16", "--onnx")
    assert asked == {
        **{"batch_sizes": [2, 3], "lengths": [9], "repeats": 4, "num_threads": 1},
        **{"onnx": True, "dtype": torch.bfloat16},
    }
