"""How far edits move cells, and the tables that users get."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.perturb.goal import Goal
    from stofm.perturb.runs import Embedded


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
