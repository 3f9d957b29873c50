"""The tables that commands print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from ..analysis import OverlapReport, SparsityReport
from ..deploy.speed import SpeedReport


MEASURES = ("agreement", "chance_agreement", "jaccard", "chance_jaccard", "kappa")


def fact_table(facts: Mapping[str, object]) -> Table:
    """Return a table of names and values."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in facts.items():
        table.add_row(name, f"{fact:,}" if isinstance(fact, int) and not isinstance(fact, bool) else str(fact))
    return table


def sparsity_table(report: SparsityReport) -> Table:
    """Return a table of the pruned share, one row per layer and one column per component."""
    layers, components = report.by_layer(), report.by_component()
    shares = {(module.component, module.layer): module.sparsity for module in report.modules}
    table = Table(title="Pruned, in per cent", title_justify="left")
    table.add_column("layer")
    for name in (*components, "all"):
        table.add_column(name.replace(".", ".\n"), justify="right", overflow="fold")
    for layer, share in layers.items():
        cells = [_percent(shares.get((component, layer))) for component in components]
        table.add_row(layer, *cells, _percent(share))
    table.add_section()
    table.add_row("all", *map(_percent, components.values()), _percent(report.sparsity))
    return table


def overlap_table(pairs: Mapping[tuple[str, str], OverlapReport]) -> Table:
    """Return a table of the overlap of each pair of adapters, and the overlap expected by chance."""
    table = Table(title="Weights that are kept in common", title_justify="left")
    for name in ("", ""):
        table.add_column(name, overflow="fold")
    for name in ("agreement", "by chance", "Jaccard", "by chance", "kappa"):
        table.add_column(name, justify="right")
    for pair, report in pairs.items():
        table.add_row(*pair, *(f"{getattr(report.whole, measure):.3f}" for measure in MEASURES))
    return table


def speed_table(reports: Sequence[SpeedReport]) -> Table:
    """Return a table of how fast each form of a model is, for each batch size and length."""
    table = Table(title=f"Measured on {reports[0].device}", title_justify="left")
    for name in ("batch", "length", "form", "times as fast as the base", "quartiles", "ms", "MB"):
        table.add_column(name, justify="left" if name == "form" else "right")
    for report in reports:
        for timing in report.timings:
            low, median, high = timing.speed_up
            sizes = (str(report.batch_size), str(report.length))
            ratios = (f"{median:.2f}", f"{low:.2f} to {high:.2f}")
            table.add_row(*sizes, timing.name, *ratios, f"{1000 * timing.median:.1f}", f"{timing.num_bytes / 1e6:.1f}")
        table.add_section()
    return table


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"
