"""Images: features of the tissue's image for cells and spots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._lazy import lazy

if TYPE_CHECKING:
    from stofm.im._embed import embed

__all__ = ["embed"]

__getattr__ = lazy("stofm.im", {"embed": "stofm.im._embed"})


def __dir__() -> list[str]:
    return __all__
