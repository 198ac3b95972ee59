"""Cells of a type that a head has not seen: whether they are found, and whether prediction sets hold.

    python benchmarks/novelty.py FOLDER                  six slices, four types of each, one seed
    python benchmarks/novelty.py FOLDER --types 2 --only 'STARmap*'

A type is left out of the labelled slices, and a head is fitted to the others. On another slice, its
cells are to have a higher novelty than those of known types. Beside it stand one minus the highest
probability, and the two parts of novelty. A head that was fitted to all types gives the coverage and
size of the prediction sets. Results are written to OUT.json and OUT.md after every head.
"""

from __future__ import annotations

import argparse
import json
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from probe_tasks import TASKS, LoadedTask, load_tasks, rows_by_slice
from sklearn.metrics import roc_auc_score

import stofm as st
from stofm.heads.request import Request, resolve_slices

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm.heads.annotation import AnnotationHead

SLICES = (
    "STARmap types",
    "seqFISH+ cortex types",
    "MERFISH types",
    "Xenium types",
    "osmFISH types",
    "seqFISH+ bulb types",
)
#: Share of the labelled cells, and cells of the tested slice, that a type has to be left out.
_LEAST_SHARE, _FEWEST = 0.01, 15
#: Of a single file, the last slices are tested.
_N_TESTED = 2
_LABEL, _LIBRARY = "label", "slice_id"
NAMES = {
    "maximum": "1 - maximum probability",
    "energy": "energy",
    "distance": "distance",
    "novelty": "novelty",
}
#: Columns of the tables, and what they are called.
FOUND = {
    "found": "new cells with a novelty above 1",
    "known_novel": "known cells",
    "unknown": 'new cells that are "unknown"',
    "known_unknown": "known cells",
    "grouped": "new cells in groups of `novel`",
    "grouped_known": "known cells",
}
SETS = {"n_known": "cells", "accuracy": "accuracy", "coverage": "coverage", "set_size": "mean size"}


def parts_of(loaded: LoadedTask) -> tuple[dict[str, AnnData], AnnData]:
    """Slices to fit to, and what is tested, with ``obs["label"]``."""
    slices = {}
    for (name, adata), labels in zip(loaded.slices.items(), loaded.labels, strict=True):
        own = adata.copy()
        own.obs[_LABEL] = np.where(labels == "", None, labels.astype(object))
        st.tl.embed(own, library_key=_column(own), show_progress_bar=False)
        slices[name] = own
    *names, last = slices
    if names:
        return {name: slices[name] for name in names}, slices[last]
    rows = rows_by_slice(slices[last])
    fitted, tested = (
        np.sort(np.concatenate(own)) for own in (rows[:-_N_TESTED], rows[-_N_TESTED:])
    )
    return {"fitted": slices[last][fitted].copy()}, slices[last][tested].copy()


def _column(adata: AnnData) -> str | None:
    return _LIBRARY if _LIBRARY in adata.obs else None


def choose_types(fitted: dict[str, AnnData], tested: AnnData, n_types: int) -> list[str]:
    """Types to leave out, spread over the frequent and the rare."""
    counts = pd.concat([one.obs[_LABEL] for one in fitted.values()]).value_counts()
    there = tested.obs[_LABEL].value_counts()
    usable = [
        str(name)
        for name, count in counts.items()
        if count >= _LEAST_SHARE * counts.sum() and there.get(name, 0) >= _FEWEST
    ]
    places = np.linspace(0, len(usable) - 1, min(n_types, len(usable))).astype(int)
    return [usable[k] for k in places]


def fit_head(fitted: dict[str, AnnData], left_out: str | None, seed: int) -> AnnotationHead:
    labelled = {name: one.copy() for name, one in fitted.items()}
    for one in labelled.values():
        one.obs.loc[one.obs[_LABEL] == left_out, _LABEL] = None
    return st.tl.annotate(labelled, label_key=_LABEL, seed=seed, show_progress_bar=False)


def score(head: AnnotationHead, tested: AnnData, left_out: str | None) -> dict[str, Any]:
    """What the head says of the tested cells, against their types."""
    named = st.tl.annotate(tested, head=head, copy=True, show_progress_bar=False)
    truth = tested.obs[_LABEL].astype(object).fillna("").to_numpy(str)
    known = np.isin(truth, head.classes)
    codes = np.searchsorted(head.classes, truth[known])
    inside = named.obsm["stofm_annotation_set"].to_numpy()[known]
    found = named.obsm["stofm_annotation_proba"].to_numpy()[known].argmax(axis=1)
    unknown = (named.obs["stofm_annotation"] == "unknown").to_numpy()
    row: dict[str, Any] = {
        "coverage": float(inside[np.arange(len(codes)), codes].mean()),
        "set_size": float(inside.sum(axis=1).mean()),
        "accuracy": float((found == codes).mean()),
        "known_unknown": float(unknown[known].mean()),
        "known_novel": float((named.obs["stofm_novelty"].to_numpy()[known] > 1).mean()),
        "n_known": int(known.sum()),
    }
    if left_out is None:
        return row
    new = truth == left_out
    assert head.surroundings is not None
    slices = resolve_slices(named, _column(tested))
    blocks = head.read(slices, Request(show_progress_bar=False))
    scores = {
        "maximum": 1 - named.obs["stofm_annotation_confidence"].to_numpy(),
        "energy": head.energies(blocks),
        "distance": head.surroundings.distances(blocks.averaged[0]),
        "novelty": named.obs["stofm_novelty"].to_numpy(),
    }
    for name, values in scores.items():
        row |= {
            f"auroc_{name}": _auroc(values, new, known),
            f"fpr95_{name}": _fpr(values, new, known),
        }
    groups = st.tl.novel(named, head, library_key=_column(tested), show_progress_bar=False)
    grouped = named.obs["stofm_novel"].notna().to_numpy()
    return row | {
        "n_new": int(new.sum()),
        "found": float((scores["novelty"][new] > 1).mean()),
        "unknown": float(unknown[new].mean()),
        "n_groups": len(groups),
        "grouped": float(grouped[new].mean()),
        "grouped_known": float(grouped[known].mean()),
    }


def _auroc(values: NDArray[Any], new: NDArray[np.bool_], known: NDArray[np.bool_]) -> float:
    return float(roc_auc_score(new[new | known], values[new | known]))


def _fpr(values: NDArray[Any], new: NDArray[np.bool_], known: NDArray[np.bool_]) -> float:
    """Share of known cells above the threshold that 95 % of the new ones are above."""
    return float((values[known] >= np.quantile(values[new], 0.05)).mean())


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Tables of means over the types of a slice and over slices, and of each type."""
    table = pd.DataFrame(rows)
    new = table[table["left_out"].notna()]
    parts = []
    if len(new):
        means = new.groupby("slice", sort=False).mean(numeric_only=True)
        means.loc["mean"] = means.mean()
        scores = {f"auroc_{name}": f"AUROC, {called}" for name, called in NAMES.items()}
        scores |= {f"fpr95_{name}": f"FPR at 95 %, {called}" for name, called in NAMES.items()}
        parts += [_table(means, scores), _table(means, FOUND)]
        each = new.set_index(new["slice"].str.removesuffix(" types") + ", " + new["left_out"])
        parts.append(_table(each, {"n_new": "cells"} | {f"auroc_{n}": c for n, c in NAMES.items()}))
    every = table[table["left_out"].isna()].set_index("slice").select_dtypes("number").astype(float)
    if len(every):
        every.loc["mean"] = every.mean()
        parts.append(_table(every, SETS))
    return "\n\n".join(parts) + "\n"


def _table(values: pd.DataFrame, columns: Mapping[str, str]) -> str:
    """Some columns, by what they are called."""
    lines = [
        "| slice | " + " | ".join(columns.values()) + " |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    lines += [
        f"| {name} | " + " | ".join(f"{v:.0f}" if v > 10 else f"{v:.2f}" for v in row) + " |"
        for name, *row in values[list(columns)].itertuples()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the slices' .h5ad files")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="SLICE")
    parser.add_argument("--types", type=int, default=4, help="to leave out of each [%(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "novelty")
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for task in TASKS:
        if task.name not in SLICES or not any(fnmatchcase(task.name, one) for one in options.only):
            continue
        fitted, tested = parts_of(load_tasks(options.folder, [task])[0])
        for left_out in [None, *choose_types(fitted, tested, options.types)]:
            print(f"{task.name}: {left_out or 'all types'} ...", file=sys.stderr, flush=True)
            head = fit_head(fitted, left_out, options.seed)
            rows.append({"slice": task.name, "left_out": left_out, **score(head, tested, left_out)})
            options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
            options.out.with_suffix(".md").write_text(to_markdown(rows))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
