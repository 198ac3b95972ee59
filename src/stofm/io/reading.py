"""``stofm.read``: what an instrument wrote, joined into an AnnData, checked and recorded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._edge.counts import NotRawCountsError, read_counts
from stofm._edge.gene_mapping import kinds_of_others
from stofm._edge.places import listed
from stofm._edge.tables import write_record
from stofm._files import local
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm._messages import naming, warn
from stofm.io.detection import Candidate, choose, matrix_for
from stofm.io.files import File, find_files
from stofm.io.formats import AUTO, CONTROLS, GENERIC, H5AD, MICROMETRE, VISIUM, VISIUM_HD, format_of
from stofm.io.joining import join
from stofm.io.matrices import name_genes
from stofm.io.units import Scale, read_images, scale_images
from stofm.io.whole import WHOLE, read_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from stofm.io.joining import Read

#: Where scanpy keeps images.
_IMAGES: Final = "spatial"
_CONTROL: Final = re.compile(
    r"control|codeword|blank|neg|unassigned|deprecated|intergenic|spike", re.IGNORECASE
)


def add_images(read_: Read, one: Candidate, files: list[File]) -> None:
    """Put Visium's images into ``uns["spatial"]``."""
    if one.technology is H5AD:
        return  # they are there, if there are any
    if one.technology not in (VISIUM, VISIUM_HD):
        raise ValueError(
            f"Images are read for Visium only, and this is {read_.technology}. For images, read it with "
            "spatialdata-io; stofm takes the result."
        )
    name = one.file.sample.replace("/", "_") or read_.facts.get("library") or "sample"
    read_.adata.uns[_IMAGES] = read_images(one.file, files, name)


def finished(read_: Read, names: list[str], how: str) -> AnnData:
    """Remove controls, check counts, and record the sources."""
    name_genes(read_.adata)
    adata, others = _without_controls(read_)
    with naming(adata=names[-1]):
        _require_counts(adata, names[-1])
    scale = read_.scale
    adata.obsm[Obsm.SPATIAL] = np.asarray(adata.obsm[Obsm.SPATIAL], dtype=np.float64) * scale.factor
    if _IMAGES in adata.uns:
        adata.uns[_IMAGES] = scale_images(adata.uns[_IMAGES], scale.factor)
    genomes = {str(one) for one in adata.var.get("genome", ())} - {"", "Unknown"}
    facts = {"software": "", "panel": "", "organism": " ".join(sorted(genomes)), "library": ""}
    facts |= {key: value for key, value in read_.facts.items() if value}
    write_record(
        adata,
        Uns.SOURCE,
        {},
        technology=read_.technology,
        detected_by=how,
        **facts,
        files=np.array(names, dtype=object),
        unit=scale.unit,
        microns_per_unit=scale.factor,
        unit_from=scale.source,
        observations=read_.rows,
        dropped=read_.dropped | others,
    )
    unit = "micrometres" if scale.unit == MICROMETRE else "a unit that the files don't name"
    left = "; ".join(f"{number} {what}" for what, number in read_.dropped.items())
    logger.info(
        "%s (%s): %d %s x %d genes, coordinates in %s%s.",
        *(read_.technology, ", ".join(names), adata.n_obs, read_.rows, adata.n_vars, unit),
        f". Left out: {left}" if left else "",
    )
    return adata


def _without_controls(read_: Read) -> tuple[AnnData, dict[str, int]]:
    """Remove features that are not genes from ``X``, and sum them kind by kind."""
    adata = read_.adata
    kinds = kinds_of_others(adata)
    kinds[(kinds == "") & adata.var_names.str.contains(CONTROLS)] = "control"
    if not (kinds != "").any():
        return adata, {}
    dropped = {}
    sums: dict[str, Any] = {}
    for kind in sorted(set(kinds) - {""}):
        columns = np.flatnonzero(kinds == kind)
        dropped[f"features: {kind}"] = len(columns)
        is_control = _CONTROL.search(kind)
        key = Obs.CONTROLS if is_control else f"{re.sub(r'[^a-z0-9]+', '_', kind.lower())}_counts"
        total = np.asarray(adata.X[:, columns].sum(axis=1)).ravel()
        sums[key] = sums.get(key, 0) + np.rint(total).astype(np.int64)
    adata = adata[:, kinds == ""].copy()
    for key, total in sums.items():
        adata.obs[key] = total
    return adata, dropped


def _require_counts(adata: AnnData, name: str) -> None:
    n_counts = 0
    try:
        for block in read_counts(adata):
            n_counts += block.nnz
    except NotRawCountsError as error:
        raise ValueError(f"{name}: {error}") from None
    if not n_counts:
        warn(f"{name} has no counts: all {adata.n_obs} cells are empty.")


def read(
    path: str | Path,
    technology: str = AUTO,
    *,
    sample: str | None = None,
    bin_size: int | Literal["cells"] | None = None,
    images: bool = False,
    matrix: str | Path | None = None,
    coordinates: str | Path | None = None,
    columns: Sequence[str] | None = None,
    microns_per_unit: float | None = None,
    table_key: str | None = None,
) -> AnnData:
    """Read what an instrument wrote: counts, positions and names of cells, spots or bins.

    The format is recognised by the columns of tables and the content of files; names of samples,
    compression and sub-folders do not matter. Cells are matched by their ids, as text.

    Parameters
    ----------
    path
        A folder, or one of its files: a matrix, a table of cells, a ``.gef``, ``.gem`` or ``.h5ad``.
    technology
        ``"auto"``, or one of "Xenium", "Visium", "Visium HD", "MERSCOPE", "CosMx", "Stereo-seq",
        "Slide-seqV2", "Curio Seeker", "SeekSpace", "seqFISH", "seqFISH+", "STARmap", "Giotto",
        "h5ad" and "generic" (a matrix, and a table of ids, x and y).
    sample
        Which of several samples in a folder to read.
    bin_size
        Visium HD: micrometres of a bin (8 by default), or ``"cells"`` for ``segmented_outputs``.
        Stereo-seq: dots of 0.5 µm along a side (50 by default), or ``"cells"``.
    images
        Put Visium's images into ``uns["spatial"]``, or leave those of an ``.h5ad`` there. Scale
        factors are those for the coordinates here.
    matrix, coordinates
        Files of counts and of positions below `path`, if they must be named.
    columns
        Names of the columns of `coordinates` with id, x and y.
    microns_per_unit
        Micrometres per unit of the coordinates; overrides what the files say.
    table_key
        Table of a SpatialData store.

    Returns
    -------
    AnnData with raw counts as CSR in ``X``, and:

    ``obsm["spatial"]`` : float64 (n_obs, 2)
        In micrometres if the unit is known, else as in the file.
    ``obs``
        The other columns of the table of cells; ``control_counts``: counts of control features,
        which are not in ``X``. Other features that are not genes, such as antibodies, have one
        column per kind.
    ``var``
        ``gene_ids`` with Ensembl ids, if there are any.
    ``uns["stofm"]["source"]``
        ``technology``, ``detected_by``, ``software``, ``panel``, ``organism`` (``""`` if unknown),
        ``files``, ``unit`` (``"micrometre"`` or ``"unknown"``), ``microns_per_unit``,
        ``unit_from``, ``observations``, ``dropped`` (what was left out, and how many).

    Raises
    ------
    FileNotFoundError
        A file is not there; the message says what was expected and what was found.
    ValueError
        There are several technologies or samples, or no such bins; ids don't match or have lost
        digits; counts are not integers.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.read("xenium_run/outs")  # doctest: +SKIP
    >>> adata = st.read(
    ...     "counts", coordinates="positions.csv", columns=["id", "x", "y"]
    ... )  # doctest: +SKIP
    """
    root = local(path)
    if not root.exists():
        raise FileNotFoundError(f"There is no file or folder {root}.")
    wanted = format_of(technology)
    where = str(root.resolve())
    files = find_files(root)
    own = files[0] if root.is_file() else None
    if own is not None and own.kind not in WHOLE:
        files = find_files(root.parent)
        own = next(file for file in files if file.path.name == root.name)
        files = [file for file in files if file.sample == own.sample]
    chosen = None if own is None or own.kind not in ("10x", "mtx") else own
    if (matrix, coordinates, columns) != (None, None, None):
        one = _named(files, coordinates, columns, where)
        chosen = chosen if matrix is None else _named_file(files, matrix, where)
    else:
        one = choose(files, wanted, sample, bin_size, where, own)
    if one.file.kind in WHOLE:
        read_, used = read_whole(one, bin_size, table_key, images=images), [one.file]
    else:
        chosen = chosen or matrix_for(one, files, where)
        read_, used = join(one, chosen, files), [one.file, chosen]
    if microns_per_unit is not None:
        scale = Scale(microns_per_unit, MICROMETRE, "microns_per_unit of the call")
        read_ = replace(read_, scale=scale)
    if images:
        add_images(read_, one, files)
    names = [file.name for file in used]
    how = f"{names[0]}: {read_.how}" if wanted is None else "technology of the call"
    return finished(read_, names, how)


def _named_file(files: list[File], name: str | Path, where: str) -> File:
    """A file named by its path within a folder, or by its own path."""
    for file in files:
        if file.name == Path(name).as_posix() or file.path.resolve() == local(name).resolve():
            return file
        if file.kind == "mtx" and file.path.parent.resolve() == local(name).resolve():
            return file
    inside = [file for file in files if file.name.startswith(f"{Path(name).as_posix()}/")]
    if found := [file for file in inside if file.kind in ("10x", "mtx")]:
        return found[0]
    raise FileNotFoundError(
        f"There is no file {str(name)!r} in {where}; there are {listed([f.name for f in files])}."
    )


def _named(
    files: list[File], coordinates: str | Path | None, columns: Sequence[str] | None, where: str
) -> Candidate:
    """A table of positions by explicit names."""
    if coordinates is None:
        return choose(files, GENERIC, None, None, where)
    file = _named_file(files, coordinates, where)
    there = file.columns
    if columns is None:
        names = GENERIC.columns(there)
    else:
        there = there or (*columns, *map(str, range(len(columns), len(file.first))))
        is_fit = len(columns) == 3 and set(columns) <= set(there)
        names = (columns[0], columns[1], columns[2]) if is_fit else None
    if names is None:
        raise ValueError(
            f"{file.name}: expected columns with id, x and y{'' if columns is None else f' {columns}'}, "
            f"found {list(there) or 'no header'}. Name all three: columns=['id', 'x', 'y']."
        )
    return Candidate(GENERIC, file, names, there)
