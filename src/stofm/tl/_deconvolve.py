"""``stofm.tl.deconvolve``: the share of each cell type in spots of many cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm
from stofm.heads.deconvolution_calls import (
    LabelOptions,
    ReferenceCells,
    check_way,
    chosen_way,
    learn_proportions,
    learn_reference,
    learn_squares,
)
from stofm.heads.labels import MISSING
from stofm.heads.options import DEFAULT_REP, FitOptions, Reading, check_whole_number
from stofm.heads.sections import resolve_slices
from stofm.heads.spots import DeconvolutionHead, deconvolve_with
from stofm.spatial.spots import SpotRules

pass

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    import torch

    from stofm.heads.options import Strategy
    from stofm.nn import Stofm
    from stofm.spatial.splits import SplitRule


def deconvolve(
    data: Any,
    *,
    proportions_key: str | Sequence[str] | None = None,
    reference: Any = None,
    label_key: str | None = None,
    spot_size: float | None = None,
    head: DeconvolutionHead | None = None,
    model: Stofm | str | Path | None = None,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    strategy: Strategy = "frozen",
    n_heads: int = 3,
    library_key: str | None = None,
    layer: str | None = None,
    reference_layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    missing: Collection[object] = MISSING,
    min_share: float = 0.0,
    spots: SpotRules | None = None,
    n_neighbors: int | None = None,
    n_components: int | None = None,
    split: SplitRule = "auto",
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obsm.DECONVOLUTION,
    table_key: str | None = None,
    copy: bool = False,
    show_progress_bar: bool = True,
) -> Any:
    """Estimate what share of the cells of each spot is of which type.

    There are three ways to learn it. Each fits a head and returns it:

    - `reference` and `label_key`: from single cells with types, of the same kind of tissue. Spots
      are simulated from them that look like those of `data`, and `data` gets its proportions::

          head = st.tl.deconvolve(visium, reference=cells, label_key="cell_type")

    - `proportions_key`: from spots whose proportions are known.
    - `spot_size` and `label_key`: from slices with single cells and types, which are summed into
      squares of this size.

    With `head` it finds the proportions of other spots::

        st.tl.deconvolve(visium, head=head)

    Simulated spots have the genes that both sides have, as many counts as the measured spots, and
    each gene as well seen as there; they are pure, mixed, and all in between. Numbers of cells
    count, not of transcripts. Several networks with different beginnings are fitted; their mean is
    the estimate. Their spread is large where the head is unsure, but says nothing about types that
    the reference lacks.

    Parameters
    ----------
    data
        Annotated data of one or several slices with raw counts, or a SpatialData with such a
        table; or a list or dict of them, which are different slices.
    proportions_key
        Entry of ``obsm`` with the known proportions, (n_obs, n_types): a DataFrame, or an array
        whose types may be named in ``uns[proportions_key + "_names"]``; or a list of columns of
        ``obs``. Spots with NaN are left out.
    reference
        Single cells with raw counts and types: AnnData, SpatialData with a single table, or a list
        or dict of them. Places are not needed.
    label_key
        Column of ``obs`` with the types: of `reference`, or of `data` with `spot_size`.
    spot_size
        Side of the squares, in the unit of the coordinates. Cells without a type are left out.
    head
        Fitted head to use instead.
    model
        A :class:`stofm.Stofm`, a checkpoint folder or a hub id. By default the one that made the
        stored embeddings, or the embedded ``"stofm-mini"``.
    use_rep
        Entry of ``obsm`` to learn from, or several, which are put side by side; all columns of one
        are divided by the same number. Not read with `reference`: simulated spots have no place.
        Their head reads cell embeddings of the shared genes, and `n_components`.
    strategy
        ``"frozen"`` fits heads on the embeddings, in seconds. ``"lora"`` and ``"full"`` go on to
        tune a copy of the model, which the head then carries; not with `reference`.
    n_heads
        Networks to fit; of each kind, if there are others beside those on the embeddings. With
        `reference` each is fitted to simulated spots of its own.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.
    layer, reference_layer
        Layers of `data` and of `reference` with raw counts; ``X`` by default.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit.
    missing
        Labels that stand for none, in whatever case, besides NaN and blank ones: by default
        all that reads as unknown, unassigned, other, missing, ambiguous, a doublet or of low
        quality, such as ``"Unlabelled"``, ``"N/A"``, ``"?"`` and ``"Unknown cells"``.
    min_share
        Types with a smaller share of the labelled cells are left out.
    spots
        With `reference`: how many spots to simulate, of how many cells each.
    n_neighbors
        Nearest neighbours over which ``X_stofm_cell`` and components of expression are averaged,
        for further networks; as in :func:`stofm.tl.annotate`. Not read with `reference`.
    n_components
        Principal components of log-normalised counts that are read beside the embedding; 0 for
        none. With `reference` they are those of the shared genes, 50 by default. Else further
        networks read those of the genes that all spots have: 150 by default beside the embeddings
        of a model, if there are raw counts.
    split
        How a tenth of the spots is held out to stop early and to score: ``"slices"``,
        ``"blocks"`` of the plane with a margin, ``"random"``, or ``"auto"``, which holds out whole
        slices from four slices on and blocks otherwise; see :func:`stofm.spatial.split_cells`. Not
        read with `reference`, where all are independent.
    seed
        Seed of splits, simulation, first weights and order of steps.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    key_added
        Entry of ``obsm`` to write.
    table_key
        Table of a SpatialData; not of the reference.
    copy
        With `head`: return changed copies and leave `data` as it is. With `proportions_key`: write
        no embeddings to `data`. Not with `reference`, which writes to `data` and returns a head.
    show_progress_bar
        Show bars.

    Returns
    -------
    With `head` None, or with ``copy=True`` the new AnnData, in the form of `data`; else the
    :class:`DeconvolutionHead`. Sets, with `head` or `reference`:

    ``adata.obsm['stofm_deconvolution']`` : DataFrame
        Proportions, (n_obs, n_types), not negative; rows sum to 1. A ``/`` in a type is ``_`` in
        its column, which files need; ``head.types`` has the names.
    ``adata.obsm['stofm_deconvolution_std']`` : DataFrame
        Standard deviation between the networks; not for a single one.
    ``adata.uns['stofm']['stofm_deconvolution']`` : dict
        Parameters, and fingerprints of the model.
    ``adata.obsm['X_stofm']`` and others
        What :func:`stofm.tl.embed` writes, if it was missing; not for a head from `reference`.

    Raises
    ------
    ImportError
        ``strategy="lora"`` without peft.
    KeyError
        An entry, a column, a layer or a table is not there, or the reference has several tables.
    TypeError
        `head` is no head for deconvolution.
    ValueError
        Not one way is chosen, an option is not usable or does not go with it, proportions are
        negative or don't sum to 1, there are fewer than 20 spots with known ones, query and
        reference share fewer than 10 genes, there are fewer than two types or one has a single
        cell, `key_added` would replace something else, or embeddings are by another model than
        the head's, or of other counts or coordinates than there are now.

    Notes
    -----
    Spots are simulated in two rounds. The first takes all types for equally frequent; what it
    finds in the query on average sets, for the second, how frequent types are and by which factor
    each gene differs between the technologies.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, for known proportions. Menden et al.
    2020, Deep learning-based cell composition analysis from tissue expression profiles (Sci Adv
    6:eaba2619): networks on simulated mixtures. Cable et al. 2022, Robust decomposition of cell
    type mixtures in spatial transcriptomics (Nat Biotechnol 40:517): factors of genes.

    Examples
    --------
    >>> import stofm as st
    >>> cells = st.datasets.simulate_slice(600, 100, seed=0)
    >>> query = st.datasets.simulate_slice(300, 100, seed=1)
    >>> rules = st.spatial.SpotRules(n_spots=1000)
    >>> head = st.tl.deconvolve(query, reference=cells, label_key="cell_type", spots=rules)
    >>> bool((query.obsm["stofm_deconvolution"].sum(axis=1).round(6) == 1).all())
    True
    """
    way = chosen_way(
        proportions_key=proportions_key, reference=reference, spot_size=spot_size, head=head
    )
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
    labels = LabelOptions(label_key, missing, min_share)
    check_way(way, options, labels, copy=copy)
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
        deconvolve_with(target, head, options, key_added)
        return target.as_given() if copy else None
    if proportions_key is not None:
        return learn_proportions(sections, proportions_key, options, copy=copy)
    if spot_size is not None:
        return learn_squares(sections, spot_size, labels, options)
    cells = ReferenceCells(reference, reference_layer, labels)
    return learn_reference(sections, cells, spots or SpotRules(), options, key_added)
