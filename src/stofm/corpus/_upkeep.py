"""``stofm.corpus.info``, ``check`` and ``export``: content, integrity, export to Zarr."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stofm._edge.slice_files import write_data
from stofm._files import local
from stofm._logging import progress
from stofm.corpus.manifest import SHARDS, read_manifest, read_slices, require_corpus
from stofm.corpus.sources import unique_names
from stofm.corpus.storage import alone, find_damage

if TYPE_CHECKING:
    from os import PathLike

    import pandas as pd


def info(corpus: str | PathLike[str]) -> pd.DataFrame:
    """Count slices and cells of a corpus by status, technology and species.

    Parameters
    ----------
    corpus
        Folder of a corpus.

    Returns
    -------
    Columns ``status``, ``technology``, ``species``, ``slices`` and ``cells``.

    Examples
    --------
    >>> import stofm as st
    >>> st.datasets.simulate_slice(300, 100).write_h5ad("info.h5ad")
    >>> manifest = st.corpus.build(["info.h5ad"], "info_corpus")
    >>> st.corpus.info("info_corpus")[["status", "slices"]].values.tolist()
    [['ok', 1]]
    """
    groups = read_manifest(local(corpus)).groupby(["status", "technology", "species"])
    return groups["cells"].agg(slices="size", cells="sum").reset_index()


def check(corpus: str | PathLike[str]) -> list[str]:
    """Check that a corpus is as it was written; reads all of it.

    Parameters
    ----------
    corpus
        Folder of a corpus.

    Returns
    -------
    What is missing or damaged, with the slices that are lost; empty if the corpus is intact.

    Examples
    --------
    >>> import stofm as st
    >>> st.datasets.simulate_slice(300, 100).write_h5ad("check.h5ad")
    >>> manifest = st.corpus.build(["check.h5ad"], "check_corpus")
    >>> st.corpus.check("check_corpus")
    []
    """
    folder = require_corpus(corpus)
    found = []
    for name, slices in read_manifest(folder).groupby("shard"):
        if name and (damage := find_damage(folder / SHARDS / str(name))):
            lost = ", ".join(slices["name"][:5]) + (", ..." if len(slices) > 5 else "")
            found.append(
                f"{damage} Delete {folder / SHARDS / str(name)} and build again: its {len(slices)} slices "
                f"({lost}) are then read again from their sources."
            )
    return found


def export(
    corpus: str | PathLike[str], out: str | PathLike[str], *, show_progress_bar: bool = True
) -> None:
    """Write each slice of a corpus to a Zarr store that :func:`anndata.read_zarr` opens.

    Existing stores are left as they are.

    Parameters
    ----------
    corpus
        Folder of a corpus.
    out
        Folder of the stores: counts, positions in ``obsm["spatial"]``, Ensembl ids and symbols,
        rows in the source as names of cells, and the manifest's entry in ``uns["source"]``.
    show_progress_bar
        Show a bar.

    Examples
    --------
    >>> import stofm as st
    >>> st.datasets.simulate_slice(300, 100).write_h5ad("export.h5ad")
    >>> manifest = st.corpus.build(["export.h5ad"], "export_corpus")
    >>> st.corpus.export("export_corpus", "stores")
    """
    slices, folder = read_slices(corpus), local(out)
    names = unique_names([one.name for one in slices])
    folder.mkdir(parents=True, exist_ok=True)
    shown = progress(
        list(zip(slices, names, strict=True)), "export", "slice", show=show_progress_bar
    )
    with alone(folder / ".export.lock"):
        for one, name in shown:
            if not (folder / f"{name}.zarr").exists():
                write_data(one.to_anndata(), folder / f"{name}.zarr")
