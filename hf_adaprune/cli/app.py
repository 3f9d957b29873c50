"""The commands of `hf-adaprune`."""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import PeftModel
from rich.text import Text
from transformers import PreTrainedModel

from ..analysis import Overlap, load_masks, pairwise_overlap, plot_overlap, sparsity_report
from ..demo.run import run_demo
from ..deploy.plain_models import save_compacted, save_merged, save_onnx
from ..deploy.speed import measure_speed
from ..errors import BaseMismatchError, HardwareError
from ..glue import GLUE_COLUMNS, load_glue_split, score_on_glue
from ..hub.advice import speed_advice
from ..hub.publish import push_adapter
from ..storage.checks import base_fits
from ..storage.stored_adapter import StoredAdapter, check_same_base, read_adapter
from .answer import EXIT_CODES_HELP, Answer, answering
from .tables import MEASURES, fact_table, overlap_table, sparsity_table, speed_table


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

# Typer reads these at run time.
Name = Annotated[str, typer.Argument(help="An adapter: a folder, or a name on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on stdout.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the adapter on the Hub.")]
Subfolder = Annotated[str | None, typer.Option(help="Subfolder that holds the adapter.")]
Base = Annotated[str | None, typer.Option(help="A copy of the base, if not the one that the adapter names.")]
Output = Annotated[Path, typer.Argument(help="A new or empty folder.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda ...; by default a GPU if there is one.")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(version("hf_adaprune"))
        raise typer.Exit


@app.callback(epilog=EXIT_CODES_HELP)
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Adapt a pre-trained BERT to a task by pruning alone."""


@app.command()
@answering
def inspect(name: Name, revision: Revision = None, subfolder: Subfolder = None, as_json: Json = False) -> Answer:
    """Show what an adapter is and what it prunes, from its headers alone: no weights are read."""
    adapter = read_adapter(name, revision=revision, subfolder=subfolder)
    config, report = adapter.config, sparsity_report(adapter.config)
    facts: dict[str, Any] = {
        "name": name,
        "base": config.base_model_name_or_path,
        "architecture": config.architecture,
        "base_fingerprint": config.base_fingerprint,
        "adapter_fingerprint": config.adapter_fingerprint,
        "bytes": adapter.num_bytes,
        "mask_bytes": adapter.mask_bytes,
        "weights_pruned": report.num_pruned,
        "weights_masked": report.num_weights,
        "parameters": report.num_parameters,
        "sparsity": report.sparsity,
        "sparsity_whole_model": report.sparsity_whole_model,
    }
    parts = {"training": config.training, "components": report.by_component(), "layers": report.by_layer()}
    modules = {module.name: module.sparsity for module in report.modules}
    tables = [fact_table(facts | (config.training or {})), sparsity_table(report)]
    return Answer({**facts, **parts, "modules": modules}, tables)


@app.command()
@answering
def verify(
    name: Name, base: Base = None, revision: Revision = None, subfolder: Subfolder = None, as_json: Json = False
) -> Answer:
    """Open an adapter on its base; exit with 0 if masks, head and base are those that were saved."""
    adapter = read_adapter(name, revision=revision, subfolder=subfolder)
    model, config = adapter.open(base), adapter.config
    if base_fits(model.get_base_model(), config) is None:
        raise BaseMismatchError(
            f"The base cannot be compared with that of {name!r}: one is in bfloat16, the other in float16. Give a "
            "copy in float32 with `--base`."
        )
    facts = {
        "name": name,
        "base": base or config.base_model_name_or_path,
        "fits": True,
        "base_fingerprint": config.base_fingerprint,
        "adapter_fingerprint": config.adapter_fingerprint,
    }
    return Answer(facts, [fact_table(facts)])


@app.command()
@answering
def merge(
    name: Name,
    output: Output,
    base: Base = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> Answer:
    """Write a plain checkpoint, with zeros for pruned weights, that needs neither peft nor hf_adaprune."""
    return _write(save_merged, read_adapter(name, revision=revision, subfolder=subfolder), output, base)


@app.command()
@answering
def export(
    name: Name,
    output: Output,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write ONNX; masks of single weights are merged.")] = False,
    base: Base = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> Answer:
    """Write the model without its pruned neurons and heads: a checkpoint of a smaller model, or ONNX.

    If whole heads were removed, import hf_adaprune before opening the checkpoint. Masks of single weights leave almost
    nothing to remove: use `merge` for those.
    """
    save = save_onnx if onnx else save_compacted
    return _write(save, read_adapter(name, revision=revision, subfolder=subfolder), output, base)


def _move_to_device(model: PeftModel, device: str | None) -> PeftModel:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise HardwareError(f"The model cannot be moved to {device!r} here; choose another device: {error}") from None


def _write(save: Callable[..., PreTrainedModel], adapter: StoredAdapter, output: Path, base: str | None) -> Answer:
    try:
        model = save(adapter, output, base)
    except FileExistsError as error:
        raise typer.BadParameter(str(error), param_hint="OUTPUT") from None
    size = sum(path.stat().st_size for path in output.iterdir())
    facts = {"name": adapter.name, "output": str(output), "bytes": size, "parameters": model.num_parameters()}
    return Answer(facts, [fact_table(facts)])


@app.command()
@answering
def speed(
    name: Name,
    batch_size: Annotated[
        list[int] | None, typer.Option(min=1, help="Texts per batch, 1 by default; repeat the option for several.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens per text, 128 by default; repeat the option for several.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=2, help="Number of timed rounds.")] = 30,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also measure on ONNX Runtime; on a CPU only.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default PyTorch's choice.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Measure in bfloat16, as 2:4 masks need on a GPU.")] = False,
    device: Device = None,
    base: Base = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    as_json: Json = False,
) -> Answer:
    """Measure the base, the merged and the smaller model on this machine, and say what to expect."""
    adapter = read_adapter(name, revision=revision, subfolder=subfolder)
    model = _move_to_device(adapter.open(base), device or ("cpu" if onnx else None))
    if bf16:
        model = model.bfloat16()
    reports = measure_speed(
        model,
        batch_sizes=batch_size or [1],
        lengths=length or [128],
        repeats=repeats,
        onnx=onnx,
        num_threads=threads,
    )
    conclusion = [*map(str, reports), speed_advice(adapter.config)]
    scores = {result.metric_type: result.metric_value for result in adapter.results()}
    data = {
        "name": name,
        "scores": scores,
        "measured": [row for report in reports for row in report.rows()],
        "conclusion": conclusion,
    }
    said = [f"Score on the card, the same in every form: {metric} {score}" for metric, score in scores.items()]
    return Answer(data, [speed_table(reports), *map(Text, [*said, *conclusion])])


@app.command()
@answering
def compare(
    names: Annotated[list[str], typer.Argument(help="Two or more adapters of the same base.", metavar="NAMES...")],
    figure: Annotated[
        Path | None, typer.Option(help="File for a figure of Cohen's kappa of each pair: .png, .svg or .pdf.")
    ] = None,
    as_json: Json = False,
) -> Answer:
    """Show how much the masks of adapters overlap, and how much they would by chance.

    The base is needed only if masks are compressed (`mask_codec="auto"`).
    """
    if len(set(names)) < 2:
        raise typer.BadParameter(f"A comparison takes several different adapters, got {names}.", param_hint="NAMES")
    if figure is not None and figure.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"The file name must end in .png, .svg or .pdf, got {figure}.", param_hint="--figure")
    check_same_base([read_adapter(name) for name in names])
    pairs = pairwise_overlap({name: load_masks(name) for name in names})
    if figure is not None:
        figure.parent.mkdir(parents=True, exist_ok=True)
        plot_overlap(pairs).savefig(figure, dpi=150)
    found = [
        {"names": list(pair), **_overlap(report.whole)}
        | {"components": {name: _overlap(part) for name, part in report.by_component().items()}}
        | {"layers": {name: _overlap(part) for name, part in report.by_layer().items()}}
        for pair, report in pairs.items()
    ]
    return Answer({"pairs": found, "figure": None if figure is None else str(figure)}, [overlap_table(pairs)])


def _overlap(overlap: Overlap) -> dict[str, float]:
    return {measure: getattr(overlap, measure) for measure in MEASURES}


@app.command()
@answering
def push(
    path: Annotated[Path, typer.Argument(help="The folder of a saved adapter.")],
    name: Annotated[str, typer.Argument(help="Its name on the Hub, such as me/my-adapter.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; created if missing.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    message: Annotated[str, typer.Option(help="Title of the commit.")] = "Upload adapter",
    as_json: Json = False,
) -> Answer:
    """Check an adapter, update its card, and push both in one commit."""
    commit = push_adapter(
        path, name, private=private or None, revision=revision, create_pr=create_pr, commit_message=message
    )
    facts = {"name": name, "commit": commit.oid, "url": str(commit.pr_url or commit.commit_url)}
    return Answer(facts, [fact_table(facts)])


@app.command("eval")
@answering
def evaluate(
    name: Name,
    task: Annotated[str, typer.Option(help=f"One of {', '.join(GLUE_COLUMNS)}.")],
    split: Annotated[str, typer.Option(help="A labelled split.")] = "validation",
    data: Annotated[
        Path | None,
        typer.Option(help="A csv, json or parquet file with the task's columns, or a folder of {split}.parquet."),
    ] = None,
    base: Base = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per batch.")] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens per text; longer texts are truncated.")] = 128,
    device: Device = None,
    as_json: Json = False,
) -> Answer:
    """Score an adapter on a GLUE task."""
    adapter = read_adapter(name, revision=revision, subfolder=subfolder)
    dataset = load_glue_split(task, split, data)
    model = _move_to_device(adapter.open(base), device)
    scores = score_on_glue(model, adapter.tokenizer(base), task, dataset, batch_size=batch_size, max_length=max_length)
    facts = {"name": name, "task": task, "split": split, "examples": len(dataset)}
    shown = {metric: f"{score:.4f}" for metric, score in scores.items()}
    return Answer({**facts, "scores": scores}, [fact_table({**facts, **shown})])


@app.command()
@answering
def demo(
    output_dir: Annotated[Path, typer.Option(help="Folder for the adapter, its card and its picture.")] = Path(
        "demo_output"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the task and of training.")] = 0,
    as_json: Json = False,
) -> Answer:
    """Compare fine-tuning, training a head and pruning on a review task; five minutes on two cores, no network."""
    return Answer({"output_dir": str(output_dir), "rows": run_demo(output_dir, seed)}, [])
