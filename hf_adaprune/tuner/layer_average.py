"""The head of the paper, on an average of all layers' vectors of the first token."""

from __future__ import annotations

import functools
import threading
from typing import Any, NoReturn

import torch
from torch import nn
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from ..errors import MergeError


class LayerAverageHead(nn.Module):
    """The head of "Adapting by Pruning" (arXiv 2105.03343): a learned average of every layer's first vector, a ReLU
    layer of the hidden size, and an output layer.

    Args:
        num_states (`int`): Number of hidden states: the embeddings and one per layer.
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


class _FirstVectors(threading.local):
    """Pass the first vector of every hidden state from the body's output to the head's input, per thread."""

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
            # Otherwise the model returns them, and the Trainer treats them as predictions.
            output.hidden_states = None

    def give(self, module: nn.Module, args: Any) -> tuple[torch.Tensor | None]:
        states, self.states = self.states, None
        return (states,)

    def __deepcopy__(self, memo: Any) -> _FirstVectors:
        # PEFT copies the head for each adapter: the copies get their input from the same body.
        return self

    def __reduce__(self) -> Any:
        return _FirstVectors, ()


def make_layer_average_head(model: Any, num_labels: int) -> LayerAverageHead:
    """Create the paper's head for a model, with the model's body as its source of hidden states.

    Args:
        model (`transformers.PreTrainedModel`): The model; its body gets hooks that pass its hidden states on.
        num_labels (`int`): The width of the output.
    """
    head = LayerAverageHead(model.config.num_hidden_layers + 1, model.config.hidden_size, num_labels)
    # Under `low_cpu_mem_usage` PEFT creates all parameters on the meta device, these included.
    reference = next(model.parameters())
    head.to_empty(device=reference.device).to(reference.dtype)
    head.apply(model._init_weights)
    nn.init.zeros_(head.layer_weights)
    head.register_forward_pre_hook(_courier(model.base_model).give)
    return head


def _courier(body: nn.Module) -> _FirstVectors:
    for hook in body._forward_hooks.values():
        if isinstance(courier := getattr(hook, "__self__", None), _FirstVectors):
            return courier
    courier = _FirstVectors()
    # By default transformers installs these in the first forward pass, which cannot be compiled then.
    maybe_install_capturing_hooks(body)
    body.register_forward_pre_hook(courier.ask, with_kwargs=True)
    body.register_forward_hook(courier.take)
    return courier


def refuse_to_save(model: Any) -> None:
    """Make saving raise if a model without masks still has such a head: it would be loaded with a random one.

    From then on `model.save_pretrained` and `model.push_to_hub` raise `MergeError`.
    """
    if _has_layer_average(model):
        model.save_pretrained = model.push_to_hub = functools.partial(_refuse, type(model).__name__)


def remove_couriers(model: nn.Module) -> None:
    """Remove the hooks that serve such heads from a model that has none left."""
    if _has_layer_average(model):
        return
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), _FirstVectors):
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)


def _has_layer_average(model: nn.Module) -> bool:
    return any(isinstance(module, LayerAverageHead) for module in model.modules())


def _refuse(architecture: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise MergeError(
        f'The model has the head "layer_average", which the {architecture} of transformers does not have: after '
        "merging it can be used in memory only. Save the adapter, by `save_pretrained` of the model before merging."
    )
