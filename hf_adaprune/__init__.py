"""Adapt a pre-trained BERT to a task by pruning alone, as a PEFT method. Importing the package registers it."""

from .analysis import sparsity_report
from .config import AdaPruneConfig
from .deploy.export import export_onnx
from .deploy.speed import measure_speed
from .errors import AdaPruneError
from .files.fingerprint import skip_fingerprint_check
from .hub.model_card import write_model_card
from .hub.publish import push_adapter
from .merging import merged
from .model import AdaPruneModel
from .registration import register
from .storage.stored_adapter import read_adapter
from .structured.compaction import compact
from .structured.expansion import expand
from .structured.semi_structured import to_semi_structured
from .training.callback import AdaPruneCallback
from .training.pruner import Pruner
from .tuner.combine import combine_adapters
from .tuner.mixed_batch import mixed_batch


register()

__version__ = "0.1.0"

__all__ = [
    "AdaPruneCallback",
    "AdaPruneConfig",
    "AdaPruneError",
    "AdaPruneModel",
    "Pruner",
    "combine_adapters",
    "compact",
    "expand",
    "export_onnx",
    "measure_speed",
    "merged",
    "mixed_batch",
    "push_adapter",
    "read_adapter",
    "skip_fingerprint_check",
    "sparsity_report",
    "to_semi_structured",
    "write_model_card",
]
