"""Ablations of a trained model: shuffled masks, or other weights under the masks."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Trainer

from ..config import AdaPruneConfig
from ..storage.checks import run_checks
from ..tuner.layer import AdaPruneLayer
from ..tuner.masked_layers import adaprune_layers, chosen_adapter
from .fixed import FixedMaskCallback


Change = Callable[[AdaPruneLayer, str, torch.Generator], None]


def shuffle_mask(layer: AdaPruneLayer, adapter_name: str, generator: torch.Generator) -> None:
    """Permute a layer's mask at random: the number of kept weights (or groups) stays the same."""
    mask = layer.scored_mask(adapter_name)
    order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
    layer.set_mask(adapter_name, mask.reshape(-1)[order].view(mask.shape))


def scale_weight(deviation: float) -> Change:
    """Return a change that multiplies each weight of a layer by an independent sample of N(1, deviation^2)."""

    @torch.no_grad()
    def change(layer: AdaPruneLayer, adapter_name: str, generator: torch.Generator) -> None:
        noise = torch.normal(1.0, deviation, layer.base_weight.shape, generator=generator)
        layer.base_weight.mul_(noise.to(layer.base_weight))

    return change


@torch.no_grad()
def redraw_weight(layer: AdaPruneLayer, adapter_name: str, generator: torch.Generator) -> None:
    """Redraw the weights of a layer from a normal distribution with their mean and standard deviation."""
    noise = torch.randn(layer.base_weight.shape, generator=generator).to(layer.base_weight)
    layer.base_weight.copy_(layer.base_weight.mean() + layer.base_weight.std() * noise)


ABLATIONS: dict[str, Change] = {
    "shuffled": shuffle_mask,
    # The paper's N(1, .01) does not say whether .01 is the deviation or the variance.
    "reinit_deviation_01": scale_weight(0.01),
    "reinit_variance_01": scale_weight(0.1),
    "redrawn": redraw_weight,
}
"""Table 3 of "Adapting by Pruning" (arXiv 2105.03343), with its second row in three interpretations."""


def ablate(trainer: Trainer, head_learning_rate: float = 1e-3, adapter_name: str | None = None) -> dict[str, float]:
    """Score a trained model under each ablation, with its head as it is and with its head trained further.

    Args:
        trainer (`transformers.Trainer`):
            A Trainer whose model AdaPrune has adapted. The model is changed, scored and restored.
        head_learning_rate (`float`): The learning rate for training the head further, as long as the Trainer trains.
        adapter_name (`str`, *optional*): Which adapter of the model; by default the active one.

    Returns:
        `dict[str, float]`:
            For each of `ABLATIONS` the results of `Trainer.evaluate`, under `eval_{ablation}_...` with the head as it
            is and `eval_{ablation}_retrained_...` with the head trained further.

    Raises:
        NotPrunedError: If the model has no such adapter, or several are active and none is named.
    """
    adapter_name = chosen_adapter(trainer.model, adapter_name)
    layers = dict(adaprune_layers(trainer.model, adapter_name))
    run_checks(trainer.model)  # before the masks change
    metrics: dict[str, float] = {}
    for name, change in ABLATIONS.items():
        with _restored(trainer.model):
            generator = torch.Generator().manual_seed(trainer.args.seed)
            for layer in layers.values():
                change(layer, adapter_name, generator)
            metrics |= trainer.evaluate(metric_key_prefix=f"eval_{name}")
            retrainer = _head_trainer(trainer, head_learning_rate, adapter_name)
            retrainer.train()
            metrics |= retrainer.evaluate(metric_key_prefix=f"eval_{name}_retrained")
    return metrics


def _head_trainer(trainer: Trainer, learning_rate: float, adapter_name: str) -> Trainer:
    unsaved = {"save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False}
    args = dataclasses.replace(trainer.args, learning_rate=learning_rate, **unsaved)
    return Trainer(
        trainer.model,
        args,
        data_collator=trainer.data_collator,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        processing_class=trainer.processing_class,
        compute_loss_func=trainer.compute_loss_func,
        compute_metrics=trainer.compute_metrics,
        preprocess_logits_for_metrics=trainer.preprocess_logits_for_metrics,
        callbacks=[FixedMaskCallback(adapter_name=adapter_name)],
    )


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Restore a model's state, card and trainable parameters at the end of the block."""
    state = copy.deepcopy(model.state_dict())
    configs = [config for config in model.peft_config.values() if isinstance(config, AdaPruneConfig)]
    told = [copy.copy(config.training) for config in configs]
    complete_card = vars(model).get("create_or_update_model_card")
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        yield
    finally:
        model.load_state_dict(state)
        for config, training in zip(configs, told, strict=True):
            config.training = training
        vars(model).pop("create_or_update_model_card", None)
        if complete_card is not None:
            model.create_or_update_model_card = complete_card
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
