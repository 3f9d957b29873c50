from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import Account, HubServer
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# The client warns of its own way to send a file to LFS.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": bytes(range(256)) * 300,
    "notes/a b#é.txt": b"quoted",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with HubServer() as server:
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.url, token=hub.write_token)


@pytest.fixture
def repo(api: HfApi, tmp_path: Path) -> str:
    """Create a model repository that holds `FILES`."""
    for path, data in FILES.items():
        (tmp_path / "up" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / path).write_bytes(data)
    api.create_repo("me/model")
    api.upload_folder(repo_id="me/model", folder_path=tmp_path / "up")
    return "me/model"


def read(api: HfApi, repo: str, path: str, cache: Path, revision: str | None = None) -> bytes:
    return Path(api.hf_hub_download(repo, path, revision=revision, cache_dir=cache)).read_bytes()


def test_uploaded_folder_downloads_byte_for_byte(api: HfApi, repo: str, tmp_path: Path) -> None:
    folder = Path(api.snapshot_download(repo, cache_dir=tmp_path / "cache"))
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: data for path, data in found.items() if path != ".gitattributes"} == FILES


def test_weights_go_through_lfs_and_are_sent_once(hub: HubServer, api: HfApi, repo: str) -> None:
    api.upload_file(repo_id=repo, path_in_repo="copy.safetensors", path_or_fileobj=FILES["adapter_model.safetensors"])
    assert [method for method, path in hub.requests if "lfs-upload" in path] == ["PUT"]
    weights, note = api.list_repo_tree(repo, recursive=True), api.list_repo_tree(repo, "notes")
    assert {it.path for it in weights if getattr(it, "lfs", None)} == {"adapter_model.safetensors", "copy.safetensors"}
    assert [it.path for it in note] == ["notes/a b#é.txt"]


def test_second_download_comes_from_the_cache(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    read(api, repo, "adapter_config.json", tmp_path / "cache")
    read(api, repo, "adapter_config.json", tmp_path / "cache")
    assert sum(method == "GET" and "/resolve/" in path for method, path in hub.requests) == 1


def test_unknown_names_raise_what_the_hub_makes_them_raise(api: HfApi, repo: str, tmp_path: Path) -> None:
    with pytest.raises(EntryNotFoundError):
        read(api, repo, "missing.txt", tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "additional_chat_templates"))
    with pytest.raises(RevisionNotFoundError):
        read(api, repo, "adapter_config.json", tmp_path, revision="nowhere")
    with pytest.raises(RepositoryNotFoundError):
        read(api, "me/missing", "adapter_config.json", tmp_path)
    assert api.file_exists(repo, "adapter_config.json")
    assert not api.file_exists(repo, "missing.txt")
    assert not api.repo_exists("bert-base-uncased")


def test_private_repository_is_invisible_to_others(hub: HubServer, api: HfApi) -> None:
    hub.tokens["hf_other"] = Account("other", "write")
    api.create_repo("me/secret", private=True)
    assert HfApi(endpoint=hub.url, token=hub.read_token).model_info("me/secret").private
    for token, status in ((False, 401), ("hf_other", 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            HfApi(endpoint=hub.url, token=token).model_info("me/secret")
        assert error.value.response.status_code == status


def test_read_token_is_refused_where_it_would_write(hub: HubServer, repo: str) -> None:
    reader = HfApi(endpoint=hub.url, token=hub.read_token)
    assert reader.whoami()["auth"]["accessToken"]["role"] == "read"
    before = hub.files(repo)
    for write in (
        lambda: reader.create_repo("me/other"),
        lambda: reader.create_branch(repo, branch="v2"),
        lambda: reader.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"a"),
        lambda: reader.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"a", create_pr=True),
    ):
        with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
            write()
    assert hub.files(repo) == before


def test_unknown_token_is_refused_everywhere(hub: HubServer, repo: str) -> None:
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        HfApi(endpoint=hub.url, token="hf_wrong").model_info(repo)


def test_existing_repository_is_reported_or_accepted(api: HfApi, repo: str) -> None:
    assert api.create_repo(repo, exist_ok=True).repo_id == repo
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(repo)


def test_branch_keeps_its_own_files(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    api.create_branch(repo, branch="v2/beta")
    api.create_branch(repo, branch="v2/beta", exist_ok=True)
    commit = api.upload_file(repo_id=repo, path_in_repo="a", path_or_fileobj=b"on v2", revision="v2/beta")
    assert read(api, repo, "a", tmp_path, "v2/beta") == read(api, repo, "a", tmp_path, commit.oid) == b"on v2"
    assert not api.file_exists(repo, "a")


def test_pull_request_leaves_main_as_it_was(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    hub.tokens["hf_other"] = Account("other", "write")
    before = hub.files(repo)
    commit = HfApi(endpoint=hub.url, token="hf_other").upload_file(
        repo_id=repo, path_in_repo="new.bin", path_or_fileobj=b"proposed", create_pr=True
    )
    assert commit.pr_revision == "refs/pr/1"
    assert read(api, repo, "new.bin", tmp_path, "refs/pr/1") == b"proposed"
    assert hub.files(repo) == before


def test_interrupted_commit_leaves_the_repository_as_before(hub: HubServer, api: HfApi, repo: str) -> None:
    before, sha = hub.files(repo), api.model_info(repo).sha
    hub.fail_next("/commit/")
    with pytest.raises(Exception, match="disconnected"):  # of the HTTP library, which the client changed once
        api.upload_file(repo_id=repo, path_in_repo="new.bin", path_or_fileobj=b"new")
    hub.fail_next("/commit/", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(repo_id=repo, path_in_repo="new.bin", path_or_fileobj=b"new")
    assert (hub.files(repo), api.model_info(repo).sha) == (before, sha)
    api.upload_file(repo_id=repo, path_in_repo="new.bin", path_or_fileobj=b"new")
    assert hub.files(repo) == before | {"new.bin": b"new"}


def test_commit_that_fails_in_its_last_step_changes_nothing(hub: HubServer, api: HfApi, repo: str) -> None:
    before = hub.files(repo)
    steps: list[CommitOperationAdd | CommitOperationDelete]
    steps = [CommitOperationAdd("a", b"a"), CommitOperationDelete("notes/"), CommitOperationDelete("missing")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit(repo, steps, commit_message="three steps")
    assert hub.files(repo) == before
    api.create_commit(repo, steps[1:2], commit_message="one step")
    assert hub.files(repo) == {path: data for path, data in before.items() if not path.startswith("notes/")}


def test_interrupted_upload_of_weights_is_repeated_by_the_client(hub: HubServer, api: HfApi, repo: str) -> None:
    hub.fail_next("PUT /lfs-upload/")
    api.upload_file(repo_id=repo, path_in_repo="new.bin", path_or_fileobj=b"new")
    assert hub.files(repo)["new.bin"] == b"new"


def test_interrupted_download_resumes(hub: HubServer, api: HfApi, repo: str, tmp_path: Path) -> None:
    hub.fail_next(f"GET /{repo}/resolve/")
    path = "adapter_model.safetensors"
    assert read(api, repo, path, tmp_path) == FILES[path]


def test_card_gives_the_repository_its_metadata(hub: HubServer, api: HfApi, repo: str) -> None:
    card = b"---\nlibrary_name: peft\nbase_model: me/base\npipeline_tag: text-classification\ntags:\n- a:b\n---\n"
    api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=card)
    info = api.model_info(repo)
    assert (info.library_name, info.pipeline_tag) == ("peft", "text-classification")
    assert info.tags == ["peft", "text-classification", "a:b", "base_model:me/base"]
    with pytest.raises(ValueError, match='"base_model" with value "/tmp/base" is not valid'):
        api.upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=card.replace(b"me/base", b"/tmp/base"))
    assert hub.files(repo)["README.md"] == card
