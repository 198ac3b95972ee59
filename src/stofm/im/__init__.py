"""Images: features of the tissue's image for cells and spots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.im._embed import embed as embed

__getattr__, __dir__, __all__ = lazy(__name__)
