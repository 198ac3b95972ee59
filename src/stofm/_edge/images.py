"""Images of slices: where they are, where coordinates lie in them, and the unit of coordinates."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.spatial import cKDTree

from stofm._edge.slices import Nearest
from stofm._edge.tables import add_centroids, read_record, resolve_table, table_name
from stofm._keys import Obsm, Uns
from stofm._messages import collecting, warn
from stofm.image.slide import Level, Slide, of_array, of_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

#: Micrometres that ``spot_diameter_fullres`` stands for, and between the centres of Visium's spots.
_SPOT, _PITCH = 65.0, 100.0
#: The distance of Visium's spots in such diameters, as in files, and how hexagonal they are.
_RATIO, _HEXAGONAL = (1.3, 1.75), 0.7
#: Largest difference between two sources of the resolution.
_DISAGREE: Final = 0.05


@dataclass(frozen=True, eq=False)
class SliceImage:
    """A slice's image, and the affine map (2, 3) from coordinates to pixels of its first level."""

    slide: Slide
    matrix: NDArray[np.float64]

    @property
    def scale(self) -> float:
        """Pixels of the image per unit of the coordinates."""
        return math.sqrt(abs(np.linalg.det(self.matrix[:, :2])))

    def pixels_of(self, xy: NDArray[np.float64]) -> NDArray[np.float64]:
        """Positions in the image, (n, 2), in pixels."""
        return xy @ self.matrix[:, :2].T + self.matrix[:, 2]


def in_image_space(data: Any, table_key: str | None) -> AnnData:
    """Table to read positions and slices from; that of a SpatialData gets centroids.

    Coordinates in its table may be in another coordinate system than its images.
    """
    table = resolve_table(data, table_key)
    if table is data or "spatialdata_attrs" not in table.uns:
        return table
    from anndata import AnnData

    key = table_name(data.tables, table_key)
    found = AnnData(obs=table.obs, uns={"spatialdata_attrs": table.uns["spatialdata_attrs"]})
    with collecting():
        add_centroids(data, found, key)
    return found if Obsm.SPATIAL in found.obsm else table


def image_names(data: Any, table: AnnData, name: str) -> list[str]:
    """Names of the images of a slice."""
    return list(getattr(data, "images", ()) or _library_of(table, name, "images"))


@contextmanager
def open_images(
    data: Any, table: AnnData, names: Sequence[str], *, image: Any, scale: Any
) -> Iterator[list[SliceImage]]:
    """Open the image of each slice; all are closed at the end. See :func:`stofm.im.embed`."""
    with ExitStack() as stack:
        opened = []
        for name in names:
            one = _open(data, table, name, _of_slice(image, name, "`image`"))
            stack.callback(one.slide.close)
            own = _of_slice(scale, name, "`scale`")
            opened.append(one if own is None else SliceImage(one.slide, _scaling(own, "scale")))
        yield opened


def _of_slice(value: Any, name: str, what: str) -> Any:
    """The value for one slice, from one value for all or a dict by slice."""
    if not isinstance(value, Mapping):
        return value
    if name in value:
        return value[name]
    if not name and len(value) == 1:
        return next(iter(value.values()))
    slices = f"none for the slice {name!r}" if name else "slices are not separated"
    raise KeyError(
        f"{what} has entries for {sorted(map(str, value))}, and {slices}. Its entries have to be named "
        "like the slices in obs[library_key]: pass `library_key`, or rename them."
    )


def _positive(value: Any, name: str) -> float:
    if not (isinstance(value, int | float | np.number) and 0 < value < math.inf):
        raise ValueError(f"{name} must be a number above 0, found {value!r}.")
    return float(value)


def _scaling(factor: Any, name: str) -> NDArray[np.float64]:
    return _positive(factor, name) * np.eye(2, 3)


def _open(data: Any, table: AnnData, name: str, image: Any) -> SliceImage:
    images = getattr(data, "images", {})
    if images and (image is None or (isinstance(image, str) and image in images)):
        return _of_spatialdata(data, table, name, image)
    if image is None or (isinstance(image, str) and image in _library_of(table, name, "images")):
        return _of_library(table, name, image)
    slide = of_file(image) if isinstance(image, str | os.PathLike) else of_array(image)
    return SliceImage(slide, np.eye(2, 3))


def _library_of(table: AnnData, name: str, part: str) -> Mapping[str, Any]:
    """Images or scale factors of a slice as scanpy stores them, if there are any."""
    libraries = table.uns.get("spatial") or {}
    is_only = not name and len(libraries) == 1
    library = libraries.get(next(iter(libraries)) if is_only else name, {})
    found: Mapping[str, Any] = library.get(part, {})
    return found


def _of_library(table: AnnData, name: str, image: str | None) -> SliceImage:
    """Image as scanpy stores it, the larger if there are two and none is named."""
    images, factors = (_library_of(table, name, part) for part in ("images", "scalefactors"))
    size = image or next((one for one in ("hires", "lowres") if one in images), None)
    where = f"uns['spatial'][{name!r}]" if name else "uns['spatial']"
    if size is None:
        there = list(table.uns.get("spatial") or {})
        raise KeyError(
            f"There is no image 'hires' or 'lowres' in {where}; uns['spatial'] holds {there}. Pass "
            "`library_key`, a column whose values have these names, or `image`: a file, an array, or a "
            "dict of them by slice."
        )
    key = f"tissue_{size}_scalef"
    if key not in factors:
        raise KeyError(
            f"{where} has no scale factor {key!r} (it has {sorted(factors) or 'none'}), which says how "
            f"many pixels of {size!r} are one unit of the coordinates. Put it there, or pass the image as "
            "an array with that number: image=..., scale=..."
        )
    slide = of_array(images[size], f"{where}['images'][{size!r}]")
    return SliceImage(slide, _scaling(factors[key], key))


def _of_spatialdata(data: Any, table: AnnData, name: str, image: str | None) -> SliceImage:
    """Image of a SpatialData, through its transformation to the system of the coordinates."""
    from spatialdata.transformations import get_transformation

    if image is None and len(data.images) > 1:
        raise KeyError(
            f"The SpatialData has the images {sorted(data.images)}; pass one of them as `image`, or a "
            "dict of them by slice."
        )
    key = image or next(iter(data.images))
    element = data.images[key]
    used = (read_record(table, Obsm.SPATIAL) or {}).get("params", {})
    system = used.get(name) or next(iter(used.values()), "global")
    systems = get_transformation(element, get_all=True)
    if system not in systems:
        raise KeyError(
            f"The image {key!r} has the coordinate systems {sorted(systems)}, and the cells are in "
            f"{system!r}: set a transformation of the image to that system."
        )
    whole = systems[system].to_affine_matrix(("x", "y"), ("x", "y"))
    # Several resolutions form a tree, which lists them from the largest.
    arrays = (
        [element]
        if hasattr(element, "dims") and hasattr(element, "data")
        else [element[one]["image"] for one in element]
    )
    levels = [Level(one.data, "".join(map(str, one.dims)).upper()) for one in arrays]
    slide = Slide.make(levels, f"sdata.images[{key!r}]")
    return SliceImage(slide, np.linalg.inv(whole)[:2])


# The unit of the coordinates


def read_microns(
    table: AnnData,
    places: dict[str, NDArray[np.float64]],
    images: Sequence[SliceImage],
    spatial_key: str,
    microns_per_unit: Any,
    pitch: float | None,
) -> tuple[list[float], float]:
    """Find micrometres per unit of the coordinates, for each slice; nothing is guessed.

    Also returns the distance of cells in micrometres. `places` are coordinates by slice; there are
    no `images` if features were made elsewhere.
    """
    found, apart = [], []
    for k, (name, xy) in enumerate(places.items()):
        spacing = _spacing(xy)
        unit = _of_slice(microns_per_unit, name, "`microns_per_unit`")
        if unit is None:
            one = images[k] if images else None
            unit = _stated(table, one, name, spatial_key)
            other = pitch
            if unit is None and (unit := _of_visium(table, name, xy, spacing)):
                other = pitch or _PITCH
            unit = _compared(name, unit, other, spacing, spatial_key)
        found.append(_positive(unit, "microns_per_unit"))
        apart.append(found[-1] * spacing)
    return found, float(np.median(apart))


def _spacing(xy: NDArray[np.float64]) -> float:
    """Distance of neighbours; 0 for a single cell.

    If spots lie slightly off their lattice, the first neighbour is nearer than the others.
    """
    distances = Nearest.find(xy).distances
    near = distances[:, 1:3] if distances.shape[1] > 2 else distances
    return float(np.median(near)) if near.size else 0.0


def known_microns(
    table: AnnData, name: str, xy: NDArray[np.float64], image: SliceImage | None
) -> float | None:
    """Micrometres per unit of ``obsm["spatial"]`` from metadata or Visium's spots, if known."""
    stated = _stated(table, image, name, Obsm.SPATIAL)
    return stated or _of_visium(table, name, xy, _spacing(xy))


def _stated(table: AnnData, image: SliceImage | None, name: str, spatial_key: str) -> float | None:
    """Micrometres by :func:`stofm.read`, the image's file or Visium HD's scale factors."""
    source = read_record(table, Uns.SOURCE) or {}
    if spatial_key == Obsm.SPATIAL and source.get("unit") == "micrometre":
        return 1.0
    if image is not None and image.slide.microns_per_pixel is not None:
        return image.slide.microns_per_pixel * image.scale
    stated: float | None = _library_of(table, name, "scalefactors").get("microns_per_pixel")
    return stated


def _of_visium(table: AnnData, name: str, xy: NDArray[np.float64], spacing: float) -> float | None:
    """65 µm per ``spot_diameter_fullres``, if the spots are arranged as Visium's are."""
    diameter = float(_library_of(table, name, "scalefactors").get("spot_diameter_fullres", 0.0))
    if not diameter or not _RATIO[0] <= spacing / diameter <= _RATIO[1]:
        return None
    first, second = cKDTree(xy).query_pairs(1.2 * spacing, output_type="ndarray").T
    way = (xy[second] - xy[first]) @ np.array([1.0, 1.0j])
    # Neighbours lie in six directions; in a square lattice, they cancel out.
    is_hexagonal = abs(np.mean((way / np.abs(way)) ** 6)) > _HEXAGONAL
    return _SPOT / diameter if is_hexagonal else None


def _compared(
    name: str, stated: float | None, pitch: float | None, spacing: float, spatial_key: str
) -> float:
    """The stated value, or the pitch's; warn if they differ, raise an error if there is neither."""
    called = f"Slice {name!r}" if name else "The slice"
    by_pitch = _positive(pitch, "pitch") / spacing if pitch is not None and spacing else None
    if stated and by_pitch and abs(by_pitch / stated - 1) > _DISAGREE:
        warn(
            f"{called}: {stated:.4g} µm a unit of the coordinates by the metadata is taken; neighbouring "
            f"spots at {pitch:g} µm say {by_pitch:.4g}. Pass microns_per_unit={by_pitch:.4g} if that is "
            "right."
        )
    if not (stated or by_pitch):
        raise ValueError(
            f"{called}: nothing says how many micrometres a unit of obsm[{spatial_key!r}] is: no metadata "
            "of the image, no spots that lie as Visium's do. Pass `microns_per_unit` (of coordinates in "
            "pixels: the micrometres of a pixel), or `pitch`, the micrometres between the middles of "
            "neighbouring spots, such as pitch=200 for the 1,000 spots of Spatial Transcriptomics."
        )
    return stated or by_pitch or 0.0
