"""Adapters on disk: what is written, in which order, and what is checked when an adapter is opened."""
