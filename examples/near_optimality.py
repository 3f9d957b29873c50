"""Test the paper's claim of near-optimal masks, on problems where the best mask can be found by trying all:

    python examples/near_optimality.py

Prints tables and draws `examples/study/figures/near_optimality.png`; `examples/study/theory.md` explains them. A gap
is (risk - best) / (mean over all masks - best): 0 for the best of all 2^d masks, 1 for their mean risk.
"""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from convex import Problems, adapt, gaps, iterate, make_problems, theorem_bound
from matplotlib.figure import Figure


KINDS = ("least squares", "logistic")
FORWARD = (1.0, 10.0, 100.0, 1e3, 1e5)
BACKWARD = (0.1, 1.0, 10.0, 100.0)
LAST = {1.0: 10000, 1e5: 3000}  # T for each t_l
RECORDED = (10, 30, 100, 300, 1000, 3000, 10000)


@dataclass
class Bench:
    """Hold problems of one kind, the risks of all their masks, and gaps by name."""

    problems: Problems
    risks: torch.Tensor
    gaps: dict[str, torch.Tensor]

    @classmethod
    def draw(cls, kind: str, num_problems: int, dim: int, correlation: float = 0.0) -> "Bench":
        """Draw problems and compute the risks of all masks."""
        problems = make_problems(kind, num_problems, dim, correlation=correlation)
        return cls(problems, problems.all_risks(), {})

    def enter(self, name: str, masks: torch.Tensor) -> None:
        """Record the gaps of masks under a name."""
        self.gaps[name] = gaps(masks, self.risks)

    def cells(self, name: str) -> str:
        """Return table cells: median and ninth decile of the gap, and the share of problems with the best mask."""
        found = self.gaps[name]
        best = (found == 0).double().mean()
        return f" {found.median():.3f} | {found.quantile(0.9):.3f} | {best:.2f} |"


def compare(bench: Bench) -> None:
    """Record the gaps of the method's masks and of other masks to compare with."""
    masks = adapt(bench.problems)
    kept = masks.sum(1, keepdim=True)
    weight = bench.problems.weight
    noise = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1))
    bench.enter("the paper's method", masks)
    bench.enter("the same with t_l = 10", adapt(bench.problems, forward_temperature=10.0))
    bench.enter("random masks, as many kept", noise.argsort(1).argsort(1) < kept)
    bench.enter("largest weights, as many kept", (-weight.abs()).argsort(1).argsort(1) < kept)
    bench.enter("nothing pruned", torch.ones_like(masks))
    bench.enter("the best in [0, 1], rounded", bench.problems.relaxed_optimum() > 0.5)


def vary_start(bench: Bench) -> None:
    """Record the gaps of masks that training reaches from other initial scores."""
    shape, generator = bench.problems.weight.shape, torch.Generator().manual_seed(2)
    signs = torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    starts = {
        "start: N(0.01, *variance* 0.001)": torch.normal(0.01, 0.001**0.5, shape, generator=generator),
        "start: all -0.01": torch.full(shape, -0.01),
        "start: all -1": torch.full(shape, -1.0),
        "start: all 1": torch.full(shape, 1.0),
        "start: -1 or 1 by chance": signs,
    }
    for name, start in starts.items():
        bench.enter(name, adapt(bench.problems, start=start))


def vary_temperatures(problems: Problems, risks: torch.Tensor) -> np.ndarray:
    """Return the median gap for each t_s (rows) and t_l (columns)."""
    return np.array(
        [
            [
                gaps(adapt(problems, forward_temperature=t_l, backward_temperature=t_s), risks).median().item()
                for t_l in FORWARD
            ]
            for t_s in BACKWARD
        ]
    )


def follow_theorem(kind: str, t_l: float, t_s: float, steps: int) -> Iterator[tuple[int, float, float]]:
    """Yield T, the measured mean of L_tl(theta_T) - L_tl(theta*), and the theorem's bound on it, in dimension 16.

    The minimum over theta is that over masks in [0, 1]^d. There is one sample per step, as in the theorem. Its c is
    free: it is chosen so that after the last step, the bound's first term is a quarter of the initial gap.
    """
    problems = make_problems(kind, 200, 16)
    least = problems.risk(problems.relaxed_optimum())
    start = (problems.risk(torch.full_like(problems.weight, 0.5)) - least).mean().item()
    c = 4 / (start * max(RECORDED) ** 0.5)
    squared_gradient = problems.squared_gradient().mean().item()
    run = iterate(
        problems, steps=steps, learning_rate=c, batch_size=1, forward_temperature=t_l, backward_temperature=t_s
    )
    largest = 0.0
    for step, (_, scores) in enumerate(run, 1):
        largest = max(largest, scores.abs().max().item())
        if step in RECORDED:
            gap = (problems.risk(torch.sigmoid(t_l * scores)) - least).mean().item()
            yield step, gap, theorem_bound(step, c, squared_gradient, t_l, t_s, largest)


def draw(benches: dict[str, Bench], grid: np.ndarray, theorem: dict[float, list[tuple[int, float, float]]]) -> Figure:
    """Plot the distribution of gaps, the gap over T with its bound, and the median gaps over temperatures."""
    figure = Figure(figsize=(12.5, 3.7), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    colors = dict(zip(benches[KINDS[0]].gaps, ("tab:blue", "tab:cyan", "tab:grey", "tab:orange"), strict=False))
    for kind, style in zip(KINDS, ("-", ":"), strict=True):
        for name, color in colors.items():
            values = benches[kind].gaps[name].sort().values
            share = np.arange(1, len(values) + 1) / len(values)
            label = name if style == "-" else None
            left.plot(values, share, linestyle=style, color=color, label=label)
    left.set(xlim=(-0.03, 1.5), ylim=(0, 1), xlabel="gap to the best mask", ylabel="share of problems")
    left.set_title("d = 12; dotted: logistic", fontsize=11, loc="left")
    left.legend(frameon=False, fontsize=8, loc="lower right")
    for t_l, color in ((1.0, "tab:green"), (1e5, "tab:blue")):
        steps, measured, bound = zip(*theorem[t_l], strict=True)
        middle.loglog(steps, measured, "o-", color=color, markersize=4, label=f"measured, t_l = {t_l:g}")
        middle.loglog(steps, bound, "--", color=color, label=f"bound, t_l = {t_l:g}")
    middle.set(xlabel="T", ylabel="loss above the least")
    middle.set_title(f"Theorem 1: {KINDS[1]}, d = 16, t_s = 1", fontsize=11, loc="left")
    middle.legend(frameon=False, fontsize=8, loc="center right")
    right.imshow(grid, cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        text = right.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=9)
        text.set_color("white" if value > 0.3 else "black")
    right.set_xticks(range(len(FORWARD)), [f"{t:g}" for t in FORWARD])
    right.set_yticks(range(len(BACKWARD)), [f"{t:g}" for t in BACKWARD])
    right.set(xlabel="t_l, forward", ylabel="t_s, backward")
    right.set_title(f"Median gap: {KINDS[0]}, d = 12", fontsize=11, loc="left")
    for axes in (left, middle):
        axes.spines[["right", "top"]].set_visible(False)
    return figure


def table(columns: dict[str, Bench]) -> str:
    """Return a table of the gaps of each name, with a group of columns per kind."""
    lines = ["| |" + "".join(f" {kind}: median gap | 9th decile | best of all |" for kind in columns)]
    lines.append("| --- |" + " --- | --- | --- |" * len(columns))
    first = next(iter(columns.values()))
    lines += [f"| {name} |" + "".join(bench.cells(name) for bench in columns.values()) for name in first.gaps]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and draw."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=200, help="Number of problems of each kind.")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parent / "study/figures/near_optimality.png")
    args = parser.parse_args()
    benches = {kind: Bench.draw(kind, args.problems, 12) for kind in KINDS}
    for bench in benches.values():
        compare(bench)
        vary_start(bench)
    for kind, bench in benches.items():
        for name, dim, correlation in (("d = 8", 8, 0.0), ("d = 16", 16, 0.0), ("inputs correlated .9", 12, 0.9)):
            other = Bench.draw(kind, args.problems // 4 if dim == 16 else args.problems, dim, correlation)
            other.enter("", adapt(other.problems))
            bench.gaps[name] = other.gaps[""]
    print(table(benches))
    grids = {kind: vary_temperatures(bench.problems, bench.risks) for kind, bench in benches.items()}
    for kind, grid in grids.items():
        print(f"\n| {kind}: median gap |" + "".join(f" t_l = {t:g} |" for t in FORWARD))
        print("| --- |" + " --- |" * len(FORWARD))
        for t_s, row in zip(BACKWARD, grid, strict=True):
            print(f"| t_s = {t_s:g} |" + "".join(f" {value:.3f} |" for value in row))
    theorem = {}
    for kind in KINDS:
        print(f"\n| {kind}, t_s = 1: T | " + " | ".join(f"{step:,}" for step in RECORDED) + " |")
        print("| --- |" + " --- |" * len(RECORDED))
        for t_l, steps in LAST.items():
            found = theorem[t_l] = list(follow_theorem(kind, t_l, 1.0, steps))
            for name, column in (("measured", 1), ("bound", 2)):
                values = [f"{entry[column]:.3g}" for entry in found] + [""] * (len(RECORDED) - len(found))
                print(f"| {name}, t_l = {t_l:g} | " + " | ".join(values) + " |")
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(benches, grids[KINDS[0]], theorem).savefig(args.figure, dpi=150)


if __name__ == "__main__":
    main()
