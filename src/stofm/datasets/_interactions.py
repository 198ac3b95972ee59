"""Simulated interactions: a ligand of some cells switches on a programme of others near them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.datasets._tissues import Panel, Tissue

#: Sender type, receiver type, ligand gene, reach in micrometres.
Interaction = tuple[str, str, str, float]

_SEED: Final = 20
#: Share of the sender's cells that express the ligand.
_ACTIVE_SHARE: Final = 0.5
#: A ligand where it is on, against the mean gene of the panel; at least this many times its base.
_LIGAND_LEVEL, _LEAST_FOLD = 8.0, 4.0
#: Genes of a programme as a share of the panel, the fewest, and how many times they rise.
_PROGRAMME_SHARE, _FEWEST_GENES, _PROGRAMME_FOLD = 0.04, 3, 3.0


class Planted(NamedTuple):
    """Interactions of a tissue and panel.

    `senders` and `receivers` are codes of types and `reaches` micrometres, (k,). Rows of `folds`
    (2 k, n_genes) are what a state adds to log expression: first the k ligands, then the k
    programmes. `truth` is what ``uns["simulation"]["interactions"]`` says.
    """

    senders: NDArray[np.int64]
    receivers: NDArray[np.int64]
    reaches: NDArray[np.float64]
    ligands: tuple[str, ...]
    folds: NDArray[np.float32]
    truth: dict[str, Any]

    def states(
        self,
        places: NDArray[np.float64],
        cell_type: NDArray[np.int64],
        rng: np.random.Generator,
    ) -> NDArray[np.bool_]:
        """Draw which cells express each ligand and respond to it, (n_cells, 2 k)."""
        found = np.zeros((len(places), len(self.folds)), dtype=bool)
        if not self.ligands:
            return found
        # What else is drawn stays as it is without interactions.
        own = rng.spawn(1)[0]
        for k, (sender, receiver, reach) in enumerate(
            zip(self.senders, self.receivers, self.reaches, strict=True)
        ):
            is_active = (cell_type == sender) & (own.random(len(places)) < _ACTIVE_SHARE)
            found[:, k] = is_active
            rows = np.flatnonzero(cell_type == receiver)
            if is_active.any() and len(rows):
                near = cKDTree(places[is_active]).query_ball_point(
                    places[rows], reach, return_length=True
                )
                # A cell is no neighbour of its own.
                found[rows, len(self.ligands) + k] = near - is_active[rows] > 0
        return found


def plan_interactions(interactions: Sequence[Interaction], tissue: Tissue, panel: Panel) -> Planted:
    """Check interactions and choose the genes of each programme, the same for every seed.

    Raises
    ------
    ValueError
        An interaction is no (sender type, receiver type, ligand gene, micrometres) of the tissue
        and panel, or the panel has too few other genes.
    """
    types, symbols = list(tissue.cell_types), panel.symbols.tolist()
    for one in interactions:
        _check(one, types, symbols)
    ligands = tuple(one[2] for one in interactions)
    pairs = [(types.index(one[0]), types.index(one[1])) for one in interactions]
    senders, receivers = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    n_genes, n = len(symbols), len(ligands)
    folds = np.zeros((2 * n, n_genes), dtype=np.float32)
    programmes = []
    is_free = (panel.marker_of == "") & ~np.isin(panel.symbols, ligands)
    rng, size = np.random.default_rng(_SEED), max(_FEWEST_GENES, int(_PROGRAMME_SHARE * n_genes))
    for k, (sender, receiver) in enumerate(pairs):
        column = symbols.index(ligands[k])
        level = _LIGAND_LEVEL / n_genes / panel.expression[sender, column]
        folds[k, column] = np.log(max(level, _LEAST_FOLD))
        free = np.flatnonzero(is_free)
        # The half that the receiver expresses most, so that a programme can be seen.
        seen = free[np.argsort(-panel.expression[receiver, free], kind="stable")]
        seen = seen[: max(len(seen) // 2, size)]
        if len(seen) < size:
            raise ValueError(
                f"The panel of {n_genes} genes has {len(seen)} left that mark no type, for a "
                f"programme of {size}; raise `n_genes` or pass fewer `interactions`."
            )
        chosen = np.sort(rng.permutation(seen)[:size])
        folds[n + k, chosen] = np.log(_PROGRAMME_FOLD)
        is_free[chosen] = False
        programmes.append(",".join(panel.symbols[chosen].tolist()))
    names = ("sender", "receiver", "ligand", "distance")
    truth: dict[str, Any] = {
        name: np.array([one[at] for one in interactions], dtype=object if at < 3 else float)
        for at, name in enumerate(names)
    }
    truth["programme"] = np.array(programmes, dtype=object)
    return Planted(senders, receivers, truth["distance"], ligands, folds, truth)


def _check(one: Any, types: list[str], symbols: list[str]) -> None:
    expected = "(sender type, receiver type, ligand gene, micrometres)"
    if not isinstance(one, tuple | list) or len(one) != 4:
        raise ValueError(f"An interaction must be {expected}, found {one!r}.")
    sender, receiver, ligand, reach = one
    if strange := [name for name in (sender, receiver) if name not in types]:
        raise ValueError(
            f"`interactions` name {strange}, which the tissue lacks; its types are {types}."
        )
    if ligand not in symbols:
        raise ValueError(
            f"`interactions` name the ligand {ligand!r}, which is not among the {len(symbols)} "
            "genes of the panel; raise `n_genes` or choose one of adata.var_names."
        )
    if not isinstance(reach, int | float | np.number) or not 0 < reach < np.inf:
        raise ValueError(f"The last entry of {expected} must be above 0, found {reach!r}.")


def join_states(states: NDArray[np.bool_], names: tuple[str, ...]) -> NDArray[np.object_]:
    """Names of the states that each row has, joined by commas, (n_rows,)."""
    combinations, row = np.unique(states, axis=0, return_inverse=True)
    joined = [",".join(np.array(names)[one].tolist()) for one in combinations]
    found: NDArray[np.object_] = np.array(joined, dtype=object)[row.ravel()]
    return found
