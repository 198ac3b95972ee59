"""The demonstration: a section is embedded, its regions are found and learnt; figures are written."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._keys import Obs, Obsm
from stofm._logging import logger

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

_SECTION = "mouse_cortex_osmfish"
_SIZE = (4000, 300)
#: Columns that may hold labels; the first that is there is learnt.
_LABELS = ("region", "layer", "cell_type")
_EMBEDDED = "embedded.h5ad"
_FIGURES = ("umap.png", "spatial.png", "subslices.png", "virtual_cells.png", "annotation.png")


def run_demo(
    out: Path,
    *,
    data: Path | None = None,
    simulate: bool = False,
    library_key: str | None = None,
    table_key: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> AnnData:
    """Embed a section with the built-in model; write figures and an ``.h5ad`` to `out`.

    The section is the package's of a mouse's cortex, a simulated one, or `data`: a ``.h5ad`` or
    ``.zarr``. Domains are compared with its labels, which are learnt on the left half (or on half
    of the slices) and named on the right.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import scanpy as sc

    from stofm import pl, tl
    from stofm._edge.slice_files import refuse_output, write_data
    from stofm.metrics import ari

    refuse_output(out / _EMBEDDED, has_spatialdata=False, overwrite=overwrite)
    figures = {name: out / name for name in _FIGURES}
    if (found := [name for name, file in figures.items() if file.exists()]) and not overwrite:
        raise FileExistsError(f"{out} has {found} already; pass overwrite=True to replace them.")
    adata = _section(data, table_key, simulate=simulate, seed=seed)
    label = next((key for key in _LABELS if key in adata.obs), None)
    n_regions = None if label is None else adata.obs[label].nunique()
    tl.embed(adata, library_key=library_key, seed=seed, show_progress_bar=False)
    tl.domains(adata, n_domains=n_regions, library_key=library_key, seed=seed)
    with warnings.catch_warnings():
        # scanpy and its libraries announce changes of their own that don't concern this run.
        warnings.simplefilter("ignore")
        sc.pp.neighbors(adata, use_rep=Obsm.X, random_state=seed)
        sc.tl.umap(adata, random_state=seed)

    out.mkdir(parents=True, exist_ok=True)
    color = [*filter(None, [label]), Obs.DOMAIN]
    places: dict[str, Any] = {"library_key": library_key, "show": False}
    # Domains take the colours of the regions that they match, here and in what is drawn after.
    pl.domains(adata, truth_key=label, **places, save=figures["spatial.png"])
    pl.umap(adata, color=color, show=False, save=figures["umap.png"])
    pl.subslices(adata, **places, save=figures["subslices.png"])
    pl.virtual_cells(adata, **places, save=figures["virtual_cells.png"])
    if label is not None:
        score = ari(adata.obs[label], adata.obs[Obs.DOMAIN])
        logger.info("Domains against obs[%r]: adjusted Rand index %.2f.", label, score)
        named = _annotate(adata, label, library_key, seed=seed)
        pl.annotation(named, truth_key=label, **places, save=figures["annotation.png"])
    write_data(adata, out / _EMBEDDED)
    logger.info("Figures and %s are in %s/.", _EMBEDDED, out)
    return adata


def _section(data: Path | None, table_key: str | None, *, simulate: bool, seed: int) -> AnnData:
    from stofm import datasets
    from stofm._edge.slice_files import read_data
    from stofm._edge.tables import resolve_table

    if data is not None:
        return resolve_table(read_data(data), table_key)
    if simulate:
        logger.info("Simulating a slice of %d cells and %d genes.", *_SIZE)
        return datasets.simulate_slice(*_SIZE, seed=seed)
    logger.info("The section is datasets.load(%r).", _SECTION)
    return datasets.load(_SECTION)


def _annotate(adata: AnnData, key: str, library_key: str | None, *, seed: int) -> AnnData:
    """Learn labels on one half and name them on the other, which is returned."""
    from stofm import tl
    from stofm.metrics import accuracy, macro_f1

    x = np.asarray(adata.obsm[Obsm.SPATIAL])[:, 0]
    is_left = x < np.median(x)
    if library_key is not None and adata.obs[library_key].nunique() > 1:
        slices = adata.obs[library_key].astype(str)
        is_left = slices.isin(sorted(slices.unique())[::2]).to_numpy()
    is_labelled = adata.obs[key].notna().to_numpy()
    options: dict[str, Any] = {"library_key": library_key, "seed": seed, "show_progress_bar": False}
    head = tl.annotate(adata[is_left & is_labelled].copy(), label_key=key, **options)
    named = adata[~is_left & is_labelled].copy()
    tl.annotate(named, head=head, **options)
    truth, found = named.obs[key].astype(str), named.obs[Obs.ANNOTATION].astype(str)
    was_there = truth.isin(head.classes)
    logger.info(
        "obs[%r] of the right half, learnt on the left: %.0f %% right and macro-F1 %.2f for %d cells, "
        "and %d cells of classes that the left half lacks.",
        *(key, 100 * accuracy(truth[was_there], found[was_there])),
        *(macro_f1(truth[was_there], found[was_there]), was_there.sum(), (~was_there).sum()),
    )
    return named
