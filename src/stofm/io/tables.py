"""Tables of cells and of counts: ids as text, dense counts to CSR block by block."""

from __future__ import annotations

import contextlib
import re
from functools import reduce
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._files import reading
from stofm.io.files import extension, is_gzip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

    from stofm.io.files import File
    from stofm.io.formats import Format

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
