"""``stofm.tl.influence``: which types of cells change the embeddings of which, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stofm._keys import Obsm
from stofm.heads.request import Request, check_whole_number
from stofm.perturb.influence import by_distance, by_type
from stofm.perturb.masking import effects_between
from stofm.perturb.reading import Subject

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    import torch

    from stofm.heads.annotation import AnnotationHead
    from stofm.nn import Stofm


def influence(
    adata: Any,
    *,
    groupby: str,
    model: Stofm | str | Path | None = None,
    head: AnnotationHead | None = None,
    reach: float | None = None,
    n_max: int = 100,
    min_pairs: int = 30,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    seed: int = 0,
    device: str | torch.device = "auto",
    table_key: str | None = None,
    show_progress_bar: bool = True,
) -> Influence:
    """Ask a model which types of cells change what it makes of which others.

    Senders are masked one at a time: the cells within reach no longer attend to them. The effect
    on each of these receivers is how far its last hidden state moves or, with `head`, by how much
    its class probabilities change (total variation). What a model passes on as it is, a mean over
    neighbours, is left out.

    The strength of a pair of types is the mean effect over its pairs of cells. Expected is what
    it would be if senders treated all types of receivers alike: effects are compared with those on
    receivers of the same type in the same of five distance bins, times what the sender does to all
    its receivers, and types are permuted among senders. These are sensitivities of a model, not
    effect sizes in a tissue; the page on influence in the documentation says how far they can be
    trusted.

    Parameters
    ----------
    adata
        Annotated data of one or several slices with raw counts and coordinates, or a SpatialData
        with such a table.
    groupby
        Column of ``adata.obs`` with the types; cells without one are neither senders nor receivers.
    model
        A :class:`stofm.Stofm`, a checkpoint folder or a hub id. By default that of `head`, or the
        embedded ``"stofm-mini"``.
    head
        From :func:`stofm.tl.annotate`, fitted to ``use_rep="X_stofm"`` with
        ``HeadOptions(n_neighbors=0, n_components=0)``.
    reach
        Distance up to which a sender is masked, in the unit of the coordinates. By default three
        times the median distance to the sixth nearest cell.
    n_max
        Most senders of a type that are masked, drawn at random over all slices. The time goes
        with their number, and not with that of cells.
    library_key
        Column of ``adata.obs`` that names each cell's slice; by default the one that was embedded
        with, if any.

    Returns
    -------
    An :class:`Influence`; `adata` stays as it is.

    Other Parameters
    ----------------
    min_pairs
        Fewest pairs of cells of a pair of types; others are left out.
    seed
        Seed of the senders drawn and of the clustering that gives the virtual cells.
    layer, spatial_key, device, table_key, show_progress_bar
        See :func:`stofm.tl.perturb`.

    Raises
    ------
    KeyError
        A layer, an entry or a column is not there.
    TypeError
        `head` is no head for annotation.
    ValueError
        There are fewer than two types or no two cells within reach, the head reads something
        else than the embedding or belongs to another model, or an option is not usable.

    See Also
    --------
    stofm.pl.influence : draws all pairs of types.
    stofm.tl.ligand_receptor : which genes could carry it.
    stofm.tl.perturb : edits of single genes.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 100, regions="nodular", seed=0)
    >>> found = st.tl.influence(adata, groupby="cell_type", n_max=5)
    >>> found.pairs.columns[:4].tolist()
    ['source', 'target', 'strength', 'expected']
    """
    check_whole_number("n_max", n_max, least=1)
    check_whole_number("min_pairs", min_pairs, least=1)
    request = Request(
        model, Obsm.X, library_key, layer, spatial_key, seed, device, show_progress_bar
    )
    subject = Subject.read(adata, request, table_key, head)
    kinds, names = subject.types(groupby)
    if len(names) < 2:
        raise ValueError(
            f"obs[{groupby!r}] has {len(names)} type(s), {names}; influence compares at least two."
        )
    pairs, reach = effects_between(subject.tissue, kinds, head, reach=reach, n_max=n_max)
    params = {
        "groupby": groupby,
        "reach": reach,
        "model": subject.tissue.model.name,
        "effect": "change of class probabilities" if head else "shift of the embedding",
    }
    return Influence(
        by_type(pairs, kinds, names, min_pairs=min_pairs),
        by_distance(pairs, kinds, names, min_pairs=min_pairs),
        params,
    )


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """Which types change which, from :func:`stofm.tl.influence`.

    Attributes
    ----------
    pairs
        A row for each pair of types, highest z first: ``source``, ``target``, ``strength`` (mean
        effect over pairs of cells), ``expected``, ``z`` (standard deviations of the mean excess
        over permutations of the senders' types), ``FDR`` (Benjamini-Hochberg over all pairs,
        one-sided, of z as normal), ``n_pairs`` (of cells) and ``length``, the distance over which
        the strength falls by 1/e, in the unit of the coordinates; NaN where it does not fall.
    distances
        The same by distance: ``source``, ``target``, ``distance`` (mean of the bin), ``strength``,
        ``expected`` and ``n_pairs``.
    params
        Column of the types, reach, model, and what the effect is.

    See Also
    --------
    stofm.tl.influence : makes it.
    stofm.pl.influence : draws it.
    """

    pairs: pd.DataFrame
    distances: pd.DataFrame
    params: dict[str, Any]

    def __repr__(self) -> str:
        """The ten pairs with the highest z."""
        return (
            f"{self.params['effect'].capitalize()} of {self.params['model']!r} when a neighbour "
            f"within {self.params['reach']:.3g} is masked\n\n{self.pairs.head(10).round(3)}"
        )

    def _repr_html_(self) -> str:
        return str(self.pairs.head(10).round(3).to_html())
