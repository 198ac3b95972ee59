"""``stofm.tl.probe``: whether an embedding helps on one's own data, and what it returns."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, get_args

import numpy as np

from stofm._config import check_one_of
from stofm._keys import Obsm
from stofm._logging import counter
from stofm.heads.blocks import read_rep
from stofm.heads.request import DEFAULT_REP, check_whole_number, resolve_slices
from stofm.heads.targets import MISSING, read_label_names
from stofm.tl._probe_scores import (
    AND,
    LOG_COUNTS,
    PCS,
    PCS_AND_NEIGHBORS,
    Protocol,
    log_counts,
    most_variable,
    plan_folds,
    plan_protocol,
    principal_components,
    score_clusters,
    score_head,
    score_regression,
    side_by_side,
    with_neighbors,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.heads.request import SliceTables
    from stofm.tl._probe_scores import Fold

_N_SEEDS: Final = 3
MEASURES: Final = ("macro_f1", "accuracy", "ari", "nmi", "calibration_error")
#: Of these the lower one is better.
_ERRORS: Final = ("calibration_error",)
_N_DRAWS: Final = 2000
_PERCENTILES: Final = (2.5, 97.5)


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

    Beside `use_rep` there always are 50 principal components of log-normalised counts (``"PCs"``;
    scaled to the median total, as scanpy does by default),
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
        tested; nor are those that only the left-out slice has. Warnings count both. In each
        slice, clusters are compared with classes of 1 % of its cells or more.
    use_rep
        Entries of ``obsm`` to compare, of whatever origin. A tuple of them is used side by side:
        ``["X_stofm", ("X_stofm_cell", "X_stofm")]`` are two representations, of which the second
        is called ``"X_stofm_cell + X_stofm"``; each part is divided by its overall spread.
    left_out
        Slices to leave out, each in turn, by name or, for all slices of one AnnData, by its key in
        the dict; a tuple of them is left out together: ``[("p1_a", "p1_b"), ("p2_a", "p2_b")]``
        leaves out patients. By default each slice that has labels.
    library_key
        Column of ``obs`` that names each cell's slice; by default the one that was embedded with.

    Returns
    -------
    A :class:`ProbeResult`: ``result.scores`` has a row for each left-out slice, representation and
    seed, ``result.summary()`` mean, spread and the difference to the better of the PCs with its
    interval. `data` stays as it is.

    Other Parameters
    ----------------
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

    See Also
    --------
    stofm.pl.probe : draws the comparison.
    stofm.metrics : the measures.
    stofm.tl.annotate : learns from several representations at once.

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
    check_one_of("protocol", protocol, (None, *get_args(Protocol)))
    if protocol is not None and (left_out is not None or seeds != _N_SEEDS):
        raise ValueError(
            f"protocol={protocol!r} has runs of its own: leave out `left_out` and `seeds`."
        )
    slices = resolve_slices(data, library_key, spatial_key, table_key)
    labels = read_label_names(slices, label_key, missing=missing)
    features = read_representations(slices, use_rep)
    if protocol is None:
        folds = plan_folds(slices, labels, left_out=left_out, spatial_key=spatial_key)
        tests = [(fold, range(seeds)) for fold in folds]
    else:
        folds = plan_protocol(slices, labels, protocol=protocol, spatial_key=spatial_key)
        tests = [(fold, range(seed, seed + 1)) for seed, fold in enumerate(folds)]
    counts = most_variable(log_counts(slices, layer=layer))
    features[PCS] = principal_components(counts)
    features[PCS_AND_NEIGHBORS] = with_neighbors(features[PCS], slices, spatial_key=spatial_key)
    return _score(tests, features, counts, labels, show_progress_bar=show_progress_bar)


def read_representations(
    slices: SliceTables, use_rep: str | Sequence[str | tuple[str, ...]]
) -> dict[str, NDArray[np.float32]]:
    """Read entries of ``obsm``, those of a tuple side by side; (n_obs, d) by name."""
    asked = [
        (one,) if isinstance(one, str) else tuple(one)
        for one in ([use_rep] if isinstance(use_rep, str) else use_rep)
    ]
    names = [AND.join(reps) for reps in asked]
    taken = {"", PCS, PCS_AND_NEIGHBORS, LOG_COUNTS}
    if not names or len(set(names)) < len(names) or taken & set(names):
        raise ValueError(
            "use_rep must name entries of obsm or tuples of them, each once and none called "
            f"{PCS!r}, {PCS_AND_NEIGHBORS!r} or {LOG_COUNTS!r}; found {use_rep!r}."
        )
    values = {rep: read_rep(slices, rep)[0] for rep in dict.fromkeys(itertools.chain(*asked))}
    asked_by_name = zip(names, asked, strict=True)
    return {name: side_by_side([values[rep] for rep in reps]) for name, reps in asked_by_name}


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
    with counter(total, "probe", "fit", show=show_progress_bar) as advance:
        for fold, seeds in tests:
            own = fold.labelled
            sizes = {"n_fitted": len(fold.fitted), "n_tested": len(fold.tested)}
            for name, seed in itertools.product(features, seeds):
                scores = score_head(features[name], fold, seed=seed)
                scores |= score_clusters(features[name][own], labels[own], seed=seed)
                about = {"slice": fold.name, "representation": name, "seed": seed}
                rows.append(about | scores | sizes)
                advance(1)
            scores = score_regression(counts, fold) | {"ari": np.nan, "nmi": np.nan}
            about = {"slice": fold.name, "representation": LOG_COUNTS}
            rows += [about | {"seed": seed} | scores | sizes for seed in seeds]
            advance(1)
    return ProbeResult(pd.DataFrame(rows))


@dataclass(frozen=True, eq=False, repr=False)
class ProbeResult:
    """Scores of representations on left-out slices, from :func:`stofm.tl.probe`.

    In a notebook it shows the summary of macro-F1. What was saved with
    ``result.scores.to_csv(file, index=False)`` is read with ``ProbeResult(pd.read_csv(file))``.

    Attributes
    ----------
    scores
        A row for each left-out slice, representation and seed: ``slice``, ``representation``,
        ``seed``; ``accuracy``, ``macro_f1`` and ``calibration_error`` of the head; ``ari`` and
        ``nmi`` of the clusters, NaN for logistic regression; ``n_fitted`` and ``n_tested`` cells.

    See Also
    --------
    stofm.tl.probe : makes it.
    stofm.pl.probe : draws it.
    """

    scores: pd.DataFrame

    def summary(self, measure: str = "macro_f1") -> pd.DataFrame:
        """Mean and spread of a measure, and the difference to the better of the PCs.

        The interval is that of a paired bootstrap: slices are drawn with replacement, for each of
        them seeds, and the difference is taken within slice and seed. Cells are not drawn. It says
        what other slices like these would give, as far as a few slices can tell: with fewer than
        five or so it is too narrow, and with a single one it is about seeds alone. The better of
        the PCs is chosen by the same scores, which favours the PCs.

        Parameters
        ----------
        measure
            ``"macro_f1"``, ``"accuracy"``, ``"ari"``, ``"nmi"`` or ``"calibration_error"``.

        Returns
        -------
        A row for each representation: ``mean``; ``spread``, the standard deviation over slices of
        the mean over seeds (over seeds if there is one slice); ``difference`` to the better of
        the PCs with its 95 % interval, ``low`` to ``high``; ``n_better``, slices where it is
        better than these.

        Raises
        ------
        ValueError
            There is no such measure.
        """
        import pandas as pd

        names, values = self._read(measure)
        reference = values[names.index(self.better_of_pcs(measure))]
        differences = values - reference
        drawn = np.percentile(_bootstrap(differences), _PERCENTILES, axis=1)
        by_slice = differences.mean(axis=2)
        spread = values.mean(axis=2) if values.shape[1] > 1 else values[:, 0]
        is_better = by_slice < 0 if measure in _ERRORS else by_slice > 0
        columns = {
            "mean": values.mean(axis=(1, 2)),
            "spread": spread.std(axis=1, ddof=1) if spread.shape[1] > 1 else np.nan,
            "difference": differences.mean(axis=(1, 2)),
            "low": drawn[0],
            "high": drawn[1],
            "n_better": is_better.sum(axis=1),
        }
        found = pd.DataFrame(columns, index=pd.Index(names, name="representation"))
        return found.dropna(subset="mean")

    def better_of_pcs(self, measure: str = "macro_f1") -> str:
        """``"PCs"`` or ``"PCs + neighbours"``, whichever has the better mean."""
        names, values = self._read(measure)
        means = dict(zip(names, values.mean(axis=(1, 2)), strict=True))
        choose = min if measure in _ERRORS else max
        return choose((PCS, PCS_AND_NEIGHBORS), key=means.__getitem__)

    def _read(self, measure: str) -> tuple[list[str], NDArray[np.float64]]:
        """Names of the representations, and their values, (n_representations, n_slices, n_seeds)."""
        check_one_of("measure", measure, MEASURES)
        keys = ["representation", "slice", "seed"]
        table = self.scores.pivot(index=keys[0], columns=keys[1:], values=measure)
        names = self.scores["representation"].unique().tolist()
        values = table.sort_index(axis=1).loc[names].to_numpy()
        return names, values.reshape(len(names), -1, self.scores["seed"].nunique())

    def __repr__(self) -> str:
        return f"{self._title}\n\n{self.summary().round(3).to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{self._title}</p>{self.summary().round(3).to_html()}"

    @property
    def _title(self) -> str:
        slices = self.scores["slice"].unique()
        what = ", ".join(map(str, slices[:5])) + (", ..." if len(slices) > 5 else "")
        return (
            f"Macro-F1 with {what} left out, {self.scores['seed'].nunique()} seeds; difference to "
            f"{self.better_of_pcs()}. All scores are in .scores, other measures in "
            ".summary(measure)."
        )


def _bootstrap(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of values, (n, n_slices, n_seeds), of which slices and then seeds are drawn: (n, n_draws)."""
    n_slices, n_seeds = values.shape[1:]
    rng = np.random.default_rng(0)
    slices = rng.integers(n_slices, size=(_N_DRAWS, n_slices, 1))
    seeds = rng.integers(n_seeds, size=(_N_DRAWS, n_slices, n_seeds))
    found: NDArray[np.float64] = values[:, slices, seeds].mean(axis=(2, 3))
    return found
