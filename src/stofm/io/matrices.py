"""Matrices of counts, as they are written: 10x HDF5, Matrix Market, h5ad."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import peek_counts
from stofm._edge.tables import layer_names
from stofm._files import reading
from stofm.genes.ranking import require_sound

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.io.files import File

_FEATURES: Final = re.compile(r"(features|genes)(\.[a-z]+)*$", re.IGNORECASE)
_BARCODES: Final = re.compile(r"barcodes(\.[a-z]+)*$", re.IGNORECASE)
_ENSEMBL: Final = re.compile(r"ENS[A-Z]*G\d{11}(\.\d+)?")
_COLUMNS: Final = {"id": "gene_ids", "feature_type": "feature_types", "genome": "genome"}
_SAMPLE: Final = 512
#: Column of Open-ST with the number of a cell; 0 is the background.
MASK: Final = "cell_ID_mask"


def make(matrix: Any, ids: Any, genes: Any, obs: Any = None, **columns: Any) -> AnnData:
    """An AnnData of counts, with `columns` of ``var`` beside names of genes."""
    import pandas as pd
    from anndata import AnnData
    from anndata.utils import make_index_unique

    obs = pd.DataFrame(index=pd.Index(ids, dtype=object)) if obs is None else obs
    var = pd.DataFrame(columns, index=make_index_unique(pd.Index(genes).astype(str)))
    return AnnData(sparse.csr_matrix(matrix, dtype=np.float32), obs=obs, var=var)


def name_genes(adata: AnnData) -> None:
    """Make gene names unique, and put Ensembl ids among them into a column of their own."""
    names = adata.var_names.astype(str)
    if "gene_ids" not in adata.var and len(names) and all(map(_ENSEMBL.fullmatch, names[:50])):
        adata.var["gene_ids"] = names
    adata.var_names_make_unique()


def read_10x(file: File) -> tuple[AnnData, dict[str, str]]:
    """Read 10x HDF5 and its metadata."""
    import h5py

    with reading(file.path, "HDF5 of 10x Genomics"), h5py.File(file.path, "r") as opened:
        said = {name: text_of(value) for name, value in opened.attrs.items()}
        parts = opened["matrix"]
        # R writes floats.
        index = [parts[name][:].astype(np.int64) for name in ("indices", "indptr", "shape")]
        matrix = sparse.csr_matrix((parts["data"][:], *index[:2]), shape=tuple(index[2][::-1]))
        found = {name: parts["features"].get(name) for name in ("name", *_COLUMNS)}
        texts = {name: one.asstr()[:] for name, one in found.items() if one is not None}
        ids = parts["barcodes"].asstr()[:]
    require_sound(matrix, file.name)
    columns = {_COLUMNS[name]: text for name, text in texts.items() if name in _COLUMNS}
    return make(matrix, ids, texts.get("name", texts.get("id")), **columns), said


def text_of(value: Any) -> str:
    """An attribute as text; numbers of a version are joined."""
    found = np.asarray(value).ravel().tolist()
    return ".".join(one.decode() if isinstance(one, bytes) else str(one) for one in found)


def read_mtx(file: File, files: list[File]) -> AnnData:
    """Read a Matrix Market file with the lists of cells and genes beside it."""
    import pandas as pd
    from scipy.io import mmread

    def beside(pattern: re.Pattern[str], what: str) -> pd.DataFrame:
        start = file.path.name.lower().partition("matrix")[0]
        same = [one for one in files if one.path.parent == file.path.parent]
        found = [one for one in same if pattern.search(one.path.name)]
        found = [one for one in found if one.path.name.lower().startswith(start)] or found
        found = [one for one in found if one.sample == file.sample] or found
        if len(found) != 1:
            raise FileNotFoundError(
                f"{file.name}: expected one list of {what} beside it, found "
                f"{[one.path.name for one in found] or [one.path.name for one in same]}."
            )
        options: dict[str, Any] = {
            "sep": "\t",
            "header": None,
            "dtype": str,
            "keep_default_na": False,
        }
        empty = found[0].path.stat().st_size == 0
        return pd.DataFrame({0: []}) if empty else pd.read_csv(found[0].path, **options)

    genes, cells = beside(_FEATURES, "genes"), beside(_BARCODES, "cells")
    with reading(file.path, "Matrix Market file"):
        matrix = mmread(file.path, spmatrix=True)
    if matrix.shape == (len(genes), len(cells)):
        matrix = matrix.T
    elif matrix.shape != (len(cells), len(genes)):
        raise ValueError(
            f"{file.name} has the shape {matrix.shape}, but there are {len(genes)} genes and "
            f"{len(cells)} cells in the lists beside it: they belong to different matrices."
        )
    places = {"gene_ids": 0, "feature_types": 2} if genes.shape[1] > 1 else {}
    columns = {name: genes[place].to_numpy() for name, place in places.items() if place in genes}
    return make(
        matrix, cells[0].to_numpy(), genes[min(1, genes.shape[1] - 1)].to_numpy(), **columns
    )


def read_h5ad(path: Path) -> tuple[AnnData, str]:
    """Read an AnnData with counts in ``X``; also returns where they were: X, raw or a layer."""
    import anndata

    opened = anndata.read_h5ad(path, backed="r")
    try:
        found = place_of_counts(opened)
        if found == "X":
            return opened.to_memory(), found
        if found == "raw.X":
            matrix, var = opened.raw.X, opened.raw.var
            matrix = matrix.to_memory() if hasattr(matrix, "to_memory") else matrix[:]
        elif found:
            matrix, var = opened.layers[found], opened.var
        else:
            raw = "no raw" if opened.raw is None else "raw"
            raise ValueError(
                f"{path.name} holds no counts: no matrix has whole numbers only (X, {raw}, layers "
                f"{layer_names(opened)}). Get the file with raw counts."
            )
        parts = {"obs": opened.obs, "obsm": dict(opened.obsm), "uns": dict(opened.uns)}
        return anndata.AnnData(matrix, var=var, **parts), found
    finally:
        opened.file.close()


def is_plain(opened: AnnData) -> bool:
    """Whether an AnnData can be used as it is; otherwise :func:`stofm.read` corrects it.

    Corrected are counts in ``raw`` or a layer, and Open-ST's background, which is cell 0.
    """
    has_background = MASK in opened.obs and bool((opened.obs[MASK] == 0).any())
    return not has_background and place_of_counts(opened) in ("X", "")


def place_of_counts(opened: AnnData) -> str:
    """``"X"``, ``"raw.X"``, a layer, or nothing."""
    from anndata import AnnData

    if 0 in opened.shape:
        return ""
    rows = np.unique(np.linspace(0, opened.n_obs - 1, _SAMPLE).astype(np.int64))
    if _are_counts(opened, None, rows):
        return "X"
    if opened.raw is not None:
        part = AnnData(opened.raw.X[rows])
        if _are_counts(part, None, np.arange(len(rows))):
            return "raw.X"
    return next((one for one in layer_names(opened) if _are_counts(opened, one, rows)), "")


def _are_counts(adata: AnnData, layer: str | None, rows: NDArray[np.int64]) -> bool:
    if layer is None and adata.X is None:
        return False
    counts, is_raw = peek_counts(adata, layer, rows)
    return is_raw and bool(counts.data.any())
