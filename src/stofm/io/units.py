"""Micrometres: where files state the unit of their coordinates, and the images of Visium."""

from __future__ import annotations

import gzip
import json
import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from stofm._messages import warn
from stofm.io.files import is_gzip, nearest
from stofm.io.formats import COSMX, MICROMETRE, UNKNOWN, VISIUM, VISIUM_HD, XENIUM

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.io.files import File
    from stofm.io.formats import Format

#: Micrometres of a spot's diameter and between the centres of neighbouring spots.
SPOT: Final = 65.0
_PITCH: Final = 100.0
_DISAGREE: Final = 0.02
_SCALES: Final = r"scalefactors[^/]*\.json(\.gz)?$"


class Scale(NamedTuple):
    """Micrometres of a unit of the coordinates, and where that number came from."""

    factor: float = 1.0
    unit: str = UNKNOWN
    source: str = ""


def scale_of(technology: Format, table: File, cells: pd.DataFrame, files: list[File]) -> Scale:
    """Find how large a unit of the coordinates is."""
    if technology.unit == MICROMETRE:
        return Scale(1.0, MICROMETRE, f"{technology.name} writes micrometres")
    if technology is VISIUM_HD or technology is VISIUM:
        file = nearest(table, files, _SCALES)
        factors = {} if file is None else read_json(file)
        if "microns_per_pixel" in factors and file is not None:
            source = f"microns_per_pixel in {file.name}"
            return Scale(float(factors["microns_per_pixel"]), MICROMETRE, source)
        if "spot_diameter_fullres" in factors and file is not None:
            factor = SPOT / float(factors["spot_diameter_fullres"])
            _compare_with_pitch(factor, cells)
            return Scale(factor, MICROMETRE, f"65 µm per spot_diameter_fullres in {file.name}")
    if technology.name == COSMX.name:
        return _scale_of_cosmx(table, cells, files)
    return Scale()


def _compare_with_pitch(factor: float, cells: pd.DataFrame) -> None:
    """Warn if spots of a diameter of 65 µm are not 100 µm apart."""
    names = ["array_row", "array_col", *VISIUM.y, *VISIUM.x]
    if not set(names) <= set(cells.columns) or len(cells) < 3:
        return
    rows, columns, *pixels = (cells[name].to_numpy(dtype=np.float64) for name in names)
    design = np.column_stack([rows, columns, np.ones(len(cells))])
    step, _, rank, _ = np.linalg.lstsq(design, np.column_stack(pixels))
    if rank < 3:
        return
    # Neighbours of a row are two columns apart.
    by_pitch = _PITCH / float(np.hypot(*(2 * step[1])))
    if abs(by_pitch / factor - 1) > _DISAGREE:
        warn(
            f"spot_diameter_fullres says {factor:.4g} µm a pixel, and the distance of neighbouring "
            f"spots (100 µm) says {by_pitch:.4g}: scale factors and positions may be of different "
            "images. The first is taken; pass `microns_per_unit` if it is wrong."
        )


def _scale_of_cosmx(table: File, cells: pd.DataFrame, files: list[File]) -> Scale:
    """From areas in pixels and µm², or from positions of fields in pixels and mm."""
    from stofm.io.matrices import read_cells

    if {"Area", "Area.um2"} <= set(cells.columns):
        ratio = (cells["Area.um2"] / cells["Area"]).median()
        if np.isfinite(ratio) and ratio > 0:
            return Scale(float(np.sqrt(ratio)), MICROMETRE, f"Area and Area.um2 in {table.name}")
    fields = nearest(table, files, r"fov_positions")
    columns = ("x_global_px", "y_global_px", "x_global_mm", "y_global_mm")
    if fields is not None and set(columns) <= set(fields.columns):
        key = next(name for name in fields.columns if name.lower() == "fov")
        places = read_cells(fields, fields.columns, key)[list(columns)].to_numpy(dtype=np.float64)
        extent = np.ptp(places, axis=0)
        axis = int(extent[1] > extent[0])
        if extent[axis] > 0:
            factor = 1000 * float(extent[axis + 2] / extent[axis])
            return Scale(factor, MICROMETRE, f"pixels and mm of fields in {fields.name}")
    return Scale()


def scale_of_anndata(adata: AnnData) -> Scale:
    """Find what ``uns`` says: Visium's spots, and the resolution of Stereo-seq."""
    if "resolution" in adata.uns and "bin_type" in adata.uns:
        return Scale(float(adata.uns["resolution"]) / 1000, MICROMETRE, "uns['resolution'] (nm)")
    for name, one in dict(adata.uns.get("spatial", {})).items():
        factors = one.get("scalefactors", {}) if hasattr(one, "get") else {}
        if "microns_per_pixel" in factors:
            return Scale(
                float(factors["microns_per_pixel"]), MICROMETRE, f"uns['spatial'][{name!r}]"
            )
        if "spot_diameter_fullres" in factors:
            factor = SPOT / float(factors["spot_diameter_fullres"])
            return Scale(factor, MICROMETRE, f"spot_diameter_fullres in uns['spatial'][{name!r}]")
    return Scale()


def read_json(file: File) -> dict[str, Any]:
    """Read a file of JSON, compressed or not."""
    raw = file.path.read_bytes()
    try:
        found = json.loads(gzip.decompress(raw) if is_gzip(file.path) else raw)
    except (ValueError, OSError) as error:
        raise ValueError(f"{file.name} is damaged: {error}. Get it again.") from error
    return found if isinstance(found, dict) else {}


def bin_size_of(table: File, files: list[File]) -> int | None:
    """Micrometres of the bins of a table of positions; None for spots."""
    if found := re.search(r"square_(\d+)um", str(table.path.resolve())):
        return int(found[1])
    file = nearest(table, files, _SCALES)
    size = None if file is None else read_json(file).get("bin_size_um")
    return None if size is None else round(float(size))


def read_images(table: File, files: list[File], name: str) -> dict[str, Any]:
    """Images and scale factors as scanpy keeps them."""
    from matplotlib.image import imread

    images = {}
    for size in ("hires", "lowres"):
        file = nearest(table, files, rf"tissue_{size}_image\.(png|jpe?g)$")
        if file is not None:
            images[size] = imread(str(file.path))
    if not images:
        raise FileNotFoundError(
            f"There are no images beside {table.name}: expected tissue_hires_image.png or "
            "tissue_lowres_image.png. Leave out images=True."
        )
    file = nearest(table, files, _SCALES)
    factors = {} if file is None else read_json(file)
    return {name: {"images": images, "scalefactors": factors, "metadata": {}}}


def scale_images(libraries: Any, factor: float) -> dict[str, Any]:
    """Images with scale factors that fit coordinates that were multiplied by `factor`."""
    scaled = {}
    for name, one in dict(libraries).items():
        scaled[name] = one
        if hasattr(one, "get") and "scalefactors" in one:
            factors = {key: float(value) for key, value in one["scalefactors"].items()}
            for key in factors:
                # From an image to the full size, and lengths in pixels of the full size.
                factors[key] /= factor if key.endswith("scalef") else 1.0
                factors[key] *= factor if key.endswith("fullres") else 1.0
            scaled[name] = {**one, "scalefactors": factors}
    return scaled


def polygon_centroids(file: File) -> tuple[list[str], NDArray[np.float64]]:
    """Ids and centroids (n, 2) of the polygons in a GeoJSON of Space Ranger."""
    features = read_json(file)["features"]
    ids = [f"cellid_{int(one['properties']['cell_id']):09d}-1" for one in features]
    rings = [np.asarray(one["geometry"]["coordinates"][0], dtype=np.float64) for one in features]
    starts = np.cumsum([0, *map(len, rings)])[:-1]
    here = np.concatenate(rings)
    # A ring's last point repeats its first; relative to it, numbers stay small.
    origin = here[starts]
    own = here - np.repeat(origin, list(map(len, rings)), axis=0)
    following = np.roll(own, -1, axis=0)
    cross = own[:, 0] * following[:, 1] - own[:, 1] * following[:, 0]
    cross[np.append(starts[1:], len(here)) - 1] = 0.0
    area = np.add.reduceat(cross, starts)
    moments = np.add.reduceat((own + following) * cross[:, None], starts)
    means = np.add.reduceat(own, starts) / np.array(list(map(len, rings)))[:, None]
    is_flat = (area == 0)[:, None]
    middles = np.where(is_flat, means, moments / np.where(is_flat, 1.0, 3 * area[:, None]))
    return ids, origin + middles


def facts_of(
    technology: Format, table: File, cells: pd.DataFrame, files: list[File]
) -> dict[str, str]:
    """Software, panel and organism, from files beside the counts."""
    found: dict[str, Any] = {}
    if technology is XENIUM:
        panel = nearest(table, files, r"gene_panel\.json(\.gz)?$")
        said = {} if panel is None else read_json(panel).get("payload", {}).get("panel", {})
        found |= {"organism": said.get("species"), "panel": said.get("identity", {}).get("name")}
        run = nearest(table, files, r"experiment\.xenium(\.gz)?$")
        said = {} if run is None else read_json(run)
        found |= {key: said[name] for key, name in _XENIUM.items() if said.get(name)}
    elif technology.name == COSMX.name:
        columns = {"software": "version", "panel": "Panel"}
        found = {key: cells[name].iloc[0] for key, name in columns.items() if name in cells}
    return {key: str(value) for key, value in found.items() if value}


_XENIUM: Final = {
    "software": "analysis_sw_version",
    "panel": "panel_name",
    "organism": "panel_organism",
}
