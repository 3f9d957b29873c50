"""What goes to the Hub, and how: an adapter and its own card, in one commit."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, hf_hub_download
from peft.utils import CONFIG_NAME
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, PushToHubMixin, logging

from ..errors import PushError
from ..storage.stored_adapter import read_adapter
from ..training.checkpoints import STATE_NAME
from .model_card import CARD, describe_base, write_model_card, written_by_hand


logger = logging.get_logger(__name__)

# What `save_pretrained(push_to_hub=True)` hands on to the push.
PUSH_OPTIONS = ("commit_message", "create_pr", "private", "repo_id", "revision")

# What a Trainer leaves beside an adapter: pickles, results, and what it resumes from.
_PICKLES = ("*.bin", "*.pt", "*.pth")
_LEFT_OUT = (*_PICKLES, "*/*", ".*", "*.tmp", "*_results.json", TRAINER_STATE_NAME, SAFE_WEIGHTS_NAME, STATE_NAME)


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
    """Push a saved adapter, its card, picture and tokenizer, in one commit: all of it, or nothing.

    The card is brought up to date first, in the folder: `name` is its title, and what its code opens. If nobody has
    written in it, what people have written in the one on the Hub is kept.

    Args:
        folder (`str` or `Path`): The folder of a saved adapter.
        name (`str`): Its name on the Hub.
        private (`bool`, *optional*): If the repository is new, whether it is private.
        revision (`str`, *optional*): The branch to push to, made if need be.
        create_pr (`bool`): Whether to open a pull request instead.
        token (`str` or `bool`, *optional*): A token for the Hub, if not the stored one.
        commit_message (`str`, *optional*): Title of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: The commit.

    Raises:
        AdapterNotFoundError: If the folder holds no adapter.
        AdapterFileError: If it is one of another method, or damaged.
        PushError: If the Hub refuses, or the connection breaks.
    """
    folder = Path(folder)
    read_adapter(folder)
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
            ignore_patterns=list(_LEFT_OUT),
        )


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # What a broken connection raises is the business of the client's HTTP library.
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise PushError(
            f"{name!r} was not pushed, and its files on the Hub are as they were: {reason} If it is a matter of "
            "rights, log in with a token that may write there (`hf auth login`, or HF_TOKEN); otherwise push again."
        ) from error


def push_with_card(model: Any) -> None:
    """Have a model's `push_to_hub` push the adapter's own card, where it would push one without content."""
    if isinstance(model, PushToHubMixin):
        model._upload_modified_files = functools.partial(_upload, model)


def _upload(model: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Complete the cards in a folder that is about to be pushed: of the adapter in it, and of those in subfolders."""
    revision, token = kwargs.get("revision"), kwargs.get("token")
    for config in sorted(Path(working_dir).glob(f"**/{CONFIG_NAME}")):
        if json.loads(config.read_text(encoding="utf-8")).get("peft_type") != "ADAPRUNE":
            continue  # The model that had ours has one of another method now.
        subfolder = config.parent.relative_to(working_dir).as_posix()
        if subfolder == "." and revision is not None:
            # It has been fetched from the main branch.
            (config.parent / CARD).unlink(missing_ok=True)
        _complete_card(config.parent, repo_id, None if subfolder == "." else subfolder, revision, token)
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)


def _complete_card(folder: Path, name: str, subfolder: str | None, revision: str | None, token: Any) -> None:
    base = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if describe_base(base)[0] is None:
        logger.warning(
            f"{name!r} is an adapter over {base!r}, which is no name on the Hub: only who has a copy of that base can "
            "open it. If it is there too, write its name into `base_model_name_or_path` of "
            f"'{folder / CONFIG_NAME}', and push again with `hf-adaprune push`."
        )
    fetch_card(folder / CARD, name, subfolder=subfolder, revision=revision, token=token)
    write_model_card(folder, name=name, subfolder=subfolder)


def fetch_card(card: Path, name: str, **hub: Any) -> None:
    """Where nobody has written in a card, start from the one on the Hub, if there is one within reach.

    Args:
        card (`Path`): The card's file, there or not.
        name (`str`): The repository's name.
        hub: What `huggingface_hub.hf_hub_download` takes besides: `subfolder`, `revision`, `token`.
    """
    if card.is_file() and written_by_hand(card.read_text(encoding="utf-8")):
        return
    # Whatever the Hub has against it, the push that follows will say so.
    with suppress(Exception):
        shutil.copyfile(hf_hub_download(name, CARD, **hub), card)
