"""Random genes and cells like the edited ones, and the test against them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Number of cells among which one like an edited cell is drawn, and number of tries.
_CHOICES: Final = 50
_ROUNDS: Final = 20


def like(own: NDArray[np.floating], others: NDArray[np.floating], n: int) -> NDArray[np.int64]:
    """Numbers of the `n` others (m, 2) nearest to a detection and mean (2,), both standardised."""
    scale = np.std(others, axis=0)
    gaps = ((others - own) / np.where(scale > 0, scale, 1.0)) ** 2
    return np.argsort(gaps.sum(axis=1), kind="stable")[:n]


def draw_like(
    own: NDArray[np.floating], others: NDArray[np.floating], rng: np.random.Generator
) -> NDArray[np.int64]:
    """Numbers of as many different others (m, 2) as there are own (k, 2), each drawn from those like one.

    There must be enough. If none of the similar ones is left, one is drawn from all that are.
    """
    scale = np.std(others, axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    k = min(_CHOICES, len(others))
    choices = cKDTree(others / scale).query(own / scale, k=np.arange(1, k + 1))[1]
    drawn = np.full(len(own), -1)
    is_free = np.ones(len(others), dtype=bool)
    for _ in range(_ROUNDS):
        open_ = np.flatnonzero(drawn < 0)
        wanted = choices[open_, rng.integers(k, size=len(open_))]
        first = np.unique(wanted, return_index=True)[1]
        first = first[is_free[wanted[first]]]
        drawn[open_[first]] = wanted[first]
        is_free[wanted[first]] = False
    left = np.flatnonzero(drawn < 0)
    drawn[left] = rng.permutation(np.flatnonzero(is_free))[: len(left)]
    return drawn


def compare(effect: float, null: NDArray[np.floating]) -> dict[str, float]:
    """Test an effect against those of a null (n,), which may be empty.

    The p value is empirical, (1 + number of null effects at least as large) / (1 + n); z is the
    effect in standard deviations of the null above its mean.
    """
    null = null[np.isfinite(null)]
    if not len(null) or not np.isfinite(effect):
        none = dict.fromkeys(("null_mean", "null_std", "z", "p"), np.nan)
        return {"effect": effect, **none, "n_null": len(null)}
    mean, std = float(null.mean()), float(null.std())
    return {
        "effect": effect,
        "null_mean": mean,
        "null_std": std,
        "z": (effect - mean) / std if std > 0 else np.nan,
        "p": (1 + int((null >= effect).sum())) / (1 + len(null)),
        "n_null": len(null),
    }


def adjusted(p: NDArray[np.floating]) -> NDArray[np.float64]:
    """False discovery rates by Benjamini and Hochberg; NaN where there is no p."""
    found = np.full(len(p), np.nan)
    is_there = np.isfinite(p)
    if is_there.any():
        found[is_there] = false_discovery_control(p[is_there])
    return found
