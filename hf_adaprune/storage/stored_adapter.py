"""Read a stored adapter's headers, and open it on its base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import EvalResult, HfApi, ModelCard, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import REPOCARD_NAME
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, SafetensorsParsingError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from ..compacted.compact_model import class_for, stock_class
from ..config import AdaPruneConfig
from ..errors import AdapterFileError, AdapterNotFoundError, BaseMismatchError, ConfigError
from ..files.fingerprint import fingerprints_are_checked, same_origin
from ..files.weights_file import check_shapes, read_shapes
from .checks import base_fits, options_problem, run_checks


@dataclass(frozen=True)
class StoredAdapter:
    """Describe a stored adapter by its headers. Created by [`read_adapter`].

    Args:
        name (`str`): The adapter's folder, or its name on the Hub.
        config (`AdaPruneConfig`): Its configuration.
        num_bytes (`int`): The size of its weights file.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of the tensors in that file.
        hub (`dict[str, Any]`): The further arguments of `read_adapter`, where they were given.
    """

    name: str
    config: AdaPruneConfig
    num_bytes: int
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    hub: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def mask_bytes(self) -> int:
        """The size of the masks in bytes: one bit per entry, rounded up for each module, or less."""
        return sum(math.prod(shape) for key, shape in self.shapes.items() if key.endswith(".adaprune_mask"))

    def _base(self, base: str | None) -> tuple[str | None, dict[str, Any]]:
        """Return the name of the base to use, and the arguments to open it with."""
        hub = {key: value for key, value in self.hub.items() if key not in ("subfolder", "revision")}
        if base:
            return base, hub
        return self.config.base_model_name_or_path, {**hub, "revision": self.config.revision}

    def open(self, base: str | None = None) -> PeftModel:
        """Open the adapter on its base, and run all checks now rather than at the first forward pass.

        Args:
            base (`str`, *optional*): A copy of the base: a folder, or a name on the Hub. By default the adapter's own.

        Returns:
            `peft.PeftModel`: The model, in evaluation mode.

        Raises:
            AdapterNotFoundError: If the base, or the class of its model, cannot be found.
            AdapterFileError: If the adapter's files are not what was saved.
            BaseMismatchError: If the base, or an option that it is loaded with, is not that of the adapter.
        """
        architecture = self.config.architecture
        name, hub = self._base(base)
        cls = stock_class(architecture) if architecture else AutoModel
        if cls is None:
            raise AdapterNotFoundError(
                f"The base of {self.name!r} is a {architecture}, which transformers {transformers.__version__} lacks. "
                "Build it yourself and open the adapter with `peft.PeftModel.from_pretrained(base, name)`."
            )
        if not name:
            raise AdapterNotFoundError(
                f"The configuration of {self.name!r} names no base: pass its name or folder as `base` (`--base`)."
            )
        try:
            model = class_for(cls, AutoConfig.from_pretrained(name, **hub)).from_pretrained(name, **hub)
        except OSError as error:
            raise AdapterNotFoundError(f"The adapter's base {name!r} cannot be opened: {error}") from None
        except (RuntimeError, ValueError) as error:
            raise BaseMismatchError(f"The base {name!r} must be a {architecture}: {error}") from None
        problem = options_problem(model, self.config) if fingerprints_are_checked() else ""
        # Sizes are options too, but other weights are the clearer reason.
        if problem and base_fits(model, self.config) is not False:
            raise BaseMismatchError(problem)
        tuned = PeftModel.from_pretrained(model, self.name, **self.hub)
        run_checks(tuned.get_base_model())
        return tuned.eval()

    def tokenizer(self, base: str | None = None) -> Any:
        """Return the tokenizer that is stored with the adapter or, otherwise, with its base.

        Raises:
            AdapterNotFoundError: If neither has a tokenizer.
        """
        name, hub_of_base = self._base(base)
        for place, hub in ((self.name, self.hub), (name, hub_of_base)):
            with suppress(OSError, ValueError):
                tokenizer = AutoTokenizer.from_pretrained(place, **hub)
                # Where there is none, transformers makes one that knows only its special tokens.
                if len(tokenizer) > len(tokenizer.all_special_tokens):
                    return tokenizer
        raise AdapterNotFoundError(f"Neither {self.name!r} nor its base {name!r} has a tokenizer.")

    @property
    def is_sentence_transformer(self) -> bool:
        """Whether it was saved by a `SentenceTransformer`, with further modules beside the transformer."""
        with suppress(OSError, ValueError):
            return cached_file(self.name, "modules.json", **self.hub) is not None
        return False

    def results(self) -> list[EvalResult]:
        """Return the scores on the adapter's card; none if the card is missing or cannot be read."""
        try:
            card = ModelCard.load(cached_file(self.name, REPOCARD_NAME, **self.hub), ignore_metadata_errors=True)
        except (OSError, ValueError):
            return []
        return card.data.eval_results or []


def read_adapter(
    name: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **hub: Any,
) -> StoredAdapter:
    """Read the headers of a stored adapter, a few kilobytes, from a folder or the Hub.

    Args:
        name (`str` or `Path`): The adapter's folder, or its name on the Hub.
        subfolder (`str`, *optional*): The subfolder that holds the adapter.
        revision (`str`, *optional*): A branch, a tag or a commit on the Hub.
        token (`str` or `bool`, *optional*): A token for the Hub, if not the stored one.
        hub: Further arguments of `huggingface_hub.hf_hub_download`: `cache_dir`, `local_files_only`, ...

    Returns:
        `StoredAdapter`: The adapter's configuration, tensor shapes and size.

    Raises:
        AdapterNotFoundError: If no adapter of that name can be found.
        AdapterFileError: If the adapter is of another method, or damaged.

    Example:

        >>> read_adapter("me/bert-base-uncased-sst2-adaprune").config.base_model_name_or_path
    """
    name = str(name)
    hub |= {"subfolder": subfolder, "revision": revision, "token": token}
    hub = {key: value for key, value in hub.items() if value is not None}
    config = read_config(name, **hub)
    shapes, num_bytes = _read_header(name, hub)
    check_shapes(f"{SAFETENSORS_WEIGHTS_NAME} of {name}", shapes, config)
    return StoredAdapter(name, config, num_bytes, shapes, hub)


def check_same_base(adapters: Sequence[StoredAdapter]) -> None:
    """Raise if adapters do not mask the same weights of the same base.

    Raises:
        BaseMismatchError: If their bases or their masked modules differ.
    """
    first, *others = adapters
    for other in others:
        fingerprints = first.config.base_fingerprint or "", other.config.base_fingerprint or ""
        for what, differs in (
            ("of another base", same_origin(*fingerprints) is False),
            ("over other modules", _sizes(other) != _sizes(first)),
        ):
            if differs:
                raise BaseMismatchError(f"The masks of {other.name!r} are {what} than those of {first.name!r}.")


def _sizes(adapter: StoredAdapter) -> dict[str, int]:
    return {module: total for module, (_, total) in (adapter.config.module_counts or {}).items()}


def read_config(name: str, **hub: Any) -> AdaPruneConfig:
    """Read the configuration of a stored adapter; see `read_adapter` for arguments and errors."""
    folder = Path(name, hub.get("subfolder") or "")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise AdapterNotFoundError(f"There is no adapter in the folder '{folder}': it has no {CONFIG_NAME}.")
    if not folder.is_dir() and (Path(name).exists() or not is_name_on_hub(name)):
        raise AdapterNotFoundError(f"There is no folder '{folder}', and {name!r} is no name on the Hub: correct it.")
    try:
        config = PeftConfig.from_pretrained(name, **hub)
    except ConfigError as error:
        raise AdapterFileError(f"{CONFIG_NAME} of {name!r}: {error}") from None
    except Exception as error:
        # A file with arbitrary content can make PEFT raise anything, for example by deep nesting.
        if isinstance(error, ValueError) and error.__cause__ is not None:
            # PEFT's message says where it looked, its cause why it found nothing.
            raise AdapterNotFoundError(f"The adapter {name!r} was not found: {error.__cause__}") from None
        raise AdapterFileError(
            f"{CONFIG_NAME} of {name!r} is not a valid adapter configuration ({error!r}): fetch the adapter again."
        ) from None
    if not isinstance(config, AdaPruneConfig):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise AdapterFileError(f"{name!r} is an adapter of another method, {method}: open it with peft alone.")
    if not config.is_stored:
        raise AdapterFileError(f"{name!r} has the configuration of an adapter that was never saved: it has no masks.")
    if not config.num_parameters:
        raise AdapterFileError(f"{CONFIG_NAME} of {name!r} lacks the `num_parameters` of its model: fetch it again.")
    return config


def is_name_on_hub(name: str) -> bool:
    """Return whether a text could be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _read_header(name: str, hub: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], int]:
    folder = Path(name, hub.get("subfolder", ""))
    if folder.is_dir():
        path: Any = folder / SAFETENSORS_WEIGHTS_NAME
    else:
        filename, revision = folder.relative_to(name) / SAFETENSORS_WEIGHTS_NAME, hub.get("revision")
        path = try_to_load_from_cache(name, filename.as_posix(), cache_dir=hub.get("cache_dir"), revision=revision)
        if not isinstance(path, str):
            if hub.get("local_files_only"):
                raise AdapterNotFoundError(f"The weights of {name!r} are not in the cache: allow their download.")
            return _read_remote_header(name, filename.as_posix(), revision, hub.get("token"))
    return read_shapes(Path(path)), Path(path).stat().st_size


def _read_remote_header(
    name: str, filename: str, revision: str | None, token: str | bool | None
) -> tuple[dict[str, tuple[int, ...]], int]:
    try:
        header = HfApi().parse_safetensors_file_metadata(name, filename, revision=revision, token=token)
        size = get_hf_file_metadata(hf_hub_url(name, filename, revision=revision), token=token).size
    except (EntryNotFoundError, SafetensorsParsingError) as error:
        raise AdapterFileError(f"The weights of {name!r} cannot be read: {error}. Fetch it again.") from None
    except Exception as error:  # a broken connection raises errors of the HTTP library
        raise AdapterNotFoundError(f"The weights of {name!r} could not be fetched; try again: {error}") from None
    return {key: tuple(tensor.shape) for key, tensor in header.tensors.items()}, size or 0
