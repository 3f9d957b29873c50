import importlib.metadata
import subprocess
import sys

import pytest
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from hf_adaprune import AdaPruneConfig, AdaPruneModel, registration


def test_the_method_is_a_member_of_pefts_enum_like_any_other() -> None:
    member = PeftType("ADAPRUNE")
    assert member is PeftType.ADAPRUNE is PeftType["ADAPRUNE"]
    assert member == "ADAPRUNE"
    assert (member.name, member.value) == ("ADAPRUNE", "ADAPRUNE")
    assert member in list(PeftType)
    assert "ADAPRUNE" in list(PeftType)
    assert isinstance(member, PeftType)


def test_pefts_tables_lead_to_our_classes() -> None:
    member = PeftType("ADAPRUNE")
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is AdaPruneConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is AdaPruneModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "adaprune_"
    config = get_peft_config({"peft_type": "ADAPRUNE", "final_sparsity": 0.3})
    assert isinstance(config, AdaPruneConfig)
    assert isinstance(config, PeftConfig)


def test_registering_twice_does_nothing() -> None:
    members = list(PeftType)
    registration.register()
    assert list(PeftType) == members


@pytest.mark.parametrize(("package", "old"), [("peft", "0.20.0"), ("transformers", "5.17.0")])
def test_an_old_library_is_refused_with_a_sentence(package: str, old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: old if name == package else version(name))
    with pytest.raises(ImportError, match=rf"(?s)but found {package}=={old}.*pip install '{package}>="):
        registration.register()


def test_a_peft_whose_tables_have_moved_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(**kwargs: object) -> None:
        raise TypeError("got an unexpected keyword argument 'model_cls'")

    monkeypatch.setattr(registration, "register_peft_method", moved)
    monkeypatch.setattr(registration, "_add_member", lambda enum, name: None)
    monkeypatch.setattr(registration, "PeftType", type("Empty", (), {"__members__": {}}))
    with pytest.raises(ImportError, match="cannot register its method with peft"):
        registration.register()


def test_importing_the_package_writes_nothing_and_leaves_other_methods_alone() -> None:
    code = "from peft import PeftType; before = set(PeftType); import hf_adaprune; print(len(set(PeftType) - before))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"
    assert done.stderr == ""
