"""Where a model's body ends and its head begins, and how a head that belongs to an adapter is put in place."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TaskType
from torch import nn
from transformers import PreTrainedModel

from .config import AdaPruneConfig
from .errors import BaseMismatchError, ConfigError


_TASK_TYPES = {
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForMaskedLM": None,
    "Model": TaskType.FEATURE_EXTRACTION,
}
_LABEL_FIELDS = ("id2label", "label2id", "problem_type")


def head_modules(model: nn.Module) -> list[str]:
    """Return the names of the modules that make up a model's task head.

    The head is everything with parameters outside of `model.base_model`, and the pooler inside it: a task layer by
    use, and one that many checkpoints lack. A model without a head has no pooler to train, and the output layer of a
    language model is pre-trained: both give an empty list.
    """
    body = getattr(model, "base_model", model)
    if body is model or output_embeddings(model) is not None:
        return []
    outside = [name for name, child in model.named_children() if child is not body and _has_parameters(child)]
    pooler = getattr(body, "pooler", None)
    if pooler is None or not _has_parameters(pooler):
        return outside
    return [f"{model.base_model_prefix}.pooler", *outside]


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def output_embeddings(model: Any) -> nn.Module | None:
    """Return a language model's output layer, or `None` for every other model."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def body_name(model: nn.Module) -> str:
    """Return the name prefix of the modules of the body: `"bert."`, say, or `""` for a model without a head."""
    return "" if getattr(model, "base_model", model) is model else f"{model.base_model_prefix}."


def plan_head(model: nn.Module, config: AdaPruneConfig) -> None:
    """Write into a configuration which modules are the head, and, for a fresh adapter, the model's configuration.

    Args:
        model (`torch.nn.Module`): The model that the adapter is about to be put on; not changed.
        config (`AdaPruneConfig`): The adapter's configuration; changed in place.

    Raises:
        ConfigError: If the model cannot have the head that was asked for.
    """
    classifies = any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)
    fits = isinstance(model, PreTrainedModel) and classifies and hasattr(model, "classifier")
    if config.head == "layer_average" and not fits:
        raise ConfigError(
            '`head="layer_average"` replaces the `classifier` of a transformers model for sequence classification; '
            f'{type(model).__name__} is none, or has none. Use `head="model"`.'
        )
    if isinstance(model, PreTrainedModel) and config.model_config is None:
        _record(model, config)
    head = ["classifier"] if config.head == "layer_average" else head_modules(model)
    config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or []), *head])) or None


def put_head(model: nn.Module, config: AdaPruneConfig) -> None:
    """Give a model the head that an adapter has: with the adapter's labels, where a door built the base with others.

    Args:
        model (`torch.nn.Module`): The model; changed in place.
        config (`AdaPruneConfig`): The adapter's configuration, after `plan_head`.
    """
    if isinstance(model, PreTrainedModel):
        _adapt_labels(model, config)
    if config.head == "layer_average":
        _install_layer_average(model)


def _record(model: PreTrainedModel, config: AdaPruneConfig) -> None:
    name = type(model).__name__
    config.model_config = model.config.to_diff_dict() | {
        "architectures": [name],
        "model_type": model.config.model_type,
    }
    if config.task_type is None:
        config.task_type = next((task for ending, task in _TASK_TYPES.items() if name.endswith(ending)), None)
    if config.task_type is None:
        config.auto_mapping = {"base_model_class": name, "parent_library": type(model).__module__}


def check_architecture(model: nn.Module, config: AdaPruneConfig) -> None:
    """Raise if a stored adapter was made for a model of another class.

    Raises:
        BaseMismatchError: If it was.
    """
    if config.model_config is None or not isinstance(model, PreTrainedModel):
        return
    architecture = (config.model_config.get("architectures") or [type(model).__name__])[0]
    if architecture not in {cls.__name__ for cls in type(model).__mro__}:
        raise BaseMismatchError(
            f"The adapter was made for a {architecture}, the model is a {type(model).__name__}: heads and module "
            f"names differ. Open the adapter with {architecture}, or the Auto class that gives it."
        )


def record_labels(model: Any, config: AdaPruneConfig) -> None:
    """Write into an adapter's configuration what the labels of its head are by now.

    Training settles the kind of problem: a head with one output becomes a regression with the first batch.
    """
    if config.model_config is not None:
        current = model.config.to_dict()
        config.model_config |= {field: current[field] for field in _LABEL_FIELDS if current.get(field) is not None}


def _adapt_labels(model: PreTrainedModel, config: AdaPruneConfig) -> None:
    saved = type(model.config).from_dict(dict(config.model_config or {}))
    if saved.num_labels != model.config.num_labels:
        _rebuild_head(model, type(model)._from_config, saved)
    for field in _LABEL_FIELDS:
        setattr(model.config, field, getattr(saved, field, None))
    if hasattr(model, "num_labels"):
        model.num_labels = saved.num_labels


def _rebuild_head(model: PreTrainedModel, build: Any, saved: Any) -> None:
    with torch.device("meta"):
        template = build(saved)
    reference = next(model.parameters())
    for name in head_modules(model):
        parent, _, child = name.rpartition(".")
        owner, fresh = model.get_submodule(parent), template.get_submodule(name)
        current = getattr(owner, child)
        if isinstance(current, ModulesToSaveWrapper):
            owner, child, current = current, "original_module", current.original_module
        if [p.shape for p in fresh.parameters()] == [p.shape for p in current.parameters()]:
            continue
        fresh.to_empty(device=reference.device).to(reference.dtype)
        fresh.apply(model._init_weights)
        setattr(owner, child, fresh)


class LayerAverageHead(nn.Module):
    """The head of "Adapting by Pruning" (arXiv 2105.03343): a learned average of every layer's first vector, a ReLU
    layer of the hidden size, and an output layer.

    Args:
        num_states (`int`): How many hidden states there are: the embeddings and one a layer.
        hidden_size (`int`): Their width.
        num_labels (`int`): The width of the output.
    """

    def __init__(self, num_states: int, hidden_size: int, num_labels: int) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(num_states))
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, num_labels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map hidden states of shape `(num_states, batch, hidden_size)` to logits of shape `(batch, num_labels)`."""
        average = torch.einsum("l,lbh->bh", self.layer_weights.softmax(0), states)
        return self.out_proj(torch.relu(self.dense(average)))


class _FirstVectors:
    """Carry the first vector of every hidden state from the body's output to the head's input."""

    def __init__(self) -> None:
        self.states: torch.Tensor | None = None
        self.wanted = False

    def ask(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        wanted = kwargs.get("output_hidden_states")
        self.wanted = module.config.output_hidden_states if wanted is None else wanted
        return args, {**kwargs, "output_hidden_states": True, "return_dict": True}

    def take(self, module: nn.Module, args: Any, output: Any) -> None:
        self.states = torch.stack([state[:, 0] for state in output.hidden_states])
        if not self.wanted:
            # Else the model hands them on, and the Trainer takes them for predictions.
            output.hidden_states = None

    def give(self, module: nn.Module, args: Any) -> tuple[torch.Tensor | None]:
        states, self.states = self.states, None
        return (states,)

    def __deepcopy__(self, memo: Any) -> _FirstVectors:
        # PEFT copies the head for each adapter: the copies are fed by the same body.
        return self


def _install_layer_average(model: Any) -> None:
    current = model.classifier
    if isinstance(current, LayerAverageHead) or isinstance(
        getattr(current, "original_module", None), LayerAverageHead
    ):
        return
    body, courier = model.base_model, _FirstVectors()
    head = LayerAverageHead(model.config.num_hidden_layers + 1, model.config.hidden_size, model.config.num_labels)
    # Under `low_cpu_mem_usage` PEFT makes every parameter on the meta device, this one too.
    reference = next(model.parameters())
    head.to_empty(device=reference.device).to(reference.dtype)
    head.apply(model._init_weights)
    nn.init.zeros_(head.layer_weights)
    model.classifier = head
    body.register_forward_pre_hook(courier.ask, with_kwargs=True)
    body.register_forward_hook(courier.take)
    head.register_forward_pre_hook(courier.give)
