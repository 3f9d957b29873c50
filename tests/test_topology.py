"""Overlap, degrees, heads, spectra, magnitude and recovery, against naive references and closed forms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from doors import load_base, make_trainer
from peft import LoraConfig, PeftConfig, get_peft_model
from sklearn.metrics import cohen_kappa_score, jaccard_score
from tiny import logits_of, make_model, train_masks
from transformers import T5Config

from hf_adaprune import AdaPruneCallback, AdaPruneConfig, compact
from hf_adaprune.analysis import (
    Recovery,
    RecoveryCallback,
    SparsityReport,
    attention_heads,
    load_masks,
    magnitude_masks,
    mask_overlap,
    mask_spectrum,
    model_masks,
    model_weights,
    neuron_degrees,
    pairwise_overlap,
    plot_degrees,
    plot_heads,
    plot_overlap,
    plot_sparsity,
    plot_spectrum,
    sparsity_report,
)
from hf_adaprune.analysis.names import layer_of
from hf_adaprune.masks import pack_mask
from hf_adaprune.tuner.masked_layers import adaprune_layers


QUERY, DENSE = "encoder.layer.{}.attention.self.query", "encoder.layer.{}.output.dense"


def random_masks(seed: int, sparsity: float = 0.5, shape: tuple[int, int] = (30, 20)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [name.format(layer) for layer in (0, 1) for name in (QUERY, DENSE)]
    return {name: torch.rand(shape, generator=generator) >= sparsity for name in names}


def flat(masks: dict[str, torch.Tensor]) -> Any:
    return torch.cat([mask.flatten() for mask in masks.values()]).numpy()


def texts(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


# --- overlap


@pytest.mark.parametrize("sparsities", [(0.5, 0.5), (0.2, 0.9)])
def test_overlap_is_what_scikit_learn_computes(sparsities: tuple[float, float]) -> None:
    first, second = random_masks(0, sparsities[0]), random_masks(1, sparsities[1])
    report = mask_overlap(first, second)
    assert report.whole.kappa == pytest.approx(cohen_kappa_score(flat(first), flat(second)))
    assert report.whole.jaccard == pytest.approx(jaccard_score(flat(first), flat(second)))
    assert report.whole.agreement == pytest.approx((flat(first) == flat(second)).mean())
    for module in report.modules:
        a, b = first[module.name].flatten().numpy(), second[module.name].flatten().numpy()
        assert module.kappa == pytest.approx(cohen_kappa_score(a, b))
        assert module.jaccard == pytest.approx(jaccard_score(a, b))


def test_independent_masks_overlap_as_much_as_by_chance() -> None:
    wholes = [mask_overlap(random_masks(seed, 0.3), random_masks(seed + 100, 0.8)).whole for seed in range(40)]
    assert np.mean([whole.kappa for whole in wholes]) == pytest.approx(0, abs=0.01)
    measured, expected = (
        np.mean([getattr(whole, name) for whole in wholes]) for name in ("jaccard", "chance_jaccard")
    )
    assert measured == pytest.approx(expected, abs=0.003)
    # By hand: kept by both .7 x .2, by either .7 + .2 - .14.
    assert expected == pytest.approx(0.14 / 0.76, abs=0.005)


def test_overlap_is_summed_by_layer_and_by_component() -> None:
    report = mask_overlap(random_masks(0), random_masks(1))
    assert list(report.by_layer()) == ["0", "1"]
    assert list(report.by_component()) == ["attention.self.query", "output.dense"]
    parts = report.by_layer()["1"], report.modules[2], report.modules[3]
    assert parts[0].num_both == parts[1].num_both + parts[2].num_both
    assert parts[0].num_weights == 1200


def test_masks_that_keep_all_or_nothing_have_no_kappa_but_no_error_either() -> None:
    ones = {name: torch.ones_like(mask) for name, mask in random_masks(0).items()}
    zeros = {name: ~mask for name, mask in ones.items()}
    assert np.isnan(mask_overlap(ones, ones).whole.kappa)
    assert np.isnan(mask_overlap(zeros, zeros).whole.jaccard)
    assert mask_overlap(ones, zeros).whole.agreement == 0


def test_adapters_over_other_weights_are_not_compared() -> None:
    first, second = random_masks(0), random_masks(1)
    del second[QUERY.format(1)]
    second[DENSE.format(0)] = second[DENSE.format(0)][:5]
    with pytest.raises(ValueError, match=r"differ in \['encoder.layer.0.output.dense', 'encoder.layer.1.attention"):
        mask_overlap(first, second)
    with pytest.raises(ValueError, match="at least two adapters, got 1"):
        pairwise_overlap({"a": first})


def test_the_picture_of_overlaps_shows_each_pair_once_with_its_chance_level() -> None:
    adapters = {"a": random_masks(0), "b": random_masks(1, 0.8), "c": random_masks(0)}
    pairs = pairwise_overlap(adapters)
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert texts(plot_overlap(pairs))[1] == "1.00"
    whole = pairs["a", "b"].whole
    assert texts(plot_overlap(pairs, "jaccard"))[0] == f"{whole.jaccard:.2f}\n({whole.chance_jaccard:.2f})"
    with pytest.raises(ValueError, match="`measure` must be 'kappa', 'jaccard' or 'agreement', got 'dice'"):
        plot_overlap(pairs, "dice")


def test_the_layers_of_two_stacks_are_told_apart() -> None:
    names = ["encoder.layers.0.self_attn.v_proj", "decoder.layers.0.self_attn.v_proj", "bert.encoder.layer.0.output"]
    assert [layer_of(name) for name in names] == ["0", "decoder 0", "0"]
    masks = {
        f"{stack}.block.0.layer.{place}.{kind}.{part}": torch.ones(4, 4, dtype=torch.bool)
        for stack, place, kind in (
            ("encoder", 0, "SelfAttention"),
            ("decoder", 0, "SelfAttention"),
            ("decoder", 1, "EncDecAttention"),
        )
        for part in "qkvo"
    }
    found = attention_heads(masks, T5Config(num_heads=2))
    assert [heads.layer for heads in found] == ["0", "decoder 0", "decoder 0 (cross)"]
    assert {tuple(heads.kept) for heads in found} == {("query", "key", "value", "output")}


def test_the_heads_of_a_smaller_model_are_those_that_it_has() -> None:
    model: Any = make_model(num_attention_heads=4)
    model.add_adapter(AdaPruneConfig(granularity="head", inference_mode=True))
    for _, layer in adaprune_layers(model):
        layer.adaprune_mask["default"].copy_(pack_mask(torch.tensor([True, False, False, True])))
    small: Any = compact(model)
    small.add_adapter(AdaPruneConfig(inference_mode=True))
    masks = model_masks(small)
    for name, mask in masks.items():
        if name.endswith(("query", "key", "value")):
            mask[:8] = False
    assert [heads.share_kept.round(2).tolist()[0] for heads in attention_heads(masks, small.config)] == [0.25, 0.25]
    assert {len(heads.share_kept) for heads in attention_heads(masks, small.config)} == {2}


# --- neurons


def test_degrees_count_rows_and_columns_and_find_the_dead() -> None:
    mask = random_masks(0)[QUERY.format(0)]
    mask[[3, 7]], mask[:, 5] = False, False
    found = neuron_degrees({"m": mask})["m"]
    assert found.in_degrees.tolist() == [sum(row) for row in mask.tolist()]
    assert found.out_degrees.tolist() == [sum(column) for column in mask.T.tolist()]
    assert found.dead_outputs.tolist() == [3, 7]
    assert found.dead_inputs.tolist() == [5]
    assert found.density == pytest.approx(mask.float().mean().item())


def test_random_masks_have_the_dispersion_and_the_dead_of_chance() -> None:
    shape = (60, 40)
    found = [neuron_degrees(random_masks(seed, 0.95, shape))[QUERY.format(0)] for seed in range(60)]
    for side in (0, 1):
        assert np.mean([module.dispersion[side] for module in found]) == pytest.approx(1, abs=0.06)
    dead = np.mean([(len(module.dead_outputs), len(module.dead_inputs)) for module in found], axis=0)
    # By hand: 60 x .95^40 and 40 x .95^60.
    assert dead == pytest.approx([7.7, 1.8], abs=0.6)
    assert np.mean([module.chance_dead for module in found], axis=0) == pytest.approx(dead, abs=0.6)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:30] = True
    assert neuron_degrees({"m": mask})["m"].dispersion[0] > 30
    assert np.isnan(neuron_degrees({"m": mask | True})["m"].dispersion[0])


def test_the_picture_of_degrees_has_a_row_for_each_component() -> None:
    figure = plot_degrees(neuron_degrees(random_masks(0)).values())
    assert [axes.get_ylabel() for axes in figure.axes] == ["attention.\nself.\nquery", "", "output.\ndense", ""]
    bars: list[Any] = list(figure.axes[0].patches)
    heights = [bar.get_height() for bar in bars]
    assert sum(heights) == pytest.approx(1)


# --- heads


def prune_head(model: Any, layer: int, head: int, part: str) -> None:
    width = 16
    layers = dict(adaprune_layers(model))
    ending = "attention.output.dense" if part == "output" else f"attention.self.{part}"
    module = layers[f"base_model.model.bert.encoder.layer.{layer}.{ending}"]
    mask = module.mask("default").clone()
    rows = mask.T if part == "output" else mask
    rows[head * width : (head + 1) * width] = False
    module.set_mask("default", mask)


@pytest.mark.parametrize("part", ["value", "output"])
def test_a_dead_head_adds_nothing_that_depends_on_the_input(part: str) -> None:
    # Weights so large that attention is far from uniform.
    model = get_peft_model(make_model(initializer_range=0.5), AdaPruneConfig())
    found = attention_heads(model_masks(model), model.config)
    assert [layer.layer for layer in found] == ["0", "1"]
    assert all(layer.share_kept.tolist() == [1, 1] and not len(layer.dead) for layer in found)
    prune_head(model, layer=1, head=0, part=part)
    found = attention_heads(model_masks(model), model.config)
    assert [layer.dead.tolist() for layer in found] == [[], [0]]
    assert found[1].kept[part].tolist() == [0, 1]
    assert found[1].share_kept.tolist() == [0.75, 1]
    assert not len(found[1].empty)
    # What a dead head attends to makes no difference; what a live one does, does.
    before = logits_of(model)
    prune_head(model, layer=1, head=0, part="query")
    torch.testing.assert_close(logits_of(model), before)
    prune_head(model, layer=1, head=1, part="query")
    assert not torch.allclose(logits_of(model), before, atol=1e-5)


def test_a_head_with_nothing_left_is_empty() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig())
    for part in ("query", "key", "value", "output"):
        prune_head(model, 0, 1, part)
    found = attention_heads(model_masks(model), model.config)
    assert [layer.empty.tolist() for layer in found] == [[1], []]
    assert texts(plot_heads(found)) == ["100", "x", "100", "100"]


@pytest.mark.parametrize("architecture", ["distilbert", "deberta-v2", "mpnet", "albert", "llama"])
def test_heads_are_found_by_the_names_of_other_models(architecture: str) -> None:
    model = get_peft_model(make_model(architecture), AdaPruneConfig())
    found = attention_heads(model_masks(model), model.config)
    assert all(set(layer.kept) == {"query", "key", "value", "output"} for layer in found)
    assert len(found) == (1 if architecture == "albert" else 2)


def test_heads_that_share_keys_and_values_share_what_is_left_of_them() -> None:
    model = get_peft_model(make_model("llama", num_key_value_heads=1), AdaPruneConfig())
    masks = model_masks(model)
    name = next(name for name in masks if name.endswith("v_proj"))
    masks[name] = torch.zeros_like(masks[name])
    assert attention_heads(masks, model.config)[0].dead.tolist() == [0, 1]


def test_heads_of_a_stored_adapter_need_no_model(adapter_path: Path) -> None:
    masks, config = load_masks(adapter_path), PeftConfig.from_pretrained(str(adapter_path))
    found = attention_heads(masks, config)
    query = masks["bert.encoder.layer.0.attention.self.query"]
    assert found[0].kept["query"].tolist() == pytest.approx([float(half.float().mean()) for half in query.split(16)])


def test_matrices_that_hold_query_key_and_value_together_are_refused() -> None:
    model = get_peft_model(make_model("gpt2"), AdaPruneConfig())
    with pytest.raises(ValueError, match=r"No attention matrix was recognised among \['attn.c_attn'"):
        attention_heads(model_masks(model), model.config)


# --- spectrum


def test_the_spectrum_is_that_of_the_masked_matrix_beside_as_sparse_random_ones() -> None:
    generator = torch.Generator().manual_seed(3)
    mask, weight = torch.rand(12, 9, generator=generator) < 0.4, torch.randn(12, 9, generator=generator)
    found = mask_spectrum({"m": mask}, {"m": weight}, num_random=200)["m"]
    np.testing.assert_allclose(found.masked, np.linalg.svd(weight * mask, compute_uv=False), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.dense, np.linalg.svd(weight, compute_uv=False), rtol=1e-4)
    # The sum of squares is that of the weights kept: under random masks, on average, their share.
    kept = mask.float().mean().item()
    energy = (found.random**2).sum(1).mean() / (found.dense**2).sum()
    assert found.random.shape == (200, 9)
    assert energy == pytest.approx(kept, rel=0.03)
    again = mask_spectrum({"m": mask}, {"m": weight}, num_random=200)["m"]
    assert np.array_equal(found.random, again.random)


def test_without_weights_the_masks_themselves_are_looked_at() -> None:
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[:3] = True
    found = mask_spectrum({"m": mask})["m"]
    # A block of ones has one singular value: the root of its size.
    assert found.masked == pytest.approx([24**0.5, 0, 0, 0, 0, 0], abs=1e-5)
    assert found.effective_rank["masked"] == pytest.approx(1, abs=1e-4)
    assert found.effective_rank["random"] > 3
    # Random masks keep as many: the sum of squares of a mask is what it keeps.
    np.testing.assert_allclose((found.random**2).sum(1), 24, rtol=1e-5)


def test_effective_rank_runs_from_nothing_to_the_full_rank() -> None:
    eye = torch.eye(5, dtype=torch.bool)
    assert mask_spectrum({"m": eye})["m"].effective_rank["masked"] == pytest.approx(5)
    assert mask_spectrum({"m": eye & False})["m"].effective_rank["masked"] == 0
    assert len(plot_spectrum(mask_spectrum({"m": eye})["m"]).axes[0].lines) == 3
    with pytest.raises(ValueError, match="`num_random` must be at least 1, got 0"):
        mask_spectrum({"m": eye}, num_random=0)


# --- magnitude


def test_magnitude_masks_keep_as_many_and_the_largest() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig(final_sparsity=0.7))
    train_masks(model, learning_rate=1e-3)
    masks = model_masks(model)
    weights = model_weights(model, masks)
    for name, mask in magnitude_masks(masks, weights).items():
        assert mask.sum() == masks[name].sum()
        assert weights[name][mask].abs().min() >= weights[name][~mask].abs().max()
    whole = magnitude_masks(masks, weights, scope="global")
    everything = torch.cat([weight.flatten() for weight in weights.values()])
    kept = torch.from_numpy(flat(whole))
    assert kept.sum() == sum(mask.sum() for mask in masks.values())
    assert everything[kept].abs().min() >= everything[~kept].abs().max()
    kinds = magnitude_masks(masks, weights, scope="kind")
    names = [name for name in masks if name.endswith("attention.self.query")]
    assert len(names) == 2
    assert sum(kinds[name].sum() for name in names) == sum(masks[name].sum() for name in names)
    kept, gone = (torch.cat([weights[name].abs()[kinds[name] == is_kept] for name in names]) for is_kept in (1, 0))
    assert kept.min() >= gone.max()
    with pytest.raises(ValueError, match=r"`scope` must be one of \['module', 'kind', 'global'\], got 'layer'"):
        magnitude_masks(masks, weights, scope="layer")  # type: ignore[arg-type]


def test_a_mask_that_has_hardly_been_trained_is_nearly_magnitude() -> None:
    agreement = {}
    for rate in (1e-9, 1e-2):
        model = get_peft_model(make_model(), AdaPruneConfig(score_init="magnitude"))
        train_masks(model, learning_rate=rate)
        masks = model_masks(model)
        report = mask_overlap(masks, magnitude_masks(masks, model_weights(model, masks)))
        agreement[rate] = report.whole.agreement
    assert agreement[1e-9] > 0.999
    assert agreement[1e-2] < 0.9


# --- recovery


def test_what_was_pruned_and_is_kept_again_has_recovered() -> None:
    history = [{"m": torch.tensor([[bool(int(bit)) for bit in bits]])} for bits in ("1111", "1001", "0010", "0110")]
    recovery = Recovery.of(history)
    assert recovery.recovered()["m"].tolist() == [[False, True, True, False]]
    assert recovery.share_of_kept == 1
    assert recovery.share_of_pruned == 0.5
    # Of fewer checkpoints less is seen.
    assert Recovery.of(history[::3]).share_of_kept == 0
    assert Recovery.of([]).share_of_kept == 0


def test_a_trainer_that_is_watched_tells_of_every_step(base_path: Path, tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []

    class Watch(RecoveryCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            super().on_step_end(args, state, control, model, **kwargs)
            seen.append(model_masks(model))

    watch = Watch()
    config = AdaPruneConfig(final_sparsity=0.6)
    trainer = make_trainer(
        load_base(base_path), tmp_path, AdaPruneCallback(config), watch, max_steps=12, learning_rate=5e-4
    )
    trainer.train()
    masks = model_masks(trainer.model)
    ever = {name: torch.stack([~step[name] for step in seen]).any(0) for name in masks}
    back = sum(int((masks[name] & ever[name]).sum()) for name in masks)
    assert back > 0
    assert watch.recovery.share_of_kept == back / sum(int(mask.sum()) for mask in masks.values())


# --- sparsity


def test_layers_of_a_stored_adapter_come_in_the_order_of_the_model() -> None:
    # A configuration is stored with its keys sorted: 10 before 2.
    names = sorted(["bert.embeddings.word", *(f"bert.encoder.layer.{layer}.output.dense" for layer in range(12))])
    counts = {name: [1, 16] for name in names}
    report = sparsity_report(AdaPruneConfig(module_counts=counts, num_parameters=1000))
    assert isinstance(report, SparsityReport)
    assert list(report.by_layer()) == ["embeddings", *map(str, range(12))]
    assert [label.get_text() for label in plot_sparsity(report).axes[0].get_xticklabels()] == list(report.by_layer())


def test_pictures_of_layers_of_several_sizes_show_each_as_it_is() -> None:
    masks = {
        f"bert.encoder.layer.{layer}.attention.self.{part}": torch.ones(8 * heads, 32, dtype=torch.bool)
        for layer, heads in enumerate((4, 2))
        for part in ("query", "key", "value")
    }
    config = make_model(num_attention_heads=4).config
    config.compact_heads = {"encoder.layer.1.attention": {"num_heads": 4, "kept": [0, 1]}}
    assert texts(plot_heads(attention_heads(masks, config))) == ["100"] * 6
    masks = {name: mask & (torch.arange(32) % 2 == 0) for name, mask in masks.items()}
    figure = plot_degrees(neuron_degrees(masks))
    titles = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert titles[:2] == ["attention.\nself.\nquery\n32 x 32", "attention.\nself.\nquery\n16 x 32"]
    for axes in figure.axes:
        bars: list[Any] = list(axes.patches)
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)


def test_heads_of_cross_attention_are_not_counted_as_those_beside_it() -> None:
    masks = {
        f"decoder.layer.0.{attention}.self.{part}": torch.ones(8 * heads, 32, dtype=torch.bool)
        for attention, heads in (("attention", 2), ("crossattention", 4))
        for part in ("query", "key", "value")
    }
    config = make_model(num_attention_heads=4).config
    config.compact_heads = {"decoder.layer.0.attention": {"num_heads": 4, "kept": [0, 1]}}
    assert [len(layer.share_kept) for layer in attention_heads(masks, config)] == [2, 4]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
def test_the_masks_of_transposed_layers_are_turned_beneath_a_lora_too() -> None:
    model: Any = make_model("gpt2")
    model.add_adapter(AdaPruneConfig(), "masks")
    shapes = {name: mask.shape for name, mask in model_masks(model).items()}
    model.add_adapter(LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True), "lora")
    model.set_adapter(["masks", "lora"])
    assert {name: mask.shape for name, mask in model_masks(model, "masks").items()} == shapes
