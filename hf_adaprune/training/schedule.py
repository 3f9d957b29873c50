"""How sparse a model should be at a point of its training, and how far its scores may still move."""


def cubic_sparsity(progress: float, final_sparsity: float, start: float = 0.0, end: float = 1.0) -> float:
    """Return the target sparsity of the cubic ramp of Zhu & Gupta (arXiv 1710.01878).

    Most is pruned early, while there is time to recover, and the last per cent slowly.

    Args:
        progress (`float`): The share of training that is done, in [0, 1].
        final_sparsity (`float`): The sparsity that is reached at `end` and kept from there, in [0, 1).
        start (`float`): The share of training after which pruning begins, in [0, 1).
        end (`float`): The share of training after which the target is reached, in (`start`, 1].

    Returns:
        `float`: The target sparsity, in [0, `final_sparsity`].
    """
    if progress >= end:
        return final_sparsity
    if progress <= start:
        return 0.0
    remaining = 1 - (progress - start) / (end - start)
    return final_sparsity * (1 - remaining**3)


def settling(progress: float, start: float) -> float:
    """Return the factor of the scores' steps: 1 until `start`, and from there linearly down to 0.

    A score then ends where the mean of its path from `start` on would be, had no step been shortened: an average that
    needs no copy of the scores.

    Args:
        progress (`float`): The share of training that is done, in [0, 1].
        start (`float`): The share of training after which steps shrink, in [0, 1].

    Returns:
        `float`: The factor, in [0, 1].
    """
    return 1.0 if progress <= start else (1 - progress) / (1 - start)
