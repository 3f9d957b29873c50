"""Movement pruning: remove the weights that training moves towards zero."""

from __future__ import annotations

from ..config import AdaPruneConfig
from .score_steps import ScoreStepsCallback
from .trained import TrainedWeightsCallback


class MovementCallback(ScoreStepsCallback, TrainedWeightsCallback):
    """Train the weights of a `Trainer`'s model, and scores that measure their movement away from zero.

    Movement pruning (Sanh, Wolf and Rush, arXiv 2005.07683) in its hard form: scores start from a constant and have
    the straight-through gradient `dloss/dscores = weight * dloss/dW`, the highest scores of each matrix are kept, and
    the cubic ramp runs from one tenth to eight tenths of training. The paper trains for 6 to 10 epochs, with frozen
    embeddings and a learning rate of 3e-5; here all weights are trained, at the learning rate of fine-tuning.

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).
        score_learning_rate (`float`): The learning rate of the scores, > 0; the paper's by default.

    Raises:
        ConfigError: If an argument is out of range.
    """

    def __init__(self, final_sparsity: float = 0.5, score_learning_rate: float = 1e-2) -> None:
        config = AdaPruneConfig(
            final_sparsity=final_sparsity,
            pruning_start=0.1,
            pruning_end=0.8,
            score_init="constant",
            dropout=None,
            settle=False,
        )
        super().__init__(config, score_learning_rate)
