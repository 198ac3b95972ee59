"""The demonstration: a slice is embedded and clustered, figures and the data are written."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from stofm._keys import Obsm
from stofm._logging import logger

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

_SIZE = (4000, 300)
_LABELS = ("region", "layer", "cell_type")
_CLUSTERS = "leiden"
_EMBEDDED = "embedded.h5ad"
_FIGURES = ("umap.png", "spatial.png", "subslices.png", "virtual_cells.png")


def run_demo(
    out: Path,
    *,
    data: Path | None = None,
    library_key: str | None = None,
    table_key: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> AnnData:
    """Embed and cluster a slice with the embedded model; write figures and an ``.h5ad`` to `out`.

    Without `data`, a ``.h5ad`` or ``.zarr``, a cortex-like slice is simulated.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc

    from stofm import pl, tl
    from stofm._edge.slice_files import read_data, refuse_output, write_data
    from stofm._edge.tables import resolve_table
    from stofm.metrics import ari

    refuse_output(out / _EMBEDDED, has_spatialdata=False, overwrite=overwrite)
    figures = [out / name for name in _FIGURES]
    if (found := [figure.name for figure in figures if figure.exists()]) and not overwrite:
        raise FileExistsError(f"{out} has {found} already; pass overwrite=True to replace them.")
    if data is None:
        from stofm.datasets import simulate_slice

        adata = simulate_slice(*_SIZE, seed=seed)
        logger.info("Simulated a slice of %d cells and %d genes.", *adata.shape)
    else:
        adata = resolve_table(read_data(data), table_key)
    tl.embed(adata, library_key=library_key, seed=seed, show_progress_bar=False)
    with warnings.catch_warnings():
        # scanpy and its libraries announce changes of their own that don't concern this run.
        warnings.simplefilter("ignore")
        sc.pp.neighbors(adata, use_rep=Obsm.X, random_state=seed)
        sc.tl.umap(adata, random_state=seed)
        sc.tl.leiden(adata, flavor="igraph", n_iterations=2, key_added=_CLUSTERS, random_state=seed)

    out.mkdir(parents=True, exist_ok=True)
    labels = [key for key in _LABELS if key in adata.obs]
    color = [_CLUSTERS, *labels]
    pl.umap(adata, color=color, show=False, save=figures[0])
    pl.spatial(adata, color=color, show=False, save=figures[1])
    pl.subslices(adata, show=False, save=figures[2])
    pl.virtual_cells(adata, show=False, save=figures[3])
    write_data(adata, out / _EMBEDDED)
    for key in labels:
        score = ari(adata.obs[key], adata.obs[_CLUSTERS])
        logger.info("Clusters against obs[%r]: adjusted Rand index %.2f.", key, score)
    logger.info("Wrote %s and %s to %s/.", ", ".join(_FIGURES), _EMBEDDED, out)
    return adata
