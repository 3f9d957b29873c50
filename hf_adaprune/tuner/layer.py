"""The base class of layers that multiply a frozen weight by a mask."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from ..choices import AUTO
from ..codec import decode_mask, encode_mask, is_coded
from ..config import AdaPruneConfig
from ..errors import ConfigError, MergeError
from ..masks import apply_mask, pack_mask, packed_ones, packed_size, unpack_mask
from .binarize import sigmoid_relaxation, straight_through
from .cached_weight import CachedWeight
from .groups import Groups
from .score_state import remake_scores
from .scores import initial_scores
from .sharding import full_tensor, is_sharded


class AdaPruneLayer(nn.Module, BaseTunerLayer):
    """Hold the masks of one frozen weight, one per adapter.

    A mask has one bit per weight: `adaprune_mask[adapter]`, a `uint8` buffer of shape `(ceil(weights / 8),)`, is what
    is saved and loaded; a mask that was stored in less is decoded to this form as soon as it is loaded
    (`packed_mask`). `adaprune_scores[adapter]`, real-valued and of the weight's shape, exists only if the adapter can
    be trained. Where whole groups of inputs are masked, both have one entry per group (`Groups`). The output of
    `forward` depends on the mask alone, except in training with a `forward_temperature`: scores only receive a
    gradient, and `Pruner` computes the next mask from them.
    """

    adapter_layer_names: tuple[str, ...] = ("adaprune_scores",)
    # PEFT's `delete_adapter` removes an adapter's entry from each of these.
    other_param_names: tuple[str, ...] = ("adaprune_mask", "adaprune_score_scale", "_unpacked", "_configs", "_groups")
    # The input dimension of the weight; `None` where inputs are indices.
    input_dim: int | None = None

    if TYPE_CHECKING:
        bias: torch.Tensor | None

        def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None: ...
        def _cast_input_dtype(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor: ...
        def _get_embed_scale(self) -> torch.Tensor | None: ...

        active_adapters: list[str]
        disable_adapters: bool
        merged: bool

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: AdaPruneConfig,
        groups: Groups | None = None,
        mask_bytes: int | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adaprune_scores = nn.ParameterDict()
        self.adaprune_mask = BufferDict(persistent=True)
        # Unpacked masks of adapters in training. They are newer than the buffer, which is updated when the model
        # is saved and when training ends.
        self._unpacked: dict[str, torch.Tensor] = {}
        self._configs: dict[str, AdaPruneConfig] = {}
        self._groups: dict[str, Groups] = {}
        # The current scale of the scores (`scale_scores`): a scalar, saved with them.
        self.adaprune_score_scale = BufferDict(persistent=True)
        self._cached: CachedWeight | None = None
        self._removed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.cast_input_dtype_enabled = True
        # An embedding's inputs are indices: as in PEFT, its features are the tokens.
        inputs = self.input_dim or 0
        self.in_features, self.out_features = self.base_weight.shape[inputs], self.base_weight.shape[1 - inputs]
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, groups, mask_bytes)
        # Coded masks are decoded on loading: a compiled forward pass could not do it.
        self.register_load_state_dict_post_hook(decode_loaded)

    def update_layer(
        self, adapter_name: str, config: AdaPruneConfig, groups: Groups | None, mask_bytes: int | None
    ) -> None:
        """Add an adapter that keeps every weight, with scores if it is to be trained.

        With `mask_bytes`, the size of a coded mask to be loaded, the mask is only a placeholder until then.
        """
        weight = self.base_weight
        self._configs[adapter_name] = config
        # An earlier adapter of this name may have left these, if the model was wrapped before.
        for former in (self._unpacked, self._groups):
            former.pop(adapter_name, None)
        self._cached = None
        if groups is not None:
            self._groups[adapter_name] = groups
        num_entries = self._mask_shape(adapter_name).numel()
        packed = packed_ones(num_entries) if mask_bytes is None else torch.zeros(mask_bytes, dtype=torch.uint8)
        self.adaprune_mask[adapter_name] = packed.to(weight.device)
        if not config.inference_mode:
            self.adaprune_scores[adapter_name] = nn.Parameter(initial_scores(self.entry_weights(adapter_name), config))
            self.adaprune_score_scale[adapter_name] = torch.ones((), device=weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_base_layer(self) -> Any:
        """Return the base layer, without the failing attribute look-up that PEFT's version does on every call."""
        base: Any = self._modules["base_layer"]
        return super().get_base_layer() if "base_layer" in base._modules else base

    @property
    def base_weight(self) -> torch.Tensor:
        """The base layer's own weight."""
        weight: torch.Tensor = self.get_base_layer().weight
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """The masked weight, for models that read `weight` instead of calling the layer.

        For an embedding it is the base's own weight, which other layers may share.
        """
        return self.base_weight if self.input_dim is None else self.effective_weight()

    def mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask: boolean, of the weight's shape, True = kept."""
        return self.broadcast(adapter_name, self.scored_mask(adapter_name))

    def scored_mask(self, adapter_name: str) -> torch.Tensor:
        """Return the mask in the shape of the scores: one entry per group if groups are masked, or per weight."""
        if adapter_name in self._unpacked:
            return self._unpacked[adapter_name].to(self.base_weight.device)
        return unpack_mask(self.packed_mask(adapter_name), self._mask_shape(adapter_name))

    def packed_mask(self, adapter_name: str) -> torch.Tensor:
        """Return the adapter's mask as packed bits; a coded mask is replaced by its packed bits first.

        Raises:
            AdapterFileError: If the mask was coded with other weights than this layer's.
        """
        stored = self.adaprune_mask[adapter_name]
        if is_coded(stored, self._mask_shape(adapter_name).numel()):
            self.adaprune_mask[adapter_name] = stored = self.decode(adapter_name, stored)
        return stored

    def decode(self, adapter_name: str, stored: torch.Tensor) -> torch.Tensor:
        """Return the packed bits of a stored mask of this layer."""
        if not is_coded(stored, self._mask_shape(adapter_name).numel()):
            return stored
        with torch.inference_mode(False), torch.no_grad():
            return decode_mask(stored, full_tensor(self._unmerged_weight()), self.input_dim)

    def encode(self, adapter_name: str, packed: torch.Tensor) -> torch.Tensor:
        """Return the shortest stored form of a packed mask of this layer."""
        weight = self._unmerged_weight()
        if self.groups(adapter_name) is not None or weight.is_meta or is_sharded([weight]):
            return packed
        return encode_mask(unpack_mask(packed, weight.shape), weight, self.input_dim)

    def accepts(self, adapter_name: str, stored: torch.Tensor) -> bool:
        """Return whether a tensor has the dtype and a shape that the adapter's mask may be stored in."""
        size = packed_size(self._mask_shape(adapter_name).numel())
        shorter = self._configs[adapter_name].mask_codec == AUTO and stored.numel() < size
        return stored.dtype == torch.uint8 and stored.dim() == 1 and (stored.numel() == size or shorter)

    def _unmerged_weight(self) -> torch.Tensor:
        weight = self.base_weight.detach()
        if self._removed:
            weight = weight.clone()
            for pruned, values in reversed(self._removed.values()):
                _put_back(weight, pruned, values)
        return weight

    def groups(self, adapter_name: str) -> Groups | None:
        """Return the groups that the adapter masks as a whole, or `None` if it masks single weights."""
        return self._groups.get(adapter_name)

    def entry_weights(self, adapter_name: str) -> torch.Tensor:
        """Return the weight that each mask entry stands for, or for a group the sum of |w|."""
        groups = self.groups(adapter_name)
        return full_tensor(self.base_weight.detach()) if groups is None else groups.magnitudes()

    def _mask_shape(self, adapter_name: str) -> torch.Size:
        groups = self.groups(adapter_name)
        return self.base_weight.shape if groups is None else groups.shape

    def broadcast(self, adapter_name: str, values: torch.Tensor) -> torch.Tensor:
        """Expand one value per entry of the adapter's mask to one per weight, in the weight's shape."""
        groups = self.groups(adapter_name)
        return values if groups is None else groups.broadcast(values)

    def config(self, adapter_name: str) -> AdaPruneConfig:
        """Return the adapter's configuration."""
        return self._configs[adapter_name]

    def set_mask(self, adapter_name: str, mask: torch.Tensor) -> None:
        """Replace the mask of an adapter in training, given in the shape of the scores (see `scored_mask`)."""
        self._unpacked[adapter_name], self._cached = mask, None

    def pack(self, adapter_name: str) -> None:
        """Replace the mask of an adapter whose training has ended by its packed bits."""
        if adapter_name in self._unpacked:
            self.adaprune_mask[adapter_name] = pack_mask(self._unpacked.pop(adapter_name))

    def pruned_and_total(self, adapter_name: str) -> tuple[int, int]:
        """Return how many weights the mask prunes, and how many it covers, with those of groups in other layers."""
        mask, groups = self.scored_mask(adapter_name), self.groups(adapter_name)
        size = 1 if groups is None else groups.size
        return (mask.numel() - int(mask.count_nonzero())) * size, mask.numel() * size

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Zero the pruned weights in the base layer, and keep their values for `unmerge`."""
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.adaprune_mask:
                continue
            weight, pruned = self.base_weight.data, ~self.mask(name)
            if safe_merge and not torch.isfinite(weight).all():
                raise MergeError("The base has weights that are NaN or infinite: merging would keep them.")
            self._removed[name] = pruned, weight[pruned]
            weight[pruned] = 0
            self.merged_adapters.append(name)
        self._cached = None

    def unmerge(self) -> None:
        """Restore the weights that `merge` zeroed, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            _put_back(self.base_weight.data, *self._removed.pop(self.merged_adapters.pop()))

    def effective_weight(self) -> torch.Tensor:
        """Return the weight times the product of the active masks.

        If gradients are enabled and the weight or an active adapter is trained, the result passes the gradient on to
        them. Otherwise it is built once and reused until a mask or the weight changes; of a change through `.data`,
        PyTorch keeps no record, and it is not noticed.
        """
        if self.merged and self.disable_adapters:
            self.unmerge()
        weight = self.base_weight
        if weight.is_meta and hasattr(self.get_base_layer(), "_hf_hook"):
            raise ConfigError(
                "A masked layer needs its weights in memory, but accelerate has offloaded them: do not offload or "
                "dispatch a model with masks. `hf_adaprune.merged(model)` gives a plain model, which can be."
            )
        if self.merged or self.disable_adapters:
            return weight
        names = self.active_masks
        if torch.is_grad_enabled() and (weight.requires_grad or any(self.is_trained(name) for name in names)):
            self._cached = None
            return self._masked(weight, names)
        if not names:
            return weight
        # A compiled model cannot check whether a cached product is valid: it unpacks its masks in each pass.
        if torch.compiler.is_compiling():
            return self._masked(weight, names)
        if self._cached is None or not self._cached.is_valid(self):
            self._cached = self._cached_product(weight, names)
        return self._cached.product

    def straight_through_inputs(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return scores and mask, in the weight's shape, if one mask alone is active and trained straight-through."""
        if not torch.is_grad_enabled() or self.merged_adapters or self.base_weight.requires_grad:
            return None
        names = self.active_masks
        if len(names) != 1 or not self.is_trained(names[0]) or self._configs[names[0]].estimator != "straight_through":
            return None
        self._cached = None
        return self.broadcast(names[0], self.adaprune_scores[names[0]]), self.mask(names[0])

    def is_trained(self, adapter_name: str) -> bool:
        """Return whether the adapter has scores here that receive a gradient."""
        return adapter_name in self.adaprune_scores and self.adaprune_scores[adapter_name].requires_grad

    @property
    def active_masks(self) -> list[str]:
        """The names of the adapters whose masks are applied, merged or not."""
        names = [] if self.disable_adapters else self.merged_adapters or self.active_adapters
        return [name for name in names if name in self.adaprune_mask]

    def _masked(self, weight: torch.Tensor, names: list[str]) -> torch.Tensor:
        """Multiply a weight by masks; the result passes the gradient on to the scores that are trained."""
        for name in names:
            mask, config = self.mask(name), self._configs[name]
            if not (torch.is_grad_enabled() and self.is_trained(name)):
                weight = apply_mask(weight, mask)
                continue
            scores = self.broadcast(name, self.adaprune_scores[name])
            if config.estimator == "straight_through":
                weight = straight_through(weight, scores, mask)
            else:
                weight = sigmoid_relaxation(
                    weight,
                    scores,
                    mask,
                    backward_temperature=config.backward_temperature,
                    forward_temperature=config.forward_temperature if self.training else None,
                    score_scale=config.score_lr_ratio,
                )
        return weight

    def _cached_product(self, weight: torch.Tensor, names: list[str]) -> CachedWeight:
        # Built outside of inference mode, so that it may take part in a later backward pass.
        with torch.inference_mode(False), torch.no_grad():
            product = self._masked(weight.detach(), names)
        masks = {name: self.adaprune_mask[name] for name in names}
        return CachedWeight(product, weight, self._active_adapter, masks)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._cached = None

    def _get_available_adapters(self) -> set[str]:
        return set(self.adaprune_mask.keys())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Moved but never cast: in half precision, small updates of the scores would be rounded away.
        device = device or self.base_weight.device
        if adapter_name in self.adaprune_mask and device.type != "meta":
            self.adaprune_mask[adapter_name] = self.adaprune_mask[adapter_name].to(device)
        if adapter_name not in self.adaprune_scores or device.type == "meta":
            return
        if self.adaprune_scores[adapter_name].is_meta:
            # The mask has just been loaded under `low_cpu_mem_usage`: an optimizer needs materialized scores.
            remake_scores(self, adapter_name)
        else:
            self.adaprune_scores[adapter_name].data = self.adaprune_scores[adapter_name].data.to(device)
            self.adaprune_score_scale[adapter_name] = self.adaprune_score_scale[adapter_name].to(device)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, mask in self._unpacked.items():
            self.adaprune_mask[name] = pack_mask(mask)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.adaprune_mask:
            stored = state_dict.get(f"{prefix}adaprune_mask.{name}")
            if stored is None:
                continue
            if self.accepts(name, stored):  # otherwise loading fails, and the current mask stays
                self._unpacked.pop(name, None)
                if stored.shape != self.adaprune_mask[name].shape:
                    # The stored form of a mask may be longer or shorter than the buffer.
                    self.adaprune_mask[name] = torch.empty_like(stored, device=self.adaprune_mask[name].device)
            self._cached = None
            self._configs[name].in_memory.masks_loaded = True
            scores_key = f"{prefix}adaprune_scores.{name}"
            self._configs[name].in_memory.scores_loaded = scores_key in state_dict
            if scores_key in state_dict:
                # A training checkpoint: the adapter no longer has to match what was saved.
                self._configs[name].adapter_fingerprint = None
            elif name in self.adaprune_scores:
                # An adapter's file has no scores: the current ones stay until a `Pruner` is created.
                state_dict[scores_key] = self.adaprune_scores[name]
                state_dict[f"{prefix}adaprune_score_scale.{name}"] = self.adaprune_score_scale[name]
        super()._load_from_state_dict(state_dict, prefix, *args)


def _put_back(weight: torch.Tensor, pruned: torch.Tensor, values: torch.Tensor) -> None:
    weight[pruned.to(weight.device)] = values.to(weight)  # the model may have been moved or cast since


def decode_loaded(layer: Any, incompatible_keys: Any = None) -> None:
    """Decode the coded masks of a layer, unless they or the base weight are on the meta device."""
    for name, stored in layer.adaprune_mask.items():
        if not (stored.is_meta or layer.base_weight.is_meta):
            layer.packed_mask(name)
