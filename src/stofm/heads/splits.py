"""Which cells heads are fitted to, and which are held out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stofm._logging import logger
from stofm.spatial import Split, split_cells

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from stofm.heads.sections import Sections
    from stofm.spatial.splits import SplitRule

_HELD_OUT: float = 0.1


def plan_split(
    sections: Sections,
    is_known: NDArray[np.bool_],
    features: NDArray[np.float32],
    *,
    split: SplitRule = "auto",
    classes: NDArray[np.int64] | None = None,
    spatial_key: str,
    seed: int,
) -> Split:
    """Split the cells of which something is known.

    Without coordinates ``"auto"`` is by slice, or random if there is only one, and `features` tell
    cells apart. Parts are alike in `classes`, (n_obs,), of which -1 is none.
    """
    own = [rows[is_known[rows]] for rows in sections.slices.rows]
    slices = [rows for rows in own if len(rows)]
    if split == "slices" and len(slices) < 2:
        msg = (
            f"split='slices' holds out whole slices, and {len(slices)} of the {len(own)} slices has "
            "cells to learn from; use split='blocks'."
        )
        raise ValueError(msg)
    has_places = sections.has_coordinates(spatial_key)
    if has_places or split == "blocks":
        places = sections.coordinates(spatial_key)
    else:
        places = features[:, [0, -1]].astype(np.float64)
    if split == "auto" and not has_places:
        split = "slices" if len(slices) > 1 else "random"
        logger.info("There is no obsm[%r]: the split is %r.", spatial_key, split)
    return split_cells(places, slices, how=split, share=_HELD_OUT, classes=classes, seed=seed)
