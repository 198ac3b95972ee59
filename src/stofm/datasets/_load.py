"""``stofm.datasets.load``: sections from a file or an address, verified by checksum."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pooch

from stofm._edge.slice_files import read_data
from stofm._files import local

if TYPE_CHECKING:
    from anndata import AnnData


def load(name: str, *, sha256: str | None = None, cache_dir: str | Path | None = None) -> AnnData:
    """Read a ``.h5ad`` file, downloaded once if it is an address, and verify its checksum.

    Parameters
    ----------
    name
        The http(s) address or the path of a file.
    sha256
        Checksum of the file, 64 hexadecimal digits.
    cache_dir
        Folder to keep downloads in; a file that is there and has the checksum is not downloaded
        again. None: the user's cache folder.

    Returns
    -------
    AnnData as it is in the file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
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
        raise FileNotFoundError(
            f"There is no file {name!r}; pass the path or the http(s) address of an .h5ad file."
        )
    digest = (sha256 or "").strip().lower()
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(
            f"sha256 must be 64 hexadecimal digits, as `sha256sum` prints them, found {sha256!r}."
        )
    if is_address:
        folder = pooch.os_cache("stofm") if cache_dir is None else local(cache_dir)
        # The name starts with the checksum, so that two never collide.
        file = f"{digest[:12]}-{Path(urlsplit(name).path).name or 'slice.h5ad'}"
        known_hash = f"sha256:{digest}"
        return read_data(pooch.retrieve(name, known_hash=known_hash, fname=file, path=folder))
    if (found := pooch.file_hash(local(name))) != digest:
        raise ValueError(
            f"{name} has the sha256 {found}, expected {digest}: it is another file or damaged."
        )
    return read_data(name)
