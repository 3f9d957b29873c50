"""The masked layers: one class, with its forward pass, for each type of layer that can be masked."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from transformers.pytorch_utils import Conv1D

from ..config import AdaPruneConfig
from .binarize import masked_linear
from .cached_weight import CachedWeight
from .groups import Groups
from .layer import AdaPruneLayer


class Linear(AdaPruneLayer):
    """A masked `torch.nn.Linear`."""

    input_dim = 1

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_tracing()):
            # A short path, taken first: it is most of an adapter's overhead in the forward pass of a single sentence.
            # The tracer compares a trace with gradients to one without, so it must not see two paths.
            built: CachedWeight | None = self._cached
            if built is not None and built.is_valid(self):
                weight, base = built.product, self._modules["base_layer"]
                x = x if x.dtype == weight.dtype else self._cast_input_dtype(x, weight.dtype)
                return F.linear(x, weight, base._parameters["bias"])  # type: ignore[union-attr]
        trained = self.straight_through_inputs()
        if trained is not None:
            weight = self.base_weight
            return masked_linear(self._cast_input_dtype(x, weight.dtype), weight, *trained, self.bias)
        weight = self.effective_weight()
        return F.linear(self._cast_input_dtype(x, weight.dtype), weight, self.bias)


class Conv1DLinear(AdaPruneLayer):
    """A masked `transformers` `Conv1D`: a linear layer whose weight is stored transposed, `(in, out)`."""

    input_dim = 0

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        trained = self.straight_through_inputs()
        if trained is not None:
            scores, mask = trained
            x = self._cast_input_dtype(x, self.base_weight.dtype)
            return masked_linear(x, self.base_weight.t(), scores.t(), mask.t(), self.bias)
        weight = self.effective_weight()
        x = self._cast_input_dtype(x, weight.dtype)
        output = torch.addmm(self.get_base_layer().bias, x.reshape(-1, self.in_features), weight)
        return output.view(*x.shape[:-1], self.out_features)


class Embedding(AdaPruneLayer):
    """A masked `torch.nn.Embedding`."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        embedded = F.embedding(x, self.effective_weight(), self.get_base_layer().padding_idx)
        scale = self._get_embed_scale()
        return embedded if scale is None else embedded * scale.to(embedded.dtype)


def masked_class(module: nn.Module) -> type[AdaPruneLayer] | None:
    """Return the class of masked layer that computes what a module does, or `None` if there is none."""
    # A layer with its own `forward`, or with a computed weight, may compute anything.
    if "forward" in vars(module) or not isinstance(module._parameters.get("weight"), nn.Parameter):
        return None
    forward = type(module).forward
    if isinstance(module, nn.Linear) and forward is nn.Linear.forward:
        return Linear
    if isinstance(module, Conv1D) and forward is Conv1D.forward:
        return Conv1DLinear
    if isinstance(module, nn.Embedding):
        is_plain = forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return Embedding if is_plain and module.max_norm is None else None  # `max_norm`: look-ups change the weight
    return None


def wrap(
    module: nn.Module,
    adapter_name: str,
    config: AdaPruneConfig,
    groups: Groups | None = None,
    mask_bytes: int | None = None,
) -> AdaPruneLayer | None:
    """Return the masked layer for a module, or `None` if there is none for its type."""
    layer_cls = masked_class(module)
    if layer_cls is not None and (module._forward_hooks or module._forward_pre_hooks):
        warnings.warn(
            f"A {type(module).__name__} with hooks is being masked, and its hooks are no longer called: register them "
            "on the masked layer afterwards.",
            stacklevel=2,
        )
    return None if layer_cls is None else layer_cls(module, adapter_name, config, groups, mask_bytes)
