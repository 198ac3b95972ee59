"""Folders as instruments and databases write them; they are not part of the repository."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import stofm as st

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # Some samples have no counts, or cells without a position.
    pytest.mark.filterwarnings("ignore:.*has no counts|.*have no position"),
    pytest.mark.filterwarnings("ignore:Object at|SpatialData is not stored"),
]

#: Folder or file, arguments, cells, genes, technology and micrometres of a unit.
READ: list[tuple[str, dict[str, Any], int, int, str, float | None]] = [
    ("xenium_1.0.1_int_ids", {}, 6, 4, "Xenium", 1.0),
    ("xenium_3.0_prime", {}, 200, 60, "Xenium", 1.0),
    ("xenium_4.0_v1", {}, 120, 60, "Xenium", 1.0),
    ("xenium_mtx_csv_only", {}, 200, 60, "Xenium", 1.0),
    ("visium_v1_spaceranger1.0", {}, 100, 100, "Visium", 0.72684),
    ("visium_v1_no_library_ids", {}, 2695, 100, "Visium", 0.72648),
    ("visium_v1_raw_mtx", {}, 22, 49, "Visium", 0.72670),
    ("visium_v2_mtx_header", {}, 12, 5, "Visium", 0.34470),
    ("visium_v2_spaceranger2.1", {}, 100, 100, "Visium", 0.72684),
    ("visium_list_csv_with_header", {}, 100, 100, "Visium", 0.72684),
    ("visium_hd_seurat_mock", {}, 2695, 100, "Visium HD", 0.27376),
    ("visium_hd_002um_headers", {"bin_size": 2}, 10, 10, "Visium HD", 0.27382),
    ("visium_hd_spaceranger3_binned", {}, 64, 80, "Visium HD", 0.27376),
    ("visium_hd_spaceranger3_binned", {"bin_size": 2}, 1019, 80, "Visium HD", 0.27376),
    ("visium_hd_spaceranger4_segmented", {"bin_size": 16}, 16, 80, "Visium HD", 0.27376),
    ("visium_hd_spaceranger4_segmented", {"bin_size": "cells"}, 15, 80, "Visium HD", 0.27376),
    ("merscope_legacy_R_written", {}, 8, 9, "MERSCOPE", 1.0),
    ("merscope_vpt_entityid", {}, 300, 130, "MERSCOPE", 1.0),
    ("merscope_2022_unnamed_index", {}, 300, 130, "MERSCOPE", 1.0),
    ("merscope_2022_unnamed_same_order", {}, 300, 130, "MERSCOPE", 1.0),
    ("merscope_vpt_renamed", {}, 300, 130, "MERSCOPE", 1.0),
    ("cosmx_legacy_small", {}, 9, 8, "CosMx", None),
    ("cosmx_legacy_flat", {}, 180, 50, "CosMx", None),
    ("cosmx_atomx_1.3.2", {}, 180, 50, "CosMx", 0.12028),
    ("cosmx_atomx_cell_column", {}, 120, 50, "CosMx", 0.12028),
    ("cosmx_atomx_mm_only", {}, 180, 50, "CosMx", 0.12028),
    ("stereoseq_gem_gef", {"sample": "SS200000000TR_A1"}, 64, 40, "Stereo-seq", 0.5),
    (
        "stereoseq_gem_gef",
        {"sample": "SS200000000TR_A1", "bin_size": "cells"},
        *(100, 40, "Stereo-seq", 0.5),
    ),
    ("stereoseq_gem_gef/SS200000000TR_A1.tissue.gem.gz", {}, 64, 40, "Stereo-seq", None),
    ("stereoseq_gem_gef/SS200000000TR_A1.gemv0.2.gem.gz", {}, 64, 40, "Stereo-seq", None),
    ("stereoseq_gem_gef/SS200000000TR_A1.cellbin.gem.gz", {}, 100, 40, "Stereo-seq", None),
    ("stereoseq_gem_gef/old_MIDCounts_label.gem.txt", {}, 100, 10, "Stereo-seq", None),
    ("stereoseq_gem_gef/stereopy_scanpy_flavor.h5ad", {}, 100, 40, "Stereo-seq", 0.5),
    ("slideseqv2_puck_scp", {}, 100, 200, "Slide-seqV2", None),
    ("curio_seeker", {}, 200, 60, "Curio Seeker", None),
    ("seekspace_like", {}, 140, 60, "SeekSpace", None),
    ("openst_stitched_segmented", {}, 149, 60, "Open-ST", None),
    ("stomicsdb_h5ad", {}, 120, 60, "unknown", None),
    ("sodb_h5ad", {}, 100, 40, "unknown", None),
    ("cellxgene_h5ad/imaging_X_spatial_only.h5ad", {}, 100, 100, "10x Xenium", None),
    ("cellxgene_h5ad/slideseqv2_is_single.h5ad", {}, 300, 100, "Slide-seqV2", None),
    (
        "cellxgene_h5ad",
        {"sample": "visium_is_single"},
        *(300, 100, "Visium Spatial Gene Expression V1", 0.72650),
    ),
    ("seqfish_spatialgenomics_small", {}, 14, 9, "seqFISH", None),
    ("seqfishplus_csv", {"sample": "ob"}, 10, 10, "seqFISH+", None),
    ("seqfish_giotto_txt", {}, 118, 1774, "Giotto", None),
    ("starmap_plus_small", {}, 9, 8, "STARmap", None),
    ("generic_mtx_coords_csv", {}, 1107, 507, "generic", None),
]
#: Folder, and what is told.
REFUSED = {
    "visium_v2_probe_matrix": r"raw_probe_bc_matrix\.h5 counts probes, not genes",
    "visium_hd_002um_headers": "no bins of 8 .*pass bin_size=2",
    "cosmx_real_tx_giotto": r"looks like CosMx\. Expected: .*exprMat.*Found: Lung12_fov_positions",
    "stereoseq_gem_gef": "holds 2 samples: SS200000000TR_A1, old_MIDCounts_label",
    "cellxgene_h5ad": "holds 3 samples",
    "seqfishplus_csv": "holds 2 samples: cortex_svz, ob",
    "starmap_giotto_3d": "starmap_cell_loc.txt has positions without ids",
    "generic_mtx_v2_genes_tsv": r"a table of ids, x and y\. Found: barcodes.tsv, genes.tsv",
    "spatialdata_zarr_points_only": r"points_only.*: This SpatialData has no table of counts",
    "spatialdata_zarr_v2_blobs": "does not hold raw counts: 100 % are not integers",
}


@pytest.fixture
def instruments(shared: Path) -> Path:
    folder = shared / "instruments"
    if not folder.is_dir():
        pytest.skip(f"needs samples of what instruments write ({folder} is not there)")
    return folder


@pytest.mark.parametrize(
    ("name", "options", "n_cells", "n_genes", "technology", "factor"),
    READ,
    ids=[f"{name}-{list(options.values())}" for name, options, *_ in READ],
)
def test_read(
    instruments: Path,
    name: str,
    options: dict[str, Any],
    n_cells: int,
    n_genes: int,
    technology: str,
    factor: float | None,
    tmp_path: Path,
) -> None:
    adata = st.read(instruments / name, **options)
    assert adata.shape == (n_cells, n_genes)
    assert adata.obs_names.is_unique
    assert np.isfinite(adata.obsm["spatial"]).all()
    found = adata.uns["stofm"]["source"]
    assert found["technology"] == technology
    assert found["unit"] == ("unknown" if factor is None else "micrometre")
    assert found["microns_per_unit"] == pytest.approx(factor or 1.0, abs=1e-5)
    adata.write_h5ad(tmp_path / "a.h5ad")


@pytest.mark.parametrize(("name", "message"), REFUSED.items(), ids=REFUSED)
def test_refused(instruments: Path, name: str, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        st.read(instruments / name)


def test_every_folder_is_read_or_refused(instruments: Path) -> None:
    named = {re.split("/", name)[0] for name in (*(one[0] for one in READ), *REFUSED)}
    there = {one.name for one in instruments.iterdir() if one.is_dir() and one.name[0] != "_"}
    assert there == named


def test_cells_of_two_formats_are_the_same(instruments: Path) -> None:
    h5, mtx = (st.read(instruments / name) for name in ("xenium_3.0_prime", "xenium_mtx_csv_only"))
    assert h5.obs_names.equals(mtx.obs_names)
    assert (h5.X != mtx.X).nnz == 0
    np.testing.assert_allclose(h5.obsm["spatial"], mtx.obsm["spatial"])
    binned = [
        f"SS200000000TR_A1.{one}" for one in ("tissue.gef", "tissue.gem.gz", "gemv0.2.gem.gz")
    ]
    gef, gem, second = (st.read(instruments / "stereoseq_gem_gef" / one) for one in binned)
    assert (gef.X != gem.X).nnz == (gem.X != second[:, gem.var_names].X).nnz == 0


def test_cells_of_one_folder_are_in_the_places_of_another(instruments: Path) -> None:
    names = ("merscope_vpt_entityid", "merscope_2022_unnamed_index", "merscope_vpt_renamed")
    first, *others = (st.read(instruments / name) for name in names)
    for other in others:
        same = other[first.obs_names]
        np.testing.assert_array_equal(same.obsm["spatial"], first.obsm["spatial"])
        assert (same.X != first.X).nnz == 0
