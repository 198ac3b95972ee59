"""``stofm.tl.train``: pretraining on AnnData, files or a recipe."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from stofm._config import build_dataclass
from stofm.genes import GeneVocabulary, embedded_vocabulary
from stofm.nn import CellEncoderConfig, SE2TransformerConfig, Stofm, StofmConfig, SubSliceConfig
from stofm.tl._slice_sources import SliceSource, find_sources
from stofm.tl._training_data import fit_vocabulary, open_corpus, prepare_slices
from stofm.train.config import RunConfig, StageConfig, StageName, paper_schedule
from stofm.train.gene_embeddings import make_initializer, read_gene_embeddings
from stofm.train.pretraining import Pretraining, TrainResult
from stofm.train.processes import Processes
from stofm.train.recipe import FileConfig, ModelSource, Recipe
from stofm.train.run_lock import locked
from stofm.train.state import RunFolder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from os import PathLike

    import torch

    from stofm.genes.gene_table import GeneTable
    from stofm.train.config import Keep, Precision
    from stofm.train.optimizer import OptimizerConfig


def train(
    data: Any,
    model: Stofm | StofmConfig | str | Path = "stofm-mini",
    *,
    out_dir: str | PathLike[str],
    stage: StageName | Literal["pretrain"] | StageConfig | Sequence[StageConfig] = "pretrain",
    validation: Any = None,
    epochs: int | None = None,
    optimizer: OptimizerConfig | None = None,
    vocabulary: GeneVocabulary | None = None,
    gene_embeddings: str | PathLike[str] = "random",
    layer: str | None = None,
    spatial_key: str = "spatial",
    library_key: str | None = None,
    species: Literal["auto", "human", "mouse"] = "auto",
    gene_key: str | None = None,
    orthologs: str | None = None,
    table_key: str | None = None,
    precision: Precision = "32",
    keep: Keep = "best",
    validate_every: int | None = None,
    patience: int | None = None,
    checkpoint_every: int | None = None,
    log_every: int = 10,
    n_threads: int = 2,
    tensorboard: bool = False,
    seed: int = 0,
    device: str | torch.device = "auto",
    work_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> TrainResult:
    """Train a model on slices without labels, from scratch or from a checkpoint.

    Counts are read file by file, ``X`` in blocks of cells, and kept as gene tokens in the work
    folder; once, and once before that if a vocabulary is fitted. A file that did not change is not
    read again. A file of several slices has all its tokens in memory while it is read.
    Checkpoints are written as training goes: a run that was stopped at any moment goes on with
    ``resume=True`` and ends as if it had not been. Started by ``torchrun`` or SLURM, the
    processes share each batch and give the weights that one process would, up to rounding and up
    to dropout, whose draws depend on how a batch is shared out.

    Parameters
    ----------
    data
        Slices to train on: an AnnData or SpatialData, the path of an ``.h5ad`` file or a
        ``.zarr`` store, a folder of these, or a list of all that.
    model
        A model, a checkpoint folder or a hub id to go on from; or a
        :class:`~stofm.nn.StofmConfig` for a new model. It is not changed: a copy is trained.
    out_dir
        Folder of the run: ``run.json``, ``history.csv``, ``checkpoints/`` and, at the end,
        ``model/``.
    stage
        ``"pretrain"``: the paper's schedule of ``"cell_encoder"`` (1 epoch), ``"spatial"`` (2) and
        ``"joint"`` (1). One of these; or one or several :class:`stofm.train.StageConfig`.
    validation
        Held-out slices, as `data`: whole slices, because cells of one slice tell of each other.
    epochs, optimizer
        Of every stage that is given by name, in place of the paper's.
    vocabulary
        Genes of a new model; fitted on `data` by default.
    gene_embeddings
        First gene embeddings: those of the model (``"random"`` in a new one), ``"coexpression"``,
        factors of the co-expression of genes over `data`, or a table (``.parquet``, ``.npz``,
        ``.tsv``, ``.csv``): genes in the first column, numbers in the others. Genes that it lacks
        keep theirs.
    layer, spatial_key, library_key
        Layer with raw counts (``X`` by default), entry of ``obsm`` with coordinates, column that
        names the slices.
    species, gene_key, orthologs
        How genes are found: see :func:`stofm.pp.map_genes`.
    table_key
        Table of a SpatialData.
    precision
        ``"32"``, ``"bf16-mixed"`` or (CUDA) ``"16-mixed"``.
    keep
        Weights that go on from a stage: ``"best"`` on the held-out slices, or ``"last"``.
    validate_every, patience
        Optimiser steps between validations (by default once per epoch), and how many without a
        lower loss end a stage.
    checkpoint_every, log_every
        Optimiser steps between checkpoints (by default one is written every 10 minutes), and
        between rows of the history.
    n_threads
        Threads that load ahead; does not change the result.
    tensorboard
        Write TensorBoard's files to ``out_dir/tensorboard``.
    seed
        Decides order, masks, noise, dropout and first weights.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    work_dir
        Where tokens and cell embeddings are kept; ``out_dir/work`` by default. Several runs may
        share it: what one computes anew as it trains stays in its `out_dir`.
    resume
        Go on with the run in `out_dir`, if there is one.
    overwrite
        Throw away the run in `out_dir`, if there is one.
    show_progress_bar
        Show bars.

    Returns
    -------
    The trained model, the history as a table, the paths of the best and the last checkpoint, and
    what ``run.json`` says.

    Raises
    ------
    FileExistsError
        `out_dir` holds a run and neither `resume` nor `overwrite` is set, or something else; or
        another process trains into it.
    FloatingPointError
        A loss is NaN or infinite; the message names step and slices.
    ValueError
        A slice or an option is not usable, or the run to go on with has other settings.

    References
    ----------
    SToFM (arXiv 2507.11588), sections 3.4 and A.1, table A.8.

    Examples
    --------
    >>> import stofm as st
    >>> slices = [st.datasets.simulate_slice(500, 100, seed=seed) for seed in range(3)]
    >>> result = st.tl.train(  # doctest: +SKIP
    ...     slices[:2], stage="spatial", validation=slices[2], out_dir="run"
    ... )
    >>> st.pl.training(result)  # doctest: +SKIP
    >>> st.tl.embed(slices[2], result.model)  # doctest: +SKIP
    """
    options = FileConfig(
        layer=layer,
        spatial_key=spatial_key,
        library_key=library_key,
        species=species,
        gene_key=gene_key,
        orthologs=orthologs,
        table_key=table_key,
    )
    stages = _stages(stage, epochs, optimizer)
    config = RunConfig(
        seed=seed,
        precision=precision,
        keep=keep,
        validate_every=validate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        n_threads=n_threads,
        tensorboard=tensorboard,
    )
    first_genes = read_gene_embeddings(gene_embeddings)
    folder = RunFolder(out_dir, work_dir)
    with _started(folder, device, precision, resume=resume, overwrite=overwrite) as processes:
        run = _Run(
            sources=find_sources(data, options),
            held_out=[] if validation is None else find_sources(validation, options),
            stages=stages,
            config=config,
            gene_embeddings=first_genes,
            folder=folder,
            processes=processes,
            show_progress_bar=show_progress_bar,
        )
        trained = _model(run, model, vocabulary)
        return run.train(trained, resume=resume, overwrite=overwrite)


def train_recipe(
    data: str | PathLike[str],
    recipe: Recipe,
    *,
    out_dir: str | PathLike[str],
    device: str | torch.device = "auto",
    work_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> TrainResult:
    """Train as a recipe says.

    Parameters
    ----------
    data
        Folder that the recipe's patterns of files refer to.
    recipe
        Data, model and stages.
    out_dir, device, work_dir, resume, overwrite, show_progress_bar
        As in :func:`train`.
    """

    def sources(files: Sequence[Path]) -> list[SliceSource]:
        return [SliceSource(f, f.stem, recipe.data.options_of(f, data)) for f in files]

    config = recipe.run
    first_genes = read_gene_embeddings(recipe.model.gene_embeddings)
    folder = RunFolder(out_dir, work_dir)
    with _started(
        folder, device, config.precision, resume=resume, overwrite=overwrite
    ) as processes:
        train_on, held_out = recipe.data.find(data)
        run = _Run(
            sources=sources(train_on),
            held_out=sources(held_out),
            stages=recipe.stages,
            config=config,
            gene_embeddings=first_genes,
            folder=folder,
            processes=processes,
            show_progress_bar=show_progress_bar,
        )
        model = _model_of_recipe(run, recipe.model)
        return run.train(model, resume=resume, overwrite=overwrite)


@contextmanager
def _started(
    folder: RunFolder,
    device: str | torch.device,
    precision: Precision,
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Processes]:
    """Processes that train together, of which the first has the run's folder to itself."""
    with Processes.start(device, precision) as processes, ExitStack() as stack:
        if processes.is_first:
            # Before hours of preparation.
            folder.check(resume=resume, overwrite=overwrite)
            stack.enter_context(locked(folder.path))
        yield processes


@dataclass(frozen=True, kw_only=True)
class _Run:
    """A run before its slices are prepared."""

    sources: Sequence[SliceSource]
    held_out: Sequence[SliceSource]
    stages: Sequence[StageConfig]
    config: RunConfig
    gene_embeddings: str | GeneTable
    folder: RunFolder
    processes: Processes
    show_progress_bar: bool

    def train(self, model: Stofm, *, resume: bool, overwrite: bool) -> TrainResult:
        """Prepare the slices, then train."""
        genes = self.gene_embeddings
        initialize = make_initializer(genes, model, seed=self.config.seed)
        pretraining = Pretraining(
            stages=self.stages,
            run=self.config,
            corpus=self.corpus(self.sources, model),
            validation=self.corpus(self.held_out, model) if self.held_out else None,
            folder=self.folder,
            processes=self.processes,
            initialize=initialize,
            gene_table="" if isinstance(genes, str) else f"{genes.file} {genes.digest}",
            show_progress_bar=self.show_progress_bar,
        )
        return pretraining.train(model, resume=resume, overwrite=overwrite)

    def corpus(self, sources: Sequence[SliceSource], model: Stofm) -> Any:
        """Prepare slices in the first process and open them in all."""
        folder = self.folder.work / "slices"
        keys = self._in_first(
            lambda: prepare_slices(sources, model, folder, show_progress_bar=self.show_progress_bar)
        )
        return open_corpus(folder, keys)

    def fitted_vocabulary(self) -> GeneVocabulary:
        """Fit a vocabulary on the slices to train on."""
        table = self._in_first(lambda: fit_vocabulary(self.sources, self.folder.work))
        return GeneVocabulary.from_tsv(table)

    def _in_first(self, compute: Callable[[], Any]) -> Any:
        """Compute in the first process, and give the result to all."""
        return self.processes.agree(compute() if self.processes.is_first else None)


def _stages(
    stage: Any, epochs: int | None, optimizer: OptimizerConfig | None
) -> tuple[StageConfig, ...]:
    given = (stage,) if isinstance(stage, StageConfig) else stage
    if not isinstance(given, str):
        if epochs is not None or optimizer is not None:
            msg = "epochs and optimizer are entries of StageConfig; leave out the arguments."
            raise ValueError(msg)
        if not given or not all(isinstance(one, StageConfig) for one in given):
            msg = f"stage must be a name or one or more StageConfig, found {stage!r}."
            raise TypeError(msg)
        return tuple(given)
    names = get_args(StageName)
    if given not in (*names, "pretrain"):
        msg = f"stage must be one of {['pretrain', *names]} or a StageConfig, found {given!r}."
        raise ValueError(msg)
    chosen = [s for s in paper_schedule(optimizer=optimizer) if given in (s.name, "pretrain")]
    return tuple(s if epochs is None else replace(s, epochs=epochs) for s in chosen)


def _model(run: _Run, model: Any, vocabulary: GeneVocabulary | None) -> Stofm:
    if not isinstance(model, StofmConfig):
        if vocabulary is not None:
            msg = "A model has its vocabulary already; `vocabulary` is for a new one (StofmConfig)."
            raise ValueError(msg)
        if isinstance(model, str | Path):
            return Stofm.from_pretrained(model)
        if not isinstance(model, Stofm):
            msg = (
                "model must be a Stofm, a StofmConfig, a folder or a hub id, found "
                f"{type(model).__name__}."
            )
            raise TypeError(msg)
        return model
    if vocabulary is not None:
        return Stofm(model, vocabulary, seed=run.config.seed)
    fitted = run.fitted_vocabulary()
    cell_encoder = replace(model.cell_encoder, n_tokens=fitted.n_tokens)
    return Stofm(replace(model, cell_encoder=cell_encoder), fitted, seed=run.config.seed)


def _model_of_recipe(run: _Run, source: ModelSource) -> Stofm:
    if source.checkpoint:
        model = Stofm.from_pretrained(source.checkpoint)
    else:
        vocabulary = _vocabulary_of_recipe(run, source.vocabulary)
        config = _config_of_recipe(source, vocabulary.n_tokens)
        model = Stofm(config, vocabulary, seed=run.config.seed)
    model.config = replace(
        model.config,
        name=source.name or model.name,
        provenance=source.provenance or model.config.provenance,
    )
    return model


def _vocabulary_of_recipe(run: _Run, vocabulary: str) -> GeneVocabulary:
    if vocabulary == "embedded":
        return embedded_vocabulary()
    return run.fitted_vocabulary() if vocabulary == "fit" else GeneVocabulary.from_tsv(vocabulary)


def _config_of_recipe(source: ModelSource, n_tokens: int) -> StofmConfig:
    preset = StofmConfig.mini(n_tokens) if source.preset == "mini" else StofmConfig.base(n_tokens)
    parts: dict[str, type[Any]] = {
        "cell_encoder": CellEncoderConfig,
        "se2_transformer": SE2TransformerConfig,
        "subslice": SubSliceConfig,
    }
    built = {
        name: build_dataclass(
            part,
            asdict(getattr(preset, name)) | getattr(source, name),
            "the recipe",
            f"model.{name}",
        )
        for name, part in parts.items()
    }
    return replace(preset, **built, max_tokens=source.max_tokens or preset.max_tokens)
