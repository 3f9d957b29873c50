"""Whatever is done to a model's adapters, in whatever order, it computes what the active ones stand for."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import HEADS, make_batch, make_model

from hf_adaprune import AdaPruneConfig, combine_adapters, merged
from hf_adaprune.tuner.head import head_wrappers
from hf_adaprune.tuner.masked_layers import adaprune_layers


# Which layers an adapter masks, and how many labels it has: no two adapters are alike.
KINDS: dict[str, tuple[AdaPruneConfig, int]] = {
    "half": (AdaPruneConfig(), 2),
    "embeddings": (AdaPruneConfig(mask_embeddings=True, scope="global", final_sparsity=0.7), 3),
    "keys": (AdaPruneConfig(target_modules=["key"], final_sparsity=0.9), 1),
    "second layer": (AdaPruneConfig(target_modules=["query", "dense"], layers_to_transform=[1]), 3),
    "neurons": (AdaPruneConfig(granularity="neuron", final_sparsity=0.3), 3),
    "coded": (AdaPruneConfig(mask_codec="auto", final_sparsity=0.8), 2),
}
NAMES = ("w", "x", "y", "z")  # PEFT warns of names that are part of its prefix
ALL = torch.ones((), dtype=torch.int)  # the mask of a layer that an adapter leaves alone


@torch.no_grad()
def outputs_of(model: Any) -> torch.Tensor:
    batch = make_batch()
    return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])[0]


@dataclass(frozen=True)
class Adapter:
    """Where an adapter is stored, and what it stands for: masks by the name of the module, and its head's modules."""

    path: str
    masks: dict[str, torch.Tensor]
    head: dict[str, torch.nn.Module]


@dataclass(frozen=True)
class Pool:
    """A base, and an adapter of each kind for it."""

    base: Any
    has_head: bool
    adapters: dict[str, Adapter]


class Life:
    """A model whose adapters are changed at random, and a record of which it should have and which are active."""

    def __init__(self, pool: Pool, wrapped: bool, seed: int) -> None:
        self.pool, self.wrapped, self.random = pool, wrapped, random.Random(seed)
        self.model: Any = copy.deepcopy(pool.base)
        self.adapters: dict[str, Adapter] = {}
        self.active: list[str] = []
        self.enabled = True
        self.history: list[str] = []
        if wrapped:
            first = pool.adapters["half"]
            self.model = PeftModel.from_pretrained(self.model, first.path, adapter_name="x")
            self.adapters, self.active = {"x": first}, ["x"]

    def expected(self) -> torch.Tensor:
        plain = copy.deepcopy(self.pool.base)
        for name in self.active if self.enabled else []:
            for key, mask in self.adapters[name].masks.items():
                plain.get_submodule(key).weight.data *= mask
            for key, module in self.adapters[name].head.items():
                plain.set_submodule(key, module)
        return outputs_of(plain)

    def check(self) -> None:
        found, expected = outputs_of(self.model), self.expected()
        assert found.shape == expected.shape, self.history
        assert torch.equal(found, expected), self.history
        if self.pool.has_head:
            assert self.model.config.num_labels == found.shape[1], self.history

    def step(self) -> None:
        """Do one of the things that can be done now."""
        names = sorted(self.adapters)
        can = {
            self.load: len(names) < len(NAMES),
            self.activate: bool(names),
            self.disable_or_enable: bool(names),
            self.delete: len(names) > self.wrapped,
            self.combine: 2 <= len(names) < len(NAMES),
            self.copy: True,
            self.merge_a_copy: self.enabled and bool(names),
        }
        self.random.choice([action for action, possible in can.items() if possible])(names)

    def note(self, *what: object) -> None:
        self.history.append(" ".join(map(str, what)))

    def load(self, names: list[str]) -> None:
        kind, name = self.random.choice(sorted(KINDS)), next(name for name in NAMES if name not in names)
        self.note("load", kind, "as", name)
        self.adapters[name] = self.pool.adapters[kind]
        self.model.load_adapter(self.adapters[name].path, adapter_name=name)
        if not self.wrapped:
            self.active = [name]

    def activate(self, names: list[str]) -> None:
        several = not self.pool.has_head and not self.wrapped
        self.active = self.random.sample(names, self.random.choice([1, len(names)]) if several else 1)
        self.note("activate", self.active)
        self.model.set_adapter(self.active if several else self.active[0])

    def disable_or_enable(self, names: list[str]) -> None:
        self.enabled = not self.enabled
        self.note("enabled", self.enabled)
        if self.wrapped:
            self.model.base_model._enable_adapter_layers(self.enabled)
        else:
            (self.model.enable_adapters if self.enabled else self.model.disable_adapters)()

    def delete(self, names: list[str]) -> None:
        name = self.random.choice(names)
        self.note("delete", name)
        self.model.delete_adapter(name)
        del self.adapters[name]
        self.active = [other for other in self.active if other != name] or sorted(self.adapters)[:1]
        self.enabled |= not self.adapters

    def combine(self, names: list[str]) -> None:
        how: Any = self.random.choice(["intersection", "union", "majority"])
        new = next(name for name in NAMES if name not in names)
        self.note(how, names, "as", new)
        combine_adapters(self.model, names, how, new, head=names[0] if self.pool.has_head else None)
        least = {"intersection": len(names), "union": 1, "majority": len(names) // 2 + 1}[how]
        together = {}
        for key in {key for name in names for key in self.adapters[name].masks}:
            together[key] = sum((self.adapters[name].masks.get(key, ALL) for name in names), 0 * ALL) >= least
        self.adapters[new] = Adapter("", together, self.adapters[names[0]].head)

    def copy(self, names: list[str]) -> None:
        self.note("copy")
        self.model = copy.deepcopy(self.model)

    def merge_a_copy(self, names: list[str]) -> None:
        self.note("merge a copy")
        assert torch.equal(outputs_of(merged(self.model)), outputs_of(self.model)), self.history


@pytest.fixture(scope="module", params=["sequence", "none"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Save an adapter of each kind, and note what it stands for."""
    head, folder = request.param, tmp_path_factory.mktemp("lifecycle")
    make_model("bert", head).save_pretrained(folder / "base")
    adapters = {}
    for kind, (config, num_labels) in KINDS.items():
        labels = {"num_labels": num_labels, "ignore_mismatched_sizes": True} if head == "sequence" else {}
        model = HEADS[head].from_pretrained(folder / "base", **labels)
        model.add_adapter(copy.deepcopy(config))
        _prune(model, config.final_sparsity)
        model.save_pretrained(folder / kind)
        masks = {key: layer.mask("default").int() for key, layer in adaprune_layers(model)}
        heads = {key: wrapper.modules_to_save["default"] for key, wrapper in head_wrappers(model).items()}
        adapters[kind] = Adapter(str(folder / kind), masks, heads)
    return Pool(HEADS[head].from_pretrained(folder / "base"), head == "sequence", adapters)


@torch.no_grad()
def _prune(model: Any, sparsity: float) -> None:
    """Prune what is small, with some noise, and move the head: faster than training, and just as good here."""
    torch.manual_seed(0)
    for _, layer in adaprune_layers(model):
        weights = layer.entry_weights("default").abs()
        noisy = weights + weights.mean() * torch.rand(weights.shape)
        layer.set_mask("default", noisy > noisy.quantile(sparsity))
    for wrapper in head_wrappers(model).values():
        for parameter in wrapper.modules_to_save["default"].parameters():
            parameter += torch.rand(parameter.shape)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config` attribute:UserWarning",
    "ignore:Adapter .* was active which is now deleted:UserWarning",
)
def test_the_model_computes_what_its_active_adapters_stand_for(pool: Pool, wrapped: bool, seed: int) -> None:
    life = Life(pool, wrapped, seed)
    for _ in range(15):
        life.step()
        life.check()
