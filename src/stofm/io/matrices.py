"""Tables of cells, and matrices of counts: 10x HDF5, Matrix Market, h5ad, dense tables."""

from __future__ import annotations

import contextlib
import re
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import peek_counts
from stofm._edge.tables import layer_names
from stofm._files import reading
from stofm.genes.ranking import require_sound
from stofm.io.files import extension, is_gzip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.io.files import File
    from stofm.io.formats import Format

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


#: Bytes of text that are read at a time, and bytes of a row, of which a cell takes at most 16.
_BLOCK: Final = 1 << 24
_ROW: Final = 16
#: Integers below this are exact as floats, and have at most this many digits.
_EXACT: Final = 2**53
_DIGITS: Final = 15
_FLOAT: Final = re.compile(r"\d+(\.\d+)?[eE]\+?\d+|\d+\.0*")


def read_cells(file: File, columns: Sequence[str], ids: str) -> pd.DataFrame:
    """Read a table of cells; its index is the ids: the columns `ids`, joined by ``_``, as text."""
    import pandas as pd

    parts = ids.split("+")
    if extension(file.path) == ".parquet":
        import pyarrow.parquet as pq

        with reading(file.path, "Parquet table"):
            table = pq.read_table(file.path).to_pandas(ignore_metadata=True)
    else:
        from pyarrow import csv

        with opened(file, columns, dict.fromkeys(parts, "string")) as (source, options):
            table = csv.read_csv(source, **options).to_pandas()
    index = _joined([table[part] for part in parts], file)
    for name in table.columns:
        if len(table) and isinstance(table[name].iloc[0], bytes):
            table[name] = table[name].str.decode("utf-8", "replace")
    table = table.drop(columns=ids) if ids in table else table
    table.index = pd.Index(index)
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()].unique()
        raise ValueError(
            f"{file.name}: {len(twice)} ids occur more than once, for example "
            f"{twice[:3].tolist()}, so cells can't be matched. Give each cell an id of its own."
        )
    return table


def _joined(parts: Sequence[pd.Series], file: File) -> Any:
    texts = (ids_as_text(part, file).to_numpy(dtype=object) for part in parts)
    return reduce(lambda a, b: a + "_" + b, texts)


def ids_as_text(values: pd.Series, file: File) -> pd.Series:
    """Ids as text, digit by digit; an error if floats have lost some of them."""
    kind = values.dtype.kind
    if kind == "f":
        numbers = values.to_numpy()
        if (numbers != np.rint(numbers)).any() or np.abs(numbers).max(initial=0) >= _EXACT:
            raise ValueError(_float_message(values.name, f"{numbers[0]:.17g}", file))
        return values.astype(np.int64).astype(str)
    if kind not in "iu" and len(values) and isinstance(values.iloc[0], bytes):
        values = values.str.decode("utf-8")
    text = values.astype(str).str.strip()
    if len(text) and text.str.fullmatch(_FLOAT).all():
        plain = text.str.replace(r"\.0*$", "", regex=True)
        if not plain.str.fullmatch(rf"\d{{1,{_DIGITS}}}").all():
            raise ValueError(_float_message(values.name, text.iloc[0], file))
        return plain
    return text


def _float_message(column: Any, example: str, file: File) -> str:
    return (
        f"{file.name}: the ids in column {str(column)!r} were read as floats before they were written "
        f"({example}), so their last digits are lost and cells can't be matched. Write the table "
        f"again with ids as text: pandas.read_csv(..., dtype={{{str(column)!r}: str}})."
    )


def read_dense(
    file: File, cells: pd.Index, technology: Format
) -> tuple[sparse.csr_matrix, Any, list[str]]:
    """Read a table of counts as CSR (n_cells, n_genes) with ids of its cells and names of genes.

    The ids of `cells` decide its orientation: they name its rows or its columns.
    """
    import pandas as pd

    names = list(file.columns)
    if not names:
        raise ValueError(f"{file.name} has no header, so its genes have no names.")
    if pd.Index(names[1:]).isin(cells).mean() > 0.5:
        matrix, genes = _stream(file, keys=[0], others=[])
        return matrix.T.tocsr(), np.array(names[1:], dtype=object), genes.tolist()
    lower = [name.lower() for name in names]
    keys = [0]
    for parts in (one.lower().split("+") for one in technology.ids):
        if len(parts) > 1 and set(parts) <= set(lower):
            keys = [lower.index(part) for part in parts]
    own = {name.lower() for name in technology.no_genes}
    others = [k for k, name in enumerate(lower) if name in own and k not in keys]
    matrix, ids = _stream(file, keys, others)
    return matrix, ids, [name for k, name in enumerate(names) if k not in {*keys, *others}]


def _stream(file: File, keys: list[int], others: list[int]) -> tuple[sparse.csr_matrix, Any]:
    """Read a table of numbers by blocks as CSR, and the joined keys of its rows."""
    from pyarrow import csv

    # By position, because names of genes may occur twice.
    names = [str(place) for place in range(len(file.columns))]
    text = {*keys, *others}
    kinds = {name: "string" if place in text else "float" for place, name in enumerate(names)}
    parts, ids = [], []
    with opened(file, names, kinds) as (source, options), csv.open_csv(source, **options) as reader:
        for block in reader:
            numbers = [block.column(k) for k in range(len(names)) if k not in text]
            columns = [column.to_numpy(zero_copy_only=False) for column in numbers]
            parts.append(sparse.csr_matrix(np.column_stack(columns)))
            key = [block.column(k).to_pandas().rename(file.columns[k]) for k in keys]
            ids.append(_joined(key, file))
    if not sum(map(len, ids)):
        raise ValueError(f"{file.name} has a header but no rows.")
    return sparse.vstack(parts, format="csr"), np.concatenate(ids)


@contextlib.contextmanager
def opened(
    file: File, columns: Sequence[str], kinds: Mapping[str, str], wanted: Sequence[str] = ()
) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Open a text table, compressed or not, with all columns or some."""
    import pyarrow as pa
    from pyarrow import csv

    arrow = {
        "string": pa.string(),
        "float": pa.float32(),
        "integer": pa.int64(),
        "category": pa.dictionary(pa.int32(), pa.string()),
    }
    options = {
        "read_options": csv.ReadOptions(
            column_names=list(columns),
            # The Single Cell Portal's tables have types below the header.
            skip_rows=file.n_skipped + (file.first[:1] == ("TYPE",)),
            block_size=max(_BLOCK, _ROW * len(columns)),
        ),
        "parse_options": csv.ParseOptions(delimiter=file.separator),
        "convert_options": csv.ConvertOptions(
            column_types={name: arrow[kind] for name, kind in kinds.items()},
            include_columns=list(wanted),
        ),
    }
    with contextlib.ExitStack() as stack:
        source: Any = stack.enter_context(pa.OSFile(str(file.path), "rb"))
        if is_gzip(file.path):
            source = stack.enter_context(pa.CompressedInputStream(source, "gzip"))
        try:
            yield source, options
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{file.name} can't be read as a table: {error}") from error
