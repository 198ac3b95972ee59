"""Names of genes: Ensembl ids and symbols, of which species, and orthologs of mouse genes."""

from __future__ import annotations

import gzip
import hashlib
import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urldefrag

import numpy as np

from stofm._files import local, reading
from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Iterable
    from os import PathLike

#: Ids such as ENSG00000000003.15 and ENSG00000002586.20_PAR_Y; ENSGR0000002586 is the old form
#: of the latter.
_ENSEMBL_GENE: Final = re.compile(r"(ENS(?:[A-Z]{3,4})?GR?\d{10,})(\.\d+)?(_PAR_Y)?", re.IGNORECASE)
_ENSEMBL_TRANSCRIPT: Final = re.compile(r"ENS(?:[A-Z]{3,4})?T\d{10,}(\.\d+)?", re.IGNORECASE)
#: Human symbols are upper case but for names such as C2orf74.
_HUMAN_SYMBOL: Final = re.compile(r"[A-Z0-9][A-Z0-9.@/-]*|C(\d+|X|Y)orf\d+[A-Z]*(-\d+)?")
#: Mouse symbols have capitals as in a name (Gfap, H2-Ab1, 1700022I11Rik, mt-Nd4).
_MOUSE_SYMBOL: Final = re.compile(r"(mt-)?[A-Z0-9][A-Za-z0-9.()/-]*")
#: Columns of a table of orthologs.
_MOUSE: Final = "mouse_ensembl_id"
_HUMAN: Final = "human_ensembl_id"
#: Missing values that a table was written and read back with.
_MISSING: Final = frozenset({"", "nan", "NaN", "NA", "<NA>", "None"})


class IdType(StrEnum):
    """Kinds of gene names."""

    HUMAN_ENSEMBL = "human Ensembl ids"
    HUMAN_ENSEMBL_VERSION = "human Ensembl ids with version"
    MOUSE_ENSEMBL = "mouse Ensembl ids"
    MOUSE_ENSEMBL_VERSION = "mouse Ensembl ids with version"
    OTHER_ENSEMBL = "Ensembl ids of another species"
    TRANSCRIPT = "Ensembl transcript ids"
    HUMAN_SYMBOL = "human symbols"
    MOUSE_SYMBOL = "mouse symbols"
    NUMBER = "numbers"
    OTHER = "other names"
    MISSING = "missing names"


HUMAN_TYPES: Final = frozenset(kind for kind in IdType if kind.name.startswith("HUMAN"))
MOUSE_TYPES: Final = frozenset(kind for kind in IdType if kind.name.startswith("MOUSE"))
ENSEMBL_TYPES: Final = frozenset(kind for kind in IdType if "ENSEMBL" in kind.name)
SYMBOL_TYPES: Final = frozenset({IdType.HUMAN_SYMBOL, IdType.MOUSE_SYMBOL})


def clean_names(names: Iterable[Any]) -> list[str]:
    """Return `names` as stripped strings, ``""`` where a value is missing (None, NaN, or their text)."""
    return [_clean_name(name) for name in names]


def _clean_name(name: Any) -> str:
    if isinstance(name, bytes):
        name = name.decode()
    if isinstance(name, int | np.integer):
        name = str(name)
    text = name.strip() if isinstance(name, str) else ""
    return "" if text in _MISSING else text


def strip_version(name: str) -> str:
    """Return an Ensembl gene id in capitals and without version; other names as they are."""
    match = _ENSEMBL_GENE.fullmatch(name)
    return match[1].upper() if match else name


def id_type(name: str) -> IdType:
    """Return what kind of gene name `name` is."""
    if not name:
        return IdType.MISSING
    if match := _ENSEMBL_GENE.fullmatch(name):
        return _ensembl_type(match[1].upper(), has_version=bool(match[2] or match[3]))
    if _ENSEMBL_TRANSCRIPT.fullmatch(name):
        return IdType.TRANSCRIPT
    if name.isdigit():
        return IdType.NUMBER
    if _HUMAN_SYMBOL.fullmatch(name):
        return IdType.HUMAN_SYMBOL
    return IdType.MOUSE_SYMBOL if _MOUSE_SYMBOL.fullmatch(name) else IdType.OTHER


def _ensembl_type(bare: str, *, has_version: bool) -> IdType:
    if bare.startswith("ENSMUSG"):
        return IdType.MOUSE_ENSEMBL_VERSION if has_version else IdType.MOUSE_ENSEMBL
    if bare.startswith("ENSG"):
        return IdType.HUMAN_ENSEMBL_VERSION if has_version else IdType.HUMAN_ENSEMBL
    return IdType.OTHER_ENSEMBL


def read_cells(path: Path, what: str) -> list[list[str]]:
    """Read a table, plain or gzip, that tabs separate: the cells of each line, the header first."""
    opened = gzip.open if path.suffix == ".gz" else open
    with reading(path, what), opened(path, "rt", encoding="utf-8", newline="") as file:
        return [line.rstrip("\r\n").split("\t") for line in file]


def read_orthologs(source: Mapping[str, str] | str | PathLike[str]) -> dict[str, str]:
    """Return mouse Ensembl ids and their human orthologs, without versions.

    Parameters
    ----------
    source
        One of: a mapping of mouse to human ids; the path of a table (plain or gzip, separated by
        tabs) with the columns ``mouse_ensembl_id`` and ``human_ensembl_id``; the http(s) or ftp
        address of such a table, which is downloaded once and kept in the user's cache. An
        address may end in ``#sha256=...``; the file must then have this checksum. Otherwise the
        checksum found is logged.

    Raises
    ------
    FileNotFoundError
        There is no file at the path.
    ValueError
        The table lacks a column, or the checksum differs.
    """
    if isinstance(source, Mapping):
        pairs = dict(source)
    else:
        is_remote = str(source).startswith(("http://", "https://", "ftp://"))
        pairs = _read_pairs(_download(str(source)) if is_remote else local(source))
    return {strip_version(mouse): strip_version(human) for mouse, human in pairs.items()}


def _download(address: str) -> Path:
    import pooch

    url, fragment = urldefrag(address)
    expected = fragment.removeprefix("sha256=").lower() or None
    path = Path(pooch.retrieve(url, known_hash=None, path=pooch.os_cache("stofm")))
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected is None:
        logger.info("ortholog table %s has sha256 %s", url, found)
    elif found != expected:
        path.unlink()
        msg = f"{url} has the sha256 {found}, expected {expected}; the file was discarded."
        raise ValueError(msg)
    return path


def _read_pairs(path: Path) -> dict[str, str]:
    header, *rows = read_cells(path, "ortholog table") or [[""]]
    if not {_MOUSE, _HUMAN} <= set(header):
        msg = (
            f"{path} is not an ortholog table: expected the columns {_MOUSE} and {_HUMAN}, "
            f"separated by tabs, found {header}."
        )
        raise ValueError(msg)
    mouse, human = header.index(_MOUSE), header.index(_HUMAN)
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if short := [k for k, row in enumerate(rows, start=2) if len(row) <= max(mouse, human)]:
        msg = f"{path}: {len(short)} rows lack a gene, for example row {short[0]}."
        raise ValueError(msg)
    return {row[mouse]: row[human] for row in rows}
