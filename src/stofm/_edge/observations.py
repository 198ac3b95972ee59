"""What a row of a table is (cell, spot, bin or bead), and which one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import numpy as np

from stofm._edge.tables import read_record
from stofm._keys import Uns

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

_WORDS: Final = ("cells", "spots", "bins", "beads")
#: Technologies that measure spots, as the metadata of slices name them.
_SPOTS: Final = re.compile(r"visium|spatial transcriptomics|dbit", re.IGNORECASE)


def observed(adata: AnnData) -> str:
    """Return "cells", "spots", "bins" or "beads", as :func:`stofm.read` or the metadata say."""
    source = read_record(adata, Uns.SOURCE) or {}
    if source.get("observations") in _WORDS:
        return str(source["observations"])
    libraries = adata.uns.get("spatial")
    factors = [one.get("scalefactors", {}) for one in dict(libraries or {}).values()]
    has_spots = any("spot_diameter_fullres" in one for one in factors)
    return "spots" if has_spots or _SPOTS.search(str(source.get("technology", ""))) else "cells"


def cell_digests(adata: AnnData, spatial_key: str) -> NDArray[np.int64]:
    """A number for each cell, (n_obs,), from its name and its position, if it has one.

    It shows whether a head was fitted to a cell, even in another table.
    """
    import pandas as pd

    table = pd.DataFrame({"name": adata.obs_names.astype(str)})
    if spatial_key in adata.obsm:
        xy = np.asarray(adata.obsm[spatial_key], dtype=np.float64)[:, :2]
        table[["x", "y"]] = xy.astype(np.float32)
    hashes = pd.util.hash_pandas_object(table, index=False).to_numpy(np.uint64)
    return np.asarray(hashes.view(np.int64))
