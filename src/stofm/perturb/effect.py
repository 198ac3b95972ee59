"""How far edits move cells, the test against similar random ones, and the tables that users get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.spatial import cKDTree
from scipy.stats import false_discovery_control

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.perturb.engine import Embedded
    from stofm.perturb.reading import Goal


@dataclass(frozen=True, eq=False, kw_only=True)
class PerturbationEffect:
    """Effect of an edit on embeddings: the model's sensitivity, not a biological effect size.

    Attributes
    ----------
    cells
        A row for each cell, in the order of the AnnData. ``role``: ``"edited"``; ``"neighbor"``,
        not edited, with an edited cell among the model's number of nearest cells; ``"far"``;
        ``"out_of_reach"``, in sub-slices without edited cells, which are not computed: the shift is
        0; ``"not_in_input"``, selected, but its input lacks the genes, so that its shift is NaN; or
        ``"removed"``. ``distance``, to the nearest edited cell, in the unit of the coordinates.
        ``cosine`` and ``l2``, cosine and Euclidean distance of the embedding after the edit from
        that before. ``towards``, with a goal: how much nearer the embedding is to the goal's mean,
        or how much likelier the goal's class.
    genes
        A row for each edited gene, edited on its own. ``edit``; ``status``, ``"tested"`` or
        ``"not_in_input"``; ``effect``, mean of ``towards`` with a goal, else of ``l2``, over the
        receivers; ``null_mean`` and ``null_std``, of the effects of ``n_null`` other genes; ``z``;
        ``p``; ``fdr``; and ``n_cells``, selected cells in whose input it is.
    overall
        The same for the edit as a whole, without ``fdr``; ``n_edited`` cells, ``n_receivers``.
    params
        The request, and the model.
    """

    cells: pd.DataFrame
    genes: pd.DataFrame
    overall: dict[str, float]
    params: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        """The test of the whole edit."""
        said = ", ".join(f"{name}={value:.4g}" for name, value in self.overall.items())
        return f"PerturbationEffect({said}; see .cells and .genes)"


def shifts(
    before: NDArray[np.float32], after: NDArray[np.float32], goal: Goal | None
) -> dict[str, NDArray[np.float64]]:
    """How far cells moved, (m,), by columns of :attr:`PerturbationEffect.cells`.

    `before` and `after` are (m, d_embedding). Effects are means of the last column.
    """
    is_moved = (before != after).any(axis=1)
    old, new = before.astype(np.float64), after.astype(np.float64)
    norms = np.linalg.norm(old, axis=1) * np.linalg.norm(new, axis=1)
    products = (old * new).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    found = {
        "cosine": np.where(is_moved, np.maximum(1.0 - products, 0.0), 0.0),
        "l2": np.linalg.norm(new - old, axis=1),
    }
    return found if goal is None else found | {"towards": goal(new) - goal(old)}


def mean_effects(
    embedded: Iterable[Embedded], receivers: Sequence[NDArray[np.int64]], goal: Goal | None
) -> NDArray[np.float64]:
    """Mean shift of the receivers of each edit; NaN without any.

    `receivers` are rows, ascending. Receivers that an edit does not reach do not move.
    """
    sums = np.zeros(len(receivers))
    for one in embedded:
        is_meant = np.isin(one.rows, receivers[one.edit], assume_unique=True)
        if is_meant.any():
            *_, measured = shifts(one.before[is_meant], one.after[is_meant], goal).values()
            sums[one.edit] += measured.sum()
    sizes = np.array([len(rows) for rows in receivers])
    found: NDArray[np.float64] = np.where(sizes > 0, sums / np.maximum(sizes, 1), np.nan)
    return found


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
