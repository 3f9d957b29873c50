"""How much of a model is pruned, by component and by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import AdaPruneConfig
from ..errors import NotPrunedError
from ..storage.stored_adapter import read_config
from ..tensor_names import plain_name
from ..tuner.masked_layers import adaprune_layers, chosen_adapter, module_counts
from .heat_map import draw_heat_map
from .names import component_of, grouped, in_order, layer_of


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ModuleSparsity:
    """How much of one module is pruned.

    Args:
        name (`str`): The module's full name.
        num_weights (`int`): How many weights are masked.
        num_pruned (`int`): How many of them are pruned.
    """

    name: str
    num_weights: int
    num_pruned: int

    @property
    def layer(self) -> str:
        """The number of the layer that the module is in, or `"embeddings"` outside of the numbered layers."""
        return layer_of(self.name)

    @property
    def component(self) -> str:
        """The module's name within its layer, such as `"attention.self.query"`."""
        return component_of(self.name)

    @property
    def sparsity(self) -> float:
        """The fraction of the module's weights that is pruned, in [0, 1]."""
        return self.num_pruned / self.num_weights


@dataclass(frozen=True)
class SparsityReport:
    """How much of a model is pruned.

    Args:
        modules (`tuple[ModuleSparsity, ...]`): The masked modules, in the order of the model.
        num_parameters (`int`): How many parameters the whole model has, head and embeddings included; 0 if unknown.
    """

    modules: tuple[ModuleSparsity, ...]
    num_parameters: int

    @property
    def num_weights(self) -> int:
        """How many weights are masked."""
        return sum(module.num_weights for module in self.modules)

    @property
    def num_pruned(self) -> int:
        """How many weights are pruned."""
        return sum(module.num_pruned for module in self.modules)

    @property
    def sparsity(self) -> float:
        """The fraction of the masked weights that is pruned, in [0, 1]."""
        return _share(self.modules)

    @property
    def sparsity_whole_model(self) -> float:
        """The fraction of all parameters that is pruned, in [0, 1].

        Raises:
            ValueError: If `num_parameters` is 0, as the counted configuration does not store it.
        """
        if not self.num_parameters:
            raise ValueError(
                "The size of the whole model is not known: the configuration lacks `num_parameters`. Use `sparsity`, "
                "or open the adapter and save it again."
            )
        return self.num_pruned / self.num_parameters

    @property
    def is_even(self) -> bool:
        """Whether the sparsity of every module is within 0.001 of the overall sparsity."""
        return all(abs(module.sparsity - self.sparsity) < 1e-3 for module in self.modules)

    def by_component(self) -> dict[str, float]:
        """Return the sparsity of each component, over all layers."""
        return {name: _share(group) for name, group in grouped(self.modules, component_of).items()}

    def by_layer(self) -> dict[str, float]:
        """Return the sparsity of each layer, over all components."""
        return {name: _share(group) for name, group in grouped(self.modules, layer_of).items()}


def _share(modules: Sequence[ModuleSparsity]) -> float:
    return sum(module.num_pruned for module in modules) / sum(module.num_weights for module in modules)


def sparsity_report(model: Any, adapter_name: str | None = None) -> SparsityReport:
    """Count the pruned weights of a model or of a saved adapter.

    Args:
        model (`torch.nn.Module`, `str`, `Path` or `AdaPruneConfig`):
            A model with an AdaPrune adapter; or a saved adapter, by its folder, its name on the Hub or its
            configuration, of which no weights are loaded.
        adapter_name (`str`, *optional*): Which adapter of the model; by default the active one.

    Returns:
        `SparsityReport`: The counts.

    Raises:
        NotPrunedError: If the model has no such adapter, several are active and none is named, or the configuration
            was never saved with one.
        AdapterFileError: If the saved adapter is of another method, or damaged.
        AdapterNotFoundError: If there is no saved adapter of that name.

    Example:

        >>> sparsity_report("me/my-adapter").by_layer()
    """
    if isinstance(model, (str, Path)):
        model = read_config(str(model))
    if isinstance(model, AdaPruneConfig):
        config, stored = model, model.module_counts or {}
        counts: dict[str, Any] = {name: stored[name] for name in in_order(list(stored))}
    else:
        adapter_name = chosen_adapter(model, adapter_name)
        counts = {plain_name(name): count for name, count in module_counts(model, adapter_name).items()}
        config = next(adaprune_layers(model, adapter_name))[1].config(adapter_name)
    if not counts:
        raise NotPrunedError("There are no masks to count: the configuration was never saved with an adapter.")
    modules = tuple(ModuleSparsity(name, total, pruned) for name, (pruned, total) in counts.items())
    return SparsityReport(modules, config.num_parameters or 0)


def plot_sparsity(report: SparsityReport) -> Figure:
    """Draw the sparsity of each component in each layer.

    Args:
        report (`SparsityReport`): The report to draw.

    Returns:
        `matplotlib.figure.Figure`: A figure without a window; save it with `savefig`.

    Raises:
        ValueError: If `num_parameters` of the report is 0.
    """
    from matplotlib.figure import Figure

    layers = list(report.by_layer())
    components = list(report.by_component())
    figure = Figure(figsize=(3.5 + 0.62 * len(layers), 1.6 + 0.42 * len(components)), layout="constrained")
    axes = figure.add_subplot()
    grid = [[float("nan")] * len(layers) for _ in components]
    for module in report.modules:
        grid[components.index(module.component)][layers.index(module.layer)] = module.sparsity
    image = draw_heat_map(axes, grid, [[f"{100 * share:.0f}" for share in row] for row in grid])
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(components)), components)
    axes.set_xlabel("layer")
    axes.set_title(
        f"Pruned, in per cent: {100 * report.sparsity:.1f} of the masked weights,\n"
        f"{100 * report.sparsity_whole_model:.1f} of the whole model",
        fontsize=11,
        loc="left",
    )
    figure.colorbar(image, ax=axes, label="share pruned", shrink=0.9)
    return figure
