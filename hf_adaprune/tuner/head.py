"""The division of a model into body and head, and the installation of an adapter's head."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TaskType
from torch import nn
from transformers import AutoModel, PreTrainedModel

from ..config import AdaPruneConfig
from ..errors import AdapterFileError, BaseMismatchError, ConfigError
from ..labels import LABEL_FIELDS, plain_labels, stored_labels
from .layer_average import LayerAverageHead, make_layer_average_head


_TASK_TYPES = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "Model": TaskType.FEATURE_EXTRACTION,
}

# Names that PEFT itself adds to `modules_to_save`, whether the model has such modules or not.
PEFT_HEADS = {"classifier", "score", "qa_outputs"}

# For these task types PEFT needs a model that generates.
_GENERATES = {TaskType.CAUSAL_LM, TaskType.SEQ_2_SEQ_LM}


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that make up a model's task head.

    The head is every module with parameters outside of `model.base_model`, and the pooler inside it, which serves the
    task and is missing from many checkpoints. The list is empty for a model without a head, whose pooler is not
    trained, and for a language model, whose output layer is pre-trained. Where the body is not a module of its own, as
    in T5's model for question answering, the head is the modules that PEFT treats as a head by their names.
    """
    body = getattr(model, "base_model", model)
    if output_embeddings(model) is not None:
        return []
    if body is model:
        return [name for name, child in model.named_children() if name in PEFT_HEADS and _has_parameters(child)]
    outside = [name for name, child in model.named_children() if child is not body and _has_parameters(child)]
    pooler = getattr(body, "pooler", None)
    if pooler is None or not _has_parameters(pooler):
        return outside
    return [f"{model.base_model_prefix}.pooler", *outside]


def head_wrappers(model: nn.Module) -> dict[str, ModulesToSaveWrapper]:
    """Return, by name, the modules of which PEFT holds a copy per adapter: the head and other `modules_to_save`."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def output_embeddings(model: Any) -> nn.Module | None:
    """Return a language model's output layer, or `None` for every other model."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def body_name(model: nn.Module) -> str:
    """Return the name prefix of the body's modules, such as `"bert."`; `""` if the body is the model itself."""
    return "" if getattr(model, "base_model", model) is model else f"{model.base_model_prefix}."


def plan_head(model: nn.Module, config: AdaPruneConfig) -> None:
    """Set `modules_to_save` to include the head and, for a new adapter, `model_config` and the task type.

    Args:
        model (`torch.nn.Module`): The model that the adapter will be added to; not changed.
        config (`AdaPruneConfig`): The adapter's configuration; changed in place.

    Raises:
        ConfigError: If the model cannot have the requested head.
    """
    classifies = any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)
    fits = isinstance(model, PreTrainedModel) and classifies and hasattr(model, "classifier")
    if config.head == "layer_average" and not fits:
        raise ConfigError(
            '`head="layer_average"` needs a transformers model for sequence classification with a `classifier`, got a '
            f'{type(model).__name__}. Use `head="model"`.'
        )
    if isinstance(model, PreTrainedModel) and config.model_config is None:
        _record(model, config)
    loose = [name for name, _ in model.named_parameters(recurse=False)] if body_name(model) else []
    if loose and not config.is_stored:
        warnings.warn(
            f"{loose} of {type(model).__name__} are in no submodule, and so not part of the head: they are neither "
            "trained nor saved. To train them, move them into a submodule.",
            stacklevel=2,
        )
    head = ["classifier"] if config.head == "layer_average" else head_modules(model)
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *head])) or None


@contextmanager
def fitting_head(model: nn.Module, config: AdaPruneConfig, num_labels: int | None) -> Iterator[None]:
    """Give a model, within the context, a head of the adapter's shape for PEFT to copy.

    On exit the model's own head is back in place; it is used when no adapter is active.

    Args:
        model (`torch.nn.Module`): The model.
        config (`AdaPruneConfig`): The adapter's configuration, after `plan_head`.
        num_labels (`int`, *optional*): Number of labels of the model's own head, if it is a transformers model.
    """
    fitting: dict[str, nn.Module] = {}
    if isinstance(model, PreTrainedModel) and config.model_config is not None:
        wanted = copy.deepcopy(model.config)
        wanted.id2label = stored_labels(config.model_config)["id2label"]
        if wanted.num_labels != num_labels:
            fitting = _build_head(model, wanted)
        if config.head == "layer_average":
            fitting["classifier"] = make_layer_average_head(model, wanted.num_labels)
    own = {name: _swap(model, name, module) for name, module in fitting.items()}
    try:
        yield
    finally:
        for name, module in own.items():
            is_wrapped = isinstance(model.get_submodule(name), ModulesToSaveWrapper)
            _swap(model, name, module.requires_grad_(False) if is_wrapped else module)


def _swap(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    parent, _, child = name.rpartition(".")
    owner = model.get_submodule(parent)
    if isinstance(getattr(owner, child), ModulesToSaveWrapper):
        owner, child = getattr(owner, child), "original_module"
    current = getattr(owner, child)
    setattr(owner, child, module)
    return current


def _record(model: PreTrainedModel, config: AdaPruneConfig) -> None:
    name = type(model).__name__
    config.model_config = model.config.to_diff_dict() | {
        "architectures": [name],
        "model_type": model.config.model_type,
    }
    stored = {field: value for field, value in config.model_config.items() if field in LABEL_FIELDS}
    config.model_config |= plain_labels(stored)
    if has_outdated_problem_type(model):
        config.model_config.pop("problem_type")
    if config.task_type is None:
        config.task_type = _task_type(model)
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": name, "parent_library": type(model).__module__}


def has_outdated_problem_type(model: nn.Module) -> bool:
    """Return whether `config.problem_type` was set by a forward pass while the model had another head."""
    if not isinstance(model, PreTrainedModel):
        return False
    if model.config.problem_type == "regression":
        return getattr(model, "num_labels", None) == 1 and model.config.num_labels > 1
    return model.config.problem_type == "single_label_classification" and model.config.num_labels == 1


def _task_type(model: PreTrainedModel) -> TaskType | None:
    """Return the task type whose PEFT Auto class creates a model of this class, or `None` if there is none."""
    task = next((task for ending, task in _TASK_TYPES.items() if type(model).__name__.endswith(ending)), None)
    inner = {name for head in head_modules(model) for name, _ in model.get_submodule(head).named_modules()}
    if any(name.rpartition(".")[2] in PEFT_HEADS for name in inner):
        return None  # PEFT would copy this module again, inside its copy of the whole head
    if task == TaskType.FEATURE_EXTRACTION:
        if "inputs_embeds" not in inspect.signature(model.forward).parameters:
            return None  # PEFT's class for this task would pass it
        built = AutoModel._model_mapping.get(type(model.config), ())
        return task if type(model) in (built if isinstance(built, tuple) else (built,)) else None
    return task


def check_architecture(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if an adapter is for models of another class, or for a task that the model does not support.

    Raises:
        BaseMismatchError: If a stored adapter was made for a model of another class.
        ConfigError: If the task type is one of generating text, and the model cannot generate.
    """
    if config.task_type in _GENERATES and not hasattr(model, "prepare_inputs_for_generation"):
        raise ConfigError(
            f"`task_type={str(config.task_type)!r}` needs a model that generates text, got a {type(model).__name__}: "
            "omit `task_type`, or give that of the model."
        )
    if config.model_config is None or not isinstance(model, PreTrainedModel):
        return
    architecture = config.architecture or type(model).__name__
    if architecture not in {cls.__name__ for cls in type(model).__mro__}:
        raise BaseMismatchError(
            f"The adapter was made for a {architecture}, the model is a {type(model).__name__}: heads and module "
            f"names differ. Open the adapter with {architecture}, or with the Auto class that creates it."
        )


def check_modules_to_save(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if PEFT would copy a module inside another copied module, or one that a stored adapter does not contain.

    Raises:
        ConfigError: If a module of a new adapter is inside another: what is saved of it could not be loaded.
        AdapterFileError: If a stored adapter lacks tensors of its `modules_to_save` or head.
    """
    added = {"modules_to_save", "original_module"}
    modules = {name: module for name, module in model.named_modules() if name and not added & set(name.split("."))}
    # PEFT matches names by their endings.
    endings = tuple(config.modules_to_save or ())
    copied = {name: module for name, module in modules.items() if name.endswith(endings)}
    if not config.is_stored:
        inside = [f"{name!r} in {outer!r}" for name in copied for outer in copied if name.startswith(f"{outer}.")]
        if inside:
            raise ConfigError(
                f"`modules_to_save={config.modules_to_save}` (the head is always included) matches modules inside "
                f"other matched ones: {', '.join(inside)}. Name only the outer ones, so that no inner one matches."
            )
        return
    copied = {name: getattr(module, "original_module", module) for name, module in copied.items()}
    if config.head == "layer_average":
        copied["classifier"] = LayerAverageHead(1, 1, 1)
    wanted = [f"{name}.{key}" for name, module in copied.items() for key in module.state_dict()]
    missing = sorted(set(wanted) - set(config.head_tensors or ()))
    if missing:
        raise AdapterFileError(
            f"`modules_to_save={config.modules_to_save}` and `head={config.head!r}` require the tensors {missing}, "
            "which `head_tensors` does not list: the configuration is not what was saved, or the adapter has another "
            "head than its architecture. Fetch the adapter again or, if the head is your own, give it to a model and "
            "use `PeftModel.from_pretrained(model, name)`."
        )


def _build_head(model: Any, wanted: Any) -> dict[str, nn.Module]:
    """Build the modules of a head whose parameter shapes differ from the model's."""
    with torch.device("meta"):
        template = type(model)._from_config(wanted)
    reference = next(model.parameters())
    built = {}
    for name in head_modules(model):
        fresh, current = template.get_submodule(name), model.get_submodule(name)
        current = current.original_module if isinstance(current, ModulesToSaveWrapper) else current
        if [p.shape for p in fresh.parameters()] != [p.shape for p in current.parameters()]:
            fresh.to_empty(device=reference.device).to(reference.dtype)
            fresh.apply(model._init_weights)
            built[name] = fresh
    return built
