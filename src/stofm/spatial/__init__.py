"""Slices, sub-slices and virtual cells on plain arrays: numpy, scipy and igraph only."""

from stofm.spatial.coordinates import (
    MODEL_DIAGONAL,
    canonical_order,
    normalize_coordinates,
    partition_balanced,
    partition_reference,
)
from stofm.spatial.neighbor_graph import nearest_neighbors, umap_weights
from stofm.spatial.pairs import NO_NEIGHBOR, NodeType, PairDistances, pair_distances
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
    SliceLayout,
    SubSlice,
    SubSliceConfig,
    build_subslice,
    lay_out_slice,
    rows_by_subslice,
)
from stofm.spatial.virtual_cells import (
    VirtualCells,
    cluster_cells,
    leiden,
    merge_clusters,
    mix_expression_and_place,
    principal_components,
    virtual_cells,
)

__all__ = [
    "MODEL_DIAGONAL",
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
    "cluster_cells",
    "gene_scales",
    "grid_spots",
    "lay_out_slice",
    "leiden",
    "merge_clusters",
    "mix_expression_and_place",
    "nearest_neighbors",
    "normalize_coordinates",
    "pair_distances",
    "partition_balanced",
    "partition_reference",
    "principal_components",
    "rows_by_subslice",
    "simulate_spots",
    "split_cells",
    "umap_weights",
    "virtual_cells",
]
