"""Stored adapters: which tensors are saved, what is checked when an adapter is opened, and how one is read."""
