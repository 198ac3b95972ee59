"""Images of tissue as pyramids whose levels are read window by window."""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._files import local, reading, take_back
from stofm._logging import logger

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from numpy.typing import NDArray

_TIFF: Final = {".btf", ".ndpi", ".scn", ".svs", ".tf8", ".tif", ".tiff"}
#: Micrometres of the units that files state sizes in.
_MICRONS: Final = {"nm": 1e-3, "µm": 1.0, "μm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4}
#: Micrometres of the units of the resolution tag of TIFF, by number: inch and centimetre.
_TAG_UNITS: Final = {2: 25_400.0, 3: 1e4}
#: A tag that says more micrometres a pixel than this is of a screen or a printer.
_COARSEST: Final = 20.0
#: Pixels of a side that the brightness of an image is looked at, and the share that is not white.
_LOOKED_AT, _BRIGHT = 500, 0.999


@dataclass(frozen=True, eq=False)
class Level:
    """One resolution of an image: something that can be sliced, and the order of its axes.

    `axes` has the letters Y and X and at most one C; other axes have a length of 1.
    """

    array: Any
    axes: str

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self._of_plane(self.array.shape)

    @property
    def chunks(self) -> tuple[int, int]:
        """Height and width of what is read at least, in pixels; 1 if the file does not say."""
        sizes = getattr(self.array, "chunks", None) or (1,) * len(self.axes)
        # dask has the sizes of all chunks.
        return self._of_plane([max(one) if isinstance(one, tuple) else one for one in sizes])

    def _of_plane(self, sizes: Sequence[int]) -> tuple[int, int]:
        return sizes[self.axes.index("Y")], sizes[self.axes.index("X")]

    def read(self, rows: slice, columns: slice) -> NDArray[Any]:
        """Read a window inside the image, (height, width, channels), as it is stored."""
        places = {"Y": rows, "X": columns, "C": slice(None)}
        part = np.asarray(self.array[tuple(places.get(axis, 0) for axis in self.axes)])
        kept = "".join(axis for axis in self.axes if axis in places)
        if "C" not in kept:
            part, kept = part[..., None], f"{kept}C"
        return part.transpose([kept.index(axis) for axis in "YXC"])


@dataclass(frozen=True, eq=False)
class Slide:
    """An image with its levels, the largest first, as red, green and blue from 0 to 1.

    `white` is the stored value that becomes 1. `microns_per_pixel` is of the first level, None if
    the file does not say.
    """

    levels: tuple[Level, ...]
    name: str
    white: float
    microns_per_pixel: float | None = None
    file: Any = None

    @classmethod
    def make(cls, levels: Sequence[Level], name: str, **more: Any) -> Slide:
        """Check what the levels hold, and find which value is white."""
        first = levels[0]
        sizes = dict(zip(first.axes, first.array.shape, strict=True))
        others = {n for axis, n in sizes.items() if axis not in "YXC"}
        if others - {1} or sizes.get("C", 1) not in (1, 3, 4) or 0 in first.shape:
            raise ValueError(
                f"{name} has the axes {first.axes} and the shape {tuple(first.array.shape)}; expected "
                "height, width and 1, 3 or 4 channels. Choose a plane and the channels, and pass an "
                "array: image=array[:, :, [0, 1, 2]]"
            )
        return cls(tuple(levels), name, _white_of(levels[-1], name), **more)

    def read(self, level: int, window: tuple[int, int, int, int], step: int) -> NDArray[np.float32]:
        """Read a window of a level, each pixel a mean of `step` x `step`: (height, width, 3).

        The window (top, bottom, left, right) is in pixels of the result. It may reach beyond the
        image, which is reflected there.
        """
        height, width = (side // step for side in self.levels[level].shape)
        rows, columns = reflect(*window[:2], height), reflect(*window[2:], width)
        top, left = int(rows.min()), int(columns.min())
        part = self.levels[level].read(
            slice(step * top, step * (int(rows.max()) + 1)),
            slice(step * left, step * (int(columns.max()) + 1)),
        )
        means = np.zeros((len(rows), len(columns), part.shape[2]), np.float32)
        for i, j in np.ndindex(step, step):
            means += part[np.ix_(step * (rows - top) + i, step * (columns - left) + j)]
        means *= 1.0 / (self.white * step**2)
        np.clip(means, 0.0, 1.0, out=means)
        return _as_colours(means)

    def overview(
        self, low: NDArray[np.float64], high: NDArray[np.float64], n_pixels: int
    ) -> tuple[NDArray[np.float32], tuple[float, float, float, float]]:
        """What lies between two corners (x, y), at about `n_pixels` of its longer side or fewer.

        Also gives its left, right, lower and upper edge in pixels of the first level.
        """
        size = np.array(self.levels[0].shape[::-1])
        low, high = np.clip(low, 0, size - 1), np.clip(high, 1, size)
        wanted = max(1.0, float((high - low).max()) / n_pixels)
        factors = [size[1] / level.shape[0] for level in self.levels]
        level = max(k for k, factor in enumerate(factors) if factor <= wanted)
        step = min(int(wanted / factors[level]), *self.levels[level].shape)
        unit = factors[level] * step
        left, top = (low // unit).astype(int)
        right, bottom = np.maximum(-(-high // unit), low // unit + 1).astype(int)
        part = self.read(level, (top, bottom, left, right), step)
        return part, (left * unit, right * unit, bottom * unit, top * unit)

    def close(self) -> None:
        """Close the file, if there is one."""
        if self.file is not None:
            self.file.close()


def reflect(start: int, stop: int, n: int) -> NDArray[np.int64]:
    """Places start..stop in a row of n that is reflected at both ends, however far beyond them."""
    places = np.arange(start, stop) % (2 * n)
    return np.minimum(places, 2 * n - 1 - places)


def _as_colours(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Three channels: grey is repeated, and what is transparent becomes white."""
    if values.shape[2] == 4:
        return values[..., :3] * values[..., 3:] + (1.0 - values[..., 3:])
    return values if values.shape[2] == 3 else values.repeat(3, axis=2)


def _white_of(level: Level, name: str) -> float:
    """Value that stands for white: 255 of bytes, else what only one pixel in 1,000 exceeds."""
    kind = np.dtype(level.array.dtype)
    if kind == np.uint8 or kind == np.bool_:
        return 255.0 if kind == np.uint8 else 1.0
    every = slice(None, None, max(1, max(level.shape) // _LOOKED_AT))
    values = level.read(every, every).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinite values: replace them by those of background.")
    largest = float(values.max())
    if kind.kind == "f" and largest <= 255.0:
        return 1.0 if largest <= 1.0 else 255.0
    white = float(np.quantile(values, _BRIGHT)) or 1.0
    logger.info("%s (%s): values from 0 to %g become 0 to 1.", name, kind, white)
    return white


# Where images come from


def of_array(array: Any, name: str = "The image") -> Slide:
    """Take an array (height, width), with channels last, or a few of them first."""
    shape: tuple[int, ...] = getattr(array, "shape", ())
    if len(shape) not in (2, 3):
        raise ValueError(
            f"{name} has the shape {tuple(shape)}; expected (height, width, channels)."
        )
    is_first = len(shape) == 3 and shape[2] not in (1, 3, 4) and shape[0] in (1, 3, 4)
    axes = "YX" if len(shape) == 2 else "CYX" if is_first else "YXC"
    return Slide.make([Level(array, axes)], name)


def of_file(path: str | os.PathLike[str]) -> Slide:
    """Open an image file: TIFF lazily with its pyramid, others whole."""
    place = take_back(local(path))
    if not place.is_file():
        raise FileNotFoundError(f"There is no image file {str(path)!r}.")
    needed = "tifffile" if place.suffix.lower() in _TIFF else "Pillow"
    try:
        with reading(Path(path), "image"):
            return (_of_tiff if needed == "tifffile" else _of_picture)(place, str(path))
    except ImportError as error:
        raise ImportError(
            f"Reading {place.name} needs {needed}: pip install 'stofm[image]' ({error})"
        ) from error


def _of_picture(path: Path, name: str) -> Slide:
    from PIL import Image

    with Image.open(path) as opened:
        # Palettes hold colours by number.
        wanted = {"P": "RGBA", "PA": "RGBA", "LA": "RGBA", "CMYK": "RGB", "YCbCr": "RGB"}
        return of_array(np.asarray(opened.convert(wanted.get(opened.mode, opened.mode))), name)


def _of_tiff(path: Path, name: str) -> Slide:
    import tifffile
    import zarr

    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tifffile.TiffFile(path))
        # The largest: slides have labels and overviews beside it.
        series = max(file.series, key=lambda one: one.size)
        levels = [
            Level(zarr.open(series.aszarr(level=k), mode="r"), one.axes.replace("S", "C"))
            for k, one in enumerate(series.levels)
        ]
        slide = Slide.make(
            levels, name, microns_per_pixel=_microns_of_tiff(file, series), file=file
        )
        stack.pop_all()
        return slide


def _microns_of_tiff(file: Any, series: Any) -> float | None:
    """Micrometres a pixel by OME, by a slide scanner's description, or by the resolution tag."""
    tags, found = series.keyframe.tags, None
    ome = re.search(r"<(?:\w+:)?Pixels\b[^>]*>", file.ome_metadata or "")
    stated = dict(re.findall(r'(PhysicalSizeX(?:Unit)?)="([^"]*)"', ome[0] if ome else ""))
    if "PhysicalSizeX" in stated:
        unit = _MICRONS.get(stated.get("PhysicalSizeXUnit", "µm"), 0.0)
        found = float(stated["PhysicalSizeX"]) * unit
    elif scanner := re.search(r"\bMPP\s*=\s*([\d.]+)", series.keyframe.description):
        found = float(scanner[1])
    elif "XResolution" in tags and "ResolutionUnit" in tags:
        number, divisor = tags["XResolution"].value
        size = _TAG_UNITS.get(int(tags["ResolutionUnit"].value), 0.0) * divisor / (number or 1)
        found = size if size <= _COARSEST else None
    return found or None
