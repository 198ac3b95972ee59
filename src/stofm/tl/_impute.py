"""``stofm.tl.impute``: expression of genes that a slice does not measure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm
from stofm.heads.head import require_head
from stofm.heads.imputation import ImputationHead, learn_genes
from stofm.heads.request import DEFAULT_REP, HeadOptions, Request, resolve_slices

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from stofm.nn import Stofm


def impute(
    data: Any,
    genes: Sequence[str] | None = None,
    *,
    reference: Any = None,
    head: ImputationHead | None = None,
    model: Stofm | str | Path | None = None,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    options: HeadOptions | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
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

    The genes to impute are taken out of the counts before anything else is done, in the training
    slices and in the query: no token, rank or total contains them. Cells are therefore embedded
    again, on the genes that are left; stored embeddings, which may have seen the others, are not
    used. With `reference` only genes that the query has too are used, so that both look alike.
    Genes are matched by their id in the model's vocabulary where both have one, so that symbols,
    Ensembl ids, human and mouse names may differ, else by name; columns of one gene are added up.
    A mapping by :func:`stofm.pp.map_genes` is used.

    Expression is ``log1p(10,000 x count / total)``, with the total over the genes that are used.

    Most calls need `reference`, or `genes` and later `head`; the rest is for special cases.

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
        What the head uses: ``"X_stofm_cell"``, ``"X_stofm"``, or both, side by side. Other
        entries of ``obsm`` are used as they are, but for one scale for all columns of each: make
        sure that they were made without the genes to impute. With `head`, its own are used.
    options
        How the head is fitted, see :class:`stofm.tl.HeadOptions`.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.
        A reference may lack it.

    Returns
    -------
    The :class:`ImputationHead`; with `head` None, or with ``copy=True`` the new AnnData, in the
    form of `data`. Sets, with `head` or `reference`:

    ``adata.obsm['stofm_imputed']`` : DataFrame
        float32 (n_obs, n_genes) log-normalised expression, not negative.
    ``adata.uns['stofm']['stofm_imputed']`` : dict
        Parameters, among them the names of the genes that were used, whose counts are the total;
        and fingerprints of the embedding's model.

    Other Parameters
    ----------------
    layer
        Layer with raw counts; by default the one that was embedded, if any, else ``adata.X``. One
        that only the reference has is used there.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit; by default the one that was
        embedded with.
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
        no gene is left to use, the query has less than a tenth of the genes that the head
        uses, or the model is not the head's.

    See Also
    --------
    stofm.tl.HeadOptions : how a head is fitted.
    stofm.pl.imputation : draws imputed beside measured values.
    stofm.tl.predict_genes : expression from the tissue's image.

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
    require_head(head, ImputationHead)
    if head is not None and reference is not None:
        raise ValueError("head= is fitted already: leave out reference=, or leave out head=.")
    if head is None and reference is None and genes is None:
        raise ValueError(
            "Pass genes= to learn some genes of these slices, reference= to learn from other "
            "slices the genes that these lack, or head= to use what was learnt."
        )
    if copy and head is None:
        what = "nothing is written to data" if reference is None else "the head is returned"
        raise ValueError(f"copy=True is for head=; without it {what}. Pass data.copy() if need be.")
    options = options or HeadOptions()
    request = Request(
        model, use_rep, library_key, layer, spatial_key, seed, device, show_progress_bar, options
    )
    role = "" if reference is None else "query"
    slices = resolve_slices(data, library_key, spatial_key, table_key, copy=copy, role=role)
    if head is not None:
        target = slices.copied() if copy else slices
        head.apply(target, request, key_added, genes)
        return target.as_given() if copy else None
    return learn_genes(slices, reference, request, genes, key_added, table_key)
