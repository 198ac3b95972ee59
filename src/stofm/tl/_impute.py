"""``stofm.tl.impute``: expression of genes that a slice does not measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm
from stofm.heads.imputation import impute_with
from stofm.heads.imputation_calls import check_call, learn, resolve_reference
from stofm.heads.options import DEFAULT_REP, FitOptions, Reading, check_whole_number
from stofm.heads.sections import resolve_slices

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from stofm.heads.genes import ImputationHead
    from stofm.heads.options import Strategy
    from stofm.nn import Stofm
    from stofm.spatial.splits import SplitRule


def impute(
    data: Any,
    *,
    genes: Sequence[str] | None = None,
    reference: Any = None,
    head: ImputationHead | None = None,
    model: Stofm | str | Path | None = None,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    strategy: Strategy = "frozen",
    n_neighbors: int | None = None,
    n_components: int | None = None,
    n_heads: int = 5,
    library_key: str | None = None,
    layer: str | None = None,
    reference_layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    split: SplitRule = "auto",
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obsm.IMPUTED,
    table_key: str | None = None,
    copy: bool = False,
    show_progress_bar: bool = True,
) -> Any:
    """Learn the expression of genes from slices that measure them, and impute it in others.

    There are three ways to call it::

        head = st.tl.impute(training, genes=["GFAP", "MBP"])  # learn
        st.tl.impute(query, head=head)  # impute
        head = st.tl.impute(query, reference=training)  # both, for all genes that the query lacks

    The genes to impute are taken out of the counts before anything else is done: they are in no
    token, rank or total that the model reads, neither of the training slices nor of the query.
    Cells are therefore embedded anew, on the genes that are left; stored embeddings, which may
    have seen the others, are not read. With `reference` only genes that the query has too are
    read, so that both look alike. Genes meet by their id in the model's vocabulary where both
    have one, so that symbols, Ensembl ids, human and mouse names may differ, else by name;
    columns of one gene are added up. A mapping by :func:`stofm.pp.map_genes` is used.

    Expression is ``log1p(10,000 x count / total)``, where the total is that of the genes that are
    read, of the training cell; genes that are imputed are in no total.

    Parameters
    ----------
    data
        Annotated data of one or several slices with raw counts and coordinates, or a SpatialData
        with such a table; or a list or dict of them, which are different slices.
    genes
        Genes to learn; with `head` those of its genes to impute; with `reference` those to
        impute, also ones that the query has, which are then held out. By default all.
    reference
        Slices to learn from, in the forms of `data`; `data` is then the query.
    head
        Fitted head to use instead.
    model
        Model to embed with: a :class:`stofm.Stofm`, a checkpoint folder or a hub id; the embedded
        ``"stofm-mini"`` by default.
    use_rep
        What the head reads: ``"X_stofm_cell"``, ``"X_stofm"``, or both, side by side. Other
        entries of ``obsm`` are read as they are, but for one scale for all columns of each: see to
        it yourself that they were made without the genes to impute. With `head` its own are read.
    strategy
        ``"frozen"`` fits heads on the embeddings. ``"lora"`` and ``"full"`` tune a copy of the
        model with the first of them; the head then carries that model.
    n_neighbors
        Neighbours whose mean further networks read; as in :func:`stofm.tl.annotate`.
    n_components
        Principal components of the log-normalised counts of the genes that are read, for networks
        beside those on the embeddings; 0 for none. By default 150 beside the embeddings of a
        model.
    n_heads
        Networks of each kind; their mean is the prediction. Each holds out its own cells, but with
        a tuned model, where they share them.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.
        A reference may lack it.
    layer
        Layer with raw counts; by default the one that was embedded, if any, else ``adata.X``. One
        that only the reference has is read there.
    reference_layer
        Layer of `reference` with raw counts; by default `layer`, if the reference has it.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit; by default the one that was
        embedded with.
    split
        How the tenth of the cells is held out that tells when to stop and how well a gene is
        predicted: ``"slices"``, ``"blocks"`` of the plane with a margin, ``"random"``, or
        ``"auto"``, which holds out whole slices from four slices on and blocks otherwise; see
        :func:`stofm.spatial.split_cells`. Neighbours resemble each other: a random split gives
        scores that are too good.
    seed
        Seed of splits, first weights and order of steps.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    key_added
        Entry of ``obsm`` to write.
    table_key
        Table of a SpatialData, of `data` and of `reference`.
    copy
        With `head`: return changed copies and leave `data` as it is.
    show_progress_bar
        Show bars.

    Returns
    -------
    The :class:`ImputationHead`; with `head` None, or with ``copy=True`` the new AnnData, in the
    form of `data`. Sets, with `head` or `reference`:

    ``adata.obsm['stofm_imputed']`` : DataFrame
        float32 (n_obs, n_genes) log-normalised expression, not negative.
    ``adata.uns['stofm']['stofm_imputed']`` : dict
        Parameters, among them the names of the genes that were read, whose counts are the total;
        and fingerprints of the embedding's model.

    Raises
    ------
    ImportError
        ``strategy="lora"`` without peft.
    KeyError
        A column, an entry or a layer is not there.
    TypeError
        `head` is no head for imputation.
    ValueError
        Arguments contradict each other, an option is not usable, genes are unknown or constant,
        no gene is left to read, the query has less than a tenth of the genes that the head
        reads, or the model is another one than the head's.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, for the head.

    Examples
    --------
    >>> import stofm as st
    >>> training = st.datasets.simulate_slice(500, 100, seed=0)
    >>> query = st.datasets.simulate_slice(400, 100, seed=1)[:, :90].copy()
    >>> head = st.tl.impute(query, reference=training)
    >>> query.obsm["stofm_imputed"].shape, len(head.gene_scores)
    ((400, 10), 10)
    """
    check_call(genes=genes, reference=reference, head=head, copy=copy)
    check_whole_number("n_heads", n_heads, least=1)
    options = FitOptions(
        use_rep=use_rep,
        model=model,
        strategy=strategy,
        n_neighbors=n_neighbors,
        n_components=n_components,
        n_heads=n_heads,
        split=split,
        seed=seed,
        reading=Reading(
            library_key=library_key,
            layer=layer,
            spatial_key=spatial_key,
            device=device,
            show_progress_bar=show_progress_bar,
        ),
    )
    sections = resolve_slices(
        data,
        library_key,
        spatial_key=spatial_key,
        table_key=table_key,
        copy=copy,
        role="" if reference is None else "query",
    )
    if head is not None:
        target = sections.copied() if copy else sections
        impute_with(target, head, options, key_added, genes)
        return target.as_given() if copy else None
    training = None
    if reference is not None:
        training = resolve_reference(reference, library_key, spatial_key, table_key)
    return learn(sections, training, options, genes, reference_layer, key_added)
