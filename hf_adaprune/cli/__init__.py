"""`hf-adaprune`: the command line, a thin layer over the library."""

from .app import app


__all__ = ["app"]
