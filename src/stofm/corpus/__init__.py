"""Thousands of slices in a folder that is read without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.corpus._build import build
    from stofm.corpus._embed import embed
    from stofm.corpus._upkeep import check, export, info

__all__ = ["build", "check", "embed", "export", "info"]

__getattr__ = lazy(
    "stofm.corpus",
    {name: f"stofm.corpus._{name}" for name in ("build", "embed")}
    | dict.fromkeys(("check", "export", "info"), "stofm.corpus._upkeep"),
)


def __dir__() -> list[str]:
    return __all__
