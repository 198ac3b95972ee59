"""``stofm.tl.deconvolve``: proportions of cell types in spots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm
from stofm.heads.deconvolution import (
    DeconvolutionHead,
    learn_known,
    learn_reference,
    learn_squares,
)
from stofm.heads.head import require_head
from stofm.heads.request import DEFAULT_REP, HeadOptions, Request, resolve_slices

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from stofm.nn import Stofm


def deconvolve(
    data: Any,
    label_key: str | None = None,
    *,
    reference: Any = None,
    head: DeconvolutionHead | None = None,
    proportions_key: str | Sequence[str] | None = None,
    spot_size: float | None = None,
    model: Stofm | str | Path | None = None,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    options: HeadOptions | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
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

    Simulated spots have the shared genes, as many counts as the measured spots, and each gene is
    detected as well as there; some are pure, some mixed. Proportions are of cells, not of
    transcripts. The estimate is the mean over the members of the head. Their deviation is large where
    the head is unsure, but says nothing about types that the reference lacks.

    Most calls need `reference` and `label_key`; the rest is for special cases.

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
        or dict of them. Coordinates are not needed.
    label_key
        Column of ``obs`` with the types: of `reference`, or of `data` with `spot_size`.
    spot_size
        Side of the squares, in the unit of the coordinates. Cells without a type are left out.
    head
        Fitted head to use instead.
    model
        A :class:`stofm.Stofm`, a checkpoint folder or a hub id. By default the one that made the
        stored embeddings, or the embedded ``"stofm-mini"``. Not used with `reference`.
    use_rep
        Entry of ``obsm`` to learn from, or several, which are put side by side; all columns of one
        are divided by the same number. Not used with `reference`: simulated spots have no position,
        and their head uses 50 principal components of the shared genes.
    options
        How the head is fitted, see :class:`stofm.tl.HeadOptions`.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.

    Returns
    -------
    With `head` None, or with ``copy=True`` the new AnnData, in the form of `data`; else the
    :class:`DeconvolutionHead`. Sets, with `head` or `reference`:

    ``adata.obsm['stofm_deconvolution']`` : DataFrame
        Proportions, (n_obs, n_types), not negative; rows sum to 1. A ``/`` in a type is ``_`` in
        its column, which files need; ``head.types`` has the names.
    ``adata.obsm['stofm_deconvolution_std']`` : DataFrame
        Standard deviation between the members of the head.
    ``adata.uns['stofm']['stofm_deconvolution']`` : dict
        Parameters, and fingerprints of the model.
    ``adata.obsm['X_stofm']`` and others
        What :func:`stofm.tl.embed` writes, if it was missing; not for a head from `reference`.

    Other Parameters
    ----------------
    layer
        Layer of `data` with raw counts; ``X`` by default.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit.
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
        cell, `key_added` would replace something else, or embeddings are from another model than
        the head's, or of other counts or coordinates than there are now.

    See Also
    --------
    stofm.tl.HeadOptions : how a head is fitted.
    stofm.pl.deconvolution : maps or pies of the proportions.
    stofm.tl.annotate : one type per cell.

    Notes
    -----
    With `reference`, spots are simulated in two rounds. The first takes all types for equally frequent; what it
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
    >>> options = st.tl.HeadOptions(spots=st.spatial.SpotRules(n_spots=1000))
    >>> head = st.tl.deconvolve(query, reference=cells, label_key="cell_type", options=options)
    >>> bool((query.obsm["stofm_deconvolution"].sum(axis=1).round(6) == 1).all())
    True
    """
    require_head(head, DeconvolutionHead)
    ways = {
        "proportions_key": proportions_key,
        "reference": reference,
        "spot_size": spot_size,
        "head": head,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) != 1:
        raise ValueError(
            "Pass one of proportions_key= (spots with known proportions), reference= (single "
            "cells), spot_size= (slices of single cells to sum into spots), or head= (a fitted "
            f"head); found {given or 'none'}."
        )
    if given[0] in ("reference", "spot_size") and label_key is None:
        raise ValueError(
            f"{given[0]}= needs label_key=, the column of obs with the types of the cells."
        )
    if reference is not None and copy:
        raise ValueError(
            "copy=True does not go with reference=, which returns the head. Pass data.copy(), or "
            "use the returned head: st.tl.deconvolve(data, head=head, copy=True)."
        )
    options = options or HeadOptions()
    request = Request(
        model, use_rep, library_key, layer, spatial_key, seed, device, show_progress_bar, options
    )
    role = "" if reference is None else "query"
    slices = resolve_slices(data, library_key, spatial_key, table_key, copy=copy, role=role)
    if head is not None:
        target = slices.copied() if copy else slices
        head.apply(target, request, key_added)
        return target.as_given() if copy else None
    if proportions_key is not None:
        return learn_known(slices.copied() if copy else slices, proportions_key, request)
    assert label_key is not None
    if spot_size is not None:
        return learn_squares(slices, spot_size, label_key, request)
    DeconvolutionHead.refuse_key(slices, key_added, request, ())
    head = learn_reference(slices, reference, label_key, request)
    head.apply(slices, request, key_added)
    return head
