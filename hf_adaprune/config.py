"""The configuration of the method, which is stored with each adapter."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, PeftType

from .choices import AUTO, FORMAT_VERSION, PRESETS, Estimator, Head, MaskCodec, Scope, ScoreInit, Selection
from .errors import ConfigError
from .files.weights_file import check_not_pickled, check_weights_file
from .files.write_order import put_in_place
from .labels import is_regression, labels_fingerprint
from .masks import PACKED_BITS, sparsity_of
from .validation import mistyped, problems_of_storage, problems_of_values


# Fields that are filled in when an adapter is created on a model, or when its masks are made and saved.
_WRITTEN_FOR_A_MODEL = ("base_model_name_or_path", "revision", "model_config", "num_parameters", "labels_fingerprint")
_WRITTEN_FOR_MASKS = (
    *("base_fingerprint", "adapter_fingerprint", "module_counts", "group_counts", "mask_bytes", "head_tensors"),
    *("training", "combination", "whole_groups"),
)


@dataclass
class InMemory:
    """What has become of an adapter in memory: never stored, and new for each model that the adapter is added to."""

    masks_loaded: bool = False  # into its layers
    scores_loaded: bool = False  # from a checkpoint, at the latest loading
    was_pruned: bool = False  # a `Pruner` has computed its masks
    pruner_token: object = None  # of the latest `Pruner`, until that is closed: only that one may train
    vocab_size: int | None = None  # of the model when masks were added


@dataclass
class AdaPruneConfig(PeftConfig):
    """Configure how a frozen model is adapted to a task by pruning alone.

    By default exactly `final_sparsity` of the masked weights are pruned: those with the lowest scores in each matrix,
    on a cubic ramp over the first part of training. Scores are initialized by the importance of each weight.
    `AdaPruneConfig.from_preset("paper")` is Algorithm 1 of "Adapting by Pruning: A Case Study on BERT" (arXiv
    2105.03343).

    Args:
        final_sparsity (`float`): The fraction of the masked weights to remove, in [0, 1).
        target_modules (`list[str]` or `str`, *optional*):
            Names (or name endings) of the modules to mask, or a regular expression. `None` masks every linear layer of
            the body; see `modules_to_save` for where the body ends.
        exclude_modules (`list[str]` or `str`, *optional*):
            Names, endings or a regular expression of modules not to mask.
        layers_to_transform (`list[int]` or `int`, *optional*):
            Mask these layers only. Needs `target_modules` as a list.
        layers_pattern (`list[str]` or `str`, *optional*): Name of the module that holds the numbered layers.
        granularity (`str`):
            The unit that has one score and is kept or pruned as a whole. `"weight"`: each weight. `"2:4"`, or any
            `"n:m"`: each weight; of every `m` consecutive weights along the inputs, the `n` with the highest scores
            are kept, and `final_sparsity` must be `1 - n / m`. `"neuron"`: a hidden unit of a feed-forward block, with
            its row (or pair of rows) in one matrix and its column in the next. `"head"`: an attention head, in query,
            key, value and output. `"neuron+head"`: both, sharing one budget of weights with `scope="global"`. The
            number of pruned groups is rounded to the nearest in each scope, and each block keeps at least one.
        mask_embeddings (`bool`): Whether to mask the input (word) embeddings too.
        modules_to_save (`list[str]`, *optional*):
            Modules that are trained and saved whole. The task head is always added: everything outside
            `model.base_model`, and the pooler, which many checkpoints lack. A language model's output layer is
            pre-trained: it is neither trained nor masked.
        head (`str`):
            `"model"`: the model's own head. `"layer_average"`: the paper's head, which replaces the model's
            `classifier`: a learned average of all layers' first ([CLS]) vectors, a ReLU layer and an output layer.
        selection (`str`):
            `"topk"`: keep exactly the number of highest scores that the schedule prescribes. `"threshold"`: keep
            positive scores and end training when more than `final_sparsity` of the weights are pruned (Algorithm 1).
        scope (`str`):
            Which modules share one threshold under `"topk"`: each `"module"` has its own, the matrices of each
            `"kind"` share one across layers, or all modules share one (`"global"`).
        pruning_start (`float`):
            The fraction of training after which the ramp begins, in [0, 1). Like `pruning_end`, only for `"topk"`.
        pruning_end (`float`): The fraction of training after which the target is reached, in (`pruning_start`, 1].
        score_init (`str`):
            `"wanda"`: the rank of |w| times the norm of its input in the first step, among the weights of the same
            output, spread evenly over [0, 2] (arXiv 2306.11695). `"magnitude"`: the rank of |w| in the matrix, over
            [0, 2]. `"normal"`: N(0.01, 0.001^2). `"constant"`: 0.01 everywhere (ties are broken by |w|). Groups are
            ranked within their block: by the sum of |w| or, under `"wanda"`, by greedy backward elimination: the group
            whose removal changes the block's output least goes first.
        estimator (`str`):
            How gradients reach the scores: `"straight_through"`, or `"sigmoid"` with two temperatures (Eq. 4).
        forward_temperature (`float`, *optional*):
            `t_l` > 0 of Eq. 4, in training only; needs `"sigmoid"` and `"threshold"`. `None` is the limit, a step
            function, which evaluation always uses.
        backward_temperature (`float`): `t_s` > 0 of Eq. 4.
        score_lr_ratio (`float`):
            Learning rate of the scores divided by the optimizer's, > 0. With Adam a score changes by about
            `score_lr_ratio * learning_rate` per step: 5e-3 at the Trainer's default of 5e-5.
        head_lr_ratio (`float`):
            Learning rate of `modules_to_save` divided by the optimizer's, > 0. The default gives 2e-4 at 5e-5.
        dropout (`float` or `str`, *optional*):
            The dropout of the model's modules while `Pruner` trains it, in [0, 1). `None` keeps the model's own.
            `"auto"` is 0 for regression and the model's own otherwise.
        settle (`bool`):
            Whether the score updates decay linearly to 0 from `pruning_end` on, in addition to the learning rate
            schedule. Applies only to `"topk"` with `"straight_through"`, where only the order of the scores matters.
        drift (`float`):
            Total amount >= 0 subtracted from every score over the run, in equal steps (the sum of the gammas of Eq.
            5). Needs `"threshold"`.

        base_fingerprint (`str`, *optional*): Written when an adapter is created: fingerprint of the base's weights.
        adapter_fingerprint (`str`, *optional*): Written when an adapter is saved: fingerprint of its masks and head.
        labels_fingerprint (`str`, *optional*):
            Written when an adapter is saved: fingerprint of its labels. It is compared when the file is read, and is
            `None` in memory, where labels may be changed.
        model_config (`dict`, *optional*): Written when an adapter is created: the model's configuration.
        num_parameters (`int`, *optional*): Written when an adapter is created: number of parameters of the model.
        module_counts (`dict[str, list[int]]`, *optional*):
            Written when an adapter is saved: for each masked module the numbers of pruned weights and of all weights.
        group_counts (`dict[str, list[int]]`, *optional*):
            Written when an adapter with masks of neurons or heads is saved: for each mask the numbers of pruned
            groups and of all groups.
        head_tensors (`list[str]`, *optional*): Written when an adapter is saved: the names of its head's tensors.
        training (`dict`, *optional*):
            Written by `AdaPruneCallback`: how long the adapter was trained, and with which Trainer settings.
        combination (`str`, *optional*):
            Written by `combine_adapters` and `expand`: how the masks were made, and from which others.
        whole_groups (`str`, *optional*):
            Written by `combine_adapters` and `expand`: the kinds of groups that masks of single weights prune as a
            whole: `"neuron"`, `"head"` or `"neuron+head"`.
        mask_bytes (`dict[str, int]`, *optional*):
            Written when an adapter with coded masks is saved: the size in bytes of each mask that takes less than one
            bit per weight.
        mask_codec (`str`):
            How masks are stored. `"packed-bits-lsb"`: one bit per weight. `"auto"`: coded in less where the weights
            predict the mask, as they do for trained masks; such an adapter can only be read together with its base.
        format_version (`int`): Version of the stored format.

    Raises:
        ConfigError: If a field has an invalid value; the message lists the invalid fields.
    """

    final_sparsity: float = 0.5
    target_modules: set[str] | list[str] | str | None = None
    exclude_modules: set[str] | list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    granularity: str = "weight"
    mask_embeddings: bool = False
    modules_to_save: list[str] | None = None
    head: Head = "model"
    selection: Selection = "topk"
    scope: Scope = "module"
    pruning_start: float = 0.0
    pruning_end: float = 0.6
    score_init: ScoreInit = "wanda"
    estimator: Estimator = "straight_through"
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
    mask_codec: MaskCodec = PACKED_BITS
    format_version: int = FORMAT_VERSION

    # `write_model_card`, set at registration: a card tells of more than a configuration can import.
    write_card: ClassVar[Callable[..., Any]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("ADAPRUNE")
        # Whether this was read from a stored adapter. Decided here: saving sets `module_counts` in memory too.
        self.is_stored = self.module_counts is not None
        self.in_memory = InMemory()
        problems = mistyped(self) or problems_of_storage(self) or problems_of_values(self)
        if problems:
            raise ConfigError("\n".join(problems))
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple)) else value)
        # Compared above, and only once: from here on the labels may be changed.
        self.has_checked_labels = self.labels_fingerprint is not None or self.model_config is None
        self.labels_fingerprint = None

    @property
    def group_kinds(self) -> tuple[str, ...]:
        """The kinds of groups that are masked as a whole: `"neuron"`, `"head"`, both, or none."""
        return () if self.granularity == "weight" or self.n_of_m else tuple(self.granularity.split("+"))

    @property
    def removable_kinds(self) -> tuple[str, ...]:
        """The kinds of groups pruned as a whole, by masks of groups or by masks of weights derived from them."""
        return self.group_kinds or tuple(self.whole_groups.split("+") if self.whole_groups else ())

    @property
    def is_structured(self) -> bool:
        """Whether whole neurons or heads are pruned, so that `compact` has something to remove."""
        return bool(self.removable_kinds)

    @property
    def architecture(self) -> str | None:
        """The class name of the transformers model that the adapter was made for; `None` for other models."""
        return ((self.model_config or {}).get("architectures") or [None])[0]

    @property
    def training_dropout(self) -> float | None:
        """The dropout of the model while its masks are trained; `None` keeps the model's own."""
        if not isinstance(self.dropout, str):
            return self.dropout
        return 0.0 if self.model_config is not None and is_regression(self.model_config) else None

    @property
    def settles(self) -> bool:
        """Whether the score updates decay from `pruning_end` on."""
        return self.settle and self.selection == "topk" and self.estimator == "straight_through"

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """`(n, m)` under an `"n:m"` granularity, which keeps `n` of every `m` consecutive weights; else `None`."""
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.granularity)
        return (int(found[1]), int(found[2])) if found else None

    @property
    def mask_entries(self) -> dict[str, int]:
        """The number of entries (weights or groups) of each mask of a stored adapter."""
        return {name: length for name, (_, length) in (self.group_counts or self.module_counts or {}).items()}

    @property
    def has_patterns(self) -> bool:
        """Whether modules are selected by regular expressions or by `layers_pattern`."""
        return (
            isinstance(self.target_modules, str) or isinstance(self.exclude_modules, str) or bool(self.layers_pattern)
        )

    def fresh(self, **changes: Any) -> AdaPruneConfig:
        """Return a copy for a new adapter, without what was written when this one was created or saved.

        Args:
            changes: Fields that replace those of this configuration.

        Example:

            >>> AdaPruneConfig.from_pretrained("me/sst2-adaprune").fresh(final_sparsity=0.8)
        """
        written: dict[str, Any] = dict.fromkeys((*_WRITTEN_FOR_A_MODEL, *_WRITTEN_FOR_MASKS))
        return replace(self, **{**written, "inference_mode": False, **changes})

    def for_masks(self, masks: Mapping[str, torch.Tensor]) -> AdaPruneConfig:
        """Return a copy for an adapter whose masks, of single weights, are given instead of trained.

        Args:
            masks (`Mapping[str, torch.Tensor]`): The boolean mask of each module, by the module's name.
        """
        config = copy.deepcopy(self)
        for name in _WRITTEN_FOR_MASKS:
            setattr(config, name, None)
        config.is_stored, config.inference_mode = False, True
        config.granularity, config.target_modules = "weight", set(masks)
        config.scope = "global"  # further training then does not force all matrices to one sparsity
        config.final_sparsity = sparsity_of(masks.values())
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
        return config

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> AdaPruneConfig:
        """Create a preset configuration, optionally with some fields changed.

        Args:
            name (`str`): `"default"`, or `"paper"` for Algorithm 1.
            overrides: Fields that replace those of the preset.

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
        """Write `adapter_config.json`, atomically and with sorted keys, and the adapter's model card.

        Every way of saving an adapter calls this method.

        Raises:
            ConfigError: If the adapter's weights have just been saved as a pickle.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        output = {key: sorted(value) if isinstance(value, set) else value for key, value in self.to_dict().items()}
        # PEFT's convention: a stored adapter is opened for inference unless the caller says otherwise.
        output.update({"inference_mode": True, "auto_mapping": auto_mapping or self.auto_mapping})
        if self.module_counts is not None and self.has_patterns:
            # A stored adapter lists its modules by name, so that loading evaluates no regular expression.
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
                self.write_card(save_directory, picture=False)

        put_in_place(aside, finish)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> AdaPruneConfig:
        """Read the configuration of a stored adapter, and check that its weights are complete and not a pickle.

        Weights on the Hub are downloaded for that; if there are none, or they cannot be fetched, nothing is checked.
        `PeftConfig.from_pretrained` reads the same configuration without looking at the weights.

        Raises:
            AdapterFileError: If the weights are a pickle, are truncated, or lack masks or the head.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        hub, _, _ = cls._split_kwargs(kwargs)
        check_weights_file(str(pretrained_model_name_or_path), config, subfolder=subfolder, **hub)
        return config
