"""Measure the size of coded masks against bounds on it, and the time to encode and decode them.

    python examples/benchmarks/codec.py ADAPTER [ADAPTER ...] --figure codec.png
    python examples/benchmarks/codec.py --bert_base

Each adapter is opened on its base, and its masks are encoded again. In bits per weight, of the masks alone: `coded` is
the size of the encoded masks; `matrix` and `row` are the entropies of the mask given the rank of |w| in its matrix, or
row, in 64 steps; `scaled` is the cost under the odds that the codec uses, not counting the scales of rows and columns;
`binary` is the entropy of the sparsity. Times are CPU times in nanoseconds per weight, on one thread; `read` is the
time to read the base's checkpoint from the system's cache and copy it. `--bert_base` measures times on random weights
and masks of BERT-base's shape, about as predictable as trained ones.
"""

import json
import tempfile
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from hf_adaprune import read_adapter
from hf_adaprune.codec import decode_mask, encode_mask
from hf_adaprune.codec.magnitudes import Magnitudes
from hf_adaprune.codec.mask_odds import fit_context
from hf_adaprune.masks import pack_mask
from hf_adaprune.tuner.masked_layers import adaprune_layers


BINS = 64


class Masked(NamedTuple):
    """Hold a mask, the masked weight, and the dimension of its inputs."""

    mask: torch.Tensor
    weight: torch.Tensor
    input_dim: int | None


def entropy(contexts: Any, mask: Any) -> float:
    """Return the entropy of a mask, in bits, given the context of each entry."""
    total = np.bincount(contexts.reshape(-1))
    kept = np.bincount(contexts.reshape(-1), weights=mask.reshape(-1))
    share = np.clip(kept / np.maximum(total, 1), 1e-12, 1 - 1e-12)
    return float((total * -(share * np.log2(share) + (1 - share) * np.log2(1 - share))).sum())


def ranks(values: Any, axis: int | None) -> Any:
    """Return the rank of each value along an axis, or of all, in 64 steps."""
    order = values.argsort(axis=axis, kind="stable").argsort(axis=axis).reshape(values.shape)
    return order * BINS // (values.size if axis is None else values.shape[axis])


def odds_cost(levels: Any, mask: Any) -> float:
    """Return the cost of a mask, in bits, under the odds that the codec would store, for known scales."""
    context = fit_context(levels, mask)
    kept = 1 / (1 + 1.25 ** -context.odds.astype(float)[context.of(levels)])
    return float(-np.log2(np.where(mask, kept, 1 - kept)).sum())


def timed(function: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """Return the result of a function, and the minimum of its CPU times, in seconds."""
    least = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        least = min(least, time.process_time() - start)
    return result, least


def measure(layers: Iterator[Masked], repeats: int) -> dict[str, float]:
    """Encode and decode masks; return bits and nanoseconds per weight, and the sparsity."""
    sums = dict.fromkeys(("weights", "kept", "coded", "matrix", "row", "scaled", "encode", "decode"), 0.0)
    for mask, weight, input_dim in layers:
        coded, encoding = timed(lambda: encode_mask(mask, weight, input_dim), 1)  # noqa: B023
        packed, decoding = timed(lambda: decode_mask(coded, weight, input_dim), repeats)  # noqa: B023
        assert torch.equal(packed, pack_mask(mask))
        rows = [tensor.T if input_dim == 0 else tensor for tensor in (mask, weight)]
        kept, magnitude = rows[0].numpy(), rows[1].float().abs().numpy()
        sums["weights"] += mask.numel()
        sums["kept"] += int(mask.sum())
        sums["coded"] += 8 * coded.numel()
        sums["matrix"] += entropy(ranks(magnitude, None), kept)
        sums["row"] += entropy(ranks(magnitude, 1), kept)
        sums["scaled"] += odds_cost(Magnitudes(rows[1]).levels(), kept)
        sums["encode"] += 1e9 * encoding
        sums["decode"] += 1e9 * decoding
    weights = sums.pop("weights")
    kept_share = sums.pop("kept") / weights
    result = {name: value / weights for name, value in sums.items()}
    binary = -(kept_share * np.log2(kept_share) + (1 - kept_share) * np.log2(1 - kept_share))
    return {"weights": weights, "sparsity": 1 - kept_share, "binary": float(binary), **result}


def read_time(model: torch.nn.Module, weights: float, repeats: int) -> float:
    """Return the time to read a model's checkpoint, in nanoseconds per masked weight."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        save_file({f"{number}": tensor.detach().clone() for number, tensor in enumerate(model.parameters())}, path)
        _, seconds = timed(lambda: [tensor.clone() for tensor in load_file(path).values()], repeats + 1)
    return 1e9 * seconds / weights


def of_adapter(name: str, repeats: int) -> dict[str, Any]:
    """Measure a stored adapter."""
    adapter = read_adapter(name)
    tuned = adapter.open()
    layers = [layer for _, layer in adaprune_layers(tuned)]
    plain = tuned.unload()
    result = measure(
        (Masked(layer.mask("default").contiguous(), layer.base_weight.detach(), layer.input_dim) for layer in layers),
        repeats,
    )
    result["read"] = read_time(plain, result["weights"], repeats)
    head = adapter.num_bytes - adapter.mask_bytes
    sides = sum(sum(layer.base_weight.shape) for layer in layers)
    bytes_of = {
        "packed": result["weights"] / 8 + head,
        "coded": result["coded"] * result["weights"] / 8 + head,
        "LoRA r=8": 4 * 8 * sides + head,
        "checkpoint": 4 * sum(parameter.numel() for parameter in plain.parameters()),
    }
    return {"adapter": name, **result, "head_bytes": head, "bytes": bytes_of}


def made_up(num_layers: int = 12, width: int = 768, inner: int = 3072) -> Iterator[Masked]:
    """Yield random masks of BERT-base's shape: the larger |w| times two scales, the likelier an entry is kept."""
    generator = torch.Generator().manual_seed(0)
    for shape in num_layers * [*4 * [(width, width)], (inner, width), (width, inner)]:
        weight = 0.04 * torch.randn(shape, generator=generator)
        scales = 0.5 * torch.randn(shape[0], 1, generator=generator) + 0.5 * torch.randn(shape[1], generator=generator)
        z = weight.abs().log2() + scales
        z -= z.reshape(-1)[:100_000].median()
        yield Masked(torch.rand(shape, generator=generator) < (9 * z).sigmoid(), weight, 1)


def of_bert_base(repeats: int) -> dict[str, Any]:
    """Measure random masks of BERT-base's shape."""
    from transformers import BertConfig, BertModel

    result = measure(made_up(), repeats)
    return {"adapter": "made up", **result, "read": read_time(BertModel(BertConfig()), result["weights"], repeats)}


def draw(results: list[dict[str, Any]], path: str) -> None:
    """Plot the bytes of an adapter over its sparsity."""
    first = results[0]
    weights, head = first["weights"], first["head_bytes"]
    share = np.linspace(0.001, 0.999, 400)
    _, axes = plt.subplots(figsize=(7, 4.5))
    axes.axhline(first["bytes"]["checkpoint"], color="black", label="full checkpoint, float32")
    axes.axhline(first["bytes"]["packed"], color="tab:blue", label="packed: one bit a weight")
    axes.axhline(first["bytes"]["LoRA r=8"], color="tab:orange", linestyle="--", label="LoRA r=8 on the same layers")
    binary = -(share * np.log2(share) + (1 - share) * np.log2(1 - share))
    axes.plot(share, binary * weights / 8 + head, color="tab:blue", linestyle=":", label="bound without the weights")
    points = {
        "matrix": ("x", "bound by |w| alone"),
        "coded": ("o", "coded"),
        "scaled": ("_", "bound by |w| and scales"),
    }
    for name, (marker, label) in points.items():
        bytes_of = [row[name] * row["weights"] / 8 + row["head_bytes"] for row in results]
        axes.plot(
            [row["sparsity"] for row in results], bytes_of, marker, color="tab:red", label=label, fillstyle="none"
        )
    axes.set(xlabel="sparsity of the masked weights", ylabel="bytes of the adapter, with its head", yscale="log")
    axes.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(path, dpi=150)


def main() -> None:
    """Print one line of JSON for each adapter."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="*", help="Folders, or names on the Hub; the bases must be available.")
    parser.add_argument("--bert_base", action="store_true", help="Also measure random masks of BERT-base's shape.")
    parser.add_argument("--figure", help="File for a plot of the adapters' bytes over sparsity.")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = [of_adapter(name, args.repeats) for name in args.adapters]
    if args.figure:
        draw(results, args.figure)
    for row in (*results, *([of_bert_base(args.repeats)] if args.bert_base else [])):
        row["decode_over_read"] = row["decode"] / row["read"]
        print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}))


if __name__ == "__main__":
    main()
