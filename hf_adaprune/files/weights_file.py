"""Read the file that holds an adapter's masks and head, and check its header against the configuration."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from ..errors import AdapterFileError, ConfigError
from ..masks import packed_size
from ..tensor_names import PREFIX, plain_name


if TYPE_CHECKING:
    from ..config import AdaPruneConfig


def read_masks(name: str, config: AdaPruneConfig, **hub: Any) -> dict[str, torch.Tensor]:
    """Read only the masks of a stored adapter, in their stored form.

    Args:
        name (`str`): The adapter's folder, or its name on the Hub.
        config (`AdaPruneConfig`): Its configuration.
        hub: Further arguments of `huggingface_hub.hf_hub_download`, `subfolder` among them.

    Returns:
        `dict[str, torch.Tensor]`: A `uint8` tensor per mask, of shape `(ceil(entries / 8),)` or shorter.

    Raises:
        AdapterFileError: If the weights are pickled or missing, or do not match the configuration.
    """
    path = _find_weights(name, **hub) or Path(name, hub.get("subfolder") or "", SAFETENSORS_WEIGHTS_NAME)
    check_shapes(path, read_shapes(path), config)
    with safe_open(path, framework="pt") as file:
        masks = {module: file.get_tensor(f"{PREFIX}{module}.adaprune_mask") for module in config.mask_entries}
    strange = [module for module, mask in masks.items() if mask.dtype is not torch.uint8]
    if strange:
        raise AdapterFileError(f"{path} has masks for {strange} that are not torch.uint8. Fetch the adapter again.")
    return masks


def check_weights_file(name: str, config: AdaPruneConfig, **hub: Any) -> None:
    """Raise if a stored adapter's weights are pickled or do not match its configuration.

    Args:
        name (`str`): The adapter's folder, or its name on the Hub.
        config (`AdaPruneConfig`): Its configuration.
        hub: Further arguments of `huggingface_hub.hf_hub_download`, `subfolder` among them.

    Raises:
        AdapterFileError: If the weights are pickled, unreadable, or do not match the configuration.
    """
    path = _find_weights(name, **hub)
    if path is not None and path.exists():
        check_shapes(path, read_shapes(path), config)


def _find_weights(name: str, *, subfolder: str | None = None, **hub: Any) -> Path | None:
    """Return the path of an adapter's weights, existing or not; `None` if the Hub cannot be reached."""
    folder = Path(name, subfolder or "")
    if folder.is_dir():
        path = folder / SAFETENSORS_WEIGHTS_NAME
        pickled = not path.exists() and (folder / WEIGHTS_NAME).exists()
    else:
        try:
            return Path(hf_hub_download(name, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub))
        except LocalEntryNotFoundError:
            return None
        except EntryNotFoundError:
            path = folder / SAFETENSORS_WEIGHTS_NAME
            known = {key: hub[key] for key in ("revision", "token") if key in hub}
            pickled = file_exists(name, f"{subfolder}/{WEIGHTS_NAME}" if subfolder else WEIGHTS_NAME, **known)
    if pickled:
        raise AdapterFileError(_refusal(folder / WEIGHTS_NAME))
    return path


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a weights file, from its header.

    Raises:
        AdapterFileError: If the file is missing or cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        pickle = path.with_name(WEIGHTS_NAME)
        if pickle.exists():
            raise AdapterFileError(_refusal(pickle)) from None
        raise AdapterFileError(f"There is no {path}: the adapter has no masks. Fetch it again.") from None
    except (OSError, SafetensorError) as error:
        raise AdapterFileError(
            f"{path} cannot be read ({error}): it is truncated, or not a safetensors file. Fetch the adapter again."
        ) from None


def check_shapes(path: str | Path, shapes: dict[str, tuple[int, ...]], config: AdaPruneConfig) -> None:
    """Raise if an adapter's weights file lacks tensors, has unexpected ones, or has masks of the wrong size.

    Unexpected tensors, such as scores or weights of the base, would be loaded too.

    Args:
        path (`str` or `Path`): The file, for the message.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of its tensors.
        config (`AdaPruneConfig`): The adapter's configuration.

    Raises:
        AdapterFileError: If the tensors are not the masks and head that the configuration lists.
    """
    sizes = {module: packed_size(length) for module, length in config.mask_entries.items()} | (config.mask_bytes or {})
    masks = {f"{module}.adaprune_mask": (size,) for module, size in sizes.items()}
    wanted = [f"{PREFIX}{key}" for key in (*masks, *(config.head_tensors or ()))]
    missing = [plain_name(key) for key in wanted if key not in shapes]
    surplus = sorted(shapes.keys() - set(wanted))
    resized = [key for key, shape in masks.items() if shapes.get(f"{PREFIX}{key}", shape) != shape]
    problems = {"has no": missing, "has masks of the wrong size:": resized, "has unexpected": surplus}
    if any(problems.values()):
        raise AdapterFileError(
            f"{path} does not match its configuration: it "
            f"{' and '.join(f'{what} {keys}' for what, keys in problems.items() if keys)}. Fetch the adapter again."
        )


def check_head(path: str | Path, shapes: dict[str, tuple[int, ...]], head_shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise if the head in an adapter's weights file does not have the shapes of the model's head.

    Args:
        path (`str` or `Path`): The file, for the message.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of its tensors.
        head_shapes (`dict[str, tuple[int, ...]]`): The shapes of the model's head.

    Raises:
        AdapterFileError: If a tensor of the head is missing, or has another shape.
    """
    found = {key: shapes.get(f"{PREFIX}{key}") for key in head_shapes}
    problems = [
        f"{key!r} is {found[key] or 'missing'}, not {shape}"
        for key, shape in head_shapes.items()
        if found[key] != shape
    ]
    if problems:
        raise AdapterFileError(
            f"{path} does not fit the head of the model: {'; '.join(problems)}. Fetch the adapter again, or open it "
            "on the base that it was made for."
        )


def check_not_pickled(folder: str | Path, aside: Path) -> None:
    """Raise if an adapter's weights were just saved as a pickle, before its configuration is put in place.

    Args:
        folder (`str` or `Path`): The folder where the adapter is saved.
        aside (`Path`): The configuration, not yet in place; deleted before raising.

    Raises:
        ConfigError: If the folder has a pickle that is newer than its safetensors file.
    """
    pickle, weights = Path(folder, WEIGHTS_NAME), Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if pickle.exists() and not (weights.exists() and weights.stat().st_mtime_ns >= pickle.stat().st_mtime_ns):
        aside.unlink()
        raise ConfigError(
            f"{pickle} is a pickle, and pickles are not read: save with `safe_serialization=True`. The other files in "
            "the folder are unchanged."
        )


def check_is_safetensors(path: str | Path) -> None:
    """Raise if a weights file is not a safetensors file.

    Raises:
        AdapterFileError: If the name of the file does not end in `.safetensors`.
    """
    if Path(path).suffix != ".safetensors":
        raise AdapterFileError(_refusal(path))


def _refusal(path: str | Path) -> str:
    return (
        f"{path} is a pickle, and pickles are not read. Ask the adapter's author to save it with "
        f"`safe_serialization=True`, as {SAFETENSORS_WEIGHTS_NAME}."
    )
