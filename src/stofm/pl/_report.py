"""``stofm.pl.report``: a page of HTML about a slice, with linked plots."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, Any, Final

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_hex
from scipy import sparse

from stofm._edge.counts import NotRawCountsError
from stofm._edge.expression import log_normalised_table, rank_markers
from stofm._edge.observations import observed
from stofm._edge.tables import read_record, resolve_table
from stofm._files import local
from stofm._keys import Obs, Obsm, Uns
from stofm._logging import logger
from stofm._messages import require_name
from stofm._settings import keeping_threads
from stofm.pl._colors import NO_VALUE_COLOR, NO_VALUE_LABEL, NORMALISED, Categories, resolve_colors
from stofm.pl._maps import round_below
from stofm.pl._tissue import AUTO, Around, open_tissue
from stofm.report.page import Column, Page, Table, write_page

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.images import SliceImage
    from stofm.pl._maps import Panel

#: Genes in a page unless others are asked for, and markers of each domain or type.
_MOST_GENES: Final = 1000
_N_MARKERS: Final = 10
#: Cells that markers are found from.
_MOST_CELLS: Final = 20_000
#: Columns of ``obs`` with more categories are not offered.
_MOST_CATEGORIES: Final = 60
#: Parts of a composition that are listed.
_MOST_PARTS: Final = 8
_PIXELS: Final = 1400
_STEPS: Final = 17


def report(
    adata: AnnData,
    save: str | Path = "report.html",
    *,
    color: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
    library_key: str | None = None,
    library_id: str | Sequence[str] | None = None,
    spatial_key: str = Obsm.SPATIAL,
    img_key: str | None = AUTO,
    microns_per_unit: float | None = None,
    table_key: str | None = None,
) -> list[Path]:
    """Write a page of HTML about each slice, which any browser opens without a network.

    It shows the tissue, over its image if there is one, beside the UMAP: pan, zoom, point at a cell
    to see it in both, click on one or on a name to see all of its kind, colour by any column or
    gene. Below are what domains are composed of, marker genes, and how everything was made. A UMAP
    that is not there is computed from ``obsm["X_stofm"]`` for the page alone.

    Parameters
    ----------
    adata
        AnnData with domains, an annotation or other columns, or SpatialData.
    save
        File to write. Of several slices each gets its own: ``report_NAME.html``.
    color
        What cells can be coloured by, as in :func:`stofm.pl.spatial`. None: what stofm has written,
        and columns of ``obs`` with 2 to 60 categories.
    genes
        Genes that can be searched for. None: up to 1,000, markers first, then the most variable ones.

    Returns
    -------
    The files.

    Other Parameters
    ----------------
    library_key, library_id, spatial_key, img_key, microns_per_unit, table_key
        As in :func:`stofm.pl.spatial`.

    Raises
    ------
    ImportError
        plotly is missing: it comes with ``stofm[report]``.
    KeyError
        A column, a gene or a slice is missing.
    FileNotFoundError
        There is no such folder.

    See Also
    --------
    stofm.pl.spatial : the map as a figure.
    stofm.tl.describe : regions in words and tables.

    Notes
    -----
    Markers are the ten genes with the highest t-statistic against the other cells
    (:func:`scanpy.tl.rank_genes_groups`), on log-normalised counts of at most 20,000 cells.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60)
    >>> st.tl.domains(adata, n_domains=4)
    >>> st.pl.report(adata, "slice.html")[0].name
    'slice.html'
    """
    plotly = _plotly()
    file = local(save)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {file.parent} for save={str(save)!r}.")
    table = resolve_table(adata, table_key)
    around = Around(img_key, library_id=library_id, microns_per_unit=microns_per_unit)
    written = []
    with open_tissue(adata, table_key, spatial_key, library_key, around) as (panels, tissue):
        for panel in panels:
            image = tissue.images.get(panel.name)
            bar = _bar(panel, tissue.microns.get(panel.name))
            page = _page(table, panel, color, genes, image, bar)
            own = file if len(panels) == 1 else file.with_stem(f"{file.stem}_{panel.name}")
            own.write_text(write_page(page, plotly), encoding="utf-8")
            logger.info("%s: %.1f MB, %d genes.", own, own.stat().st_size / 1e6, len(page.genes))
            written.append(own)
    return written


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError(
            "A report needs plotly: pip install 'stofm[report]' (or plotly itself)."
        ) from error
    return str(get_plotlyjs())


def _page(
    adata: AnnData,
    panel: Panel,
    color: Sequence[str] | None,
    genes: Sequence[str] | None,
    image: SliceImage | None,
    bar: tuple[float, str] | None,
) -> Page:
    keys = _offered(adata) if color is None else [color] if isinstance(color, str) else list(color)
    columns = [_column(one, panel) for one in resolve_colors(adata, keys, vmin="p1", vmax="p99")]
    groups = [one for one in columns if one.names][:2]
    own = adata if len(panel.rows) == adata.n_obs else adata[panel.rows]
    expression, unit = _expression(own)
    markers = {one.label: _markers(one, expression) for one in groups}
    listed = [gene for found in markers.values() for names in found.values() for gene in names]
    chosen = _chosen_genes(expression, listed, genes)
    what = observed(adata)
    source = read_record(adata, Uns.SOURCE) or {}
    parts = (source.get(name) for name in ("technology", "organism", "tissue"))
    about = ", ".join(str(part) for part in parts if part)
    counted = f"{len(panel.rows):,} {what}, {adata.n_vars:,} genes"
    steps = np.linspace(0.0, 1.0, _STEPS)
    tables = _composition(columns, what)
    for label, found in markers.items():
        rows = [(name, "genes:" + " ".join(names)) for name, names in found.items()]
        note = "Genes that set the cells of a group apart from all others; click on one to colour by it."
        tables += (
            [Table(f"Marker genes by {label}", ("group", "genes"), rows, note)] if rows else []
        )
    return Page(
        title=panel.name or str(source.get("tissue", "")).split(",")[0] or "Slice",
        subtitle=". ".join(filter(None, (about, counted))),
        what=what,
        names=own.obs_names.astype(str).tolist(),
        xy=panel.places,
        columns=columns,
        genes=chosen,
        colorscale=[(float(at), to_hex(mpl.colormaps["viridis"](at))) for at in steps],
        none_color=NO_VALUE_COLOR,
        unit=unit,
        umap=_umap(own),
        tables=[*tables, _made(adata)],
        image=None if image is None else _picture(image, panel),
        bar=bar,
    )


def _offered(adata: AnnData) -> list[str]:
    """Columns that a page offers, domains and types first."""
    own = [Obs.DOMAIN, Obs.ANNOTATION, Obs.ANNOTATION_CONFIDENCE]
    found = [key for key in own if key in adata.obs]
    for key in adata.obs.columns:
        column = adata.obs[key]
        is_number = pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
        is_hidden = key in (Obs.SUBSLICE, Obs.VIRTUAL_CELL, *found)
        if not is_hidden and not is_number and 2 <= column.nunique() <= _MOST_CATEGORIES:
            found.append(str(key))
    types = adata.obsm.get(Obsm.DECONVOLUTION)
    if isinstance(types, pd.DataFrame):
        found += [f"{Obsm.DECONVOLUTION}:{name}" for name in types.columns]
    return found


def _column(color: Any, panel: Panel) -> Column:
    label = color.key.removeprefix(f"{Obsm.DECONVOLUTION}:")
    label = label.removeprefix("stofm_").replace("_", " ")
    if isinstance(color, Categories):
        codes = color.codes[panel.rows]
        return Column(color.key, label, codes, color.names, [c[:7] for c in color.colors])
    said = not color.key.startswith(Obsm.DECONVOLUTION)
    low, high = float(color.vmin), float(color.vmax)
    return Column(color.key, label, color.values[panel.rows], low=low, high=high, is_said=said)


def _expression(adata: AnnData) -> tuple[AnnData, str]:
    """Log-normalised counts of the genes, or what else ``X`` holds."""
    try:
        return log_normalised_table(adata), NORMALISED
    except NotRawCountsError:
        return adata, ""


def _markers(column: Column, expression: AnnData) -> dict[str, list[str]]:
    """Genes of each category that has some, the strongest first."""
    rows = np.flatnonzero(column.values >= 0)
    if len(rows) > _MOST_CELLS:
        rows = np.sort(np.random.default_rng(0).choice(rows, _MOST_CELLS, replace=False))
    values, genes = sparse.csr_matrix(expression.X[rows]), expression.var_names.astype(str)
    found = rank_markers(values, genes, column.values[rows], len(column.names), _N_MARKERS)
    named = zip(column.names, found, strict=True)
    return {name: [row["gene"] for row in own] for name, own in named if own}


def _chosen_genes(
    expression: AnnData, markers: Sequence[str], genes: Sequence[str] | None
) -> dict[str, NDArray[np.float32]]:
    names = expression.var_names
    if genes is not None:
        for gene in genes:
            require_name(gene, names, f"{gene!r} is no gene of var_names.")
    X = expression.X
    if genes is None:
        mean = np.asarray(X.mean(axis=0)).ravel()
        squares = X.multiply(X) if hasattr(X, "multiply") else np.square(X)
        variance = np.asarray(squares.mean(axis=0)).ravel() - mean**2
        order = names[np.argsort(-variance, kind="stable")].astype(str)
        genes = [*dict.fromkeys([*markers, *order])][:_MOST_GENES]
    columns = names.get_indexer_for(list(genes))
    chosen = X[:, columns]
    dense = chosen.toarray() if hasattr(chosen, "toarray") else np.asarray(chosen)
    return {str(g): dense[:, k].astype(np.float32) for k, g in enumerate(genes)}


def _composition(columns: Sequence[Column], what: str) -> list[Table]:
    """What the first column's categories are made of by the second one's."""
    groups = [one for one in columns if one.names][:2]
    if not groups:
        return []
    first = groups[0]
    rows = np.bincount(first.values[first.values >= 0], minlength=len(first.names))
    used = np.flatnonzero(rows).tolist()
    if len(groups) == 1:
        table = [(first.names[k], float(rows[k]), f"{rows[k] / rows.sum():.1%}") for k in used]
        return [Table(f"Composition by {first.label}", (first.label, what, "share"), table)]
    second = groups[1]
    is_in = first.values >= 0
    codes = np.where(second.values < 0, len(second.names), second.values)
    counts = np.zeros((len(first.names), len(second.names) + 1))
    np.add.at(counts, (first.values[is_in], codes[is_in]), 1.0)
    names = [*second.names, NO_VALUE_LABEL]
    table = []
    for k in used:
        order = [j for j in np.argsort(-counts[k], kind="stable") if counts[k, j]]
        parts = [f"{names[j]} {counts[k, j] / rows[k]:.0%}" for j in order[:_MOST_PARTS]]
        more = [f"{len(order) - _MOST_PARTS} more"] * (len(order) > _MOST_PARTS)
        table.append((first.names[k], float(rows[k]), ", ".join([*parts, *more])))
    title = f"Composition of {first.label} by {second.label}"
    return [Table(title, (first.label, what, second.label), table)]


def _made(adata: AnnData) -> Table:
    """The records of what stofm wrote."""
    rows = []
    for key, record in adata.uns.get(Uns.STOFM, {}).items():
        params = {**record, **record.get("params", {})}
        named = [
            f"{name}={value}"
            for name, value in params.items()
            if isinstance(value, str | int | float | bool | np.generic) and value != ""
        ]
        rows.append((key, ", ".join(named)))
    note = "Parameters, models and versions of each step, as stored with the data."
    return Table("How it was made", ("entry", "parameters"), rows, note)


def _umap(adata: AnnData) -> NDArray[np.floating] | None:
    if "X_umap" in adata.obsm:
        return np.asarray(adata.obsm["X_umap"])[:, :2]
    if Obsm.X not in adata.obsm or adata.n_obs < 16:
        return None
    import scanpy as sc
    from anndata import AnnData

    logger.info("There is no obsm['X_umap']: a UMAP of obsm[%r] is computed.", Obsm.X)
    part = AnnData(np.asarray(adata.obsm[Obsm.X]))
    with keeping_threads():
        sc.pp.neighbors(part, use_rep="X")
        sc.tl.umap(part)
    return np.asarray(part.obsm["X_umap"])


def _picture(image: SliceImage, panel: Panel) -> tuple[str, float, float, float, float] | None:
    """The image behind a panel, where it is not turned against the coordinates."""
    scale = image.matrix[:, :2]
    if not (np.allclose(scale, np.diag(np.diag(scale))) and (np.diag(scale) > 0).all()):
        logger.info("The image is turned against the coordinates, and the page leaves it out.")
        return None
    corners = image.pixels_of(np.stack([panel.low, panel.high]))
    part, (left, right, bottom, top) = image.slide.overview(corners[0], corners[1], _PIXELS)
    low, high = (
        np.array([[left, min(bottom, top)], [right, max(bottom, top)]]) - image.matrix[:, 2]
    ) / np.diag(scale)
    buffer = io.BytesIO()
    plt.imsave(buffer, part, format="jpeg", pil_kwargs={"quality": 85})
    address = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    (left, bottom), (width, height) = low.tolist(), (high - low).tolist()
    return address, left, bottom, width, height


def _bar(panel: Panel, microns_per_unit: float | None) -> tuple[float, str] | None:
    if microns_per_unit is None:
        return None
    width = float(np.ptp(panel.places[:, 0])) or 1.0
    microns = round_below(0.2 * width * microns_per_unit)
    text = f"{microns / 1000:g} mm" if microns >= 1000 else f"{microns:g} µm"
    return microns / microns_per_unit, text
