"""Which technology the files in a folder come from, and which of them to read."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from stofm._edge.places import listed
from stofm._logging import logger
from stofm.io.files import distance, extension, is_number
from stofm.io.formats import FORMATS, GENERIC, H5AD, STEREO, VISIUM, VISIUM_HD
from stofm.io.units import bin_size_of
from stofm.io.whole import column_of_cells

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    from stofm.io.files import File
    from stofm.io.formats import Format

    BinSize = int | Literal["cells"] | None

#: Names of tables of counts, and names of other tables.
_DENSE: Final = re.compile(
    r"expr|cell_by_gene|cellxgene|counts?\b|_counts|dge|digital|matrix", re.IGNORECASE
)
_OTHER: Final = re.compile(
    r"transcript|boundar|polygon|fov_pos|positions|tx_file|metrics|cluster|analysis/|transform",
    re.IGNORECASE,
)
_MATRICES: Final = ("10x", "mtx", "table")
_FEWEST_GENES: Final = 3
_STEREO: Final = {"geneExp": "bins", "gem": "bins", "cellBin": "cells"}
_CELLS: Final = "cells"


@dataclass(frozen=True)
class Candidate:
    """A table of cells, or counts with positions, of a technology.

    `names` are the columns of ids, x and y; `bins` the size of its bins, or ``"cells"``.
    """

    technology: Format
    file: File
    names: tuple[str, str, str] = ("", "", "")
    columns: tuple[str, ...] = ()
    bins: BinSize = None


def choose(
    files: list[File],
    wanted: Format | None,
    sample: str | None,
    bin_size: BinSize,
    where: str,
    own: File | None = None,
) -> Candidate:
    """Choose what to read from a folder, or say why that is not possible or what has to be chosen.

    If `own`, the requested file, is a table of cells, that is chosen.
    """
    found = _candidates(files, wanted)
    found = [one for one in found if one.file is own] or found
    if sample is not None:
        there = sorted({one.file.sample for one in found} - {""})
        found = [one for one in found if sample in (one.file.sample, *one.file.sample.split("/"))]
        if not found:
            raise ValueError(
                f"{where} has no sample {sample!r}; it has {there or 'no named ones'}."
            )
    if not found:
        raise FileNotFoundError(_nothing_message(files, wanted, where))
    technologies = list(dict.fromkeys(one.technology.name for one in found))
    if len(technologies) > 1:
        shown = {one.technology.name: one.file.name for one in reversed(found)}
        raise ValueError(
            f"{where} holds files of {len(technologies)} technologies: "
            f"{', '.join(f'{name} ({shown[name]})' for name in technologies)}. Pass `technology`, "
            "one of these, or the path of the folder or file to read."
        )
    found = _of_bins(found, bin_size, where)
    if len(samples := sorted({one.file.sample for one in found})) > 1:
        raise ValueError(
            f"{where} holds {len(samples)} samples: {listed([one or '(no name)' for one in samples])}. "
            f"Read them one by one: pass sample={samples[-1]!r}, or the path of one of its files."
        )
    order = sorted(found, key=_rank)
    if len(order) > 1:
        logger.info("%s is read; not read: %s.", order[0].file.name, _names(order[1:]))
    return order[0]


def _rank(one: Candidate) -> tuple[bool, bool, bool, int, str]:
    file = one.file
    is_raw = re.search(r"(^|[/_.-])raw[_.]", file.name) is not None
    is_binary = extension(file.path) in (".parquet", ".gef")
    return is_raw, not is_binary, not file.columns, len(file.name), file.name


def _names(found: Sequence[Candidate]) -> str:
    return listed([one.file.name for one in found])


def _candidates(files: list[File], wanted: Format | None) -> list[Candidate]:
    """All files of the wanted technology; if None, of certain ones, else of others."""
    stored = [Candidate(H5AD, file) for file in files if file.kind in ("h5ad", "zarr")]
    plain = [one for file in files for one in _matches(file, files, (GENERIC,))]
    if wanted in (GENERIC, H5AD):
        return plain if wanted is GENERIC else stored
    formats = [one for one in FORMATS if wanted is None or one.name == wanted.name]
    certain = [one for file in files for one in _matches(file, files, formats)[:1]]
    if certain or wanted is not None:
        return certain
    return plain if plain and _matrices(files, (GENERIC,)) else stored


def _matches(file: File, files: list[File], formats: Sequence[Format]) -> list[Candidate]:
    found = []
    for one in formats:
        if one is STEREO and file.kind in _STEREO:
            is_of_cells = file.kind == "cellBin" or (
                file.kind == "gem" and column_of_cells(file) is not None
            )
            found.append(Candidate(one, file, bins=_CELLS if is_of_cells else None))
        elif one is VISIUM_HD and re.search(r"cell_segmentations\.geojson$", file.name):
            found.append(Candidate(one, file, bins=_CELLS))
        elif file.kind == "table" and re.search(one.path, file.name):
            found += _match_table(file, files, one)
    return found


def _match_table(file: File, files: list[File], one: Format) -> list[Candidate]:
    columns = file.columns
    if not columns and len(file.first) == len(one.without_header) and not is_number(file.first[0]):
        columns = one.without_header
    names = one.columns(columns)
    if names is None:
        return []
    bins = bin_size_of(file, files) if one in (VISIUM, VISIUM_HD) else None
    if (one is VISIUM and bins is not None) or (one is VISIUM_HD and bins is None):
        return []
    return [Candidate(one, file, names, columns, bins)]


def _of_bins(found: list[Candidate], bin_size: BinSize, where: str) -> list[Candidate]:
    """Those with bins of the requested size, or of the usual one."""
    technology = found[0].technology
    if technology.bin_size is None:
        if bin_size is not None:
            raise ValueError(f"{technology.name} has no bins: leave out `bin_size`.")
        return found
    if technology is STEREO:
        of_cells = [one for one in found if one.bins == _CELLS]
        others = [one for one in found if one.file.kind != "cellBin"]
        kept = of_cells if bin_size == _CELLS else others if bin_size else (others or of_cells)
        kinds = "cells" if of_cells and not others else "squares of any size"
        expected = f"it has {kinds}"
    else:
        there = list(dict.fromkeys(one.bins for one in found))
        # A path into a folder of bins determines which ones.
        is_meant = len(there) == 1 and (
            there[0] == _CELLS or f"square_{int(there[0] or 0):03}um" in where
        )
        asked = bin_size or (there[0] if is_meant else technology.bin_size)
        kept = [one for one in found if one.bins == asked]
        sizes = sorted((one for one in there if isinstance(one, int)), key=int)
        shown = [*map(str, sizes), *([repr(_CELLS)] if _CELLS in there else [])]
        expected = f"pass bin_size={' or bin_size='.join(shown)}"
    if not kept:
        size = bin_size or technology.bin_size
        raise ValueError(f"{where} has no bins of {size} ({technology.name}); {expected}.")
    return kept


# Matrices


def matrix_for(one: Candidate, files: list[File], where: str) -> File:
    """The matrix of counts that belongs to a table of cells."""
    matrices = _matrices(files, (one.technology, GENERIC))
    if not matrices:
        raise FileNotFoundError(
            f"{where} looks like {one.technology.name} ({one.file.name}), but has no matrix of "
            f"counts. Expected {one.technology.expected}; found {_some(files)}.{_faults(files)}"
        )

    def rank(file: File) -> tuple[bool, bool, int, bool, int, int, str]:
        other, shared = distance(one.file, file)
        is_unnamed = file.kind == "table" and not _DENSE.search(file.path.name)
        kind = _MATRICES.index(file.kind)
        return other, is_unnamed, shared, not file.is_filtered, kind, -len(file.columns), file.name

    return min(matrices, key=rank)


def _is_matrix(file: File) -> bool:
    if file.kind != "table":
        return file.kind in _MATRICES
    is_named = _DENSE.search(file.path.name) is not None and not _OTHER.search(file.name)
    n_numbers = sum(map(is_number, file.first))
    is_wide = len(file.columns) > 2 + _FEWEST_GENES and not _OTHER.search(file.name)
    return (is_named or is_wide) and n_numbers >= max(1, len(file.first) - 2)


def _matrices(files: list[File], formats: Sequence[Format]) -> list[File]:
    """Files of counts, none of which is a table of cells of one of these formats."""
    return [file for file in files if _is_matrix(file) and not _matches(file, files, formats)]


# Messages


def _nothing_message(files: list[File], wanted: Format | None, where: str) -> str:
    if not files:
        return f"{where} is empty."
    hints = [one for one in FORMATS if one.hint and any(re.search(one.hint, f.name) for f in files)]
    known = [wanted] if wanted is not None else list({one.name: one for one in hints}.values())
    places = [
        f"{file.name} has positions without ids, and cells are matched by ids: add a column of ids"
        for file in files
        if file.kind == "table" and not file.columns and 2 <= len(file.first) <= 3
        and all(map(is_number, file.first))
    ]  # fmt: skip
    looks = f". It looks like {' or '.join(one.name for one in known)}." if known else "."
    looks = looks if wanted is None else f" as {wanted.name}."
    expected = "; ".join(one.expected for one in known if one.expected) or GENERIC.expected
    more = "".join(f" {text}." for text in places[:1]) + _faults(files)
    return (
        f"{where} has no table of cells that can be read{looks} Expected: {expected}. Found: "
        f"{_some(files)}.{more} Tables under other names: pass `matrix`, `coordinates` and `columns`."
    )


def _faults(files: Sequence[File]) -> str:
    """Files that are there but can't be used."""
    faults = {
        "probes": "counts probes, not genes",
        "damaged": "is damaged, or not a file of its kind",
    }
    texts = [f" {file.name} {faults[file.kind]}." for file in files if file.kind in faults]
    return "".join(texts[:3])


def _some(files: Sequence[File]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
