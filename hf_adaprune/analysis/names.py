"""Derive a module's layer and component from its name."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar


Named = TypeVar("Named", bound=Any)


def layer_of(name: str) -> str:
    """Return the number of a module's layer (`"decoder 3"` in a decoder), or `"embeddings"` outside of layers."""
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        return "embeddings"
    return f"decoder {number[1]}" if "decoder" in name[: number.start()].split(".") else number[1]


def component_of(name: str) -> str:
    """Return a module's name within its layer, such as `"attention.self.query"`; outside of layers, its full name."""
    return re.split(r"\.\d+\.", name, maxsplit=1)[-1]


def grouped(modules: Iterable[Named], key: Callable[[str], str]) -> dict[str, list[Named]]:
    """Group objects that have a module's name by a function of that name, such as `layer_of`."""
    groups: dict[str, list[Named]] = defaultdict(list)
    for module in modules:
        groups[key(module.name)].append(module)
    return groups


def in_order(names: list[str]) -> list[str]:
    """Sort names in natural order: layer 10 comes after layer 9."""
    return sorted(names, key=lambda name: re.sub(r"\d+", lambda number: number[0].zfill(9), name))
