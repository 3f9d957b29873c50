"""What masks look like: plain data from here, pictures from the functions whose names begin with `plot`."""

from .sparsity import ModuleSparsity, SparsityReport, plot_sparsity, sparsity_report


__all__ = ["ModuleSparsity", "SparsityReport", "plot_sparsity", "sparsity_report"]
