"""``stofm.datasets.simulate_slice``: sections with known regions, types and proportions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, get_args

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree

from stofm._config import check_seed
from stofm._keys import Obsm
from stofm.datasets._interactions import Interaction, Planted, join_states, plan_interactions
from stofm.datasets._morphology import add_images
from stofm.datasets._tissues import (
    Panel,
    Regions,
    Species,
    Tissue,
    draw_layers,
    draw_nodules,
    hexagonal_lattice,
    make_panel,
    make_tissue,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

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
    interactions: Sequence[Interaction] = (),
    image: bool = False,
    seed: int = 0,
) -> AnnData:
    """Simulate sections of tissue with known regions, cell types and proportions.

    Cells take their type from the region's composition, with gradients inside a region and
    some mixing at its border. Counts are Gamma-Poisson around the type's profile, which follows
    gradients too, with a log-normal depth per cell, transcripts that belong to a neighbour, and
    dropout. Panel, profiles and compositions are the same for every seed, so that slices of
    different seeds can be used for training and testing; the seed draws positions, types and
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
        ``"xenium"`` and ``"merfish"``: single cells 12 µm apart. ``"slideseq"``: beads 10 µm
        apart with one or two cells each and few counts. ``"visium"``: 55 µm spots on a hexagonal
        lattice of 100 µm with about six cells each.
    regions
        ``"laminar"``: cortex, layers from top to bottom. ``"nodular"``: tumour nests with a
        margin and lymphoid follicles in stroma.
    n_slices
        Sections, each in a coordinate frame of its own, with differences in depth and gene
        detection between them. Further slices do not change the first ones.
    image
        Draw an H&E-like image of each slice: nuclei whose density and size follow regions and cell
        types, in tissue whose stain follows regions.
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
    - ``obs["sends"]``, ``obs["responds_to"]``: with `interactions`, the ligands that a cell
      expresses and those that it responds to, joined by commas; of a spot those of its cells;
    - ``uns["simulation"]``: the parameters. With `interactions`, its entry ``"interactions"`` has
      for each ``sender``, ``receiver``, ``ligand``, ``distance`` and the genes of the ``programme``;
    - ``uns["spatial"]``: with `image`, an image and scale factors by slice, 2 µm a pixel for spots
      and 0.5 for cells.

    Other Parameters
    ----------------
    cells_per_spot
        Mean number of cells in a row; above 1, rows are spots. None: the technology's.
    depth
        Mean counts of a row. None: the technology's for this number of genes.
    interactions
        Effects of neighbours, each ``(sender type, receiver type, ligand gene, micrometres)``, such
        as ``("Myofibroblast", "Tumor", "VEGFA", 50)``. A random half of the sender's cells
        express the ligand. It switches on a programme, 4 % of the panel's genes at three times
        their level, in each cell of the receiver's type that has such a cell within the distance.

    Raises
    ------
    ValueError
        An argument is out of range, more genes are asked for than there are real symbols, or an
        interaction names a type or a gene that is not there.

    See Also
    --------
    stofm.datasets.load : sections of real tissue.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(500, 100, regions="nodular")
    >>> adata.shape
    (500, 100)
    """
    choices = {"species": Species, "technology": Technology, "regions": Regions}
    given = {"species": species, "technology": technology, "regions": regions}
    for name, kind in choices.items():
        _require(name, given[name], f"one of {list(get_args(kind))}", given[name] in get_args(kind))
    counts: dict[str, Any] = {"n_cells": n_cells, "n_genes": n_genes, "n_slices": n_slices}
    for name, count in counts.items():
        is_whole = isinstance(count, int | np.integer) and not isinstance(count, bool)
        _require(name, count, "a whole number of at least 1", is_whole and count >= 1)
    check_seed(seed)
    platform = _PLATFORMS[technology]
    cells_per_spot = platform.cells_per_spot if cells_per_spot is None else cells_per_spot
    depth = platform.counts_per_gene * n_genes if depth is None else depth
    _require("cells_per_spot", cells_per_spot, "at least 1", 1 <= cells_per_spot < np.inf)
    _require("depth", depth, "above 0", 0 < depth < np.inf)
    number = list(_PLATFORMS).index(technology)
    panel = make_panel(n_genes, species=species, regions=regions, platform=number)
    tissue = make_tissue(regions)
    planted = plan_interactions(interactions, tissue, panel)
    panel = panel._replace(gradients=np.vstack([panel.gradients, planted.folds]))
    what = (platform, regions, tissue, panel, planted, n_cells, float(cells_per_spot), float(depth))
    slices = [_draw_slice(*what, np.random.default_rng([seed, k])) for k in range(n_slices)]
    adata = _to_anndata(slices, tissue, panel, is_spot=cells_per_spot > 1.0)
    if planted.ligands:
        states = np.concatenate([part.states for part in slices])
        for name, own in zip(("sends", "responds_to"), np.hsplit(states, 2), strict=True):
            adata.obs[name] = pd.Categorical(join_states(own, planted.ligands))
        adata.uns["simulation"] = {"interactions": planted.truth}
    adata.uns["simulation"] = adata.uns.get("simulation", {}) | {
        **{name: int(count) for name, count in counts.items()},
        **given,
        "cells_per_spot": float(cells_per_spot),
        "depth": float(depth),
        "seed": int(seed),
        "unit": "micrometre",
    }
    if image:
        add_images(adata, seed)
    return adata


class _Slice(NamedTuple):
    """One drawn slice, by row: counts, micrometres, region code, cells of each type, states."""

    counts: sp.csr_matrix
    places: NDArray[np.float64]
    region: NDArray[np.int64]
    cells_of_type: NDArray[np.int64]
    states: NDArray[np.bool_]


def _draw_slice(
    platform: _Platform,
    regions: Regions,
    tissue: Tissue,
    panel: Panel,
    planted: Planted,
    n_rows: int,
    cells_per_spot: float,
    depth: float,
    rng: np.random.Generator,
) -> _Slice:
    # Rows in random order, as barcodes come; off the lattice they still keep a distance.
    places = hexagonal_lattice(n_rows, platform.pitch)
    if not platform.on_lattice:
        places += rng.normal(0.0, 0.2 * platform.pitch, places.shape)
    places = rng.permutation(places)
    row_of_cell, cell_places = np.arange(n_rows), places
    if cells_per_spot > 1.0:
        # Each cell has a place of its own inside its spot.
        row_of_cell = np.repeat(row_of_cell, 1 + rng.poisson(cells_per_spot - 1.0, n_rows))
        radius = max(platform.spot_radius, platform.pitch / 2)
        distance = radius * np.sqrt(rng.random(len(row_of_cell)))
        angle = rng.uniform(0.0, 2.0 * np.pi, len(row_of_cell))
        offset = distance[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        cell_places = places[row_of_cell] + offset
    n_cells, n_types = len(row_of_cell), len(tissue.cell_types)

    side = float(np.ptp(places, axis=0).max()) + platform.pitch
    if regions == "laminar":
        locate = draw_layers(side, rng)
    else:
        n_nodules = int(np.clip(n_rows // _CELLS_PER_NODULE, _MIN_NODULES, _MAX_NODULES))
        locate = draw_nodules(side, n_nodules, rng)
    _, fields = locate(cell_places)
    home, _ = locate(cell_places + rng.normal(0.0, _BLUR * side, cell_places.shape))
    weights = tissue.composition[home] * np.exp(fields @ tissue.type_gradients)
    cumulative = np.cumsum(weights, axis=1)
    threshold = rng.random((n_cells, 1)) * cumulative[:, -1:]
    cell_type = (cumulative <= threshold).sum(axis=1)
    states = planted.states(cell_places, cell_type, rng)
    fields = np.hstack([fields, states])

    # Share of each type's transcripts in a cell: its own and some of its neighbour's. After a Beta
    # distribution most cells are clean, some are half their neighbour's.
    mixture = np.zeros((n_cells, n_types), dtype=np.float32)
    bleed = rng.beta(1.0, 1.0 / platform.bleed - 1.0, n_cells) if n_cells > 1 else np.zeros(1)
    nearest = cKDTree(cell_places).query(cell_places, k=[min(2, n_cells)])[1][:, 0]
    mixture[np.arange(n_cells), cell_type] = 1.0 - bleed
    mixture[np.arange(n_cells), cell_type[nearest]] += bleed
    # Log-normal over rows, and over slices: its mean is exp(sigma^2 / 2).
    sigma = platform.depth_sigma
    of_row = np.exp(rng.normal(-0.5 * sigma**2, sigma, n_rows))
    of_slice = np.exp(rng.normal(-0.5 * _BATCH_DEPTH**2, _BATCH_DEPTH))
    depths = (depth / cells_per_spot * of_slice * of_row[row_of_cell]).astype(np.float32)
    counts = _draw_counts(mixture, fields.astype(np.float32), depths, panel, platform.dropout, rng)
    if n_cells > n_rows:
        ones = np.ones(n_cells, dtype=np.int32)
        into_rows = sp.csr_matrix((ones, (row_of_cell, np.arange(n_cells))))
        counts, states = into_rows @ counts, into_rows @ states > 0
    of_type = np.bincount(row_of_cell * n_types + cell_type, minlength=n_rows * n_types)
    of_type = of_type.reshape(n_rows, n_types)
    return _Slice(counts, places, locate(places)[0], of_type, states)


def _draw_counts(
    mixture: NDArray[np.float32],
    fields: NDArray[np.float32],
    depths: NDArray[np.float32],
    panel: Panel,
    dropout: float,
    rng: np.random.Generator,
) -> sp.csr_matrix:
    """Gamma-Poisson counts of cells (n_cells, n_genes), with dropout, block by block."""
    n_genes = len(panel.symbols)
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
        chance = dropout * np.exp(-expected[rows, genes])
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


def _require(name: str, value: object, expected: str, is_fine: object) -> None:
    if not is_fine:
        raise ValueError(f"{name} must be {expected}, found {value!r}.")
