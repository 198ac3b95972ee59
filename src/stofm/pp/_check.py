"""``stofm.pp.check``: one page on what embedding will do, before it does."""

from __future__ import annotations

import textwrap
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.counts import peek_counts, read_counts
from stofm._edge.gene_mapping import (
    Columns,
    find_columns,
    kinds_of_others,
    report_columns,
    vocabulary_of,
)
from stofm._edge.slices import Nearest, Places, read_places
from stofm._edge.tables import layer_names, read_record, require_cells_and_genes, resolve_table
from stofm._keys import Obs, Obsm, Uns
from stofm._messages import changed, collecting, text_of

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.embedding import Run
    from stofm.genes.mapping import Species
    from stofm.nn import Stofm

#: Cells that are embedded to tell how long it takes, and before that to warm up.
_TIMED: Final = 600
_WARMING: Final = 60
_SAMPLE: Final = 512
_WIDTH: Final = 100
_PANEL: Final = 6000


@dataclass
class Findings:
    """What :func:`check` found; ``print`` it for the page.

    Attributes
    ----------
    n_cells, n_genes
        Shape of the AnnData.
    technology, unit
        As :func:`stofm.read` recorded them; ``""`` if it did not.
    layer
        Where the raw counts are: ``"X"``, a layer, or None if nowhere.
    counts_per_cell
        Median over the cells.
    species
        ``"human"``, ``"mouse"``, ``"human and mouse"`` or ``"unknown"``.
    n_matched, counts_share
        Genes that the model knows, and their share of all counts.
    n_controls, control_share
        Columns that are not genes, and the share of counts that :func:`stofm.read` found in controls.
    n_empty
        Cells without a count of a gene that the model knows.
    slices
        Names of the slices and numbers of their cells.
    extent, spacing
        Width and height of the largest slice, and the median distance of a cell to its nearest
        neighbour, in units of the coordinates.
    device, seconds, memory, free_memory
        Where :func:`stofm.tl.embed` will compute; the seconds it will take, timed on some of the cells; bytes
        it will take, and those that are free.
    problems
        Errors that :func:`stofm.tl.embed` would raise.
    warnings
        Warnings that it would give.

    See Also
    --------
    stofm.pp.check : makes it.
    """

    n_cells: int
    n_genes: int
    technology: str = ""
    unit: str = ""
    layer: str | None = None
    counts_per_cell: float = float("nan")
    species: str = "unknown"
    n_matched: int = 0
    counts_share: float = float("nan")
    n_controls: int = 0
    control_share: float = float("nan")
    n_empty: int = 0
    slices: dict[str, int] = field(default_factory=dict)
    extent: tuple[float, float] | None = None
    spacing: float = float("nan")
    model: str = ""
    device: str = ""
    seconds: float = float("nan")
    memory: int = 0
    free_memory: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether :func:`stofm.tl.embed` would run."""
        return not self.problems

    def __str__(self) -> str:
        """The page."""
        rows = [
            ("cells x genes", f"{self.n_cells:,} x {self.n_genes:,}"),
            ("technology", self._technology()),
            ("species", self.species),
            ("raw counts", self._counts()),
            ("genes", f"{self.n_matched:,} are known{self._share()}"),
            ("not genes", f"{self.n_controls:,} columns{self._controls()}"),
            ("empty cells", f"{self.n_empty:,}"),
            ("positions", self._places()),
            ("slices", self._slices()),
            ("tl.embed", self._embedding()),
        ]
        lines = [f"{name:14} {text}" for name, text in rows]
        for title, messages in (("To change first", self.problems), ("To know", self.warnings)):
            lines += ["", f"{title}:"] if messages else []
            for message in messages:
                lines += textwrap.wrap(message, _WIDTH, initial_indent="- ", subsequent_indent="  ")
        return "\n".join(lines)

    def _technology(self) -> str:
        kind = "a panel" if self.n_genes < _PANEL else "a whole transcriptome"
        return self.technology or f"not recorded; {kind} of {self.n_genes:,} columns"

    def _counts(self) -> str:
        where = {None: "nowhere", "X": "in X"}.get(self.layer, f"in layers[{self.layer!r}]")
        return where if self.layer is None else f"{where}, {self.counts_per_cell:.0f} a cell"

    def _share(self) -> str:
        is_told = not np.isnan(self.counts_share)
        return f", with {self.counts_share:.1%} of the counts" if is_told else ""

    def _controls(self) -> str:
        is_told = not np.isnan(self.control_share)
        return f"; controls had {self.control_share:.2%} of the counts" if is_told else ""

    def _places(self) -> str:
        if self.extent is None:
            return "can't be read"
        unit = "µm" if self.unit == "micrometre" else "of an unknown unit"
        width, height = self.extent
        return f"{_short(width)} x {_short(height)} {unit}, cells {_short(self.spacing)} apart"

    def _slices(self) -> str:
        names = [f"{name} ({number:,})" for name, number in self.slices.items() if name]
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        return f"{len(self.slices)}: {', '.join(names[:5])}{more}" if names else "1"

    def _embedding(self) -> str:
        if not self.ok:
            return "would stop: see below"
        return (
            f"{self.model} on {self.device}: about {_duration(self.seconds)} and "
            f"{self.memory / 1e9:.2g} GB beside the data ({self.free_memory / 1e9:.2g} GB are free)"
        )


def _short(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _duration(seconds: float) -> str:
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}"
    return f"{max(seconds, 1):.0f} s"


def check(
    adata: AnnData | Any,
    model: Stofm | str | Path = "stofm-mini",
    *,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    species: Species = "auto",
    gene_key: str | None = None,
    orthologs: Any = None,
    device: Any = "auto",
    table_key: str | None = None,
) -> Findings:
    """Tell what :func:`stofm.tl.embed` will do with a section, before it does; nothing is changed.

    Counts, gene names, positions and slices go through the same checks: what it would refuse or warn
    of is in the findings, with what to do. Some of the cells are embedded to estimate how long all
    of them take.

    Parameters
    ----------
    adata
        Annotated data of one or several slices, or a SpatialData with such a table.
    model
        A :class:`stofm.Stofm`, a checkpoint folder, a hub id, or the embedded ``"stofm-mini"``.
    layer, spatial_key, library_key, species, gene_key, orthologs, device
        As for :func:`stofm.tl.embed`.
    table_key
        Table of a SpatialData.

    Returns
    -------
    Findings, whose text is a page.

    Raises
    ------
    TypeError
        `adata` is neither an AnnData nor a SpatialData.
    KeyError
        There is no such table.

    See Also
    --------
    stofm.tl.embed : does what the page announces.
    stofm.pp.map_genes : genes that are known, in detail.

    Examples
    --------
    >>> import stofm as st
    >>> findings = st.pp.check(st.datasets.load("mouse_cortex_osmfish"))
    >>> findings.species, findings.n_matched, findings.ok
    ('mouse', 33, True)
    """
    table = resolve_table(adata, table_key, copy=hasattr(adata, "tables"))
    source = read_record(table, Uns.SOURCE) or {}
    found = Findings(
        table.n_obs, table.n_vars, str(source.get("technology", "")), str(source.get("unit", ""))
    )
    genes = {"species": species, "gene_key": gene_key, "orthologs": orthologs}
    run = columns = places = None
    told = _Told(found)
    n_known = float("nan")
    with collecting() as found.warnings:
        with told:
            require_cells_and_genes(table)
        if not found.ok:
            return found
        with told:
            from stofm._edge.embedding import Run

            run = Run.choose(model, device, "auto", token_budget="auto", show_progress_bar=False)
            found.model, found.device = run.model.name, str(run.device)
        with told:
            found.n_controls = int((kinds_of_others(table) != "").sum())
            vocabulary = vocabulary_of(None if run is None else run.model)
            columns = find_columns(table, vocabulary, may_reuse=False, **genes)
        with told:
            n_known = _read_counts(table, found, layer, columns)
        with told:
            places = read_places(table, spatial_key=spatial_key, library_key=library_key)
            _describe_places(found, places)
        if run is not None and columns is not None and places is not None and found.ok:
            with told:
                _plan(table, found, run, places, n_known, layer, genes)
        found.warnings = list(dict.fromkeys(found.warnings))
    return found


class _Told:
    """Puts what would stop embedding into the findings."""

    def __init__(self, found: Findings) -> None:
        self.found = found

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, ValueError | KeyError | MemoryError | TypeError | OSError):
            return False
        self.found.problems.append(changed(text_of(error)))
        return True


def _read_counts(
    table: AnnData, found: Findings, layer: str | None, columns: Columns | None
) -> float:
    """Read all raw counts, wherever they are; returns the known genes of a cell."""
    found.layer = _raw_layer(table, layer)
    is_known = np.zeros(table.n_vars, dtype=bool) if columns is None else columns.token_ids >= 0
    totals, per_cell, known = np.zeros(table.n_vars), [], []
    if found.layer is not None:
        for block in read_counts(table, layer=None if found.layer == "X" else found.layer):
            totals += np.asarray(block.sum(axis=0, dtype=np.float64)).ravel()
            per_cell.append(np.asarray(block.sum(axis=1)).ravel())
            is_count = sparse.csr_matrix(
                (block.data != 0, block.indices, block.indptr), block.shape
            )
            known.append(is_count @ is_known.astype(np.int32))
        found.counts_per_cell = float(np.median(np.concatenate(per_cell)))
        found.n_empty = int((np.concatenate(known) == 0).sum())
        total = max(float(totals.sum()), 1.0)
        found.counts_share = float(totals[is_known].sum()) / total
        if Obs.CONTROLS in table.obs:
            controls = float(table.obs[Obs.CONTROLS].sum())
            found.control_share = controls / (controls + total)
    if columns is not None and columns.mapping is not None:
        found.species, found.n_matched = columns.mapping.species, columns.mapping.n_matched
        report_columns(table, columns, totals if known else None, is_written=False)
    if found.layer != (layer or "X"):
        for _ in read_counts(table, layer=layer):  # it says what is wrong, and where counts are
            pass
    return float(np.concatenate(known).mean())


def _raw_layer(table: AnnData, layer: str | None) -> str | None:
    """Where raw counts are: where they are asked for, or else in ``X`` or a layer."""
    rows = np.unique(np.linspace(0, table.n_obs - 1, _SAMPLE).astype(np.int64))
    for name in (layer, None, *layer_names(table)):
        with suppress(TypeError, ValueError, KeyError):
            counts, is_raw = peek_counts(table, name, rows)
            if is_raw and counts.data.any():
                return name or "X"
    return None


def _describe_places(found: Findings, places: Places) -> None:
    slices = places.slices
    found.slices = dict(zip(slices.names, map(len, slices.rows), strict=True))
    xy = places.coordinates[max(slices.rows, key=len)]
    width, height = np.ptp(xy, axis=0).tolist()
    found.extent, found.spacing = (width, height), Nearest.find(xy).spacing


def _plan(
    table: AnnData,
    found: Findings,
    run: Run,
    places: Places,
    n_known: float,
    layer: str | None,
    genes: dict[str, Any],
) -> None:
    """Tell how long embedding will take, and how much memory."""
    from stofm._edge.embedding import require_memory

    rules, rows = run.model.config.subslice, places.slices.rows
    found.memory, found.free_memory = require_memory(table, run, rules, rows, n_known, copy=False)
    largest = max(rows, key=len)
    xy = places.coordinates[largest]
    middle = np.median(xy, axis=0)
    nearest = largest[np.argsort(np.hypot(*(xy - middle).T), kind="stable")]
    for n_cells in (_WARMING, _TIMED):
        chosen = np.sort(nearest[:n_cells])
        start = time.perf_counter()
        _embed_some(table, run, chosen, places.coordinates[chosen], layer, genes)
        found.seconds = (time.perf_counter() - start) * table.n_obs / len(chosen)


def _embed_some(
    table: AnnData,
    run: Run,
    rows: NDArray[np.int64],
    xy: NDArray[np.float64],
    layer: str | None,
    genes: dict[str, Any],
) -> None:
    from anndata import AnnData

    from stofm._edge.embedding import embed_table

    counts, _ = peek_counts(table, layer, rows)
    some = AnnData(counts, var=table.var, obsm={Obsm.SPATIAL: xy})
    with collecting():
        embed_table(
            some,
            run,
            layer=None,
            genes=genes,
            cell_rep=None,
            spatial_key=Obsm.SPATIAL,
            library_key=None,
            rules=None,
            seed=0,
            key_added=Obsm.X,
            copy=False,
        )
