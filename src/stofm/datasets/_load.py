"""``stofm.datasets.load``: sections of the package, of a file or an address."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import pooch

from stofm._edge.slice_files import read_data
from stofm._files import local

if TYPE_CHECKING:
    from anndata import AnnData


_SECTIONS: Final = Path(__file__).with_name("sections")


def load(name: str, *, sha256: str | None = None, cache_dir: str | Path | None = None) -> AnnData:
    """Read a section of the package, or an ``.h5ad`` from a file or an address, checked by checksum.

    The package carries three sections of real tissue, which need no network:

    - ``"mouse_cortex_osmfish"``: osmFISH, somatosensory cortex of a mouse, 4,839 cells x 33 genes,
      with ``obs["region"]`` and ``obs["cell_type"]``
    - ``"human_breast_xenium"``: a window of a Xenium slide, human breast cancer, 4,344 cells x 313
      genes, with ``obs["cell_type"]``
    - ``"mouse_olfactory_bulb_st"``: Spatial Transcriptomics with an H&E image, olfactory bulb of a
      mouse, 379 spots x 1,000 genes

    ``uns["stofm"]["source"]`` holds source, licence and citation, and ``trained_stofm_mini``: whether
    the built-in model has seen the section (it has not seen labels).

    Parameters
    ----------
    name
        One of these names, or the http(s) address or the path of a file.
    sha256
        Checksum of a file, 64 hexadecimal digits. Not needed for sections of the package.
    cache_dir
        Folder to keep downloads in; a file that is there and has the checksum is not downloaded
        again. None: the user's cache folder.

    Returns
    -------
    AnnData as it is in the file.

    Raises
    ------
    FileNotFoundError
        There is no such section or file.
    ValueError
        The checksum is missing, malformed, or not that of the file.

    See Also
    --------
    stofm.read : what an instrument wrote.
    stofm.datasets.simulate_slice : sections with known answers.

    Examples
    --------
    >>> import stofm as st
    >>> st.datasets.load("mouse_cortex_osmfish").shape
    (4839, 33)
    >>> url, digest = "https://example.org/slice.h5ad", "9f86d081..."
    >>> adata = st.datasets.load(url, sha256=digest)  # doctest: +SKIP
    """
    sections = {file.stem: file for file in sorted(_SECTIONS.glob("*.h5ad"))}
    if name in sections:
        return read_data(sections[name])
    is_address = "://" in name
    if not is_address and not local(name).is_file():
        raise FileNotFoundError(
            f"There is no section or file {name!r}. Sections: {list(sections)}. Else pass the path or the "
            "http(s) address of an .h5ad file."
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
