"""``stofm.tl.annotate``: cell types and regions, learnt from labelled cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from stofm._keys import Obs, Obsm
from stofm.heads.annotation import AnnotationHead, AnnotationTask, annotate_with
from stofm.heads.fitting import fit
from stofm.heads.labels import MIN_SHARE, MISSING
from stofm.heads.options import DEFAULT_REP, FitOptions, Reading
from stofm.heads.sections import resolve_slices

pass

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

    import torch

    from stofm.heads.options import Strategy
    from stofm.nn import Stofm
    from stofm.spatial.splits import SplitRule


def annotate(
    data: Any,
    *,
    label_key: str | None = None,
    head: AnnotationHead | None = None,
    model: Stofm | str | Path | None = None,
    use_rep: str | Sequence[str] = DEFAULT_REP,
    strategy: Strategy = "frozen",
    n_neighbors: int | None = None,
    n_components: int | None = None,
    n_heads: int | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    missing: Collection[object] = MISSING,
    min_share: float = MIN_SHARE,
    class_weights: Literal["balanced"] | None = None,
    split: SplitRule = "auto",
    reject_rate: float = 0.02,
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obs.ANNOTATION,
    table_key: str | None = None,
    copy: bool = False,
    show_progress_bar: bool = True,
) -> Any:
    """Learn cell types or regions from labelled cells, and name those of other cells.

    With `label_key` a head is fitted and returned. With `head` it names the cells of `data`::

        head = st.tl.annotate(labelled, label_key="cell_type")
        st.tl.annotate(query, head=head)

    The query may be another slice, have other genes, or be of another species. Some networks of
    the head read embeddings, others principal components of expression, and further ones the mean
    over a cell's neighbours beside either; what each kind weighs was found on held-out cells. Where
    a query lacks places, raw counts or nearly all of the genes, those that read them have no vote,
    which a warning says. Neighbours are those in `data`: pass whole slices, and choose among their
    cells afterwards. Cells that are missing their embeddings are embedded first; do it yourself
    with :func:`stofm.tl.embed` if that needs options of its own, such as `orthologs`.

    A cell is ``"unknown"`` if two things come together: the probability of its likeliest class is
    low, and its embedding lies far from those of the labelled cells. The thresholds are such that
    of the held-out labelled cells no more than `reject_rate` would be unknown. A class that the
    labelled cells lack is found only in part this way; ``head.rejection`` tells how it was set.

    Parameters
    ----------
    data
        Annotated data of one or several slices, or a SpatialData with such a table; or a list or
        dict of them, which are different slices.
    label_key
        Column of ``obs`` with the labels to learn.
    head
        Fitted head to use instead.
    model
        Model whose embeddings are read: a :class:`stofm.Stofm`, a checkpoint folder or a hub id.
        By default the one that made the stored embeddings, or the embedded ``"stofm-mini"``.
    use_rep
        Entry of ``obsm`` to learn from, or several, which are put side by side. All columns of one
        are divided by the same number: principal components need no scaling, columns of different
        units do. With `head` its own are read.
    strategy
        ``"frozen"`` fits a head on the embeddings, in seconds. ``"lora"`` and ``"full"`` go on to
        tune a copy of the model with it; the head then carries that model.
    n_neighbors
        Nearest neighbours in the plane, of the same slice, over which ``X_stofm_cell`` is averaged
        (or all of `use_rep`, if that is not read); further networks read this mean beside the
        embeddings, and others that of the first 50 components of expression. None: 10 beside the
        embeddings of a model, if labelled cells have places, and 0, none, beside other entries of
        ``obsm`` or with ``split="random"``: cells that are held out at random
        share neighbours with fitted ones, so that scores and the weights of the networks are wrong.
    n_components
        Principal components of log-normalised counts that further networks read, of the genes
        that all labelled cells have; they are centred by slice if the labelled slices differ in
        more than their composition. None: 150 beside the embeddings of a model, if there are raw
        counts, and none beside other entries of ``obsm``. 0: none, which is
        safer for a query that was measured with another technology.
    n_heads
        Networks of each kind that vote. None: three, or one for more than 15,000 labelled
        cells.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.
    layer
        Layer with raw counts; by default ``X``, or the layer that was embedded.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit.
    missing
        Labels that stand for none, in whatever case, besides NaN and blank ones: by default
        all that reads as unknown, unassigned, other, missing, ambiguous, a doublet or of low
        quality, such as ``"Unlabelled"``, ``"N/A"``, ``"?"`` and ``"Unknown cells"``. Such cells are left out. No
        class can be called ``"unknown"``.
    min_share
        Classes with a smaller share of the labelled cells are left out, by default 0.01; 0 for
        none.
    class_weights
        ``"balanced"``: classes weigh the same in the loss however few cells they have.
    split
        How the tenth of the labelled cells is held out that tells when to stop and how far to
        trust the head: ``"slices"``, ``"blocks"`` of the plane with a margin, ``"random"``, or
        ``"auto"``: whole slices where there are four or more and each class is in others too, else
        blocks. Each network of a kind holds out other cells. Neighbours resemble each other: a
        random split gives scores that are too good. Scores, weights of the networks, temperature
        and thresholds come from networks that have not seen the held-out cells; those that are
        returned, but for one that was tuned with the model, are then fitted to all labelled cells,
        in as many epochs.
    reject_rate
        Share of known cells that may be called unknown, from 0 to below 1; 0 for none.
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

    Returns
    -------
    With `label_key` the :class:`AnnotationHead`. With `head` None, or with ``copy=True`` the new
    AnnData, in the form of `data`. Sets, with `head`:

    ``adata.obs['stofm_annotation']`` : category
        Likeliest class of each cell, or ``"unknown"``.
    ``adata.obs['stofm_annotation_confidence']`` : float32
        Probability of the likeliest class.
    ``adata.obsm['stofm_annotation_proba']`` : DataFrame
        Probabilities of all classes, (n_obs, n_classes), calibrated by temperature. A ``/`` in a
        class is ``_`` in its column, which files need; ``head.classes`` has the names.
    ``adata.uns['stofm']['stofm_annotation']`` : dict
        Parameters, and fingerprints of the embedding's model.
    ``adata.obsm['X_stofm']`` and others
        What :func:`stofm.tl.embed` writes, if it was missing (also with `label_key`).

    Raises
    ------
    KeyError
        A column, an entry or a layer is not there.
    TypeError
        `head` is no head for annotation.
    ValueError
        Neither or both of `label_key` and `head` are given, an option is not usable, there are
        fewer than two classes, a class has a single cell or is called "unknown", `key_added` would
        replace something else, or embeddings are by another model than the head's, or of other
        counts or coordinates than there are now.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, for the head. Guo et al. 2017, On
    calibration of modern neural networks (ICML): temperature. Lee et al. 2018, A simple unified
    framework for detecting out-of-distribution samples (NeurIPS): the distance.

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
    if (label_key is None) == (head is None):
        given = "both" if head is not None else "neither"
        msg = f"Pass label_key= to fit a head, or head= to use one; found {given}."
        raise ValueError(msg)
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
        data, library_key, spatial_key=spatial_key, table_key=table_key, copy=copy
    )
    if head is not None:
        target = sections.copied() if copy else sections
        annotate_with(target, head, options, key_added)
        return target.as_given() if copy else None
    options.check(sections)
    task = AnnotationTask.of(
        sections,
        options,
        label_key=label_key,
        missing=missing,
        min_share=min_share,
        class_weights=class_weights,
        reject_rate=reject_rate,
    )
    return fit(task, sections.copied() if copy else sections)
