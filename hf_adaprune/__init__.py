"""Adapt a pre-trained BERT to a task by pruning alone, as a PEFT method. Importing the package registers it."""

from .analysis import sparsity_report
from .callback import AdaPruneCallback
from .combine import combine_adapters
from .compaction import compact
from .config import AdaPruneConfig
from .expansion import expand
from .export import export_onnx
from .fingerprint import skip_fingerprint_check
from .merging import merged
from .mixed_batch import mixed_batch
from .model import AdaPruneModel
from .pruner import Pruner
from .registration import register
from .semi_structured import to_semi_structured


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
