"""Models in the ONNX format, checked against PyTorch on ONNX Runtime."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ExportError
from ..tuner.masked_layers import has_masks
from ..tuner.merging import merged
from .example_inputs import example_inputs, input_names, longest_input


ONNX_FILE = "model.onnx"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(model: Any, folder: str | Path) -> Path:
    """Write a model in the ONNX format, for any batch and any length.

    What is written is run on ONNX Runtime before it takes its place: batches of other sizes and lengths, with padding,
    give PyTorch's results, or it is an error. Inputs are `input_ids`, `attention_mask` and, where the model tells
    segments apart, `token_type_ids`, all int64 of shape `(batch, length)`. Outputs are those of the model, by their
    names: `logits`, or `last_hidden_state`, or `start_logits` and `end_logits`.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            A plain model, such as `compact` returns, in float32 on the CPU; one with an adapter is merged first, in a
            copy.
        folder (`str` or `Path`): Where `model.onnx` and the model's configuration go; made if it is not there.

    Returns:
        `Path`: The file.

    Raises:
        ExportError: If a package of the extra `onnx` is missing, PyTorch cannot export the model, or the results
            differ.

    Example:

        >>> export_onnx(compact(model), "bert-sst2-small")
    """
    _require_packages()
    if has_masks(model):
        model = merged(model)
    if not isinstance(model, PreTrainedModel):
        raise ExportError(f"`export_onnx` takes a transformers model, got a {type(model).__name__}.")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ExportError(
            f"`export_onnx` takes a model in float32 on the CPU, got one in {model.dtype} on {str(model.device)!r}: "
            "call `model.float().cpu()` first."
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    was_training = model.training
    try:
        with TemporaryDirectory(dir=folder) as aside:
            _export(_Tensors(model.eval()), Path(aside, ONNX_FILE))
            _check(_Tensors(model), Path(aside, ONNX_FILE))
            for file in Path(aside).iterdir():  # more than one where weights are too many for one file
                file.replace(folder / file.name)
    finally:
        model.train(was_training)
    model.config.save_pretrained(folder)
    return folder / ONNX_FILE


class OnnxModel:
    """Run an exported model on ONNX Runtime, on the CPU.

    Args:
        path (`str` or `Path`): The file.
        num_threads (`int`, *optional*): How many threads to compute with; by default ONNX Runtime decides.

    Attributes:
        inputs (`list[str]`): The names of what it takes.

    Raises:
        ExportError: If a package of the extra `onnx` is missing.
    """

    def __init__(self, path: str | Path, num_threads: int | None = None) -> None:
        _require_packages()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads or 0
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.inputs = [value.name for value in self.session.get_inputs()]

    def __call__(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the model's outputs; inputs that it does not have are left out."""
        arrays = {name: inputs[name].numpy() for name in self.inputs}
        return tuple(torch.from_numpy(output) for output in self.session.run(None, arrays))


def _require_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX needs {', '.join(missing)}: run `pip install 'hf_adaprune[onnx]'`.")


class _Tensors(nn.Module):
    """A model whose results are a plain tuple of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.named(*inputs).values())

    def named(self, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        output = self.model(**dict(zip(input_names(self.model), inputs, strict=True)))
        return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


@torch.no_grad()
def _export(model: _Tensors, path: Path) -> None:
    inputs = example_inputs(model.model, 2, 8, padded=True)
    dynamic = tuple(dict.fromkeys(range(tensor.dim()), torch.export.Dim.DYNAMIC) for tensor in inputs.values())
    try:
        with _quiet():
            program: Any = torch.onnx.export(
                model,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=list(model.named(*inputs.values())),
                dynamic_shapes=(dynamic,),
                dynamo=True,
                verbose=False,
            )
    except Exception as error:
        raise ExportError(
            f"PyTorch {torch.__version__} cannot export this {type(model.model).__name__}: {error}"
        ) from error
    _name_dimensions(program.model.graph)
    program.save(path)


def _name_dimensions(graph: Any) -> None:
    names: dict[str, str] = {}
    for value in graph.inputs:
        dimensions = ("batch", "length") if len(value.shape) == 2 else ("batch", "choices", "length")
        names |= {str(symbol): name for symbol, name in zip(value.shape, dimensions, strict=True)}
    for value in (*graph.inputs, *graph.outputs):
        for dimension, symbol in enumerate(value.shape):
            value.shape[dimension] = names.get(str(symbol), symbol)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep to itself what the exporter's parts warn each other of."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@torch.no_grad()
def _check(model: _Tensors, path: Path) -> None:
    exported = OnnxModel(path)
    # Long enough for a window of local attention to leave something out.
    longest = min(160, longest_input(model.model))
    for batch_size, length in ((1, 2), (3, 5), (2, longest)):
        inputs = example_inputs(model.model, batch_size, length, padded=True)
        for expected, found in zip(model(*inputs.values()), exported(**inputs), strict=True):
            if expected.shape[:2] == inputs["input_ids"].shape:  # a result for each token
                # What is computed for padding has no meaning, and no place where it would matter.
                attended = inputs["attention_mask"].bool()
                expected, found = expected[attended], found[attended]
            error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not error < 1e-3:
                raise ExportError(
                    f"On ONNX Runtime {type(model.model).__name__} gives other results than in PyTorch: they differ "
                    f"by {error:.2g} of their range for {batch_size} rows of {length} tokens. Nothing was written."
                )
