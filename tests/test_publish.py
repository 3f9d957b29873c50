"""Every door to the Hub pushes the adapter with its own card, whole or not at all; and opens it again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import load_base, logits_of, make_trainer
from hub_server import Account, HubServer
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from peft import AutoPeftModelForSequenceClassification, PeftModel
from tiny import train_masks
from transformers import AutoModelForSequenceClassification, TrainerCallback

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, write_model_card
from hf_adaprune.errors import AdapterNotFoundError, CardError, PushError
from hf_adaprune.hub.model_card import BEGIN, END
from hf_adaprune.hub.publish import push_adapter


# The client warns of its own way to send a file to LFS.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=:DeprecationWarning", "ignore:Already found a `peft_config` attribute:UserWarning"
)

NAME = "me/sst2"
ADAPTER = {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors", "sparsity.png"}


def card_of(hub: HubServer, name: str = NAME, revision: str = "main", path: str = "README.md") -> str:
    return hub.files(name, revision)[path].decode()


def scores_of(hub: HubServer) -> list[float]:
    card: Any = ModelCard(card_of(hub))
    return [result.metric_value for result in card.data.eval_results or []]


def plain(adapter: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(adapter)


def wrapped(adapter: Path) -> Any:
    return AutoPeftModelForSequenceClassification.from_pretrained(adapter)


def by_model(adapter: Path, **options: Any) -> None:
    plain(adapter).push_to_hub(NAME, **options)


def by_peft_model(adapter: Path, **options: Any) -> None:
    wrapped(adapter).push_to_hub(NAME, **options)


def by_saving(adapter: Path, **options: Any) -> None:
    plain(adapter).save_pretrained(adapter.parent / "again", push_to_hub=True, repo_id=NAME, **options)


def by_function(adapter: Path, **options: Any) -> None:
    push_adapter(adapter, NAME, **options)


Push = Callable[..., None]
every_push = pytest.mark.parametrize("push", [by_model, by_peft_model, by_saving, by_function])


@every_push
def test_the_adapters_own_card_is_pushed(push: Push, adapter_path: Path, tmp_path: Path, online: HubServer) -> None:
    push(Path(shutil.copytree(adapter_path, tmp_path / "adapter")))
    assert online.files(NAME).keys() == ADAPTER
    card: Any = ModelCard(card_of(online))
    assert f'from_pretrained("{NAME}")' in card.text
    assert f"\n# {NAME}\n" in card.text
    assert "50.0 % of each of the 12 masked matrices." in card.text
    assert "[More Information Needed]" not in card.text
    assert (card.data.library_name, card.data.pipeline_tag) == ("peft", "text-classification")
    assert str(tmp_path.parent) not in card_of(online), "nobody's folders are made known"
    assert [commit.title for commit in online.repos[NAME].at("main").history] == ["initial commit"]


@every_push
def test_what_people_have_written_on_the_hub_survives_the_next_push(
    push: Push, adapter_path: Path, tmp_path: Path, online: HubServer
) -> None:
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    push(adapter)
    card: Any = ModelCard(card_of(online))
    card.text = f"Read this first.\n{card.text}\nAnd this last.\n".replace("0.500", "0.999")
    card.data.license = "mit"
    HfApi().upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=str(card).encode())
    for folder in (tmp_path / "adapter", tmp_path / "again"):
        shutil.rmtree(folder, ignore_errors=True)
    push(Path(shutil.copytree(adapter_path, tmp_path / "adapter")))
    card = ModelCard(card_of(online))
    assert card.text.strip().startswith("Read this first.")
    assert card.text.strip().endswith("And this last.")
    assert "0.999" not in card.text
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    assert card.data.license == "mit"


@every_push
def test_scores_on_a_card_are_those_of_the_adapter_that_is_pushed(
    push: Push, adapter_path: Path, base_path: Path, tmp_path: Path, online: HubServer
) -> None:
    other = load_base(base_path)
    other.add_adapter(AdaPruneConfig(final_sparsity=0.9))
    train_masks(other)
    other.save_pretrained(tmp_path / "other")
    shutil.copytree(adapter_path, tmp_path / "adapter")
    write_model_card(tmp_path / "adapter", metrics={"accuracy": 0.5})
    push_adapter(tmp_path / "adapter", NAME)
    assert scores_of(online) == [0.5]
    push(tmp_path / "adapter")  # again
    assert scores_of(online) == [0.5]
    push(tmp_path / "other")
    assert scores_of(online) == []
    write_model_card(tmp_path / "other", metrics={"accuracy": 0.25})
    push_adapter(tmp_path / "other", NAME)
    assert scores_of(online) == [0.25]


def test_the_latest_metadata_are_pushed(adapter_path: Path, tmp_path: Path, online: HubServer) -> None:
    shutil.copytree(adapter_path, tmp_path / "adapter")
    for license_name in ("mit", "apache-2.0"):
        card: Any = write_model_card(tmp_path / "adapter")
        card.data.license = license_name
        card.save(tmp_path / "adapter" / "README.md")
        push_adapter(tmp_path / "adapter", NAME)
        pushed: Any = ModelCard(card_of(online))
        assert pushed.data.license == license_name


def test_a_card_on_the_hub_that_cannot_be_read_is_left_there(
    adapter_path: Path, tmp_path: Path, online: HubServer
) -> None:
    shutil.copytree(adapter_path, tmp_path / "adapter")
    HfApi().create_repo(NAME)
    broken = b"---\ntags: [a, b\n---\nMine\n"
    HfApi().upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=broken)
    before = (tmp_path / "adapter" / "README.md").read_bytes()
    with pytest.raises(CardError, match=f"card of '{NAME}' on the Hub must be valid YAML"):
        push_adapter(tmp_path / "adapter", NAME)
    assert (tmp_path / "adapter" / "README.md").read_bytes() == before
    assert online.files(NAME)["README.md"] == broken


@pytest.mark.parametrize("push", [by_saving, by_function])
def test_what_people_have_written_in_the_folder_is_what_is_pushed(
    push: Push, adapter_path: Path, tmp_path: Path, online: HubServer
) -> None:
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    folder = adapter if push is by_function else tmp_path / "again"
    push(adapter)
    with (folder / "README.md").open("a", encoding="utf-8") as card:
        card.write("\nWritten here.\n")
    push(adapter)
    assert card_of(online).rstrip().endswith("Written here.")
    assert (folder / "README.md").read_text(encoding="utf-8").rstrip().endswith("Written here.")


@every_push
def test_a_push_is_private_on_a_branch_or_a_pull_request(
    push: Push, adapter_path: Path, tmp_path: Path, online: HubServer
) -> None:
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    push(adapter, private=True, revision="v2")
    assert online.repos[NAME].private
    assert online.files(NAME).keys() == {".gitattributes"}
    assert online.files(NAME, "v2").keys() == ADAPTER
    with_note = card_of(online, revision="v2") + "\nOn the branch.\n"
    HfApi().upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=with_note.encode(), revision="v2")
    push(adapter, revision="v2")
    assert card_of(online, revision="v2").rstrip().endswith("On the branch.")
    push(adapter, create_pr=True)
    assert online.files(NAME, "refs/pr/1").keys() == ADAPTER
    assert online.files(NAME).keys() == {".gitattributes"}


@every_push
def test_a_push_that_is_refused_or_interrupted_changes_nothing(
    push: Push, adapter_path: Path, tmp_path: Path, online: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = Path(shutil.copytree(adapter_path, tmp_path / "adapter"))
    push(adapter)
    before = online.repos[NAME].at("main").oid
    model = plain(adapter)
    logits_of(model)  # an adapter that was changed before it was checked could not be saved
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(adapter)
    for request, status in (("/commit/", 0), ("/commit/", 500), ("/preupload/", 503)):
        # What comes before a commit is tried again by the client.
        online.fail_next(request, status=status, times=1 if "commit" in request else 6)
        with pytest.raises(Exception, match=r"disconnected|500|503"):
            push(adapter)
        online._failures.clear()
        assert online.repos[NAME].at("main").oid == before
    monkeypatch.setenv("HF_TOKEN", online.read_token)
    with pytest.raises(Exception, match="403"):
        push(adapter)
    assert online.repos[NAME].at("main").oid == before
    monkeypatch.setenv("HF_TOKEN", online.write_token)
    push(adapter)
    assert online.repos[NAME].at("main").oid != before


def test_a_full_disk_is_not_blamed_on_the_hub(
    adapter_path: Path, online: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hf_adaprune.hub.publish.write_model_card", fail)
    with pytest.raises(OSError, match="No space left") as caught:
        push_adapter(adapter_path, NAME)
    assert not isinstance(caught.value, PushError)


def test_several_adapters_are_pushed_each_with_its_card(adapter_path: Path, online: HubServer) -> None:
    model = wrapped(adapter_path)
    model.load_adapter(adapter_path, "second")
    model.push_to_hub(NAME)
    files = online.files(NAME)
    assert files.keys() == ADAPTER | {f"second/{path}" for path in ADAPTER - {".gitattributes"}}
    assert f'from_pretrained("{NAME}", adapter_kwargs={{"subfolder": "second"}})' in card_of(
        online, path="second/README.md"
    )
    noted = card_of(online, path="second/README.md") + "\nA note.\n"
    HfApi().upload_file(repo_id=NAME, path_in_repo="second/README.md", path_or_fileobj=noted.encode())
    model.push_to_hub(NAME)
    assert card_of(online, path="second/README.md").rstrip().endswith("A note.")
    scope: dict[str, Any] = {}
    exec(card_of(online, path="second/README.md").split("```python")[1].split("```")[0], scope)
    assert torch.equal(logits_of(scope["model"]), logits_of(model))


def test_no_empty_card_is_pushed_beside_adapters_in_subfolders(
    adapter_path: Path, base_path: Path, online: HubServer
) -> None:
    model = PeftModel.from_pretrained(load_base(base_path), adapter_path, adapter_name="sst2")
    model.push_to_hub(NAME)
    assert online.files(NAME).keys() == {".gitattributes", *(f"sst2/{path}" for path in ADAPTER - {".gitattributes"})}


# Opening


def hub_doors(base: Path) -> dict[str, Callable[..., Any]]:
    """Return the doors as they take a revision, a subfolder and a token."""

    def auto(name: str, subfolder: str | None = None, **hub: Any) -> Any:
        kwargs = {} if subfolder is None else {"subfolder": subfolder}
        return AutoModelForSequenceClassification.from_pretrained(name, adapter_kwargs={**hub, **kwargs})

    def load_adapter(name: str, **hub: Any) -> Any:
        model = load_base(base)
        model.load_adapter(name, adapter_kwargs=hub)
        return model

    return {
        "PeftModel": lambda name, **hub: PeftModel.from_pretrained(load_base(base), name, **hub),
        "AutoPeftModel": AutoPeftModelForSequenceClassification.from_pretrained,
        "load_adapter": load_adapter,
        "AutoModel": auto,
    }


@pytest.mark.parametrize("door", ["PeftModel", "AutoPeftModel", "load_adapter", "AutoModel"])
def test_an_adapter_is_opened_by_revision_subfolder_and_token_and_from_the_cache(
    door: str, base_path: Path, adapter_path: Path, online: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = HfApi()
    api.create_repo(NAME, private=True)
    api.create_branch(NAME, branch="v2")
    api.upload_folder(repo_id=NAME, folder_path=adapter_path, revision="v2")
    api.upload_folder(repo_id=NAME, folder_path=adapter_path, path_in_repo="a/b")
    wanted = logits_of(plain(adapter_path))
    opened = hub_doors(base_path)[door]
    assert torch.equal(logits_of(opened(NAME, revision="v2")), wanted)
    if door != "AutoPeftModel":  # PEFT looks for the base in the subfolder too
        assert torch.equal(logits_of(opened(NAME, subfolder="a/b")), wanted)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert torch.equal(logits_of(opened(NAME, revision="v2", token=online.read_token)), wanted)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read by PEFT when it is asked, by the client when it is imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(opened(NAME, revision="v2")), wanted)


def test_a_stranger_is_told_that_there_is_no_such_adapter(
    base_path: Path, adapter_path: Path, tmp_path: Path, online: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    push_adapter(shutil.copytree(adapter_path, tmp_path / "adapter"), NAME, private=True)
    online.tokens["hf_other"] = Account("other", "write")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    for opened in hub_doors(base_path).values():
        with pytest.raises((ValueError, OSError), match=NAME):
            opened(NAME)


# The Trainer


def train_and_push(base: Path, folder: Path, **options: Any) -> Any:
    pushing = {"push_to_hub": True, "hub_model_id": "sst2", "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(load_base(base), folder, AdaPruneCallback, **{**pushing, **options})
    trainer.train()
    trainer._finish_current_push()
    return trainer


def test_the_trainer_pushes_the_adapter_and_its_card_while_it_trains(
    base_path: Path, tmp_path: Path, online: HubServer
) -> None:
    trainer = train_and_push(base_path, tmp_path / "run", hub_private_repo=True, hub_always_push=True)
    repo = online.repos[NAME]
    assert repo.private
    pushed = [commit for commit in (repo.at("main"), *repo.at("main").history) if "step" in commit.title]
    assert {commit.title for commit in pushed} == {"Training in progress, step 2", "Training in progress, step 4"}
    for commit in pushed:
        assert commit.files.keys() >= {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert "model.safetensors" not in commit.files
        card = commit.files["README.md"].data.decode()
        assert f'from_pretrained("{NAME}")' in card
        assert "masked weights are pruned" in card
    opened = AutoModelForSequenceClassification.from_pretrained(NAME)
    assert torch.equal(logits_of(opened), logits_of(trainer.model))


def test_a_run_goes_on_from_the_checkpoint_that_it_has_pushed(
    base_path: Path, tmp_path: Path, online: HubServer
) -> None:
    whole = train_and_push(base_path, tmp_path / "run", hub_strategy="checkpoint", hub_always_push=True, save_steps=3)
    assert "model.safetensors" not in online.files(NAME)
    snapshot_download(NAME, local_dir=tmp_path / "pulled")
    resumed = make_trainer(load_base(base_path), tmp_path / "pulled", AdaPruneCallback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "pulled" / "last-checkpoint"))
    assert torch.equal(logits_of(resumed.model), logits_of(whole.model))


def test_the_trainers_last_push_has_one_card_with_what_the_trainer_tells(
    base_path: Path, tmp_path: Path, online: HubServer
) -> None:
    trainer = train_and_push(base_path, tmp_path / "run", save_strategy="no")
    for learning_rate in ("5e-05", "0.125"):
        trainer.args.learning_rate = float(learning_rate)
        trainer.push_to_hub(tasks="text-classification", dataset_tags="custom", dataset="reviews")
        card: Any = ModelCard(card_of(online))
        assert f'from_pretrained("{NAME}")' in card.text
        assert f"\n# {NAME}\n" in card.text
        assert "50.0 % of each of the 12 masked matrices." in card.text
        assert f"- learning_rate: {learning_rate}" in card.text
        assert "More information needed" not in card.text
        assert card.text.count(BEGIN) == card.text.count("## Training procedure") == 1
        assert (card.data.library_name, card.data.datasets) == ("peft", ["custom"])
        assert "generated_from_trainer" in card.data.tags


def test_what_people_have_written_survives_the_trainer(base_path: Path, tmp_path: Path, online: HubServer) -> None:
    trainer = train_and_push(base_path, tmp_path / "run")
    trainer.push_to_hub()
    path = tmp_path / "run" / "README.md"
    card: Any = ModelCard.load(path)
    card.text, card.data.license = f"Read this first.\n{card.text}\nAnd this last.\n", "mit"
    card.save(path)
    trainer.push_to_hub()
    resumed = make_trainer(
        load_base(base_path), tmp_path / "run", AdaPruneCallback, max_steps=8, push_to_hub=True, hub_model_id="sst2"
    )
    resumed.train()
    resumed.push_to_hub()
    card = ModelCard(card_of(online))
    assert card.text.strip().startswith("Read this first.")
    assert card.text.strip().endswith("And this last.")
    assert card.text.count(BEGIN) == card.text.count("## Training procedure") == 1
    assert card.data.license == "mit"
    # What is written on the Hub too, by a run that starts in an empty folder.
    noted = card_of(online).replace("And this last.", "And this at the very last.")
    HfApi().upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=noted.encode())
    train_and_push(base_path, tmp_path / "fresh").push_to_hub()
    assert card_of(online).rstrip().endswith("And this at the very last.")


@pytest.mark.parametrize("name", ["me/other", "nowhere"])
def test_only_a_folder_is_pushed(name: str, adapter_path: Path, online: HubServer) -> None:
    push_adapter(adapter_path, "me/other")
    with pytest.raises(AdapterNotFoundError, match=f"There is no folder '{name}'"):
        push_adapter(name, NAME)
    assert NAME not in online.repos


@pytest.mark.parametrize("where", ["on the Hub", "in the folder"])
def test_a_card_that_cannot_be_read_does_not_stop_training(
    where: str, base_path: Path, tmp_path: Path, online: HubServer
) -> None:
    class Break(TrainerCallback):
        def on_step_begin(self, args: Any, *others: Any, **kwargs: Any) -> None:
            if where == "on the Hub":
                broken = b"---\nlicense: [mit\n---\n"
                HfApi().upload_file(repo_id=NAME, path_in_repo="README.md", path_or_fileobj=broken)
            else:
                Path(args.output_dir, "README.md").write_bytes(b"\xff\xfe")

    HfApi().create_repo(NAME)
    pushing: dict[str, Any] = {"push_to_hub": True, "hub_model_id": NAME, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(load_base(base_path), tmp_path, Break(), AdaPruneCallback, **pushing)
    trainer.train()
    assert trainer.state.global_step == 4
