"""Edits of a table as users request them: their effect, and the effect of similar random ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._config import check_one_of
from stofm._logging import logger
from stofm._messages import warn
from stofm.heads.request import check_whole_number
from stofm.perturb.edit import Edit
from stofm.perturb.effect import (
    PerturbationEffect,
    adjusted,
    compare,
    draw_like,
    like,
    mean_effects,
    shifts,
)
from stofm.perturb.reading import Subject, read_goal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.heads.request import Request
    from stofm.perturb.reading import Goal
    from stofm.perturb.tissue import GeneChange, Recompute, Tissue

ROLES: Final = ("edited", "neighbor", "far", "out_of_reach", "not_in_input", "removed")
_NO_CELLS: Final = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """What all edits of a call have in common.

    `cells` are rows of those that may be edited, `receivers` of those whose shift counts (None: the
    edited ones, or the neighbours of removed ones), `goal` says how near embeddings are to the
    goal, and `n_null` is the number of random edits.
    """

    subject: Subject
    cells: NDArray[np.int64]
    receivers: NDArray[np.int64] | None
    goal: Goal | None
    recompute: Recompute
    n_null: int

    @classmethod
    def read(
        cls,
        data: Any,
        request: Request,
        table_key: str | None,
        cells: Any,
        receivers: Any,
        goal: Any,
        *,
        recompute: Recompute,
        n_null: int,
    ) -> Question:
        """Read a table and a request in the user's terms."""
        check_one_of("recompute", recompute, ("micro", "macro"))
        check_whole_number("null", n_null, least=0)
        head = goal[0] if isinstance(goal, tuple) and goal else None
        subject = Subject.read(data, request, table_key, head)
        return cls(
            subject=subject,
            cells=subject.select(cells, "cells"),
            receivers=None if receivers is None else subject.select(receivers, "receivers"),
            goal=read_goal(subject, goal),
            recompute=recompute,
            n_null=n_null,
        )

    @property
    def tissue(self) -> Tissue:
        """The cells."""
        return self.subject.tissue

    def receivers_of(self, edit: Edit) -> NDArray[np.int64]:
        """Rows whose shift counts."""
        if self.receivers is not None:
            return np.setdiff1d(self.receivers, edit.removed)
        return self.tissue.neighbors(edit.removed) if len(edit.removed) else np.sort(edit.cells)

    def effects(self, edits: Sequence[Edit]) -> NDArray[Any]:
        """Mean shift of the receivers of each edit."""
        receivers = [self.receivers_of(edit) for edit in edits]
        return mean_effects(self.tissue.embed(edits, self.recompute), receivers, self.goal)

    # Genes

    @cached_property
    def inputs(self) -> sparse.csc_array:
        """Which genes are in the input of which of the cells, (n_cells, n_tokens)."""
        return self.tissue.inputs(self.cells)

    @cached_property
    def n_with_gene(self) -> NDArray[np.int64]:
        """In the input of how many of the cells each gene is, by token."""
        found: NDArray[np.int64] = np.diff(self.inputs.indptr)
        return found

    def edit(self, changes: Mapping[int, GeneChange]) -> Edit:
        """The edit of some genes."""
        return self.tissue.edit_genes(changes, self.cells, self.inputs)

    def gene_effects(self, changes: Sequence[Mapping[int, GeneChange]]) -> NDArray[np.floating]:
        """Effect of each change; NaN where no cell is edited."""
        edits = [self.edit(one) for one in changes]
        found = self.effects(edits)
        found[[len(edit.cells) == 0 for edit in edits]] = np.nan
        return found

    def alike(
        self, changes: Mapping[int, GeneChange], among: NDArray[np.int64] | None = None
    ) -> dict[int, NDArray[np.int64]]:
        """For each changed gene, other genes with similar detection and mean count in the cells.

        Deleted ones are drawn from genes in the input of a cell. `among` are those to choose from.
        """
        if among is None:
            tokens = self.subject.columns.token_ids
            among = np.unique(tokens[tokens >= 0]).astype(np.int64)
        among = np.setdiff1d(among, list(changes))
        found = {}
        for gene, change in changes.items():
            is_usable = self.n_with_gene[among] > 0 if change in ("delete", 0) else among >= 0
            others = among[is_usable]
            nearest = like(self.statistics[gene], self.statistics[others], self.n_null)
            found[gene] = others[nearest]
        return found

    @cached_property
    def statistics(self) -> NDArray[np.float64]:
        """Detection and mean count of genes, by token."""
        return self.subject.gene_statistics(self.cells)


def perturb_genes(question: Question, genes: Mapping[str, GeneChange]) -> PerturbationEffect:
    """Edit genes together and one by one, and compare with similar genes."""
    changes = {question.subject.gene(name): _checked(name, x) for name, x in genes.items()}
    if len(changes) < len(genes):
        raise ValueError(f"Some of the genes {list(genes)} are the same; name each once.")
    alike = question.alike(changes) if question.n_null else dict.fromkeys(changes, _NO_CELLS)
    singly = [{gene: x} for gene, x in changes.items()]
    null = [[{int(one): changes[gene]} for one in alike[gene]] for gene in changes]
    if len(changes) > 1:
        n = min(map(len, alike.values()))
        joint = [{int(alike[g][k]): x for g, x in changes.items()} for k in range(n)]
        singly, null = [*singly, changes], [*null, joint]
    effects = question.gene_effects([*singly, *(one for part in null for one in part)])
    own = effects[: len(singly)]
    nulls = np.split(effects[len(singly) :], np.cumsum([len(part) for part in null])[:-1])
    tests = [compare(float(x), part) for x, part in zip(own, nulls, strict=True)]
    tokens = list(changes)
    table = gene_table(list(genes), tests[: len(tokens)], question.n_with_gene[tokens])
    table.insert(0, "edit", [str(x) for x in genes.values()])
    for name, n in table["n_cells"].items():
        if n == 0 and genes[name] in ("delete", 0):
            warn(
                f"The gene {name!r} is in the input of none of the {len(question.cells)} selected "
                "cells: it is not_in_input, and its effect is not known."
            )
    return _effect(question, question.edit(changes), tests[-1], table)


def gene_table(
    names: Sequence[str], tests: Sequence[Mapping[str, float]], n_cells: NDArray[np.integer]
) -> pd.DataFrame:
    """Tests of genes as a table, with false discovery rates."""
    import pandas as pd

    columns = ["effect", "null_mean", "null_std", "z", "p", "n_null"]
    table = pd.DataFrame(tests, index=pd.Index(names, name="gene", dtype=str), columns=columns)
    is_tested = np.isfinite(table["effect"].to_numpy(dtype=np.float64))
    table.insert(0, "status", np.where(is_tested, "tested", "not_in_input"))
    table["fdr"] = adjusted(table["p"].to_numpy(dtype=np.float64))
    table["n_cells"] = n_cells
    return table


def _checked(name: str, change: Any) -> GeneChange:
    if change == "delete" or change == "first":
        return "delete" if change == "delete" else "first"
    is_number = isinstance(change, int | float | np.number) and not isinstance(change, bool)
    if not is_number or not np.isfinite(change) or change < 0 or change != int(change):
        raise ValueError(f"genes[{name!r}] must be 'delete', 'first' or a count, found {change!r}.")
    return float(change)


# Cells and edges


def perturb_table(
    question: Question,
    *,
    genes: Mapping[str, GeneChange] | None,
    remove: bool,
    replace: Any,
    move: Sequence[float] | None,
    detach: Any,
    shuffle: bool | str,
) -> PerturbationEffect:
    """Make the one edit that is requested."""
    subject, tissue, cells = question.subject, question.tissue, question.cells
    asked = {
        "genes": bool(genes),
        "remove": remove,
        "replace": replace is not None,
        "move": move is not None,
        "detach": detach is not None,
        "shuffle": shuffle is not False,
    }
    if sum(asked.values()) != 1:
        found = [name for name, is_asked in asked.items() if is_asked] or "none"
        raise ValueError(f"Pass one edit: {', '.join(asked)}; found {found}.")
    if genes:
        return perturb_genes(question, genes)
    if remove:
        return perturb_cells(question, lambda rows, _: Edit(removed=rows), cells)
    if replace is not None:
        donors = subject.select(replace, "replace")
        return perturb_cells(
            question, lambda rows, rng: tissue.replace_cells(rows, donors, rng), cells
        )
    if move is not None:
        if np.shape(move) != (2,) or not np.isfinite(move).all():
            raise ValueError(f"move must be (x, y), finite, found {move!r}.")
        return perturb_cells(question, lambda rows, _: tissue.move_cells(rows, move), cells)
    if detach is not None:
        senders = subject.select(detach, "detach")
        return perturb_cells(question, lambda rows, _: tissue.detach_cells(cells, rows), senders)
    one = np.zeros(tissue.n_cells, dtype=np.int64)
    groups = subject.types(shuffle)[0] if isinstance(shuffle, str) else one
    return perturb_cells(question, lambda rows, rng: tissue.shuffle_cells(rows, groups, rng), cells)


def perturb_cells(
    question: Question,
    make: Callable[[NDArray[np.int64], np.random.Generator], Edit],
    drawn: NDArray[np.int64],
) -> PerturbationEffect:
    """Edit cells or edges, and compare with as many similar random cells.

    `make` gives the edit of some cells: of `drawn` first, then of random ones in their place.
    """
    rng = np.random.default_rng(question.tissue.seed)
    rows = [drawn, *_random_cells(question, drawn, rng)]
    edits = [make(own, rng) for own in rows]
    effects = question.effects(edits)
    test = compare(float(effects[0]), effects[1:])
    return _effect(question, edits[0], test, gene_table([], [], _NO_CELLS))


def _random_cells(
    question: Question, drawn: NDArray[np.int64], rng: np.random.Generator
) -> list[NDArray[np.int64]]:
    """Random cells similar to the drawn ones, slice by slice; none where too few are left."""
    if not question.n_null:
        return []
    statistics = question.subject.cell_statistics()
    parts: list[list[NDArray[np.int64]]] = [[] for _ in range(question.n_null)]
    for rows in question.tissue.slices:
        own = np.intersect1d(rows, drawn)
        others = np.setdiff1d(rows, np.union1d(drawn, question.cells))
        if len(others) < len(own):
            logger.info(
                "No null: %d of a slice's %d cells are chosen, so there are not enough others to "
                "draw from.",
                *(len(own), len(rows)),
            )
            return []
        for part in parts if len(own) else ():
            part.append(others[draw_like(statistics[own], statistics[others], rng)])
    return [np.sort(np.concatenate(part)) for part in parts]


# What comes out


def _effect(
    question: Question, edit: Edit, test: Mapping[str, float], genes: pd.DataFrame
) -> PerturbationEffect:
    counts = {"n_edited": len(edit.edited), "n_receivers": len(question.receivers_of(edit))}
    model = question.tissue.model
    return PerturbationEffect(
        cells=_cell_table(question, edit),
        genes=genes,
        overall={**test, **counts},
        params={
            "model": model.name,
            "model_fingerprint": model.fingerprint,
            "recompute": question.recompute,
            "null": question.n_null,
            "seed": question.tissue.seed,
        },
    )


def _cell_table(question: Question, edit: Edit) -> pd.DataFrame:
    """Role, distance and shift of each cell."""
    import pandas as pd

    tissue, n, edited = question.tissue, question.tissue.n_cells, edit.edited
    names = ("cosine", "l2") if question.goal is None else ("cosine", "l2", "towards")
    moved = {name: np.zeros(n) for name in names}
    role = np.full(n, ROLES.index("out_of_reach"))
    for one in tissue.embed([edit], question.recompute):
        for name, values in shifts(one.before, one.after, question.goal).items():
            moved[name][one.rows] = values
        role[one.rows] = ROLES.index("far")
    near = tissue.neighbors(edited)
    role[near[role[near] == ROLES.index("far")]] = ROLES.index("neighbor")
    role[question.cells] = ROLES.index("not_in_input")
    role[edited] = ROLES.index("removed" if len(edit.removed) else "edited")
    has_none = np.isin(role, [ROLES.index("not_in_input"), ROLES.index("removed")])
    for values in moved.values():
        values[has_none] = np.nan
    columns = {
        "role": pd.Categorical.from_codes(role, list(ROLES)),
        "distance": tissue.distances(edited),
        **moved,
    }
    return pd.DataFrame(columns, index=question.subject.adata.obs_names)


#: A gene is expressed if it is in the input of this share of the cells.
_EXPRESSED: Final = 0.05


def screen_genes(
    question: Question,
    genes: Sequence[str] | Literal["expressed"],
    change: Literal["delete", "first"],
) -> pd.DataFrame:
    """Edit each gene on its own, test it against similar genes, and rank by z."""
    check_one_of("edit", change, ("delete", "first"))
    subject = question.subject
    if isinstance(genes, str):
        if genes != "expressed":
            raise ValueError(f"genes must be 'expressed' or a list of names, found {genes!r}.")
        is_common = question.n_with_gene >= max(1.0, _EXPRESSED * len(question.cells))
        tokens = np.flatnonzero(is_common)
        names = subject.names(tokens)
    else:
        names = list(dict.fromkeys(genes))
        tokens = np.array([subject.gene(name) for name in names], dtype=np.int64)
    if not len(tokens):
        raise ValueError(
            "There is no gene to screen: pass `genes` by name, or `cells` in which more are detected."
        )
    # If there are enough genes they are each other's null; else others are embedded for it.
    among = tokens if len(np.unique(tokens)) > question.n_null else None
    null: dict[int, NDArray[np.int64]] = {}
    for gene in tokens if question.n_null else ():
        null |= question.alike({int(gene): change}, among)
    every = np.unique(np.concatenate([tokens, *null.values()]))
    found = question.gene_effects([{int(gene): change} for gene in every])
    effect = dict(zip(every.tolist(), found.tolist(), strict=True))
    tests = [
        compare(effect[int(gene)], np.array([effect[int(k)] for k in null.get(int(gene), ())]))
        for gene in tokens
    ]
    table = gene_table(names, tests, question.n_with_gene[tokens])
    order = ["z", "effect"] if question.n_null else ["effect"]
    return table.sort_values(order, ascending=False, kind="stable")
