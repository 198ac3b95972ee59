"""Slices, sub-slices and virtual cells on plain arrays: numpy, scipy and igraph only."""

from stofm.spatial.plane import (
    canonical_order,
    normalize_coordinates,
    partition_balanced,
    partition_reference,
)
from stofm.spatial.splits import Split, split_cells
from stofm.spatial.spots import (
    SimulatedSpots,
    SpotGrid,
    SpotRules,
    TypedCells,
    gene_scales,
    grid_spots,
    simulate_spots,
)
from stofm.spatial.subslices import (
    NO_NEIGHBOR,
    NodeType,
    PairDistances,
    SliceLayout,
    SubSlice,
    SubSliceConfig,
    build_subslice,
    lay_out_slice,
    pair_distances,
    rows_by_subslice,
)
from stofm.spatial.virtual_cells import (
    VirtualCells,
    mix_expression_and_place,
    principal_components,
    virtual_cells,
)

__all__ = [
    "NO_NEIGHBOR",
    "NodeType",
    "PairDistances",
    "SimulatedSpots",
    "SliceLayout",
    "Split",
    "SpotGrid",
    "SpotRules",
    "SubSlice",
    "SubSliceConfig",
    "TypedCells",
    "VirtualCells",
    "build_subslice",
    "canonical_order",
    "gene_scales",
    "grid_spots",
    "lay_out_slice",
    "mix_expression_and_place",
    "normalize_coordinates",
    "pair_distances",
    "partition_balanced",
    "partition_reference",
    "principal_components",
    "rows_by_subslice",
    "simulate_spots",
    "split_cells",
    "virtual_cells",
]
