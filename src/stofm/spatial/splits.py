"""Which parts of slices are fitted to, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy.spatial import cKDTree

from stofm.spatial.plane import canonical_order, nearest_neighbors, partition_balanced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: How cells are held out; ``"auto"`` is by slice where there are four or more, else by block.
SplitRule = Literal["auto", "slices", "blocks", "random"]

#: With at least this many slices, a whole one is held out by default: with fewer it would be missed
#: too much in fitting (of two sections of cortex, half of all cells).
_SEVERAL = 4
#: What is held out of a slice is about this many blocks, however few cells it has: a single one
#: would often lie in a single region.
_N_BLOCKS = 4
#: Width of the margin around blocks, in distances between neighbours, and the largest share of the
#: other cells that it may take. Around the small blocks of a small slice it takes many.
_MARGIN = 2.0
_MARGIN_SHARE = 0.25
#: Number of draws where classes are known; the most even one is used.
_N_DRAWS = 16
_N_NEIGHBORS = 6
#: Parts of cells.
_FITTED, _HELD_OUT, _LEFT_OUT, _NOWHERE = range(4)


@dataclass(frozen=True, eq=False)
class Split:
    """Which cells are fitted and which are held out.

    Attributes
    ----------
    how
        ``"slices"``, ``"blocks"`` or ``"random"``.
    fitted, held_out
        Row numbers, ascending.
    left_out
        Row numbers of cells in neither: the margin around held-out blocks.
    slices
        Numbers of the slices that are held out as a whole, except for moved cells.
    params
        The request: share, seed.
    moved
        Row numbers of cells that are fitted only because no other cell of their class would be.
    """

    how: str
    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    left_out: NDArray[np.int64]
    slices: tuple[int, ...]
    params: dict[str, Any]
    moved: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def record(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """The record of a split: rule, parameters, numbers of cells, held-out slices."""
        parts = {
            "n_fitted": self.fitted,
            "n_held_out": self.held_out,
            "n_left_out": self.left_out,
            "n_moved": self.moved,
        }
        return {
            "how": self.how,
            **self.params,
            **{name: len(rows) for name, rows in parts.items()},
            "held_out_slices": [str(k) if names is None else names[k] for k in self.slices],
        }


def split_cells(
    coordinates: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
    *,
    how: SplitRule = "auto",
    share: float = 0.1,
    classes: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> Split:
    """Hold out a part of the cells, so that scores on it say something about new tissue.

    Neighbours resemble each other and see each other in their embeddings. Cells held out at random
    lie among those that are fitted, so scores on them are too good; whole slices or blocks of the
    plane are more honest. The order of the rows does not matter, except for cells at the same
    position.

    Parameters
    ----------
    coordinates
        (n, 2), any unit.
    slices
        Rows of each slice. Rows that are in none of them belong to no part.
    how
        ``"auto"``: ``"slices"`` if there are at least four, and each class has cells outside those
        held out; else ``"blocks"``. ``"slices"``: whole slices, at least one. ``"blocks"``: about
        four compact blocks spread over each slice, apart from the rest by a margin of twice the
        distance between neighbours, or less in a small slice, so that no more than about a quarter
        of the other cells are left out. ``"random"``: single cells, as in the paper.
    share
        Share of the cells, or slices, to hold out.
    classes
        (n,) class of each row, from 0. With them, slices and blocks are the best of several draws:
        held-out slices leave cells of each class to fit if possible, and held-out blocks have about
        the classes of their slice. Cells of a class that would otherwise have none to fit are
        fitted after all, and held-out cells within their margin are left out.
    seed
        Seed of the draws.

    Raises
    ------
    ValueError
        `how` or `share` is not valid, or whole slices are requested and there is only one, or none
        whose classes also occur in others.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, which holds cells out at random.
    """
    if how not in get_args(SplitRule):
        raise ValueError(f"how must be one of {get_args(SplitRule)}, found {how!r}.")
    if not 0 < share < 1:
        raise ValueError(f"share must be between 0 and 1, found {share!r}.")
    rng = np.random.default_rng(seed)
    xy = np.asarray(coordinates, dtype=np.float64)
    classes = np.zeros(len(xy), dtype=np.int64) if classes is None else classes
    rule = ("slices" if len(slices) >= _SEVERAL else "blocks") if how == "auto" else how
    part = _draw(rule, xy, slices, classes, share, rng)
    if how == "auto" and rule == "slices" and len(_lost(part, classes)):
        rule = "blocks"
        part = _draw(rule, xy, slices, classes, share, rng)
    chosen = [k for k, rows in enumerate(slices) if (part[rows] == _HELD_OUT).all()]
    # Each class has cells to fit; those near them are left out, except with random cells.
    is_moved = (part != _NOWHERE) & np.isin(classes, _lost(part, classes))
    part[is_moved] = _FITTED
    for rows in slices if rule != "random" else ():
        others = np.flatnonzero(part[rows] == _HELD_OUT)
        if len(others) and is_moved[rows].any():
            part[rows[others[_is_near(xy[rows], is_moved[rows], others)]]] = _LEFT_OUT
    if rule == "slices" and not (part == _HELD_OUT).any():
        raise ValueError(
            "how='slices' holds nothing out: each slice has classes of its own; use 'blocks'."
        )
    return Split(
        rule,
        fitted=np.flatnonzero(part == _FITTED),
        held_out=np.flatnonzero(part == _HELD_OUT),
        left_out=np.flatnonzero(part == _LEFT_OUT),
        slices=tuple(chosen) if rule == "slices" else (),
        params={"share": share, "seed": int(seed)},
        moved=np.flatnonzero(is_moved),
    )


def leave_out_blocks(
    coordinates: NDArray[np.floating], n_blocks: int
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Cut a slice into compact blocks; each is held out once, with a margin around it.

    Blocks hold nearly equal numbers of cells; a slice of fewer cells has fewer. For each block the
    rows to fit and its own rows are returned, ascending; cells within the margin are in neither, as
    in :func:`split_cells`. The order of the rows does not matter, except for cells at the same
    position.
    """
    xy = np.asarray(coordinates, dtype=np.float64)
    order = canonical_order(xy, xy)
    folds = []
    for block in partition_balanced(xy[order], -(-len(xy) // n_blocks)):
        is_own = np.zeros(len(xy), dtype=bool)
        is_own[order[block]] = True
        others = np.flatnonzero(~is_own)
        fitted = others[~_is_near(xy, is_own, others)]
        folds.append((fitted, np.flatnonzero(is_own)))
    return folds


def _draw(
    how: str,
    xy: NDArray[np.float64],
    slices: Sequence[NDArray[np.int64]],
    classes: NDArray[np.int64],
    share: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Part of each cell."""
    part = np.full(len(xy), _NOWHERE)
    for rows in slices:
        part[rows] = _FITTED
    if how == "slices":
        for k in _choose_slices([classes[rows] for rows in slices], share, rng):
            part[slices[k]] = _HELD_OUT
        return part
    for rows in slices:
        ordered = rows[canonical_order(xy[rows], xy[rows])]
        if how == "random":
            part[rng.permutation(ordered)[: round(share * len(rows))]] = _HELD_OUT
        else:
            part[ordered] = _block_parts(xy[ordered], share, classes[ordered], rng)
    return part


def _lost(part: NDArray[np.int64], classes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Classes of which no cell is fitted."""
    return np.setdiff1d(classes[part != _NOWHERE], classes[part == _FITTED])


def _choose_slices(
    kinds: Sequence[NDArray[np.int64]], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Among several draws of slices, whose classes are given, the first that leaves most to fit."""
    n_slices = len(kinds)
    if n_slices < 2:
        raise ValueError("how='slices' needs at least two slices, found one; use how='blocks'.")
    n_chosen = min(max(1, round(share * n_slices)), n_slices - 1)
    draws = [rng.permutation(n_slices)[:n_chosen] for _ in range(_N_DRAWS)]

    def n_fitted_classes(draw: NDArray[np.int64]) -> int:
        kept = [own for k, own in enumerate(kinds) if k not in draw]
        return len(np.unique(np.concatenate(kept)))

    return max(draws, key=n_fitted_classes)


def _block_parts(
    xy: NDArray[np.float64],
    share: float,
    classes: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Part of each cell of a slice, whose positions and classes are in canonical order.

    Of several draws, the one whose shares of classes differ least from those of all cells is used.
    """
    part = np.full(len(xy), _FITTED)
    n_wanted = round(share * len(xy))
    if n_wanted == 0:
        return part
    blocks = partition_balanced(xy, -(-n_wanted // min(_N_BLOCKS, n_wanted)))
    n_chosen = max(1, round(n_wanted * len(blocks) / len(xy)))
    # Consecutive blocks lie side by side: taking one of each stretch spreads them over the slice.
    stretches = np.array_split(np.arange(len(blocks)), n_chosen)
    draws = [[rng.choice(stretch) for stretch in stretches] for _ in range(_N_DRAWS)]
    n_classes = int(classes.max()) + 1
    shares = np.bincount(classes, minlength=n_classes) / len(classes)

    def unlikeness(rows: NDArray[np.int64]) -> float:
        own = np.bincount(classes[rows], minlength=n_classes) / len(rows)
        return float(np.abs(own - shares).sum())

    held_out = [np.concatenate([blocks[k] for k in draw]) for draw in draws]
    part[min(held_out, key=unlikeness)] = _HELD_OUT
    others = np.flatnonzero(part == _FITTED)
    part[others[_is_near(xy, part == _HELD_OUT, others)]] = _LEFT_OUT
    return part


def _is_near(
    xy: NDArray[np.float64], are_sources: NDArray[np.bool_], others: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether `others`, rows of `xy`, lie within the margin of the sources."""
    if not len(others):
        return np.zeros(0, dtype=bool)
    distance, _ = cKDTree(xy[are_sources]).query(xy[others])
    # Between neighbours lies the median over the cells of the mean distance to six of them.
    _, distances = nearest_neighbors(xy, _N_NEIGHBORS + 1)
    spacing = float(np.median(distances[:, 1:].mean(axis=1)))
    nearest = np.quantile(distance, _MARGIN_SHARE, method="lower")
    return np.asarray(distance <= min(_MARGIN * spacing, float(nearest)))
