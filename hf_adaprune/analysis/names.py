"""What a module's name tells: its layer, and what it is there."""

from __future__ import annotations

import re


def layer_of(name: str) -> str:
    """Return the number of the layer that a module is in (`"decoder 3"` in a decoder), or else `"embeddings"`."""
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        return "embeddings"
    return f"decoder {number[1]}" if "decoder" in name[: number.start()].split(".") else number[1]


def component_of(name: str) -> str:
    """Return what a module is in its layer, `"attention.self.query"`, say; its own name outside of the layers."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def in_order(names: list[str]) -> list[str]:
    """Sort names as a reader would: layer 10 comes after layer 9."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
