"""The model card of a compacted model, written whenever the model is saved or pushed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from ..config import AdaPruneConfig
from .model_card import BEGIN, CARD, END, auto_class, describe_base, pipeline_of, put_card
from .publish import PUSH_OPTIONS, fetch_card


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
            name=name,
            base=description,
            auto_class=auto_class(self.architecture) or "AutoModel",
            card=self,
        )

    def attach(self, model: Any) -> None:
        """Make a model write this card whenever it is saved, and push it whenever it is pushed."""
        model.save_pretrained = functools.partial(_save, self, model)
        model._upload_modified_files = functools.partial(_upload, self, model)


def _save(
    card: CompactCard, model: Any, save_directory: str | Path, is_main_process: bool = True, *args: Any, **kwargs: Any
) -> None:
    pushed, name = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", None) or Path(save_directory).resolve().name
    hub = {key: kwargs.pop(key) for key in PUSH_OPTIONS if pushed and key in kwargs}
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    if is_main_process:
        put_card(Path(save_directory, CARD), card.render(name))
    if pushed:
        model.push_to_hub(name, token=kwargs.get("token"), **hub)


def _upload(card: CompactCard, model: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
    """Put the card into the folder, beside what people wrote in the one on the Hub, then push the folder."""
    path, revision = Path(working_dir, CARD), kwargs.get("revision")
    if revision is not None:
        path.unlink()  # transformers has fetched it from the main branch
        fetch_card(path, repo_id, revision=revision, token=kwargs.get("token"))
    put_card(path, card.render(repo_id))
    return type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)
