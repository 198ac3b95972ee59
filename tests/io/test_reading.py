from __future__ import annotations

import gzip
import json
import logging
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import stofm as st

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

SPOT, FACTORS = 89.5, {"tissue_hires_scalef": 0.2, "fiducial_diameter_fullres": 144.0}
PIXELS = {"id": "barcode", "x": "pxl_col_in_fullres", "y": "pxl_row_in_fullres"}


def source(adata: AnnData) -> dict[str, Any]:
    return dict(adata.uns["stofm"]["source"])


def assert_same(adata: AnnData, section: Any, *, factor: float = 1.0) -> None:
    """Counts, names and places are those of the section, cell by cell."""
    kept = section.is_gene
    assert adata.obs_names.tolist() == section.ids
    assert adata.var_names.tolist() == section.genes["name"][kept].tolist()
    assert sparse.issparse(adata.X)
    assert adata.X.format == "csr"
    np.testing.assert_array_equal(adata.X.toarray(), section.counts[:, kept])
    np.testing.assert_allclose(adata.obsm["spatial"], section.xy * factor, rtol=1e-5)


def write_xenium(section: Any, folder: Path, *, csv: bool = False, h5: bool = True) -> None:
    cells = section.places(id="cell_id", x="x_centroid", y="y_centroid")
    folder.mkdir(parents=True, exist_ok=True)
    if csv:
        cells.to_csv(folder / "cells.csv.gz", index=False)
    else:
        cells.to_parquet(folder / "cells.parquet")
    if h5:
        section.write_h5(folder / "cell_feature_matrix.h5", software_version="xenium-3.0.0")
    else:
        section.write_mtx(folder / "cell_feature_matrix")
    said = {"analysis_sw_version": "xenium-3.0.0", "panel_name": "Brain", "panel_organism": "Mouse"}
    (folder / "experiment.xenium").write_text(json.dumps(said))
    vertices = pd.DataFrame({"cell_id": section.ids, "vertex_x": 0.0, "vertex_y": 0.0})
    vertices.to_parquet(folder / "cell_boundaries.parquet")


def positions(section: Any) -> pd.DataFrame:
    """Spots on a hexagonal array: 17 of them, 137.7 pixels from each other."""
    rows, columns = np.divmod(np.arange(17), 5)
    columns = 2 * columns + rows % 2
    pitch = SPOT / 65 * 100
    section.xy = np.column_stack([columns * pitch / 2, rows * pitch * np.sqrt(0.75)]) + 1000
    table = section.places(**PIXELS)
    at = section.order
    table.insert(1, "in_tissue", 1)
    table.insert(2, "array_row", rows[at])
    table.insert(3, "array_col", columns[at])
    return table[[*table.columns[:4], "pxl_row_in_fullres", "pxl_col_in_fullres"]]


def write_visium(
    section: Any, folder: Path, *, header: bool = True, factors: dict[str, float] | None = None
) -> None:
    (folder / "spatial").mkdir(parents=True)
    name = "tissue_positions.csv" if header else "tissue_positions_list.csv"
    positions(section).to_csv(folder / "spatial" / name, index=False, header=header)
    said = {**FACTORS, "spot_diameter_fullres": SPOT, **(factors or {})}
    (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(said))


# Formats


@pytest.mark.parametrize(("csv", "h5"), [(False, True), (True, True), (True, False)])
def test_xenium(section: Any, tmp_path: Path, csv: bool, h5: bool) -> None:
    write_xenium(section, tmp_path / "run" / "outs", csv=csv, h5=h5)
    adata = st.read(tmp_path / "run")
    assert_same(adata, section)
    assert adata.var["gene_ids"].tolist() == section.genes["id"][:6].tolist()
    np.testing.assert_array_equal(adata.obs["control_counts"], section.counts[:, 6:].sum(axis=1))
    found = source(adata)
    assert found["technology"] == "Xenium"
    assert (found["unit"], found["microns_per_unit"]) == ("micrometre", 1.0)
    assert (found["software"], found["panel"], found["organism"]) == (
        "xenium-3.0.0",
        "Brain",
        "Mouse",
    )
    assert found["dropped"]["features: Negative Control Probe"] == 1
    assert found["observations"] == "cells"
    assert [name.split("/")[-1][:4] for name in found["files"]] == [
        "cell",
        "cell" if h5 else "matr",
    ]


@pytest.mark.parametrize("kind", [int, bytes])
def test_ids_of_any_type(section: Any, tmp_path: Path, kind: type) -> None:
    section.ids = [str(k) for k in range(1, 18)]
    write_xenium(section, tmp_path)
    cells = section.places(id="cell_id", x="x_centroid", y="y_centroid")
    cells["cell_id"] = [kind(one) if kind is int else one.encode() for one in cells["cell_id"]]
    cells.to_parquet(tmp_path / "cells.parquet")
    assert_same(st.read(tmp_path), section)


@pytest.mark.parametrize("header", [True, False])
def test_visium(section: Any, tmp_path: Path, header: bool) -> None:
    write_visium(section, tmp_path, header=header)
    section.write_h5(tmp_path / "filtered_feature_bc_matrix.h5", software_version="spaceranger-2.1")
    section.write_mtx(tmp_path / "raw_feature_bc_matrix")
    adata = st.read(tmp_path, "visium")
    assert_same(adata, section, factor=65 / SPOT)
    assert source(adata)["files"][1] == "filtered_feature_bc_matrix.h5"
    assert source(adata)["unit_from"].startswith("65 µm per spot_diameter_fullres")
    assert source(adata)["software"] == "spaceranger-2.1"
    assert adata.obs["array_col"].dtype.kind == "i"


def test_raw_spots_off_tissue_are_left_out(section: Any, tmp_path: Path) -> None:
    write_visium(section, tmp_path)
    section.write_mtx(tmp_path / "raw_feature_bc_matrix", zipped=False)
    table = positions(section)
    table["in_tissue"] = (np.arange(17) > 4).astype(int)
    table.to_csv(tmp_path / "spatial" / "tissue_positions.csv", index=False)
    adata = st.read(tmp_path)
    assert set(adata.obs_names) == set(table["barcode"][5:])
    assert source(adata)["dropped"]["off tissue"] == 5


def test_scales_of_visium_that_disagree(section: Any, tmp_path: Path) -> None:
    write_visium(section, tmp_path, factors={"spot_diameter_fullres": 1.05 * SPOT})
    section.write_h5(tmp_path / "filtered_feature_bc_matrix.h5")
    with pytest.warns(UserWarning, match=r"says 0\.6917 µm a pixel, .* says 0\.7263"):
        st.read(tmp_path)


def test_images_lie_on_the_coordinates(section: Any, tmp_path: Path) -> None:
    from matplotlib.image import imsave

    write_visium(section, tmp_path)
    section.write_h5(tmp_path / "filtered_feature_bc_matrix.h5", library_ids=np.array([b"lib"]))
    imsave(tmp_path / "spatial" / "tissue_hires_image.png", np.zeros((5, 7, 3)))
    assert "spatial" not in st.read(tmp_path).uns
    adata = st.read(tmp_path, images=True)
    held = adata.uns["spatial"]["lib"]
    assert held["images"]["hires"].shape[:2] == (5, 7)
    pixels = adata.obsm["spatial"] * held["scalefactors"]["tissue_hires_scalef"]
    np.testing.assert_allclose(pixels, section.xy * 0.2)
    assert held["scalefactors"]["spot_diameter_fullres"] == pytest.approx(65)


def test_images_of_others_are_left_to_spatialdata_io(section: Any, tmp_path: Path) -> None:
    write_xenium(section, tmp_path)
    with pytest.raises(ValueError, match=r"for Visium only, and this is Xenium.*spatialdata-io"):
        st.read(tmp_path, images=True)


@pytest.fixture
def visium_hd(section: Any, tmp_path: Path) -> Path:
    for size in (2, 8, 16):
        folder = tmp_path / "binned_outputs" / f"square_{size:03}um"
        write_visium(
            section, folder, factors={"bin_size_um": float(size), "microns_per_pixel": 0.27}
        )
        (folder / "spatial" / "tissue_positions.csv").unlink()
        section.ids = [f"s_{size:03}um_{k:05}_00001-1" for k in range(17)]
        positions(section).to_parquet(folder / "spatial" / "tissue_positions.parquet")
        section.write_h5(folder / "filtered_feature_bc_matrix.h5")
    return tmp_path


def test_visium_hd(section: Any, visium_hd: Path) -> None:
    assert_same(st.read(visium_hd, bin_size=16), section, factor=0.27)
    for adata in (st.read(visium_hd), st.read(visium_hd / "binned_outputs" / "square_008um")):
        assert adata.obs_names[0].startswith("s_008um")
        assert source(adata)["observations"] == "bins of 8 µm"
        assert source(adata)["unit_from"].startswith("microns_per_pixel")
    with pytest.raises(ValueError, match=r"no bins of 4 .*bin_size=2 or bin_size=8 or bin_size=16"):
        st.read(visium_hd, bin_size=4)


@pytest.mark.parametrize("between", ["_", "-", "."])
def test_flat_visium_hd(section: Any, visium_hd: Path, tmp_path: Path, between: str) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (visium_hd / "binned_outputs").rglob("*.*"):
        parts = file.relative_to(visium_hd).parts
        file.rename(flat / between.join(["GSM1", *parts]))
    for size in (2, 8, 16):
        adata = st.read(flat, bin_size=size)
        assert adata.obs_names[0].startswith(f"s_{size:03}um")
        assert source(adata)["microns_per_unit"] == 0.27


def test_of_matrices_that_may_be_raw_hdf5_is_read(section: Any, tmp_path: Path) -> None:
    write_visium(section, tmp_path)
    for file in tmp_path.glob("*.h5"):
        file.unlink()
    section.write_h5(tmp_path / "raw_feature_bc_matrix.h5")
    section.write_mtx(tmp_path)
    assert source(st.read(tmp_path))["files"][1] == "raw_feature_bc_matrix.h5"


def test_cells_of_visium_hd(section: Any, visium_hd: Path) -> None:
    folder = visium_hd / "segmented_outputs"
    section.ids = [f"cellid_{k:09}-1" for k in range(1, 18)]
    section.write_h5(folder / "filtered_feature_cell_matrix.h5")
    corners = np.array([[-2.0, -1], [4, -1], [-2, 2], [-2, -1]])  # its centroid is 0, 0
    polygons = [
        {
            "type": "Feature",
            "properties": {"cell_id": k},
            "geometry": {
                "type": "Polygon",
                "coordinates": [(corners + section.xy[k - 1]).tolist()],
            },
        }
        for k in range(3, 18)
    ]
    said = {"type": "FeatureCollection", "features": polygons}
    (folder / "cell_segmentations.geojson").write_text(json.dumps(said))
    (folder / "spatial").mkdir()
    (folder / "spatial" / "scalefactors_json.json").write_text('{"microns_per_pixel": 0.5}')
    with pytest.warns(UserWarning, match="2 of 17 cells .* have no position"):
        adata = st.read(visium_hd, bin_size="cells")
    assert adata.obs_names.tolist() == section.ids[2:]
    np.testing.assert_allclose(adata.obsm["spatial"], section.xy[2:] / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["EntityID", "cell", "", "X"])
def test_merscope(section: Any, tmp_path: Path, name: str) -> None:
    section.genes["name"] = [*section.genes["name"][:6], "Blank-1", "Blank-22"]
    section.ids = [str(2317032900000100001 + k) for k in range(17)]
    cells = section.places(id=name, x="center_x", y="center_y")
    cells.insert(1, "fov", np.nan)
    cells["volume"] = 9.5
    cells.to_csv(tmp_path / "s1_cell_metadata.csv", index=False)
    counts = section.dense()
    counts.insert(0, "cell", section.ids)
    counts.to_csv(tmp_path / "s1_cell_by_gene.csv.gz", index=False)
    adata = st.read(tmp_path)
    assert_same(adata, section)
    assert source(adata)["technology"] == "MERSCOPE"
    np.testing.assert_array_equal(adata.obs["control_counts"], section.counts[:, 6:].sum(axis=1))
    assert adata.obs.columns.tolist() == ["volume", "control_counts"]


def write_cosmx(section: Any, folder: Path, **more: Any) -> None:
    section.genes["name"] = [*section.genes["name"][:6], "NegPrb1", "SystemControl4"]
    fov, cell = np.divmod(np.arange(17), 9)
    section.ids = [f"{a + 1}_{b + 1}" for a, b in zip(fov, cell, strict=True)]
    cells = section.places(x="CenterX_global_px", y="CenterY_global_px").drop(columns="id")
    at = section.order
    cells = cells.assign(fov=fov[at] + 1, cell_ID=cell[at] + 1, cell_id="c_1_1", **more)
    cells.to_csv(folder / "A_metadata_file.csv", index=False)
    counts = section.dense()
    counts.insert(0, "fov", fov + 1)
    counts.insert(1, "cell_ID", cell + 1)
    outside = counts.iloc[[0, 9]].assign(cell_ID=0)
    pd.concat([outside, counts]).to_csv(folder / "A_exprMat_file.csv", index=False)


def test_cosmx(section: Any, tmp_path: Path) -> None:
    write_cosmx(section, tmp_path)
    adata = st.read(tmp_path)
    assert_same(adata, section)
    found = source(adata)
    assert (found["unit"], found["dropped"]["background"]) == ("unknown", 2)
    assert_same(st.read(tmp_path, microns_per_unit=0.12), section, factor=0.12)


def test_micrometres_of_cosmx(section: Any, tmp_path: Path) -> None:
    area = {"Area": 1000, "Area.um2": 1000 * 0.12028**2, "Panel": "6k", "version": "v6"}
    write_cosmx(section, tmp_path, **area)
    adata = st.read(tmp_path)
    assert_same(adata, section, factor=0.12028)
    assert (source(adata)["panel"], source(adata)["software"]) == ("6k", "v6")
    write_cosmx(section, tmp_path)
    fields = {"FOV": [1, 2], "x_global_px": [0, 4256], "y_global_px": [9, 9]}
    fields |= {"x_global_mm": [0, 4.256 * 0.12], "y_global_mm": [1, 1]}
    pd.DataFrame(fields).to_csv(tmp_path / "A_fov_positions_file.csv", index=False)
    assert_same(st.read(tmp_path), section, factor=0.12)


def test_places_within_fields_of_view(section: Any, tmp_path: Path) -> None:
    write_cosmx(section, tmp_path)
    table = pd.read_csv(tmp_path / "A_metadata_file.csv")
    table.columns = table.columns.str.replace("global", "local")
    table.to_csv(tmp_path / "A_metadata_file.csv", index=False)
    with pytest.warns(UserWarning, match=r"within each 'fov', .* library_key='fov'"):
        assert_same(st.read(tmp_path), section)


MOLECULES = pd.DataFrame(
    {
        "geneID": ["ENSG00000000001", "ENSG00000000002", "ENSG00000000001", "ENSG00000000003"],
        "geneName": ["B", "A", "B", "A"],
        "x": [0, 49, 50, 99],
        "y": [10, 49, 49, 149],
        "MIDCount": [1, 2, 3, 4],
        "CellID": [0, 7, 7, 9],
    }
)


def test_gem(tmp_path: Path) -> None:
    head = "#FileFormat=GEMv0.2\n#OffsetX=1000\n#OffsetY=20\n"
    text = head + MOLECULES.to_csv(sep="\t", index=False)
    (tmp_path / "S1.tissue.gem.gz").write_bytes(gzip.compress(text.encode()))
    adata = st.read(tmp_path, bin_size=50)
    assert adata.obs_names.tolist() == ["0_0", "50_0", "50_100"]
    np.testing.assert_array_equal(adata.obsm["spatial"], [[1000, 20], [1050, 20], [1050, 120]])
    assert adata.var_names.tolist() == ["B", "A", "A-1"]
    assert adata.var["gene_ids"].str[-1].tolist() == ["1", "2", "3"]
    np.testing.assert_array_equal(adata.X.toarray(), [[1, 2, 0], [3, 0, 0], [0, 0, 4]])
    cells = st.read(tmp_path)  # its molecules have cells
    assert cells.obs_names.tolist() == ["7", "9"]
    np.testing.assert_array_equal(cells.obsm["spatial"], [[1049.5, 69], [1099, 169]])
    np.testing.assert_array_equal(cells.X.toarray(), [[3, 2, 0], [0, 0, 4]])
    assert source(cells)["observations"] == "cells"


def test_gef(tmp_path: Path) -> None:
    import h5py

    place = np.array([(0, 10, 1), (50, 49, 3), (49, 49, 2)], dtype="<i4,<i4,u1")
    place.dtype.names = ("x", "y", "count")
    genes = np.array([(b"B", 0, 2), (b"A", 2, 1)], dtype="S64,<u4,<u4")
    genes.dtype.names = ("gene", "offset", "count")
    with h5py.File(tmp_path / "S1.tissue.gef", "w") as file:
        file["geneExp/bin1/expression"], file["geneExp/bin1/gene"] = place, genes
        file["geneExp/bin1/expression"].attrs["resolution"] = np.array([500], dtype=np.uint32)
    cells = np.array([(7, 30, 40, 0, 1), (9, 5, 6, 1, 2)], dtype="<u4,<i4,<i4,<u4,<u2")
    cells.dtype.names = ("id", "x", "y", "offset", "area")
    entries = np.array([(1, 4), (0, 2), (1, 5)], dtype="<u4,<u2")
    entries.dtype.names = ("geneID", "count")
    with h5py.File(tmp_path / "S1.cellbin.gef", "w") as file:
        file["cellBin/cell"], file["cellBin/cellExp"], file["cellBin/gene"] = cells, entries, genes
        file.attrs.update({"offsetX": np.array([10]), "offsetY": np.array([20])})
    adata = st.read(tmp_path)
    assert adata.obs_names.tolist() == ["0_0", "50_0"]
    np.testing.assert_array_equal(adata.X.toarray(), [[1, 2], [3, 0]])
    np.testing.assert_array_equal(adata.obsm["spatial"], [[0, 0], [25, 0]])
    assert source(adata)["unit"] == "micrometre"
    of_cells = st.read(tmp_path, bin_size="cells")
    np.testing.assert_array_equal(of_cells.X.toarray(), [[0, 4], [2, 5]])
    np.testing.assert_array_equal(of_cells.obsm["spatial"], [[40, 60], [15, 26]])


def test_tables_of_genes_by_cells(section: Any, tmp_path: Path) -> None:
    section.ids = [one.removesuffix("-1") for one in section.ids]
    section.places().to_csv(tmp_path / "P_bead_locations.csv", index=False, header=False)
    counts = section.dense().T
    counts.columns = section.ids
    counts.to_csv(tmp_path / "P.digital_expression.txt.gz", sep="\t", index_label="GENE")
    adata = st.read(tmp_path)
    assert source(adata)["technology"] == "Slide-seqV2"
    assert_same(adata, section)


def test_tables_that_r_wrote(section: Any, tmp_path: Path) -> None:
    section.places(id="cell_ID", x="sdimx", y="sdimy").to_csv(
        tmp_path / "f_locs.txt", sep=" ", index=False
    )
    counts = section.dense().T
    text = " ".join(f'"{one}"' for one in section.ids) + "\n"
    text += counts.to_csv(sep=" ", header=False)
    (tmp_path / "f_expr.txt").write_text(text)
    assert_same(st.read(tmp_path), section)


def test_tables_with_a_row_of_types(section: Any, tmp_path: Path) -> None:
    places = section.places(id="NAME", x="X", y="Y").assign(Z=1.5, kind="a").astype(str)
    types = pd.DataFrame([["TYPE", *["numeric"] * 3, "group"]], columns=places.columns)
    pd.concat([types, places]).to_csv(tmp_path / "well05_spatial.csv", index=False)
    counts = section.dense().T
    counts.columns = section.ids
    counts.to_csv(tmp_path / "well05raw_expression_pd.csv", index_label="GENE")
    adata = st.read(tmp_path)
    assert_same(adata, section)
    assert source(adata)["technology"] == "STARmap"


@pytest.mark.parametrize("place", ["X", "raw", "layer"])
def test_h5ad_with_counts_anywhere(section: Any, tmp_path: Path, place: str) -> None:
    counts = anndata.AnnData(
        sparse.csr_matrix(section.counts.astype(np.float32)),
        obs=pd.DataFrame({"assay": "Slide-seqV2"}, index=section.ids),
        var=pd.DataFrame(index=section.genes["name"].tolist()),
        obsm={"X_spatial": section.xy},
        uns={"organism": "Mus musculus", "schema_version": "5.3.0"},
    )
    adata = counts.copy()
    if place != "X":
        adata.X = adata.X * 0.37
    if place == "raw":
        adata.raw = counts
    elif place == "layer":
        adata.layers["count"] = counts.X
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = st.read(tmp_path)
    assert_same(found, section)
    assert source(found)["technology"] == "Slide-seqV2"
    assert source(found)["organism"] == "Mus musculus"
    if place != "X":
        adata.layers.pop("count", None)
        adata.raw = None
        adata.write_h5ad(tmp_path / "a.h5ad")
        with pytest.raises(ValueError, match=r"a\.h5ad holds no counts: .* no raw, layers \[\]"):
            st.read(tmp_path)


def test_images_of_h5ad(section: Any, tmp_path: Path) -> None:
    adata = anndata.AnnData(section.counts.astype(float), obsm={"spatial": section.xy})
    factors = {"spot_diameter_fullres": 130.0, "tissue_hires_scalef": 0.2}
    images = {"images": {"hires": np.zeros((2, 3, 3))}, "scalefactors": factors}
    adata.uns["spatial"] = {"lib": images, "is_single": True}
    adata.write_h5ad(tmp_path / "a.h5ad")
    found = st.read(tmp_path, images=True).uns["spatial"]["lib"]
    assert found["scalefactors"] == {"spot_diameter_fullres": 65.0, "tissue_hires_scalef": 0.4}
    assert found["images"]["hires"].shape == (2, 3, 3)
    without = st.read(tmp_path)
    assert "images" not in without.uns["spatial"]["lib"]
    np.testing.assert_allclose(without.obsm["spatial"], section.xy / 2)


def test_damaged_files(section: Any, tmp_path: Path) -> None:
    write_xenium(section, tmp_path)
    (tmp_path / "transcripts.parquet").write_bytes(b"PAR1 cut")
    (tmp_path / "boundaries.csv.gz").write_bytes(b"\x1f\x8b cut")
    assert_same(st.read(tmp_path), section)
    whole = (tmp_path / "cell_feature_matrix.h5").read_bytes()
    (tmp_path / "cell_feature_matrix.h5").write_bytes(whole[:900])
    with pytest.raises(FileNotFoundError, match=r"cell_feature_matrix\.h5 is damaged"):
        st.read(tmp_path)
    section.write_mtx(tmp_path / "cell_feature_matrix", zipped=False)
    file = tmp_path / "cell_feature_matrix" / "matrix.mtx"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(ValueError, match=r"matrix\.mtx can't be read"):
        st.read(tmp_path)


def test_background_of_open_st(section: Any, tmp_path: Path) -> None:
    obs = pd.DataFrame({"cell_ID_mask": np.arange(17)}, index=section.ids)
    adata = anndata.AnnData(section.counts.astype(float), obs=obs, obsm={"spatial": section.xy})
    adata.write_h5ad(tmp_path / "stitched.h5ad")
    found = st.read(tmp_path / "stitched.h5ad")
    assert found.obs_names.tolist() == section.ids[1:]
    assert source(found)["dropped"] == {"background": 1}


# Folders as they come


def test_flat_folder_with_prefixes(section: Any, tmp_path: Path) -> None:
    write_visium(section, tmp_path, header=False)
    flat = tmp_path / "flat"
    for prefix in ("GSM1_brain_", "GSM2_liver_"):
        section.write_mtx(flat, prefix=prefix)
        for file in (tmp_path / "spatial").iterdir():
            (flat / f"{prefix}{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        section.counts = section.counts + 1
    with pytest.raises(
        ValueError, match=r"holds 2 samples: GSM1_brain, GSM2_liver\. Read them one"
    ):
        st.read(flat)
    section.counts = section.counts - 1
    assert_same(st.read(flat, sample="GSM2_liver"), section, factor=65 / SPOT)
    with pytest.raises(ValueError, match=r"no sample 'x'; it has \['GSM1_brain', 'GSM2_liver'\]"):
        st.read(flat, sample="x")
    one = st.read(flat / "GSM1_brain_matrix.mtx.gz")
    np.testing.assert_array_equal(one.X.toarray(), section.counts[:, :6] - 1)


def test_samples_in_folders(section: Any, tmp_path: Path) -> None:
    for name in ("region_0", "region_1"):
        write_xenium(section, tmp_path / name / "outs")
        section.counts = section.counts + 1
    with pytest.raises(ValueError, match="2 samples: region_0, region_1"):
        st.read(tmp_path)
    section.counts = section.counts - 1
    assert_same(st.read(tmp_path, sample="region_1"), section)


def test_a_file_of_a_folder(section: Any, tmp_path: Path) -> None:
    write_xenium(section, tmp_path)
    moved = section.places(id="cell_id", x="x_centroid", y="y_centroid").assign(x_centroid=5.0)
    moved.to_csv(tmp_path / "cells.csv.gz", index=False)
    assert_same(st.read(tmp_path / "cell_feature_matrix.h5"), section)
    assert (st.read(tmp_path / "cells.csv.gz").obsm["spatial"][:, 0] == 5).all()


def test_explicit_files(section: Any, tmp_path: Path) -> None:
    section.write_mtx(tmp_path / "m", zipped=False)
    section.write_mtx(tmp_path / "other")
    section.places(id="who", x="right", y="down").to_csv(tmp_path / "p.tsv", sep="\t", index=False)
    options: dict[str, Any] = {"matrix": "m", "coordinates": "p.tsv"}
    adata = st.read(tmp_path, **options, columns=["who", "right", "down"], microns_per_unit=2.0)
    assert_same(adata, section, factor=2.0)
    assert source(adata)["technology"] == "generic"
    with pytest.raises(ValueError, match=r"p\.tsv: expected columns .* \['who', 'right', 'down'\]"):
        st.read(tmp_path, **options)
    with pytest.raises(FileNotFoundError, match="There is no file"):
        st.read(tmp_path, matrix="m", coordinates="q.csv")


@pytest.mark.filterwarnings("ignore")
def test_spatialdata_store(section: Any, tmp_path: Path) -> None:
    from spatialdata import SpatialData
    from spatialdata.models import TableModel

    table = anndata.AnnData(section.counts.astype(np.float32), obsm={"spatial": section.xy})
    table.obs_names, table.var_names = section.ids, section.genes["name"]
    SpatialData(tables={"cells": TableModel.parse(table)}).write(tmp_path / "s.zarr")
    assert_same(st.read(tmp_path), section)


def test_what_is_read_can_be_written_and_embedded(section: Any, tmp_path: Path) -> None:
    awkward = {"": 3, "Mean.B2M/CD298": 1.5, "_index": "a", "day": pd.Timestamp("2024-02-01")}
    write_cosmx(section, tmp_path, cell="c", empty=np.nan, **awkward)
    adata = st.read(tmp_path)
    assert {"Mean.B2M_CD298", "day", "cell"} <= set(adata.obs)
    assert not {"", "_index", "empty"} & set(adata.obs)
    adata.write_h5ad(tmp_path / "a.h5ad")
    again = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert source(again)["technology"] == "CosMx"
    assert list(source(again)["files"]) == ["A_metadata_file.csv", "A_exprMat_file.csv"]


# What is told


def test_several_technologies(section: Any, tmp_path: Path) -> None:
    write_xenium(section, tmp_path)
    write_visium(section, tmp_path / "v")
    section.write_h5(tmp_path / "v" / "filtered_feature_bc_matrix.h5")
    with pytest.raises(ValueError, match=r"2 technologies: Xenium \(cells.parquet\), Visium \("):
        st.read(tmp_path)
    assert source(st.read(tmp_path, "Visium"))["technology"] == "Visium"


def test_unknown_technology(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no technology 'MERFISH2'; there are \['auto', 'Xenium'"):
        st.read(tmp_path, "MERFISH2")


def test_files_that_are_not_there(section: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        st.read(tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="is empty"):
        st.read(tmp_path)
    write_xenium(section, tmp_path)
    (tmp_path / "cell_feature_matrix.h5").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no matrix of counts\. Expected cells\.parquet or"
    ):
        st.read(tmp_path)
    (tmp_path / "cells.parquet").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"looks like Xenium\. Expected: .*Found: cell_bound"
    ):
        st.read(tmp_path)


def test_ids_that_do_not_overlap(section: Any, tmp_path: Path) -> None:
    write_xenium(section, tmp_path)
    section.ids = [f"other{k}" for k in range(17)]
    section.write_h5(tmp_path / "cell_feature_matrix.h5")
    with pytest.raises(
        ValueError, match=r"No id of cell_feature_matrix.h5 \(other0, other1.*of diff"
    ):
        st.read(tmp_path)


@pytest.mark.parametrize("written", ["2.3170329e+18", "2317032900000100096.0"])
def test_ids_that_were_floats(section: Any, tmp_path: Path, written: str) -> None:
    cells = section.places(id="cell_id", x="x_centroid", y="y_centroid").assign(cell_id=written)
    cells.to_csv(tmp_path / "cells.csv", index=False)
    section.write_h5(tmp_path / "cell_feature_matrix.h5")
    with pytest.raises(ValueError, match=r"column 'cell_id' were read as floats .*\(2.*dtype="):
        st.read(tmp_path)
    cells.assign(cell_id=float(written)).to_parquet(tmp_path / "cells.parquet")
    with pytest.raises(ValueError, match="read as floats"):
        st.read(tmp_path)


def test_small_ids_that_were_floats_are_whole(section: Any, tmp_path: Path) -> None:
    section.ids = [str(k) for k in range(1, 18)]
    write_xenium(section, tmp_path)
    cells = section.places(id="cell_id", x="x_centroid", y="y_centroid")
    cells.assign(cell_id=cells["cell_id"] + ".0").to_csv(tmp_path / "cells.csv", index=False)
    assert_same(st.read(tmp_path / "cells.csv"), section)


def test_places_as_spreadsheets_write_them(section: Any, tmp_path: Path) -> None:
    table = section.places()
    table.to_csv(tmp_path / "places.csv", index=False, sep=";", encoding="utf-8-sig")
    section.write_mtx(tmp_path)
    assert_same(st.read(tmp_path), section)
    table.to_csv(tmp_path / "places.csv", index=False, sep=";", decimal=",")
    with pytest.raises(ValueError, match=r"places\.csv: column 'x' holds values that are not num"):
        st.read(tmp_path)


def test_counts_that_are_not_whole(section: Any, tmp_path: Path) -> None:
    section.places().to_csv(tmp_path / "places.csv", index=False)
    (section.dense() + 0.25).set_index(pd.Index(section.ids)).to_csv(tmp_path / "s_counts.csv")
    with pytest.raises(
        ValueError, match=r"s_counts\.csv.* does not hold raw counts: 100 % are not"
    ):
        st.read(tmp_path)


def test_ids_that_occur_twice(section: Any, tmp_path: Path) -> None:
    section.ids[3] = section.ids[5]
    write_xenium(section, tmp_path)
    with pytest.raises(ValueError, match=r"cells\.parquet: 1 ids occur more than once"):
        st.read(tmp_path)


def test_places_without_ids(section: Any, tmp_path: Path) -> None:
    np.savetxt(tmp_path / "a_cell_loc.txt", section.xy)
    section.dense().to_csv(tmp_path / "a_expr.csv")
    with pytest.raises(FileNotFoundError, match=r"a_cell_loc\.txt has positions without ids"):
        st.read(tmp_path)


def test_probes_are_not_genes(section: Any, tmp_path: Path) -> None:
    import h5py

    write_visium(section, tmp_path)
    section.write_h5(tmp_path / "raw_probe_bc_matrix.h5")
    with h5py.File(tmp_path / "raw_probe_bc_matrix.h5", "a") as file:
        file["matrix/features/filtered_probes"] = np.ones(8, dtype=bool)
    with pytest.raises(
        FileNotFoundError, match=r"raw_probe_bc_matrix\.h5 counts probes, not genes"
    ):
        st.read(tmp_path)


def test_lists_that_do_not_fit(section: Any, tmp_path: Path) -> None:
    section.write_mtx(tmp_path, zipped=False)
    section.places().to_csv(tmp_path / "coordinates.csv", index=False)
    (tmp_path / "barcodes.tsv").write_text("\n".join(section.ids[:5]))
    with pytest.raises(ValueError, match=r"the shape \(8, 17\), but there are 8 genes and 5 cells"):
        st.read(tmp_path)
    (tmp_path / "barcodes.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"matrix\.mtx: expected one list of cells"):
        st.read(tmp_path)


def test_antibodies_are_no_controls(section: Any, tmp_path: Path) -> None:
    section.genes.loc[6, "type"] = "Antibody Capture"
    write_xenium(section, tmp_path)
    adata = st.read(tmp_path)
    np.testing.assert_array_equal(adata.obs["antibody_capture_counts"], section.counts[:, 6])
    np.testing.assert_array_equal(adata.obs["control_counts"], section.counts[:, 7])


def test_other_bins_are_told(section: Any, tmp_path: Path) -> None:
    write_xenium(section, tmp_path)
    with pytest.raises(ValueError, match="Xenium has no bins"):
        st.read(tmp_path, bin_size=8)


def test_the_log_says_what_was_read(section: Any, tmp_path: Path, caplog: Any) -> None:
    write_xenium(section, tmp_path)
    with caplog.at_level(logging.INFO, "stofm"):
        st.read(tmp_path)
    assert "17 cells x 6 genes, coordinates in micrometres" in caplog.text
