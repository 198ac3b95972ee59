"""``stofm.tl.probe``: whether an embedding helps on one's own data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np

from stofm._keys import Obsm
from stofm._logging import counter
from stofm.heads.embeddings import MADE_BY_EMBED, describe_origin, origin_of, same_origin
from stofm.heads.inputs import common_width, read_each
from stofm.heads.labels import MISSING, read_label_names
from stofm.heads.options import DEFAULT_REP, check_whole_number
from stofm.heads.sections import resolve_slices
from stofm.tl._probe_baselines import (
    LOG_COUNTS,
    PCS,
    PCS_AND_NEIGHBORS,
    log_counts,
    most_variable,
    principal_components,
    with_neighbors,
)
from stofm.tl._probe_folds import AND, Protocol, plan_folds, plan_protocol
from stofm.tl._probe_result import ProbeResult
from stofm.tl._probe_scores import score_clusters, score_head, score_regression, side_by_side

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from stofm.heads.sections import Sections
    from stofm.tl._probe_scores import Fold

_N_SEEDS: Final = 3


def probe(
    data: Any,
    *,
    label_key: str,
    use_rep: str | Sequence[str | tuple[str, ...]] = DEFAULT_REP,
    left_out: str | Sequence[str | tuple[str, ...]] | None = None,
    library_key: str | None = None,
    layer: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    missing: Collection[object] = MISSING,
    seeds: int = _N_SEEDS,
    protocol: Protocol | None = None,
    table_key: str | None = None,
    show_progress_bar: bool = True,
) -> ProbeResult:
    """Compare embeddings with each other and with principal components, on your own labels.

    Each slice is left out in turn. The paper's head, three fully connected layers, is fitted to
    the labelled cells of the others and tested on it, in the same way for each representation::

        a, b, c = ...  # slices with obs["cell_type"], embedded
        result = st.tl.probe(
            {"a": a, "b": b, "c": c},
            label_key="cell_type",
            use_rep=["X_stofm", ("X_stofm_cell", "X_stofm"), "novae_latent"],
        )
        st.pl.probe(result)

    Beside `use_rep` there always are 50 principal components of log-normalised counts (``"PCs"``),
    these with their means over the ten nearest cells (``"PCs + neighbours"``), and logistic
    regression on the counts themselves (``"log counts"``), all of the genes that the slices share,
    or of the 3,000 that vary most. The components are found on all slices, the left-out one too,
    as embeddings are. An embedding that is not above the better of the PCs adds nothing to them
    here.

    Without labels, k-means clusters of the left-out cells, as many as there are classes, are
    compared with these.

    Parameters
    ----------
    data
        Annotated data of one or several slices, or a SpatialData with such a table; or a list or
        dict of them, which are different slices. If a single slice has labels, five compact blocks
        of it are left out in turn, with a margin around each of twice the distance between
        neighbours, or less in a small slice.
    label_key
        Column of ``obs`` with the classes. Cells without one take part in components and
        neighbours only. Classes with less than 1 % of the fitted cells are neither fitted nor
        tested; nor are those that only the left-out slice has, which a warning counts. In each
        slice, clusters are compared with classes of 1 % of its cells or more.
    use_rep
        Entries of ``obsm`` to compare, of whatever origin. A tuple of them is read side by side:
        ``["X_stofm", ("X_stofm_cell", "X_stofm")]`` are two representations, of which the second
        is called ``"X_stofm_cell + X_stofm"``; each part is divided by its overall spread.
    left_out
        Slices to leave out, each in turn, by name or, for all slices of one AnnData, by its key in
        the dict; a tuple of them is left out together: ``[("p1_a", "p1_b"), ("p2_a", "p2_b")]``
        leaves out patients. By default each slice that has labels.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.
    layer
        Layer with raw counts; by default ``X``, or the layer that was embedded.
    spatial_key
        Entry of ``obsm`` with the coordinates, (n_obs, 2), any unit.
    missing
        Labels that stand for none, as in :func:`stofm.tl.annotate`.
    seeds
        Number of fits on each slice, with the seeds 0, 1 and so on: of first weights, order,
        dropout, the random tenth of the fitted cells that tells when to stop and gives the
        temperature, and the starts of k-means. Logistic regression has no chance in it.
    protocol
        ``"stofm-paper"``: not slices but a random fifth of all cells is tested, in three runs,
        with a random tenth of the rest held out. It leaks: neighbours of each tested cell were
        fitted, and embeddings of a cell's surroundings saw both. It is there to compare with
        published numbers.
    table_key
        Table of a SpatialData.
    show_progress_bar
        Show a bar.

    Returns
    -------
    A :class:`ProbeResult`: ``result.scores`` has a row for each left-out slice, representation and
    seed, ``result.summary()`` mean, spread and the difference to the better of the PCs with its
    interval. `data` stays as it is.

    Raises
    ------
    KeyError
        A column, an entry of ``obsm`` or a layer is not there.
    TypeError
        `missing` is no list.
    ValueError
        An option is not usable, there are no raw counts, a representation is not finite or differs
        in width or model between slices, no cell has a label, fewer than two classes can be
        fitted, or none can be tested.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2, for the head and the protocol. Guo et al. 2017, On
    calibration of modern neural networks (ICML): temperature and expected calibration error, here
    in ten bins of equally many cells.

    Examples
    --------
    >>> import stofm as st
    >>> adata = st.datasets.simulate_slice(300, 60, n_slices=3)
    >>> st.tl.embed(adata, library_key="slice_id")
    >>> result = st.tl.probe(adata, label_key="region", library_key="slice_id", seeds=1)
    >>> len(result.scores)
    15
    """
    check_whole_number("seeds", seeds, least=1)
    _check_protocol(protocol, left_out, seeds)
    sections = resolve_slices(data, library_key, spatial_key=spatial_key, table_key=table_key)
    labels = read_label_names(sections, label_key, missing=missing)
    features = read_representations(sections, use_rep)
    if protocol is None:
        folds = plan_folds(sections, labels, left_out=left_out, spatial_key=spatial_key)
        tests = [(fold, range(seeds)) for fold in folds]
    else:
        folds = plan_protocol(sections, labels, protocol=protocol, spatial_key=spatial_key)
        tests = [(fold, range(seed, seed + 1)) for seed, fold in enumerate(folds)]
    counts = most_variable(log_counts(sections, layer=layer))
    features[PCS] = principal_components(counts)
    features[PCS_AND_NEIGHBORS] = with_neighbors(features[PCS], sections, spatial_key=spatial_key)
    return _score(tests, features, counts, labels, show_progress_bar=show_progress_bar)


def _check_protocol(protocol: str | None, left_out: Any, seeds: int) -> None:
    if protocol is None:
        return
    if protocol not in get_args(Protocol):
        msg = f"protocol must be None or one of {get_args(Protocol)}, found {protocol!r}."
        raise ValueError(msg)
    if left_out is not None or seeds != _N_SEEDS:
        msg = (
            f"protocol={protocol!r} tests random cells in three runs: leave out `left_out` and "
            "`seeds`."
        )
        raise ValueError(msg)


def read_representations(
    sections: Sections, use_rep: str | Sequence[str | tuple[str, ...]]
) -> dict[str, NDArray[np.float32]]:
    """Read entries of ``obsm``, those of a tuple side by side; (n_obs, d) by name.

    Raises
    ------
    KeyError, ValueError
        One is not there, not usable, named twice, or called as a baseline is.
    """
    asked = [
        (one,) if isinstance(one, str) else tuple(one)
        for one in ([use_rep] if isinstance(use_rep, str) else use_rep)
    ]
    names = [AND.join(reps) for reps in asked]
    taken = {"", PCS, PCS_AND_NEIGHBORS, LOG_COUNTS}
    if not names or len(set(names)) < len(names) or taken & set(names):
        msg = (
            "use_rep must name entries of obsm or tuples of them, each once and none called "
            f"{PCS!r}, {PCS_AND_NEIGHBORS!r} or {LOG_COUNTS!r}; found {use_rep!r}."
        )
        raise ValueError(msg)
    parts = {rep: _read(sections, rep) for reps in asked for rep in reps}
    return {
        name: side_by_side([parts[rep] for rep in reps])
        for name, reps in zip(names, asked, strict=True)
    }


def _read(sections: Sections, rep: str) -> NDArray[np.float32]:
    parts = read_each(sections, rep)
    common_width(parts, rep)
    origins = [origin_of(table, rep) for table in sections.tables]
    for other in origins:
        if rep in MADE_BY_EMBED and not same_origin(origins[0], other):
            msg = (
                f"obsm[{rep!r}] is by {describe_origin(origins[0])} in one AnnData and by "
                f"{describe_origin(other)} in another. Embed all with one model."
            )
            raise ValueError(msg)
    return np.concatenate(parts)


def _score(
    tests: Sequence[tuple[Fold, range]],
    features: Mapping[str, NDArray[np.float32]],
    counts: Any,
    labels: NDArray[np.str_],
    *,
    show_progress_bar: bool,
) -> ProbeResult:
    """Score each representation, and logistic regression, on what is left out."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    total = sum(1 + len(features) * len(seeds) for _, seeds in tests)
    with counter(total=total, description="probe", unit="fit", show=show_progress_bar) as advance:
        for fold, seeds in tests:
            sizes = {"n_fitted": len(fold.fitted), "n_tested": len(fold.tested)}
            for name, values in features.items():
                for seed in seeds:
                    scores = score_head(values, fold, seed=seed) | score_clusters(
                        values[fold.labelled], labels[fold.labelled], seed=seed
                    )
                    rows.append(_row(fold, name, seed) | scores | sizes)
                    advance(1)
            scores = score_regression(counts, fold) | {"ari": np.nan, "nmi": np.nan}
            rows += [_row(fold, LOG_COUNTS, seed) | scores | sizes for seed in seeds]
            advance(1)
    return ProbeResult(pd.DataFrame(rows))


def _row(fold: Fold, name: str, seed: int) -> dict[str, Any]:
    return {"slice": fold.name, "representation": name, "seed": seed}
