from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from stofm.align.inputs import Spots
from stofm.align.training import fuse

LEVELS = ("spot", "niche")
Views = dict[str, dict[str, np.ndarray]]


@pytest.fixture
def spots() -> Spots:
    """Two slides whose spots lie in rows; neighbours are in the niche."""
    sizes = (41, 67)
    members = [sparse.diags([1.0] * 3, [-1, 0, 1], shape=(n, n)).tocsr() for n in sizes]
    rows = np.arange(sum(sizes))
    return Spots(rows, [slice(0, 41), slice(41, 108)], ["a", "b"], np.zeros((108, 2)), members)


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def views(rng: np.random.Generator, image_noise: float, genes_noise: float) -> Views:
    """What image and genes say of something that changes slowly along the rows."""
    slow = np.cumsum(rng.normal(size=(108, 5)), axis=0)
    noise = {"image": image_noise, "genes": genes_noise}
    return {
        name: {level: unit(slow + size * rng.normal(size=slow.shape)) for level in LEVELS}
        for name, size in noise.items()
    }


def test_weights_are_those_of_least_squares(rng: np.random.Generator, spots: Spots) -> None:
    given = views(rng, 4.0, 2.0)
    found = fuse(given, spots)
    for part in spots.parts:
        image, genes = (given[name]["spot"][part] for name in ("image", "genes"))
        last = len(genes) - 1
        near = [[k for k in (i - 1, i + 1) if 0 <= k <= last] for i in range(len(genes))]
        around = np.array([genes[own].mean(axis=0) for own in near])
        design = np.stack([(one - one.mean(axis=0)).ravel() for one in (image, genes)], axis=1)
        target = (around - around.mean(axis=0)).ravel()
        weights = np.linalg.lstsq(design, target, rcond=None)[0]
        assert weights.min() > 0
        for level in LEVELS:
            image, genes = (given[name][level][part] for name in ("image", "genes"))
            expected = unit(weights[0] * image + weights[1] * genes)
            np.testing.assert_allclose(found[level][part], expected, atol=1e-5)


@pytest.mark.parametrize("better", ["image", "genes"])
def test_noise_counts_little(rng: np.random.Generator, spots: Spots, better: str) -> None:
    worse = {"image": "genes", "genes": "image"}[better]
    given = views(rng, *((0.0, 40.0) if better == "image" else (40.0, 0.0)))
    for level, both in fuse(given, spots).items():
        near, far = (np.mean(np.sum(both * given[m][level], axis=1)) for m in (better, worse))
        assert near > 0.8 > 0.6 > far


@pytest.mark.parametrize("name", ["image", "genes"])
def test_one_modality_stands_for_itself(rng: np.random.Generator, spots: Spots, name: str) -> None:
    alone = {name: views(rng, 1.0, 1.0)[name]}
    assert fuse(alone, spots) == alone[name]
