"""Thousands of slices in a folder that is read without loading it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.corpus._build import build as build
    from stofm.corpus._embed import embed as embed
    from stofm.corpus._upkeep import check as check
    from stofm.corpus._upkeep import export as export
    from stofm.corpus._upkeep import info as info

__getattr__, __dir__, __all__ = lazy(__name__)
