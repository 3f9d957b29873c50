"""Registration of the method with PEFT: the only module that modifies PEFT's registries."""

from importlib.metadata import version

from peft.utils import PeftType, register_peft_method
from transformers.utils.versions import require_version

from .config import AdaPruneConfig
from .hub.model_card import write_model_card
from .model import AdaPruneModel


_MIN_PEFT = "0.21.0"
_MIN_TRANSFORMERS = "5.18.0"  # older ones do not load the heads of adapters


def register() -> None:
    """Register `AdaPruneConfig` and `AdaPruneModel` under the name `"ADAPRUNE"`, unless this was done before.

    Raises:
        ImportError: If the installed PEFT or transformers is too old, or PEFT's registries have changed.
    """
    for requirement in (f"peft>={_MIN_PEFT}", f"transformers>={_MIN_TRANSFORMERS}"):
        require_version(requirement, f"hf_adaprune needs it: run `pip install '{requirement}'`.")
    if "ADAPRUNE" in PeftType.__members__:
        return

    try:
        _add_member(PeftType, "ADAPRUNE")
        register_peft_method(name="adaprune", config_cls=AdaPruneConfig, model_cls=AdaPruneModel)
        AdaPruneConfig.write_card = staticmethod(write_model_card)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(
            f"hf_adaprune cannot register its method with peft {version('peft')}: peft has changed since "
            f"{_MIN_PEFT}, which works. Please report this with both versions."
        ) from error


def _add_member(enum: type[PeftType], name: str) -> None:
    # `register_peft_method` accepts only members of the enum, and an enum has no public way to add a member.
    member = str.__new__(enum, name)
    member._name_ = member._value_ = name
    type.__setattr__(enum, name, member)
    enum._member_map_[name] = member
    enum._member_names_.append(name)
    enum._value2member_map_[name] = member
