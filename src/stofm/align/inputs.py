"""What an aligner reads of slices: features of images and of genes, of spots and their niches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from scipy import sparse

from stofm._edge.images import read_microns
from stofm._edge.tables import read_record, read_representation
from stofm._keys import Suffix
from stofm._messages import warn
from stofm.align.network import LEVELS
from stofm.heads.embeddings import describe_origin, origin_of, places_entry, same_origin
from stofm.image.patches import niche_members
from stofm.spatial import canonical_order

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.request import SliceTables

    Matrix = NDArray[np.float32]

#: Columns that vary by less, as a share of their root mean square, are constant but for rounding.
_ROUNDING: Final = 1e-5
#: Patches of other sides differ by more than this share.
_SAME_SIDE: Final = 0.01
#: From how many times on another resolution is warned of.
_COARSER: Final = 2.0
_SUFFIXES: Final = (Suffix.SPOT, Suffix.NICHE)


@dataclass(frozen=True)
class ImageOrigin:
    """Where features of images come from: encoder, its weights, sides of patches in micrometres.

    `n_views` are the orientations that features are means over; `microns_per_pixel` is the median
    over slices; 0 where no image was read.
    """

    encoder: str
    fingerprint: str
    sides: tuple[float, float]
    microns_per_pixel: float
    n_views: int = 1

    @classmethod
    def read(cls, table: AnnData, key: str) -> ImageOrigin:
        """Read what :func:`stofm.im.embed` recorded."""
        records = [read_record(table, key + suffix) for suffix in _SUFFIXES]
        if None in records:
            raise KeyError(
                f"obsm[{key + Suffix.SPOT!r}] and obsm[{key + Suffix.NICHE!r}] have no record in "
                "uns['stofm'] of how they were made: make them with st.im.embed(adata), which also "
                "takes features of yours by their name in obsm. ad.concat drops records unless it is "
                "called with uns_merge='same'."
            )
        spot, niche = (dict(record or {}) for record in records)
        pixels = np.asarray(spot.get("microns_per_pixel", [0.0]))
        return cls(
            encoder=str(spot["params"]["encoder"]),
            # That of features made elsewhere is of their values.
            fingerprint=str(spot["fingerprint"]) if "n_pixels" in spot else "",
            sides=(float(spot["params"]["microns"]), float(niche["params"]["microns"])),
            microns_per_pixel=float(np.median(pixels)),
            n_views=int(spot["params"].get("n_views", 1)),
        )

    def require(self, other: ImageOrigin, who: str) -> None:
        """Refuse features of another encoder or of other patches; warn of another resolution."""
        sides = np.abs(np.divide(other.sides, self.sides) - 1)
        names = ("encoder", "fingerprint", "n_views")
        differ = any(getattr(self, name) != getattr(other, name) for name in names)
        if differ or sides.max() > _SAME_SIDE:
            raise ValueError(
                f"{who} has features of {other}, expected {self}. Make them again with the same "
                f"encoder: st.im.embed(adata, {self.encoder!r}, crops={self.sides}, "
                f"n_views={self.n_views})."
            )
        pixels = sorted((self.microns_per_pixel, other.microns_per_pixel))
        if pixels[0] and pixels[1] > _COARSER * pixels[0]:
            warn(
                f"{who}: its image has {other.microns_per_pixel:.3g} µm a pixel, the aligner's have "
                f"{self.microns_per_pixel:.3g}: features of images of such different resolution can "
                "hardly be compared. Pass an image of similar resolution to st.im.embed."
            )

    def __str__(self) -> str:
        """The encoder, its weights and the sides of patches, for messages."""
        weights = f"{self.fingerprint}, " * bool(self.fingerprint) + f"n_views={self.n_views}"
        sides = f"{self.sides[0]:g} and {self.sides[1]:g} µm"
        return f"{self.encoder!r} ({weights}) in patches of {sides}"


@dataclass(frozen=True, eq=False)
class Spots:
    """Spots or cells of slices, slice after slice, in an order that is not that of the tables.

    Attributes
    ----------
    rows
        (n,) row of each in the tables, counted through all of them.
    parts
        Where each slice is.
    names
        Of the slices.
    places
        (n, 2) coordinates in sides of a niche.
    members
        For each slice which of its spots are in the niche of each, (n_slice, n_slice).
    """

    rows: NDArray[np.int64]
    parts: list[slice]
    names: list[str]
    places: NDArray[np.float64]
    members: list[sparse.csr_matrix]

    @classmethod
    def read(
        cls,
        slices: SliceTables,
        side: float,
        spatial_key: str,
        *,
        key: str | None = None,
        microns_per_unit: Any = None,
        pitch: float | None = None,
        self_in_niche: bool = True,
    ) -> Spots:
        """Read places and niches of a `side` in micrometres.

        How large a unit of the coordinates is, tells the record of the image features `key`, or
        what :func:`stofm.im.embed` goes by where there are none.
        """
        xy, rows, places, members = slices.coordinates(spatial_key), [], [], []
        units = _units(slices, xy, spatial_key, key, microns_per_unit, pitch)
        for own, unit in zip(slices.rows, units, strict=True):
            ordered = own[canonical_order(xy[own], xy[own])]
            rows.append(ordered)
            places.append(xy[ordered] * (unit / side))
            found = niche_members(places[-1], 0.5)
            members.append(found if self_in_niche else _without_self(found))
        counts = np.concatenate([np.asarray(one.sum(axis=1)).ravel() for one in members])
        if np.median(counts) <= 1:
            warn(
                f"The niches, {side:g} µm wide, of most spots hold no other spot, and say of genes "
                "what the spots say. Make them wider: st.im.embed(adata, crops=(spot, niche)), in µm."
            )
        stops = np.cumsum([len(one) for one in rows]).tolist()
        parts = [slice(stop - len(one), stop) for stop, one in zip(stops, rows, strict=True)]
        return cls(np.concatenate(rows), parts, slices.names, np.concatenate(places), members)

    def __len__(self) -> int:
        """Number of spots."""
        return len(self.rows)

    def to_tables(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of spots, (n, ...), in the order of the tables' rows."""
        found = np.empty_like(values)
        found[self.rows] = values
        return found

    def niche_means(self, values: Any, *, with_self: bool = True) -> Any:
        """Mean over the members of each niche, of a dense or sparse matrix (n, d).

        Without the spot itself, if there are others.
        """
        found = []
        for part, members in zip(self.parts, self.members, strict=True):
            own = members if with_self else _without_self(members)
            sizes = np.asarray(own.sum(axis=1)).ravel()
            found.append(sparse.diags(1.0 / sizes) @ own @ values[part])
        if sparse.issparse(values):
            return sparse.vstack(found, format="csr", dtype=np.float32)
        return np.concatenate(found).astype(np.float32)

    def standardised(self, values: Matrix) -> Matrix:
        """Each column less its mean over the slide, and divided by its spread there."""
        found = np.empty_like(values)
        for part in self.parts:
            own = values[part].astype(np.float64)
            mean, spread = own.mean(axis=0), own.std(axis=0)
            size = np.sqrt((own**2).mean(axis=0))
            spread[spread <= _ROUNDING * size] = np.inf
            found[part] = (own - mean) / np.where(spread > 0, spread, np.inf)
        return found

    def where(self, clusters: NDArray[np.integer[Any]] | None = None) -> Matrix:
        """Places, number of the slide and of the cluster, (n, 4)."""
        slides = np.repeat(np.arange(len(self.parts)), [p.stop - p.start for p in self.parts])
        codes = np.zeros(len(self)) if clusters is None else clusters
        return np.column_stack([self.places, slides, codes]).astype(np.float32)


def _without_self(members: sparse.csr_matrix) -> sparse.csr_matrix:
    """Leave a spot out of its own niche, unless it is alone in it."""
    others = members - sparse.diags(members.diagonal())
    is_alone = np.asarray(others.sum(axis=1)).ravel() == 0
    kept: sparse.csr_matrix = sparse.csr_matrix(others + sparse.diags(is_alone.astype(float)))
    kept.eliminate_zeros()
    return kept


def _units(
    slices: SliceTables,
    xy: NDArray[np.float64],
    spatial_key: str,
    key: str | None,
    microns_per_unit: Any,
    pitch: float | None,
) -> list[float]:
    """Micrometres of a unit of the coordinates, for each slice."""
    units: list[float] = []
    for k, (table, place) in enumerate(zip(slices.tables, slices.places, strict=True)):
        own = [
            (name, rows)
            for name, rows in zip(slices.names, slices.rows, strict=True)
            if place.start <= rows[0] < place.stop
        ]
        if key is None:
            places = {name if len(own) > 1 else "": xy[rows] for name, rows in own}
            where = places_entry(table, spatial_key)
            with slices.naming(k):
                units += read_microns(table, places, [], where, microns_per_unit, pitch)[0]
            continue
        record = read_record(table, key + Suffix.NICHE) or {}
        known = dict(zip(map(str, record["slice"]), record["microns_per_unit"], strict=True))
        # Cells of one slice may have been taken out of several.
        same = next(iter(known.values())) if len(set(known.values())) == 1 else None
        for name, _ in own:
            unit = known.get(name if slices.is_single else name.partition(":")[2], same)
            if unit is None:
                raise ValueError(
                    f"obsm[{key + Suffix.NICHE!r}] was made of the slices {list(known)}, and here is "
                    f"{name!r}: pass the `library_key` that st.im.embed was called with, or call it "
                    "again."
                )
            units.append(float(unit))
    return units


def _read_entry(slices: SliceTables, key: str) -> Matrix:
    """An entry of obsm of all tables."""
    return np.concatenate(slices.each(lambda table: read_representation(table, key)))


def read_images(
    slices: SliceTables, key: str, expected: ImageOrigin | None = None
) -> tuple[dict[str, Matrix], ImageOrigin]:
    """Features of images by branch, in the order of the tables' rows, and where they come from."""
    values = {
        f"{level}_image": _read_entry(slices, key + suffix)
        for level, suffix in zip(LEVELS, _SUFFIXES, strict=True)
    }
    origins = slices.each(lambda table: ImageOrigin.read(table, key))
    for origin, (who, _) in zip(origins, slices.called, strict=True):
        (expected or origins[0]).require(origin, who)
    pixels = float(np.median([one.microns_per_pixel for one in origins]))
    return values, replace(origins[0], microns_per_pixel=pixels)


def read_reps(
    slices: SliceTables, spots: Spots, reps: tuple[str, ...], expected: Sequence[Mapping[str, str]]
) -> tuple[dict[str, Matrix], list[dict[str, str]]]:
    """Entries of obsm in place of genes: of the spot and of the niche, which is a mean if none is named."""
    origins = []
    for k, rep in enumerate(reps):
        own = slices.each(partial(origin_of, rep=rep))
        wanted = expected[k] if expected else own[0]
        for origin, (who, _) in zip(own, slices.called, strict=True):
            if not same_origin(origin, wanted):
                raise ValueError(
                    f"obsm[{rep!r}] of {who} is by {describe_origin(origin)}, expected "
                    f"{describe_origin(wanted)}: embed it again with that model."
                )
        origins.append(own[0])
    found = [_read_entry(slices, rep)[spots.rows] for rep in reps]
    niche = found[1] if len(found) > 1 else spots.niche_means(found[0])
    values = {"spot_genes": found[0], "niche_genes": niche}
    return {name: spots.standardised(one) for name, one in values.items()}, origins
