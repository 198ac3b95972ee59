"""Start a run from a recipe or from arguments."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from stofm._files import local
from stofm.corpus.manifest import is_corpus
from stofm.corpus.preparation import fit_vocabulary, open_corpus, prepare_slices
from stofm.corpus.sources import SliceSource, divide_corpus
from stofm.genes import GeneVocabulary
from stofm.nn import Stofm, StofmConfig
from stofm.train.config import OptimizerConfig, RunConfig, StageConfig, StageName
from stofm.train.folder import RunFolder, locked
from stofm.train.gene_embeddings import make_initializer, read_gene_embeddings
from stofm.train.processes import Processes
from stofm.train.recipe import Recipe, paper_schedule
from stofm.train.run import Pretraining, TrainResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from os import PathLike

    import torch

    from stofm.corpus.reader import Corpus

    #: Fits a vocabulary on the slices to train on.
    Fit = Callable[[], GeneVocabulary]


def train_recipe(data: str | PathLike[str], recipe: Recipe, **options: Any) -> TrainResult:
    """Train by a recipe, on files of the folder `data`, or on the corpus that it is.

    `options` are those of :func:`stofm.tl.train` that a recipe does not state: `out_dir`, `device`, `work_dir`, `resume`, `overwrite`, `show_progress_bar`.
    """

    def find() -> tuple[list[SliceSource], ...]:
        if is_corpus(data):
            which = recipe.data
            return divide_corpus(local(data), which.train, which.validation, which.exclude)
        return tuple(
            [SliceSource(f, f.stem, recipe.data.options_of(f, data)) for f in files]
            for files in recipe.data.find(data)
        )

    return launch(
        find,
        lambda fit: recipe.model.make(fit, seed=recipe.run.seed),
        stages=recipe.stages,
        run=recipe.run,
        gene_embeddings=recipe.model.gene_embeddings,
        **options,
    )


def launch(
    find: Callable[[], tuple[list[SliceSource], ...]],
    make_model: Callable[[Fit], Stofm],
    *,
    stages: Sequence[StageConfig],
    run: RunConfig,
    gene_embeddings: str | PathLike[str],
    out_dir: str | PathLike[str],
    device: str | torch.device = "auto",
    work_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> TrainResult:
    """Find the other processes, prepare the slices in the first, and train.

    `find` lists the slices to train on and those held out.
    """
    genes = read_gene_embeddings(gene_embeddings)
    folder = RunFolder(out_dir, work_dir)
    processes = Processes.start(device, run.precision)
    with ExitStack() as stack:
        if processes.is_first:
            # Before hours of preparation.
            folder.check(resume=resume, overwrite=overwrite)
            stack.enter_context(locked(folder.path))
        sources, held_out = find()

        def in_first(compute: Callable[[], Any]) -> Any:
            return processes.agree(compute() if processes.is_first else None)

        def fit() -> GeneVocabulary:
            return GeneVocabulary.from_tsv(in_first(lambda: fit_vocabulary(sources, folder.work)))

        def prepare(those: Sequence[SliceSource]) -> Corpus:
            place, shows = folder.work / "slices", show_progress_bar
            keys = in_first(lambda: prepare_slices(those, model, place, show_progress_bar=shows))
            return open_corpus(keys, model)

        model = make_model(fit)
        initialize = make_initializer(genes, model, seed=run.seed)
        pretraining = Pretraining(
            model=copy.deepcopy(model),
            stages=stages,
            run=run,
            corpus=prepare(sources),
            validation=prepare(held_out) if held_out else None,
            folder=folder,
            processes=processes,
            initialize=initialize,
            gene_table="" if isinstance(genes, str) else f"{genes.file} {genes.digest}",
            show_progress_bar=show_progress_bar and processes.is_first,
        )
        return pretraining.train(resume=resume, overwrite=overwrite)


def choose_stages(
    stage: Any, epochs: int | None, optimizer: OptimizerConfig | None
) -> tuple[StageConfig, ...]:
    """Return the stages that a user names or passes."""
    if isinstance(stage, str):
        paper = paper_schedule(optimizer=optimizer)
        if not (chosen := [one for one in paper if stage in (one.name, "pretrain")]):
            names = ["pretrain", *get_args(StageName)]
            raise ValueError(f"stage must be one of {names} or a StageConfig, found {stage!r}.")
        return tuple(one if epochs is None else replace(one, epochs=epochs) for one in chosen)
    if epochs is not None or optimizer is not None:
        raise ValueError(
            "epochs and optimizer are entries of StageConfig; leave out the arguments."
        )
    given = (stage,) if isinstance(stage, StageConfig) else stage
    if not given or not all(isinstance(one, StageConfig) for one in given):
        raise TypeError(f"stage must be a name or one or more StageConfig, found {stage!r}.")
    return tuple(given)


def find_model(model: Any, vocabulary: GeneVocabulary | None, fit: Fit, *, seed: int) -> Stofm:
    """Return the model that a user passes or names, or a new one."""
    if isinstance(model, StofmConfig):
        if vocabulary is None:
            vocabulary = fit()
            cell_encoder = replace(model.cell_encoder, n_tokens=vocabulary.n_tokens)
            model = replace(model, cell_encoder=cell_encoder)
        return Stofm(model, vocabulary, seed=seed)
    if vocabulary is not None:
        raise ValueError(
            "A model has its vocabulary already; `vocabulary` is for a new one (StofmConfig)."
        )
    if isinstance(model, str | Path):
        return Stofm.from_pretrained(model)
    if not isinstance(model, Stofm):
        raise TypeError(
            "model must be a Stofm, a StofmConfig, a folder or a hub id, found "
            f"{type(model).__name__}."
        )
    return model
