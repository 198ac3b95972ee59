"""Which cells heads are fitted, validated and tested on: one split, or the runs of a protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._logging import logger
from stofm.heads.options import PROTOCOLS, check_choice
from stofm.spatial import Split, split_cells

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.heads.options import Protocol
    from stofm.heads.sections import Sections
    from stofm.spatial.splits import SplitRule

_N_RUNS = 3
_TESTED_SHARE = 0.2
_VALIDATED_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Run:
    """The parts of the cells in one fit.

    Attributes
    ----------
    seed
        Seed of the fit.
    split
        Rows to fit and to hold out.
    test
        Rows that take no part; empty without a protocol.
    """

    seed: int
    split: Split
    test: NDArray[np.int64]

    def record(
        self, sections: Sections, is_known: NDArray[np.bool_], protocol: Protocol | None
    ) -> dict[str, Any]:
        """What is written down of the parts; `is_known` as in :func:`plan_runs`."""
        slices = zip(sections.slices.names, sections.slices.rows, strict=True)
        names = [name for name, rows in slices if is_known[rows].any()]
        return {**self.split.record(names), "protocol": protocol or "", "n_test": len(self.test)}


def plan_runs(
    sections: Sections,
    is_known: NDArray[np.bool_],
    features: NDArray[np.float32],
    *,
    split: SplitRule = "auto",
    protocol: Protocol | None = None,
    classes: NDArray[np.int64] | None = None,
    spatial_key: str,
    seed: int,
) -> list[Run]:
    """Split the cells of which something is known: once, or for each run of a protocol.

    Parameters
    ----------
    sections
        The cells and their slices.
    is_known
        (n_obs,) cells to split.
    features
        (n_obs, d) representations, which tell cells apart where there are no coordinates.
    split
        As in :func:`stofm.spatial.split_cells`. Without coordinates ``"auto"`` is by slice, or
        random if there is only one. Not read with a protocol, which has its own.
    protocol
        Name of a protocol; its runs have the seeds `seed`, `seed` + 1 and so on.
    classes
        (n_obs,) class of each cell, -1 for none. Each has cells to fit in each run, and the parts
        are drawn to be like one another.
    spatial_key
        Entry of ``obsm`` with coordinates.
    seed
        Seed of the draws.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    own = [rows[is_known[rows]] for rows in sections.slices.rows]
    slices = [rows for rows in own if len(rows)]
    if protocol is None and split == "slices" and len(slices) < 2:
        msg = (
            f"split='slices' holds out whole slices, and {len(slices)} of the {len(own)} slices has "
            "cells to learn from; use split='blocks'."
        )
        raise ValueError(msg)
    has_places = sections.has_coordinates(spatial_key)
    if has_places or (split == "blocks" and protocol is None):
        places = sections.coordinates(spatial_key)
    else:
        places = features[:, [0, -1]].astype(np.float64)
    if protocol is not None:
        return [_paper_run(places, slices, classes, seed + k) for k in range(_N_RUNS)]
    if split == "auto" and not has_places:
        split = "slices" if len(slices) > 1 else "random"
        logger.info("There is no obsm[%r]: the split is %r.", spatial_key, split)
    parts = split_cells(
        places, slices, how=split, share=_VALIDATED_SHARE, classes=classes, seed=seed
    )
    return [Run(seed, parts, np.empty(0, dtype=np.int64))]


def _paper_run(
    coordinates: NDArray[np.float64],
    slices: Sequence[NDArray[np.int64]],
    classes: NDArray[np.int64] | None,
    seed: int,
) -> Run:
    outer = split_cells(
        coordinates, slices, how="random", share=_TESTED_SHARE, classes=classes, seed=seed
    )
    rest = [np.intersect1d(rows, outer.fitted) for rows in slices]
    inner = split_cells(
        coordinates, rest, how="random", share=_VALIDATED_SHARE, classes=classes, seed=seed
    )
    moved = np.union1d(outer.moved, inner.moved)
    return Run(seed, replace(inner, moved=moved), outer.held_out)


def score_table(scores: Sequence[Mapping[str, float]]) -> pd.DataFrame:
    """Scores of runs: a row for each, a column for each score."""
    import pandas as pd

    return pd.DataFrame(scores, index=pd.RangeIndex(1, len(scores) + 1, name="run"))
