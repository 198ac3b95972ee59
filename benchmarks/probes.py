"""How good models' frozen embeddings are on slices that they were not trained on.

    python benchmarks/probes.py FOLDER                     the built-in model
    python benchmarks/probes.py FOLDER --model DIR --seeds 3 --out results/probes
    python benchmarks/probes.py FOLDER --model A B --tasks "STARmap layers" "heart regions"

stofm.tl.probe on the tasks of probe_tasks.py: a head is fitted to cells of some slices and tested on
left-out ones, and without any labels k-means clusters of these are compared with their classes.
Beside each model stand the first one untrained, principal components, these with neighbours, and
logistic regression on log-counts. The tables go to OUT.md, all numbers to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from probe_tasks import BOTH, CELL, SPATIAL, TASKS, embed_with, load_tasks

from stofm.nn import Stofm
from stofm.tl._probe_scores import PCS, PCS_AND_NEIGHBORS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd
    from probe_tasks import LoadedTask

UNTRAINED = "untrained "
MEASURES = ("macro_f1", "accuracy", "calibration_error", "ari", "nmi")
#: What both scales of a model together are compared with: the best of each group. The cell
#: embedding is the model's own.
_RIVALS = {
    "the better of the PCs": (PCS, PCS_AND_NEIGHBORS),
    "the best of the untrained model": tuple(UNTRAINED + name for name in (CELL, SPATIAL, BOTH)),
}


def by_seed(scores: pd.DataFrame, task: str) -> list[dict[str, Any]]:
    """Results of a task: for each representation the measures by seed, means over what is left out."""
    rows = []
    for name, own in scores.groupby("representation", sort=False):
        means = own.groupby("seed")[list(MEASURES)].mean().dropna(axis=1)
        rows.append({"representation": name, "task": task} | means.to_dict("list"))
    return rows


def describe(scores: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = f"{np.mean(scores):.3f}"
    return f"{mean} ± {np.std(scores, ddof=1):.3f}" if len(scores) > 1 else mean


def to_table(
    results: Sequence[Mapping[str, Any]], measure: str, prefixes: Sequence[str] = ("",)
) -> str:
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
    return "\n".join(lines + _verdict(means, prefixes))


def _verdict(means: Sequence[Mapping[str, float]], prefixes: Sequence[str]) -> list[str]:
    """The better baseline and the winner of each task, and how often both scales together win."""
    better = [_best(own, (PCS, PCS_AND_NEIGHBORS)) for own in means]
    pcs = ["" if b is None else f"{own[b]:.3f}" for own, b in zip(means, better, strict=True)]
    lines = [_line("better of the PCs", pcs), _line("winner", [_best(own) or "" for own in means])]
    for prefix in prefixes:
        both = prefix + BOTH
        for what, rivals in (*_RIVALS.items(), ("the cell embedding alone", (prefix + CELL,))):
            pairs = [(own[both], _best(own, rivals), own) for own in means if both in own]
            compared = [(ours, own[best]) for ours, best, own in pairs if best is not None]
            n_above = sum(ours > theirs for ours, theirs in compared)
            if compared:
                lines.append(f"\n{both} is above {what} in {n_above} of {len(compared)} tasks.")
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
        "macro_f1": "Probe on what is left out, macro-F1",
        "ari": "k-means on what is left out, ARI",
        "nmi": "k-means on what is left out, NMI",
    }
    models = ", ".join(f"`{one['name']}` ({one['fingerprint']})" for one in report["models"])
    what = "Model" if len(report["models"]) == 1 else "Models"
    parts = [f"{what} {models}, mean and spread of {report['seeds']} seeds."]
    prefixes = [one["prefix"] for one in report["models"]]
    for measure, title in titles.items():
        if any(measure in row for row in report["results"]):
            parts.append(f"{title}:\n\n{to_table(report['results'], measure, prefixes)}")
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
    models: Mapping[str, Stofm],
    tasks: Sequence[LoadedTask],
    out: Path,
    *,
    seeds: int,
    device: str,
) -> dict[str, Any]:
    """Measure everything; after each task write what there is.

    Parameters
    ----------
    models
        By what the names of their representations begin with.
    """
    report: dict[str, Any] = {
        "models": [
            {"prefix": prefix, "name": one.name, "fingerprint": one.fingerprint}
            for prefix, one in models.items()
        ],
        "seeds": seeds,
        "results": [],
    }
    use_rep: dict[str, str | tuple[str, ...]] = {}
    for prefix, one in (*models.items(), (UNTRAINED, untrained(next(iter(models.values()))))):
        print(f"embedding with {prefix}{one.name} ...", file=sys.stderr)
        use_rep |= embed_with(one, tasks, prefix=prefix, device=device)
    for loaded in tasks:
        print(f"probing {loaded.task.name} ...", file=sys.stderr)
        report["results"] += by_seed(loaded.probe(use_rep, seeds=seeds), loaded.task.name)
        write_report(out, report, to_markdown(report))
    return report


def read_models(names: Sequence[str]) -> dict[str, Stofm]:
    """Read models; of several, names of representations begin with that of the folder.

    Raises
    ------
    ValueError
        Two have the same name.
    """
    prefixes = [f"{Path(name).name} " for name in names] if len(names) > 1 else [""]
    if len(set(prefixes)) < len(prefixes):
        msg = f"--model names folders of the same name: {', '.join(names)}. Rename one."
        raise ValueError(msg)
    return {
        prefix: Stofm.from_pretrained(name) for prefix, name in zip(prefixes, names, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the slices' .h5ad files")
    parser.add_argument(
        "--model",
        nargs="+",
        default=["stofm-mini"],
        metavar="DIR",
        help="folders or names [%(default)s]",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[task.name for task in TASKS],
        default=[task.name for task in TASKS],
        metavar="NAME",
        help="all of them, or some",
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many [%(default)s]")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "probes")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, found {options.seeds}.")
    try:
        tasks = load_tasks(options.folder, [t for t in TASKS if t.name in options.tasks])
        models = read_models(options.model)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    report = run(models, tasks, options.out, seeds=options.seeds, device=options.device)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
