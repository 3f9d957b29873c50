"""Adapt a pre-trained BERT to a task by pruning alone, as a PEFT method. Importing the package registers it."""

from .registration import register


register()

from .analysis import sparsity_report  # noqa: E402
from .callback import AdaPruneCallback  # noqa: E402
from .combine import combine_adapters  # noqa: E402
from .compaction import compact  # noqa: E402
from .config import AdaPruneConfig  # noqa: E402
from .expansion import expand  # noqa: E402
from .export import export_onnx  # noqa: E402
from .fingerprint import skip_fingerprint_check  # noqa: E402
from .merging import merged  # noqa: E402
from .mixed_batch import mixed_batch  # noqa: E402
from .model import AdaPruneModel  # noqa: E402
from .pruner import Pruner  # noqa: E402
from .semi_structured import to_semi_structured  # noqa: E402


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
