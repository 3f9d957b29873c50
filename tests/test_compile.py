"""`torch.compile` sees through all of our code, and what it has made stays good while the masks change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from doors import DOORS, logits_of
from peft import get_peft_model
from tiny import make_batch, make_model, train_masks
from torch._dynamo.testing import CompileCounterWithBackend

from hf_adaprune import AdaPruneConfig, Pruner, merged
from hf_adaprune.tuner.masked_layers import adaprune_layers


# What the compiler does with every autograd function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

STEPS = 6
# Else transformers settles it with the first labels, and is compiled anew for that.
SETTLED: dict[str, Any] = {"problem_type": "single_label_classification", "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def forget_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(config: AdaPruneConfig, architecture: str = "bert") -> Any:
    return get_peft_model(make_model(architecture, **SETTLED), config).train()


def train(model: Any, called: Any, counter: Any) -> list[int]:
    """Train to the end of the schedule; return how often something had been compiled after each step."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-5)
    pruner, counts = Pruner(model, STEPS), []
    for step in range(STEPS):
        called(**make_batch(seed=step)).loss.backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        counts.append(counter.frame_count if counter else 0)
    pruner.finalize()
    return counts


@pytest.mark.parametrize(
    ("options", "backend", "expected"),
    [
        # The first step watches the inputs, for scores to start from.
        ({}, "aot_eager", [1, *[2] * (STEPS - 1)]),
        ({"score_init": "magnitude", "mask_embeddings": True, "scope": "global"}, "eager", [1] * STEPS),
        (
            {
                **{"score_init": "normal", "estimator": "sigmoid", "forward_temperature": 10.0},
                **{"selection": "threshold", "drift": 2.0},
            },
            "eager",
            [1] * STEPS,
        ),
    ],
    ids=str,
)
def test_training_is_compiled_whole_and_never_again_along_the_schedule(
    options: dict[str, Any], backend: str, expected: list[int]
) -> None:
    counter = CompileCounterWithBackend(backend)
    model, plain = (make(AdaPruneConfig(**options)) for _ in range(2))
    # A graph break would be an error.
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    assert train(model, compiled, counter) == expected
    train(plain, plain, None)
    for (name, layer), (_, other) in zip(adaprune_layers(model), adaprune_layers(plain), strict=True):
        agreement = (layer.mask("default") == other.mask("default")).float().mean()
        assert agreement >= 0.995, name
    # To evaluate is another graph, once.
    model.eval()
    with torch.no_grad():
        for seed in range(2):
            found = compiled(**make_batch(seed=seed)).logits
            assert counter.frame_count == expected[-1] + 1
            torch.testing.assert_close(found, model(**make_batch(seed=seed)).logits)


def test_a_transposed_layer_is_compiled_too() -> None:
    counter = CompileCounterWithBackend("eager")
    model = make(AdaPruneConfig(score_init="magnitude"), "gpt2")
    assert train(model, torch.compile(model, backend=counter, fullgraph=True), counter) == [1] * STEPS


@pytest.mark.parametrize("door", ["PeftModel.from_pretrained", "AutoModelForSequenceClassification"])
def test_a_loaded_adapter_is_compiled_whole_and_once(door: str, base_path: Path, adapter_path: Path) -> None:
    counter = CompileCounterWithBackend("eager")
    model = DOORS[door](str(base_path), str(adapter_path))
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    first, second = logits_of(compiled), logits_of(compiled)
    assert counter.frame_count == 1
    assert torch.equal(first, second)
    assert torch.equal(first, logits_of(model))


def test_a_compiled_model_is_merged_like_the_model_in_it() -> None:
    model = get_peft_model(make_model(), AdaPruneConfig())
    train_masks(model)
    plain = merged(torch.compile(model, backend="eager"))
    assert type(plain) is type(model.get_base_model())
    assert torch.equal(logits_of(plain), logits_of(model))


def test_the_head_of_the_paper_is_compiled_whole() -> None:
    model = get_peft_model(make_model(**SETTLED), AdaPruneConfig(head="layer_average", score_init="magnitude"))
    compiled: Any = torch.compile(model.eval(), backend="eager", fullgraph=True)
    torch.testing.assert_close(logits_of(compiled), logits_of(model))
