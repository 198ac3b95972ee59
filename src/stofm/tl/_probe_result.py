"""What ``stofm.tl.probe`` returns: all scores, and what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm.tl._probe_baselines import PCS, PCS_AND_NEIGHBORS

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

MEASURES: Final = ("macro_f1", "accuracy", "ari", "nmi", "calibration_error")
#: Of these the lower one is better.
_ERRORS: Final = ("calibration_error",)
_N_DRAWS: Final = 2000
_PERCENTILES: Final = (2.5, 97.5)


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
        return pd.DataFrame(columns, index=pd.Index(names, name="representation")).dropna(
            subset="mean"
        )

    def better_of_pcs(self, measure: str = "macro_f1") -> str:
        """``"PCs"`` or ``"PCs + neighbours"``, whichever has the better mean."""
        names, values = self._read(measure)
        means = dict(zip(names, values.mean(axis=(1, 2)), strict=True))
        choose = min if measure in _ERRORS else max
        return choose((PCS, PCS_AND_NEIGHBORS), key=means.__getitem__)

    def _read(self, measure: str) -> tuple[list[str], NDArray[np.float64]]:
        """Names of the representations, and their values, (n_representations, n_slices, n_seeds)."""
        if measure not in MEASURES:
            msg = f"measure must be one of {list(MEASURES)}, found {measure!r}."
            raise ValueError(msg)
        names = self.scores["representation"].unique().tolist()
        shape = (len(names), self.scores["slice"].nunique(), self.scores["seed"].nunique())
        parts = [
            self.scores[self.scores["representation"] == name].sort_values(["slice", "seed"])
            for name in names
        ]
        return names, np.stack([part[measure].to_numpy() for part in parts]).reshape(shape)

    def __repr__(self) -> str:
        return f"{self._title}\n\n{self._shown.to_string()}"

    def _repr_html_(self) -> str:
        return f"<p>{self._title}</p>{self._shown.to_html()}"

    @property
    def _shown(self) -> Any:
        return self.summary().round(3)

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
