"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """``__getattr__`` of a package: imports a module of it, or a name from its home.

    torch, scanpy and transformers take seconds to import; they wait for the first use.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        state = random.getstate()
        try:
            # It draws a number when it is imported, and scikit-learn imports it, within calls of ours.
            with contextlib.suppress(ImportError):
                importlib.import_module("rich.style")
            module = importlib.import_module(homes[name])
        finally:
            random.setstate(state)
        value = module if homes[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    return load
