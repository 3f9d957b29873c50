"""Select masks from scores that are sharded over processes (FSDP2), without gathering the scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..errors import UnsupportedShardingError


# Digits of a 32-bit key as (shift, bits), from the highest: each takes one all-reduced histogram per scope.
_DIGITS = ((20, 12), (8, 12), (0, 8))


def check_sharding(scores: Mapping[str, torch.Tensor], granularity: str) -> None:
    """Raise if scores are trained or sharded in a way that is not supported.

    Args:
        scores (`Mapping[str, torch.Tensor]`): The scores, by the names of their layers.
        granularity (`str`): The granularity of the masks.

    Raises:
        UnsupportedShardingError: If training uses DeepSpeed, FSDP1, FSDP2 over other than one mesh dimension, or FSDP
            with a granularity other than `"weight"`.
    """
    if is_initialized() and AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        raise UnsupportedShardingError(
            "DeepSpeed updates internal copies of the parameters, so scores cannot be initialized from the inputs of "
            "the first step, and the head's steps cannot be scaled. Use DDP, or FSDP with `fsdp_version: 2`: see "
            "examples/accelerate_configs."
        )
    if granularity != "weight":
        if is_initialized() and AcceleratorState().distributed_type == DistributedType.FSDP:
            raise UnsupportedShardingError(
                f'`granularity="{granularity}"` needs all scores of a layer in one process: use DDP, or '
                '`granularity="weight"`.'
            )
        return
    for name, score in scores.items():
        if score.dim() != 2:
            raise UnsupportedShardingError(
                f"The scores of {name!r} are no longer a matrix but of shape {tuple(score.shape)}: FSDP1 flattens "
                "parameters. Set `fsdp_version: 2`."
            )
        if isinstance(score, DTensor) and [type(p) for p in score.placements] != [Shard]:
            raise UnsupportedShardingError(
                f"The scores of {name!r} must be sharded by FSDP2 over one mesh dimension, without replicas, but are "
                f"placed as {score.placements}. Change the device mesh, or use DDP."
            )


def is_sharded(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether any of the tensors is sharded over processes."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_to_shards(target: torch.Tensor, values: torch.Tensor) -> None:
    """Copy values, whole in every process, into a tensor that may be sharded."""
    if isinstance(target, DTensor):
        values = distribute_tensor(values, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(values)


def sharded_topk_masks(
    scores: Mapping[str, Any], weights: Mapping[str, Any], scopes: Sequence[Sequence[str]], num_kept: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Return exactly the masks of `topk_masks`, from scores that are sharded by rows.

    Each threshold is found by radix search: for each digit, the processes sum histograms of the remaining candidates,
    8,448 numbers per scope in all, and as many again to break ties. Only the masks are gathered, as one byte per
    weight.

    Args:
        scores (`Mapping[str, DTensor]`): Finite scores of each layer, of two dimensions, sharded over the first.
        weights (`Mapping[str, DTensor]`): The layers' weights, sharded alike.
        scopes (`Sequence[Sequence[str]]`): The layers that share a threshold.
        num_kept (`Sequence[int]`): The number of entries to keep in each scope.

    Returns:
        `dict[str, torch.Tensor]`: A boolean mask for each layer, whole in every process.
    """
    parts = {name: score.to_local().reshape(-1) for name, score in scores.items()}
    kept = {name: torch.zeros_like(part, dtype=torch.bool) for name, part in parts.items()}
    tied = {name: torch.ones_like(part, dtype=torch.bool) for name, part in parts.items()}
    one = scores[scopes[0][0]]
    processes, missing = one.device_mesh.get_group(), torch.tensor(num_kept, device=one.device)
    for deciding in (parts, {name: weight.detach().to_local().reshape(-1).abs() for name, weight in weights.items()}):
        keys = {name: _ordered(values) for name, values in deciding.items()}
        candidates = [torch.cat([keys[name][tied[name]] for name in scope]) for scope in scopes]
        thresholds, missing, num_tied = _kth_largest(candidates, missing, processes)
        for scope, threshold in zip(scopes, thresholds.tolist(), strict=True):
            for name in scope:
                kept[name] |= tied[name] & (keys[name] > threshold)
                tied[name] &= keys[name] == threshold
        if torch.equal(missing, num_tied):
            break
    _keep_first(kept, tied, scopes, missing.tolist(), processes)
    return {name: _gather(mask, scores[name]) for name, mask in kept.items()}


def _ordered(values: torch.Tensor) -> torch.Tensor:
    """Return int32 keys in the order of floating-point values; both zeros have the same key."""
    bits = (values.float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _kth_largest(
    groups: list[torch.Tensor], k: torch.Tensor, processes: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return each group's k-th largest key over all processes, and of keys equal to it the number to keep, and all."""
    thresholds = num_equal = torch.zeros_like(k)
    for shift, bits in _DIGITS:
        # The highest bit is the sign: flip it, so that digits order negative keys first.
        sign = 1 << (bits - 1) if shift + bits == 32 else 0
        digits = [((keys >> shift) & ((1 << bits) - 1)) ^ sign for keys in groups]
        counts = torch.stack([torch.bincount(digit, minlength=1 << bits) for digit in digits])
        dist.all_reduce(counts, group=processes)
        at_least = counts.flip(1).cumsum(1).flip(1)
        chosen = (at_least >= k.unsqueeze(1)).sum(1, keepdim=True) - 1
        num_equal = counts.gather(1, chosen).squeeze(1)
        k = k - at_least.gather(1, chosen).squeeze(1) + num_equal
        thresholds = (thresholds << bits) + chosen.squeeze(1)
        groups = [keys[digit == c] for keys, digit, c in zip(groups, digits, chosen, strict=True)]
    return thresholds - (1 << 31), k, num_equal


def _keep_first(
    kept: dict[str, torch.Tensor],
    tied: dict[str, torch.Tensor],
    scopes: Sequence[Sequence[str]],
    missing: list[int],
    processes: dist.ProcessGroup,
) -> None:
    """Keep, of entries that are still tied, those that come first: by layer, by process, and by position."""
    own = torch.stack([part.count_nonzero() for part in tied.values()])
    counts = [torch.empty_like(own) for _ in range(processes.size())]
    dist.all_gather(counts, own, group=processes)
    of_layer = dict(zip(tied, torch.stack(counts, 1).tolist(), strict=True))
    for scope, left in zip(scopes, missing, strict=True):
        for name in scope:
            for rank, count in enumerate(of_layer[name]):
                taken = min(left, count)
                left -= taken
                if rank == processes.rank() and taken:
                    kept[name][tied[name].nonzero().squeeze(1)[:taken]] = True


def _gather(mask: torch.Tensor, score: DTensor) -> torch.Tensor:
    # As bytes: not every backend gathers booleans.
    part = mask.view(torch.uint8).view(score.to_local().shape)
    mesh, shape, stride = score.device_mesh, score.shape, score.stride()
    sharded = DTensor.from_local(part, mesh, score.placements, run_check=False, shape=shape, stride=stride)
    return full_tensor(sharded).view(torch.bool)
