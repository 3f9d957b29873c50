"""How fast the forms of a pruned model are, on this machine: its base, merged, made smaller, on ONNX Runtime."""

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
from ..structured.compaction import active_config, compact
from ..structured.semi_structured import to_semi_structured
from ..tuner.merging import merged, unmasked
from .example_inputs import example_inputs
from .export import OnnxModel, export_onnx


BASE = "base"
# A ratio whose quartiles are within this of 1 is no difference that anybody would notice.
_NOTICEABLE = 0.05


class Form(NamedTuple):
    """A model as it can be run, and the bytes of its weights or of its file."""

    run: Callable[..., Any]
    num_bytes: int


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
    """What was measured for batches of one size.

    Args:
        timings (`tuple[Timing, ...]`): The forms of the model, the base first.
        batch_size (`int`): How many rows went through at once.
        length (`int`): How many tokens a row had.
        device (`str`): Where, and for a CPU on how many threads.
    """

    timings: tuple[Timing, ...]
    batch_size: int
    length: int
    device: str

    def rows(self) -> list[dict[str, Any]]:
        """Return what was measured as plain data, one row a form; `speed_up` are quartiles."""
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

    The forms take turns, one forward pass each, so that a machine that slows down slows all. Compared are the base,
    the merged model, where neurons or heads are pruned the compacted one, on a GPU with 2:4 masks in half precision
    the semi-structured one, and, if asked for, base and smallest form on ONNX Runtime.

    Args:
        model (`peft.PeftModel` or `transformers.PreTrainedModel`):
            A model with an active AdaPrune adapter. Not changed.
        batch_sizes (`Sequence[int]`): How many rows go through at once, >= 1.
        lengths (`Sequence[int]`): How many tokens a row has, >= 1; every batch size is measured with every length.
        repeats (`int`): How many rounds are counted, >= 2.
        warmup (`int`): How many rounds come before them, >= 0.
        onnx (`bool`): Whether to export and time on ONNX Runtime too; on a CPU only.
        num_threads (`int`, *optional*): How many threads a CPU computes with; by default as many as PyTorch has set.
        cpu_time (`bool`):
            Whether to count the processor's time instead of the clock's, on a CPU with one thread: what others do on
            the machine then disturbs less.

    Returns:
        `list[SpeedReport]`: One for each batch size and length.

    Raises:
        NotPrunedError: If the model has no active AdaPrune adapter.
        SizeError: If a size is out of range.
        HardwareError: If ONNX Runtime or processor time is asked for on a GPU.
        ExportError: If the model cannot be exported.
    """
    if repeats < 2 or warmup < 0:
        raise SizeError(f"There must be at least 2 `repeats` and 0 of `warmup`, got {repeats} and {warmup}.")
    plain = _plain_forms(model)
    base = plain[BASE]
    if (onnx or cpu_time) and base.device.type != "cpu":
        raise HardwareError(
            f"ONNX Runtime and processor time are measured on a CPU; the model is on {str(base.device)!r}."
        )
    clock = time.process_time if cpu_time else time.perf_counter
    sizes = list(itertools.product(batch_sizes, lengths))
    batches = [example_inputs(base, *size) for size in sizes]
    with _threads(num_threads):
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
        # Where they cannot be used, or on no layer, the advice for 2:4 masks says what they need.
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
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")  # never beyond what was measured
    return low, median, high


def _num_bytes(model: Any) -> int:
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}  # tied weights once
    return sum(part.numel() * part.element_size() for tensor in tensors.values() for part in _parts(tensor))


def _parts(tensor: Any) -> list[torch.Tensor]:
    """Return what a tensor is stored as: one that is semi-structured, as several."""
    if hasattr(tensor, "__tensor_flatten__"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor]
