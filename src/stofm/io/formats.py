"""The table of formats: the columns that identify a table of cells, and other properties."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

MICROMETRE: Final = "micrometre"
UNKNOWN: Final = "unknown"
AUTO: Final = "auto"
#: Names of features in Xenium, MERSCOPE and CosMx that are not genes, if no feature type says so.
CONTROLS: Final = (
    r"^(?:NegControl|NegPrb|NegAdd|Negative\d|BLANK[-_\d]|Blank[-_\d]|SystemControl|FalseCode"
    r"|UnassignedCodeword|DeprecatedCodeword|Intergenic_|antisense_)"
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """The files of a technology.

    A table of cells has one of the `ids` (names joined by ``+`` make one id together), one of `x`
    and of `y`, all of `also`, and a path that `path` matches. `without_header` are the columns of a
    table without a header. Names are compared without regard to case.
    """

    name: str
    ids: tuple[str, ...] = ()
    x: tuple[str, ...] = ()
    y: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    path: str = ""
    without_header: tuple[str, ...] = ()
    #: What a row is.
    rows: str = "cells"
    #: The unit of the positions, if it is the same in all files of the technology.
    unit: str = UNKNOWN
    #: Columns of the table of counts that are neither ids nor genes.
    no_genes: tuple[str, ...] = ()
    #: Whether an id that ends in 0 stands for everything outside cells.
    has_background: bool = False
    #: Columns within which x and y are counted, such as the field of view.
    field: str = ""
    #: Size of the bins that replace cells, unless another is requested.
    bin_size: int | None = None
    #: For messages: the expected files, and names that suggest the technology.
    expected: str = ""
    hint: str = ""

    def columns(self, names: Sequence[str]) -> tuple[str, str, str] | None:
        """Names of id (joined by ``+``), x and y in a table; None if it is not of this format."""
        # CosMx has cell_ID and cell_id: exact spelling is tried first.
        there = {name.lower(): name for name in names} | {name: name for name in names}
        if _MOLECULES & set(there) or not all(name.lower() in there for name in self.also):
            return None
        found = []
        for choices in (self.ids, self.x, self.y):
            parts = [
                [there.get(part, there.get(part.lower())) for part in one.split("+")]
                for one in choices
            ]
            whole = ["+".join(filter(None, one)) for one in parts if None not in one]
            if not whole and not (choices is self.ids and [""] in parts):
                return None
            found.append(whole[0] if whole else "")
        return found[0], found[1], found[2]


#: Columns of tables of transcripts.
_MOLECULES: Final = {"gene", "target", "feature_name", "barcode_id", "vertex_x"}
_PIXELS: Final = ("barcode", "in_tissue", "array_row", "array_col")
_VISIUM: Final = (*_PIXELS, "pxl_row_in_fullres", "pxl_col_in_fullres")
_BARCODES: Final = ("barcode", "barcodes", "cell_barcode", "bead", "bead_barcode")

XENIUM: Final = Format(
    name="Xenium",
    ids=("cell_id",),
    x=("x_centroid",),
    y=("y_centroid",),
    unit=MICROMETRE,
    expected="cells.parquet or cells.csv.gz, and cell_feature_matrix.h5 or its folder",
    hint=r"experiment\.xenium|transcripts\.parquet|cell_feature_matrix",
)
VISIUM_HD: Final = Format(
    name="Visium HD",
    ids=("barcode",),
    x=("pxl_col_in_fullres",),
    y=("pxl_row_in_fullres",),
    without_header=_VISIUM,
    rows="bins",
    bin_size=8,
    expected="binned_outputs/square_008um with spatial/tissue_positions.parquet and a matrix",
    hint=r"square_\d+um|feature_slice|segmented_outputs",
)
VISIUM: Final = Format(
    name="Visium",
    ids=("barcode",),
    x=("pxl_col_in_fullres",),
    y=("pxl_row_in_fullres",),
    without_header=_VISIUM,
    rows="spots",
    expected="spatial/tissue_positions.csv, and filtered_feature_bc_matrix.h5 or its folder",
    hint=r"tissue_(low|hi)res_image|scalefactors|_probe_bc_matrix",
)
COSMX: Final = Format(
    name="CosMx",
    ids=("fov+cell_ID",),
    x=("CenterX_global_px",),
    y=("CenterY_global_px",),
    no_genes=("fov", "cell_ID", "cell", "cell_id", "slide_ID"),
    has_background=True,
    expected="..._exprMat_file.csv and ..._metadata_file.csv, plain or gzip",
    hint=r"tx_file|fov_positions|exprMat",
)
_COSMX_LOCAL: Final = replace(COSMX, x=("CenterX_local_px",), y=("CenterY_local_px",), field="fov")
STEREO: Final = Format(
    name="Stereo-seq",
    rows="bins",
    bin_size=50,
    expected="a .gef or .gem(.gz)",
)
H5AD: Final = Format(name="h5ad")
GENERIC: Final = Format(
    name="generic",
    ids=("barcode", "barcodes", "cell_barcode", "cell_id", "cell", "cellid", "id", "name", ""),
    x=("x", "x_centroid", "center_x", "sdimx", "xcoord", "x_coord", "x_um", "x_position"),
    y=("y", "y_centroid", "center_y", "sdimy", "ycoord", "y_coord", "y_um", "y_position"),
    without_header=("barcode", "x", "y"),
    expected="a matrix of counts, and a table of ids, x and y",
)

#: Formats that come before others that their tables fit too.
FORMATS: Final = (
    XENIUM,
    VISIUM_HD,
    VISIUM,
    Format(
        name="MERSCOPE",
        ids=("EntityID", "cell", "X", "id", ""),
        x=("center_x",),
        y=("center_y",),
        also=("fov", "volume"),
        unit=MICROMETRE,
        expected="cell_by_gene.csv and cell_metadata.csv",
        hint=r"detected_transcripts|cell_by_gene|micron_to_mosaic",
    ),
    COSMX,
    _COSMX_LOCAL,
    STEREO,
    Format(
        name="Slide-seqV2",
        ids=_BARCODES,
        x=("xcoord", "x"),
        y=("ycoord", "y"),
        path=r"(?i)bead_?locations",
        without_header=("barcode", "x", "y"),
        rows="beads",
        expected="...bead_locations.csv and ...digital_expression.txt.gz",
        hint=r"digital_expression|(?i:puck)",
    ),
    Format(
        name="Curio Seeker",
        ids=_BARCODES,
        x=("x", "SPATIAL_1"),
        y=("y", "SPATIAL_2"),
        path=r"(?i)MatchedBeadLocation",
        rows="beads",
        expected="..._MatchedBeadLocation.csv and ..._MoleculesPerMatchedBead.mtx",
        hint=r"MoleculesPerMatchedBead|MatchedBead",
    ),
    Format(
        name="SeekSpace",
        ids=("Cell_Barcode",),
        x=("X",),
        y=("Y",),
        expected="cell_locations.tsv.gz and a folder filtered_feature_bc_matrix",
        hint=r"cell_locations",
    ),
    Format(
        name="seqFISH",
        ids=("label",),
        x=("center_x",),
        y=("center_y",),
        also=("area",),
        expected="..._CellCoordinates.csv and ..._CellxGene.csv",
        hint=r"CellxGene",
    ),
    Format(
        name="seqFISH+",
        ids=("",),
        x=("X",),
        y=("Y",),
        also=("Field of View", "Cell ID"),
        field="Field of View",
        expected="..._counts.csv and ..._cellcentroids.csv",
        hint=r"cellcentroids",
    ),
    Format(
        name="STARmap",
        ids=("NAME",),
        x=("X",),
        y=("Y",),
        also=("Z",),
        expected="..._spatial.csv and ...raw_expression_pd.csv",
        hint=r"raw_expression_pd|(?i:starmap)",
    ),
    Format(
        name="Giotto",
        ids=("cell_ID",),
        x=("sdimx",),
        y=("sdimy",),
        expected="a table with cell_ID, sdimx and sdimy, and a table of counts",
    ),
)


def format_of(technology: str) -> Format | None:
    """The format that a user names; None for whichever is found."""
    wanted = _plain(technology)
    if wanted == AUTO:
        return None
    names = {_plain(one.name): one for one in (*FORMATS, H5AD, GENERIC)}
    if wanted in {"slideseq", "curio", "stereo"}:
        wanted = next(name for name in names if name.startswith(wanted))
    if wanted not in names:
        there = [AUTO, *(one.name for one in names.values())]
        raise ValueError(f"There is no technology {technology!r}; there are {there}.")
    return names[wanted]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9+]", "", name.lower())
