"""Adapt a pre-trained BERT to a task by pruning alone, as a PEFT method. Importing the package registers it."""

from .analysis import sparsity_report
from .config import AdaPruneConfig
from .deploy.export import export_onnx
from .registration import register
from .storage.fingerprint import skip_fingerprint_check
from .structured.compaction import compact
from .structured.expansion import expand
from .structured.semi_structured import to_semi_structured
from .training.callback import AdaPruneCallback
from .training.pruner import Pruner
from .tuner.combine import combine_adapters
from .tuner.merging import merged
from .tuner.mixed_batch import mixed_batch
from .tuner.model import AdaPruneModel


register()

__version__ = "0.1.0"

__all__ = [
    "AdaPruneCallback",
    "AdaPruneConfig",
    "AdaPruneModel",
    "Pruner",
    "combine_adapters",
    "compact",
    "expand",
    "export_onnx",
    "merged",
    "mixed_batch",
    "skip_fingerprint_check",
    "sparsity_report",
    "to_semi_structured",
]
