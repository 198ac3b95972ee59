"""What :func:`stofm.tl.describe` returns: facts about regions, as Markdown and as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_MOST_ROWS: Final = 12


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
    tables = {
        "Where": (
            region["slices"],
            {
                "slice": str,
                "n_cells": "{:,}".format,
                "share": "{:.1%}".format,
                "n_pieces": str,
                "largest_piece": "{:.0%}".format,
            },
        ),
        "Composition": (
            region["composition"],
            {"type": str, "share": "{:.1%}".format, "over_all": "{:.2f}".format},
        ),
        "Neighbours": (
            region["neighbors"],
            {"region": str, "share": "{:.1%}".format, "over_expected": "{:.2f}".format},
        ),
        "Markers": (
            region["markers"],
            {
                "gene": str,
                "log2_fold_change": "{:.2f}".format,
                "detected_inside": "{:.0%}".format,
                "detected_outside": "{:.0%}".format,
            },
        ),
        "Gene sets": (
            region["gene_sets"],
            {"set": str, "genes": ", ".join, "n_measured": str, "fdr": "{:.2g}".format},
        ),
        "Spatially variable genes within": (
            region["spatially_variable_genes"],
            {"gene": str, "morans_i": "{:.2f}".format},
        ),
    }
    for title, (rows, columns) in tables.items():
        if rows:
            lines += ["", f"**{title}**", "", *_table(rows[:_MOST_ROWS], columns)]
    return lines


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> Iterable[str]:
    """Rows as a Markdown table; None is a dash."""
    yield "| " + " | ".join(name.replace("_", " ") for name in columns) + " |"
    yield "|" + " --- |" * len(columns)
    for row in rows:
        cells = ("–" if row[name] is None else shown(row[name]) for name, shown in columns.items())
        yield "| " + " | ".join(one.replace("|", "\\|") for one in cells) + " |"
