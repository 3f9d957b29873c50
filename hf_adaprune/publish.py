"""What goes to the Hub, and how: an adapter and its card in one commit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from .errors import PushError
from .model_card import write_model_card
from .stored import read_adapter


# What a Trainer leaves beside an adapter, and pickles.
_LEFT_OUT = ("*/*", ".*", "*.bin", "*.pt", "*.pth", "*.tmp", "*_results.json", "trainer_state.json")


def push_adapter(
    folder: str | Path,
    name: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | bool | None = None,
    commit_message: str = "Upload adapter",
) -> CommitInfo:
    """Push a saved adapter, its card, picture and tokenizer, in one commit: all of it, or nothing.

    The card is brought up to date first, in the folder: `name` is its title, and what its code opens.

    Args:
        folder (`str` or `Path`): The folder of a saved adapter.
        name (`str`): Its name on the Hub.
        private (`bool`, *optional*): If the repository is new, whether it is private.
        revision (`str`, *optional*): The branch to push to, made if need be.
        create_pr (`bool`): Whether to open a pull request instead.
        token (`str` or `bool`, *optional*): A token for the Hub, if not the stored one.
        commit_message (`str`): Title of the commit.

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
    with _all_or_nothing(name):
        if not create_pr:
            name = api.create_repo(name, private=private, exist_ok=True).repo_id
            if revision is not None:
                api.create_branch(name, branch=revision, exist_ok=True)
    write_model_card(folder, name=name)
    with _all_or_nothing(name):
        return api.upload_folder(
            repo_id=name,
            folder_path=folder,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            ignore_patterns=list(_LEFT_OUT),
        )


@contextmanager
def _all_or_nothing(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # What a broken connection raises is the business of the client's HTTP library.
        reason = f"{error} {error.__cause__ or ''}".strip()
        raise PushError(
            f"{name!r} was not pushed, and is on the Hub as it was: {reason} If it is a matter of rights, "
            "log in with a token that may write there (`hf auth login`, or HF_TOKEN); otherwise push again."
        ) from error
