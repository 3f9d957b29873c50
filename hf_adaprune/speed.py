"""How fast the forms of a pruned model are, on this machine: its base, merged, made smaller, on ONNX Runtime."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from .advice import speed_advice
from .compaction import compact
from .config import AdaPruneConfig
from .errors import HardwareError, NotPrunedError
from .example_inputs import example_inputs
from .export import OnnxModel, export_onnx
from .layer import adaprune_layers
from .merging import merged, unmasked
from .semi_structured import to_semi_structured


BASE = "base"
# A ratio whose quartiles are within this of 1 is no difference that anybody would notice.
_NOTICEABLE = 0.05


@dataclass(frozen=True)
class Timing:
    """How fast one form of a model is.

    Args:
        name (`str`): What it is: `"base"`, `"merged"`, `"compacted"`, ...
        num_bytes (`int`): The size of its weights, or of its file.
        seconds (`tuple[float, ...]`): How long each round took.
        speed_up (`tuple[float, float, float]`):
            The quartiles of how many times as fast as the base it was, round by round: above 1 it is faster.
    """

    name: str
    num_bytes: int
    seconds: tuple[float, ...]
    speed_up: tuple[float, float, float]


@dataclass(frozen=True)
class SpeedReport:
    """What was measured, and what to make of it.

    Args:
        timings (`tuple[Timing, ...]`): The forms of the model, the base first.
        batch_size (`int`): How many rows went through at once.
        length (`int`): How many tokens a row had.
        device (`str`): Where, and for a CPU on how many threads.
        config (`AdaPruneConfig`): The adapter's configuration.
    """

    timings: tuple[Timing, ...]
    batch_size: int
    length: int
    device: str
    config: AdaPruneConfig

    def conclusion(self) -> str:
        """Return in plain words what was found, and what is to be expected of masks like these."""
        found = []
        for timing in self.timings[1:]:
            low, median, high = timing.speed_up
            if low > 1 + _NOTICEABLE:
                found.append(f"{timing.name} is faster than the base: {median:.2f} times")
            elif high < 1 - _NOTICEABLE:
                found.append(f"{timing.name} is slower than the base: {median:.2f} times as fast")
            else:
                found.append(f"{timing.name} is no faster and no slower than the base")
        measured = f"At batch {self.batch_size} and length {self.length} on {self.device}: {'; '.join(found)}."
        return f"{measured} {speed_advice(self.config)}"


def measure_speed(
    model: Any,
    *,
    batch_size: int = 1,
    length: int = 128,
    repeats: int = 30,
    warmup: int = 3,
    onnx: bool = False,
    num_threads: int | None = None,
) -> SpeedReport:
    """Time the forms of a pruned model side by side, on the device that the model is on.

    The forms take turns, one forward pass each, so that a machine that slows down slows all. Compared are the base,
    the merged model, where masks are of neurons or heads the compacted one, on a GPU with 2:4 masks the
    semi-structured one, and, if asked for, base and smallest form on ONNX Runtime.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an active AdaPrune adapter. Not changed.
        batch_size (`int`): How many rows go through at once, >= 1.
        length (`int`): How many tokens a row has, >= 1.
        repeats (`int`): How many rounds are counted, >= 2.
        warmup (`int`): How many rounds come before them.
        onnx (`bool`): Whether to export and time on ONNX Runtime too; on a CPU only.
        num_threads (`int`, *optional*): How many threads a CPU computes with; by default as many as PyTorch has set.

    Returns:
        `SpeedReport`: The timings.

    Raises:
        NotPrunedError: If the model has no AdaPrune adapter.
        ValueError: If a size is out of range.
        ExportError: If the model cannot be exported.
    """
    if min(batch_size, length) < 1 or repeats < 2 or warmup < 0:
        raise ValueError(
            "`batch_size` and `length` must be at least 1, `repeats` 2 and `warmup` 0; got "
            f"{batch_size}, {length}, {repeats} and {warmup}."
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads or threads)
    try:
        forms = _forms(model)
        base = forms[BASE]
        inputs = example_inputs(base, batch_size, length)
        runs: dict[str, Callable[..., Any]] = dict(forms)
        sizes = {name: _num_bytes(form) for name, form in forms.items()}
        with TemporaryDirectory() as folder:
            if onnx and base.device.type == "cpu":
                for name in (BASE, list(forms)[-1]):
                    path = export_onnx(forms[name], Path(folder, name))
                    runs[f"{name}, ONNX"] = OnnxModel(path, torch.get_num_threads())
                    sizes[f"{name}, ONNX"] = path.stat().st_size
            seconds = _take_turns(runs, inputs, repeats, warmup)
        device = f"{torch.get_num_threads()} CPU thread(s)"
        if base.device.type == "cuda":
            device = torch.cuda.get_device_name(base.device)
    finally:
        torch.set_num_threads(threads)
    timings = tuple(
        Timing(name, sizes[name], tuple(taken), _quartiles(seconds[BASE], taken)) for name, taken in seconds.items()
    )
    return SpeedReport(timings, batch_size, length, device, _config(model))


def _forms(model: Any) -> dict[str, Any]:
    config = _config(model)
    forms: dict[str, Any] = {BASE: unmasked(model), "merged": merged(model)}
    if config.group_kinds:
        forms["compacted"] = compact(model)
    elif config.n_of_m == (2, 4):
        # Elsewhere `speed_advice` says what 2:4 needs.
        with suppress(HardwareError):
            forms["2:4"] = to_semi_structured(model)
    return forms


def _config(model: Any) -> AdaPruneConfig:
    for _, layer in adaprune_layers(model):
        for name in layer.active_adapters:
            if name in layer.adaprune_mask:
                return layer.config(name)
    raise NotPrunedError("There is nothing to compare: the model has no active AdaPrune adapter.")


@torch.inference_mode()
def _take_turns(
    runs: Mapping[str, Callable[..., Any]], inputs: dict[str, torch.Tensor], repeats: int, warmup: int
) -> dict[str, list[float]]:
    on_gpu = inputs["input_ids"].is_cuda
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(warmup + repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run(**inputs)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[warmup:] for name, taken in seconds.items()}


def _quartiles(base: list[float], taken: list[float]) -> tuple[float, float, float]:
    low, median, high = statistics.quantiles([one / other for one, other in zip(base, taken, strict=True)], n=4)
    return low, median, high


def _num_bytes(model: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
