"""Check that all processes of a run have the same masks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..errors import DivergenceError
from ..files.fingerprint import fingerprint
from ..masks import pack_mask


def check_same_masks(masks: Mapping[str, torch.Tensor], num_steps: int) -> None:
    """Raise, in every process, if the processes' masks differ in a single bit.

    Only digests are exchanged, two numbers per layer. All processes must call this at the same point of training; with
    one process it does nothing.

    Args:
        masks (`Mapping[str, torch.Tensor]`): Boolean masks by the names of their layers.
        num_steps (`int`): The number of steps taken, for the message.

    Raises:
        DivergenceError: If the masks differ.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    digests = [int(fingerprint([pack_mask(mask)])[:15], 16) for mask in masks.values()]
    device = next(iter(masks.values())).device
    extremes = torch.tensor([*digests, *(-digest for digest in digests)], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    highest, lowest = extremes[: len(digests)], -extremes[len(digests) :]
    differing = [name for name, same in zip(masks, (highest == lowest).tolist(), strict=True) if not same]
    if differing:
        raise DivergenceError(
            f"After step {num_steps} the {dist.get_world_size()} processes have different masks in {differing}: they "
            "would save different adapters. Wrap the model with `accelerator.prepare` (or in "
            "`DistributedDataParallel`) before creating the `Pruner`, change parameters in all processes alike, and "
            "resume from the last checkpoint."
        )
