"""Baselines to compare AdaPrune with; each is a callback of a stock `Trainer`, as `AdaPruneCallback` is.

Those that prune remove exactly as many weights, from the same layers, as AdaPrune; all of them train the same head.
"""

from collections.abc import Callable

from transformers import TrainerCallback

from ..config import AdaPruneConfig
from ..errors import ConfigError
from ..training.callback import AdaPruneCallback
from .ablations import ABLATIONS, ablate
from .fixed import FixedMaskCallback, RandomMaskCallback
from .magnitude import IterativeMagnitudeCallback, MagnitudeCallback
from .movement import MovementCallback
from .no_recovery import NoRecoveryCallback
from .smp import SMPCallback
from .trained import TrainedWeightsCallback
from .unpruned import FeatureExtractionCallback, LoraCallback


__all__ = [
    "ABLATIONS",
    "METHODS",
    "FeatureExtractionCallback",
    "FixedMaskCallback",
    "IterativeMagnitudeCallback",
    "LoraCallback",
    "MagnitudeCallback",
    "MovementCallback",
    "NoRecoveryCallback",
    "RandomMaskCallback",
    "SMPCallback",
    "TrainedWeightsCallback",
    "ablate",
    "make_callback",
]

METHODS: dict[str, Callable[[AdaPruneConfig], TrainerCallback | None]] = {
    "adaprune": AdaPruneCallback,
    "no_recovery": NoRecoveryCallback,
    "smp": lambda config: SMPCallback(config.final_sparsity),
    "random": lambda config: RandomMaskCallback(config.final_sparsity),
    "magnitude": lambda config: MagnitudeCallback(config.final_sparsity),
    "imp": lambda config: IterativeMagnitudeCallback(config.final_sparsity),
    "movement": lambda config: MovementCallback(config.final_sparsity),
    "lora": lambda config: LoraCallback(),
    "feature_extraction": lambda config: FeatureExtractionCallback(),
    "finetune": lambda config: None,
}
"""A function for each method that creates its callback; most use only `final_sparsity` of the configuration."""


def make_callback(method: str, config: AdaPruneConfig | None = None) -> TrainerCallback | None:
    """Return the callback with which a `Trainer` trains by a method.

    Args:
        method (`str`): One of `METHODS`.
        config (`AdaPruneConfig`, *optional*): The configuration, of which most methods use only `final_sparsity`.

    Returns:
        `TrainerCallback` or `None`: The callback; fine-tuning needs none.

    Raises:
        ConfigError: If `method` is not one of `METHODS`.
    """
    if method not in METHODS:
        raise ConfigError(f"The method must be one of {sorted(METHODS)}, got {method!r}.")
    return METHODS[method](config or AdaPruneConfig())
