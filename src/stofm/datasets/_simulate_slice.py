"""``stofm.datasets.simulate_slice``: sections with known regions, types and proportions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stofm._config import check_seed
from stofm._keys import Obsm
from stofm.datasets._geometry import draw_layers, draw_nodules, hexagonal_lattice
from stofm.datasets._tissues import Panel, Regions, Species, Tissue, make_panel, make_tissue

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.datasets._geometry import RegionMap

Technology = Literal["xenium", "merfish", "slideseq", "visium"]

#: Cells of other types wander over a region's border by this share of the field of view.
_BLUR: Final = 0.012
_CELLS_PER_NODULE: Final = 1000
_MIN_NODULES: Final = 5
_MAX_NODULES: Final = 40
_BATCH_GENE: Final = 0.1
_BATCH_DEPTH: Final = 0.15
#: Entries of a dense block of cells by genes; bounds the memory.
_BLOCK: Final = 4_000_000


@dataclass(frozen=True, kw_only=True)
class _Platform:
    """Numbers of a technology: mean counts per gene, spread, losses, geometry in micrometres."""

    counts_per_gene: float
    depth_sigma: float
    dropout: float
    bleed: float
    pitch: float
    cells_per_spot: float = 1.0
    spot_radius: float = 0.0
    on_lattice: bool = False


_PLATFORMS: Final[dict[Technology, _Platform]] = {
    "xenium": _Platform(counts_per_gene=0.6, depth_sigma=0.5, dropout=0.10, bleed=0.12, pitch=12.0),
    "merfish": _Platform(counts_per_gene=0.9, depth_sigma=0.45, dropout=0.05, bleed=0.1, pitch=12.0),
    "slideseq": _Platform(
        counts_per_gene=0.25, depth_sigma=0.6, dropout=0.30, bleed=0.15, pitch=10.0,
        cells_per_spot=1.5, spot_radius=8.0,
    ),
    "visium": _Platform(
        counts_per_gene=4.0, depth_sigma=0.4, dropout=0.15, bleed=0.05, pitch=100.0,
        cells_per_spot=6.0, spot_radius=27.5, on_lattice=True,
    ),
}  # fmt: skip


def simulate_slice(
    n_cells: int = 2000,
    n_genes: int = 300,
    *,
    species: Species = "human",
    technology: Technology = "xenium",
    regions: Regions = "laminar",
    n_slices: int = 1,
    cells_per_spot: float | None = None,
    depth: float | None = None,
    seed: int = 0,
) -> AnnData:
    """Simulate sections of tissue with known regions, cell types and proportions.

    Cells take their type from the region's composition, with gradients inside a region and
    some mixing at its border. Counts are Gamma-Poisson around the type's profile, which follows
    gradients too, with a log-normal depth per cell, transcripts that belong to a neighbour, and
    dropout. Panel, profiles and compositions are the same for every seed, so that slices of
    different seeds can be used for training and testing; the seed draws places, types and
    counts. Profiles are invented; only the gene symbols, and which gene marks which type, are
    real.

    Parameters
    ----------
    n_cells
        Rows of one slice: cells, or spots where a row is a spot.
    n_genes
        Genes of the panel. It opens with markers of each type; a smaller panel is the beginning
        of a larger one.
    species
        Whose gene symbols to use; a mouse gene has its human counterpart's profile.
    technology
        ``"xenium"`` and ``"merfish"``: single cells 12 um apart. ``"slideseq"``: beads 10 um
        apart with one or two cells each and few counts. ``"visium"``: 55 um spots on a hexagonal
        lattice of 100 um with about six cells each.
    regions
        ``"laminar"``: cortex, layers from top to bottom. ``"nodular"``: tumour nests with a
        margin and lymphoid follicles in stroma.
    n_slices
        Sections, each in a coordinate frame of its own, with differences in depth and gene
        detection between them. Further slices do not change the first ones.
    cells_per_spot
        Mean number of cells in a row; above 1, rows are spots. None: the technology's.
    depth
        Mean counts of a row. None: the technology's for this number of genes.
    seed
        Seed of everything that is drawn.

    Returns
    -------
    AnnData with `n_slices` x `n_cells` rows and

    - ``X``: raw counts, CSR, int32;
    - ``obs["cell_type"]`` (in a spot the most frequent one), ``obs["region"]``,
      ``obs["slice_id"]``: categorical;
    - ``obs["n_cells"]``: for spots, the number of cells in it;
    - ``obsm["spatial"]``: float64 (n, 2) micrometres;
    - ``obsm["proportions"]``: for spots, DataFrame of the types' shares of a spot's cells, each
      row sums to 1;
    - ``var["symbol"]``, ``var["marker_of"]`` (types that the gene marks, joined by commas);
    - ``uns["simulation"]``: the parameters.

    Raises
    ------
    ValueError
        An argument is out of range, or more genes are asked for than there are real symbols.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, regions="nodular")
    >>> adata.shape
    (500, 100)
    """
    for name, value, allowed in (
        ("species", species, get_args(Species)),
        ("technology", technology, get_args(Technology)),
        ("regions", regions, get_args(Regions)),
    ):
        _require(name, value, f"one of {list(allowed)}", is_fine=value in allowed)
    counts: dict[str, object] = {"n_cells": n_cells, "n_genes": n_genes, "n_slices": n_slices}
    for name, count in counts.items():
        is_fine = isinstance(count, int | np.integer) and bool(count >= 1)
        is_fine = is_fine and not isinstance(count, bool)
        _require(name, count, "a whole number of at least 1", is_fine=is_fine)
    check_seed(seed)
    platform = _PLATFORMS[technology]
    if cells_per_spot is None:
        cells_per_spot = platform.cells_per_spot
    if depth is None:
        depth = platform.counts_per_gene * n_genes
    _require("cells_per_spot", cells_per_spot, "at least 1", is_fine=1 <= cells_per_spot < np.inf)
    _require("depth", depth, "above 0", is_fine=0 < depth < np.inf)
    panel = make_panel(
        n_genes, species=species, regions=regions, platform=list(_PLATFORMS).index(technology)
    )
    tissue = make_tissue(regions)
    simulation = _Simulation(
        n_cells, regions, platform, float(cells_per_spot), float(depth), tissue, panel
    )
    slices = [simulation.draw(np.random.default_rng([seed, number])) for number in range(n_slices)]
    adata = _to_anndata(slices, tissue, panel, is_spot=cells_per_spot > 1.0)
    adata.uns["simulation"] = {
        "n_cells": int(n_cells),
        "n_genes": int(n_genes),
        "species": species,
        "technology": technology,
        "regions": regions,
        "n_slices": int(n_slices),
        "cells_per_spot": float(cells_per_spot),
        "depth": float(depth),
        "seed": int(seed),
        "unit": "micrometre",
    }
    return adata


class _Slice(NamedTuple):
    """One drawn slice, by row: counts, micrometres, region code, number of cells of each type."""

    counts: sp.csr_matrix
    places: NDArray[np.float64]
    region: NDArray[np.int64]
    cells_of_type: NDArray[np.int64]


@dataclass(frozen=True)
class _Simulation:
    """What is the same for every slice."""

    n_rows: int
    regions: Regions
    platform: _Platform
    cells_per_spot: float
    depth: float
    tissue: Tissue
    panel: Panel

    def draw(self, rng: np.random.Generator) -> _Slice:
        """Draw one slice."""
        places = self._places(rng)
        row_of_cell, cell_places = self._cells(places, rng)
        side = float(np.ptp(places, axis=0).max()) + self.platform.pitch
        locate = self._region_map(side, rng)
        _, fields = locate(cell_places)
        home, _ = locate(cell_places + rng.normal(0.0, _BLUR * side, cell_places.shape))
        cell_type = self._types(home, fields, rng)
        mixture = self._mixture(cell_type, cell_places, rng)
        depths = self._depths(row_of_cell, rng)
        counts = self._counts(mixture, fields.astype(np.float32), depths, rng)
        if len(row_of_cell) > self.n_rows:
            cells = np.arange(len(row_of_cell))
            ones = np.ones(len(cells), dtype=np.int32)
            counts = sp.csr_matrix((ones, (row_of_cell, cells))) @ counts
        n_types = len(self.tissue.cell_types)
        of_type = np.bincount(row_of_cell * n_types + cell_type, minlength=self.n_rows * n_types)
        return _Slice(counts, places, locate(places)[0], of_type.reshape(self.n_rows, n_types))

    def _places(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """Rows in random order, as barcodes come; off the lattice they still keep a distance."""
        pitch = self.platform.pitch
        places = hexagonal_lattice(self.n_rows, pitch)
        if not self.platform.on_lattice:
            places += rng.normal(0.0, 0.2 * pitch, places.shape)
        return rng.permutation(places)

    def _cells(
        self, places: NDArray[np.float64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Row of each cell, and the cell's own place inside its spot."""
        if self.cells_per_spot == 1.0:
            return np.arange(self.n_rows), places
        n_inside = 1 + rng.poisson(self.cells_per_spot - 1.0, self.n_rows)
        row_of_cell = np.repeat(np.arange(self.n_rows), n_inside)
        radius = max(self.platform.spot_radius, self.platform.pitch / 2)
        distance = radius * np.sqrt(rng.random(len(row_of_cell)))
        angle = rng.uniform(0.0, 2.0 * np.pi, len(row_of_cell))
        offset = distance[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        return row_of_cell, places[row_of_cell] + offset

    def _region_map(self, side: float, rng: np.random.Generator) -> RegionMap:
        if self.regions == "laminar":
            return draw_layers(side, rng)
        n_nodules = int(np.clip(self.n_rows // _CELLS_PER_NODULE, _MIN_NODULES, _MAX_NODULES))
        return draw_nodules(side, n_nodules, rng)

    def _types(
        self, region: NDArray[np.int64], fields: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.int64]:
        weights = self.tissue.composition[region] * np.exp(fields @ self.tissue.type_gradients)
        cumulative = np.cumsum(weights, axis=1)
        threshold = rng.random((len(region), 1)) * cumulative[:, -1:]
        chosen: NDArray[np.int64] = (cumulative <= threshold).sum(axis=1)
        return chosen

    def _mixture(
        self, cell_type: NDArray[np.int64], places: NDArray[np.float64], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Share of each type's transcripts in a cell: its own and some of its neighbour's."""
        n = len(cell_type)
        mixture = np.zeros((n, len(self.tissue.cell_types)), dtype=np.float32)
        # A Beta distribution: most cells are clean, some are half their neighbour's.
        bleed = rng.beta(1.0, 1.0 / self.platform.bleed - 1.0, n) if n > 1 else np.zeros(n)
        nearest = cKDTree(places).query(places, k=[min(2, n)])[1][:, 0]
        rows = np.arange(n)
        mixture[rows, cell_type] = 1.0 - bleed
        mixture[rows, cell_type[nearest]] += bleed
        return mixture

    def _depths(
        self, row_of_cell: NDArray[np.int64], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Expected counts of each cell: log-normal over rows, and over slices."""
        sigma = self.platform.depth_sigma
        # The mean of a log-normal is exp(sigma^2 / 2).
        of_row = np.exp(rng.normal(-0.5 * sigma**2, sigma, self.n_rows))
        of_slice = np.exp(rng.normal(-0.5 * _BATCH_DEPTH**2, _BATCH_DEPTH))
        of_cell = self.depth / self.cells_per_spot * of_slice * of_row[row_of_cell]
        return np.asarray(of_cell, dtype=np.float32)

    def _counts(
        self,
        mixture: NDArray[np.float32],
        fields: NDArray[np.float32],
        depths: NDArray[np.float32],
        rng: np.random.Generator,
    ) -> sp.csr_matrix:
        """Gamma-Poisson counts of cells (n_cells, n_genes), with dropout, block by block."""
        panel, n_genes = self.panel, len(self.panel.symbols)
        # A slice detects some genes better than others.
        factor = np.exp(rng.normal(0.0, _BATCH_GENE, n_genes)).astype(np.float32)
        expression = panel.expression * factor
        step, blocks = max(1, _BLOCK // n_genes), []
        for start in range(0, len(mixture), step):
            block = slice(start, start + step)
            expected = mixture[block] @ expression
            expected *= np.exp(fields[block] @ panel.gradients)
            expected *= depths[block, None]
            rate = rng.standard_gamma(panel.shape, expected.shape, dtype=np.float32)
            rate *= expected
            rate /= panel.shape
            counts = rng.poisson(rate)
            rows, genes = counts.nonzero()
            # A gene is the less likely to be lost, the higher its expected count.
            chance = self.platform.dropout * np.exp(-expected[rows, genes])
            is_found = rng.random(len(rows)) >= chance
            rows, genes = rows[is_found], genes[is_found]
            values = counts[rows, genes].astype(np.int32)
            blocks.append(sp.csr_matrix((values, (rows, genes)), shape=counts.shape))
        return sp.vstack(blocks, format="csr")


def _to_anndata(slices: list[_Slice], tissue: Tissue, panel: Panel, *, is_spot: bool) -> AnnData:
    n_rows = len(slices[0].places)
    names = [f"{number}-{row}" for number in range(len(slices)) for row in range(n_rows)]
    of_type = np.concatenate([part.cells_of_type for part in slices])
    slice_ids = [f"slice{number}" for number in range(len(slices))]
    obs = {
        "cell_type": _categorical(of_type.argmax(axis=1), tissue.cell_types),
        "region": _categorical(np.concatenate([part.region for part in slices]), tissue.regions),
        "slice_id": _categorical(np.repeat(np.arange(len(slices)), n_rows), slice_ids),
    }
    adata = ad.AnnData(
        sp.vstack([part.counts for part in slices], format="csr"),
        obs=pd.DataFrame(obs, index=names),
        var=pd.DataFrame(
            {"symbol": panel.symbols, "marker_of": panel.marker_of}, index=panel.symbols
        ),
        obsm={Obsm.SPATIAL: np.concatenate([part.places for part in slices])},
    )
    if is_spot:
        n_inside = of_type.sum(axis=1)
        adata.obs["n_cells"] = n_inside
        adata.obsm["proportions"] = pd.DataFrame(
            of_type / n_inside[:, None], index=names, columns=list(tissue.cell_types)
        )
    return adata


def _categorical(codes: NDArray[np.int64], names: tuple[str, ...] | list[str]) -> pd.Categorical:
    return pd.Categorical.from_codes(codes, categories=list(names)).remove_unused_categories()


def _require(name: str, value: object, expected: str, *, is_fine: bool) -> None:
    if not is_fine:
        msg = f"{name} must be {expected}, found {value!r}."
        raise ValueError(msg)
