from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stofm.align.training import fuse


def test_the_image_counts_as_far_as_it_agrees(rng: np.random.Generator) -> None:
    spots: Any = SimpleNamespace(parts=[slice(0, 5), slice(5, 12)])
    views = {}
    for name in ("image", "genes"):
        values = rng.normal(size=(2, 12, 3))
        values /= np.linalg.norm(values, axis=2, keepdims=True)
        views[name] = dict(zip(("spot", "niche"), values, strict=True))
    # On one slide they agree, on the other they say the opposite.
    for level in ("spot", "niche"):
        views["image"][level][:5] += 2 * views["genes"][level][:5]
        views["image"][level][5:] -= 3 * views["genes"][level][5:]
        views["image"][level] /= np.linalg.norm(views["image"][level], axis=1, keepdims=True)
    found = fuse(views, spots)
    for level, both in found.items():
        image, genes = views["image"][level], views["genes"][level]
        agreement = np.mean([float(image[i] @ genes[i]) for i in range(5)])
        for i in range(5):
            expected = genes[i] + agreement * image[i]
            np.testing.assert_allclose(both[i], expected / np.linalg.norm(expected))
        np.testing.assert_allclose(both[5:], genes[5:])


@pytest.mark.parametrize("name", ["image", "genes"])
def test_one_modality_stands_for_itself(rng: np.random.Generator, name: str) -> None:
    views = {name: {level: rng.normal(size=(4, 3)) for level in ("spot", "niche")}}
    assert fuse(views, SimpleNamespace(parts=[slice(0, 4)])) == views[name]  # type: ignore[arg-type]
