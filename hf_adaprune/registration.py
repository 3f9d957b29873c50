"""Makes the method known to PEFT: the only place that touches PEFT's tables."""

from importlib.metadata import version

from packaging.version import Version
from peft.utils import PeftType, register_peft_method


MIN_PEFT_VERSION = "0.21.0"


def register() -> None:
    """Register `AdaPruneConfig` and `AdaPruneModel` under the name `"ADAPRUNE"`; do nothing the second time.

    Raises:
        ImportError: If the installed PEFT is too old, or no longer has the tables that a new method is entered in.
    """
    installed = version("peft")
    if Version(installed) < Version(MIN_PEFT_VERSION):
        raise ImportError(
            f"hf_adaprune needs peft >= {MIN_PEFT_VERSION}, found {installed}: run `pip install -U peft`."
        )
    if "ADAPRUNE" in PeftType.__members__:
        return

    from .config import AdaPruneConfig
    from .tuner.model import AdaPruneModel

    try:
        _add_member(PeftType, "ADAPRUNE")
        register_peft_method(name="adaprune", config_cls=AdaPruneConfig, model_cls=AdaPruneModel)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(
            f"hf_adaprune cannot enter its method in the tables of peft {installed}: peft has changed since "
            f"{MIN_PEFT_VERSION}, which works. Please report this with both versions."
        ) from error


def _add_member(enum: type[PeftType], name: str) -> None:
    # `register_peft_method` takes only names that are in the enum, and an enum has no public way to add one.
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    type.__setattr__(enum, name, member)
    enum._member_map_[name] = member
    enum._member_names_.append(name)
    enum._value2member_map_[name] = member
