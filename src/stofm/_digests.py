"""Fingerprints: what a step read, in a few digits that tell whether it still fits."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def fingerprint(*parts: str | bytes | NDArray[Any]) -> str:
    """Return 16 hexadecimal digits over texts, bytes and the entries of arrays, in order."""
    hashed = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            part = part.encode()
        hashed.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).data)
    return hashed.hexdigest()
