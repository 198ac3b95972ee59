"""``stofm.pl.annotation``: an annotation in the plane, and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from stofm import metrics
from stofm._anndata import resolve_table
from stofm._frames import frame_names
from stofm._keys import Label, Obs, Obsm
from stofm.metrics.labels import Reliability
from stofm.pl._confusion import count_pairs, draw_confusion
from stofm.pl._draw import add_key
from stofm.pl._maps import fill_map
from stofm.pl._panels import Layout, Slot, arrange, finish, frame_panel, make_axes
from stofm.pl._reliability import draw_reliability
from stofm.pl._slices import read_panels
from stofm.pl._style import (
    NO_VALUE_LABEL,
    Categories,
    category_names,
    distinct_colors,
    nearest_names,
    resolve_color,
    stored_colors,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stofm.pl._slices import Panel
    from stofm.pl._style import Values

PanelKind = Literal["map", "truth", "confidence", "confusion", "reliability"]
_MAPS: Final = ("map", "truth", "confidence")

_UNKNOWN_COLOR: Final = "#bdbdbd"
#: What is appended to the annotation's key.
_CONFIDENCE: Final = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA: Final = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)


def annotation(
    adata: AnnData,
    *,
    truth_key: str | None = None,
    key: str = Obs.ANNOTATION,
    panels: Sequence[PanelKind] | None = None,
    counts: bool = False,
    n_bins: int = 10,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    size: float | None = None,
    ncols: int = 4,
    invert_y: bool = True,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: str | Path | None = None,
) -> Axes | list[Axes]:
    """Draw an annotation as a map, with its confusion matrix and reliability where truth is known.

    Classes have the colours of `truth_key`'s categories, or those in ``uns[f"{key}_colors"]``,
    where they are kept; "unknown" is grey.

    Scores and the reliability curve are over cells whose true class is one of the annotation's.
    In the scores, "unknown" is wrong for them. The curve asks of the likeliest class of each,
    also where it was then rejected as "unknown".

    Parameters
    ----------
    adata
        AnnData with an annotation, such as of :func:`stofm.tl.annotate`, or SpatialData.
    truth_key
        Column of ``obs`` with the true classes; cells without one are left out of the scores.
    key
        Column of ``obs`` with the annotation. Its confidence is read from
        ``obs[f"{key}_confidence"]`` and its classes from ``obsm[f"{key}_proba"]``, where they
        are there.
    panels
        What to draw: ``"map"``, ``"truth"`` and ``"confidence"`` (maps, a panel per slice),
        ``"confusion"``, ``"reliability"``; maps stand first. None: the map with the confusion matrix
        and reliability if there is truth, else with the confidence.
    counts
        Write numbers of cells into the confusion matrix instead of percent of the true class.
    n_bins
        Bins of the reliability curve, of equally many cells.
    library_key
        Column of ``obs`` that separates slices. None: the one that the sub-slices were made
        with, if any.
    spatial_key
        Entry of ``obsm`` with the coordinates.
    size
        Area of a cell's point in square points. None: fitted to the distance between cells.
    ncols
        Slices side by side.
    invert_y
        Let y grow downwards, as in images.
    table_key
        Table of a SpatialData.
    ax
        Axes to draw into, panel by panel, one for each slice in maps. None: a new figure.
    show
        Show the figure. None: where scanpy would, except with a backend that only writes files.
    save
        File to write (150 dpi, points as pixels in vector formats).

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Raises
    ------
    KeyError
        The annotation, the truth, the confidence or a slice's column is missing.
    ValueError
        A panel needs `truth_key`, no cell has a true class that the annotation knows, or `ax`
        does not fit the number of panels.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> adata.obs["stofm_annotation"] = adata.obs["cell_type"]
    >>> axes = st.pl.annotation(adata, truth_key="cell_type", show=False)
    >>> axes[1].get_title()
    'accuracy 1.000, macro-F1 1.000'
    """
    adata = resolve_table(adata, table_key)
    _require_column(adata, key, "st.tl.annotate(adata, head=head) writes it")
    if truth_key is not None:
        _require_column(adata, truth_key, "pass the column with the true classes as truth_key")
    kinds = _choose_panels(adata, key, truth_key, panels)
    slices = read_panels(adata, spatial_key, library_key)
    colors = _resolve_colors(adata, key, truth_key, kinds)
    scored = None if truth_key is None else _score(adata, key, truth_key)
    curve = _curve(adata, key, scored, n_bins) if "reliability" in kinds else None
    n_axes = [len(slices) if kind in _MAPS else 1 for kind in kinds]
    axes, is_new = make_axes(ax, sum(n_axes), what=f"{list(kinds)}, {len(slices)} slices")
    ends = np.cumsum(n_axes)
    blocks = [axes[end - n : end] for end, n in zip(ends, n_axes, strict=True)]
    maps: list[list[Slot]] = []
    others: list[Slot] = []
    for kind, block in zip(kinds, blocks, strict=True):
        if kind in _MAPS:
            maps += _frame_maps(block, slices, colors[kind], ncols=ncols, invert_y=invert_y)
        elif kind == "confusion" and scored is not None:
            others.append(scored.draw_confusion(block[0], as_counts=counts))
        elif curve is not None:
            others.append(draw_reliability(block[0], curve))
    if is_new:
        arrange(_rows(maps, others, is_single=len(slices) == 1))
    for kind, block in zip(kinds, blocks, strict=True):
        for panel_ax, panel in zip(block, slices if kind in _MAPS else [], strict=False):
            fill_map(panel_ax, panel, colors[kind], size)
    return finish(axes, show=show, save=save)


@dataclass(frozen=True)
class _Scored:
    """Cells with a true class.

    Attributes
    ----------
    cells
        (n,) their rows.
    true, found
        (n,) true class and annotation.
    known
        Classes that the annotation may give.
    """

    cells: NDArray[np.int64]
    true: NDArray[np.object_]
    found: NDArray[np.object_]
    known: tuple[str, ...]

    @property
    def is_known(self) -> NDArray[np.bool_]:
        return np.isin(self.true, self.known)

    def draw_confusion(self, ax: Axes, *, as_counts: bool) -> Slot:
        true, found = self.true[self.is_known], self.found[self.is_known]
        title = (
            f"accuracy {metrics.accuracy(true, found):.3f}, "
            f"macro-F1 {metrics.macro_f1(true, found):.3f}"
        )
        # Known classes first, in one order on both sides, so that what is right is the diagonal.
        rows = _in_order(self.known, self.true)
        columns = _in_order(self.known, self.found, self.true[self.is_known])
        counts = count_pairs(self.true, self.found, rows, columns)
        return draw_confusion(ax, counts, rows, columns, as_counts=as_counts, title=title)


def _in_order(known: tuple[str, ...], *used: NDArray[np.object_]) -> list[str]:
    """Classes that are used: known ones in their order, then others as they come by name."""
    present = set(np.concatenate(used))
    return [name for name in known if name in present] + sorted(present.difference(known))


def _require_column(adata: AnnData, key: str, advice: str) -> None:
    if key not in adata.obs:
        msg = f"There is no obs[{key!r}]: {advice}.{nearest_names(key, adata.obs.columns)}"
        raise KeyError(msg)


def _choose_panels(
    adata: AnnData, key: str, truth_key: str | None, panels: Sequence[PanelKind] | None
) -> tuple[PanelKind, ...]:
    has_confidence = key + _CONFIDENCE in adata.obs
    if panels is None:
        kinds: list[PanelKind] = ["map"] if truth_key is None else ["map", "confusion"]
        if has_confidence:
            kinds.append("confidence" if truth_key is None else "reliability")
        return tuple(kinds)
    kinds = list(panels)
    if not kinds or set(kinds) - set(get_args(PanelKind)) or len(set(kinds)) < len(kinds):
        msg = f"panels must be some of {list(get_args(PanelKind))}, each once, found {kinds}."
        raise ValueError(msg)
    needing = [kind for kind in kinds if kind in ("truth", "confusion", "reliability")]
    if needing and truth_key is None:
        msg = f"The panels {needing} compare with the truth: pass truth_key."
        raise ValueError(msg)
    if not has_confidence and {"confidence", "reliability"} & set(kinds):
        msg = f"There is no obs[{key + _CONFIDENCE!r}]; st.tl.annotate(adata, head=head) writes it."
        raise KeyError(msg)
    return tuple(kinds)


def _resolve_colors(
    adata: AnnData, key: str, truth_key: str | None, kinds: Iterable[PanelKind]
) -> dict[str, Categories | Values]:
    """Colours of the maps that are asked for."""
    names = tuple(category_names(adata.obs[key]).cat.categories)
    stored = stored_colors(adata, key, len(names))
    shades = {} if stored is None else dict(zip(names, stored, strict=True))
    truth = None if truth_key is None else resolve_color(adata, truth_key)
    if isinstance(truth, Categories):
        shades |= dict(zip(truth.names, truth.colors, strict=True))
    missing = [name for name in names if name not in shades]
    free = [c for c in distinct_colors(len(names) + len(shades)) if c not in shades.values()]
    shades |= dict(zip(missing, free, strict=False))
    shades[Label.UNKNOWN] = _UNKNOWN_COLOR
    colors: dict[str, Categories | Values] = {"map": resolve_color(adata, key, palette=shades)}
    if truth is not None:
        colors["truth"] = truth
    if "confidence" in kinds:
        colors["confidence"] = resolve_color(adata, key + _CONFIDENCE, vmin=0.0, vmax=1.0)
    return colors


def _score(adata: AnnData, key: str, truth_key: str) -> _Scored:
    truth = category_names(adata.obs[truth_key])
    found = category_names(adata.obs[key])
    proba = key + _PROBA
    columns = frame_names(adata, proba) if proba in adata.obsm else found.cat.categories
    known = tuple(str(name) for name in columns if name != Label.UNKNOWN)
    cells = np.flatnonzero(truth.notna())
    scored = _Scored(
        cells=cells,
        true=truth.iloc[cells].to_numpy(dtype=object),
        found=found.astype(object).fillna(NO_VALUE_LABEL).iloc[cells].to_numpy(dtype=object),
        known=known,
    )
    if not scored.is_known.any():
        msg = (
            f"No cell's true class in obs[{truth_key!r}] is one of the annotation's: found "
            f"{list(truth.cat.categories)[:5]}, the annotation has {list(known)[:5]}. Pass the "
            "column that the head was fitted to as truth_key."
        )
        raise ValueError(msg)
    return scored


def _curve(adata: AnnData, key: str, scored: _Scored | None, n_bins: int) -> Reliability:
    assert scored is not None
    if n_bins < 1:
        msg = f"n_bins must be at least 1, found {n_bins}."
        raise ValueError(msg)
    cells = scored.cells[scored.is_known]
    found = scored.found[scored.is_known]
    proba: Any = adata.obsm.get(key + _PROBA)
    if proba is not None:
        names = np.array(frame_names(adata, key + _PROBA), dtype=object)
        found = names[np.asarray(proba)[cells].argmax(axis=1)]
    confidence = adata.obs[key + _CONFIDENCE].to_numpy(dtype=np.float64)[cells]
    return Reliability.of(confidence, found == scored.true[scored.is_known], n_bins)


def _frame_maps(
    axes: list[Axes],
    slices: list[Panel],
    color: Categories | Values,
    *,
    ncols: int,
    invert_y: bool,
) -> list[list[Slot]]:
    """Frame a map's panels and give them their key; return rows of the places they need."""
    layout = Layout.plan(slices, 1, ncols)
    is_single = len(slices) == 1
    for panel_ax, panel in zip(axes, slices, strict=True):
        title = color.key if is_single else panel.name
        frame_panel(panel_ax, panel, title=title, invert_y=invert_y)
    add_key(
        axes[layout.n_columns - 1],
        color,
        np.concatenate([panel.rows for panel in slices]),
        title="" if is_single else color.key,
        height=layout.block_height(len(slices)),
    )
    slots = [Slot(panel_ax, *layout.size.tolist()) for panel_ax in axes]
    return [slots[i : i + layout.n_columns] for i in range(0, len(slots), layout.n_columns)]


def _rows(maps: list[list[Slot]], others: list[Slot], *, is_single: bool) -> list[list[Slot]]:
    """Put all panels of a single slice side by side; of several, what is no map below."""
    if is_single:
        return [[*(slot for row in maps for slot in row), *others]]
    return [row for row in (*maps, others) if row]
