"""Run 2:4 masks on the sparse tensor cores of NVIDIA GPUs, with PyTorch's semi-structured tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import HardwareError, NotPrunedError
from ..merging import merged
from ..tensor_names import plain_name
from ..tuner.masked_layers import adaprune_layers


logger = logging.get_logger(__name__)

_MIN_CAPABILITY = (8, 0)
_DTYPES = (torch.float16, torch.bfloat16)


def to_semi_structured(model: Any) -> PreTrainedModel:
    """Return a plain copy of a model whose layers with 2:4 masks run on sparse tensor cores.

    Whether that is faster depends on the layer shapes, the batch size and the sequence length: measure it with
    `hf-adaprune speed --bf16`. The result is for inference only; save the adapter, not this model.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an active adapter of `granularity="2:4"`, on an NVIDIA GPU of compute capability 8.0 or later,
            in float16 or bfloat16. Not modified.

    Returns:
        `transformers.PreTrainedModel`: A merged copy, in evaluation mode. Linear layers whose shape the kernels do not
            support (they need multiples of 32 outputs and 64 inputs, or smaller ones with cuSPARSELt) stay dense.

    Raises:
        HardwareError: If the model is not on such a GPU, or not in float16 or bfloat16.
        NotPrunedError: If no linear layer has a 2:4 mask, or none has a shape that the kernels support.
    """
    check_hardware(next(model.parameters()))
    names = [plain_name(name) for name, _ in adaprune_layers(model)]
    plain: Any = merged(model) if names else None
    converted, refused = [], {}
    for name in names:
        linear = plain.get_submodule(name)
        if not isinstance(linear, nn.Linear) or not is_semi_structured(linear.weight):
            refused[name] = "not 2:4 along its inputs"
            continue
        try:
            sparse = to_sparse_semi_structured(linear.weight.detach())
        except (RuntimeError, NotImplementedError) as error:
            refused[name] = str(error)
            continue
        linear.weight = nn.Parameter(sparse, requires_grad=False)
        converted.append(name)
    if not converted:
        raise NotPrunedError(
            'No linear layer could be made semi-structured: train with `granularity="2:4"` to the end of the '
            f"schedule, on layers with at least 64 inputs. {refused or ''}"
        )
    if refused:
        logger.warning(f"These layers stay dense: {refused}")
    return plain


def is_semi_structured(weight: torch.Tensor) -> bool:
    """Return whether at least two of every four consecutive weights along the inputs are zero.

    Args:
        weight (`torch.Tensor`): Of shape `(outputs, inputs)`.
    """
    return weight.shape[-1] % 4 == 0 and bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())


def check_hardware(tensor: torch.Tensor) -> None:
    """Raise unless a tensor's device and dtype support semi-structured sparsity.

    Raises:
        HardwareError: If the tensor is not on an NVIDIA GPU of compute capability 8.0 or later, or not in float16 or
            bfloat16.
    """
    elsewhere = (
        'On other hardware a 2:4 mask gives no speed-up: for a faster model train `granularity="neuron+head"` and use '
        "`hf_adaprune.compact`."
    )
    if tensor.device.type != "cuda" or torch.version.hip is not None:
        raise HardwareError(
            "Semi-structured sparsity needs an NVIDIA GPU of compute capability 8.0 or later (A100, RTX 30 or newer); "
            f"the model is on {str(tensor.device)!r}. {elsewhere}"
        )
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < _MIN_CAPABILITY:
        raise HardwareError(
            "Semi-structured sparsity needs compute capability 8.0 or later; "
            f"{torch.cuda.get_device_name(tensor.device)} has {capability[0]}.{capability[1]}. {elsewhere}"
        )
    if tensor.dtype not in _DTYPES:
        raise HardwareError(
            f"Semi-structured sparsity needs float16 or bfloat16; the model is in {tensor.dtype}: load it with "
            "`dtype=torch.bfloat16`, or call `model.to(torch.bfloat16)`."
        )
