"""``stofm.read``: what an instrument wrote, joined into an AnnData."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stofm._edge.places import listed
from stofm._files import local
from stofm.io.detection import Candidate, choose, matrix_for
from stofm.io.files import File, find_files
from stofm.io.finishing import add_images, finished
from stofm.io.formats import AUTO, GENERIC, MICROMETRE, format_of
from stofm.io.joining import join
from stofm.io.units import Scale
from stofm.io.whole import WHOLE, read_whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


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
