"""What AdaPrune is compared with: each method is a callback of a stock `Trainer`, as `AdaPruneCallback` is.

All of them prune the layers that AdaPrune prunes, to the last weight as many, and train the same head.
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
from .recovery import NoRecoveryCallback
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
"""What makes the callback of each method; of the configuration most of them take `final_sparsity` alone."""


def make_callback(method: str, config: AdaPruneConfig | None = None) -> TrainerCallback | None:
    """Return what a `Trainer` needs to train by a method.

    Args:
        method (`str`): One of `METHODS`.
        config (`AdaPruneConfig`, *optional*): How much is pruned, and for AdaPrune itself all the rest.

    Returns:
        `TrainerCallback` or `None`: The callback; fine-tuning needs none.

    Raises:
        ConfigError: If there is no method of that name.
    """
    if method not in METHODS:
        raise ConfigError(f"The method must be one of {sorted(METHODS)}, got {method!r}.")
    return METHODS[method](config or AdaPruneConfig())
