"""Analyse the masks of adapters: how they overlap, how they differ from their initial masks, and what remains.

    python examples/study/run.py --data_dir glue --keep kept --only '*/adaprune/0.5/*'
    python examples/study/topology.py kept/stsb/adaprune/0.5/0 kept/mrpc/adaprune/0.5/0 --starts START START

Adapters are folders or names on the Hub, all of one base; only modules that all of them mask are compared. The starts
are the initial masks of these runs: the results of the same `run_glue.py` commands with `--max_steps 1 --learning_rate
0`. Similarity of two masks says nothing about training if their initial masks were equally similar. Without starts,
masks are compared with those of the largest weights. Prints tables, and draws
`topology_{overlap,departures,degrees,heads,spectrum}.png`, the last three for the first adapter.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig
from transformers import AutoModel

from hf_adaprune.analysis import (
    Masks,
    Spectrum,
    attention_heads,
    load_masks,
    magnitude_masks,
    mask_overlap,
    mask_spectrum,
    model_weights,
    neuron_degrees,
    pairwise_overlap,
    plot_degrees,
    plot_heads,
    plot_overlap,
    plot_spectrum,
)
from hf_adaprune.demo.base import packaged_base
from hf_adaprune.masks import sparsity_of


def short_names(names: list[str]) -> list[str]:
    """Return the parts in which paths differ."""
    parts = [name.strip("/").split("/")[-4:] for name in names]
    if len(names) == 1 or len({len(part) for part in parts}) > 1:
        return names
    differing = [position for position, column in enumerate(zip(*parts, strict=True)) if len(set(column)) > 1]
    short = [" ".join(part[position] for position in differing) for part in parts]
    return short if len(set(short)) == len(short) and all(short) else names


def departures(masks: Masks, start: Masks) -> dict[str, torch.Tensor]:
    """Return where a mask differs from another one: kept here and pruned there, or pruned here and kept there."""
    return {name: mask ^ start[name] for name, mask in masks.items()}


def _part(masks: Masks, names: list[str]) -> Masks:
    return {name: masks[name] for name in names}


def describe(masks: Masks, magnitude: Masks, spectra: Mapping[str, Spectrum], dead_heads: int) -> list[str]:
    """Return the table cells of one adapter."""
    degrees = list(neuron_degrees(masks).values())
    dead = [sum(len(getattr(module, side)) for module in degrees) for side in ("dead_outputs", "dead_inputs")]
    chance = np.sum([module.chance_dead for module in degrees], axis=0)
    dispersion = np.nanmean([module.dispersion for module in degrees], axis=0)
    ranks = [found.effective_rank for found in spectra.values()]
    mean_ranks = [np.mean([rank[kind] for rank in ranks]) for kind in ("masked", "random", "dense")]
    return [
        f"{sparsity_of(masks.values()):.3f}",
        f"{mask_overlap(masks, magnitude).whole.agreement:.3f}",
        *(f"{count} ({expected:.1f})" for count, expected in zip(dead, chance, strict=True)),
        str(dead_heads),
        " / ".join(f"{value:.1f}" for value in dispersion),
        " / ".join(f"{rank:.0f}" for rank in mean_ranks),
    ]


HEAD = (
    *("adapter", "sparsity", "agreement with magnitude", "dead outputs (by chance)", "dead inputs (by chance)"),
    *("dead heads", "dispersion of in- / out-degrees", "effective rank: mask / random masks / unpruned"),
)


def print_table(head: tuple[str, ...], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)) + "\n")


def main() -> None:
    """Analyse the adapters, print the tables and draw the figures."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", help="Folders, or names on the Hub.")
    parser.add_argument("--starts", nargs="+", help="The initial masks of each adapter, in the same order.")
    parser.add_argument("--base", help="Name or folder of their base; by default the packaged MiniLM-L6.")
    parser.add_argument("--spectrum", default="attention.self.query", help="Which modules: the end of their names.")
    parser.add_argument("--figures", type=Path, default=Path(__file__).with_name("figures"))
    args = parser.parse_args()
    if args.starts and len(args.starts) != len(args.adapters):
        parser.error(f"There are {len(args.adapters)} adapters and {len(args.starts)} starts: name one for each.")
    if args.base is None:
        args.base = packaged_base()
    base = AutoModel.from_pretrained(args.base)
    names = short_names(args.adapters)
    loaded = [load_masks(adapter) for adapter in args.adapters]
    shared = [name for name in loaded[0] if all(name in masks for masks in loaded)]
    adapters = {short: _part(masks, shared) for short, masks in zip(names, loaded, strict=True)}
    weights = model_weights(base, adapters[names[0]])
    magnitude = {short: magnitude_masks(masks, weights) for short, masks in adapters.items()}
    began = dict(zip(names, map(load_masks, args.starts), strict=True)) if args.starts else magnitude
    config = PeftConfig.from_pretrained(args.adapters[0])
    heads = {short: attention_heads(masks, config) for short, masks in adapters.items()}
    chosen = [name for name in shared if name.endswith(args.spectrum)]
    if not chosen:
        parser.error(f"No module that all adapters mask ends in {args.spectrum!r}; they are {shared}.")
    spectra = {
        short: mask_spectrum({name: masks[name] for name in chosen}, weights) for short, masks in adapters.items()
    }
    dead = {short: sum(len(layer.dead) for layer in found) for short, found in heads.items()}
    rows = [[short, *describe(adapters[short], magnitude[short], spectra[short], dead[short])] for short in names]
    print_table(HEAD, rows)
    if args.starts:
        overlaps = {short: mask_overlap(adapters[short], _part(began[short], shared)).whole for short in names}
        rows = [[short, f"{one.agreement:.3f}", f"{one.kappa:.3f}"] for short, one in overlaps.items()]
        print_table(("adapter", "agreement with its start", "kappa"), rows)
    figures = {
        "degrees": plot_degrees(neuron_degrees(adapters[names[0]]).values()),
        "heads": plot_heads(heads[names[0]]),
        "spectrum": plot_spectrum(spectra[names[0]][chosen[0]]),
    }
    if len(names) > 1:
        pairs = pairwise_overlap(adapters)
        apart = pairwise_overlap({short: departures(adapters[short], began[short]) for short in names})
        starts = pairwise_overlap({short: _part(masks, shared) for short, masks in began.items()})
        reference = "their starts" if args.starts else "the largest weights"
        head = ("", "", "kappa", f"kappa of {reference}", f"Jaccard of the differences from {reference} (by chance)")
        rows = []
        for pair, report in pairs.items():
            apart_here = apart[pair].whole
            cells = [*pair, f"{report.whole.kappa:.3f}", f"{starts[pair].whole.kappa:.3f}"]
            rows.append([*cells, f"{apart_here.jaccard:.3f} ({apart_here.chance_jaccard:.3f})"])
        print_table(head, rows)
        figures |= {"overlap": plot_overlap(pairs), "departures": plot_overlap(apart, "jaccard")}
    args.figures.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.figures / f"topology_{name}.png", dpi=150)


if __name__ == "__main__":
    main()
