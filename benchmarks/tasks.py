"""Heads against baselines: annotation, domains, deconvolution and imputation on left-out slices.

    python benchmarks/tasks.py FOLDER                            everything, three seeds
    python benchmarks/tasks.py FOLDER --strategies frozen --seeds 1
    python benchmarks/tasks.py FOLDER --only-tasks 'annotation/*' '*/DLPFC*' --only-contenders PCs
    python benchmarks/tasks.py --join A.json B.json --out OUT    reports of parts, in one

Every contender of a task has the same cells to fit, the same to test, and the same truth; seeds differ
in what the contender draws. Results are written to OUT.json and OUT.md after every contender, task and
seed; a run that was stopped goes on from there. Contenders that draw nothing are measured once.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probes import write_report
from task_contenders import CONTENDERS, STRATEGIES, Contender, Setting
from task_report import to_markdown, verdicts
from task_sets import TASK_SETS, Folder

from stofm.nn import Stofm

if TYPE_CHECKING:
    from collections.abc import Sequence


def choose_tasks(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Names of tasks by family, of those whose ``"family/name"`` fits a pattern.

    Raises
    ------
    ValueError
        A pattern fits nothing.
    """
    every = [(family, name) for family, tasks in TASK_SETS.items() for name in tasks]
    _refuse_unused(patterns, [f"{family}/{name}" for family, name in every], "task")
    chosen: dict[str, list[str]] = {}
    for family, name in every:
        if _fits(f"{family}/{name}", patterns):
            chosen.setdefault(family, []).append(name)
    return chosen


def choose_contenders(
    patterns: Sequence[str], strategies: Sequence[str]
) -> dict[str, list[Contender]]:
    """Contenders by family, of those whose name fits a pattern; of the model's, these strategies.

    Raises
    ------
    ValueError
        A pattern fits nothing.
    """
    names = [one.name for contenders in CONTENDERS.values() for one in contenders]
    _refuse_unused(patterns, list(dict.fromkeys(names)), "contender")
    return {
        family: [
            one
            for one in contenders
            if _fits(one.name, patterns) and (one.strategy is None or one.strategy in strategies)
        ]
        for family, contenders in CONTENDERS.items()
    }


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _refuse_unused(patterns: Sequence[str], names: Sequence[str], what: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            msg = f"No {what} fits {pattern!r}; there are {', '.join(names)}."
            raise ValueError(msg)


def open_report(out: Path, model: Stofm) -> dict[str, Any]:
    """Go on with a report, or begin one.

    Raises
    ------
    ValueError
        The report that is there is another model's.
    """
    path = out.with_name(out.name + ".json")
    if not path.is_file():
        return {"model": model.name, "fingerprint": model.fingerprint, "results": []}
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if report["fingerprint"] != model.fingerprint:
        msg = (
            f"{path} is of {report['model']} ({report['fingerprint']}), and now {model.name} "
            f"({model.fingerprint}) is asked for. Give another --out, or delete it."
        )
        raise ValueError(msg)
    return report


def join(paths: Sequence[Path]) -> dict[str, Any]:
    """Put reports of the same model together, in the order in which tasks and contenders stand here.

    Of a score that several of them have the last one's counts.

    Raises
    ------
    ValueError
        They are of different models.
    """
    reports: list[dict[str, Any]] = [json.loads(path.read_text("utf-8")) for path in paths]
    if len({report["fingerprint"] for report in reports}) > 1:
        models = [
            f"{path}: {r['model']} ({r['fingerprint']})"
            for path, r in zip(paths, reports, strict=True)
        ]
        msg = f"Reports of different models can't be joined: {'; '.join(models)}."
        raise ValueError(msg)
    rows = {
        (row["family"], row["task"], row["contender"], row["seed"]): row
        for report in reports
        for row in report["results"]
    }
    order = [
        (family, task, one.name)
        for family, tasks in TASK_SETS.items()
        for one in CONTENDERS[family]
        for task in tasks
    ]
    results = sorted(
        rows.values(),
        key=lambda row: (order.index((row["family"], row["task"], row["contender"])), row["seed"]),
    )
    return reports[0] | {"results": results, "verdict": verdicts(results)}


def run(
    folder: Path,
    setting: Setting,
    report: dict[str, Any],
    out: Path,
    *,
    tasks: dict[str, list[str]],
    contenders: dict[str, list[Contender]],
    seeds: int,
    tuned_seeds: int,
) -> None:
    """Measure what is not in the report yet; write it after each score."""
    done = {(r["family"], r["task"], r["contender"], r["seed"]) for r in report["results"]}
    files = Folder(folder)
    for family, names in tasks.items():
        for name in names:
            todo = [
                (one, seed)
                for one in contenders[family]
                for seed in range(n_seeds(one, seeds, tuned_seeds))
                if (family, name, one.name, seed) not in done
            ]
            if not todo:
                continue
            task = TASK_SETS[family][name](files)
            for one, seed in todo:
                print(f"{family}/{name}: {one.name}, seed {seed} ...", file=sys.stderr, flush=True)
                started = time.perf_counter()
                scores = one.score(task, setting, seed)
                row = {
                    "family": family,
                    "task": name,
                    "contender": one.name,
                    "strategy": one.strategy,
                    "seed": seed,
                    "seconds": round(time.perf_counter() - started, 2),
                    "scores": scores,
                }
                report["results"].append(row)
                report["verdict"] = verdicts(report["results"])
                write_report(out, report, to_markdown(report))


def n_seeds(contender: Contender, seeds: int, tuned_seeds: int) -> int:
    """How often a contender is measured."""
    if not contender.draws:
        return 1
    return min(seeds, tuned_seeds) if contender.strategy in ("lora", "full") else seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of the slices' .h5ad files")
    parser.add_argument("--join", type=Path, nargs="+", metavar="REPORT", help="measure nothing")
    parser.add_argument("--model", default="stofm-mini", help="folder or name [%(default)s]")
    parser.add_argument("--seeds", type=int, default=3, help="how many [%(default)s]")
    parser.add_argument(
        "--tuned-seeds", type=int, default=3, help="the most for lora and full [%(default)s]"
    )
    parser.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), metavar="STRATEGY"
    )
    parser.add_argument("--only-tasks", nargs="+", default=["*"], metavar="FAMILY/TASK")
    parser.add_argument("--only-contenders", nargs="+", default=["*"], metavar="NAME")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tasks")
    options = parser.parse_args()
    for name in ("seeds", "tuned_seeds"):
        if (value := getattr(options, name)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}.")
    if (options.folder is None) == (options.join is None):
        parser.error("Pass the folder of the slices, or reports to --join.")
    if options.join:
        try:
            report = join(options.join)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        write_report(options.out, report, to_markdown(report))
        return
    model = Stofm.from_pretrained(options.model)
    try:
        tasks = choose_tasks(options.only_tasks)
        contenders = choose_contenders(options.only_contenders, options.strategies)
        report = open_report(options.out, model)
    except ValueError as error:
        parser.error(str(error))
    run(
        options.folder,
        Setting(model=model, device=options.device),
        report,
        options.out,
        tasks=tasks,
        contenders=contenders,
        seeds=options.seeds,
        tuned_seeds=options.tuned_seeds,
    )
    print(to_markdown(report))


if __name__ == "__main__":
    main()
