"""What kind of name a gene id is: Ensembl id or symbol, of which species."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Ids such as ENSG00000000003.15 and ENSG00000002586.20_PAR_Y; ENSGR0000002586 is the old form
#: of the latter.
_ENSEMBL_GENE: Final = re.compile(r"(ENS(?:[A-Z]{3,4})?GR?\d{10,})(\.\d+)?(_PAR_Y)?", re.IGNORECASE)
_ENSEMBL_TRANSCRIPT: Final = re.compile(r"ENS(?:[A-Z]{3,4})?T\d{10,}(\.\d+)?", re.IGNORECASE)
#: Human symbols are upper case but for names such as C2orf74.
_HUMAN_SYMBOL: Final = re.compile(r"[A-Z0-9][A-Z0-9.@/-]*|C(\d+|X|Y)orf\d+[A-Z]*(-\d+)?")
#: Mouse symbols have capitals as in a name (Gfap, H2-Ab1, 1700022I11Rik, mt-Nd4).
_MOUSE_SYMBOL: Final = re.compile(r"(mt-)?[A-Z0-9][A-Za-z0-9.()/-]*")
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


HUMAN_TYPES: Final = frozenset(
    {IdType.HUMAN_ENSEMBL, IdType.HUMAN_ENSEMBL_VERSION, IdType.HUMAN_SYMBOL}
)
MOUSE_TYPES: Final = frozenset(
    {IdType.MOUSE_ENSEMBL, IdType.MOUSE_ENSEMBL_VERSION, IdType.MOUSE_SYMBOL}
)

ENSEMBL_TYPES: Final = frozenset(
    {
        IdType.HUMAN_ENSEMBL,
        IdType.HUMAN_ENSEMBL_VERSION,
        IdType.MOUSE_ENSEMBL,
        IdType.MOUSE_ENSEMBL_VERSION,
        IdType.OTHER_ENSEMBL,
    }
)
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
    match = _ENSEMBL_GENE.fullmatch(name)
    if match:
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
