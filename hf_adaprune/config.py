"""The configuration of the method, and of each adapter that is saved."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from .choices import AUTO, FORMAT_VERSION, PRESETS
from .errors import ConfigError
from .labels import is_regression, labels_fingerprint
from .storage.weights_file import check_not_pickled, check_weights_file
from .storage.write_order import put_in_place
from .tuner.masks import PACKED_BITS, packed_size, sparsity_of
from .validation import mistyped, problems_of_storage, problems_of_values


@dataclass
class AdaPruneConfig(PeftConfig):
    """Configure how a frozen model is adapted to a task by pruning alone.

    The default prunes exactly `final_sparsity` of the masked weights: the lowest scores of each matrix go, by a cubic
    ramp over the first part of training, and scores start from what each weight contributes.
    `AdaPruneConfig.from_preset("paper")` is Algorithm 1 of "Adapting by Pruning: A Case Study on BERT" (arXiv
    2105.03343).

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).
        target_modules (`list[str]` or `str`, *optional*):
            Names (or name endings) of the modules to mask, or a regular expression. `None` masks every linear layer of
            the body; see `modules_to_save` for where the body ends.
        exclude_modules (`list[str]` or `str`, *optional*): Names, endings or a regular expression of modules to spare.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Mask these layers only. Needs `target_modules` as a list.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the module that numbers the layers.
        granularity (`str`):
            What has one score, and is kept or pruned as a whole. `"weight"`: each weight. `"2:4"`, or any `"n:m"`:
            each weight, and of every `m` next to each other along the inputs the best `n` are kept; `final_sparsity`
            must be `1 - n / m`. `"neuron"`: a unit of a feed-forward's hidden layer, its row (or pair of rows) in one
            matrix and its column in the next. `"head"`: an attention head, in query, key, value and output.
            `"neuron+head"`: both, under one budget of weights with `scope="global"`. Whole groups are pruned, to the
            nearest one in each scope, and each block keeps one at least.
        mask_embeddings (`bool`): Whether to mask the input (word) embeddings too.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole. The task head is always added: everything outside
            `model.base_model`, and the pooler, which many checkpoints lack. A language model's output layer is
            pre-trained: it is neither trained nor masked.
        head (`str`):
            `"model"`: the model's own head. `"layer_average"`: the paper's, a learned average of all layers' first
            ([CLS]) vectors, a ReLU layer, and an output layer, in place of the model's `classifier`.
        selection (`str`):
            `"topk"`: keep the highest scores, exactly as many as the schedule wants. `"threshold"`: keep positive
            scores and end training when more than `final_sparsity` are pruned (Algorithm 1).
        scope (`str`):
            What shares one threshold under `"topk"`: each `"module"`, each `"kind"` of matrix over all layers, or
            the `"global"` whole.
        pruning_start (`float`): The fraction of training after which the ramp begins, in [0, 1).
        pruning_end (`float`): The fraction of training after which the target is reached, in (`pruning_start`, 1].
        score_init (`str`):
            `"wanda"`: the ranks, among the weights of one output, of |w| times the norm of the input that w multiplies
            in the first step, spread evenly over [0, 2] (arXiv 2306.11695). `"magnitude"`: the ranks of |w| in the
            matrix, over [0, 2]. `"normal"`: N(0.01, 0.001^2). `"constant"`: 0.01 everywhere (ties are broken by |w|).
            A group is ranked in its block: by the sum of |w| over its weights, or under `"wanda"` by when it would
            leave if always the one left that changes the block's output least.
        estimator (`str`):
            How gradients reach the scores: `"straight_through"`, or `"sigmoid"` with the two temperatures (Eq. 4).
        forward_temperature (`float`, *optional*):
            `t_l` > 0 of Eq. 4, in training only, under `"sigmoid"` and `"threshold"`. `None` is its limit, a step;
            evaluation always uses the step.
        backward_temperature (`float`): `t_s` > 0 of Eq. 4.
        score_lr_ratio (`float`):
            The learning rate of the scores over the optimizer's, > 0. Under Adam a score moves by about
            `score_lr_ratio * learning_rate` a step: 5e-3 at the Trainer's default of 5e-5.
        head_lr_ratio (`float`): The learning rate of `modules_to_save` over the optimizer's, > 0: 2e-4 at 5e-5.
        dropout (`float` or `str`, *optional*):
            The dropout of the whole model while `Pruner` trains it, in [0, 1). `None` keeps the model's own. `"auto"`
            is 0 for a regression, and the model's own for everything else.
        settle (`bool`):
            Whether the steps of the scores shrink linearly to nothing from `pruning_end` on, beyond what the schedule
            of the learning rate does; under `"topk"` and `"straight_through"`, where only the scores' order counts.
        drift (`float`):
            Subtracted from every score over the whole run, in equal steps, >= 0 (the sum of the gammas of Eq. 5);
            under `"threshold"`.

        base_fingerprint (`str`, *optional*): Written when an adapter is made; which weights the masks belong to.
        adapter_fingerprint (`str`, *optional*): Written when an adapter is saved; what its masks and head are.
        labels_fingerprint (`str`, *optional*): Written when an adapter is saved; what its labels are.
        model_config (`dict`, *optional*): Written when an adapter is made; the model's own configuration.
        num_parameters (`int`, *optional*): Written when an adapter is made; how many the whole model has.
        module_counts (`dict[str, list[int]]`, *optional*):
            Written when an adapter is saved; for each masked module how many weights are pruned, and how many it has.
        group_counts (`dict[str, list[int]]`, *optional*):
            Written when an adapter is saved whose masks are of neurons or heads; for each mask how many groups are
            pruned, and how many there are.
        head_tensors (`list[str]`, *optional*): Written when an adapter is saved; the names of its head's tensors.
        training (`dict`, *optional*):
            Written by `AdaPruneCallback`; how long the adapter was trained, and with which settings of the Trainer.
        combination (`str`, *optional*):
            Written by `combine_adapters` and `expand`; how the masks were made, and of which others.
        whole_groups (`str`, *optional*):
            Written by `expand`; what groups some are pruned of as a whole, besides single weights: `"neuron"`,
            `"head"` or `"neuron+head"`.
        mask_bytes (`dict[str, int]`, *optional*):
            Written when an adapter is saved whose masks are coded; how many bytes each takes, where that is less than
            one bit a weight.
        mask_codec (`str`):
            How masks are stored. `"packed-bits-lsb"`: one bit a weight. `"auto"`: in less, where they are predictable
            from their weights, as trained masks are; such an adapter can only be read together with its base.
        format_version (`int`): Version of the stored format.

    Raises:
        ConfigError: If a field has a value that it cannot have; the message lists every such field.
    """

    final_sparsity: float = 0.5
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    granularity: str = "weight"
    mask_embeddings: bool = False
    modules_to_save: list[str] | None = None
    head: str = "model"
    selection: str = "topk"
    scope: str = "module"
    pruning_start: float = 0.0
    pruning_end: float = 0.6
    score_init: str = "wanda"
    estimator: str = "straight_through"
    forward_temperature: float | None = None
    backward_temperature: float = 1.0
    score_lr_ratio: float = 100.0
    head_lr_ratio: float = 4.0
    dropout: float | str | None = AUTO
    settle: bool = True
    drift: float = 0.0

    base_fingerprint: str | None = None
    adapter_fingerprint: str | None = None
    labels_fingerprint: str | None = None
    model_config: dict[str, Any] | None = None
    num_parameters: int | None = None
    module_counts: dict[str, list[int]] | None = None
    group_counts: dict[str, list[int]] | None = None
    head_tensors: list[str] | None = None
    training: dict[str, Any] | None = None
    combination: str | None = None
    whole_groups: str | None = None
    mask_bytes: dict[str, int] | None = None
    mask_codec: str = PACKED_BITS
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ADAPRUNE")
        # Whether this comes with a stored adapter: asked now, since what is written into it later is of one in memory.
        self.is_stored = self.module_counts is not None
        self.masks_loaded = False  # whether the stored masks are in place
        self.has_pruner = False  # whether a `Pruner` has made masks
        self.pruner_token: object = None  # of the `Pruner` that was made last: no other may train
        self.vocab_size: int | None = None  # of the model that the masks are on
        problems = mistyped(self) or problems_of_storage(self) or problems_of_values(self)
        if problems:
            raise ConfigError("\n".join(problems))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        # From here on the labels may be changed: they are held against it once.
        self.labels_fingerprint = None

    @property
    def group_kinds(self) -> tuple[str, ...]:
        """What whole groups are pruned: `"neuron"`, `"head"`, both, or none."""
        return () if self.granularity == "weight" or self.n_of_m else tuple(self.granularity.split("+"))

    @property
    def removable_kinds(self) -> tuple[str, ...]:
        """What is pruned whole, by masks of groups or by masks of single weights that were made from some."""
        return self.group_kinds or tuple(self.whole_groups.split("+") if self.whole_groups else ())

    @property
    def is_structured(self) -> bool:
        """Whether whole neurons or heads are pruned, so that `compact` has something to remove."""
        return bool(self.removable_kinds)

    @property
    def architecture(self) -> str | None:
        """The name of the class of the model that the adapter was made for, if it was one of transformers'."""
        return ((self.model_config or {}).get("architectures") or [None])[0]

    @property
    def training_dropout(self) -> float | None:
        """The dropout that the model has while its masks are trained; `None` for its own."""
        if not isinstance(self.dropout, str):
            return self.dropout
        return 0.0 if self.model_config is not None and is_regression(self.model_config) else None

    @property
    def settles(self) -> bool:
        """Whether the steps of the scores shrink from `pruning_end` on."""
        return self.settle and self.selection == "topk" and self.estimator == "straight_through"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """How many of how many neighbouring weights are kept, under such a granularity."""
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.granularity)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def mask_entries(self) -> dict[str, int]:
        """How many entries each mask of a stored adapter has: weights, or groups."""
        return {name: length for name, (_, length) in (self.group_counts or self.module_counts or {}).items()}

    @property
    def has_patterns(self) -> bool:
        """Whether modules are chosen by regular expressions, or by parts of them."""
        return (
            isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str) or bool(self.layers_pattern)
        )

    @property
    def mask_num_bytes(self) -> dict[str, int]:
        """How many bytes each mask of a stored adapter takes: one bit an entry, or less."""
        return {name: packed_size(length) for name, length in self.mask_entries.items()} | (self.mask_bytes or {})

    def for_masks(self, masks: Mapping[str, torch.Tensor]) -> AdaPruneConfig:
        """Return a copy for an adapter that is not trained: its masks, of single weights, are there already.

        Args:
            masks (`Mapping[str, torch.Tensor]`): The boolean mask of each module, by the module's name.
        """
        config = copy.deepcopy(self)
        config.granularity, config.target_modules = "weight", set(masks)
        config.scope = "global"  # one that is trained on keeps its own sparsity in each matrix
        config.final_sparsity = sparsity_of(masks.values())
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        # What is written when an adapter is made or saved is written anew.
        config.base_fingerprint = config.adapter_fingerprint = config.head_tensors = None
        config.module_counts = config.group_counts = config.mask_bytes = None
        config.training = config.combination = config.whole_groups = None
        config.is_stored, config.inference_mode = False, True
        return config

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> AdaPruneConfig:
        """Make one of the named configurations, with some fields changed.

        Args:
            name (`str`): `"default"`, or `"paper"` for Algorithm 1.
            overrides: Fields to set otherwise.

        Returns:
            `AdaPruneConfig`: The configuration.

        Raises:
            ConfigError: If there is no preset of this name.

        Example:

            >>> AdaPruneConfig.from_preset("paper", final_sparsity=0.7)
        """
        if name not in PRESETS:
            raise ConfigError(f"The preset must be one of {sorted(PRESETS)}, got {name!r}.")
        return cls(**{**PRESETS[name], **overrides})

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`, whole or not at all and in a stable order, and the adapter's card.

        Every door by which an adapter is saved comes through here.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        output = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        # A stored adapter is opened for inference unless its reader says otherwise: PEFT's convention.
        output.update({"inference_mode": True, "auto_mapping": auto_mapping or self.auto_mapping})
        if self.module_counts is not None and self.has_patterns:
            # What is stored is matched by nobody's regular expression.
            output.update(dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern")))
            output["target_modules"] = sorted(self.mask_entries)
        if self.model_config is not None:
            output["labels_fingerprint"] = labels_fingerprint(self.model_config)
        os.makedirs(save_directory, exist_ok=True)
        path = Path(save_directory, CONFIG_NAME)
        aside = path.with_suffix(".json.tmp")
        aside.write_text(json.dumps(output, indent=2, sort_keys=True), encoding="utf-8")

        def finish() -> None:
            if self.module_counts is not None:
                check_not_pickled(save_directory, aside)
            aside.replace(path)
            if self.module_counts is not None:
                # Imported here: a card is made from a configuration.
                from .hub.model_card import write_model_card

                write_model_card(save_directory, picture=False)

        put_in_place(aside, finish)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AdaPruneConfig:
        """Read the configuration of a stored adapter, and see that its weights are all there and no pickle.

        `PeftConfig.from_pretrained` reads the same configuration without a look at the weights.

        Raises:
            AdapterFileError: If the weights are a pickle, are cut short, or lack masks or the head.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub, _, _ = cls._split_kwargs(kwargs)
        check_weights_file(str(pretrained_model_name_or_path), config, subfolder, **hub)
        return config
