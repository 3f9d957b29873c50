"""Export models to ONNX, and compare the result on ONNX Runtime with PyTorch."""

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
from ..merging import merged
from ..tuner.example_inputs import example_inputs, input_names, longest_input
from ..tuner.masked_layers import has_masks


ONNX_FILE = "model.onnx"
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def export_onnx(model: Any, folder: str | Path) -> Path:
    """Export a model to ONNX, for any batch size and any sequence length.

    Before the file is put in place it is run on ONNX Runtime, and must give PyTorch's results for padded batches of
    several sizes and lengths. Inputs are `input_ids`, `attention_mask` and, if the model distinguishes segments,
    `token_type_ids`, all int64 of shape `(batch, length)`, or `(batch, choices, length)` for multiple choice. Outputs
    have the names of the model's own: `logits`, or `last_hidden_state`, or `start_logits` and `end_logits`.

    Args:
        model (`transformers.PreTrainedModel` or `peft.PeftModel`):
            A plain model, such as `compact` returns, in float32 on the CPU. A model with masks is merged first, in a
            copy.
        folder (`str` or `Path`): Where to write `model.onnx` and the model's configuration; created if missing.

    Returns:
        `Path`: The path of the ONNX file.

    Raises:
        ExportError: If a package of the extra `onnx` is missing, the model is not a transformers model in float32 on
            the CPU, PyTorch cannot export it, or the results differ.

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
    modes = {module: module.training for module in model.modules()}
    try:
        with TemporaryDirectory(dir=folder) as aside:
            _export(_Tensors(model.eval()), Path(aside, ONNX_FILE))
            _check(_Tensors(model), Path(aside, ONNX_FILE))
            model.config.save_pretrained(aside)
            for file in Path(aside).iterdir():  # several if the weights are too large for one file
                file.replace(folder / file.name)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return folder / ONNX_FILE


class OnnxModel:
    """Run an exported model on ONNX Runtime, on the CPU.

    Args:
        path (`str` or `Path`): The ONNX file.
        num_threads (`int`, *optional*): The number of threads; by default ONNX Runtime decides.

    Attributes:
        inputs (`list[str]`): The names of the model's inputs.

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
        """Return the model's outputs; inputs that it does not have are ignored."""
        arrays = {name: inputs[name].numpy() for name in self.inputs}
        return tuple(torch.from_numpy(output) for output in self.session.run(None, arrays))


def _require_packages() -> None:
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"ONNX export needs {', '.join(missing)}: run `pip install 'hf_adaprune[onnx]'`.")


class _Tensors(nn.Module):
    """Wrap a model so that it returns a plain tuple of tensors."""

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
    """Silence the warnings of the exporter's internals."""
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
    # Long enough that a local attention window does not cover the whole row.
    longest = min(160, longest_input(model.model))
    for batch_size, length in ((1, 2), (3, 5), (2, longest)):
        inputs = example_inputs(model.model, batch_size, length, padded=True)
        for expected, found in zip(model(*inputs.values()), exported(**inputs), strict=True):
            if expected.shape[:2] == inputs["input_ids"].shape:  # one result per token
                # Results at padded positions are meaningless and may differ.
                attended = inputs["attention_mask"].bool()
                expected, found = expected[attended], found[attended]
            error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-6))
            if not error < 1e-3:
                raise ExportError(
                    f"{type(model.model).__name__} must give the same results on ONNX Runtime as in PyTorch, but they "
                    f"differ by {error:.2g} of their range for {batch_size} rows of {length} tokens. Nothing was "
                    "written: use the model in PyTorch."
                )
