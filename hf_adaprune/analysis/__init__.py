"""Analyse masks: functions return plain data, and those whose names begin with `plot` draw it."""

from .heads import Heads, attention_heads, plot_heads
from .magnitude import magnitude_masks
from .neurons import Degrees, neuron_degrees, plot_degrees
from .overlap import Overlap, OverlapReport, mask_overlap, pairwise_overlap, plot_overlap
from .recovery import Recovery, RecoveryCallback
from .sources import Masks, load_masks, model_masks, model_weights
from .sparsity import ModuleSparsity, SparsityReport, plot_sparsity, sparsity_report
from .spectrum import Spectrum, mask_spectrum, plot_spectrum


__all__ = [
    "Degrees",
    "Heads",
    "Masks",
    "ModuleSparsity",
    "Overlap",
    "OverlapReport",
    "Recovery",
    "RecoveryCallback",
    "SparsityReport",
    "Spectrum",
    "attention_heads",
    "load_masks",
    "magnitude_masks",
    "mask_overlap",
    "mask_spectrum",
    "model_masks",
    "model_weights",
    "neuron_degrees",
    "pairwise_overlap",
    "plot_degrees",
    "plot_heads",
    "plot_overlap",
    "plot_sparsity",
    "plot_spectrum",
    "sparsity_report",
]
