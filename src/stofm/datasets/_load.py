"""``stofm.datasets.load``: sections from a file or an address, verified by checksum."""

from __future__ import annotations

import csv
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pooch

from stofm._edge.slice_files import read_data
from stofm._files import local

if TYPE_CHECKING:
    from anndata import AnnData

_SHA256 = re.compile(r"[0-9a-f]{64}")


def load(name: str, *, sha256: str | None = None, cache_dir: str | Path | None = None) -> AnnData:
    """Read a section that is known by name, or any ``.h5ad`` file with its checksum.

    Parameters
    ----------
    name
        A name in the package's list of public sections, an http(s) address, or the path of a
        file.
    sha256
        Checksum of the file, 64 hexadecimal digits; needed with an address or a path, and
        taken from the list with a name.
    cache_dir
        Folder to keep downloads in; a file that is there and has the checksum is not downloaded
        again. None: the user's cache folder.

    Returns
    -------
    AnnData as it is in the file.

    Raises
    ------
    KeyError
        There is no section of this name.
    ValueError
        The checksum is missing, malformed, or not that of the file.

    Examples
    --------
    >>> import stofm as st
    >>> url, digest = "https://example.org/slice.h5ad", "9f86d081..."
    >>> adata = st.datasets.load(url, sha256=digest)  # doctest: +SKIP
    """
    is_address = "://" in name
    if not is_address and not local(name).is_file():
        known = _sections()
        if name not in known:
            listed = f"There are {sorted(known)}" if known else "The list is still empty"
            msg = (
                f"There is no section and no file {name!r}. {listed}. Any other .h5ad file can be "
                "read by its address or path with its checksum: "
                "load('https://.../slice.h5ad', sha256='...')."
            )
            raise KeyError(msg)
        name, sha256, is_address = known[name]["url"], known[name]["sha256"], True
    if sha256 is None:
        msg = (
            f"{name} is not in the list of sections, so its checksum is needed: pass sha256= (64 "
            "hexadecimal digits, as `sha256sum` prints them)."
        )
        raise ValueError(msg)
    digest = sha256.strip().lower()
    if not _SHA256.fullmatch(digest):
        msg = f"sha256 must be 64 hexadecimal digits, found {sha256!r}."
        raise ValueError(msg)
    if is_address:
        folder = pooch.os_cache("stofm") if cache_dir is None else local(cache_dir)
        # The name starts with the checksum, so that two never collide.
        file = f"{digest[:12]}-{Path(urlsplit(name).path).name or 'slice.h5ad'}"
        known_hash = f"sha256:{digest}"
        return read_data(pooch.retrieve(name, known_hash=known_hash, fname=file, path=folder))
    if (found := pooch.file_hash(local(name))) != digest:
        msg = f"{name} has the sha256 {found}, expected {digest}: it is another file or damaged."
        raise ValueError(msg)
    return read_data(name)


def _sections_file() -> str:
    return (files("stofm.datasets") / "_sections.tsv").read_text(encoding="utf-8")


def _sections() -> dict[str, dict[str, str]]:
    """Public sections by name: `url` of an ``.h5ad`` file, `sha256`, `license` and `citation`.

    Only checksums of files that were downloaded and read belong into the list.
    """
    rows = csv.DictReader(_sections_file().splitlines(), delimiter="\t")
    return {row["name"]: row for row in rows}
