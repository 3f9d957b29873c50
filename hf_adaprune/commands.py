"""`hf-adaprune export` and `hf-adaprune speed`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from huggingface_hub import ModelCard
from rich.console import Console
from rich.table import Table

from .compaction import compact
from .errors import AdaPruneError
from .export import export_onnx
from .layer import adaprune_layers
from .merging import merged
from .opening import open_model, open_tokenizer, recorded_results
from .speed import SpeedReport, measure_speed


Name = Annotated[str, typer.Argument(help="Folder of an adapter or of a model, or its name on the Hub.")]


def export(
    name: Name,
    output_dir: Annotated[Path | None, typer.Option(help="Where it goes; by default beside you, by its name.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write model.onnx instead of a checkpoint.")] = False,
    keep_zeros: Annotated[
        bool, typer.Option("--keep-zeros", help="Leave pruned neurons and heads in place, as zeros.")
    ] = False,
) -> None:
    """Write a plain model: without the pruned neurons and heads, or with zeros for weights; or the same as ONNX."""
    with _errors():
        model = open_model(name)
        form, plain = _plain(model, keep_zeros)
        folder = output_dir or Path(f"{Path(name).name}-{'onnx' if onnx else form}")
        if onnx:
            export_onnx(plain, folder)
        else:
            plain.save_pretrained(folder)
            _keep_results(folder, recorded_results(name))
        tokenizer = open_tokenizer(name, model.config.name_or_path)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    before, after = (f"{form.num_parameters():,}" for form in (model, plain))
    typer.echo(f"{folder}: {form}, {after} parameters ({before} with its adapter).")


def speed(
    name: Name,
    batch_size: Annotated[int, typer.Option(help="How many texts at once.")] = 1,
    length: Annotated[int, typer.Option(help="How many tokens a text.")] = 128,
    repeats: Annotated[int, typer.Option(help="How many rounds.")] = 30,
    threads: Annotated[int | None, typer.Option(help="How many CPU threads; by default PyTorch's choice.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Measure on ONNX Runtime too.")] = False,
) -> None:
    """Measure base, merged and smaller model side by side on this machine, and say what to expect."""
    with _errors():
        model = open_model(name).to("cuda" if torch.cuda.is_available() else "cpu")
        report = measure_speed(
            model, batch_size=batch_size, length=length, repeats=repeats, onnx=onnx, num_threads=threads
        )
    console = Console()
    console.print(_table(report))
    for result in recorded_results(name):
        console.print(f"Score on the card, of every form: {result.metric_type} {result.metric_value}")
    console.print(report.conclusion(), markup=False)


def _plain(model: Any, keep_zeros: bool) -> tuple[str, Any]:
    layers = [layer for _, layer in adaprune_layers(model)]
    if not layers:
        return "plain", model
    groups = any(layer.groups(name) for layer in layers for name in layer.active_adapters)
    return ("compacted", compact(model)) if groups and not keep_zeros else ("merged", merged(model))


def _keep_results(folder: Path, results: list[Any]) -> None:
    path = folder / "README.md"
    if results and path.exists():
        card = ModelCard.load(path)
        card.data.eval_results, card.data.model_name = results, folder.resolve().name
        card.save(path)


def _table(report: SpeedReport) -> Table:
    table = Table("form", "times as fast as the base", "quartiles", "ms", "MB")
    for timing in report.timings:
        low, median, high = timing.speed_up
        milliseconds = 1000 * sorted(timing.seconds)[len(timing.seconds) // 2]
        row = (f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{milliseconds:.1f}", f"{timing.num_bytes / 1e6:.1f}")
        table.add_row(timing.name, *row)
    return table


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except (AdaPruneError, OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
