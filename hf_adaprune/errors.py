"""The package's exceptions: each is an `AdaPruneError` and the builtin error that a caller would expect."""

from peft.utils.error import NoMatchingPeftModuleError


class AdaPruneError(Exception):
    """Base class of the package's errors. An invalid function argument may also raise a plain `ValueError`."""


class ConfigError(AdaPruneError, ValueError):
    """A setting is invalid, or does not fit the model or the run."""


class NoMatchingModuleError(AdaPruneError, NoMatchingPeftModuleError):
    """There is no module to mask, or a given name matches no module that can be masked."""


class StructureError(AdaPruneError, ValueError):
    """The model does not have the structure that the granularity needs."""


class BaseMismatchError(AdaPruneError, ValueError):
    """The adapter was made for another base model than the given one."""


class AdapterFileError(AdaPruneError, ValueError):
    """The stored adapter differs from what was saved: entries are missing, of the wrong size, or altered."""


class MergeError(AdaPruneError, ValueError):
    """The masks cannot be merged into the weights without changing what the model computes."""


class CompactionError(AdaPruneError, ValueError):
    """The model cannot be made smaller without changing what it computes."""


class ExportError(AdaPruneError, RuntimeError):
    """The model cannot be exported, or the exported model computes different results."""


class HardwareError(AdaPruneError, RuntimeError):
    """The operation needs other hardware, or another dtype, than the model has."""


class SizeError(AdaPruneError, ValueError):
    """A batch size, a sequence length or a number of repetitions is out of range."""


class NonFiniteError(AdaPruneError, FloatingPointError):
    """Training met a NaN or an infinity."""


class NotPrunedError(AdaPruneError, RuntimeError):
    """The model, or the adapter, does not have the masks that the operation needs."""


class AdapterNotFoundError(AdaPruneError, FileNotFoundError):
    """No adapter, or no base, of the given name could be found."""


class PushError(AdaPruneError, ConnectionError):
    """The Hub refused a push, or the connection failed: no file was changed there."""


class CardError(AdaPruneError, ValueError):
    """A model card cannot be read, or a score for it is not a number."""


class TaskError(AdaPruneError, ValueError):
    """The task is unknown, its data cannot be read, or the model's head does not fit it."""


class MixedBatchError(AdaPruneError, ValueError):
    """A batch of several tasks cannot be computed in one pass."""


class CombineError(AdaPruneError, ValueError):
    """The adapters cannot be combined as requested."""


class DivergenceError(AdaPruneError, RuntimeError):
    """The processes of a distributed run have different masks."""


class UnsupportedShardingError(AdaPruneError, NotImplementedError):
    """The run is distributed in a way that does not support training masks."""
