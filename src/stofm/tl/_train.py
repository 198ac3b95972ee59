"""``stofm.tl.train``: pretraining on AnnData and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stofm.corpus.sources import FileConfig, find_sources
from stofm.train.config import RunConfig
from stofm.train.recipe import choose_stages, find_model, launch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from os import PathLike
    from pathlib import Path

    import torch

    from stofm.corpus.sources import SliceSource
    from stofm.genes import GeneVocabulary
    from stofm.nn import Stofm, StofmConfig
    from stofm.train.config import Keep, OptimizerConfig, Precision, StageConfig, StageName
    from stofm.train.run import TrainResult


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
    mixture: Mapping[str, Mapping[str, float]] | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    work_dir: str | PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> TrainResult:
    """Train a model on slices without labels, from scratch or from a checkpoint.

    Counts are read once, file by file and in blocks of cells, and kept as gene tokens in the work
    folder; once more before that if a vocabulary is fitted. A file that has not changed is not read
    again. A file of several slices has all its tokens in memory while it is read. A run that was
    stopped at any moment continues with ``resume=True`` and ends as if nothing had happened.
    Started by ``torchrun`` or SLURM, the processes share each batch and arrive at the weights that
    one process would, up to rounding and dropout.

    Most calls need `out_dir`, `stage`, `validation` and `library_key`; the rest is for special cases.

    Parameters
    ----------
    data
        Slices to train on: an AnnData or SpatialData, the path of an ``.h5ad`` file or a
        ``.zarr`` store, a folder of these or of a corpus (:func:`stofm.corpus.build`), or a list of all
        that.
    model
        A model, a checkpoint folder or a hub id to start from; or a
        :class:`~stofm.nn.StofmConfig` for a new model. It is not changed: a copy is trained.
    out_dir
        Folder of the run: ``run.json``, ``history.csv``, ``checkpoints/`` and, at the end,
        ``model/``.
    stage
        ``"pretrain"``: the paper's schedule of ``"cell_encoder"`` (1 epoch), ``"spatial"`` (2) and
        ``"joint"`` (1). One of these; or one or several :class:`stofm.train.StageConfig`.
    validation
        Held-out slices, as `data`: whole slices, because cells of one slice resemble each other.
    epochs, optimizer
        Of every stage that is given by name, in place of the paper's.
    vocabulary
        Genes of a new model; fitted on `data` by default.
    layer, spatial_key, library_key
        Layer with raw counts (``X`` by default), entry of ``obsm`` with coordinates, column that
        names the slices.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    resume
        Continue the run in `out_dir`, if there is one.
    overwrite
        Throw away the run in `out_dir`, if there is one.

    Returns
    -------
    The trained model, the history as a table, the paths of the best and the last checkpoint, and
    what ``run.json`` says.

    Other Parameters
    ----------------
    gene_embeddings
        First gene embeddings: those of the model (``"random"`` in a new one), ``"coexpression"``,
        factors of the co-expression of genes over `data`, or a table (``.parquet``, ``.npz``,
        ``.tsv``, ``.csv``): genes in the first column, numbers in the others. Genes that it lacks
        keep theirs.
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
    mixture
        Weights of slices by a column of the corpus' manifest (``technology``, ``species``, ...) and a
        value there, such as ``{"technology": {"Visium": 0.2}}``: see
        :class:`stofm.train.RunConfig`.
    seed
        Decides order, masks, noise, dropout and first weights.
    work_dir
        Where tokens and cell embeddings are kept; ``out_dir/work`` by default. Several runs may
        share it: what a run computes again as it trains stays in its `out_dir`.
    show_progress_bar
        Show bars.

    Raises
    ------
    FileExistsError
        `out_dir` holds a run and neither `resume` nor `overwrite` is set, or something else; or
        another process trains into it.
    FloatingPointError
        A loss is NaN or infinite; the message names step and slices.
    ValueError
        A slice or an option is not usable, or the run to continue has other settings.

    See Also
    --------
    stofm.pl.training : draws the losses.
    stofm.corpus.build : gathers thousands of slices to train on.
    stofm.train.StageConfig : what happens in a stage.

    References
    ----------
    SToFM (arXiv 2507.11588), sections 3.4 and A.1, table A.8.

    Examples
    --------
    >>> import stofm as st
    >>> a, b, c = (st.datasets.simulate_slice(300, 40, seed=seed) for seed in range(3))
    >>> result = st.tl.train([a, b], stage="spatial", validation=c, out_dir="run")
    >>> st.tl.embed(c, result.model)  # or st.tl.embed(c, "run/model")
    >>> c.uns["stofm"]["X_stofm"]["model"] == result.model.name
    True
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
    run = RunConfig(
        seed=seed,
        precision=precision,
        keep=keep,
        validate_every=validate_every,
        patience=patience,
        checkpoint_every=checkpoint_every,
        log_every=log_every,
        n_threads=n_threads,
        tensorboard=tensorboard,
        mixture={column: dict(own) for column, own in (mixture or {}).items()},
    )

    def find() -> tuple[list[SliceSource], list[SliceSource]]:
        held_out = [] if validation is None else find_sources(validation, options)
        return find_sources(data, options), held_out

    return launch(
        find,
        lambda fit: find_model(model, vocabulary, fit, seed=seed),
        stages=choose_stages(stage, epochs, optimizer),
        run=run,
        gene_embeddings=gene_embeddings,
        out_dir=out_dir,
        device=device,
        work_dir=work_dir,
        resume=resume,
        overwrite=overwrite,
        show_progress_bar=show_progress_bar,
    )
