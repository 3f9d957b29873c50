"""Models opened by name alone: adapters on their base, and plain ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import find_adapter_config_file


def open_model(name: str) -> PreTrainedModel:
    """Open a model, with the head that it was saved with.

    Args:
        name (`str`): The folder, or the name on the Hub, of an adapter or of a plain model.

    Returns:
        `transformers.PreTrainedModel`: The model, in evaluation mode; an adapter is on it, and active.

    Raises:
        OSError: If there is none of that name within reach.
        AdaPruneError: If the adapter is damaged, or belongs to another base.
    """
    path = find_adapter_config_file(name)
    if path is None:
        architectures = AutoConfig.from_pretrained(name).architectures
    else:
        config = json.loads(Path(path).read_text(encoding="utf-8")).get("model_config") or {}
        architectures = config.get("architectures")
    door: Any = getattr(transformers, auto_class((architectures or ["Model"])[0]))
    return door.from_pretrained(name).eval()


def auto_class(architecture: str) -> str:
    """Return the name of the Auto class that ends as a model class's does: `AutoModel` if there is no other."""
    if architecture.endswith("LMHeadModel"):
        return "AutoModelForCausalLM"
    names = [name for name in modeling_auto.__all__ if name.startswith("AutoModelFor")]
    fitting = [name for name in names if architecture.endswith(name.removeprefix("AutoModel"))]
    return max(fitting, key=len, default="AutoModel")


def open_tokenizer(*names: str | None) -> Any:
    """Return the first tokenizer that is found under these names, or `None`."""
    for name in names:
        try:
            return AutoTokenizer.from_pretrained(name) if name else None
        except (OSError, ValueError):
            continue
    return None


def recorded_results(name: str) -> list[Any]:
    """Return the scores on a model's card, as `huggingface_hub.EvalResult`s: none if it has no card."""
    local = Path(name, "README.md")
    try:
        card = ModelCard.load(local if Path(name).is_dir() else name, ignore_metadata_errors=True)
    except (OSError, ValueError, HfHubHTTPError):
        return []
    return card.data.eval_results or []
