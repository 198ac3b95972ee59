"""What lies around the cells of a slice: its image, borders of regions, and a scale bar."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.transforms import Affine2D
from mpl_toolkits.axes_grid1.anchored_artists import (  # type: ignore[import-untyped]
    AnchoredSizeBar,
)

from stofm._edge.images import image_names, in_image_space, known_microns, open_images
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import require_name, text_of
from stofm.pl._colors import category_names
from stofm.pl._maps import read_panels, round_below
from stofm.pl._style import FONT_SIZE
from stofm.spatial.regions import region_borders

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stofm._edge.images import SliceImage
    from stofm.pl._maps import Panel

#: The image that is drawn where there is one, and none is no error.
AUTO: Final = "auto"
#: Pixels of a side of the image, about.
_PIXELS: Final = 1500
_BORDER_COLOR: Final = "#262626"


class Around(NamedTuple):
    """What the caller says of images, parts and scale bars."""

    img_key: str | None = AUTO
    alpha_img: float = 1.0
    library_id: str | Sequence[str] | None = None
    crop_coord: Sequence[float] | None = None
    microns_per_unit: float | None = None
    outlines: str | None = None
    #: Another image and its scale, as :func:`stofm.im.embed` takes them.
    image: Any = None
    scale: Any = None
    needs_image: bool = False


@dataclass(frozen=True)
class Tissue:
    """By the slice's name: its image, lines (n, 2, 2) to draw, and micrometres of a unit."""

    images: Mapping[str, SliceImage] = field(default_factory=dict)
    alpha: float = 1.0
    borders: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    microns: Mapping[str, float] = field(default_factory=dict)

    def draw_below(self, ax: Axes, panel: Panel) -> None:
        """Draw the image of a panel's slice, if there is one."""
        if panel.name in self.images:
            _draw_image(ax, panel, self.images[panel.name], self.alpha)

    def draw_above(self, ax: Axes, panel: Panel) -> None:
        """Draw borders and scale bar of a panel's slice, if they are known."""
        if panel.name in self.borders:
            lines = list(self.borders[panel.name])
            look: dict[str, Any] = {"colors": _BORDER_COLOR, "linewidths": 0.9, "zorder": 3}
            ax.add_collection(LineCollection(lines, capstyle="round", **look), autolim=False)
        if panel.name in self.microns:
            _add_scale_bar(ax, self.microns[panel.name])


@contextmanager
def open_tissue(
    data: Any, table_key: str | None, spatial_key: str, library_key: str | None, around: Around
) -> Iterator[tuple[list[Panel], Tissue]]:
    """Split the cells into slices, and open what is drawn around them; images are closed at the end."""
    table = resolve_table(data, table_key)
    # Coordinates of another entry are none of the image.
    is_pictured = around.img_key is not None and (spatial_key == Obsm.SPATIAL or around.needs_image)
    placed = in_image_space(data, table_key) if is_pictured else table
    panels = _chosen(read_panels(table, spatial_key, library_key, placed), around.library_id)
    named = {panel.name: panel.name or _only(around.library_id) for panel in panels}
    with ExitStack() as stack:
        images: dict[str, SliceImage] = {}
        if is_pictured:
            for panel in panels:
                found = _find_image(stack, data, placed, named[panel.name], around)
                images |= {} if found is None else {panel.name: found}
        microns: dict[str, float] = {}
        for panel in panels:
            unit = around.microns_per_unit
            if unit is None and spatial_key == Obsm.SPATIAL:
                image = images.get(panel.name)
                unit = known_microns(table, named[panel.name], panel.places, image)
            microns |= {} if unit is None else {panel.name: unit}
        borders = _borders(table, panels, around.outlines)
        tissue = Tissue(images, around.alpha_img, borders, microns)
        yield [_cropped(panel, around.crop_coord) for panel in panels], tissue


def _only(library_id: str | Sequence[str] | None) -> str:
    ids = [library_id] if isinstance(library_id, str) else list(library_id or ())
    return ids[0] if len(ids) == 1 else ""


def _chosen(panels: list[Panel], library_id: str | Sequence[str] | None) -> list[Panel]:
    """The slices that are asked for; of slices that are not separated it names the image."""
    if library_id is None or not panels[0].name:
        return panels
    known = {panel.name: panel for panel in panels}
    ids = [library_id] if isinstance(library_id, str) else list(library_id)
    for one in ids:
        require_name(one, known, f"library_id={one!r} is no slice.")
    return [known[one] for one in ids]


def _cropped(panel: Panel, crop_coord: Sequence[float] | None) -> Panel:
    """The part of a slice between left and right, top and bottom."""
    if crop_coord is None:
        return panel
    if np.shape(crop_coord) != (4,):
        raise ValueError(
            f"crop_coord must be (left, right, top, bottom) in coordinates, found {crop_coord!r}."
        )
    (left, right), (top, bottom) = np.sort(np.reshape(crop_coord, (2, 2)).astype(float))
    low, high = np.array([left, top]), np.array([right, bottom])
    is_in = ((panel.places >= low) & (panel.places <= high)).all(axis=1)
    if not is_in.any():
        span = np.stack([panel.places.min(axis=0), panel.places.max(axis=0)]).T.round(1).tolist()
        raise ValueError(
            f"No cell lies in crop_coord={tuple(crop_coord)}{panel.titled('')}; x and y go over {span}."
        )
    return replace(panel, rows=panel.rows[is_in], places=panel.places[is_in], low=low, high=high)


def _find_image(
    stack: ExitStack, data: Any, placed: AnnData, name: str, around: Around
) -> SliceImage | None:
    """Open the image of a slice; None if there is none and none is asked for."""
    image, names = around.image, image_names(data, placed, name)
    is_needed = around.needs_image or around.img_key != AUTO
    if image is None and around.img_key != AUTO:
        text = f"There is no image {around.img_key!r} of the slice {name!r}."
        require_name(str(around.img_key), names, text)
        image = around.img_key
    try:
        opened = open_images(data, placed, [name], image=image, scale=around.scale)
        (found,) = stack.enter_context(opened)
    except KeyError as error:
        if is_needed:
            raise
        if names:
            logger.info("The tissue is not drawn: %s", text_of(error))
        return None
    return found


def _borders(
    table: AnnData, panels: list[Panel], key: str | None
) -> dict[str, NDArray[np.float64]]:
    if key is None:
        return {}
    require_name(key, table.obs, f"outlines={key!r} is not a column of obs.")
    codes = category_names(table.obs[key]).cat.codes.to_numpy(np.int64)
    return {panel.name: region_borders(panel.places, codes[panel.rows]) for panel in panels}


def _draw_image(ax: Axes, panel: Panel, image: SliceImage, alpha: float) -> None:
    """Draw the part of the image that a panel shows, where the coordinates have it."""
    (left, bottom), (right, top) = panel.low, panel.high
    corners = image.pixels_of(np.array([[x, y] for x in (left, right) for y in (bottom, top)]))
    low, high = corners.min(axis=0), corners.max(axis=0)
    part, extent = image.slide.overview(low, high, _PIXELS)
    # From pixels to coordinates, which may be turned.
    to_units = Affine2D(np.linalg.inv(np.vstack([image.matrix, [0.0, 0.0, 1.0]])))
    limits, placed = ax.axis(), to_units + ax.transData
    ax.imshow(part, extent=extent, transform=placed, alpha=alpha, aspect="equal", zorder=-1)
    ax.axis(limits)


def _add_scale_bar(ax: Axes, microns_per_unit: float) -> None:
    """Draw a bar of a round length, about a fifth of the panel's width."""
    if not microns_per_unit > 0:
        raise ValueError(f"microns_per_unit must be above 0, found {microns_per_unit!r}.")
    x_range = abs(np.diff(ax.get_xlim()).item())
    microns = round_below(0.25 * x_range * microns_per_unit)
    bar = AnchoredSizeBar(
        ax.transData,
        microns / microns_per_unit,
        f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm",
        loc="upper left",
        bbox_to_anchor=(0.0, 0.0),
        bbox_transform=ax.transAxes,
        pad=0.0,
        borderpad=0.2,
        sep=2,
        frameon=False,
        size_vertical=0.006 * x_range,
        fontproperties={"size": FONT_SIZE},
    )
    ax.add_artist(bar)
