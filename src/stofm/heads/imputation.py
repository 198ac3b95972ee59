"""Expression of genes: the head of ``stofm.tl.impute``, how it is fitted and what it writes.

Genes to impute are in nothing that is read: tables are reduced to the other genes first.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pandas as pd

from stofm import metrics
from stofm._edge.records import (
    all_or_nothing,
    make_frame,
    refuse_not_finite,
    write_frame,
    write_record,
)
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import warn
from stofm.genes import embedded_vocabulary
from stofm.heads.embeddings import MADE_BY_EMBED
from stofm.heads.fitting import Task, fit
from stofm.heads.gene_columns import Gene, choose_panel
from stofm.heads.head import Head, refuse_reserved, require_head
from stofm.heads.network import apply_head
from stofm.heads.options import checked_reps
from stofm.heads.panel import check_overlap, find_genes, new_genes, read_columns, reduce_tables
from stofm.heads.slices import resolve_reference
from stofm.heads.targets import ExpressionTargets, expression_targets
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary
    from stofm.heads.blocks import Blocks
    from stofm.heads.members import Members
    from stofm.heads.options import Request
    from stofm.heads.slices import SliceTables
    from stofm.nn import Stofm
    from stofm.spatial import Split

#: A query with a smaller share of a head's panel is refused, or warned of.
_LEAST_SHARE: Final = 0.1
_LOW_SHARE: Final = 0.5
#: Genes that are computed at a time.
_GENES_AT_ONCE: Final = 512


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ImputationHead(Head):
    """A head that imputes the expression of genes, from :func:`stofm.tl.impute`.

    Keep it with ``head.save(folder)``, and read it with ``ImputationHead.load(folder)``.

    Attributes
    ----------
    gene_scores
        By gene, Pearson correlation of measured and imputed expression over held-out cells, mean
        over the rounds; NaN for a gene that is constant there. Drop genes with a low one.
    output_ids
        Ids of the genes to impute in the model's vocabulary, ``""`` for genes that it lacks.
    mean, scale
        (n_genes,) mean and standard deviation of each gene over the training cells.
    panel
        Genes that are read: all others are taken out of a query first.
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Genes to impute; what is read and by which model; how the head was fitted and how good it
        is.
    networks, reads, weights, expression, n_neighbors
        Networks whose weighted mean is the prediction, and what they read.
    """

    task: ClassVar[str] = "imputation"
    called: ClassVar[str] = "genes"
    needs_places: ClassVar[bool] = True
    may_be_nan: ClassVar[frozenset[str]] = frozenset({"gene_scores"})

    gene_scores: pd.Series[float]
    output_ids: tuple[str, ...]
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    def __post_init__(self) -> None:
        """Name the scores."""
        scores = np.asarray(self.gene_scores, dtype=np.float64)
        index = pd.Index(self.outputs, name="gene")
        object.__setattr__(self, "gene_scores", pd.Series(scores, index=index, name="pearson"))

    @property
    def genes(self) -> tuple[str, ...]:
        """Names of the genes that can be imputed."""
        return self.outputs

    @property
    def inputs(self) -> tuple[Gene, ...]:
        """Genes that are read."""
        return self.panel or ()

    def columns_of(self, genes: Sequence[str] | None) -> NDArray[np.int64]:
        """Find genes among the outputs, by name or id of the vocabulary; None for all."""
        if genes is None:
            return np.arange(len(self.outputs))
        asked = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        places = {gene_id: k for k, gene_id in enumerate(self.output_ids) if gene_id}
        places |= {name: k for k, name in enumerate(self.outputs)}
        if unknown := [gene for gene in asked if gene not in places]:
            near = difflib.get_close_matches(unknown[0], places, n=3)
            raise ValueError(
                f"The head does not impute {len(unknown)} of {len(asked)} genes, for example "
                f"{unknown[:3]} (near {unknown[0]!r}: {near or 'nothing'}). It knows "
                f"{len(self.outputs)} genes, see head.genes; fit one with these genes."
            )
        columns = np.array([places[gene] for gene in asked], dtype=np.int64)
        if not len(columns) or len(np.unique(columns)) < len(columns):
            raise ValueError(f"genes must name the genes to impute, each once; found {asked[:5]}.")
        return columns

    def predict(
        self, blocks: Blocks, columns: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Log-normalised expression, float32 (n, n_genes), not negative; of some outputs, or of all."""
        columns = np.arange(len(self.outputs)) if columns is None else columns
        found = np.zeros((len(blocks.features), len(columns)), dtype=np.float32)
        for start in range(0, len(columns), _GENES_AT_ONCE):
            own = columns[start : start + _GENES_AT_ONCE]
            part = found[:, start : start + _GENES_AT_ONCE]
            for vote, weight in self.votes(blocks, "values", columns=own):
                part += weight.astype(np.float32)[:, None] * vote
            np.maximum(part * self.scale[own] + self.mean[own], 0.0, out=part)
        return found

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        entries["output_ids"] = list(self.output_ids)
        scores = self.gene_scores.to_numpy(dtype=np.float64)
        return entries, arrays | {"mean": self.mean, "scale": self.scale, "gene_scores": scores}

    @classmethod
    def _read_own(cls, own: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._read_own(own, arrays) | {"output_ids": tuple(own["output_ids"])}
        return fields | {name: arrays[name] for name in ("mean", "scale", "gene_scores")}


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpressionTask(Task):
    """Learning the expression of genes from the other genes of reduced tables.

    Attributes
    ----------
    panel
        Genes that are read.
    learnt
        Genes of the targets.
    """

    name: ClassVar[str] = ImputationHead.task

    panel: tuple[Gene, ...]
    learnt: tuple[Gene, ...]

    def make_head(
        self, blocks: Blocks, splits: Sequence[Split], members: Members, common: dict[str, Any]
    ) -> ImputationHead:
        """Score the genes on the held-out cells of each round."""
        targets = self.targets
        assert isinstance(targets, ExpressionTargets)
        n_rounds = len(splits)
        scores = [
            _score_genes(members, blocks, targets, rows, slice(k, None, n_rounds))
            for k, rows in enumerate(members.held_out)
        ]
        index = pd.RangeIndex(1, n_rounds + 1, name="network")
        return ImputationHead(
            **common,
            outputs=tuple(gene.name for gene in self.learnt),
            params={**self.request.record, "n_inputs": len(self.panel)},
            validation_scores=pd.DataFrame([one.mean() for one in scores]).set_index(index),
            gene_scores=pd.concat([one["pearson"] for one in scores], axis=1).mean(axis=1),
            panel=self.panel,
            output_ids=tuple(gene.id for gene in self.learnt),
            mean=targets.mean,
            scale=targets.scale,
        )


def _score_genes(
    members: Members,
    blocks: Blocks,
    targets: ExpressionTargets,
    rows: NDArray[np.int64],
    own: slice,
) -> pd.DataFrame:
    """Pearson correlation, RMSE and MAE of each gene over held-out cells, some genes at a time.

    `own` are the members that were not fitted to these. NaN for fewer than two cells.
    """
    if len(rows) < 2:
        return pd.DataFrame(np.nan, range(targets.n_outputs), ["pearson", "rmse", "mae"])
    chosen = list(zip(members.networks, members.reads, members.weights, strict=True))[own]
    read = {source: blocks.of(source) for _, source, _ in chosen}
    total = sum(weight for *_, weight in chosen)
    parts = []
    for start in range(0, targets.n_outputs, _GENES_AT_ONCE):
        columns = np.arange(start, min(start + _GENES_AT_ONCE, targets.n_outputs))
        true = targets.values[rows][:, columns].toarray()
        found = np.zeros_like(true)
        for network, source, weight in chosen:
            vote = apply_head(network, np.asarray(read[source])[rows], "values", columns=columns)
            found += np.float32(weight / total) * vote
        found = np.maximum(found * targets.scale[columns] + targets.mean[columns], 0.0)
        scores = {"pearson": metrics.pearson, "rmse": metrics.rmse, "mae": metrics.mae}
        parts.append(pd.DataFrame({name: score(true, found) for name, score in scores.items()}))
    return pd.concat(parts, ignore_index=True)


def learn_genes(
    slices: SliceTables,
    reference: Any,
    request: Request,
    genes: Sequence[str] | None,
    key: str,
    table_key: str | None,
) -> ImputationHead:
    """Fit a head to slices, or to a reference and impute with it what these lack."""
    refuse_reserved(key, Obsm.IMPUTED, request.spatial_key, *checked_reps(request.use_rep))
    training, own = slices, request
    if reference is not None:
        training, request, own = resolve_reference(slices, reference, request, table_key)
    own.check(training)
    model, vocabulary = _model_and_vocabulary(request.model, request.use_rep)
    must_map = model is not None
    name = "the data" if reference is None else "the reference"
    columns = read_columns(training, vocabulary, must_map=must_map, name=name)
    query = None
    if reference is not None:
        query = read_columns(slices, vocabulary, must_map=must_map, name="the query")
    if genes is not None:
        learnt = find_genes(genes, columns, vocabulary)
    else:
        learnt = new_genes(columns, query or ())
    panel = choose_panel(columns, learnt, query).inputs
    reduced, own, counts = reduce_tables(
        training, columns, panel, replace(own, model=model), learnt=learnt
    )
    targets = expression_targets(reduced, counts)
    targets = targets.standardised(_learnable(targets, learnt))
    task = ExpressionTask(targets=targets, request=own, panel=panel, learnt=learnt)
    head: ImputationHead = fit(task, reduced)
    logger.info(
        "Head for %d genes from %d others: mean correlation %.3f with held-out cells; %d genes are "
        "below 0.1.",
        len(head.outputs),
        len(head.inputs),
        head.gene_scores.mean(),
        int((head.gene_scores < 0.1).sum()),
    )
    if reference is not None:
        impute_with(slices, head, replace(request, model=head.model or model), key)
    return head


def _model_and_vocabulary(
    model: Stofm | str | Path | None, use_rep: str | Sequence[str]
) -> tuple[Stofm | None, GeneVocabulary]:
    """Load the model if something of it is read."""
    reps = checked_reps(use_rep)
    if others := [rep for rep in reps if rep not in MADE_BY_EMBED]:
        logger.info(
            "obsm%s are read as they are; genes to impute must have no part in them.", others
        )
    if len(others) == len(reps):
        return None, embedded_vocabulary()
    loaded = load_model(model)
    return loaded, loaded.vocabulary


def _learnable(targets: ExpressionTargets, genes: Sequence[Gene]) -> NDArray[np.int64]:
    """Cells to learn from; refuse genes of which they tell nothing."""
    known = np.flatnonzero(targets.is_known)
    if not len(known):
        raise ValueError(
            "No cell has any count in the genes that are read, so there is nothing to learn from."
        )
    flat = targets.is_constant(known)
    examples = [gene.name for gene, is_flat in zip(genes, flat, strict=True) if is_flat][:3]
    if flat.all():
        raise ValueError(
            f"All {len(genes)} genes to impute are constant over the training cells, for example "
            f"{examples}: there is nothing to learn. Choose other genes."
        )
    if flat.any():
        warn(
            f"{int(flat.sum())} of {len(genes)} genes are constant over the training cells and will "
            f"be imputed as such, which says nothing, for example {examples}. Leave them out of "
            "`genes`."
        )
    return known


def impute_with(
    slices: SliceTables,
    head: ImputationHead,
    request: Request,
    key: str,
    genes: Sequence[str] | None = None,
) -> None:
    """Read the cells' panel as a head does, and write what it makes of them."""
    require_head(head, ImputationHead)
    refuse_reserved(key, Obsm.IMPUTED, request.spatial_key, *head.use_rep)
    chosen = head.columns_of(genes)
    model = head.model if request.model is None else request.model
    loaded, vocabulary = _model_and_vocabulary(model, head.use_rep)
    known = read_columns(slices, vocabulary, must_map=loaded is not None, name="the query")
    for one in known:
        if loaded is not None:
            check_overlap(one, head.inputs, least=_LEAST_SHARE, low=_LOW_SHARE)
    request = replace(request, model=loaded, use_rep=head.use_rep)
    reduced, own, _ = reduce_tables(slices, known, head.inputs, request)
    names = [head.outputs[k] for k in chosen]
    found = head.predict(head.read(reduced, own), chosen)
    refuse_not_finite(head.task, found)
    # All is computed before anything is written.
    frames = [
        make_frame(table, found[part], names)
        for table, part in zip(slices.tables, slices.places, strict=True)
    ]
    with all_or_nothing(*slices.tables):
        for table, frame, columns in zip(slices.tables, frames, known, strict=True):
            read = table.var_names[columns.columns_of(head.inputs)].astype(str)
            params = {
                "n_genes": len(names),
                "n_inputs": len(head.inputs),
                # Of these is the total that measured expression compares with.
                "inputs": np.array(read.tolist(), dtype=object),
                "use_rep": list(head.use_rep),
                "strategy": head.strategy,
                "seed": head.params["seed"],
            }
            write_record(table, key, params, **head.model_names())
            write_frame(table, key, frame, names)
    logger.info("%d genes imputed in %d cells into obsm[%r].", len(names), len(found), key)
