"""The algebra of masks, against a truth table and against what several active masks compute."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import logits_of as classify
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from test_mixed_batch import prune_at_random, randomize_heads
from tiny import HEADS, logits_of, make_model, save_model, train_masks
from torch import nn

from hf_adaprune import AdaPruneConfig, Pruner, combine_adapters, compact, expand, sparsity_report
from hf_adaprune.errors import CombineError, ConfigError
from hf_adaprune.tuner.combine import How
from hf_adaprune.tuner.masked_layers import adaprune_layers


pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")


def headless(*seeds: int) -> Any:
    model = get_peft_model(make_model(head="none"), AdaPruneConfig(), "task 0")
    for number in range(1, len(seeds)):
        model.add_adapter(f"task {number}", AdaPruneConfig())
    for number, seed in enumerate(seeds):
        prune_at_random(model, f"task {number}", seed)
    return model.eval()


def mask_of(model: nn.Module, name: str) -> torch.Tensor:
    return torch.cat([layer.mask(name).flatten() for _, layer in adaprune_layers(model, name)])


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize(
    ("how", "keeps"), [("intersection", all), ("union", any), ("majority", lambda it: sum(it) > len(it) / 2)]
)
def test_each_way_is_its_truth_table(how: Any, keeps: Any, count: int) -> None:
    names = [f"task {number}" for number in range(count)]
    table = list(product([False, True], repeat=count))
    model = get_peft_model(nn.Sequential(nn.Linear(2**count, 1)), AdaPruneConfig(target_modules=["0"]), names[0])
    for name in names[1:]:
        model.add_adapter(name, AdaPruneConfig(target_modules=["0"]))
    for column, name in zip(zip(*table, strict=True), names, strict=True):
        for _, layer in adaprune_layers(model):
            layer.set_mask(name, torch.tensor([column]))
    combine_adapters(model, names, how, "new")
    assert mask_of(model, "new").tolist() == [keeps(row) for row in table]


def test_what_one_prunes_whole_the_intersection_does_too() -> None:
    whole = get_peft_model(make_model(head="none"), AdaPruneConfig(granularity="neuron+head", scope="global"))
    train_masks(whole, head="none")
    model = get_peft_model(compact(whole), AdaPruneConfig())
    train_masks(model, head="none")
    model = expand(model, whole)
    model.add_adapter(AdaPruneConfig(), "weights")
    prune_at_random(model, "weights", 0)
    expected: dict[How, tuple[str, ...]] = {"intersection": ("neuron", "head"), "union": ()}
    for how, kinds in expected.items():
        combine_adapters(model, ["default", "weights"], how, how)
        assert model.peft_config[how].removable_kinds == kinds
    model.set_adapter("intersection")
    small = compact(model)
    torch.testing.assert_close(logits_of(small, "none"), logits_of(model, "none"))


def test_the_intersection_computes_what_several_active_masks_do() -> None:
    model = headless(0, 1, 2)
    names = ["task 0", "task 1", "task 2"]
    model.base_model.set_adapter(names)
    wanted = logits_of(model, "none")
    combine_adapters(model, names, "intersection", "new")
    assert model.base_model.active_adapters == names
    model.set_adapter("new")
    assert torch.equal(logits_of(model, "none"), wanted)


@pytest.mark.parametrize("how", ["intersection", "union", "majority"])
def test_a_module_without_a_mask_counts_as_kept(how: How) -> None:
    model = get_peft_model(make_model(head="none"), AdaPruneConfig(target_modules=["query"]), "task 0")
    model.add_adapter("task 1", AdaPruneConfig(target_modules=["query", "key"], layers_to_transform=[0]))
    for seed in (0, 1):
        prune_at_random(model, f"task {seed}", seed)
    combine_adapters(model, ["task 0", "task 1"], how, "new")
    layers = {name.split("layer.")[1]: layer for name, layer in adaprune_layers(model, "new")}
    assert set(layers) == {"0.attention.self.query", "0.attention.self.key", "1.attention.self.query"}
    key, query = layers["0.attention.self.key"], layers["1.attention.self.query"]
    both = how != "union"
    assert torch.equal(key.mask("new"), key.mask("task 1") if both else torch.ones_like(key.mask("task 1")))
    assert torch.equal(query.mask("new"), query.mask("task 0") if both else torch.ones_like(query.mask("task 0")))


@pytest.mark.parametrize(("first", "second"), [("neuron+head", "neuron+head"), ("neuron", "head"), ("2:4", "weight")])
@pytest.mark.parametrize("how", ["intersection", "union"])
def test_neurons_and_heads_are_combined(first: str, second: str, how: How, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none", num_attention_heads=4)
    model = get_peft_model(HEADS["none"].from_pretrained(base), AdaPruneConfig(granularity=first), "x")
    model.add_adapter("y", AdaPruneConfig(granularity=second))
    for seed, name in enumerate("xy"):
        generator = torch.Generator().manual_seed(seed)
        for _, layer in adaprune_layers(model, name):
            layer.set_mask(name, torch.rand(layer.scored_mask(name).shape, generator=generator) < 0.6)
    combine_adapters(model, ["x", "y"], how, "new")
    assert model.peft_config["new"].granularity == (first if first == second else "weight")
    for _, layer in adaprune_layers(model, "new"):
        masks = [layer.mask(name) if name in layer.adaprune_mask else torch.tensor(True) for name in "xy"]
        wanted = masks[0] & masks[1] if how == "intersection" else masks[0] | masks[1]
        assert torch.equal(layer.mask("new"), wanted.expand(layer.base_weight.shape))
    model.set_adapter("new")
    model.save_pretrained(tmp_path / "saved")
    opened = PeftModel.from_pretrained(HEADS["none"].from_pretrained(base), tmp_path / "saved" / "new")
    assert torch.equal(logits_of(opened, "none"), logits_of(model, "none"))


def with_heads(base: Path, plain: bool) -> Any:
    model = HEADS["sequence"].from_pretrained(base)
    for seed, (name, labels) in enumerate({"x": ("a", "b"), "y": ("c", "d", "e"), "z": ("f", "g")}.items()):
        model.config.id2label, model.config.label2id = dict(enumerate(labels)), {it: n for n, it in enumerate(labels)}
        model.add_adapter(AdaPruneConfig(), name)
        prune_at_random(model, name, seed)
    randomize_heads(model)
    model.set_adapter("y")
    if plain:
        return model
    paths = {}
    for name in "xyz":
        model.set_adapter(name)
        paths[name] = base.parent / name
        model.save_pretrained(paths[name])
    wrapped = PeftModel.from_pretrained(HEADS["sequence"].from_pretrained(base), paths["y"], "y")
    for name in "xz":
        wrapped.load_adapter(paths[name], name)
    return wrapped


@pytest.mark.parametrize("plain", [True, False])
def test_the_combination_gets_the_head_that_is_named_and_is_saved_as_any_other(plain: bool, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none")
    model = with_heads(base, plain)
    before = classify(model)
    combine_adapters(model, ["x", "y"], "union", "new", head="z")
    assert torch.equal(classify(model), before)
    model.set_adapter("new")
    assert model.config.id2label == {0: "f", 1: "g"}
    state = model.state_dict()
    for key, tensor in state.items():
        if ".modules_to_save.new." in key:
            assert torch.equal(tensor, state[key.replace(".new.", ".z.")])
            assert tensor.data_ptr() != state[key.replace(".new.", ".z.")].data_ptr()
    assert torch.equal(mask_of(model, "new"), mask_of(model, "x") | mask_of(model, "y"))
    assert not any(layer.adaprune_scores.get("new") for _, layer in adaprune_layers(model))
    computed = classify(model)
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" if plain else tmp_path / "saved" / "new"
    assert torch.equal(classify(HEADS["sequence"].from_pretrained(folder)), computed)
    assert "union of x, y" in (folder / "README.md").read_text()
    assert sparsity_report(model, "new").sparsity == pytest.approx(0.25, abs=0.02)
    assert len([key for key in load_file(folder / "adapter_model.safetensors") if key.endswith("mask")]) == 12


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    model = with_heads(save_model(tmp_path / "base", head="none"), plain=True)
    cases: list[tuple[tuple[Any, ...], str | None, str]] = [
        ((["x", "w"], "union", "new"), "x", r"no adapter \['w'\]; it has \['x', 'y', 'z'\]"),
        ((["x", "y"], "union", "new"), "w", r"no adapter \['w'\]"),
        ((["x", "x"], "union", "new"), "x", r"at least two adapters, got \['x', 'x'\]"),
        ((["x", "y"], "xor", "new"), "x", r"`how` must be one of \['intersection', 'union', 'majority'\], got 'xor'"),
        ((["x", "y"], "union", "z"), "x", "an adapter 'z' already"),
        ((["x", "y"], "union", "new"), None, r"\['x', 'y'\] have heads: name with `head=`"),
    ]
    for arguments, head, said in cases:
        with pytest.raises(CombineError, match=said):
            combine_adapters(model, *arguments, head=head)
    assert set(model.peft_config) == {"x", "y", "z"}
    empty = headless(0, 1)
    for _, layer in adaprune_layers(empty):
        layer.set_mask("task 1", ~layer.mask("task 0"))
    with pytest.raises(CombineError, match="keeps nothing"):
        combine_adapters(empty, ["task 0", "task 1"], "intersection", "new")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_group_masks_with_little_in_common_have_a_union() -> None:
    model: Any = get_peft_model(make_model(head="none"), AdaPruneConfig(granularity="neuron"), "x")
    model.add_adapter("y", AdaPruneConfig(granularity="neuron"))
    for start, name in enumerate("xy"):
        for number, (_, layer) in enumerate(adaprune_layers(model, name)):
            mask = torch.ones(40, dtype=torch.bool)
            mask[start : start + 2] = number > 0  # one neuron of the first block in common
            layer.set_mask(name, mask)
    combine_adapters(model, ["x", "y"], "union", "both")
    pruned = [int((~layer.scored_mask("both")).sum()) for _, layer in adaprune_layers(model, "both")]
    assert pruned == [1, 0]


def test_a_combination_of_groups_of_two_sizes_tells_how_many_weights_it_prunes(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", head="none", num_attention_heads=4)
    config = AdaPruneConfig(granularity="neuron+head", scope="global")
    model = get_peft_model(HEADS["none"].from_pretrained(base), config, "x")
    model.add_adapter("y", config)
    for name in "xy":
        for _, layer in adaprune_layers(model, name):
            mask = torch.ones_like(layer.scored_mask(name))
            mask[: 1 if len(mask) == 4 else 5] = False
            layer.set_mask(name, mask)
    combine_adapters(model, ["x", "y"], "union", "new")
    actual = sparsity_report(model, "new").sparsity
    assert model.peft_config["new"].final_sparsity == pytest.approx(actual, abs=1e-9)
    model.save_pretrained(tmp_path / "saved", selected_adapters=["x", "new"])
    opened = PeftModel.from_pretrained(
        HEADS["none"].from_pretrained(base), tmp_path / "saved" / "new", is_trainable=True
    )
    Pruner(opened.train(), 2).step()
    assert sparsity_report(opened).sparsity == actual
    with pytest.raises(ConfigError, match="There is an adapter 'new' on the model already"):
        model.load_adapter(tmp_path / "saved" / "x", "new")
