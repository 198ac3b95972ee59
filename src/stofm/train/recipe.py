"""Recipes (a whole run in TOML), and the start of a run from a recipe or from arguments."""

from __future__ import annotations

import copy
import tomllib
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from stofm._config import Checked, build_dataclass
from stofm._files import local
from stofm._messages import warn
from stofm.corpus.manifest import is_corpus
from stofm.corpus.preparation import fit_vocabulary, open_corpus, prepare_slices
from stofm.corpus.sources import FileConfig, SliceSource, divide_corpus
from stofm.genes import GeneVocabulary, embedded_vocabulary
from stofm.nn import Stofm, StofmConfig
from stofm.train.config import OptimizerConfig, RunConfig, StageConfig, StageName
from stofm.train.folder import RunFolder, locked
from stofm.train.gene_embeddings import (
    WORDS,
    make_initializer,
    read_gene_embeddings,
    require_gene_embeddings,
)
from stofm.train.processes import Processes
from stofm.train.run import Pretraining, TrainResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    import torch

    from stofm.corpus.reader import Corpus

    #: Function that fits a vocabulary on the training slices.
    Fit = Callable[[], GeneVocabulary]

Preset = Literal["mini", "base"]
#: Parts of a model's config that a recipe may change.
_PARTS = ("cell_encoder", "se2_transformer", "subslice")


def read_toml(file: Path) -> dict[str, Any]:
    """Read the tables of a recipe."""
    if not file.is_file():
        raise FileNotFoundError(f"There is no recipe {file}.")
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid TOML: {error}.") from error


def paper_schedule(
    *, epochs: tuple[int, int, int] = (1, 2, 1), optimizer: OptimizerConfig | None = None
) -> tuple[StageConfig, ...]:
    """Return the paper's stages: cell encoder, SE(2) Transformer, both.

    Parameters
    ----------
    epochs
        Epochs of each stage.
    optimizer
        Optimiser of all stages; that of table A.8 by default.

    References
    ----------
    SToFM (arXiv 2507.11588), section 4.1 and table A.8.
    """
    named = zip(get_args(StageName), epochs, strict=True)
    chosen = optimizer or OptimizerConfig()
    return tuple(StageConfig(name=name, epochs=n, optimizer=chosen) for name, n in named)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which files of a folder to train and validate on.

    Attributes
    ----------
    train, validation, exclude
        Patterns of ``.h5ad`` files and ``.zarr`` stores, relative to the data folder. Files matched
        by `validation` are not trained on; those matched by `exclude` are used for neither.
    options
        How files are read.
    """

    train: tuple[str, ...] = ("*.h5ad", "*.zarr")
    validation: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    options: tuple[FileConfig, ...] = ()

    def find(self, folder: str | PathLike[str]) -> tuple[list[Path], list[Path]]:
        """Find the files to train on and those to validate on, in alphabetical order.

        A pattern of `exclude` that matches nothing gets a warning, as it may be misspelt.

        Raises
        ------
        FileNotFoundError
            The folder does not exist, or a pattern of `train` or `validation` matches no file.
        """
        root = local(folder)
        if not root.is_dir():
            raise FileNotFoundError(f"There is no data folder {root}.")
        patterns = (*self.train, *self.validation, *self.exclude)
        files = {pattern: set(root.glob(pattern)) for pattern in patterns}
        is_default = self.train == type(self)().train
        required = self.validation if is_default else (*self.train, *self.validation)
        if missing := [pattern for pattern in required if not files[pattern]]:
            raise FileNotFoundError(f"{missing[0]!r} names no file in {root}.")
        if unused := [pattern for pattern in self.exclude if not files[pattern]]:
            warn(
                f"exclude = {unused} names no file in {root}; check the spelling if one should be "
                "left out."
            )
        named, held_out, excluded = (
            set().union(*(files[pattern] for pattern in own))
            for own in (self.train, self.validation, self.exclude)
        )
        held_out -= excluded
        train = named - held_out - excluded
        if not train:
            raise FileNotFoundError(
                f"No file is left to train on in {root}: train = {list(self.train)} names "
                f"{len(named)} files, and validation and exclude take all of them away."
            )
        return sorted(train), sorted(held_out)

    def options_of(self, file: Path, folder: str | PathLike[str]) -> FileConfig:
        """Return how a file is read: the last table whose pattern matches it."""
        relative = file.relative_to(local(folder))
        fitting = [one for one in self.options if relative.match(one.files)]
        return fitting[-1] if fitting else FileConfig()


@dataclass(frozen=True, kw_only=True)
class ModelSource(Checked):
    """Which model to train.

    Attributes
    ----------
    checkpoint
        A folder, an built-in model or a hub id to continue from; empty: a new model.
    preset
        Sizes of a new model: ``"mini"`` or ``"base"``.
    name
        Name of the trained model; empty: that of the preset or checkpoint.
    vocabulary
        Vocabulary of a new model: ``"embedded"``, ``"fit"`` on the training slices, or the path of
        a table.
    gene_embeddings
        Initial gene embeddings: ``"random"``, those of the model; ``"coexpression"``, factors of the
        co-expression of genes over the training slices; or the path of a table, as in
        :func:`stofm.tl.train`, relative to the recipe.
    provenance
        Text of the model card on data, recipe and licence.
    cell_encoder, se2_transformer, subslice
        Entries that replace the preset's.
    max_tokens
        Genes kept per cell; None: as in the preset.
    """

    checkpoint: str = ""
    preset: Preset = "mini"
    name: str = ""
    vocabulary: str = "embedded"
    gene_embeddings: str = "random"
    provenance: str = ""
    cell_encoder: dict[str, Any] = field(default_factory=dict)
    se2_transformer: dict[str, Any] = field(default_factory=dict)
    subslice: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check each value and how they fit together."""
        super().__post_init__()
        require_gene_embeddings(self.gene_embeddings)
        sizes = (*_PARTS, "max_tokens")
        if self.checkpoint and (changes := [name for name in sizes if getattr(self, name)]):
            raise ValueError(
                f"A checkpoint's sizes can't be changed: leave out {changes}, or the checkpoint."
            )

    def config(self, n_tokens: int) -> StofmConfig:
        """Return the sizes of a new model: the preset with its changes."""
        preset = (StofmConfig.mini if self.preset == "mini" else StofmConfig.base)(n_tokens)
        parts: dict[str, Any] = {}
        for name in _PARTS:
            given = getattr(preset, name)
            entries = asdict(given) | getattr(self, name)
            parts[name] = build_dataclass(type(given), entries, "the recipe", f"model.{name}")
        return replace(preset, **parts, max_tokens=self.max_tokens or preset.max_tokens)

    def make(self, fit: Fit, *, seed: int) -> Stofm:
        """Make or load the model; `fit` fits a vocabulary on the training slices."""
        if self.checkpoint:
            model = Stofm.from_pretrained(self.checkpoint)
        else:
            makers: dict[str, Fit] = {"embedded": embedded_vocabulary, "fit": fit}
            make = makers.get(self.vocabulary)
            vocabulary = make() if make else GeneVocabulary.from_tsv(self.vocabulary)
            model = Stofm(self.config(vocabulary.n_tokens), vocabulary, seed=seed)
        provenance = self.provenance or model.config.provenance
        model.config = replace(model.config, name=self.name or model.name, provenance=provenance)
        return model


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: data, model and stages.

    Attributes
    ----------
    run
        Options of all stages.
    data
        Files to read.
    model
        Model to train.
    stages
        Stages, one after the other.
    """

    run: RunConfig
    data: DataConfig
    model: ModelSource
    stages: tuple[StageConfig, ...]

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> Recipe:
        """Read a recipe: tables ``[run]``, ``[data]``, ``[model]`` and one or more ``[[stage]]``.

        The path of a table of gene embeddings is relative to the recipe's folder.

        Raises
        ------
        ValueError
            The file is not valid TOML, or an entry is unknown (the nearest name is given), missing
            or invalid.
        """
        file = local(path)
        recipe = cls.from_dict(read_toml(file), file.name)
        model = recipe.model
        if model.gene_embeddings in WORDS:
            return recipe
        table = file.parent / local(model.gene_embeddings)
        return replace(recipe, model=replace(model, gene_embeddings=str(table)))

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], where: str = "the recipe") -> Recipe:
        """Build from plain tables, as :meth:`from_toml` reads them."""
        tables = build_dataclass(_Tables, entries, where)
        if not tables.stage:
            raise ValueError(
                f"{where} has no [[stage]]; add one, for example [[stage]] name = 'spatial'."
            )
        return cls(run=tables.run, data=tables.data, model=tables.model, stages=tables.stage)


@dataclass(frozen=True)
class _Tables:
    stage: tuple[StageConfig, ...]
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSource = field(default_factory=ModelSource)


def train_recipe(data: str | PathLike[str], recipe: Recipe, **options: Any) -> TrainResult:
    """Train with a recipe on the files of a folder `data`, or on a corpus.

    `options` are those of :func:`stofm.tl.train` that are not part of a recipe: `out_dir`,
    `device`, `work_dir`, `resume`, `overwrite`, `show_progress_bar`.
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
            # Checked before hours of preparation.
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
