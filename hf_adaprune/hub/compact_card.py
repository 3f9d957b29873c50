"""The model card of a compacted model, written whenever the model is saved or pushed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, ModelCardData

from ..config import AdaPruneConfig
from .advice import COMPACT_ADVICE
from .model_card import BEGIN, CARD, END, auto_class, describe_base, pipeline_of, put_card
from .publish import PUSH_OPTIONS


_TEMPLATE = Path(__file__).parent / "templates" / "compact_card.md"


@dataclass(frozen=True)
class CompactCard:
    """Hold the contents of a compacted model's card.

    Args:
        config (`AdaPruneConfig`): The configuration of the adapter that was applied.
        architecture (`str`): The name of the model's class.
        stock (`bool`): Whether transformers alone can build the model.
        before (`int`): The number of parameters of the base model.
        after (`int`): The number of parameters of the compacted model.
        blocks (`Sequence[tuple[str, int, int, str]]`):
            For each block its name, the number of groups kept, the number before, and the kind of group.
    """

    config: AdaPruneConfig
    architecture: str
    stock: bool
    before: int
    after: int
    blocks: Sequence[tuple[str, int, int, str]]

    def render(self, name: str) -> ModelCard:
        """Return the card of a model of this name: its name on the Hub, or that of its folder."""
        base, description = describe_base(self.config.base_model_name_or_path)
        data = ModelCardData(
            base_model=base,
            base_model_relation="finetune" if base else None,
            library_name="transformers",
            model_name=name,
            pipeline_tag=pipeline_of(self.config),
            tags=["adaprune", "pruning"],
        )
        return ModelCard.from_template(
            data,
            template_path=str(_TEMPLATE),
            begin=BEGIN,
            end=END,
            title=name,
            name=name,
            base=description,
            auto_class=auto_class(self.architecture) or "AutoModel",
            advice=COMPACT_ADVICE,
            **{field: getattr(self, field) for field in ("stock", "before", "after", "blocks")},
        )

    def attach(self, model: Any) -> None:
        """Make a model write this card whenever it is saved, and push it whenever it is pushed."""
        model.save_pretrained = functools.partial(_save, self, model)
        model.push_to_hub = functools.partial(_push, self, model)


def _save(
    card: CompactCard, model: Any, save_directory: str | Path, is_main_process: bool = True, **kwargs: Any
) -> None:
    pushed, name = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
    hub = {key: kwargs.pop(key) for key in PUSH_OPTIONS if pushed and key in kwargs}
    type(model).save_pretrained(model, save_directory, is_main_process, **kwargs)
    if is_main_process:
        put_card(Path(save_directory, CARD), card.render(name))
    if pushed:
        _push(card, model, name, token=kwargs.get("token"), **hub)


def _push(card: CompactCard, model: Any, repo_id: str, **kwargs: Any) -> Any:
    # transformers keeps a repository's card, but writes an empty template if there is none.
    api = HfApi(token=kwargs.get("token"))
    repo = api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True).repo_id
    if not api.file_exists(repo, "README.md"):
        text = str(card.render(repo)).encode()
        api.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id=repo, commit_message="Card")
    return type(model).push_to_hub(model, repo_id, **kwargs)
