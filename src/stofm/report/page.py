"""The page: data of plots compressed into it, tables, and the library that draws, all in one file."""

from __future__ import annotations

import base64
import html
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_HERE: Final = Path(__file__).parent
#: Square pixels that all points of a plot share, and the smallest and largest point.
_AREA: Final = 90_000.0
_MIN_SIZE, _MAX_SIZE = 2.5, 12.0
_LEVELS: Final = 255


@dataclass(frozen=True)
class Column:
    """What cells can be coloured by: categories with colours, or values between two ends."""

    name: str
    label: str
    #: (n,) codes of categories, -1 for none, or numbers.
    values: NDArray[Any]
    names: Sequence[str] = ()
    colors: Sequence[str] = ()
    low: float = 0.0
    high: float = 1.0
    #: Whether it is said of the cell under the pointer.
    is_said: bool = True


@dataclass(frozen=True)
class Table:
    """A table below the plots; a cell that starts with "genes:" names genes to click on."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | float]]
    note: str = ""


@dataclass(frozen=True)
class Page:
    """All that a page shows of n cells.

    `genes` are log-normalised, (n,) each. `image` is a data address with left, top, width and height
    in the unit of `xy`, (n, 2), and `microns` are those of a unit.
    """

    title: str
    subtitle: str
    what: str
    names: Sequence[str]
    xy: NDArray[np.float64]
    columns: Sequence[Column]
    genes: Mapping[str, NDArray[np.float32]]
    colorscale: Sequence[tuple[float, str]]
    none_color: str
    unit: str
    umap: NDArray[np.floating] | None = None
    tables: Sequence[Table] = ()
    image: tuple[str, float, float, float, float] | None = None
    bar: tuple[float, str] | None = None


def write_page(page: Page, plotly: str) -> str:
    """Make the HTML of a page; `plotly` is the text of plotly.js."""
    data = {
        "what": page.what,
        "names": _packed(
            "text", "\n".join(name.replace("\n", " ") for name in page.names).encode()
        ),
        "x": _floats(page.xy[:, 0]),
        "y": _floats(page.xy[:, 1]),
        "size": _size(len(page.xy)),
        "layout": _layout(page),
        "umap": None,
        "columns": [_column(one, page.unit) for one in page.columns],
        "genes": [_gene(name, values, page.unit) for name, values in page.genes.items()],
        "colorscale": list(page.colorscale),
        "none": page.none_color,
    }
    if page.umap is not None:
        x, y = page.umap.T
        data["umap"] = {"x": _floats(x), "y": _floats(y), "size": 0.8 * _size(len(x))}
    # Nothing in the data may end the element that holds it.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("</", "<\\/")
    return Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(page.title),
        subtitle=html.escape(page.subtitle),
        tables="\n".join(map(_table, page.tables)),
        plotly=plotly.replace("</script", "<\\/script"),
        data=text,
        script=(_HERE / "page.js").read_text(encoding="utf-8"),
    )


def _size(n: int) -> float:
    return round(float(np.clip(np.sqrt(_AREA / max(n, 1)), _MIN_SIZE, _MAX_SIZE)), 2)


def _packed(kind: str, values: bytes) -> dict[str, str]:
    return {"kind": kind, "bytes": base64.b64encode(zlib.compress(values, 6)).decode()}


def _floats(values: NDArray[Any]) -> dict[str, str]:
    return _packed("f4", np.asarray(values, dtype="<f4").tobytes())


def _column(column: Column, unit: str) -> dict[str, Any]:
    said = {"name": column.name, "label": column.label, "said": column.is_said}
    if not column.names:
        ends = {"kind": "value", "low": column.low, "high": column.high}
        return {**said, **ends, "values": _floats(column.values)}
    # Cells without a category have the code behind the last one.
    codes = np.where(column.values < 0, len(column.names), column.values)
    small = len(column.names) < np.iinfo(np.uint8).max
    values = _packed("u1" if small else "u2", codes.astype("u1" if small else "<u2").tobytes())
    parts = {"names": list(column.names), "colors": list(column.colors), "values": values}
    return {**said, "kind": "category", **parts}


def _gene(name: str, values: NDArray[np.float32], unit: str) -> dict[str, Any]:
    """A gene in 255 steps, which the eye can't tell from all values."""
    high = float(values.max(initial=0.0)) or 1.0
    steps = np.rint(values / high * _LEVELS).astype(np.uint8)
    found = values[values > 0]
    shown = float(np.percentile(found, 99)) if len(found) else high
    return {
        "kind": "value", "name": name, "label": name, "unit": unit, "low": 0.0, "high": shown,
        "scale": high / _LEVELS, "values": _packed("u1", steps.tobytes()),
    }  # fmt: skip


def _layout(page: Page) -> dict[str, Any]:
    low, high = page.xy.min(axis=0), page.xy.max(axis=0)
    margin = 0.03 * float((high - low).max()) or 1.0
    (left, bottom), (right, top) = low - margin, high + margin
    layout: dict[str, Any] = {"xaxis": {"range": [left, right]}, "yaxis": {"range": [top, bottom]}}
    if page.image is not None:
        source, x, y, width, height = page.image
        layout["images"] = [
            {
                "source": source, "xref": "x", "yref": "y", "x": x, "y": y, "sizex": width,
                "sizey": height, "sizing": "stretch", "layer": "below",
                "yanchor": "top",
            }
        ]  # fmt: skip
    if page.bar is not None:
        length, text = page.bar
        line = {"color": "#111", "width": 3}
        ends = {"x0": left + margin, "x1": left + margin + length, "y0": top, "y1": top}
        layout["shapes"] = [{"type": "line", "line": line, **ends}]
        note = {"x": left + margin, "y": top, "text": text, "showarrow": False}
        layout["annotations"] = [{**note, "xanchor": "left", "yanchor": "bottom"}]
    return layout


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f'<p class="quiet">{html.escape(table.note)}</p>' if table.note else ""
    title = html.escape(table.title)
    return f"<section><h2>{title}</h2>{note}<table><tr>{head}</tr>{body}</table></section>"


def _cell(value: str | float) -> str:
    if not isinstance(value, str):
        return f'<td class="n">{value:g}</td>'
    genes = value.removeprefix("genes:").split(" ") if value.startswith("genes:") else []
    if genes:
        parts = (f'<span data-gene="{html.escape(one)}">{html.escape(one)}</span>' for one in genes)
        return f'<td class="wide">{" ".join(parts)}</td>'
    wide = ' class="wide"' if len(value) > 60 else ""
    return f"<td{wide}>{html.escape(value)}</td>"
