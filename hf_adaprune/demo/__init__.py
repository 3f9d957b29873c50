"""Everything a demonstration needs that is not the method itself."""
