"""What differs from an unedited slice, and which sub-slices it changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.perturb.engine import UneditedSlice


def _no_cells() -> NDArray[np.int64]:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Detached:
    """Pairs of cells that don't see each other, in attention and in means over neighbours."""

    senders: NDArray[np.bool_]  # (n,) which cells are hidden
    #: (n,) which cells they are hidden from; None for all nodes, virtual cells among them. A cell always
    #: reads itself.
    receivers: NDArray[np.bool_] | None = None
    #: Pairs that are farther apart stay, in the unit of the coordinates. Finite, it leaves virtual
    #: cells as they are, which lie nowhere near.
    reach: float = np.inf


@dataclass(frozen=True, eq=False, kw_only=True)
class Edit:
    """How a slice differs from the unedited one: not at all by default."""

    #: Rows that are edited and not removed; with `tokens`, those whose tokens change.
    cells: NDArray[np.int64] = field(default_factory=_no_cells)
    #: Gives the new tokens of some of `cells`, in their order. It is called once for each sub-slice,
    #: so that the tokens of many edits are never in memory together.
    tokens: Callable[[NDArray[np.int64]], RankedTokens] | None = None
    removed: NDArray[np.int64] = field(default_factory=_no_cells)  # rows that are taken away
    #: (n, 2) of all cells, in the unit of the unedited ones. A cell that moves joins the sub-slice
    #: of the cell whose unedited position is nearest.
    coordinates: NDArray[np.float64] | None = None
    detached: Detached | None = None

    @property
    def edited(self) -> NDArray[np.int64]:
        """Rows of all edited cells."""
        return np.union1d(self.cells, self.removed)


@dataclass(frozen=True, eq=False)
class PlacedEdit:
    """An edit of a slice, in the frame of its layout.

    `before` and `after` (n,) are the sub-slices of the cells, -1 for none; `displaced` are the rows of
    cells that move or are removed; `coordinates` (n, 2) are those of the layout's frame.
    """

    edit: Edit
    before: NDArray[np.int64]
    after: NDArray[np.int64]
    displaced: NDArray[np.int64]
    coordinates: NDArray[np.float64]

    @classmethod
    def of(cls, edit: Edit, whole: UneditedSlice) -> PlacedEdit:
        """Find which cells an edit moves, and to which sub-slice."""
        before, coordinates = whole.layout.subslice, whole.layout.coordinates
        moved = _no_cells()
        if edit.coordinates is not None:
            moved = np.flatnonzero((edit.coordinates != whole.coordinates).any(axis=1))
        displaced = np.concatenate([edit.removed, moved]).astype(np.int64)
        if not len(displaced):
            return cls(edit, before, before, displaced, coordinates)
        after = before.copy()
        if edit.coordinates is not None and len(moved):
            after[moved] = before[cKDTree(whole.coordinates).query(edit.coordinates[moved])[1]]
            coordinates = coordinates.copy()
            coordinates[moved] = whole.in_frame(edit.coordinates[moved])
        after[edit.removed] = -1
        return cls(edit, before, after, displaced, coordinates)

    def cells_in(self, k: int) -> NDArray[np.int64]:
        """Cells with changed tokens that are in a sub-slice after the edit."""
        if self.edit.tokens is None:
            return _no_cells()
        found: NDArray[np.int64] = self.edit.cells[self.after[self.edit.cells] == k]
        return found

    def changes_nodes(self, k: int) -> bool:
        """Whether nodes of a sub-slice come, go or move."""
        there = (one[self.displaced] == k for one in (self.before, self.after))
        return any(map(np.any, there))

    def touches(self, k: int) -> bool:
        """Whether the edit may change the input of a sub-slice that has cells after it."""
        changes = self.changes_nodes(k) or len(self.cells_in(k)) > 0
        if (detached := self.edit.detached) is not None:
            changes = changes or bool(detached.senders[self.after == k].any())
        return changes and bool((self.after == k).any())
