"""Push an adapter and its card to the Hub, in one commit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, PushToHubMixin, logging

from ..errors import AdapterNotFoundError, PushError
from ..overrides import override
from ..storage.stored_adapter import read_adapter
from .model_card import (
    BEGIN,
    CARD,
    describe_base,
    read_card,
    save_card,
    update_card,
    write_model_card,
    written_by_hand,
)


logger = logging.get_logger(__name__)

# Arguments that `save_pretrained(push_to_hub=True)` passes on to the push.
PUSH_OPTIONS = ("commit_message", "create_pr", "private", "repo_id", "revision")

# Files of a Trainer beside an adapter: pickles, results, and the state that it resumes from.
_PICKLES = ("*.bin", "*.pt", "*.pth")
_LEFT_OUT = (*_PICKLES, ".*", "*.tmp", "*_results.json", TRAINER_STATE_NAME, SAFE_WEIGHTS_NAME, "training_*")


def push_adapter(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Push a saved adapter with its card, picture and tokenizer in one commit: all of it, or nothing.

    The card in the folder is updated first: `name` becomes its title, and the name that its code opens. If it has no
    text that people wrote, the text that people wrote in the card on the Hub is kept.

    Args:
        folder (`str` or `Path`): The folder of a saved adapter.
        name (`str`): Its name on the Hub.
        private (`bool`, *optional*): If the repository is new, whether it is private.
        revision (`str`, *optional*): The branch to push to; created if it does not exist.
        create_pr (`bool`): Whether to open a pull request instead.
        token (`str` or `bool`, *optional*): A token for the Hub, if not the stored one.
        commit_message (`str`, *optional*): Title of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: The commit.

    Raises:
        AdapterNotFoundError: If there is no such folder, or no adapter in it.
        AdapterFileError: If the adapter is of another method, or damaged.
        CardError: If the metadata of the card in the folder cannot be read.
        PushError: If the Hub refuses, or the connection breaks.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise AdapterNotFoundError(f"There is no folder '{folder}': save the adapter first, and name its folder.")
    read_adapter(folder)
    read_card(folder / CARD)  # before anything is created on the Hub
    api = HfApi(token=token)
    if not create_pr:
        with _hub_errors(name):
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
    _complete_card(folder, name, None, revision, token)
    with _hub_errors(name):
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message or "Upload adapter",
            # A sentence-transformers model has a subfolder for each of its further modules, such as the pooling.
            ignore_patterns=[*_LEFT_OUT, "checkpoint-*/*" if (folder / "modules.json").is_file() else "*/*"],
        )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a broken connection raises errors of the HTTP library
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise PushError(
            f"{name!r} was not pushed, and its files on the Hub are unchanged: {reason} If permission is missing, log "
            "in with a token that may write there (`hf auth login`, or HF_TOKEN); otherwise push again."
        ) from error


def push_with_card(model: Any) -> None:
    """Make a model's `push_to_hub` push the adapter's own card instead of an empty template."""
    if isinstance(model, PushToHubMixin):
        override(model, "_upload_modified_files", _upload, model)


def _upload(model: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Update the cards of all adapters in a folder and its subfolders, then push the folder."""
    revision, token = kwargs.get("revision"), kwargs.get("token")
    for config in sorted(Path(working_dir).glob(f"**/{CONFIG_NAME}")):
        if json.loads(config.read_text(encoding="utf-8")).get("peft_type") != "ADAPRUNE":
            continue  # The adapter is of another method.
        subfolder = config.parent.relative_to(working_dir).as_posix()
        if subfolder == "." and revision is not None:
            # It was fetched from the main branch.
            (config.parent / CARD).unlink(missing_ok=True)
        _complete_card(config.parent, repo_id, None if subfolder == "." else subfolder, revision, token)
    card = Path(working_dir, CARD)
    if (
        not Path(working_dir, CONFIG_NAME).is_file()
        and card.is_file()
        and not written_by_hand(card.read_text("utf-8"))
    ):
        card.unlink()  # a blank one: all adapters are in subfolders
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _complete_card(folder: Path, name: str, subfolder: str | None, revision: str | None, token: Any) -> None:
    base = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if describe_base(base)[0] is None:
        logger.warning(
            f"{name!r} is an adapter for the base {base!r}, which is not a name on the Hub: only those who have a "
            "copy of it can open the adapter. If the base is on the Hub too, save the adapter to a folder, enter the "
            f"base's name as `base_model_name_or_path` in its {CONFIG_NAME}, and use `hf-adaprune push`."
        )
    fetch_card(folder / CARD, name, subfolder=subfolder, revision=revision, token=token)
    write_model_card(folder, name=name, subfolder=subfolder)


def fetch_card(card: Path, name: str, **hub: Any) -> None:
    """Take over what people wrote in the card on the Hub, if they wrote nothing in this one and that can be fetched.

    Args:
        card (`Path`): The card's file, existing or not; its metadata, and what it says of its adapter, stay.
        name (`str`): The repository's name.
        hub: Further arguments of `huggingface_hub.hf_hub_download`: `subfolder`, `revision`, `token`.

    Raises:
        CardError: If the metadata of one of the cards is not valid YAML.
    """
    if card.is_file() and written_by_hand(card.read_text(encoding="utf-8")):
        return
    try:
        fetched = Path(hf_hub_download(name, CARD, **hub))
    except Exception:
        return  # the push that follows will report any problem
    remote, local = read_card(fetched, f"the card of {name!r} on the Hub"), read_card(card)
    save_card(card, remote if local is None or BEGIN not in local.text else update_card(remote, local))
