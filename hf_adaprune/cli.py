"""`hf-adaprune`: the command line, a thin layer over the library."""

from pathlib import Path
from typing import Annotated

import typer

from . import commands
from .demo.run import run_demo


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.command()(commands.export)
app.command()(commands.speed)


@app.callback()
def main() -> None:
    """Adapt a pre-trained BERT to a task by pruning alone."""


@app.command()
def demo(
    output_dir: Annotated[Path, typer.Option(help="Where the adapter, its card and its picture go.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the task and of training.")] = 0,
) -> None:
    """Fine-tune, train a head, and prune a small BERT for a review task; five minutes on two cores, no network."""
    run_demo(output_dir, seed)
