"""``stofm.im.embed``: features of the image around each cell or spot."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._digests import fingerprint
from stofm._edge.images import in_image_space, open_images, read_microns
from stofm._edge.slices import read_places
from stofm._edge.tables import (
    all_or_nothing,
    read_representation,
    refuse_foreign,
    refuse_taken,
    resolve_table,
    write_record,
)
from stofm._files import local
from stofm._keys import Obsm, Suffix
from stofm.image.encoders import BUILT_IN, choose_encoder
from stofm.image.patches import VIEWS, Scene, choose_sides, embed_scenes, niche_members
from stofm.nn.device import choose_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from anndata import AnnData


def embed(
    adata: Any,
    encoder: Any = "cnn",
    *,
    image: Any = None,
    scale: float | Mapping[str, float] | None = None,
    microns_per_unit: float | Mapping[str, float] | None = None,
    pitch: float | None = None,
    crops: tuple[float, float] | None = None,
    n_views: int = 1,
    spatial_key: str = Obsm.SPATIAL,
    library_key: str | None = None,
    device: str | torch.device = "auto",
    key_added: str = Obsm.X_IMAGE,
    table_key: str | None = None,
    show_progress_bar: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Embed the image around each cell or spot, at two scales.

    A patch of the spot and a larger one of its niche are cut out of the slice's image, resampled to
    the size that the encoder takes, and encoded. Beyond the border of the image it is reflected, so
    every cell gets features. The image is read piece by piece: memory does not grow with the number
    of cells, except for the features themselves.

    Parameters
    ----------
    adata
        AnnData with coordinates, of one or several slices, or a SpatialData.
    encoder
        - ``"cnn"``: a compact network of our own with random weights, for colour and texture only.
        - ``"statistics"``: 30 numbers on colour and texture, a baseline without weights.
        - A file or folder with weights of a ResNet or ViT under timm's names (``.safetensors`` or
          what torch saved), a folder of a transformers model, or the hub id of either.
        - A function or ``torch.nn.Module``: gets float32 (batch, 3, n, n) from 0 to 1 and returns
          (batch, d). Its attribute ``n_pixels``, 224 if there is none, is n.
        - An entry of ``adata.obsm`` with features made elsewhere; the niche is the mean over all
          within half of its side. No image is read then.
    image
        A file (TIFF and OME-TIFF lazily with their pyramids, slides that tifffile reads, JPEG, PNG),
        an array (height, width, channels), the name of an image in ``uns["spatial"]`` or of the
        SpatialData, or a dict of these by slice. None: the image of ``uns["spatial"]``, hires if it
        is there, or the only one of the SpatialData. Grey, RGB, RGBA; any depth.
    scale
        Pixels of the image per unit of the coordinates, or a dict by slice. None: by the scale
        factors or the transformation, and 1 for files and arrays.
    microns_per_unit
        Micrometres of a unit of the coordinates (of coordinates in pixels: of a pixel), or a dict by
        slice. None: what the metadata of :func:`stofm.read`, of the image or of Visium HD say, else
        ``65 / spot_diameter_fullres`` for Visium, else by `pitch`.
    library_key
        Column of ``adata.obs`` that names each cell's slice, and with it its image.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.

    Returns
    -------
    None, or with ``copy=True`` the new AnnData. Sets:

    ``adata.obsm['X_image_spot' | key_added + '_spot']`` : float32 (n_obs, d)
        Features of the patch around each cell or spot.
    ``adata.obsm['X_image_niche' | key_added + '_niche']`` : float32 (n_obs, d)
        Features of the patch of its niche.
    ``adata.uns['stofm']['X_image_spot' | ...]``, ``['X_image_niche' | ...]`` : dict
        Encoder, fingerprint of its weights, orientations, side of the patch in micrometres and in
        pixels, and for each slice the image and its micrometres per pixel.

    Other Parameters
    ----------------
    pitch
        Micrometres between the middles of neighbouring spots.
    crops
        Sides of both patches in micrometres. None: 100 and 200 for spots, 40 and 120 for cells that
        lie nearer to each other than 40 µm.
    n_views
        Orientations of a patch that its features are averaged over, the same for the spot and its
        niche: 1, 2 (and mirrored), 4 (and upside down) or 8 (and turned). Tissue has no up and down,
        and more of them make features of an encoder steadier that was not trained so; time grows with
        it.
    spatial_key
        Entry of ``adata.obsm`` with the coordinates. Centroids are taken for a SpatialData.
    key_added
        What the names of both entries of ``adata.obsm`` start with.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show a bar.
    copy
        Return a changed copy and leave `adata` as it is.

    Raises
    ------
    KeyError
        There is no image or no scale factor, or a name is not there; `encoder` is one that nothing has.
    FileNotFoundError
        There is no such file of an image or of weights.
    ImportError
        The image needs a library of the extra ``image``.
    ValueError
        `n_views` is none of these numbers, micrometres are not known, most cells lie outside the
        image, or an image or weights can't be used.
    FloatingPointError
        The encoder gave NaN.

    See Also
    --------
    stofm.pl.image : draws cells over the image, to check it and its scale.
    stofm.tl.align : images and expression in one space.

    References
    ----------
    ST-Align: Multi-Scale Image-Gene Foundation Modeling for Spatial Transcriptomics via Spot-Niche
    Alignment (openreview.net/forum?id=EWzPy228cM), for spot and niche.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.load("mouse_olfactory_bulb_st")
    >>> st.im.embed(adata, "statistics", pitch=200)
    >>> adata.obsm["X_image_spot"].shape
    (379, 30)
    """
    if n_views not in VIEWS:
        raise ValueError(f"n_views must be one of {list(VIEWS)}, found {n_views!r}.")
    table = resolve_table(adata, table_key, copy=copy)
    keys = [key_added + suffix for suffix in (Suffix.SPOT, Suffix.NICHE)]
    for key in keys:
        refuse_taken(key, Obsm.X_IMAGE, spatial_key, encoder if isinstance(encoder, str) else None)
        refuse_foreign(table, key, obsm=[key])
    seen = in_image_space(adata, table_key)
    places = read_places(seen, spatial_key=spatial_key, library_key=library_key)
    names, members = places.slices.names, places.slices.rows
    xy = {name: places.coordinates[rows] for name, rows in zip(names, members, strict=True)}
    _refuse_unknown(table, encoder)
    is_ready = isinstance(encoder, str) and encoder in table.obsm
    opening = open_images(adata, seen, [] if is_ready else names, image=image, scale=scale)
    with opening as images:
        microns, apart = read_microns(seen, xy, images, spatial_key, microns_per_unit, pitch)
        sides = choose_sides(crops, apart)
        facts: dict[str, Any] = {
            "slice": np.array(names, dtype=object),
            "microns_per_unit": np.array(microns),
        }
        if is_ready:
            spot = read_representation(table, encoder)
            niche, facts["fingerprint"] = np.empty_like(spot), fingerprint(spot)
            for rows, unit in zip(members, microns, strict=True):
                within = niche_members(places.coordinates[rows], sides[1] / 2 / unit)
                niche[rows] = within @ spot[rows] / within.sum(axis=1)
        else:
            chosen = choose_encoder(encoder, choose_device(device))
            scenes = [
                Scene(name, rows, one.slide, one.pixels_of(xy[name]), unit / one.scale)
                for name, rows, one, unit in zip(names, members, images, microns, strict=True)
            ]
            options: dict[str, Any] = {"n_views": n_views, "show_progress_bar": show_progress_bar}
            spot, niche = embed_scenes(scenes, sides, chosen, **options)
            facts |= {"fingerprint": chosen.fingerprint, "n_pixels": chosen.n_pixels}
            facts["image"] = np.array([Path(one.slide.name).name for one in scenes], dtype=object)
            facts["microns_per_pixel"] = np.array([one.microns_per_pixel for one in scenes])
            encoder = chosen.name
    target = table.copy() if copy else table
    params = {"encoder": encoder, "n_views": n_views, "spatial_key": spatial_key}
    params["library_key"] = places.slices.column
    with all_or_nothing(target):
        for key, values, side in zip(keys, (spot, niche), sides, strict=True):
            target.obsm[key] = values
            write_record(target, key, {**params, "microns": side}, **facts)
    return target if copy else None


def _refuse_unknown(table: AnnData, encoder: Any) -> None:
    """Refuse a name that is no encoder, no entry of obsm, no file and no hub id."""
    known = [*BUILT_IN, *map(str, table.obsm)]
    if not isinstance(encoder, str) or encoder in known or "/" in encoder:
        return
    if not local(encoder).exists():
        near = difflib.get_close_matches(encoder, known, n=3)
        raise KeyError(
            f"encoder={encoder!r} is none of {list(BUILT_IN)}, no entry of obsm, which has "
            f"{sorted(map(str, table.obsm))}, and no file or folder. "
            + (f"Did you mean {near}?" if near else "Pass one of these, or a hub id 'owner/name'.")
        )
