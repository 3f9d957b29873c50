"""Masks of whole neurons and heads, and 2:4 masks: models made smaller, and back to an adapter."""
