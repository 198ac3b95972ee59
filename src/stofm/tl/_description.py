"""What :func:`stofm.tl.describe` returns: facts about regions, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_MOST_ROWS: Final = 12
#: Tables of a region: list of facts, and its columns with formats.
_TABLES: Final = {
    "Where": ("slices", "slice n_cells:, share:.1% n_pieces largest_piece:.0%"),
    "Composition": ("composition", "type share:.1% over_all:.2f"),
    "Neighbours": ("neighbors", "region share:.1% over_expected:.2f"),
    "Markers": (
        "markers",
        "gene log2_fold_change:.2f detected_inside:.0% detected_outside:.0%",
    ),
    "Gene sets": ("gene_sets", "set genes n_measured fdr:.2g"),
    "Spatially variable genes within": ("spatially_variable_genes", "gene morans_i:.2f"),
}


@dataclass(frozen=True)
class Description:
    """Facts about regions, from :func:`stofm.tl.describe`.

    ``print(description)`` shows the report, and a notebook renders it.

    Attributes
    ----------
    regions
        Of each region, by name: ``"n_cells"``, ``"share"``, ``"slices"``, ``"contiguity"``,
        ``"composition"``, ``"neighbors"``, ``"markers"``, ``"gene_sets"``,
        ``"spatially_variable_genes"`` and ``"agreement"``, in plain lists, dicts and numbers. What
        could not be computed is None or empty.
    about
        What was described, and how: ``"groupby"``, ``"label_key"``, numbers of cells, genes and
        slices, and ``"notes"`` on what the numbers mean.

    See Also
    --------
    stofm.tl.describe : makes it.
    stofm.pl.describe : draws a region.
    """

    regions: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]

    def __str__(self) -> str:
        """The report, as Markdown."""
        return self.to_markdown()

    def __repr__(self) -> str:
        """A line with the number of regions."""
        return f"Description({len(self.regions)} regions of obs[{self.about['groupby']!r}])"

    def _repr_markdown_(self) -> str:
        return self.to_markdown()

    def to_json(self) -> str:
        """All facts as JSON, with notes on what they mean, to keep or to paste into a prompt."""
        return json.dumps({"about": self.about, "regions": self.regions}, indent=1, allow_nan=False)

    def to_markdown(self) -> str:
        """The report: a heading and tables for each region."""
        about = self.about
        lines = [
            f"# Regions of `{about['groupby']}`",
            "",
            f"{about['n_cells']:,} cells, {about['n_genes']:,} genes, {about['n_slices']} "
            f"slice{'s' * (about['n_slices'] > 1)}, {len(self.regions)} regions.",
            "",
            *(f"- {note}" for note in about["notes"]),
        ]
        for name, region in self.regions.items():
            lines += ["", *_section(name, region)]
        return "\n".join(lines) + "\n"


def _section(name: str, region: Mapping[str, Any]) -> list[str]:
    """Heading, a paragraph and tables of one region."""
    text = f"{region['n_cells']:,} cells, {region['share']:.1%} of all."
    if (near := region["contiguity"]) is not None:
        text += f" {near:.0%} of the cells that touch its cells are its own."
    if (agreement := region["agreement"]) is not None:
        text += (
            f" In different slices, what sets it apart from the rest has a correlation of "
            f"{agreement:.2f} over genes."
        )
    lines = [f"## Region {name}", "", text]
    for title, (key, columns) in _TABLES.items():
        if rows := region[key]:
            lines += ["", f"**{title}**", "", *_table(rows[:_MOST_ROWS], columns)]
    return lines


def _table(rows: Sequence[Mapping[str, Any]], columns: str) -> Iterable[str]:
    """Rows as a Markdown table with columns such as "share:.1%"; None is a dash."""
    pairs = [column.partition(":")[::2] for column in columns.split()]
    yield "| " + " | ".join(name.replace("_", " ") for name, _ in pairs) + " |"
    yield "|" + " --- |" * len(pairs)
    for row in rows:
        cells = (_shown(row[name], how) for name, how in pairs)
        yield "| " + " | ".join(one.replace("|", "\\|") for one in cells) + " |"


def _shown(value: Any, how: str) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return "–" if value is None else format(value, how)
