"""What can go wrong, as types: each is an `AdaPruneError` and the builtin error a caller would expect."""

from peft.utils.error import NoMatchingPeftModuleError


class AdaPruneError(Exception):
    """Base class of the package's own errors. A bad argument of a function may be a plain `ValueError`, too."""


class ConfigError(AdaPruneError, ValueError):
    """A field of the configuration has a value that it cannot have."""


class NoMatchingModuleError(AdaPruneError, NoMatchingPeftModuleError):
    """No module, or not every named one, is there to be masked."""


class StructureError(AdaPruneError, ValueError):
    """The model is not built so that its neurons or attention heads can be told apart."""


class BaseMismatchError(AdaPruneError, ValueError):
    """The adapter belongs to another base model than the one it is being put on."""


class AdapterFileError(AdaPruneError, ValueError):
    """The stored adapter is not what was saved: entries are missing, of the wrong size, or altered."""


class MergeError(AdaPruneError, ValueError):
    """The masks cannot be merged into the weights without changing what the model computes."""


class CompactionError(AdaPruneError, ValueError):
    """The model cannot be made smaller without changing what it computes."""


class ExportError(AdaPruneError, RuntimeError):
    """The model cannot be exported, or what was exported does not compute the same."""


class HardwareError(AdaPruneError, RuntimeError):
    """What is asked for needs another machine, or another dtype, than the model is on."""


class SizeError(AdaPruneError, ValueError):
    """A batch, a length or a number of rounds is not one that can be run or measured."""


class NonFiniteError(AdaPruneError, FloatingPointError):
    """Training met a NaN or an infinity."""


class NotPrunedError(AdaPruneError, RuntimeError):
    """The model, or the adapter, does not have the masks that this needs."""


class AdapterNotFoundError(AdaPruneError, FileNotFoundError):
    """There is no adapter, or no base, of that name within reach."""


class PushError(AdaPruneError, ConnectionError):
    """The Hub refused a push, or the connection broke: no file was changed there."""


class TaskError(AdaPruneError, ValueError):
    """There is no such task, its data cannot be read, or the model's head is not for it."""


class MixedBatchError(AdaPruneError, ValueError):
    """A batch of several tasks cannot be computed in one pass."""


class CombineError(AdaPruneError, ValueError):
    """Adapters cannot be combined as was asked."""


class DivergenceError(AdaPruneError, RuntimeError):
    """The processes of a distributed run have come to different masks."""


class UnsupportedShardingError(AdaPruneError, NotImplementedError):
    """The run is distributed in a way in which masks cannot be trained."""
