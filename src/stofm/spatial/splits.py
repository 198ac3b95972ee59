"""Parts of slices to fit to and to hold out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from scipy.spatial import cKDTree

from stofm.spatial.coordinates import canonical_order
from stofm.spatial.neighbor_graph import nearest_neighbors
from stofm.spatial.partition import partition_balanced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: How cells are held out; ``"auto"`` is by slice where there are four or more, else by block.
SplitRule = Literal["auto", "slices", "blocks", "random"]

#: From so many slices on, a whole one is held out by default: with fewer it would be missed too much
#: in fitting (of two sections of cortex, half of all cells).
_SEVERAL = 4
#: What is held out of a slice is at most this many blocks, each of at least so many cells.
_N_BLOCKS = 4
_LEAST_BLOCK = 50
#: Width of the margin around blocks, in distances between neighbours.
_MARGIN = 2.0
_N_NEIGHBORS = 6


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
        Numbers of the slices that are held out as a whole.
    params
        What was asked for: share, margin, seed.
    """

    how: str
    fitted: NDArray[np.int64]
    held_out: NDArray[np.int64]
    left_out: NDArray[np.int64]
    slices: tuple[int, ...]
    params: dict[str, Any]

    def record(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """What is written down of a split: rule, parameters, numbers of cells, held-out slices."""
        return {
            "how": self.how,
            **self.params,
            "n_fitted": len(self.fitted),
            "n_held_out": len(self.held_out),
            "n_left_out": len(self.left_out),
            "held_out_slices": [str(k) if names is None else names[k] for k in self.slices],
        }


def split_cells(
    coordinates: NDArray[np.floating],
    slices: Sequence[NDArray[np.int64]],
    *,
    how: SplitRule = "auto",
    share: float = 0.1,
    margin: float | None = None,
    seed: int = 0,
) -> Split:
    """Hold out a part of the cells, so that scores on it say something about new tissue.

    Neighbours resemble each other and see each other in their embeddings. Cells held out at random
    lie among those that are fitted, and scores on them are too good; whole slices or blocks of the
    plane are more honest. The order of the rows does not matter, but for cells at one place.

    Parameters
    ----------
    coordinates
        (n, 2), any unit.
    slices
        Rows of each slice. Rows of none of them are in no part.
    how
        ``"auto"``: ``"slices"`` if there are at least four, else ``"blocks"``. ``"slices"``: whole
        slices, at least one. ``"blocks"``: about four compact blocks of each slice, apart from the
        rest by a margin. ``"random"``: single cells, as in the paper.
    share
        Share of the cells, or slices, to hold out.
    margin
        Distance from held-out blocks within which cells are left out, in the unit of the
        coordinates; by default twice that between neighbours.
    seed
        Seed of the draws.

    Raises
    ------
    ValueError
        `how` or `share` is not usable, or whole slices are asked for and there is only one.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, which holds cells out at random.
    """
    if how not in get_args(SplitRule):
        msg = f"how must be one of {get_args(SplitRule)}, found {how!r}."
        raise ValueError(msg)
    if not 0 < share < 1:
        msg = f"share must be between 0 and 1, found {share!r}."
        raise ValueError(msg)
    if how == "auto":
        how = "slices" if len(slices) >= _SEVERAL else "blocks"
    rng = np.random.default_rng(seed)
    params = {"share": share, "margin": margin if how == "blocks" else None, "seed": seed}
    empty = np.empty(0, dtype=np.int64)
    if how == "slices":
        chosen = _choose_slices(len(slices), share, rng)
        kept = [rows for k, rows in enumerate(slices) if k not in chosen]
        held_out = [slices[k] for k in chosen]
        return Split(how, _joined(kept), _joined(held_out), empty, chosen, params)
    parts = []
    for rows in slices:
        xy = np.asarray(coordinates[rows], dtype=np.float64)
        order = canonical_order(xy, xy)
        if how == "random":
            part = np.zeros(len(rows), dtype=np.int64)
            part[order[rng.permutation(len(rows))[: round(share * len(rows))]]] = 1
        else:
            part = np.empty(len(rows), dtype=np.int64)
            part[order] = _block_parts(xy[order], share, margin, rng)
        parts.append(part)
    every, part = _joined(list(slices), sort=False), _joined(parts, sort=False)
    fitted, held_out_rows, left_out = (np.sort(every[part == k]) for k in range(3))
    return Split(how, fitted, held_out_rows, left_out, (), params)


def _joined(parts: list[NDArray[np.int64]], *, sort: bool = True) -> NDArray[np.int64]:
    rows = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
    return np.sort(rows) if sort else rows


def _choose_slices(n_slices: int, share: float, rng: np.random.Generator) -> tuple[int, ...]:
    if n_slices < 2:
        msg = "how='slices' needs at least two slices, found one; use how='blocks'."
        raise ValueError(msg)
    n_chosen = min(max(1, round(share * n_slices)), n_slices - 1)
    return tuple(sorted(int(k) for k in rng.permutation(n_slices)[:n_chosen]))


def _block_parts(
    xy: NDArray[np.float64], share: float, margin: float | None, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Part of each cell of a slice: 0 to fit, 1 to hold out, 2 to leave out.

    Parameters
    ----------
    xy
        (n, 2) in canonical order.
    """
    part = np.zeros(len(xy), dtype=np.int64)
    n_wanted = round(share * len(xy))
    if n_wanted == 0:
        return part
    n_blocks = min(max(n_wanted // _LEAST_BLOCK, 1), _N_BLOCKS)
    blocks = partition_balanced(xy, -(-n_wanted // n_blocks))
    n_held_out = 0
    for k in rng.permutation(len(blocks)):
        if n_held_out + len(blocks[k]) // 2 >= n_wanted and n_held_out:
            break
        part[blocks[k]] = 1
        n_held_out += len(blocks[k])
    width = _MARGIN * _spacing(xy) if margin is None else margin
    distance, _ = cKDTree(xy[part == 1]).query(xy)
    part[(part == 0) & (distance <= width)] = 2
    return part


def _spacing(xy: NDArray[np.float64]) -> float:
    """Median over the cells of the mean distance to six neighbours."""
    _, distances = nearest_neighbors(xy, min(_N_NEIGHBORS + 1, len(xy)))
    return float(np.median(distances[:, 1:].mean(axis=1))) if len(xy) > 1 else 0.0
