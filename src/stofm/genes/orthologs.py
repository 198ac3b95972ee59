"""Tables of mouse genes and their human orthologs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urldefrag

from stofm._files import local, reading
from stofm._logging import logger
from stofm.genes.gene_ids import strip_version
from stofm.genes.vocabulary_table import open_text

if TYPE_CHECKING:
    from os import PathLike

_MOUSE: Final = "mouse_ensembl_id"
_HUMAN: Final = "human_ensembl_id"


def read_orthologs(source: Mapping[str, str] | str | PathLike[str]) -> dict[str, str]:
    """Return mouse Ensembl ids and their human orthologs, without versions.

    Parameters
    ----------
    source
        One of: a mapping of mouse to human ids; the path of a table (plain or gzip, separated by
        tabs) with the columns ``mouse_ensembl_id`` and ``human_ensembl_id``; the http(s) or ftp
        address of such a table, which is downloaded once and kept in the user's cache. An
        address may end in ``#sha256=...``; the file must then have this checksum, otherwise the
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
        address = str(source)
        is_remote = address.startswith(("http://", "https://", "ftp://"))
        pairs = _read_table(_download(address) if is_remote else local(source))
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


def _read_table(path: Path) -> dict[str, str]:
    with reading(path, "ortholog table"), open_text(path) as file:
        header = file.readline().rstrip("\r\n").split("\t")
        if _MOUSE not in header or _HUMAN not in header:
            msg = (
                f"{path} is not an ortholog table: expected the columns {_MOUSE} and {_HUMAN}, "
                f"separated by tabs, found {header}."
            )
            raise ValueError(msg)
        mouse, human = header.index(_MOUSE), header.index(_HUMAN)
        rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    if short := [k for k, row in enumerate(rows, start=2) if len(row) <= max(mouse, human)]:
        msg = f"{path}: {len(short)} rows lack a gene, for example row {short[0]}."
        raise ValueError(msg)
    return {row[mouse]: row[human] for row in rows}
