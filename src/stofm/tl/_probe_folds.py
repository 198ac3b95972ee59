"""What ``stofm.tl.probe`` leaves out: slices, blocks of a single one, or the cells of a protocol."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import numpy as np

from stofm._messages import warn
from stofm.heads.labels import MIN_SHARE
from stofm.spatial.splits import leave_out_blocks, split_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.heads.slices import SliceTables

#: Stands for a cell without a class.
NO_CLASS: Final = ""
#: Share of the fitted cells that tells when to stop.
_HELD_OUT: Final = 0.1
#: ``"stofm-paper"``: three runs, each with a random fifth of the cells to test, and a random tenth
#: of the others to validate (SToFM, arXiv 2507.11588, section C.2).
Protocol = Literal["stofm-paper"]
_N_RUNS: Final = 3
_TESTED: Final = 0.2
_VALIDATED: Final = 0.1
#: Blocks of a single slice.
_N_BLOCKS: Final = 5
_MOST_NAMED: Final = 10
#: Between the names of what belongs together.
AND: Final = " + "


def common_classes(labels: NDArray[np.str_]) -> NDArray[np.str_]:
    """Classes with at least 1 % of the labelled cells, in alphabetical order."""
    names, counts = np.unique(labels[labels != NO_CLASS], return_counts=True)
    common: NDArray[np.str_] = names[counts >= MIN_SHARE * counts.sum()]
    return common


@dataclass(frozen=True, eq=False)
class Fold:
    """Cells to fit and cells to test, by row.

    `codes` (n_obs,) are the classes of the cells, -1 for none. `fitted` and `tested` cells have a class;
    `labelled` are all labelled cells that are left out, `absent` counts those of them whose class no
    labelled cell outside has. `held_out` of the fitted ones tell when to stop; None for a tenth that
    each seed draws.
    """

    name: str
    classes: NDArray[np.str_]
    codes: NDArray[np.int64]
    fitted: NDArray[np.int64]
    tested: NDArray[np.int64]
    labelled: NDArray[np.int64]
    absent: dict[str, int]
    held_out: NDArray[np.int64] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        labels: NDArray[np.str_],
        fitted: NDArray[np.int64],
        tested: NDArray[np.int64],
        *,
        held_out: NDArray[np.int64] | None = None,
    ) -> Fold:
        """Leave out cells without a class, and classes that are rare among the fitted cells."""
        classes = common_classes(labels[fitted])
        is_known = np.isin(labels, classes)
        labelled = tested[labels[tested] != NO_CLASS]
        absent = labels[labelled][~np.isin(labels[labelled], labels[fitted])]
        names, counts = np.unique(absent, return_counts=True)
        return cls(
            name,
            classes,
            codes=np.where(is_known, np.searchsorted(classes, labels), -1),
            fitted=fitted[is_known[fitted]],
            tested=tested[is_known[tested]],
            labelled=labelled,
            absent=dict(zip(names.tolist(), counts.tolist(), strict=True)),
            held_out=None if held_out is None else held_out[is_known[held_out]],
        )

    def parts(self, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows that are fitted, and those that tell when to stop."""
        if self.held_out is not None:
            return np.setdiff1d(self.fitted, self.held_out), self.held_out
        n = len(self.fitted)
        order = self.fitted[np.random.default_rng(seed).permutation(n)]
        held_out, rows = np.split(order, [max(1, int(_HELD_OUT * n))])
        return rows, held_out


def plan_folds(
    slices: SliceTables,
    labels: NDArray[np.str_],
    *,
    left_out: str | Sequence[str | tuple[str, ...]] | None,
    spatial_key: str,
) -> list[Fold]:
    """Leave out slices in turn, or blocks if a single slice has labels, (n_obs,) classes.

    `left_out` are names of slices or keys of tables, a tuple of them for those that are left out
    together; None for each slice with labels.
    """
    known = np.flatnonzero(labels != NO_CLASS)
    named = zip(slices.names, slices.rows, strict=True)
    groups = {name: rows for name, rows in named if (labels[rows] != NO_CLASS).any()}
    if left_out is None and len(groups) == 1:
        parts = leave_out_blocks(slices.coordinates(spatial_key)[known], _N_BLOCKS)
        blocks = enumerate(parts, 1)
        return _checked([Fold.of(f"block {k}", labels, known[a], known[b]) for k, (a, b) in blocks])
    if left_out is not None:
        groups = _find(slices, left_out)
    rest = {name: np.setdiff1d(known, rows) for name, rows in groups.items()}
    return _checked([Fold.of(name, labels, rest[name], rows) for name, rows in groups.items()])


def plan_protocol(
    slices: SliceTables, labels: NDArray[np.str_], *, protocol: Protocol, spatial_key: str
) -> list[Fold]:
    """Leave out random cells, as a protocol says, and warn of the leak."""
    codes = np.unique(labels, return_inverse=True)[1] - int(NO_CLASS in labels)
    places = slices.coordinates(spatial_key)
    usable = [own for rows in slices.rows if len(own := rows[labels[rows] != NO_CLASS])]
    warn(
        f"protocol={protocol!r} tests random cells: their neighbours were fitted, and embeddings of "
        "a cell's surroundings saw both. Scores are higher than those on new slices will be; leave "
        "`protocol` out to test on left-out ones."
    )
    folds = []
    for seed in range(_N_RUNS):
        outer = split_cells(places, usable, how="random", share=_TESTED, classes=codes, seed=seed)
        rest = [np.intersect1d(rows, outer.fitted) for rows in usable]
        inner = split_cells(places, rest, how="random", share=_VALIDATED, classes=codes, seed=seed)
        parts = outer.fitted, outer.held_out
        folds.append(Fold.of("random cells", labels, *parts, held_out=inner.held_out))
    return _checked(folds)


def _find(
    slices: SliceTables, left_out: str | Sequence[str | tuple[str, ...]]
) -> dict[str, NDArray[np.int64]]:
    """Rows of what is to be left out, by name."""
    known = dict(zip(slices.names, slices.rows, strict=True))
    for key, place in zip(slices.keys or (), slices.places, strict=False):
        known.setdefault(key, np.arange(place.start, place.stop))
    asked = [left_out] if isinstance(left_out, str) else left_out
    groups = [(one,) if isinstance(one, str) else tuple(one) for one in asked]
    if unknown := [name for names in groups for name in names if name not in known]:
        near = difflib.get_close_matches(str(unknown[0]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {list(known)[:10]}."
        raise ValueError(f"left_out names {unknown[0]!r}, which is no slice; {hint}")
    rows = [np.unique(np.concatenate([known[name] for name in names])) for names in groups]
    return dict(zip(map(AND.join, groups), rows, strict=True))


def _checked(folds: Sequence[Fold]) -> list[Fold]:
    """Warn of what can't be tested, and take away folds where nothing can."""
    absent = [f"{name!r} ({n} cells of {f.name})" for f in folds for name, n in f.absent.items()]
    if absent:
        more = f" and {len(absent) - _MOST_NAMED} more" if len(absent) > _MOST_NAMED else ""
        warn(
            "Classes that no cell outside of what is left out has are not tested: "
            f"{', '.join(absent[:_MOST_NAMED])}{more}."
        )
    usable = [fold for fold in folds if len(fold.classes) > 1 and len(fold.tested)]
    if not usable:
        raise ValueError(
            "Nothing can be tested: that needs two classes with "
            f"{MIN_SHARE:.0%} or more of the cells that are fitted, and cells of them among those "
            "that are left out. Pass more slices, a column with larger classes, or another `left_out`."
        )
    if lost := [fold.name for fold in folds if fold not in usable]:
        warn(
            f"{', '.join(lost[:_MOST_NAMED])} can't be tested: the other cells have fewer than two "
            "classes, or none that is there."
        )
    return usable
