"""How good a model's frozen embeddings are on slices that it was not trained on.

    python benchmarks/probes.py FOLDER                     the embedded model
    python benchmarks/probes.py FOLDER --model DIR --seeds 3 --out results/probes

A head is fitted to cells of sibling slices and tested on the left-out slice: macro-F1. Without any
labels, k-means clusters of the left-out slice are compared with its classes: ARI and NMI. Beside the
model stand the same model untrained, 50 PCs of log-normalised counts, and these with the mean of the
ten nearest cells' PCs. The tables go to OUT.md, all numbers to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from probe_tasks import embed_with, load_tasks, rows_by_slice
from probing import cluster, neighbor_means, principal_components, probe, side_by_side

from stofm.nn import Stofm

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray
    from probe_tasks import Embedding, LoadedTask

    #: Embeddings of a task's slices, in the order of :attr:`LoadedTask.slices`.
    Features = Sequence[NDArray[np.floating]]

PCS, PCS_AND_NEIGHBORS = "PCs", "PCs + neighbours"
CELL, SPATIAL, BOTH = "cell", "spatial", "cell + spatial"
UNTRAINED = "untrained "
#: What both scales of the model together are compared with: the best of each group.
_RIVALS = {
    "the better of the PCs": (PCS, PCS_AND_NEIGHBORS),
    "the best of the untrained model": tuple(UNTRAINED + name for name in (CELL, SPATIAL, BOTH)),
    "the cell embedding alone": (CELL,),
}


def representations(embeddings: Mapping[str, Embedding], loaded: LoadedTask) -> dict[str, Features]:
    """What a probe may read of a model: either scale, or both side by side."""
    cell = [embeddings[name].cell for name in loaded.slices]
    spatial = [embeddings[name].spatial for name in loaded.slices]
    return {CELL: cell, SPATIAL: spatial, BOTH: side_by_side(cell, spatial)}


def baselines(loaded: LoadedTask) -> dict[str, Features]:
    """What a probe may read without a model, fitted to the task's own slices."""
    slices = list(loaded.slices.values())
    components = principal_components(slices)
    means = [
        neighbor_means(own, np.asarray(adata.obsm["spatial"])[:, :2], rows_by_slice(adata))
        for adata, own in zip(slices, components, strict=True)
    ]
    return {PCS: components, PCS_AND_NEIGHBORS: side_by_side(components, means)}


def score_probe(
    loaded: LoadedTask, features: Features, *, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """``"macro_f1"`` on the left-out slice by seed; nothing for a task of clustering only."""
    if not loaded.task.fit:
        return {}
    *fitted, tested = loaded.labels
    scores = probe(
        np.concatenate(features[:-1]), np.concatenate(fitted), features[-1], tested, seeds=seeds
    )
    return {"macro_f1": scores}


def score(
    loaded: LoadedTask, features: Features, *, seeds: Sequence[int]
) -> dict[str, list[float]]:
    """``"macro_f1"``, ``"ari"`` and ``"nmi"`` on the left-out slice, each by seed."""
    clustered = cluster(features[-1], loaded.labels[-1], seeds=seeds)
    return score_probe(loaded, features, seeds=seeds) | clustered


def describe(scores: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(scores):.3f}"
    return f"{mean} ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else mean


def to_table(results: Sequence[Mapping[str, Any]], measure: str) -> str:
    """Markdown of one measure: a line per representation, a column per task; then who wins."""
    rows = [row for row in results if measure in row]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    names = list(dict.fromkeys(row["representation"] for row in rows))
    found = {(row["representation"], row["task"]): row[measure] for row in rows}
    lines = [_line("representation", tasks), _line("---", ["---"] * len(tasks))]
    for name in names:
        own = [found.get((name, task)) for task in tasks]
        lines.append(_line(name, [describe(one) if one else "" for one in own]))
    means = [
        {name: float(np.mean(found[name, task])) for name in names if (name, task) in found}
        for task in tasks
    ]
    return "\n".join(lines + _verdict(means))


def _verdict(means: Sequence[Mapping[str, float]]) -> list[str]:
    """The better baseline and the winner of each task, and how often both scales together win."""
    better = [_best(own, (PCS, PCS_AND_NEIGHBORS)) for own in means]
    pcs = ["" if b is None else f"{own[b]:.3f}" for own, b in zip(means, better, strict=True)]
    lines = [_line("better of the PCs", pcs), _line("winner", [_best(own) or "" for own in means])]
    for what, rivals in _RIVALS.items():
        pairs = [(own[BOTH], _best(own, rivals), own) for own in means if BOTH in own]
        compared = [(ours, own[best]) for ours, best, own in pairs if best is not None]
        n_above = sum(ours > theirs for ours, theirs in compared)
        if compared:
            lines.append(f"\n{BOTH} is above {what} in {n_above} of {len(compared)} tasks.")
    return lines


def _best(means: Mapping[str, float], among: Iterable[str] | None = None) -> str | None:
    """The representation with the highest mean; None if there is none of those asked for."""
    present = [name for name in (means if among is None else among) if name in means]
    return max(present, key=means.__getitem__) if present else None


def _line(first: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([first, *cells])} |"


def to_markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    titles = {
        "macro_f1": "Probe on the left-out slice, macro-F1",
        "ari": "k-means on the left-out slice, ARI",
        "nmi": "k-means on the left-out slice, NMI",
    }
    seeds = report["seeds"]
    parts = [
        f"Model `{report['model']}` ({report['fingerprint']}), mean and spread of {seeds} seeds."
    ]
    for measure, title in titles.items():
        if any(measure in row for row in report["results"]):
            parts.append(f"{title}:\n\n{to_table(report['results'], measure)}")
    return "\n\n".join(parts) + "\n"


def write_report(out: Path, report: Mapping[str, Any], text: str) -> None:
    """Write OUT.json and OUT.md."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix, content in ((".json", json.dumps(report, indent=2) + "\n"), (".md", text)):
        # Not with_suffix(): a name such as "mini-0.1" would lose its end.
        path = out.with_name(out.name + suffix)
        part = path.with_name(f".{path.name}-part")
        part.write_text(content, encoding="utf-8")
        part.replace(path)


def untrained(model: Stofm, *, seed: int = 0) -> Stofm:
    """The same model with random weights."""
    return Stofm(replace(model.config, trained=False), model.vocabulary, seed=seed).eval()


def run(
    model: Stofm, tasks: Sequence[LoadedTask], out: Path, *, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """Measure everything; after each task of each representation write what there is."""
    report: dict[str, Any] = {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "seeds": len(seeds),
        "results": [],
    }
    for prefix, one in (("", model), (UNTRAINED, untrained(model)), ("", None)):
        print(f"embedding with {prefix}{one.name if one else 'PCs'} ...", file=sys.stderr)
        embeddings = embed_with(one, tasks, device=device) if one else {}
        for loaded in tasks:
            found = representations(embeddings, loaded) if one else baselines(loaded)
            for name, features in found.items():
                scores = score(loaded, features, seeds=seeds)
                row = {"representation": prefix + name, "task": loaded.task.name} | scores
                report["results"].append(row)
            write_report(out, report, to_markdown(report))
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the slices' .h5ad files")
    parser.add_argument("--model", default="stofm-mini", help="folder or name [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="how many [%(default)s]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probes")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, found {options.seeds}.")
    try:
        tasks = load_tasks(options.folder)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    model = Stofm.from_pretrained(options.model)
    report = run(model, tasks, options.out, seeds=range(options.seeds), device=options.device)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
