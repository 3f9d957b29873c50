"""Measure how fast the forms of a pruned model are: base, merged, compacted, semi-structured, on ONNX Runtime."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from ..errors import HardwareError, NotPrunedError, SizeError
from ..merging import merged, unmasked
from ..structured.compaction import active_config, compact
from ..structured.semi_structured import to_semi_structured
from ..tuner.example_inputs import example_inputs
from .export import OnnxModel, export_onnx


BASE = "base"
# A form counts as faster or slower only if the quartiles of its speed-up are on one side of 1 by more than this.
_NOTICEABLE = 0.05


class Form(NamedTuple):
    """A callable form of a model, and the size in bytes of its weights or its file."""

    run: Callable[..., Any]
    num_bytes: int


@dataclass(frozen=True)
class Timing:
    """Timing of one form of a model.

    Args:
        name (`str`): The form: `"base"`, `"merged"`, `"compacted"`, ...
        num_bytes (`int`): The size of its weights, or of its file, in bytes.
        seconds (`tuple[float, ...]`): How long each round took.
        speed_up (`tuple[float, float, float]`):
            The quartiles of the speed-up over the base, taken round by round: above 1, the form is faster.
    """

    name: str
    num_bytes: int
    seconds: tuple[float, ...]
    speed_up: tuple[float, float, float]

    @property
    def median(self) -> float:
        """The median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def __str__(self) -> str:
        low, median, high = self.speed_up
        if low > 1 + _NOTICEABLE:
            return f"{self.name} is faster than the base: {median:.2f} times"
        if high < 1 - _NOTICEABLE:
            return f"{self.name} is slower than the base: {median:.2f} times as fast"
        return f"{self.name} is no faster and no slower than the base"


@dataclass(frozen=True)
class SpeedReport:
    """Timings of the forms of a model for one batch size and length.

    Args:
        timings (`tuple[Timing, ...]`): The forms of the model, the base first.
        batch_size (`int`): The number of rows per batch.
        length (`int`): The number of tokens per row.
        device (`str`): The device; for a CPU, with the number of threads.
    """

    timings: tuple[Timing, ...]
    batch_size: int
    length: int
    device: str

    def rows(self) -> list[dict[str, Any]]:
        """Return the measurements as plain data, one row per form; `speed_up` holds quartiles."""
        size = {"batch_size": self.batch_size, "length": self.length, "device": self.device}
        return [
            size
            | {"form": timing.name, "speed_up": [round(ratio, 3) for ratio in timing.speed_up]}
            | {"milliseconds": round(1000 * timing.median, 3), "bytes": timing.num_bytes}
            for timing in self.timings
        ]

    def __str__(self) -> str:
        found = "; ".join(map(str, self.timings[1:]))
        return f"At batch {self.batch_size} and length {self.length} on {self.device}: {found}."


def measure_speed(
    model: Any,
    *,
    batch_sizes: Sequence[int] = (1,),
    lengths: Sequence[int] = (128,),
    repeats: int = 30,
    warmup: int = 3,
    onnx: bool = False,
    num_threads: int | None = None,
    cpu_time: bool = False,
) -> list[SpeedReport]:
    """Time the forms of a pruned model side by side, on the device that the model is on.

    The forms take turns, one forward pass each, so that a slowdown of the machine affects all of them. They are the
    base; the merged model; if neurons or heads are masked, the compacted model; for 2:4 masks in half precision on a
    supported GPU, the semi-structured model; and, on request, the base and the smallest form on ONNX Runtime.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an active AdaPrune adapter. Not modified.
        batch_sizes (`Sequence[int]`): Numbers of rows per batch, >= 1.
        lengths (`Sequence[int]`): Numbers of tokens per row, >= 1; every batch size is measured with every length.
        repeats (`int`): The number of timed rounds, >= 2.
        warmup (`int`): The number of untimed rounds before them, >= 0.
        onnx (`bool`): Whether to also export to ONNX and time on ONNX Runtime; on a CPU only.
        num_threads (`int`, *optional*): The number of CPU threads; by default PyTorch's current setting.
        cpu_time (`bool`):
            Whether to measure processor time instead of wall-clock time, on a CPU with one thread: other load on the
            machine then affects the result less.

    Returns:
        `list[SpeedReport]`: One for each batch size and length.

    Raises:
        NotPrunedError: If the model has no active AdaPrune adapter.
        SizeError: If a batch size, a length, `repeats` or `warmup` is out of range, or `cpu_time` is combined with
            more than one thread.
        HardwareError: If ONNX Runtime or processor time is requested for a model that is not on the CPU.
        CompactionError: If neurons or heads are masked and the model cannot be compacted.
        ExportError: If ONNX is requested and the model cannot be exported.
    """
    if repeats < 2 or warmup < 0:
        raise SizeError(f"`repeats` must be at least 2 and `warmup` at least 0, got {repeats} and {warmup}.")
    plain = _plain_forms(model)
    base = plain[BASE]
    if (onnx or cpu_time) and base.device.type != "cpu":
        raise HardwareError(
            f"ONNX Runtime and processor time are measured on a CPU; the model is on {str(base.device)!r}: call "
            "`model.cpu()` first."
        )
    clock = time.process_time if cpu_time else time.perf_counter
    sizes = list(itertools.product(batch_sizes, lengths))
    batches = [example_inputs(base, *size) for size in sizes]
    with _threads(num_threads):
        if cpu_time and torch.get_num_threads() != 1:
            raise SizeError(
                "`cpu_time=True` needs one thread, since processor time adds up over threads; got "
                f"{torch.get_num_threads()}: pass `num_threads=1`."
            )
        device = f"{torch.get_num_threads()} CPU thread(s)"
        if base.device.type == "cuda":
            device = torch.cuda.get_device_name(base.device)
        elif cpu_time:
            device += ", processor time"
        forms = {name: Form(form, _num_bytes(form)) for name, form in plain.items()}
        if onnx:
            smallest = list(plain)[-1]
            forms |= {f"{name}, ONNX": _on_onnx_runtime(plain[name]) for name in (BASE, smallest)}
        return [
            SpeedReport(_time(forms, inputs, repeats, warmup, clock), *size, device)
            for size, inputs in zip(sizes, batches, strict=True)
        ]


def _plain_forms(model: Any) -> dict[str, Any]:
    config = active_config(model)
    forms: dict[str, Any] = {BASE: unmasked(model), "merged": merged(model)}
    if config.is_structured:
        forms["compacted"] = compact(model)
    elif config.n_of_m == (2, 4):
        # If they cannot be used, this form is left out: the advice for 2:4 masks says what they need.
        with suppress(HardwareError, NotPrunedError):
            forms["2:4"] = to_semi_structured(model)
    return forms


def _on_onnx_runtime(model: Any) -> Form:
    with TemporaryDirectory() as folder:
        path = export_onnx(model, folder)
        return Form(OnnxModel(path, torch.get_num_threads()), path.stat().st_size)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(
    forms: Mapping[str, Form], inputs: dict[str, torch.Tensor], repeats: int, warmup: int, clock: Callable[[], float]
) -> tuple[Timing, ...]:
    seconds = _take_turns(forms, inputs, warmup + repeats, clock)
    seconds = {name: taken[warmup:] for name, taken in seconds.items()}
    return tuple(
        Timing(name, form.num_bytes, tuple(seconds[name]), _quartiles(seconds[BASE], seconds[name]))
        for name, form in forms.items()
    )


@torch.inference_mode()
def _take_turns(
    forms: Mapping[str, Form], inputs: dict[str, torch.Tensor], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    on_gpu = inputs["input_ids"].is_cuda
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            start = clock()
            form.run(**inputs)
            if on_gpu:
                torch.cuda.synchronize()
            seconds[name].append(clock() - start)
    return seconds


def _quartiles(base: list[float], taken: list[float]) -> tuple[float, float, float]:
    ratios = [one / other for one, other in zip(base, taken, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")  # within the range of the measurements
    return low, median, high


def _num_bytes(model: Any) -> int:
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied weights once
    return sum(part.numel() * part.element_size() for tensor in tensors.values() for part in _parts(tensor))


def _parts(tensor: Any) -> list[torch.Tensor]:
    """Return the tensors that hold a tensor's data: several if it is semi-structured."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor]
