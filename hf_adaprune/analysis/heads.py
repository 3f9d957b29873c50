"""How much of each attention head the masks keep."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import PreTrainedConfig

from ..config import AdaPruneConfig
from .heat_map import draw_heat_map
from .names import component_of, layer_of
from .sources import Masks, check_matrices, transformers_config


if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Names of the four attention matrices in models. An output also needs "att" in the name of a module around it.
_INPUTS = {
    "query": ("query", "query_proj", "q_lin", "q_proj", "q"),
    "key": ("key", "key_proj", "k_lin", "k_proj", "k"),
    "value": ("value", "value_proj", "v_lin", "v_proj", "v"),
}
_OUTPUTS = ("dense", "out_lin", "out_proj", "o_proj", "o")


@dataclass(frozen=True)
class Heads:
    """The share of weights that the attention heads of one layer keep.

    Args:
        layer (`str`): The layer: `"3"`, or for instance `"decoder 3 (cross)"` for cross-attention in a decoder.
        kept (`dict[str, numpy.ndarray]`):
            For each masked matrix among `"query"`, `"key"`, `"value"` and `"output"`, the share of weights that each
            head keeps, in [0, 1], of shape `(heads,)`. A head owns rows of the first three and columns of the last;
            rows that several heads share count for each of them.
    """

    layer: str
    kept: dict[str, NDArray[np.float64]]

    @property
    def share_kept(self) -> NDArray[np.float64]:
        """The share of its weights that each head keeps, in [0, 1]: the mean over its matrices."""
        return np.mean(list(self.kept.values()), axis=0)

    @property
    def empty(self) -> NDArray[np.int64]:
        """The indices of heads whose weights are all pruned."""
        return np.flatnonzero(self.share_kept == 0)

    @property
    def dead(self) -> NDArray[np.int64]:
        """The indices of heads whose output cannot depend on the input: all values, or all outputs, are pruned."""
        paths = [self.kept[part] == 0 for part in ("value", "output") if part in self.kept]
        return np.flatnonzero(np.any(paths, axis=0)) if paths else np.array([], dtype=np.int64)


def attention_heads(masks: Masks, config: PreTrainedConfig | AdaPruneConfig) -> list[Heads]:
    """Return how much of each attention head is kept.

    Args:
        masks (`Masks`): Masks as returned by `load_masks` or `model_masks`.
        config (`PreTrainedConfig` or `AdaPruneConfig`): `model.config`, or the configuration of a stored adapter.

    Returns:
        `list[Heads]`: One entry per layer, and one more for its cross-attention if it has any.

    Raises:
        ValueError: If a mask is not a matrix, none of the modules is a known attention matrix (one that holds query,
            key and value together is not supported), or a size is not a multiple of the number of heads.

    Example:

        >>> attention_heads(load_masks("me/sst2-adaprune"), PeftConfig.from_pretrained("me/sst2-adaprune"))
    """
    check_matrices(masks)
    config = transformers_config(config)
    sharing = config.num_attention_heads // (
        getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    )
    compacted = getattr(config, "compact_heads", None) or {}
    left = {(layer_of(f".{name}"), _is_cross(name)): len(head["kept"]) for name, head in compacted.items()}
    layers: dict[str, dict[str, NDArray[np.float64]]] = defaultdict(dict)
    for name, mask in masks.items():
        part = _part(component_of(name))
        if part is None:
            continue
        num_heads = left.get((layer_of(name), _is_cross(name)), config.num_attention_heads)
        rows = mask.T if part == "output" else mask
        groups = num_heads // sharing if part in ("key", "value") else num_heads
        if rows.shape[0] % groups:
            raise ValueError(f"The size of {name!r} must be a multiple of its {groups} heads, got {rows.shape[0]}.")
        share = rows.reshape(groups, -1).mean(1, dtype=torch.float64).cpu().numpy()
        attention = layer_of(name) + (" (cross)" if _is_cross(component_of(name)) else "")
        layers[attention][part] = np.repeat(share, num_heads // groups)
    if not layers:
        raise ValueError(
            f"No attention matrix was recognised among {sorted({component_of(name) for name in masks})}: query, key "
            f"and value must be separate modules with names such as {[names[0] for names in _INPUTS.values()]}."
        )
    return [Heads(layer, kept) for layer, kept in layers.items()]


def _part(component: str) -> str | None:
    *path, last = component.split(".")
    for part, names in _INPUTS.items():
        if last in names:
            return part
    return "output" if last in _OUTPUTS and any("att" in step.lower() for step in path) else None


def _is_cross(component: str) -> bool:
    return any(kind in component.lower() for kind in ("crossatt", "cross_att", "encdecatt", "encoder_att"))


def plot_heads(found: list[Heads]) -> Figure:
    """Draw the share of weights that each head keeps, in per cent; a cross marks dead heads.

    Args:
        found (`list[Heads]`): What `attention_heads` returns.

    Returns:
        `matplotlib.figure.Figure`: A figure without a window; save it with `savefig`.
    """
    from matplotlib.figure import Figure

    most = max(layer.share_kept.size for layer in found)  # a compacted model's layers have different numbers of heads
    grid = np.stack([np.pad(it.share_kept, (0, most - it.share_kept.size), constant_values=np.nan) for it in found])
    figure = Figure(figsize=(2.2 + 0.4 * grid.shape[1], 1.3 + 0.32 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    texts = [
        ["x" if head in layer.dead else f"{100 * share:.0f}" for head, share in enumerate(layer.share_kept)]
        for layer in found
    ]
    image = draw_heat_map(axes, grid, texts, highest=float(np.nanmax(grid)))
    axes.set_xticks(range(grid.shape[1]))
    axes.set_yticks(range(len(found)), [layer.layer for layer in found])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="share kept", shrink=0.9)
    return figure
