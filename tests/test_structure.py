"""Where neurons and heads are found, and where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny import VOCAB, make_model
from torch import nn
from transformers import AutoConfig, AutoModel, GPTNeoXConfig, GPTNeoXForSequenceClassification

from hf_adaprune import AdaPruneConfig
from hf_adaprune.errors import ConfigError, NoMatchingModuleError, StructureError
from hf_adaprune.tuner.groups import Block
from hf_adaprune.tuner.masked_layers import adaprune_layers
from hf_adaprune.tuner.structure import plan_blocks, verified


# The hidden layers of each kind: who produces them, who reads them.
BLOCKS = {
    "bert": (
        "attention.self.query attention.self.key attention.self.value > attention.output.dense",
        "intermediate.dense > output.dense",
    ),
    "distilbert": ("attention.q_lin attention.k_lin attention.v_lin > attention.out_lin", "ffn.lin1 > ffn.lin2"),
    "mpnet": (
        "attention.attn.q attention.attn.k attention.attn.v > attention.attn.o",
        "intermediate.dense > output.dense",
    ),
    "modernbert": ("attn.Wqkv > attn.Wo", "mlp.Wi > mlp.Wo"),
    "albert": ("attention.query attention.key attention.value > attention.dense", "ffn > ffn_output"),
    "gpt2": ("attn.c_attn > attn.c_proj", "mlp.c_fc > mlp.c_proj"),
    "llama": (
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj > self_attn.o_proj",
        "mlp.gate_proj mlp.up_proj > mlp.down_proj",
    ),
}
BLOCKS |= {"roberta": BLOCKS["bert"], "electra": BLOCKS["bert"]}


def blocks_of(model: Any, granularity: str, **options: Any) -> dict[str, Any]:
    masked = get_peft_model(model, AdaPruneConfig(granularity=granularity, **options))
    groups = [layer.groups("default") for _, layer in adaprune_layers(masked)]
    return {group.block.consumer: group.block for group in groups if group is not None}


@pytest.mark.parametrize("architecture", BLOCKS)
def test_heads_and_neurons_are_found_in_every_layer(architecture: str) -> None:
    blocks = blocks_of(make_model(architecture), "neuron+head")
    found = {}
    for consumer, block in blocks.items():
        layer = consumer[
            : consumer.rindex(
                next(b.split(" > ")[1] for b in BLOCKS[architecture] if consumer.endswith(b.split(" > ")[1]))
            )
        ]
        found[layer, block.kind] = " > ".join(
            [" ".join(n.removeprefix(layer) for n in block.producers), consumer.removeprefix(layer)]
        )
    num_layers = 1 if architecture == "albert" else 2
    head, neuron = BLOCKS[architecture]
    assert sorted(found.values()) == sorted([head, neuron] * num_layers)
    hidden = {"gpt2": 128}.get(architecture, 40)
    assert {(block.kind, block.num_groups, block.width) for block in blocks.values()} == {
        ("head", 2, 16),
        ("neuron", hidden, 1),
    }


def test_a_feed_forward_as_wide_as_the_model_is_not_taken_for_attention() -> None:
    blocks = blocks_of(make_model("bert", intermediate_size=32), "neuron+head")
    assert sorted(block.kind for block in blocks.values()) == ["head", "head", "neuron", "neuron"]
    assert blocks["bert.encoder.layer.0.output.dense"].kind == "neuron"


def test_finding_them_leaves_the_model_as_it_was() -> None:
    model = make_model().train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    config = AdaPruneConfig(granularity="head", target_modules=["query"])
    assert len(plan_blocks(model, config, everywhere=False)) == 2
    assert [module.training for module in model.modules()] == modes
    assert [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks] == []
    assert [parameter for parameter in model.parameters() if parameter.grad is not None] == []
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["query"]}, {"layer.0.attention.output.dense", "layer.1.attention.output.dense"}),
        ({"target_modules": ["intermediate.dense"], "layers_to_transform": [1]}, {"layer.1.output.dense"}),
        ({"target_modules": r".*layer\.0\.output\.dense"}, {"layer.0.output.dense"}),
        ({"exclude_modules": ["key"]}, {"layer.0.output.dense", "layer.1.output.dense"}),
        (
            {"target_modules": "all-linear", "exclude_modules": r".*layer\.0\..*"},
            {"layer.1.attention.output.dense", "layer.1.output.dense"},
        ),
    ],
)
def test_a_block_is_masked_if_one_of_its_layers_is_named_and_none_is_excluded(
    options: dict[str, Any], expected: set[str]
) -> None:
    blocks = blocks_of(make_model(), "neuron+head", **options)
    assert {name.removeprefix("bert.encoder.") for name in blocks} == expected


def test_a_model_without_what_is_asked_for_is_refused_with_its_layers() -> None:
    with pytest.raises(
        StructureError, match=r"no heads were found in 'model.layers.0'.*'self_attn.k_proj': '32 -> 16'"
    ):
        blocks_of(make_model("llama", num_key_value_heads=1), "head")
    assert len(blocks_of(make_model("llama", num_key_value_heads=1), "neuron")) == 2
    with pytest.raises(StructureError, match="no numbered layers"):
        blocks_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).requires_grad_(False), "neuron")


def test_a_model_that_takes_no_tokens_is_refused() -> None:
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 40}
    model = AutoModel.from_config(AutoConfig.for_model("vit", **config, image_size=16, patch_size=8))
    with pytest.raises(StructureError, match=r"over tokens, but the input of ViTModel is `pixel_values`"):
        blocks_of(model, "neuron")


def test_layers_that_only_look_like_attention_are_not_taken_for_it() -> None:
    # Keys and queries of positions stand between value and output, all of one shape.
    model = make_model("deberta-v2", share_att_key=False)
    with pytest.raises(StructureError, match=r"no heads were found in 'deberta.encoder.layer.0'"):
        blocks_of(model, "head")
    assert {block.consumer[-20:] for block in blocks_of(model, "neuron").values()} == {
        "layer.0.output.dense",
        "layer.1.output.dense",
    }


def test_heads_whose_rows_lie_otherwise_are_refused() -> None:
    # Query, key and value of one head, then of the next.
    config = GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40
    )
    model = GPTNeoXForSequenceClassification(config)
    with pytest.raises(StructureError, match="no heads were found"):
        blocks_of(model, "head")
    assert [block.num_groups for block in blocks_of(model, "neuron").values()] == [40]


def test_a_layer_that_has_no_part_in_what_is_read_is_no_producer() -> None:
    layer = "bert.encoder.layer.0"
    true = Block("neuron", f"{layer}.output.dense", (f"{layer}.intermediate.dense",), 40, 1)
    false = Block("neuron", f"{layer}.output.dense", (*true.producers, f"{layer}.attention.self.query"), 8, 5)
    assert verified(make_model(), [true]) == [true]
    assert verified(make_model(num_attention_heads=4, hidden_size=40), [false]) == []


def test_masks_that_no_layer_is_named_for_are_refused() -> None:
    with pytest.raises(NoMatchingModuleError, match=r"\{'query'\}.*\['dense'\]"):
        blocks_of(make_model(), "neuron", target_modules=["query"])


@pytest.mark.parametrize(
    ("granularity", "options", "message"),
    [
        ("heads", {}, "`granularity` must be one of"),
        ("4:2", {}, "0 < n < m"),
        ("0:4", {}, "0 < n < m"),
        ("2:4", {"final_sparsity": 0.6}, "prunes 0.5 of the weights"),
        ("1:4", {}, "prunes 0.75 of the weights"),
        ("2:4", {"selection": "threshold"}, "needs `selection='topk'`"),
        ("neuron", {"mask_embeddings": True}, "masks no embeddings"),
    ],
)
def test_granularities_that_cannot_be_are_refused(granularity: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaPruneConfig(granularity=granularity, **options)


@pytest.mark.parametrize(
    ("granularity", "sparsity", "message"),
    [
        ("head", 0.8, "leave a block empty.*at most 0.5 can be pruned"),
        ("head", 0.2, "less than half"),
        ("neuron", 0.99, "leave a block"),
    ],
)
def test_sparsities_that_no_whole_groups_reach_are_refused(granularity: str, sparsity: float, message: str) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match=message):
        blocks_of(model, granularity, final_sparsity=sparsity)
    assert not list(adaprune_layers(model))


def test_layers_that_an_n_of_m_mask_does_not_fit_are_refused() -> None:
    with pytest.raises(StructureError, match=r"multiple of 4.*'bert.encoder.layer.0.output.dense': 42"):
        blocks_of(make_model(intermediate_size=42), "2:4")
    with pytest.raises(StructureError, match="word_embeddings"):
        blocks_of(make_model(), "2:4", target_modules=["word_embeddings"])
