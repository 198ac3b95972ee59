"""An H&E-like image of simulated sections: nuclei of the rows' cell types in stained tissue."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy.ndimage import gaussian_filter, zoom
from scipy.spatial import cKDTree

from stofm._keys import Obsm

if TYPE_CHECKING:
    from anndata import AnnData
    from numpy.typing import NDArray

#: Absorption of red, green and blue by haematoxylin and eosin (Ruifrok and Johnston 2001).
_HAEMATOXYLIN: Final = (0.65, 0.70, 0.29)
_EOSIN: Final = (0.07, 0.99, 0.11)
#: Micrometres of a pixel for spots, and for cells, which lie nearer than `_APART`.
_OF_SPOTS, _OF_CELLS, _APART = 2.0, 0.5, 40.0
#: Nuclei of a square millimetre of the densest region of spots; the sparsest has a third.
_DENSITY: Final = 1600.0
#: Radii of nuclei in micrometres, from the first type to the last, and how dark they are.
_RADII, _DARKNESS = (3.0, 6.0), (0.7, 1.5)
#: Eosin of the palest and the darkest region, its texture, and that of a slice's stain.
_STAIN, _TEXTURE, _BATCH = (0.25, 0.7), 0.06, 0.08
#: Numbers of its own: an image changes nothing else that is drawn.
_STREAM: Final = 7


def add_images(adata: AnnData, seed: int) -> None:
    """Draw an image for each slice into ``uns["spatial"]``, with its scale factors.

    Coordinates are moved so that no row lies at its border.
    """
    rows_of = adata.obs.groupby("slice_id", observed=True).indices
    adata.uns["spatial"] = {
        str(name): _draw_library(adata, rows, np.random.default_rng([seed, number, _STREAM]))
        for number, (name, rows) in enumerate(rows_of.items())
    }


def _draw_library(
    adata: AnnData, rows: NDArray[np.int64], rng: np.random.Generator
) -> dict[str, Any]:
    places = adata.obsm[Obsm.SPATIAL][rows]
    apart = float(np.median(cKDTree(places).query(places, k=[min(2, len(rows))])[0]))
    places = places - places.min(axis=0) + (2 * apart or _OF_CELLS)
    adata.obsm[Obsm.SPATIAL][rows] = places
    is_spot = "proportions" in adata.obsm
    unit = _OF_CELLS if not is_spot and apart < _APART else _OF_SPOTS
    size = np.ceil((places.max(axis=0) + places.min(axis=0)) / unit).astype(np.int64)
    regions = adata.obs["region"].cat.codes.to_numpy()[rows]
    n_regions = len(adata.obs["region"].cat.categories)
    if is_spot:
        n = rng.poisson(_DENSITY * np.prod(size * unit) * 1e-6)
        nuclei = rng.uniform(0, size * unit, (n, 2))
        nearest = cKDTree(places).query(nuclei)[1]
        kept = rng.random(n) < _spread((1 / 3, 1.0), regions[nearest], n_regions, turn=1)
        nuclei, nearest = nuclei[kept], nearest[kept]
        shares = adata.obsm["proportions"].to_numpy()[rows].cumsum(axis=1)
        types = (shares[nearest] <= rng.random((len(nearest), 1))).sum(axis=1)
        n_types = shares.shape[1]
    else:
        nuclei, types = places, adata.obs["cell_type"].cat.codes.to_numpy()[rows]
        n_types = len(adata.obs["cell_type"].cat.categories)
    types = np.minimum(types, n_types - 1)
    radii = _spread(_RADII, types, n_types) * rng.normal(1.0, 0.1, len(types)).clip(0.5)
    dark = _spread(_DARKNESS, types, n_types, turn=2)
    blue = _draw_discs(nuclei / unit, radii / unit, dark, size)
    # Two regions share a stain, so that the image alone does not tell all of them apart.
    eosin = _spread(_STAIN, regions // 2, -(-n_regions // 2))
    pink = _draw_stain(places / unit, eosin, size, rng)
    stain = np.exp(rng.normal(0.0, _BATCH, 2))
    image = np.empty((*blue.shape, 3), dtype=np.uint8)
    for k, (of_blue, of_pink) in enumerate(zip(_HAEMATOXYLIN, _EOSIN, strict=True)):
        absorbed = float(stain[0] * of_blue) * blue + float(stain[1] * of_pink) * pink
        image[..., k] = np.round(255.0 * np.exp(-absorbed))
    factors = {
        "tissue_hires_scalef": 1.0 / unit,
        "spot_diameter_fullres": 0.55 * apart if is_spot else apart,
        # Of a unit of the coordinates.
        "microns_per_pixel": 1.0,
    }
    return {"images": {"hires": image}, "scalefactors": factors}


def _spread(
    ends: tuple[float, float], codes: NDArray[Any], n: int, *, turn: int = 0
) -> NDArray[np.float64]:
    """Value of each code, spread evenly from one end to the other, in an order that `turn` changes."""
    order = np.random.default_rng([_STREAM, turn]).permutation(n)
    found: NDArray[np.float64] = np.linspace(*ends, n)[order][codes]
    return found


def _draw_discs(
    centers: NDArray[np.float64],
    radii: NDArray[np.float64],
    dark: NDArray[np.float64],
    size: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Darkness (height, width) of discs, the darkest where they overlap; pixels at edges in part."""
    found, reach = np.zeros(size[::-1], dtype=np.float32), int(np.ceil(radii.max())) + 1
    corner = np.floor(centers).astype(np.int64)
    for dy, dx in np.ndindex(2 * reach + 1, 2 * reach + 1):
        pixel = corner + np.array([dx - reach, dy - reach])
        inside = (pixel >= 0).all(axis=1) & (pixel < size).all(axis=1)
        distance = np.linalg.norm(pixel[inside] + 0.5 - centers[inside], axis=1)
        shade = dark[inside] * np.clip(radii[inside] + 0.5 - distance, 0.0, 1.0)
        np.maximum.at(found, (pixel[inside, 1], pixel[inside, 0]), shade.astype(np.float32))
    return found


def _draw_stain(
    places: NDArray[np.float64],
    eosin: NDArray[np.float64],
    size: NDArray[np.int64],
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Eosin (height, width) of the nearest row's region, with texture."""
    step = 4
    height, width = -(-size[::-1] // step) + 1
    y, x = np.mgrid[:height, :width] * float(step)
    nearest = cKDTree(places).query(np.column_stack([x.ravel(), y.ravel()]))[1]
    coarse = gaussian_filter(eosin[nearest].reshape(height, width), 2.0)
    coarse += _TEXTURE * gaussian_filter(rng.normal(size=coarse.shape), 1.0) * 3.0
    fine = zoom(coarse.astype(np.float32), step, order=1)
    stain: NDArray[np.float32] = fine[: size[1], : size[0]]
    return stain.clip(0.02)
