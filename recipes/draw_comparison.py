"""Draw the landing page's comparison with components and published methods from measured scores.

    python recipes/draw_comparison.py docs/measured docs/_static/comparison.png

Left, regions found without labels: the reports of

    python benchmarks/tasks.py FOLDER --strategies frozen --out docs/measured/tasks
    python benchmarks/published.py FOLDER --out docs/measured/published

Right, labels of slices that were left out: the table that ``benchmarks/probes.py`` writes, with
``X_stofm`` for regions and ``X_stofm_cell`` for types, as the documentation recommends.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl
import pandas as pd

#: Colour, marker and size of each contender.
_STYLES = {
    "PCs": ("#9a9a9a", "o", 34),
    "PCs + neighbours": ("#4d4d4d", "s", 30),
    "BANKSY": ("#d55e00", "^", 36),
    "SpatialLeiden": ("#009e73", "v", 36),
    "stofm": ("#0072b2", "D", 40),
}
_OF_REGIONS = ("layers", "regions")


def main() -> None:
    """Read both files and draw them side by side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("measured", type=Path, help="folder of the reports")
    parser.add_argument("picture", type=Path)
    options = parser.parse_args()
    domains = read_domains(options.measured / "tasks.json")
    published = read_domains(options.measured / "published.json")
    # Its authors use one weight of neighbours for spots and another for cells: the better counts.
    weights = published.columns.str.startswith("BANKSY")
    domains["BANKSY"] = published.loc[:, weights].max(axis=1)
    domains["SpatialLeiden"] = published["SpatialLeiden"]
    draw(domains, read_probes(options.measured / "probes.md"), options.picture)


def read_domains(file: Path) -> pd.DataFrame:
    """Mean ARI over the seeds, (n_tasks, n_contenders)."""
    results = json.loads(file.read_text(encoding="utf-8"))["results"]
    rows = [
        (one["task"], one["contender"].removesuffix(" frozen"), one["scores"]["ari"])
        for one in results
        if one.get("family", "domains") == "domains"
    ]
    table = pd.DataFrame(rows, columns=["task", "contender", "ari"])
    return table.pivot_table("ari", "task", "contender")


def read_probes(file: Path) -> pd.DataFrame:
    """Mean macro-F1 over the seeds, (n_tasks, n_contenders), from the first table of the file."""
    lines = file.read_text(encoding="utf-8").split("\n\n")[2].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    scores = {row[0]: [float(cell.split()[0]) for cell in row[1:]] for row in cells[2:-1]}
    table = pd.DataFrame(scores, index=cells[0][1:])
    is_region = [task.endswith(_OF_REGIONS) for task in table.index]
    return table[["PCs", "PCs + neighbours"]].assign(
        stofm=table["spatial"].where(is_region, table["cell"])
    )


def draw(domains: pd.DataFrame, probes: pd.DataFrame, picture: Path) -> None:
    """A row for each task, the one that stofm gains most on first."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained")
    panels = {
        "Regions found without labels\nadjusted Rand index": domains,
        "Labels of left-out slices\nmacro-F1": probes,
    }
    for ax, (title, table) in zip(axes, panels.items(), strict=True):
        others = table.drop(columns="stofm").max(axis=1)
        table = table.loc[(table["stofm"] - others).sort_values().index]
        ax.hlines(range(len(table)), table.min(axis=1), table.max(axis=1), color="#d9d9d9", lw=2)
        for name, (color, marker, size) in _STYLES.items():
            if name in table:
                look = {"s": size, "color": color, "marker": marker, "zorder": 3, "linewidth": 0}
                ax.scatter(table[name], range(len(table)), label=name, **look)
        ax.set_yticks(range(len(table)), table.index, fontsize=8.5)
        ax.set_title(title, fontsize=9.5, loc="left")
        ax.tick_params(axis="x", labelsize=8.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], names[::-1], loc="outside lower center", ncols=5, frameon=False, fontsize=9
    )
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main()
