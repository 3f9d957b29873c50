"""Common base of the methods that prune a model while its weights are trained."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from ..config import AdaPruneConfig
from ..errors import ConfigError, NotPrunedError
from ..training.callback import AdaPruneCallback
from ..tuner.head import head_modules
from ..tuner.layer_types import wrap
from ..tuner.masked_layers import adaprune_layers, has_masks
from ..tuner.targets import resolve_targets
from .unpruned import check_is_prepared


class TrainedWeightsCallback(AdaPruneCallback):
    """Prune a `Trainer`'s model while all of its weights are trained; use one of the subclasses.

    The layers that AdaPrune would mask are masked during training. Afterwards the model is a plain one again, with its
    pruned weights at zero: `Trainer.evaluate` scores it, and `Trainer.save_model` saves it. `rewound` gives a model to
    score with the pre-trained values under the learned masks.

    Args:
        config (`AdaPruneConfig`): The pruning configuration.

    Raises:
        ConfigError: If the model is not the one that the Trainer was created with, or the run has ended.
        NotPrunedError: If the model is not a plain transformers model.
    """

    config: AdaPruneConfig
    trains_scores = True

    def __init__(self, config: AdaPruneConfig) -> None:
        super().__init__(config)
        self.masks: dict[str, torch.Tensor] = {}
        self._initial: dict[str, torch.Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._model: nn.Module | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Store the weights and add masks to the Trainer's model, before its optimizer is created."""
        adapted = " with masks or an adapter" if hasattr(model, "peft_config") or has_masks(model) else ""
        if not isinstance(model, PreTrainedModel) or adapted:
            raise NotPrunedError(
                f"`{type(self).__name__}` trains the weights of a plain transformers model, got a "
                f"{type(model).__name__}{adapted}. Give the Trainer the model as `from_pretrained` loads it."
            )
        self._model, self.masks = model, {}
        self._initial = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        self._parameters = dict(model.named_parameters())
        self.config = copy.deepcopy(self.config)  # this run writes into it
        targets = copy.deepcopy(self.config)
        resolve_targets(model, targets)
        self.config.num_parameters = model.num_parameters()
        for name, module in list(model.named_modules()):
            layer = wrap(module, self.adapter_name, self.config) if check_target_module_exists(targets, name) else None
            if layer is not None:
                layer.adaprune_scores[self.adapter_name].requires_grad_(self.trains_scores)
                model.set_submodule(name, layer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        """Create the `Pruner`, if the model is the one with the masks."""
        check_is_prepared(self, self._model, model)
        if self.masks:
            raise ConfigError(
                "The run has ended, and the model is a plain one without masks again: for another run, create a "
                "Trainer with the model as `from_pretrained` loads it, and a new callback."
            )
        super().on_train_begin(args, state, control, model, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the checkpoint as it is: it contains the whole model, with masks and scores."""
        self._forget_best(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End at exactly the requested sparsity, as a plain model with zeros."""
        super().on_train_end(args, state, control, **kwargs)
        for name, layer in list(adaprune_layers(kwargs["model"])):
            mask = self.masks[name] = layer.mask(self.adapter_name)
            module = layer.get_base_layer()
            module.weight.data[~mask] = 0
            kwargs["model"].set_submodule(name, module)

    def rewound(self, model: PreTrainedModel) -> PreTrainedModel:
        """Return a copy of the trained model whose body has its pre-trained values under the learned masks.

        This is how the paper (arXiv 2105.03343) scores its baselines. The copy has the form of AdaPrune's own results:
        masks and a head over an unchanged base, an adapter that can be saved, pushed and analysed.

        Args:
            model (`transformers.PreTrainedModel`): The Trainer's model, after training.

        Returns:
            `transformers.PreTrainedModel`: The copy, on the same device.

        Raises:
            NotPrunedError: If training has not ended.
        """
        if not self.masks:
            raise NotPrunedError(
                "There are no masks yet to put on the pre-trained weights: call `Trainer.train` first."
            )
        head = tuple(f"{name}." for name in head_modules(model))
        body = {name: tensor for name, tensor in self._initial.items() if not name.startswith(head)}
        rewound = type(model)(model.config).to(device=model.device, dtype=model.dtype)
        rewound.load_state_dict(model.state_dict() | body)
        rewound.add_adapter(self.config, self.adapter_name)
        for name, layer in adaprune_layers(rewound, self.adapter_name):
            layer.set_mask(self.adapter_name, self.masks[name])
        return rewound.eval()
