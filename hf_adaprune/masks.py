"""Pure functions on masks. A mask is boolean and **True means kept**."""

from collections.abc import Iterable
from typing import Final

import numpy as np
import torch


# The name under which `adapter_config.json` records how masks are stored. Entry `i` of the flattened mask is bit
# `i % 8`, counted from the least significant, of byte `i // 8`; the unused bits of the last byte are zero.
PACKED_BITS: Final = "packed-bits-lsb"


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into bytes, eight entries each.

    Args:
        mask (`torch.Tensor`): Boolean tensor of any shape, with `n` entries.

    Returns:
        `torch.Tensor`: `uint8` tensor of shape `(ceil(n / 8),)`, in the order of `PACKED_BITS`.
    """
    flat = mask.reshape(-1)
    if _on_cpu(flat):
        return torch.from_numpy(np.packbits(flat.numpy(), bitorder="little"))
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=flat.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def packed_size(num_entries: int) -> int:
    """Return the size in bytes of a packed mask of `num_entries` entries."""
    return -(-num_entries // 8)


def packed_ones(num_entries: int) -> torch.Tensor:
    """Return the packed mask that keeps everything, on the CPU: `uint8`, of shape `(ceil(num_entries / 8),)`."""
    packed = torch.full((packed_size(num_entries),), 255, dtype=torch.uint8, device="cpu")
    packed[num_entries // 8 :] = (1 << num_entries % 8) - 1
    return packed


def unpack_mask(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Undo `pack_mask`.

    Args:
        packed (`torch.Tensor`): `uint8` tensor of shape `(ceil(n / 8),)`.
        shape (`torch.Size`): The mask's shape, with `n` entries.

    Returns:
        `torch.Tensor`: Boolean tensor of the given shape.

    Raises:
        ValueError: If `packed` does not have `ceil(n / 8)` bytes.
    """
    if packed.numel() != packed_size(shape.numel()):
        raise ValueError(
            f"A mask of {shape.numel()} entries takes {packed_size(shape.numel())} bytes, got {packed.numel()}."
        )
    if _on_cpu(packed):
        bits = torch.from_numpy(np.unpackbits(packed.numpy(), count=shape.numel(), bitorder="little"))
        return bits.view(torch.bool).view(shape)
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    bits = (packed.unsqueeze(1) >> shifts) & 1
    return bits.view(-1)[: shape.numel()].view(torch.bool).view(shape)


def apply_mask(tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Multiply a tensor by a mask, boolean or real, of the same shape; the result has the tensor's dtype."""
    if mask.dtype == torch.bool and _on_cpu(mask):
        # Same values; on a CPU, multiplying tensors of one dtype is many times as fast as mixing two.
        mask = mask.view(torch.uint8).to(tensor.dtype)
        if not tensor.requires_grad:
            return mask.mul_(tensor)
    return tensor * mask


def sparsity_of(masks: Iterable[torch.Tensor]) -> float:
    """Return the fraction of entries that the masks remove, in [0, 1], all masks taken together."""
    pruned = total = 0
    for mask in masks:
        total += mask.numel()
        pruned += mask.numel() - int(mask.count_nonzero())
    return pruned / total if total else 0.0


def topk_mask(scores: torch.Tensor, num_kept: int, weight: torch.Tensor) -> torch.Tensor:
    """Keep exactly the `num_kept` entries of highest score.

    Args:
        scores (`torch.Tensor`): Finite scores of any shape.
        num_kept (`int`): How many entries to keep, in `[0, scores.numel()]`.
        weight (`torch.Tensor`):
            The weights that the scores belong to, same shape. Ties are broken by larger magnitude, then by lower
            position, so that the mask is the same on every machine.

    Returns:
        `torch.Tensor`: Boolean tensor of the shape of `scores` with exactly `num_kept` True entries.

    Raises:
        ValueError: If `num_kept` is out of range.
    """
    if not 0 <= num_kept <= scores.numel():
        raise ValueError(f"`num_kept` must be in [0, {scores.numel()}], got {num_kept}.")
    if num_kept in (0, scores.numel()):
        return torch.full_like(scores, num_kept > 0, dtype=torch.bool)
    flat = scores.detach().reshape(-1)
    threshold, kept = _kth_largest(flat, num_kept)
    if surplus := _count(kept) - num_kept:
        tied = (flat == threshold).nonzero().squeeze(1)
        order = weight.detach().reshape(-1)[tied].abs().sort(descending=True, stable=True).indices
        kept[tied[order[-surplus:]]] = False
    return kept.view(scores.shape)


def _kth_largest(flat: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k-th largest value, and a mask of the values that are at least as large."""
    if _on_cpu(flat) and flat.dtype == torch.float32:
        # On a CPU numpy selects and compares several times as fast as torch, with the same result.
        values = flat.numpy()
        threshold = np.partition(values, -k)[-k]
        return torch.as_tensor(threshold), torch.from_numpy(values >= threshold)
    threshold = flat.topk(k, sorted=False).values.min()  # `kthvalue` has no deterministic CUDA version
    return threshold, flat >= threshold


def _count(mask: torch.Tensor) -> int:
    return int(np.count_nonzero(mask.numpy()) if _on_cpu(mask) else mask.count_nonzero())


def _on_cpu(tensor: torch.Tensor) -> bool:
    # Where numpy is faster. `torch.compile` cannot trace these calls.
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()
