"""The paper's ablations (tables 5 and A.2 to A.7) at the size of a laptop, measured by probes.

    python benchmarks/ablations.py FOLDER --recipe recipes/stofm-mini.toml
    python benchmarks/ablations.py FOLDER --recipe ... --steps 300 --seeds 2 --only full no-distances

Each variant trains the recipe's cell encoder stage and a shortened spatial stage, and is probed on the
left-out slices as in probes.py. Variants that leave the cell encoder alone share one; seeds differ in
the weights and draws of the spatial stage. Training slices that the recipe excludes or validates on
stay out. Results are written after every variant and seed to OUT.json and OUT.md; a run that was
stopped goes on from there, in the middle of a variant too.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from dataclasses import dataclass, replace
from json import loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from probe_tasks import BOTH, CELL, SPATIAL, TASKS, LoadedTask, embed_with, load_tasks
from probes import describe, write_report
from variants import VARIANTS, Variant, cell_stages, shortened, spatial_stage

from stofm.nn import Stofm
from stofm.train import ModelSource, Recipe
from stofm.train.recipe import train_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: Tasks that leave out whole files; parts of the others' files would be trained on.
_N_TASKS = 6


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """Trains variants of a recipe in one work folder.

    Attributes
    ----------
    data
        Folder of slices that the recipe's patterns refer to.
    base
        The recipe without a change.
    work
        Keeps tokens, cell embeddings and trained cell encoders; variants share them.
    device
        Where to train.
    """

    data: Path
    base: Recipe
    work: Path
    device: str = "auto"

    def recipe(self, name: str, *, seed: int) -> Recipe:
        """A variant's recipe; the seed is added to that of the recipe without a change."""
        changed = VARIANTS[name].change(self.base)
        return replace(changed, run=replace(changed.run, seed=self.base.run.seed + seed))

    def train(self, name: str, *, seed: int) -> Stofm:
        """Train a variant, or go on with it."""
        recipe = self.recipe(name, seed=seed)
        place = self._place(name, seed=seed)
        if cell_stages(recipe):
            start = place / "start"
            self._start(recipe, self._cell_encoder(recipe)).save_pretrained(start, overwrite=True)
            source = ModelSource(checkpoint=str(start))
            recipe = replace(recipe, model=source, stages=(spatial_stage(recipe),))
        return self._run(recipe, place / "run")

    def clean(self, name: str, *, seed: int) -> None:
        """Delete the files of a variant that no other shares."""
        shutil.rmtree(self._place(name, seed=seed))

    def _place(self, name: str, *, seed: int) -> Path:
        return self.work / "variants" / f"{name}-{seed}-{_digest(self.recipe(name, seed=seed))}"

    def _cell_encoder(self, recipe: Recipe) -> Stofm:
        """Train the cell encoder, once for all variants and seeds that do not differ in it."""
        # What does not belong to the cell encoder, as in the recipe without a change.
        model = replace(
            recipe.model,
            se2_transformer=self.base.model.se2_transformer,
            subslice=self.base.model.subslice,
        )
        shared = replace(recipe, run=self.base.run, model=model, stages=cell_stages(recipe))
        return self._run(shared, self.work / "cell-encoders" / _digest(shared))

    def _start(self, recipe: Recipe, shared: Stofm) -> Stofm:
        """The variant's sizes and rules with the trained cell encoder and first spatial weights."""
        config = replace(
            shared.config,
            se2_transformer=replace(shared.config.se2_transformer, **recipe.model.se2_transformer),
            subslice=replace(shared.config.subslice, **recipe.model.subslice),
        )
        start = Stofm(config, shared.vocabulary, seed=recipe.run.seed)
        start.cell_encoder.load_state_dict(shared.cell_encoder.state_dict())
        return start

    def _run(self, recipe: Recipe, folder: Path) -> Stofm:
        return train_recipe(
            self.data,
            recipe,
            out_dir=folder,
            device=self.device,
            work_dir=self.work,
            resume=True,
            show_progress_bar=sys.stderr.isatty(),
        ).model


def _digest(recipe: Recipe) -> str:
    """16 hexadecimal digits that change with any entry of a recipe; dataclasses show them all."""
    return hashlib.blake2b(repr(recipe).encode(), digest_size=8).hexdigest()


def measure(
    trainer: Trainer,
    name: str,
    *,
    seed: int,
    tasks: Sequence[LoadedTask],
    probe_seeds: Sequence[int],
) -> dict[str, Any]:
    """Train and probe a variant.

    Returns
    -------
    Variant, seed, seconds, and macro-F1 over the probe's seeds by representation and task.
    """
    started = time.perf_counter()
    model = trainer.train(name, seed=seed)
    seconds = time.perf_counter() - started
    virtual_cells = spatial_stage(trainer.recipe(name, seed=seed)).virtual_cells
    use_rep = embed_with(model, tasks, virtual_cells=virtual_cells, device=trainer.device)
    scores: dict[str, dict[str, list[float]]] = {CELL: {}, SPATIAL: {}, BOTH: {}}
    for loaded in tasks:
        for representation, found in loaded.head_scores(use_rep, seeds=probe_seeds).items():
            scores[representation][loaded.task.name] = found
    return {"variant": name, "seed": seed, "seconds": round(seconds, 1), "macro_f1": scores}


def to_table(results: Sequence[Mapping[str, Any]], representation: str) -> str:
    """Markdown: a line per variant, a column per task; mean and spread over training seeds."""
    tasks = list(results[0]["macro_f1"][representation])
    lines = [
        f"| variant | {' | '.join(tasks)} | mean |",
        "|---" * (len(tasks) + 2) + "|",
    ]
    for name, variant in VARIANTS.items():
        own = [row["macro_f1"][representation] for row in results if row["variant"] == name]
        if own:
            lines.append(_line(variant, [[np.mean(one[task]) for one in own] for task in tasks]))
    return "\n".join(lines)


def _line(variant: Variant, by_task: Sequence[Sequence[float]]) -> str:
    cells = [describe(scores) for scores in [*by_task, np.mean(by_task, axis=0)]]
    return f"| {' | '.join([variant.what, *cells])} |"


def to_markdown(report: Mapping[str, Any]) -> str:
    """All tables."""
    settings = report["settings"]
    parts = [
        f"Macro-F1 of probes on left-out slices after {settings['steps']} steps of the spatial "
        "stage and without the joint stage; mean and spread over seeds of that stage."
    ]
    titles = {
        SPATIAL: "X_stofm",
        BOTH: "X_stofm_cell and X_stofm side by side",
        CELL: "X_stofm_cell",
    }
    for representation, title in titles.items():
        if report["results"]:
            parts.append(f"{title}:\n\n{to_table(report['results'], representation)}")
    return "\n\n".join(parts) + "\n"


def refuse_trained_on(recipe: Recipe, folder: Path, tasks: Sequence[LoadedTask]) -> None:
    """Raise ValueError if the recipe trains on a slice that probes leave out."""
    left_out = {loaded.task.test for loaded in tasks}
    found = sorted(left_out & {file.stem for file in recipe.data.find(folder)[0]})
    if found:
        msg = (
            f"The recipe trains on {', '.join(found)}, where probes test; name them in exclude of "
            "its [data]."
        )
        raise ValueError(msg)


def open_report(
    out: Path, base: Recipe, tasks: Sequence[LoadedTask], *, probe_seeds: int
) -> dict[str, Any]:
    """Go on with a report, or begin one.

    Raises
    ------
    ValueError
        The report that is there was made with other settings.
    """
    settings = {
        "recipe": _digest(base),
        "steps": spatial_stage(base).max_steps,
        "cell_steps": cell_stages(base)[0].max_steps,
        "probe_seeds": probe_seeds,
        "tasks": [loaded.task.name for loaded in tasks],
    }
    path = out.with_name(out.name + ".json")
    if not path.is_file():
        return {"settings": settings, "results": []}
    report: dict[str, Any] = loads(path.read_text(encoding="utf-8"))
    if report["settings"] != settings:
        msg = (
            f"{path} was made with {report['settings']}, and now {settings} is asked for. "
            "Give another --out, or delete it."
        )
        raise ValueError(msg)
    return report


def run(
    trainer: Trainer,
    report: dict[str, Any],
    out: Path,
    *,
    names: Sequence[str],
    tasks: Sequence[LoadedTask],
    seeds: int,
) -> None:
    """Measure variants that are not in the report yet; write it after each."""
    done = {(row["variant"], row["seed"]) for row in report["results"]}
    probe_seeds = range(report["settings"]["probe_seeds"])
    # All variants once, before the next seed.
    for seed in range(seeds):
        for name in names:
            if (name, seed) in done:
                continue
            print(f"training {name}, seed {seed} ...", file=sys.stderr)
            row = measure(trainer, name, seed=seed, tasks=tasks, probe_seeds=probe_seeds)
            report["results"].append(row)
            write_report(out, report, to_markdown(report))
            trainer.clean(name, seed=seed)


def main() -> None:
    results = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the slices' .h5ad files")
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500, help="spatial stage [%(default)s]")
    parser.add_argument("--cell-steps", type=int, help="cell encoder stage [the recipe's]")
    parser.add_argument("--seeds", type=int, default=2, help="of training [%(default)s]")
    parser.add_argument("--probe-seeds", type=int, default=2, help="of heads [%(default)s]")
    parser.add_argument(
        "--only", nargs="+", choices=VARIANTS, metavar="NAME", default=list(VARIANTS)
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=results / "ablations")
    parser.add_argument("--work", type=Path, default=results / "ablations-work")
    options = parser.parse_args()
    for name in ("steps", "cell_steps", "seeds", "probe_seeds"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {value}.")
    try:
        recipe = shortened(
            Recipe.from_toml(options.recipe), steps=options.steps, cell_steps=options.cell_steps
        )
        tasks = load_tasks(options.folder, TASKS[:_N_TASKS])
        refuse_trained_on(recipe, options.folder, tasks)
        report = open_report(options.out, recipe, tasks, probe_seeds=options.probe_seeds)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    trainer = Trainer(data=options.folder, base=recipe, work=options.work, device=options.device)
    run(trainer, report, options.out, names=options.only, tasks=tasks, seeds=options.seeds)
    print(to_markdown(report))


if __name__ == "__main__":
    main()
