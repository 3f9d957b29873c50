import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig, PeftType

from hf_adaprune import AdaPruneConfig
from hf_adaprune.errors import AdaPruneError, ConfigError


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("final_sparsity", 1.0, r"`final_sparsity` must be in \[0, 1\), got 1.0"),
        ("final_sparsity", -0.1, r"must be in \[0, 1\), got -0.1"),
        ("final_sparsity", float("nan"), r"must be in \[0, 1\), got nan"),
        ("final_sparsity", "half", "`final_sparsity` must be of type number, got 'half'"),
        ("final_sparsity", True, "must be of type number, got True"),
        ("pruning_end", 1.2, "0 <= pruning_start < pruning_end <= 1, got 0.0 and 1.2"),
        ("pruning_start", 0.7, "0 <= pruning_start < pruning_end <= 1, got 0.7 and 0.6"),
        ("pruning_start", 0.6, "0 <= pruning_start < pruning_end <= 1, got 0.6 and 0.6"),
        ("scope", "layer", r"`scope` must be one of \['module', 'kind', 'global'\], got 'layer'"),
        ("estimator", "gumbel", "`estimator` must be one of"),
        ("score_init", "zero", "`score_init` must be one of"),
        ("selection", "drift", "`selection` must be one of"),
        ("head", "mlp", "`head` must be one of"),
        ("mask_codec", "zip", "`mask_codec` must be one of"),
        ("score_lr_ratio", 0, "`score_lr_ratio` must be positive and finite, got 0"),
        ("head_lr_ratio", float("inf"), "`head_lr_ratio` must be positive and finite, got inf"),
        ("forward_temperature", -1.0, "`forward_temperature` must be positive and finite, got -1.0"),
        ("drift", -1e-7, "`drift` must be finite and >= 0"),
        ("drift", 0.01, "`drift` needs `selection='threshold'`, got 'topk'"),
        ("forward_temperature", 10.0, "`forward_temperature` needs `estimator='sigmoid'` and `selection='threshold'`"),
        ("format_version", 2, "upgrade hf_adaprune"),
        ("layers_to_transform", 0, "`layers_to_transform` needs `target_modules` as a list"),
        ("layers_to_transform", range(2), r"must be of type .*list\[int\].*, got range\(0, 2\)"),
        ("layers_pattern", "layer", "`layers_pattern` needs `layers_to_transform`"),
    ],
)
def test_a_value_out_of_range_is_refused_in_words(field: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        AdaPruneConfig(**{field: value})
    assert isinstance(caught.value, AdaPruneError)
    assert isinstance(caught.value, ValueError)


def test_all_wrong_fields_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match=r"final_sparsity.*\n.*scope"):
        AdaPruneConfig(final_sparsity=2.0, scope="none")  # type: ignore[arg-type]


def test_a_preset_takes_overrides_and_an_unknown_one_is_refused() -> None:
    config = AdaPruneConfig.from_preset("paper", final_sparsity=0.7)
    assert (config.final_sparsity, config.selection, config.forward_temperature) == (0.7, "threshold", 1e5)
    assert AdaPruneConfig.from_preset("default") == AdaPruneConfig()
    with pytest.raises(ConfigError, match=r"must be one of \['default', 'paper'\], got 'best'"):
        AdaPruneConfig.from_preset("best")


def test_a_config_survives_its_file(tmp_path: Path) -> None:
    config = AdaPruneConfig(final_sparsity=0.25, target_modules=["query", "key"], layers_to_transform=0)
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, AdaPruneConfig)
    assert loaded.peft_type == PeftType("ADAPRUNE")
    assert loaded.inference_mode
    loaded.inference_mode = False
    assert loaded == config
    assert [path.name for path in tmp_path.iterdir()] == ["adapter_config.json"]


def test_lists_of_names_become_sets_and_are_saved_as_sorted_lists(tmp_path: Path) -> None:
    config = AdaPruneConfig(target_modules=["d", "b", "a", "c"], exclude_modules=["key"])
    assert config.target_modules == {"a", "b", "c", "d"}
    assert config.exclude_modules == {"key"}
    config.save_pretrained(str(tmp_path))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["a", "b", "c", "d"]
