"""``stofm.tl.novel``: groups of cells that no class of a head supports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._config import check_seed
from stofm._edge.expression import rank_markers
from stofm._edge.tables import all_or_nothing, refuse_foreign, write_record
from stofm._keys import Obs, Obsm, Suffix
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.annotation import AnnotationHead
from stofm.heads.head import refuse_reserved, require_head
from stofm.heads.request import Request, check_whole_number, resolve_slices
from stofm.spatial.domains import domain_space, find_domains
from stofm.spatial.regions import clustering, pieces, touching_cells
from stofm.tl._describe import read_expression

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch
    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.heads.annotation import Annotation
    from stofm.heads.request import SliceTables
    from stofm.nn import Stofm

#: A cluster is novel if it has so many cells, of which more than this share has a novelty above 1.
_FEWEST: Final = 10
_MOST_KNOWN: Final = 0.5
#: A group forms a niche if chance hardly gives as many contacts, and of the cells that touch its cells
#: this share is its own.
_N_PERMUTATIONS: Final = 199
_LARGEST_P: Final = 0.01
_LEAST_OWN: Final = 1 / 3
_MOST_CLASSES: Final = 3


def novel(
    adata: Any,
    head: AnnotationHead,
    *,
    model: Stofm | str | Path | None = None,
    resolution: float = 1.0,
    n_genes: int = 10,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    key_added: str = Obs.NOVEL,
    table_key: str | None = None,
    show_progress_bar: bool = True,
) -> pd.DataFrame:
    """Group the cells that no class of a head supports, and say what is known of each group.

    All cells are clustered by their embedding (Leiden), and a cluster is a novel group if it has at
    least ten cells, and over half of them have a novelty above 1: they lie farther from labelled cells
    than 95 % of the held-out labelled ones. A group may be a type that the labelled cells lack, but
    also a state, damaged cells, doublets, or a difference of technology: look at its markers and
    its places before you give it a name. Types that resemble known ones are not found this way.

    Parameters
    ----------
    adata
        Annotated data with raw counts and coordinates, or a SpatialData with such a table. Cells
        without embeddings are embedded first.
    head
        From :func:`stofm.tl.annotate`.
    model
        Model to embed with, by default that of the head or of the stored embeddings.
    resolution
        Resolution of Leiden; higher values give more and smaller clusters.
    n_genes
        Most markers of each group.
    library_key
        Column of ``adata.obs`` that names each cell's slice; by default the one that was embedded
        with, if any.

    Returns
    -------
    A row for each group, the largest first, with the columns

    ``n_cells``, ``share``, ``n_slices``
        Number of cells, their share of all, and number of slices that have some.
    ``novelty``, ``share_novel``
        Median novelty, and share of cells above 1.
    ``nearest_class``, ``nearest_share``, ``confidence``
        Class that most of the cells would have, their share, and mean probability of the likeliest.
    ``markers``
        Genes by scanpy's t-test against all other cells.
    ``neighbors``
        Likeliest classes of the cells around, with their share.
    ``own_neighbors``, ``clustering``, ``p``
        Share of the cells that touch the group's cells that are its own, their contacts over those of
        cells drawn at random in each slice, and the empirical p of 199 draws.
    ``n_pieces``, ``largest_piece``
        Connected pieces that hold nine tenths of the group, and the share of the largest.
    ``forms_niche``
        Whether p is at most 0.01 and ``own_neighbors`` at least a third.

    Sets:

    ``adata.obs['stofm_novel']`` : category
        Group of each cell, ``"0"``, ``"1"``, ... by falling size; NaN for cells of none.
    ``adata.uns['stofm']['stofm_novel']`` : dict
        Parameters.

    Other Parameters
    ----------------
    seed
        Seed of clustering and permutations.
    key_added
        Column of ``adata.obs`` to write.
    layer, spatial_key, device, table_key, show_progress_bar
        See :func:`stofm.tl.annotate`.

    Raises
    ------
    KeyError
        A column, an entry or a layer is not there.
    TypeError
        `head` is no head for annotation.
    ValueError
        The head has no novelty, a number is not usable, or `key_added` would replace something else.

    Warns
    -----
    UserWarning
        If most cells are novel: then whole slices differ from the labelled ones.

    See Also
    --------
    stofm.tl.annotate : makes the head and the novelty.
    stofm.tl.describe : says what a group is.

    References
    ----------
    Traag, Waltman and van Eck 2019, From Louvain to Leiden (Sci Rep 9:5233).

    Examples
    --------
    >>> import stofm as st
    >>> labelled = st.datasets.simulate_slice(500, 100, seed=0)
    >>> query = st.datasets.simulate_slice(400, 100, seed=1)
    >>> head = st.tl.annotate(labelled, label_key="cell_type")
    >>> table = st.tl.novel(query, head)
    >>> query.obs["stofm_novel"].nunique() == len(table)
    True
    """
    import pandas as pd

    if head is None:
        raise TypeError("Pass a head: head = st.tl.annotate(labelled, label_key=...).")
    require_head(head, AnnotationHead)
    check_seed(seed)
    check_whole_number("n_genes", n_genes, least=1)
    if not 0.0 < resolution < np.inf:
        raise ValueError(f"resolution must be positive, found {resolution!r}.")
    if head.novelty is None:
        raise ValueError(
            "The head has no novelty: no labelled cell was held out. Fit it to more cells: "
            "st.tl.annotate(labelled, label_key=...)."
        )
    request = Request(
        model, head.use_rep, library_key, layer, spatial_key, seed, device, show_progress_bar
    )
    slices = resolve_slices(adata, library_key, spatial_key, table_key)
    if len(slices.tables) > 1:
        raise TypeError("Pass one AnnData, with library_key= if it has several slices.")
    (table,) = slices.tables
    refuse_reserved(key_added, Obs.NOVEL, spatial_key, library_key, *head.use_rep)
    refuse_foreign(table, key_added, obs=[key_added])
    with all_or_nothing(table):
        touching = touching_cells(slices.coordinates(spatial_key), slices.rows)
        values = read_expression(table, layer)
        blocks = head.read(slices, request)
        found = head.predict(blocks)
        space = domain_space(blocks.averaged[0], slices.rows, centering="none")
        clusters = find_domains(space, resolution=resolution, seed=seed)
        codes, n_groups = _novel_groups(clusters, found.novelty)
        genes = table.var_names.astype(str).tolist()
        markers = rank_markers(values, genes, codes, n_groups, n_genes)
        rows = [
            _facts(codes == k, found, head.classes, slices, touching, seed)
            | {"markers": ", ".join(one["gene"] for one in markers[k])}
            for k in range(n_groups)
        ]
        names = pd.Categorical.from_codes(codes, categories=[*map(str, range(n_groups))])
        table.obs[key_added] = names
        table.uns.pop(key_added + Suffix.COLORS, None)
        params = {"resolution": resolution, "seed": seed, "classes": list(head.classes)}
        write_record(table, key_added, params)
    n_novel = int((codes >= 0).sum())
    logger.info("%d of %d cells are in %d novel groups.", n_novel, len(codes), n_groups)
    return pd.DataFrame(rows, index=pd.Index(names.categories, name="group"))


def _novel_groups(clusters: NDArray[np.int64], novelty: Any) -> tuple[NDArray[np.int64], int]:
    """Number each cell's group by falling size, -1 for none, and count the groups."""
    is_far = np.asarray(novelty) > 1
    if (share := float(is_far.mean())) > _MOST_KNOWN:
        warn(
            f"{share:.0%} of the cells lie farther from the labelled cells than 95 % of the held-out "
            "ones: whole slices differ (technology, patient, genes), and groups say little about new "
            "types. Fit the head to labelled cells of such slices."
        )
    sizes = np.bincount(clusters)
    shares = np.bincount(clusters, is_far) / sizes
    chosen = np.flatnonzero((sizes >= _FEWEST) & (shares > _MOST_KNOWN))
    numbers = np.full(len(sizes), -1)
    # Clusters are numbered by falling size already.
    numbers[chosen] = np.arange(len(chosen))
    return numbers[clusters], len(chosen)


def _facts(
    own: NDArray[np.bool_],
    found: Annotation,
    classes: tuple[str, ...],
    slices: SliceTables,
    touching: sparse.csr_array,
    seed: int,
) -> dict[str, Any]:
    """What is known of a group, (n,), but for its markers."""
    likeliest = found.probabilities.argmax(axis=1)
    near = np.bincount(likeliest[own], minlength=len(classes)) / own.sum()
    around = np.asarray(touching[own].sum(axis=0)).ravel()
    others = np.bincount(likeliest, np.where(own, 0.0, around), minlength=len(classes))
    ratio, p = clustering(touching, own, slices.rows, n_permutations=_N_PERMUTATIONS, seed=seed)
    own_share = float(around[own].sum() / max(around.sum(), 1.0))
    n_pieces, largest = pieces(touching, own)
    assert found.novelty is not None
    order = np.argsort(-others, kind="stable")[:_MOST_CLASSES]
    return {
        "n_cells": int(own.sum()),
        "share": float(own.mean()),
        "n_slices": sum(bool(own[rows].any()) for rows in slices.rows),
        "novelty": float(np.median(found.novelty[own])),
        "share_novel": float((found.novelty[own] > 1).mean()),
        "nearest_class": classes[near.argmax()],
        "nearest_share": float(near.max()),
        "confidence": float(found.probabilities[own].max(axis=1).mean()),
        "neighbors": ", ".join(
            f"{classes[k]} {others[k] / others.sum():.0%}" for k in order.tolist() if others[k] > 0
        ),
        "own_neighbors": own_share,
        "clustering": ratio,
        "p": p,
        "n_pieces": n_pieces,
        "largest_piece": largest,
        "forms_niche": bool(p <= _LARGEST_P and own_share >= _LEAST_OWN),
    }
