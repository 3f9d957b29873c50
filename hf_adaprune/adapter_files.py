"""Reading and writing the two files of a stored adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import file_exists, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from .errors import AdapterFileError, ConfigError


if TYPE_CHECKING:
    from .config import AdaPruneConfig

# What PEFT writes before the names of a model's modules, in files and in a `PeftModel`.
PREFIX = "base_model.model."

# Bytes: what PyTorch allocates for the CPU begins at a multiple.
_ALIGNMENT = 64

PUSH_OPTIONS = ("commit_message", "create_pr", "private", "repo_id", "revision")

_put_off: ContextVar[list[tuple[Path, Callable[[], None]]] | None] = ContextVar("hf_adaprune_put_off", default=None)


def plain_name(name: str) -> str:
    """Return a module's or a tensor's name as it is in the model itself, whatever adapters have put around it."""
    return unwrapped_name(name).removeprefix(PREFIX)


def unwrapped_name(name: str) -> str:
    """Return a name as it is where no adapter has put a layer of its own around the one that is meant."""
    return name.replace(".base_layer", "")


def put_in_place(aside: Path, finish: Callable[[], None]) -> None:
    """Finish a file that was written aside: now, or after the weights if `weights_first` is at work."""
    waiting = _put_off.get()
    if waiting is None:
        finish()
    else:
        waiting.append((aside, finish))


@contextmanager
def weights_first() -> Iterator[None]:
    """Put off what `put_in_place` is given until the end of the block; drop it if the block fails.

    A new configuration that stands beside old weights is an adapter lost.
    """
    waiting: list[tuple[Path, Callable[[], None]]] = []
    token = _put_off.set(waiting)
    try:
        yield
    except BaseException:
        for aside, _ in waiting:
            aside.unlink(missing_ok=True)
        raise
    finally:
        _put_off.reset(token)
    for _, finish in waiting:
        finish()


def save_weights_first(model: Any, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """Save a transformers model that holds an adapter: its own `save_pretrained` writes the configuration first."""
    active = model.active_adapters() if model._hf_peft_config_loaded else []
    if not any(getattr(model.peft_config.get(name), "peft_type", None) == "ADAPRUNE" for name in active):
        # The model has had one of ours, and has another kind now, or none.
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        return
    pushed = kwargs.pop("push_to_hub", False)
    given = {key: kwargs.pop(key) for key in PUSH_OPTIONS if pushed and key in kwargs}
    with weights_first():
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if pushed:
        # Its own way to push would first overwrite the card in the folder.
        from .publish import push_adapter

        name = given.pop("repo_id", Path(save_directory).name)
        push_adapter(save_directory, name, token=kwargs.get("token"), **given)


def load_checked(
    config: AdaPruneConfig,
    head_shapes: dict[str, tuple[int, ...]],
    /,
    *,
    model: Any,
    checkpoint_files: list[str] | None,
    **kwargs: Any,
) -> Any:
    """Load an adapter's weights as transformers does, after a look at their file.

    `PreTrainedModel.load_adapter` injects the adapter first, and then has the model itself load the file: there, and
    only there, it can still be seen what kind of file that is.
    """
    forget_check(model)
    for path in checkpoint_files or ():
        if Path(path).suffix != ".safetensors":
            raise AdapterFileError(_refusal(path))
        shapes = read_shapes(Path(path))
        check_shapes(path, shapes, config)
        check_head(path, shapes, head_shapes)
    info, offloaded = model._load_pretrained_model(model=model, checkpoint_files=checkpoint_files, **kwargs)
    # All of the adapter was in the file. What is reported as missing, the base and other adapters, is where it was.
    info.missing_keys = set()
    _align_head(model)
    if config.mask_bytes:
        # Imported here: a layer has a configuration.
        from .layer import decode_loaded
        from .masked_layers import adaprune_layers

        for _, layer in adaprune_layers(model):
            decode_loaded(layer)
    return info, offloaded


def _align_head(model: Any) -> None:
    """Move what is mapped from a file to memory of its own, aligned as that of a head in training is.

    A file's tensors begin anywhere, and some kernels sum in another order there: logits would differ in the last bit.
    """
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name and parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def forget_check(model: Any) -> None:
    """Have a model load files as ever again."""
    for module in model.modules():
        vars(module).pop("_load_pretrained_model", None)


def check_weights_file(name: str, config: AdaPruneConfig, subfolder: str | None, **hub: Any) -> None:
    """Raise if a stored adapter's weights are a pickle, or are not all there.

    Args:
        name (`str`): The adapter's folder, or its name on the Hub.
        config (`AdaPruneConfig`): Its configuration.
        subfolder (`str`, *optional*): Where in it the adapter is.
        hub: What `huggingface_hub.hf_hub_download` takes besides.

    Raises:
        AdapterFileError: If they are.
    """
    path = _find_weights(name, subfolder, **hub)
    if path is not None and path.exists():
        check_shapes(path, read_shapes(path), config)


def read_masks(name: str, config: AdaPruneConfig, subfolder: str | None, **hub: Any) -> dict[str, torch.Tensor]:
    """Read a stored adapter's masks as they are stored, and nothing else of it.

    Args:
        name (`str`): The adapter's folder, or its name on the Hub.
        config (`AdaPruneConfig`): Its configuration.
        subfolder (`str`, *optional*): Where in it the adapter is.
        hub: What `huggingface_hub.hf_hub_download` takes besides.

    Returns:
        `dict[str, torch.Tensor]`: For each mask a `uint8` tensor of shape `(ceil(entries / 8),)`, or a shorter one.

    Raises:
        AdapterFileError: If the weights are a pickle, or are not all there.
    """
    path = _find_weights(name, subfolder, **hub) or Path(name, subfolder or "", SAFETENSORS_WEIGHTS_NAME)
    check_shapes(path, read_shapes(path), config)
    with safe_open(path, framework="pt") as file:
        masks = {module: file.get_tensor(f"{PREFIX}{module}.adaprune_mask") for module in config.mask_lengths}
    strange = [module for module, mask in masks.items() if mask.dtype is not torch.uint8]
    if strange:
        raise AdapterFileError(f"{path} has masks for {strange} that are not torch.uint8. Fetch the adapter again.")
    return masks


def _find_weights(name: str, subfolder: str | None, **hub: Any) -> Path | None:
    """Return where an adapter's weights are, or ought to be; `None` if the Hub cannot be asked."""
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


def _refusal(path: str | Path) -> str:
    return (
        f"{path} is a pickle, and pickles are not read. Have the adapter's author save it with "
        f"`safe_serialization=True`, as {SAFETENSORS_WEIGHTS_NAME}."
    )


def check_not_pickled(folder: str | Path, aside: Path) -> None:
    """Raise if an adapter's weights have just been saved as a pickle, before a configuration is put beside them.

    Args:
        folder (`str` or `Path`): Where the adapter is saved.
        aside (`Path`): The configuration, not yet in place; deleted if it is not to be.

    Raises:
        ConfigError: If they have.
    """
    pickle, weights = Path(folder, WEIGHTS_NAME), Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if pickle.exists() and not (weights.exists() and weights.stat().st_mtime_ns >= pickle.stat().st_mtime_ns):
        aside.unlink()
        raise ConfigError(
            f"{pickle} is a pickle, which no one could open: save with `safe_serialization=True`. What was in the "
            "folder before is as it was."
        )


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in a file of weights, from its header.

    Raises:
        AdapterFileError: If there is no such file, or it cannot be read.
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
            f"{path} cannot be read ({error}): it is cut short, or is no safetensors file. Fetch the adapter again."
        ) from None


def check_shapes(path: str | Path, shapes: dict[str, tuple[int, ...]], config: AdaPruneConfig) -> None:
    """Raise if an adapter's file of weights has other entries than masks and head, or masks of the wrong size.

    What else there was would be loaded too: scores, say, or weights of the base.

    Args:
        path (`str` or `Path`): The file, for the message.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of its tensors.
        config (`AdaPruneConfig`): The adapter's configuration.

    Raises:
        AdapterFileError: If it does.
    """
    masks = {f"{module}.adaprune_mask": (size,) for module, size in config.mask_sizes.items()}
    wanted = [f"{PREFIX}{key}" for key in (*masks, *(config.head_tensors or ()))]
    missing = [plain_name(key) for key in wanted if key not in shapes]
    surplus = sorted(shapes.keys() - set(wanted))
    resized = [key for key, shape in masks.items() if shapes.get(f"{PREFIX}{key}", shape) != shape]
    problems = {"has no": missing, "has masks of the wrong size:": resized, "has, and should not have,": surplus}
    if any(problems.values()):
        raise AdapterFileError(
            f"{path} is not what was saved with its configuration: it "
            f"{' and '.join(f'{what} {keys}' for what, keys in problems.items() if keys)}. Fetch the adapter again."
        )


def check_head(path: str | Path, shapes: dict[str, tuple[int, ...]], head_shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise if the head in an adapter's file of weights is not of the size of the model's.

    Args:
        path (`str` or `Path`): The file, for the message.
        shapes (`dict[str, tuple[int, ...]]`): The shapes of its tensors.
        head_shapes (`dict[str, tuple[int, ...]]`): Those of the head that the model has for the adapter.

    Raises:
        AdapterFileError: If it is not.
    """
    found = {key: shapes.get(f"{PREFIX}{key}") for key in head_shapes}
    problems = [
        f"{key!r} is {found[key] or 'not there'}, not {shape}"
        for key, shape in head_shapes.items()
        if found[key] != shape
    ]
    if problems:
        raise AdapterFileError(
            f"{path} does not fit the head of the model: {'; '.join(problems)}. Fetch the adapter again, or open it "
            "on the base that it was made for."
        )
