"""Tables of tasks.py, and its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from probes import describe

from stofm.tl._probe_scores import PCS, PCS_AND_NEIGHBORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_PROPORTIONS = {"pearson": True, "rmse": False, "mae": False, "jensen_shannon": False}
#: By family: what is measured, the first of which decides, and whether more is better.
MEASURES: Mapping[str, Mapping[str, bool]] = {
    "annotation": {"macro_f1": True, "accuracy": True},
    "domains": {"ari": True, "nmi": True, "ari_kmeans": True, "nmi_kmeans": True},
    "deconvolution": _PROPORTIONS,
    "proportions": _PROPORTIONS,
    "imputation": {"pearson": True, "rmse": False, "mae": False},
}
_WORDS = {
    "macro_f1": "macro-F1",
    "accuracy": "accuracy",
    "ari": "ARI, `tl.domains`",
    "nmi": "NMI, `tl.domains`",
    "ari_kmeans": "ARI, k-means",
    "nmi_kmeans": "NMI, k-means",
    "pearson": "Pearson correlation",
    "rmse": "RMSE",
    "mae": "MAE",
    "jensen_shannon": "Jensen-Shannon divergence",
}
_LESS = " (less is better)"
_TITLES = {
    "annotation": "Annotation",
    "domains": "Domains",
    "deconvolution": "Deconvolution with a single-cell reference",
    "proportions": 'Deconvolution learnt from known proportions, in blocks of one slice ("stofm, '
    'reference" and least squares read single cells instead)',
    "imputation": "Imputation",
}


def means(
    results: Iterable[Mapping[str, Any]], family: str, measure: str
) -> dict[str, dict[str, list[float]]]:
    """Scores over seeds by task and contender, in the order of the results."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in results:
        if row["family"] == family and measure in row["scores"]:
            task = found.setdefault(row["task"], {})
            task.setdefault(row["contender"], []).append(row["scores"][measure])
    return found


def verdicts(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each task and measure the best strategy of the model and the best baseline.

    Returns
    -------
    Rows of those tasks that both have taken part in; the first of a task has the measure that
    decides.
    """
    ours = {row["contender"] for row in results if row["strategy"] is not None}
    rows = []
    for family, measures in MEASURES.items():
        found = {one: means(results, family, one) for one in measures}
        for task in dict.fromkeys(name for one in found.values() for name in one):
            for measure, more_is_better in measures.items():
                scores = {
                    name: float(np.mean(x)) for name, x in found[measure].get(task, {}).items()
                }
                pair = [
                    {name: x for name, x in scores.items() if (name in ours) is mine}
                    for mine in (True, False)
                ]
                if not all(pair):
                    continue
                best, baseline = (
                    (max if more_is_better else min)(own, key=own.__getitem__) for own in pair
                )
                gain = (scores[best] - scores[baseline]) * (1 if more_is_better else -1)
                rows.append(
                    {
                        "family": family,
                        "task": task,
                        "measure": measure,
                        "decides": measure == next(iter(measures)),
                        "best": best,
                        "score": scores[best],
                        "baseline": baseline,
                        "baseline_score": scores[baseline],
                        "ahead": gain > 0,
                    }
                )
    return rows


def above_components(results: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether the frozen head is above both PCA baselines in macro-F1, by task of annotation."""
    compared = ("stofm frozen", PCS, PCS_AND_NEIGHBORS)
    ahead = {}
    for task, scores in means(results, "annotation", "macro_f1").items():
        if all(name in scores for name in compared):
            frozen, *baselines = (float(np.mean(scores[name])) for name in compared)
            ahead[task] = frozen > max(baselines)
    return ahead


def to_markdown(report: Mapping[str, Any]) -> str:
    """All tables, then the verdict."""
    results = report["results"]
    parts = [
        f"Model `{report['model']}` ({report['fingerprint']}), on slices and genes that heads were "
        f"not fitted to; mean and spread of {_n_seeds(results)} seeds, or one number where nothing "
        "is drawn or one seed was measured."
    ]
    for family, measures in MEASURES.items():
        for measure, more_is_better in measures.items():
            found = means(results, family, measure)
            if found:
                title = f"{_TITLES[family]}, {_WORDS[measure]}{'' if more_is_better else _LESS}"
                parts.append(f"{title}:\n\n{_table(found)}")
    return "\n\n".join([*parts, *_verdict(results)]) + "\n"


def _n_seeds(results: Sequence[Mapping[str, Any]]) -> int:
    return len({row["seed"] for row in results})


def _table(found: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A line per contender, a column per task."""
    names = dict.fromkeys(name for own in found.values() for name in own)
    lines = [["contender", *found], ["---"] * (len(found) + 1)]
    for name in names:
        cells = [describe(own[name]) if name in own else "" for own in found.values()]
        lines.append([name, *cells])
    return _to_lines(lines)


def _to_lines(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _verdict(results: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = verdicts(results)
    if not rows:
        return []
    lines = [
        ["family", "task", "measure", "best strategy", "score", "best baseline", "score", "ahead"],
        ["---"] * 8,
    ]
    deciding = [row for row in rows if row["decides"]]
    for row in deciding:
        scores = [f"{row[key]:.3f}" for key in ("score", "baseline_score")]
        lines.append(
            [
                row["family"],
                row["task"],
                _WORDS[row["measure"]],
                row["best"],
                scores[0],
                row["baseline"],
                scores[1],
                "yes" if row["ahead"] else "no",
            ]
        )
    behind = [f"{row['family']}/{row['task']}" for row in deciding if not row["ahead"]]
    parts = [
        f"Verdict:\n\n{_to_lines(lines)}",
        f"By the first measure of each family the best strategy is above every baseline on "
        f"{len(deciding) - len(behind)} of {len(deciding)} tasks"
        + (f"; not on {', '.join(behind)}." if behind else "."),
    ]
    if ahead := above_components(results):
        parts.append(
            f"The frozen head is above both PCA baselines in macro-F1 on {sum(ahead.values())} of "
            f"{len(ahead)} annotation tasks."
        )
    return parts
