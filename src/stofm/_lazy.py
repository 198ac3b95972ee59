"""Packages whose names are imported when they are first used."""

from __future__ import annotations

import ast
import contextlib
import importlib
import random
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def lazy(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` of a package with imports for type checkers.

    What these import, a module of the package or a name from its home, is imported when it is used.
    The state of Python's random numbers stays, whatever is imported.
    """
    source = ast.parse(Path(str(sys.modules[package].__file__)).read_text("utf-8"))
    checked = [line for block in source.body if isinstance(block, ast.If) for line in block.body]
    imports = [line for line in checked if isinstance(line, ast.ImportFrom)]
    homes = {alias.name: str(line.module) for line in imports for alias in line.names}

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        state = random.getstate()
        try:
            # It draws a number when it is imported, and scikit-learn imports it, within calls of ours.
            with contextlib.suppress(ImportError):
                importlib.import_module("rich.style")
            is_module = homes[name] == package
            module = importlib.import_module(f"{package}.{name}" if is_module else homes[name])
        finally:
            random.setstate(state)
        value = module if is_module else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    names = sorted(homes)
    return load, lambda: names, names
