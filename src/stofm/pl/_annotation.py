"""``stofm.pl.annotation``: an annotation in the plane, and how far it can be trusted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.colors import UNKNOWN_COLOR, fill_colors, read_colors
from stofm._edge.observations import cell_digests, observed
from stofm._edge.tables import frame_names, read_record, resolve_table
from stofm._keys import Label, Obs, Obsm
from stofm._messages import require_name
from stofm.metrics.labels import Reliability
from stofm.pl._colors import (
    NO_VALUE_COLOR,
    NO_VALUE_LABEL,
    Categories,
    Values,
    category_names,
    resolve_colors,
)
from stofm.pl._maps import Look, draw_maps
from stofm.pl._style import FONT_SIZE, TITLE_SIZE, style_axes
from stofm.pl._tissue import AUTO, Around, open_tissue

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from anndata import AnnData
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from stofm.pl._maps import LegendLoc
    from stofm.pl._style import Save

PanelKind = Literal["map", "truth", "confidence", "confusion", "reliability"]
_MAPS: Final = ("map", "truth", "confidence")

#: What is appended to the annotation's key.
_CONFIDENCE: Final = Obs.ANNOTATION_CONFIDENCE.removeprefix(Obs.ANNOTATION)
_PROBA: Final = Obsm.ANNOTATION_PROBA.removeprefix(Obs.ANNOTATION)
#: Sides of a confusion matrix, of its fields, and of a reliability curve, in inches.
_MIN_INCHES, _MAX_INCHES, _CLASS_INCHES, _CURVE_INCHES = 2.2, 5.0, 0.28, 2.6
#: Fields are numbered up to so many classes, from this share of a row on.
_MAX_NUMBERED, _MIN_SHARE, _DARK = 30, 0.005, 0.55
#: Bins of a reliability curve, of equally many cells.
_BINS: Final = 10
_GRID_COLOR, _CURVE_COLOR, _DIAGONAL_COLOR = "#e4e8ec", "#3b4754", "#9aa7b5"


def annotation(
    adata: AnnData,
    *,
    truth_key: str | None = None,
    key: str = Obs.ANNOTATION,
    panels: Sequence[PanelKind] | None = None,
    library_key: str | None = None,
    library_id: str | Sequence[str] | None = None,
    spatial_key: str = Obsm.SPATIAL,
    img_key: str | None = AUTO,
    alpha_img: float = 1.0,
    crop_coord: Sequence[float] | None = None,
    groups: str | Sequence[str] | None = None,
    na_color: str = NO_VALUE_COLOR,
    alpha: float | None = None,
    size: float | None = None,
    title: str | Sequence[str] | None = None,
    legend_loc: LegendLoc | None = "right margin",
    ncols: int = 4,
    microns_per_unit: float | None = None,
    table_key: str | None = None,
    ax: Axes | Sequence[Axes] | None = None,
    show: bool | None = None,
    save: Save = None,
) -> Axes | list[Axes]:
    """Draw an annotation as a map, with its confusion matrix and reliability where truth is known.

    Classes have the colours of `truth_key`'s categories, or those in ``uns[f"{key}_colors"]``,
    where they are kept; "unknown" is grey. Titles say how many of the cells the head was fitted to:
    scores on those are no test.

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
        Column of ``obs`` with the annotation. Its confidence is taken from
        ``obs[f"{key}_confidence"]`` and its classes from ``obsm[f"{key}_proba"]``, if they
        exist.
    panels
        What to draw: ``"map"``, ``"truth"`` and ``"confidence"`` (maps, a panel per slice),
        ``"confusion"``, ``"reliability"``; maps come first. None: the map with the confusion matrix
        and reliability if there is truth, else with the confidence.
    ax
        Axes to draw into, panel by panel, one for each slice in maps, maps first. None: a new figure.
    title
        Titles of the maps. None: names of the slices, or of what is drawn.

    Returns
    -------
    The Axes, or the list of them if there are several panels.

    Other Parameters
    ----------------
    library_key, library_id, spatial_key, img_key, alpha_img, crop_coord, groups, na_color, alpha, size
        As in :func:`stofm.pl.spatial`; scores are over all cells.
    legend_loc, ncols, microns_per_unit, table_key, show, save
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    KeyError
        The annotation, the truth, the confidence or a slice's column is missing.
    ValueError
        A panel needs `truth_key`, no cell has a true class that the annotation knows, or `ax`
        does not fit the number of panels.

    See Also
    --------
    stofm.tl.annotate : makes an annotation.
    stofm.pl.domains : regions found without labels.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 40)
    >>> adata.obs["stofm_annotation"] = adata.obs["cell_type"]
    >>> axes = st.pl.annotation(adata, truth_key="cell_type", show=False)
    >>> axes[1].get_title()
    'accuracy 1.000, macro-F1 1.000'
    """
    data, adata = adata, resolve_table(adata, table_key)
    text = f"There is no obs[{key!r}]: st.tl.annotate(adata, head=head) writes it."
    require_name(key, adata.obs, text)
    if truth_key is not None:
        text = f"There is no obs[{truth_key!r}]: pass the column with the true classes."
        require_name(truth_key, adata.obs, text)
    kinds = _choose_panels(adata, key, truth_key, panels)
    colors = _resolve_colors(adata, key, truth_key, groups, na_color)
    cells, known = (pd.DataFrame(), []) if truth_key is None else _read_cells(adata, key, truth_key)
    what, fitted = observed(adata), _fitted_to(adata, key, spatial_key)
    drawn: dict[str, Callable[[Axes], tuple[float, float]]] = {
        "confusion": lambda ax: _draw_confusion(ax, cells, known, what, fitted),
        "reliability": lambda ax: _draw_reliability(ax, _curve(adata, key, cells), what),
    }
    maps = [colors[kind] for kind in kinds if kind in _MAPS]
    others = [drawn[kind] for kind in kinds if kind not in _MAPS]
    around = Around(img_key, alpha_img, library_id, crop_coord, microns_per_unit)
    with open_tissue(data, table_key, spatial_key, library_key, around) as (slices, tissue):
        look = Look(ax, ncols, size, show, save, "annotation", tissue, title, legend_loc, alpha)
        titles = [[one.name for one in slices]] * len(maps)
        if len(slices) == 1:
            titles = [[f"{one.key}\n{fitted}" if one.key == key else one.key] for one in maps]
            titles = [[text.rstrip() for text in row] for row in titles]
        return draw_maps(
            slices, maps, look, titles=titles, others=others, what=f"panels of {kinds}"
        )


def _fitted_to(adata: AnnData, key: str, spatial_key: str) -> str:
    """How many of the cells the head was fitted to, in words; empty if none."""
    params = (read_record(adata, key) or {}).get("params", {})
    trained = np.asarray(params.get(Label.FITTED, ()), dtype=np.int64)
    n_fitted = int(np.isin(cell_digests(adata, spatial_key), trained).sum())
    if not n_fitted:
        return ""
    how_many = "all" if n_fitted == adata.n_obs else f"{n_fitted:,} of {adata.n_obs:,}"
    return f"head fitted to {how_many} {observed(adata)}"


def _choose_panels(
    adata: AnnData, key: str, truth_key: str | None, panels: Sequence[PanelKind] | None
) -> list[PanelKind]:
    has_confidence = key + _CONFIDENCE in adata.obs
    if panels is None:
        chosen: list[PanelKind] = ["map"] if truth_key is None else ["map", "confusion"]
        last: PanelKind = "confidence" if truth_key is None else "reliability"
        return [*chosen, last] if has_confidence else chosen
    kinds = list(panels)
    if not kinds or set(kinds) - set(get_args(PanelKind)) or len(set(kinds)) < len(kinds):
        raise ValueError(
            f"panels must be some of {list(get_args(PanelKind))}, each once, found {kinds}."
        )
    needing = [kind for kind in kinds if kind not in ("map", "confidence")]
    if needing and truth_key is None:
        raise ValueError(f"The panels {needing} compare with the truth: pass truth_key.")
    if not has_confidence and {"confidence", "reliability"} & set(kinds):
        raise KeyError(
            f"There is no obs[{key + _CONFIDENCE!r}]; st.tl.annotate(adata, head=head) writes it."
        )
    return kinds


def _resolve_colors(
    adata: AnnData,
    key: str,
    truth_key: str | None,
    groups: str | Sequence[str] | None,
    na_color: str,
) -> dict[str, Categories | Values]:
    """Colours of the maps; classes have those of the truth, then stored ones, then free ones."""
    names = tuple(category_names(adata.obs[key]).cat.categories)
    shades = read_colors(adata, key)
    look: dict[str, Any] = {"groups": groups, "na_color": na_color}
    colors: dict[str, Categories | Values] = {}
    if truth_key is not None:
        (truth,) = resolve_colors(adata, truth_key, na_color=na_color)
        colors["truth"] = truth
        if isinstance(truth, Categories):
            shades |= dict(zip(truth.names, truth.colors, strict=True))
            in_both = [one for one in np.atleast_1d(groups or []) if one in truth.names]
            colors["truth"] = truth.only(in_both or None)
    shades[Label.UNKNOWN] = UNKNOWN_COLOR
    palette = dict(zip(names, fill_colors(names, shades), strict=True))
    (colors["map"],) = resolve_colors(adata, key, palette=palette, **look)
    if key + _CONFIDENCE in adata.obs:
        (colors["confidence"],) = resolve_colors(adata, key + _CONFIDENCE, vmin=0.0, vmax=1.0)
    return colors


def _read_cells(adata: AnnData, key: str, truth_key: str) -> tuple[pd.DataFrame, list[str]]:
    """True class and annotation of cells with a true one, and the annotation's classes."""
    truth, found = category_names(adata.obs[truth_key]), category_names(adata.obs[key])
    proba = key + _PROBA
    classes = frame_names(adata, proba) if proba in adata.obsm else found.cat.categories
    known = [name for name in classes if name != Label.UNKNOWN]
    found = found.astype(object).fillna(NO_VALUE_LABEL)
    cells = pd.DataFrame({"true": truth.to_numpy(object), "found": found.to_numpy(object)})
    cells = cells[cells["true"].notna()].assign(is_known=lambda table: table["true"].isin(known))
    if not cells["is_known"].any():
        raise ValueError(
            f"No cell's true class in obs[{truth_key!r}] is one of the annotation's: found "
            f"{list(truth.cat.categories)[:5]}, the annotation has {known[:5]}. Pass the "
            "column that the head was fitted to as truth_key."
        )
    return cells, known


def _curve(adata: AnnData, key: str, cells: pd.DataFrame) -> Reliability:
    """Accuracy of the likeliest class, also where it was then rejected as unknown."""
    cells = cells[cells["is_known"]]
    found: NDArray[np.object_] = cells["found"].to_numpy()
    if key + _PROBA in adata.obsm:
        names = np.array(frame_names(adata, key + _PROBA), dtype=object)
        found = names[np.asarray(adata.obsm[key + _PROBA])[cells.index].argmax(axis=1)]
    confidence = adata.obs[key + _CONFIDENCE].to_numpy(dtype=np.float64)[cells.index]
    return Reliability.of(confidence, found == cells["true"].to_numpy(), _BINS)


def _draw_confusion(
    ax: Axes, cells: pd.DataFrame, known: list[str], what: str, fitted: str
) -> tuple[float, float]:
    """Draw the matrix, each row shaded by its shares; return its size in inches."""
    scored = cells[cells["is_known"]]
    # Known classes first, in one order on both sides, so that what is right is the diagonal.
    rows = _in_order(known, cells["true"])
    columns = _in_order(known, pd.concat([cells["found"], scored["true"]]))
    table = pd.crosstab(cells["true"], cells["found"])
    counts = table.reindex(index=rows, columns=columns, fill_value=0).to_numpy()
    totals = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(totals, 1)
    ax.pcolormesh(shares, cmap="Blues", vmin=0.0, vmax=1.0, edgecolors=_GRID_COLOR, linewidth=0.5)
    ax.invert_yaxis()
    field = float(np.clip(_CLASS_INCHES * max(counts.shape), _MIN_INCHES, _MAX_INCHES))
    field /= max(counts.shape)
    size = float(np.clip(field * 26, 4.5, FONT_SIZE))
    named = [f"{name} ({total:,})" for name, total in zip(rows, totals[:, 0], strict=True)]
    ax.set_xticks(np.arange(len(columns)) + 0.5, columns, rotation=90, fontsize=size)
    ax.set_yticks(np.arange(len(rows)) + 0.5, named, fontsize=size)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("annotation", fontsize=FONT_SIZE)
    ax.set_ylabel(f"truth ({what})", fontsize=FONT_SIZE)
    pair = scored["true"], scored["found"]
    scores = f"accuracy {metrics.accuracy(*pair):.3f}, macro-F1 {metrics.macro_f1(*pair):.3f}"
    ax.set_title(f"{scores}\n{fitted}".rstrip(), fontsize=TITLE_SIZE, pad=4.0)
    if max(counts.shape) <= _MAX_NUMBERED:
        for row, column in np.argwhere(shares >= _MIN_SHARE):
            share = shares[row, column]
            text = f"{np.rint(100 * share):.0f}"
            font: dict[str, Any] = {"size": size - 1.0, "ha": "center", "va": "center"}
            shade = "white" if share > _DARK else "black"
            ax.text(column + 0.5, row + 0.5, text, color=shade, **font)
    return field * len(columns), field * len(rows)


def _in_order(known: list[str], used: pd.Series) -> list[str]:
    """Classes that are used: known ones in their order, then others as they come by name."""
    present = set(used)
    return [name for name in known if name in present] + sorted(present.difference(known))


def _draw_reliability(ax: Axes, curve: Reliability, what: str) -> tuple[float, float]:
    ax.plot([0, 1], [0, 1], "--", lw=0.8, color=_DIAGONAL_COLOR, zorder=1)
    ax.errorbar(
        curve.confidence, curve.accuracy, yerr=curve.spread, fmt="o-", ms=3.5, lw=1.2,
        elinewidth=0.8, color=_CURVE_COLOR, zorder=2,
    )  # fmt: skip
    ticks = np.linspace(0.0, 1.0, 6)
    ax.set(xlim=(0.0, 1.0), ylim=(0.0, 1.02), xticks=ticks, yticks=ticks)
    title = f"expected calibration error {curve.error:.3f}"
    style_axes(ax, title=title, x="confidence", y=f"share of {what} that are right")
    return _CURVE_INCHES, _CURVE_INCHES
