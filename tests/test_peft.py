"""What PEFT's and Transformers' generic code expects of a tuner, each on a BERT of a few thousand weights."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForSeq2SeqLM,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny import HEADS, logits_of, make_batch, make_model, save_model, train_masks
from torch import nn
from transformers import AutoConfig, BartConfig, BartForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from hf_adaprune import AdaPruneConfig, Pruner, sparsity_report
from hf_adaprune.errors import AdapterFileError, ConfigError, MergeError, NoMatchingModuleError
from hf_adaprune.tuner.layer import AdaPruneLayer
from hf_adaprune.tuner.layer_types import Conv1DLinear, Embedding, Linear
from hf_adaprune.tuner.masked_layers import adaprune_layers


@dataclass
class Saved:
    """A trained adapter on disk, and what it computes."""

    base: Path
    path: Path
    logits: torch.Tensor
    masks: dict[str, torch.Tensor]

    def load_base(self, **options: Any) -> Any:
        return HEADS["sequence"].from_pretrained(self.base, **options)

    def open(self, **options: Any) -> Any:
        return PeftModel.from_pretrained(self.load_base(), self.path, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    folder = tmp_path_factory.mktemp("saved")
    model = get_peft_model(HEADS["sequence"].from_pretrained(save_model(folder / "base")), AdaPruneConfig())
    train_masks(model)
    model.save_pretrained(folder / "adapter")
    return Saved(folder / "base", folder / "adapter", logits_of(model), masks_of(model))


def layers_of(model: nn.Module, adapter_name: str | None = None) -> list[AdaPruneLayer]:
    return [layer for _, layer in adaprune_layers(model, adapter_name)]


def names_of(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    return {name.removeprefix("base_model.model.") for name, _ in adaprune_layers(model, adapter_name)}


def masks_of(model: nn.Module, adapter_name: str = "default") -> dict[str, torch.Tensor]:
    layers = adaprune_layers(model, adapter_name)
    return {name.removeprefix("base_model.model."): layer.mask(adapter_name).clone() for name, layer in layers}


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    return [layer.get_base_layer().weight.detach().clone() for layer in layers_of(model)]


def equal(left: Any, right: Any) -> bool:
    """Compare lists or dictionaries of tensors, bit by bit."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and equal(list(left.values()), [right[key] for key in left])
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def prune_at_random(model: nn.Module, adapter_name: str = "default", seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in layers_of(model, adapter_name):
        layer.set_mask(adapter_name, torch.rand(layer.base_weight.shape, generator=generator) < 0.7)


def two_adapters(**second: Any) -> Any:
    """A model without a head, so that both of its adapters can be active at once."""
    model = get_peft_model(make_model(head="none"), AdaPruneConfig())
    model.add_adapter("second", AdaPruneConfig(**second))
    prune_at_random(model)
    prune_at_random(model, "second", seed=1)
    return model


# Layers


def test_a_model_that_reads_a_layers_weight_computes_with_the_masked_one() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.linear.weight, self.linear.bias)

    torch.manual_seed(0)
    model, x = get_peft_model(Reads(), AdaPruneConfig(target_modules=["linear"])), torch.randn(3, 7)
    prune_at_random(model)
    model(x).square().sum().backward()
    (layer,) = layers_of(model)
    assert layer.adaprune_scores["default"].grad.any()
    with torch.no_grad():
        output = model.eval()(x)
        assert torch.equal(output, model.merge_and_unload()(x))


def test_pytorchs_own_encoder_computes_with_the_masks_in_its_fast_path_too() -> None:
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    model = get_peft_model(encoder, AdaPruneConfig(target_modules=["linear1", "linear2", "out_proj"]))
    prune_at_random(model)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        slow = model.eval()(x, mask=torch.zeros(3, 3))
        torch.testing.assert_close(model(x), slow)
        torch.testing.assert_close(model.merge_and_unload()(x), slow)


def test_a_linear_layer_that_computes_something_else_is_not_masked() -> None:
    class Tripled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(input)

    model = nn.Sequential(nn.Linear(7, 5), Tripled(5, 3))
    assert names_of(get_peft_model(copy.deepcopy(model), AdaPruneConfig())) == {"0"}
    with pytest.raises(NoMatchingModuleError, match=r"matched '1', a Tripled.* without a forward pass of their own"):
        get_peft_model(model, AdaPruneConfig(target_modules=["1"]))


@pytest.mark.parametrize(
    ("base", "cls"),
    [(nn.Linear(7, 5), Linear), (Conv1D(5, 7), Conv1DLinear), (nn.Embedding(7, 5), Embedding)],
    ids=["Linear", "Conv1D", "Embedding"],
)
def test_a_masked_layer_computes_with_its_masked_weight(base: Any, cls: type[AdaPruneLayer]) -> None:
    model = get_peft_model(nn.Sequential(base), AdaPruneConfig(target_modules=["0"]))
    prune_at_random(model)
    layer = layers_of(model)[0]
    assert type(layer) is cls
    assert "forward" in vars(cls)
    assert "Linear" in cls.__name__ or cls is Embedding
    assert (layer.in_features, layer.out_features) == (7, 5)
    assert layer.cast_input_dtype_enabled
    x = torch.arange(6).view(2, 3) if cls is Embedding else torch.randn(2, 3, 7)
    weight = base.weight * layer.mask("default")
    expected = {
        Linear: lambda: F.linear(x, weight, base.bias),
        Conv1DLinear: lambda: F.linear(x.flatten(0, 1), weight.T, base.bias).view(2, 3, 5),
        Embedding: lambda: weight[x],
    }[cls]()
    torch.testing.assert_close(model(x), expected)


def test_a_new_adapter_changes_nothing_until_its_schedule_starts(saved: Saved) -> None:
    base = saved.load_base()
    before = logits_of(base)
    model = get_peft_model(base, AdaPruneConfig())
    assert all(mask.all() for mask in masks_of(model).values())
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9)])
def test_masks_of_any_shape_survive_their_file(shape: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(*shape))
    model = get_peft_model(copy.deepcopy(base), AdaPruneConfig(target_modules=["0"]))
    prune_at_random(model)
    model.save_pretrained(tmp_path)
    (mask,) = load_file(tmp_path / "adapter_model.safetensors").values()
    assert mask.shape == (-(-shape[0] * shape[1] // 8),)
    assert equal(masks_of(PeftModel.from_pretrained(base, tmp_path)), masks_of(model))


def test_a_scaled_embedding_stays_scaled() -> None:
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma3_text", **size, **heads, pad_token_id=0, tie_word_embeddings=False)
    base = HEADS["causal_lm"].from_config(config)
    before = logits_of(base, "causal_lm")
    model = get_peft_model(base, AdaPruneConfig(mask_embeddings=True))
    assert type(model.get_input_embeddings()) is Embedding
    assert torch.equal(logits_of(model, "causal_lm"), before)
    prune_at_random(model)
    masked = logits_of(model, "causal_lm")
    assert not torch.equal(masked, before)
    assert torch.equal(logits_of(model.merge_and_unload(), "causal_lm"), masked)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mask_takes_the_type_of_its_weight(saved: Saved, dtype: torch.dtype) -> None:
    model = PeftModel.from_pretrained(saved.load_base(dtype=dtype), saved.path)
    assert {layer.effective_weight().dtype for layer in layers_of(model)} == {dtype}
    assert {mask.dtype for layer in layers_of(model) for mask in layer.adaprune_mask.values()} == {torch.uint8}
    assert logits_of(model).dtype == dtype
    torch.testing.assert_close(logits_of(model).float(), saved.logits, atol=0.02, rtol=0.02)


# Adapters side by side


@pytest.mark.parametrize("deleted", ["default", "second"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning")
def test_nothing_of_a_deleted_adapter_is_left(saved: Saved, deleted: str, trained: bool) -> None:
    model = saved.open(is_trainable=trained)
    model.load_adapter(saved.path, "second", is_trainable=trained)
    left = "second" if deleted == "default" else "default"
    model.delete_adapter(deleted)
    for layer in layers_of(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert deleted not in getattr(layer, attribute)
        assert layer.active_adapters == [left]
    assert not [key for key in model.state_dict() if key.endswith(f".{deleted}") or f".{deleted}." in key]
    assert torch.equal(logits_of(model), saved.logits)


def test_an_adapter_is_switched_and_its_head_with_it(saved: Saved) -> None:
    model = saved.open()
    model.add_adapter("second", AdaPruneConfig(final_sparsity=0.3))
    assert torch.equal(logits_of(model), saved.logits)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "second" in name)
    model.set_adapter("second")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if name.endswith(".second") or ".second." in name
    }
    train_masks(model, adapter_name="second")
    second = logits_of(model)
    assert not torch.equal(second, saved.logits)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), saved.logits)
    model.set_adapter("second")
    assert torch.equal(logits_of(model), second)


def test_a_mask_never_requires_a_gradient(saved: Saved) -> None:
    model = saved.open()
    for change in (
        lambda: model.set_adapter("default"),
        lambda: model.base_model.disable_adapter_layers(),
        lambda: model.base_model.enable_adapter_layers(),
        lambda: model.requires_grad_(True),
        lambda: model.set_requires_grad("default", True),
    ):
        change()
        assert not any(mask.requires_grad for layer in layers_of(model) for mask in layer.adaprune_mask.values())


def test_active_masks_multiply() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["default", "second"])
    before, weights = logits_of(model, "none"), weights_of(model)
    products = [
        weight * layer.mask("default") * layer.mask("second")
        for weight, layer in zip(weights, layers_of(model), strict=True)
    ]
    with torch.no_grad():
        assert equal([layer.effective_weight() for layer in layers_of(model)], products)
    assert equal([layer.effective_weight().detach() for layer in layers_of(model)], products)
    model.merge_adapter()
    assert equal(weights_of(model), products)
    assert torch.equal(logits_of(model, "none"), before)
    model.unmerge_adapter()
    assert equal(weights_of(model), weights)
    assert torch.equal(logits_of(model, "none"), before)


def test_each_of_several_active_masks_is_trained() -> None:
    model = two_adapters().train()
    model.base_model.set_adapter(["default", "second"])
    layer = layers_of(model)[0]
    weight, grad = layer.base_weight, torch.randn(layer.base_weight.shape)
    layer.effective_weight().backward(grad)
    first, second = (layer.adaprune_scores[name].grad for name in ("default", "second"))
    assert torch.equal(first, grad * layer.mask("second") * weight)
    assert torch.equal(second, grad * weight * layer.mask("default"))


def test_without_an_active_adapter_the_base_model_is_left() -> None:
    base = logits_of(make_model(head="none"), "none")
    model = two_adapters()
    model.base_model.set_adapter([])
    assert torch.equal(logits_of(model, "none"), base)
    model.merge_adapter()
    assert torch.equal(logits_of(model, "none"), base)
    assert not any(layer.merged for layer in layers_of(model))


# As for every method of PEFT: a layer without the adapter has nothing to unmerge, and says so.
@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_an_active_adapter_may_be_missing_from_a_layer() -> None:
    base = logits_of(make_model(head="none"), "none")
    model = two_adapters(target_modules=["query"])
    assert len(layers_of(model, "second")) == 2
    model.set_adapter("second")
    before, weights = logits_of(model, "none"), weights_of(model)
    assert not torch.equal(before, base)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits_of(model, "none"), before)
    model.unmerge_adapter()
    assert equal(weights_of(model), weights)
    train_masks(model, head="none", adapter_name="second")
    assert sparsity_report(model, "second").num_pruned == 32 * 32


@pytest.mark.filterwarnings("ignore:Already unmerged:UserWarning")
def test_a_model_without_its_adapter_computes_as_its_base(saved: Saved) -> None:
    before = logits_of(saved.load_base())
    model = saved.open()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), saved.logits)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits_of(model), before)
    assert torch.equal(logits_of(model), saved.logits)

    plain = saved.load_base()
    plain.load_adapter(saved.path)
    plain.disable_adapters()
    assert torch.equal(logits_of(plain), before)


# Merging


def test_merging_and_unmerging_change_no_bit(saved: Saved) -> None:
    model = saved.open()
    before = weights_of(model)
    model.merge_adapter(safe_merge=True)
    assert torch.equal(logits_of(model), saved.logits)
    masked = [weight * layer.mask("default") for weight, layer in zip(before, layers_of(model), strict=True)]
    assert equal(weights_of(model), masked)
    model.unmerge_adapter()
    assert equal(weights_of(model), before)
    assert torch.equal(logits_of(model), saved.logits)


def test_replicas_of_data_parallel_compute_what_the_model_does(saved: Saved, replicate: Any) -> None:
    with torch.no_grad():
        for replica in replicate(saved.open().eval(), [0, 1]):
            assert torch.equal(logits_of(replica), saved.logits)


def test_unmerging_gives_the_weights_back_after_a_cast(saved: Saved) -> None:
    model = saved.open()
    before = [weight.bfloat16() for weight in weights_of(model)]
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert equal(weights_of(model), before)


def test_no_adapter_is_put_on_a_base_that_another_is_merged_into(saved: Saved) -> None:
    model = saved.open()
    model.merge_adapter()
    with pytest.raises(MergeError, match="call `unmerge_adapter\\(\\)` first"):
        model.add_adapter("second", AdaPruneConfig())
    assert set(model.peft_config) == {"default"}
    model.unmerge_adapter()
    model.add_adapter("second", AdaPruneConfig())


def test_merging_an_adapter_by_name_takes_its_head_along(saved: Saved) -> None:
    model = saved.open()
    model.add_adapter("second", AdaPruneConfig(final_sparsity=0.8))
    model.set_adapter("second")
    train_masks(model, adapter_name="second", learning_rate=1e-2)
    logits = logits_of(model)
    model.set_adapter("default")
    assert torch.equal(logits_of(model.merge_and_unload(adapter_names=["second"])), logits)


@pytest.mark.filterwarnings("ignore:(You are trying to modify|Already found)")
def test_a_model_that_is_wrapped_again_starts_with_all_weights() -> None:
    base = make_model()
    train_masks(get_peft_model(base, AdaPruneConfig()))
    model = get_peft_model(base, AdaPruneConfig())
    assert all(mask.all() for mask in masks_of(model).values())
    train_masks(model)
    fresh = get_peft_model(make_model(), AdaPruneConfig())
    train_masks(fresh)
    # But for the head, which goes on from where it was.
    assert sum(int((mask ^ masks_of(fresh)[name]).sum()) for name, mask in masks_of(model).items()) < 50


def test_merging_twice_and_unmerging_twice_warn_as_in_peft(saved: Saved) -> None:
    layer = layers_of(saved.open())[0]
    layer.merge()
    with pytest.warns(UserWarning, match="already merged"):
        layer.merge()
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_masks_beneath_a_lora_are_not_merged(saved: Saved) -> None:
    model = saved.open()
    model.base_model.model.add_adapter(LoraConfig(target_modules=["query"], init_lora_weights=False), "lora")
    weights = weights_of(model)
    with pytest.raises(MergeError, match="layers of another method around the masked ones"):
        model.merge_adapter()
    assert equal(weights_of(model), weights)


def test_masks_in_training_outlive_a_file_of_another_size() -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig())
    layer = layers_of(model)[0]
    state = layer.state_dict()
    train_masks(model)
    before = layer.mask("default").clone()
    state["adaprune_mask.default"] = state["adaprune_mask.default"][:-1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict(state)
    assert torch.equal(layer.mask("default"), before)


def test_a_safe_merge_refuses_nan(saved: Saved) -> None:
    model = saved.open()
    with torch.no_grad():
        layers_of(model)[0].base_weight[0, 0] = torch.nan
    with pytest.raises(MergeError, match="The base has weights that are NaN"):
        model.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize("use", ["forward", "merge"])
def test_a_damaged_adapter_is_found_out_at_its_first_use(saved: Saved, use: str, tmp_path: Path) -> None:
    shutil.copytree(saved.path, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "adapter_model.safetensors")
    next(tensor for key, tensor in state.items() if key.endswith("mask"))[0] ^= 1
    save_file(state, tmp_path / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(saved.load_base(), tmp_path)
    with pytest.raises(AdapterFileError, match="not those that were saved"):
        model(**make_batch()) if use == "forward" else model.merge_and_unload()


def test_unloading_gives_the_bodys_weights_back(saved: Saved) -> None:
    base = saved.load_base()
    plain = saved.open().unload()
    assert not any(isinstance(module, AdaPruneLayer) for module in plain.modules())
    assert plain.state_dict().keys() == base.state_dict().keys()
    body = base.bert.encoder.state_dict()
    assert equal(dict(plain.bert.encoder.state_dict()), dict(body))


# Loading


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_loads_without_memory_for_its_initial_values(saved: Saved, trainable: bool) -> None:
    model = saved.open(low_cpu_mem_usage=True, is_trainable=trainable)
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    assert torch.equal(logits_of(model), saved.logits)
    if trainable:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
        model.to("cpu")
        Pruner(model, total_steps=2)
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert trained >= {id(layer.adaprune_scores["default"]) for layer in layers_of(model)}
        train_masks(model)


def test_the_papers_head_loads_without_memory_for_its_initial_values(saved: Saved, tmp_path: Path) -> None:
    model = get_peft_model(saved.load_base(), AdaPruneConfig(head="layer_average"))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(saved.load_base(), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_saved_mask_loads_into_a_layer_in_training(saved: Saved) -> None:
    model = get_peft_model(saved.load_base(), AdaPruneConfig())
    state = load_file(saved.path / "adapter_model.safetensors")
    result = set_peft_model_state_dict(model, state)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "adaprune_" in key or "modules_to_save" in key]
    assert equal(masks_of(model), saved.masks)
    assert torch.equal(logits_of(model), saved.logits)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_state_dict_alone_says_what_is_masked(low_cpu_mem_usage: bool) -> None:
    targets = ["query", "0.output.dense"]
    source = inject_adapter_in_model(AdaPruneConfig(target_modules=targets), make_model(head="none"))
    prune_at_random(source)
    state = get_peft_model_state_dict(source)
    assert len(state) == 3
    model = inject_adapter_in_model(
        AdaPruneConfig(inference_mode=True),
        make_model(head="none"),
        low_cpu_mem_usage=low_cpu_mem_usage,
        state_dict=state,
    )
    result = set_peft_model_state_dict(model, state, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.unexpected_keys
    assert equal(masks_of(model), masks_of(source))
    assert torch.equal(logits_of(model, "none"), logits_of(source, "none"))


@pytest.mark.parametrize("door", ["PeftModel", "load_adapter"])
def test_a_loaded_adapter_goes_on_training_from_its_mask(saved: Saved, door: str) -> None:
    model = saved.load_base()
    if door == "PeftModel":
        model = PeftModel.from_pretrained(model, saved.path, is_trainable=True)
    else:
        model.load_adapter(saved.path, is_trainable=True)
    assert torch.equal(logits_of(model), saved.logits)
    Pruner(model, total_steps=1)
    assert torch.equal(logits_of(model), saved.logits)
    assert all(layer.adaprune_scores["default"].requires_grad for layer in layers_of(model))
    # The scores stand for the mask: where nothing is learned, it comes back.
    train_masks(model, learning_rate=0)
    assert equal(masks_of(model), saved.masks)
    train_masks(model, learning_rate=5e-4)
    assert not equal(masks_of(model), saved.masks)


def test_the_state_of_a_model_in_training_is_whole(saved: Saved) -> None:
    model = get_peft_model(saved.load_base(), AdaPruneConfig())
    train_masks(model)
    state = copy.deepcopy(model.state_dict())
    other = get_peft_model(saved.load_base(), AdaPruneConfig())
    result = other.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert equal(dict(other.state_dict()), dict(state))
    assert torch.equal(logits_of(other), logits_of(model))


def test_a_state_of_training_loads_into_an_adapter_that_was_opened_to_go_on(saved: Saved) -> None:
    model = saved.open(is_trainable=True)
    train_masks(model, steps=6, learning_rate=5e-4)
    other = saved.open(is_trainable=True)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(other), logits_of(model))


def test_an_adapter_may_take_the_name_of_one_that_was_deleted(saved: Saved) -> None:
    model = saved.load_base()
    before = logits_of(model)
    model.load_adapter(saved.path, adapter_name="a")
    model.delete_adapter("a")
    model.add_adapter(AdaPruneConfig(), "a")
    assert torch.equal(logits_of(model), before)


def test_labels_of_the_adapter_win_over_those_of_the_base(saved: Saved) -> None:
    for low_cpu_mem_usage in (False, True):
        base = saved.load_base(num_labels=7, ignore_mismatched_sizes=True)
        model = PeftModel.from_pretrained(base, saved.path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert model.config.num_labels == 3
        assert torch.equal(logits_of(model), saved.logits)


def test_a_configuration_is_used_again(saved: Saved, tmp_path: Path) -> None:
    config = AdaPruneConfig()
    fresh = copy.deepcopy(config)
    for seed in (0, 1):
        model = get_peft_model(make_model(seed=seed), config)
        train_masks(model)
        model.save_pretrained(tmp_path)
    get_peft_model(make_model("distilbert"), config)
    assert config.to_dict() == {**fresh.to_dict(), "base_model_name_or_path": config.base_model_name_or_path}


# What is masked


@pytest.mark.parametrize("targets", [None, "all-linear", ["query", "value"], r".*\.1\..*(query|key)"])
@pytest.mark.parametrize("head", ["sequence", "token", "question", "masked_lm", "none"])
def test_targets_match_the_body_and_never_the_head(targets: Any, head: str) -> None:
    matrices = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "layer.{}.output.dense"]
    wanted = [(layer, matrix) for layer in range(2) for matrix in matrices]
    if isinstance(targets, list):
        wanted = [(layer, matrix) for layer, matrix in wanted if matrix in targets]
    elif targets not in (None, "all-linear"):
        wanted = [(1, "query"), (1, "key")]
    model = get_peft_model(make_model(head=head), AdaPruneConfig(target_modules=targets))
    names = names_of(model)
    assert len(names) == len(wanted)
    for layer, matrix in wanted:
        assert [name for name in names if f".{layer}." in name and name.endswith(matrix.format(layer))]
    train_masks(model, head=head, steps=2)


def test_all_linear_finds_layers_that_have_an_adapter_already() -> None:
    model = get_peft_model(make_model(head="token"), AdaPruneConfig(target_modules=["query"]))
    model.add_adapter("second", AdaPruneConfig(target_modules="all-linear"))
    model.add_adapter("third", AdaPruneConfig())
    assert len(names_of(model, "second")) == 12
    assert names_of(model, "third") == names_of(model, "second")


def test_a_wrong_name_among_right_ones_is_refused_and_listed() -> None:
    message = r"target_modules=\['qurey', 'vlaue'\].*'dense', 'key', 'query', 'value'"
    with pytest.raises(NoMatchingModuleError, match=message):
        get_peft_model(make_model(), AdaPruneConfig(target_modules=["key", "vlaue", "qurey"]))


def test_a_module_that_cannot_be_masked_is_refused_by_name() -> None:
    model = make_model()
    with pytest.raises(NoMatchingModuleError, match=r"^`target_modules` matched 'bert.*LayerNorm', a LayerNorm"):
        get_peft_model(model, AdaPruneConfig(target_modules=["query", "output.LayerNorm"]))


@pytest.mark.parametrize("excluded", [["query", "0.output.dense"], r".*(query|layer\.0\.output\.dense)"])
def test_excluded_modules_are_spared(excluded: Any) -> None:
    names = names_of(get_peft_model(make_model(), AdaPruneConfig(exclude_modules=excluded)))
    assert len(names) == 9
    assert not [name for name in names if name.endswith("query") or name.endswith("layer.0.output.dense")]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"exclude_modules": ["key", "qurey"]}, r"`exclude_modules=\['qurey'\]`. Close matches: .*'query'"),
        ({"exclude_modules": r".*\.qurey"}, r"`exclude_modules=\['.*qurey'\]`"),
        ({"modules_to_save": ["LayerNom"]}, r"`modules_to_save=\['LayerNom'\]`. Close matches: .*'LayerNorm'"),
        ({"modules_to_save": ["zzz"]}, r"`modules_to_save=\['zzz'\]`. Give names of modules, or their endings"),
    ],
    ids=str,
)
def test_a_wrong_name_of_a_module_to_spare_or_to_save_is_refused(options: dict[str, Any], said: str) -> None:
    model = make_model()
    before = {name for name, _ in model.named_modules()}
    with pytest.raises(NoMatchingModuleError, match=said):
        get_peft_model(model, AdaPruneConfig(**options))
    assert {name for name, _ in model.named_modules()} == before
    get_peft_model(model, AdaPruneConfig(exclude_modules=["key"], modules_to_save=["embeddings.LayerNorm"]))


def test_excluding_everything_is_refused() -> None:
    with pytest.raises(NoMatchingModuleError, match="All modules were excluded"):
        get_peft_model(make_model(), AdaPruneConfig(exclude_modules=".*"))


@pytest.mark.parametrize(("layers", "found"), [(0, {"0"}), ([0], {"0"}), ([1], {"1"}), ([0, 1], {"0", "1"})])
@pytest.mark.parametrize("pattern", [None, "layer"])
def test_layers_are_chosen_by_number(layers: Any, found: set[str], pattern: str | None) -> None:
    config = AdaPruneConfig(target_modules=["query"], layers_to_transform=layers, layers_pattern=pattern)
    names = names_of(get_peft_model(make_model(), config))
    assert {name.split(".")[3] for name in names} == found
    assert all(name.endswith("query") for name in names)


def test_a_layer_that_is_not_there_is_refused_in_pefts_words() -> None:
    with pytest.raises(NoMatchingModuleError, match=r"You specified 'layers_to_transform': \[7\]"):
        get_peft_model(make_model(), AdaPruneConfig(target_modules=["query"], layers_to_transform=[7]))


def test_more_modules_are_trained_and_saved_when_asked_for(saved: Saved, tmp_path: Path) -> None:
    model = get_peft_model(saved.load_base(), AdaPruneConfig(modules_to_save=["embeddings.LayerNorm"]))
    train_masks(model)
    trained = model.get_base_model().bert.embeddings.LayerNorm
    assert not torch.equal(trained.modules_to_save["default"].weight, trained.original_module.weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(PeftModel.from_pretrained(saved.load_base(), tmp_path)), logits_of(model))
    assert torch.equal(logits_of(HEADS["sequence"].from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize(
    ("head", "task_type"),
    [("sequence", "SEQ_CLS"), ("token", "TOKEN_CLS"), ("question", "QUESTION_ANS"), ("none", "FEATURE_EXTRACTION")],
)
def test_a_task_type_that_is_given_changes_nothing(head: str, task_type: str, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head=head)
    model = get_peft_model(HEADS[head].from_pretrained(base), AdaPruneConfig(task_type=task_type))
    assert names_of(model) == names_of(get_peft_model(make_model(head=head), AdaPruneConfig()))
    train_masks(model, head=head)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(HEADS[head].from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded, head), logits_of(model, head))


class Awkward(nn.Module):
    """Modules whose names contain the prefix that PEFT knows the method by."""

    def __init__(self) -> None:
        super().__init__()
        self.adaprune_block = nn.ModuleDict({"lin": nn.Linear(9, 9), "norm": nn.LayerNorm(9)})
        self.lin = nn.Linear(9, 9)
        self.adaprune_head = nn.Linear(9, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.adaprune_block["norm"](torch.tanh(self.adaprune_block["lin"](x)))
        return self.adaprune_head(torch.tanh(self.lin(x)))


def test_a_base_module_may_carry_the_methods_prefix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = Awkward(), torch.randn(3, 9)
    before = base(x)
    config = AdaPruneConfig(target_modules=["lin"], modules_to_save=["adaprune_head"])
    model = get_peft_model(copy.deepcopy(base), config)
    assert names_of(model) == {"adaprune_block.lin", "lin"}
    assert {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad} == {
        "adaprune_block.lin.adaprune_scores.default",
        "lin.adaprune_scores.default",
        "adaprune_head.modules_to_save.default.weight",
        "adaprune_head.modules_to_save.default.bias",
    }
    prune_at_random(model)
    model.save_pretrained(tmp_path)
    assert {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter_model.safetensors")} == {
        "adaprune_block.lin.adaprune_mask",
        "lin.adaprune_mask",
        "adaprune_head.weight",
        "adaprune_head.bias",
    }
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(loaded(x), model(x))
    loaded.load_adapter(tmp_path, "second")
    loaded.delete_adapter("second")
    assert not [key for key in loaded.state_dict() if "second" in key]
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), before)


# What is told and stored


def test_the_status_of_an_adapter_in_training_is_true() -> None:
    model = two_adapters(target_modules=["query"])
    status = model.get_model_status()
    assert status.peft_types == {"default": "ADAPRUNE", "second": "ADAPRUNE"}
    assert (status.adapter_model_type, status.base_model_type) == ("AdaPruneModel", "BertModel")
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.available_adapters == ["default", "second"]
    assert status.requires_grad == {"default": True, "second": False}
    assert status.devices == {"default": ["cpu"], "second": ["cpu"]}
    assert status.num_adapter_layers == 12
    assert status.trainable_params == sum(layer.base_weight.numel() for layer in layers_of(model))
    for layer in model.get_layer_status():
        assert layer.available_adapters == (["default", "second"] if "query" in layer.name else ["default"])
        assert layer.module_type == "Linear"


def test_the_status_of_a_loaded_adapter_is_true(saved: Saved) -> None:
    model = saved.open()
    status = model.get_model_status()
    assert (status.enabled, status.active_adapters, status.available_adapters) == (True, ["default"], ["default"])
    assert (status.trainable_params, status.devices) == (0, {"default": ["cpu"]})
    assert status.requires_grad["default"] is False
    model.base_model.merge_adapter()
    assert {name for layer in layers_of(model) for name in layer.merged_adapters} == {"default"}
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False


@pytest.mark.parametrize("layers", [2, 3], ids=["few modules", "so many that PEFT shortens their names"])
@pytest.mark.parametrize("head", ["none", "causal_lm"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_masked_embeddings_are_not_saved_whole(head: str, layers: int, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", "llama", head, num_hidden_layers=layers)
    model = get_peft_model(HEADS[head].from_pretrained(base), AdaPruneConfig(mask_embeddings=True))
    model.save_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(state) == 7 * layers + 1
    assert {tensor.dtype for tensor in state.values()} == {torch.uint8}


# Memory and caches


def test_a_loaded_adapter_has_no_scores_and_builds_its_weight_once(saved: Saved) -> None:
    model = saved.open()
    assert not any(layer.adaprune_scores for layer in layers_of(model))
    logits_of(model)
    with torch.no_grad():
        built = [layer.effective_weight() for layer in layers_of(model)]
        logits_of(model)
        assert all(layer.effective_weight() is old for layer, old in zip(layers_of(model), built, strict=True))


def merge(model: Any) -> None:
    model.merge_adapter()


def unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def switch(model: Any) -> None:
    model.add_adapter("second", AdaPruneConfig())
    prune_at_random(model, "second")
    model.set_adapter("second")


def load_weights(model: Any) -> None:
    state = model.state_dict()
    model.load_state_dict({key: 2 * tensor if "base_layer" in key else tensor for key, tensor in state.items()})


def change_in_place(model: Any) -> None:
    with torch.no_grad():
        for layer in layers_of(model):
            layer.base_weight.mul_(3)


def replace_data(model: Any) -> None:
    for layer in layers_of(model):
        layer.get_base_layer().weight.data = layer.base_weight.data * 3


def load_masks(model: Any) -> None:
    state = model.state_dict()
    flipped = {key: tensor ^ 85 if "adaprune_mask" in key else tensor for key, tensor in state.items()}
    model.load_state_dict(flipped)


def set_masks(model: Any) -> None:
    for layer in layers_of(model):
        layer.set_mask("default", ~layer.mask("default"))


def half(model: Any) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change", [merge, unmerge, switch, load_weights, change_in_place, replace_data, load_masks, set_masks, half]
)
def test_a_built_weight_is_built_again_after_a_change(saved: Saved, change: Callable[[Any], None]) -> None:
    model = saved.open()
    logits_of(model)
    change(model)
    for layer in layers_of(model):
        with torch.no_grad():
            masks = [layer.mask(name) for name in layer.active_adapters if not layer.merged]
            assert torch.equal(
                layer.effective_weight(), torch.stack([layer.base_weight, *masks]).prod(0).to(layer.base_weight)
            )
            assert layer.effective_weight().dtype == layer.base_weight.dtype


@torch.no_grad()
def test_a_built_weight_waits_while_adapters_are_disabled(saved: Saved) -> None:
    model = saved.open()
    logits = logits_of(model)
    with model.disable_adapter():
        assert all(layer.effective_weight() is layer.get_base_layer().weight for layer in layers_of(model))
        assert not torch.equal(logits_of(model), logits)
    assert torch.equal(logits_of(model), logits)


@pytest.mark.parametrize("trainable", [False, True])
def test_training_follows_on_inference_mode(saved: Saved, trainable: bool) -> None:
    model = saved.open(is_trainable=trainable)
    with torch.inference_mode():
        model(**make_batch())
    if trainable:
        train_masks(model)
    else:
        model.get_base_model().classifier.requires_grad_(True)
        model.get_base_model().bert.embeddings.requires_grad_(True)
        model(**make_batch()).loss.backward()
        assert model.get_input_embeddings().weight.grad.any()


def test_a_base_weight_that_is_trained_gets_its_gradient_through_a_loaded_mask(saved: Saved) -> None:
    model = saved.open()
    logits_of(model)
    model.requires_grad_(True)
    model(**make_batch()).loss.backward()
    for layer in layers_of(model):
        assert layer.base_weight.grad is not None
        assert layer.base_weight.grad.any()
        assert not layer.base_weight.grad[~layer.mask("default")].any()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_a_copy_of_a_model_is_its_own(saved: Saved, trainable: bool, used: bool) -> None:
    model = saved.open(is_trainable=trainable)
    if used:
        logits_of(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), saved.logits)
    prune_at_random(twin)
    assert not torch.equal(logits_of(twin), saved.logits)
    assert torch.equal(logits_of(model), saved.logits)


def test_a_copy_of_a_model_with_the_papers_head_is_its_own() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(head="layer_average"))
    before = logits_of(model)
    twin = copy.deepcopy(model)
    prune_at_random(twin)
    assert not torch.equal(logits_of(twin), before)
    assert torch.equal(logits_of(model), before)


# Training


def test_the_papers_head_keeps_hidden_states_to_itself() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(head="layer_average"))
    assert set(model(**make_batch())) == {"loss", "logits"}
    assert len(model(**make_batch(), output_hidden_states=True).hidden_states) == 3


def test_the_papers_head_keeps_threads_apart() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(head="layer_average")).eval()
    batches = [make_batch(seed=seed, size=1 + seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]

    def compute(number: int) -> bool:
        with torch.no_grad():
            found = [model(**batches[number % 4]).logits for _ in range(20)]
        return all(torch.equal(logits, expected[number % 4]) for logits in found)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(compute, range(8)))


def test_a_step_under_autocast_trains_every_mask() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig()).train()
    prune_at_random(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**make_batch())
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    for layer in layers_of(model):
        grad = layer.adaprune_scores["default"].grad
        assert grad.dtype == torch.float32
        assert grad.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("enabled", ["before", "after"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool, enabled: str) -> None:
    gradients = []
    for when in ("never", enabled):
        base = make_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        kwargs = {"use_reentrant": use_reentrant}
        if when == "before":
            base.gradient_checkpointing_enable(kwargs)
        model = get_peft_model(base, AdaPruneConfig()).train()
        if when == "after":
            model.gradient_checkpointing_enable(kwargs)
        prune_at_random(model)
        model(**make_batch()).loss.backward()
        gradients.append([layer.adaprune_scores["default"].grad for layer in layers_of(model)])
    assert equal(*gradients)


def test_masked_tied_embeddings_refuse_to_merge_and_name_what_shares_them() -> None:
    model = get_peft_model(make_model(head="masked_lm"), AdaPruneConfig(mask_embeddings=True))
    with pytest.raises(MergeError, match=r"word_embeddings.*shares its weight with .*decoder\.weight"):
        model.merge_and_unload()


def test_a_merge_that_is_refused_changes_nothing_and_masks_that_wait_refuse_none() -> None:
    model = get_peft_model(make_model(head="masked_lm"), AdaPruneConfig(granularity="neuron"), "neurons")
    model.add_adapter("tokens", AdaPruneConfig(mask_embeddings=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Pruner(model, 1, "neurons").prune_to(0.5)
    model.base_model.set_adapter(["neurons", "tokens"])
    with pytest.raises(MergeError, match="shares its weight with"):
        model.merge_and_unload()
    assert equal(before, {name: model.state_dict()[name] if "_mask" not in name else before[name] for name in before})
    model.set_adapter("neurons")
    logits = logits_of(model, "masked_lm")
    assert torch.allclose(logits_of(model.merge_and_unload(), "masked_lm"), logits, atol=1e-6)


@pytest.mark.parametrize("kind", ["output", "linear"])
def test_a_masked_layer_that_shares_its_weight_is_not_merged(kind: str) -> None:
    model = make_model(head="masked_lm")
    layers = model.bert.encoder.layer
    layers[1].intermediate.dense.weight = layers[0].intermediate.dense.weight
    target = {"output": "predictions.decoder", "linear": "0.intermediate.dense"}[kind]
    tuned = get_peft_model(model, AdaPruneConfig(target_modules=[target]))
    with pytest.raises(MergeError, match="shares its weight with"):
        tuned.merge_adapter()


def test_what_computes_something_else_is_not_taken_for_a_lookup_or_a_product() -> None:
    class Shifted(nn.Embedding):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x + 2)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    patched = nn.Linear(4, 4)
    vars(patched)["forward"] = lambda x: x
    for module in (Shifted(8, 4), nn.Embedding(8, 4, max_norm=1.0), normed, patched):
        with pytest.raises(NoMatchingModuleError, match="can be masked"):
            get_peft_model(nn.Sequential(module), AdaPruneConfig(target_modules=["0"]))


def test_hooks_that_are_called_no_more_are_warned_of() -> None:
    linear = nn.Linear(4, 4)
    linear.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.warns(UserWarning, match="A Linear with hooks is being masked, and its hooks are no longer called"):
        get_peft_model(nn.Sequential(linear), AdaPruneConfig(target_modules=["0"]))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@pytest.mark.filterwarnings("ignore:Adapter third was active which is now deleted:UserWarning")
def test_once_the_active_adapter_is_deleted_all_layers_have_the_same_one(plain: bool) -> None:
    configs = {"first": ["query"], "second": ["key"], "third": None}
    model: Any = make_model()
    for number, (name, targets) in enumerate(configs.items()):
        config = AdaPruneConfig(target_modules=targets)
        if plain:
            model.add_adapter(config, name)
        elif number == 0:
            model = get_peft_model(model, config, name)
        else:
            model.add_adapter(name, config)
    model.set_adapter("third")
    model.delete_adapter("third")
    assert {tuple(layer.active_adapters) for _, layer in adaprune_layers(model)} == {("first",)}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_an_adapter_that_is_added_while_adapters_are_disabled_is_too() -> None:
    model: Any = get_peft_model(make_model(), AdaPruneConfig(target_modules=["query"]), "second")
    model.base_model.disable_adapter_layers()
    model.add_adapter("third", AdaPruneConfig())
    model.base_model.set_adapter("third")
    assert len({layer.disable_adapters for _, layer in adaprune_layers(model)}) == 1


def test_no_adapter_is_saved_as_a_pickle_and_the_former_one_is_not_lost(saved: Saved, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(saved.load_base(), saved.path)
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("adapter_*")}
    prune_at_random(model, seed=1)
    with pytest.raises(ConfigError, match=r"adapter_model.bin is a pickle.*`safe_serialization=True`"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    after = {path.name: path.read_bytes() for path in tmp_path.glob("adapter_*")}
    assert {name: after[name] for name in before} == before
    assert torch.equal(logits_of(PeftModel.from_pretrained(saved.load_base(), tmp_path)), saved.logits)
    model.save_pretrained(tmp_path)
    assert not torch.equal(logits_of(PeftModel.from_pretrained(saved.load_base(), tmp_path)), saved.logits)


def test_merging_an_adapter_that_there_is_not_is_refused() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig())
    train_masks(model)
    with pytest.raises(MergeError, match=r"no adapter \['defualt'\] to merge; it has \['default'\]"):
        model.merge_and_unload(adapter_names=["defualt"])
    assert sparsity_report(model).sparsity > 0


def test_the_task_type_of_an_encoder_and_a_decoder_is_accepted() -> None:
    config = BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2)
    config.decoder_attention_heads, config.encoder_ffn_dim, config.decoder_ffn_dim = 2, 16, 16
    model = get_peft_model(BartForConditionalGeneration(config), AdaPruneConfig(task_type="SEQ_2_SEQ_LM"))
    assert isinstance(model, PeftModelForSeq2SeqLM)
    assert model.generate(input_ids=torch.ones(1, 4, dtype=torch.long), max_new_tokens=2).shape[0] == 1
