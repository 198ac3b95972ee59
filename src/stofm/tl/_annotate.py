"""``stofm.tl.annotate``: cell types and regions, learnt from labelled cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stofm._keys import Obs, Obsm
from stofm.heads.annotation import AnnotationHead, learn_classes
from stofm.heads.head import require_head
from stofm.heads.request import (
    DEFAULT_REP,
    HeadOptions,
    Request,
    resolve_reference,
    resolve_slices,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from stofm.nn import Stofm


def annotate(
    data: Any,
    label_key: str | None = None,
    *,
    reference: Any = None,
    head: AnnotationHead | None = None,
    model: Stofm | str | Path | None = None,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    options: HeadOptions | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obs.ANNOTATION,
    table_key: str | None = None,
    copy: bool = False,
    show_progress_bar: bool = True,
) -> Any:
    """Learn cell types or regions from labelled cells, and name those of other cells.

    There are three ways to call it::

        head = st.tl.annotate(labelled, label_key="cell_type")  # learn
        st.tl.annotate(query, head=head)  # name
        head = st.tl.annotate(query, reference=labelled, label_key="cell_type")  # both

    The query may be another slice, have other genes, or be of another species. Members of the head
    use embeddings, principal components of expression, or either beside the mean over a cell's
    neighbours; held-out cells decide how much each counts. Where a query lacks coordinates, raw
    counts or nearly all of the genes, members that need them have no vote, and a warning says so.
    Neighbours are those in `data`: pass whole slices, and choose cells afterwards. Cells without
    embeddings are embedded first; call :func:`stofm.tl.embed` yourself to set other options. Most
    calls need `label_key`, `head` and `library_key`; the rest is for special cases.

    A cell is ``"unknown"`` if the probability of its likeliest class is low and its embedding lies far
    from those of the labelled cells. The thresholds reject at most a share ``reject_rate`` of the
    held-out labelled cells that are rightly named. Beside it stand a prediction set, which has a
    cell's class with a stated probability if the cell is like the held-out ones, and a novelty: how
    far a cell lies from labelled cells, and how little it supports any class. Cells of a class that
    the labelled cells lack are found only in part; :func:`stofm.tl.novel` groups them.

    Parameters
    ----------
    data
        Annotated data of one or several slices, or a SpatialData with such a table; or a list or
        dict of them, which are different slices.
    label_key
        Column of ``obs`` with the labels to learn.
    reference
        Labelled slices to learn from, in the forms of `data`, which is then the query.
    head
        Fitted head to use instead.
    model
        Model whose embeddings are used: a :class:`stofm.Stofm`, a checkpoint folder or a hub id.
        By default the one that made the stored embeddings, or the embedded ``"stofm-mini"``.
    use_rep
        Entry of ``obsm`` to learn from, or several, which are put side by side. All columns of one
        are divided by the same number: principal components need no scaling, columns of different
        units do. A head uses those that it was fitted to.
    options
        How the head is fitted, see :class:`stofm.tl.HeadOptions`.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.

    Returns
    -------
    With `label_key` the :class:`AnnotationHead`. With `head` None, or with ``copy=True`` the new
    AnnData, in the form of `data`. Sets, with `head` or `reference`:

    ``adata.obs['stofm_annotation']`` : category
        Likeliest class of each cell, or ``"unknown"``.
    ``adata.obs['stofm_annotation_confidence']`` : float32
        Probability of the likeliest class.
    ``adata.obsm['stofm_annotation_proba']`` : DataFrame
        Probabilities of all classes, (n_obs, n_classes), calibrated by temperature. A ``/`` in a
        class is ``_`` in its column, which files need; ``head.classes`` has the names.
    ``adata.obsm['stofm_annotation_set']`` : DataFrame
        Boolean, (n_obs, n_classes), with the same columns: the classes of a cell's prediction set, of
        which the likeliest is always one. ``head.sets`` has the threshold, and the size and coverage
        on held-out cells.
    ``adata.obs['stofm_novelty']`` : float32
        How new a cell is: 0 for a typical held-out labelled cell, above 1 for one in twenty of them.
        With another `key_added` it is called after that, ``'key_novelty'``.
    ``adata.uns['stofm']['stofm_annotation']`` : dict
        Parameters, and fingerprints of the embedding's model.
    ``adata.obsm['X_stofm']`` and others
        What :func:`stofm.tl.embed` writes, if it was missing (also while fitting).

    Other Parameters
    ----------------
    layer
        Layer with raw counts; by default ``X``, or the layer that was embedded.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit.
    seed
        Seed of splits, first weights and order of steps.
    device
        ``"auto"`` (CUDA, then MPS, then CPU) or a torch device.
    key_added
        Column of ``obs`` to write.
    table_key
        Table of a SpatialData.
    copy
        Return changed copies and leave `data` as it is; when fitting, write no embeddings to it.
    show_progress_bar
        Show bars.

    Raises
    ------
    KeyError
        A column, an entry or a layer is not there.
    TypeError
        `head` is no head for annotation.
    ValueError
        `label_key` and `head` are both given or both missing, an option is not usable, there are
        fewer than two classes, a class has a single cell or is called "unknown", `key_added` would
        replace something else, or embeddings are from another model than the head's, or of other
        counts or coordinates than there are now.

    See Also
    --------
    stofm.tl.HeadOptions : how a head is fitted.
    stofm.tl.novel : groups cells that no class supports.
    stofm.pl.annotation : map, confusion matrix and reliability.
    stofm.tl.deconvolve : the same for spots of several cells.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, for the head. Guo et al. 2017, On
    calibration of modern neural networks (ICML): temperature. Sun et al. 2022, Out-of-distribution
    detection with deep nearest neighbors (ICML): the distance. Liu et al. 2020, Energy-based
    out-of-distribution detection (NeurIPS). Sadinle, Lei and Wasserman 2019, Least ambiguous
    set-valued classifiers with bounded error levels (J Am Stat Assoc 114:223): the sets.

    Examples
    --------
    >>> import stofm as st
    >>> labelled = st.datasets.simulate_slice(500, 100, seed=0)
    >>> query = st.datasets.simulate_slice(400, 100, seed=1)
    >>> head = st.tl.annotate(labelled, label_key="cell_type")
    >>> st.tl.annotate(query, head=head)
    >>> set(query.obs["stofm_annotation"]) <= {*head.classes, "unknown"}
    True
    """
    require_head(head, AnnotationHead)
    if (label_key is None) == (head is None):
        given = "both" if head is not None else "neither"
        raise ValueError(f"Pass label_key= to fit a head, or head= to use one; found {given}.")
    if reference is not None and (head is not None or copy):
        what = "head=" if head is not None else "copy=True; pass data.copy() if need be"
        raise ValueError(f"reference= fits a head, which is returned; it does not go with {what}.")
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
    assert label_key is not None
    if reference is None:
        return learn_classes(slices.copied() if copy else slices, request, label_key)
    AnnotationHead.refuse_key(slices, key_added, request, request.reps)
    labelled, request, own = resolve_reference(slices, reference, request, table_key)
    head = learn_classes(labelled, own, label_key)
    head.apply(slices, request, key_added)
    return head
