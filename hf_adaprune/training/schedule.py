"""Schedules over training: the target sparsity, and the step size of the scores."""


def cubic_sparsity(progress: float, final_sparsity: float, start: float = 0.0, end: float = 1.0) -> float:
    """Return the target sparsity of the cubic ramp of Zhu & Gupta (arXiv 1710.01878).

    Most weights are pruned early, while there is time to recover, and the last few per cent slowly.

    Args:
        progress (`float`): The share of training that is done, in [0, 1].
        final_sparsity (`float`): The sparsity from `end` on, in [0, 1).
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
    """Return the factor of the scores' updates: 1 until `start`, then linearly down to 0.

    With fixed updates, the final score equals the average of the unscaled trajectory from `start` on: iterate
    averaging without a second copy.

    Args:
        progress (`float`): The share of training that is done, in [0, 1].
        start (`float`): The share of training after which updates shrink, in [0, 1].

    Returns:
        `float`: The factor, in [0, 1].
    """
    return 1.0 if progress <= start else (1 - progress) / (1 - start)
