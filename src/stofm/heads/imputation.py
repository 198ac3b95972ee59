"""Expression of genes: the head of ``stofm.tl.impute``, how it is fitted and what it writes.

Genes to impute are in nothing that is read: tables are reduced to the other genes first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

import numpy as np
import pandas as pd

from stofm._edge.tables import all_or_nothing
from stofm._keys import Obsm
from stofm._logging import logger
from stofm._messages import nearest_names
from stofm.genes import embedded_vocabulary
from stofm.heads.embeddings import MADE_BY_EMBED
from stofm.heads.fitting import fit, score_outputs
from stofm.heads.genes import (
    check_overlap,
    choose_panel,
    find_genes,
    new_genes,
    read_columns,
    reduce_tables,
)
from stofm.heads.head import Head
from stofm.heads.request import resolve_reference
from stofm.heads.targets import ExpressionTargets
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from scipy import sparse

    from stofm.genes import GeneVocabulary
    from stofm.heads.blocks import Blocks
    from stofm.heads.genes import Gene, GeneColumns
    from stofm.heads.request import Request, SliceTables

#: Genes that are computed at a time.
_GENES_AT_ONCE: Final = 512


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ImputationHead(Head):
    """A head that imputes the expression of genes, from :func:`stofm.tl.impute`.

    Save it with ``head.save(folder)``, and load it with ``ImputationHead.load(folder)``.

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
        Genes that are used: all others are taken out of a query first.
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Genes to impute; inputs and the model they come from; how the head was fitted and how good
        it is.
    networks, reads, weights, expression, n_neighbors
        Networks whose weighted mean is the prediction, and their inputs.
    """

    task: ClassVar[str] = "imputation"
    called: ClassVar[str] = "genes"
    key: ClassVar[str] = Obsm.IMPUTED
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
        """Genes that are used."""
        return self.panel or ()

    def columns_of(self, genes: Sequence[str] | None) -> NDArray[np.int64]:
        """Find genes among the outputs, by name or id of the vocabulary; None for all."""
        if genes is None:
            return np.arange(len(self.outputs))
        asked = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        places = {gene_id: k for k, gene_id in enumerate(self.output_ids) if gene_id}
        places |= {name: k for k, name in enumerate(self.outputs)}
        if unknown := [gene for gene in asked if gene not in places]:
            raise ValueError(
                f"The head does not impute {len(unknown)} of {len(asked)} genes, for example "
                f"{unknown[:3]}; it knows {len(self.outputs)}, see head.genes. Fit one with these "
                f"genes.{nearest_names(unknown[0], places)}"
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

    def apply(
        self,
        slices: SliceTables,
        request: Request,
        key: str,
        genes: Sequence[str] | None = None,
    ) -> None:
        """Read the cells' panel, and write what the head makes of it."""
        self.refuse_key(slices, key, request, self.use_rep)
        chosen = self.columns_of(genes)
        model = self.model if request.model is None else request.model
        request = replace(request, model=model, use_rep=self.use_rep)
        _tell_size(slices, len(chosen), is_asked=genes is not None)
        (known,), request, _ = _find_columns(request, {"the query": slices})
        for one in known:
            if request.model is not None:
                check_overlap(one, self.inputs)
        reduced, own, _ = reduce_tables(slices, known, self.inputs, request)
        names = [self.outputs[k] for k in chosen]
        found = self.predict(self.read(reduced, own), chosen)
        # Of the inputs is the total that measured expression compares with.
        read = [
            table.var_names[columns.columns_of(self.inputs)].astype(str).tolist()
            for table, columns in zip(slices.tables, known, strict=True)
        ]
        sizes = {"n_genes": len(names), "n_inputs": len(self.inputs)}
        params = [{**sizes, "inputs": np.array(inputs, dtype=object)} for inputs in read]
        with all_or_nothing(*slices.tables):
            self.write(slices, key, {"": found}, names=names, params=params)
        logger.info("%d genes imputed in %d cells into obsm[%r].", len(names), len(found), key)

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        entries["output_ids"] = list(self.output_ids)
        scores = self.gene_scores.to_numpy(dtype=np.float64)
        return entries, arrays | {"mean": self.mean, "scale": self.scale, "gene_scores": scores}

    @classmethod
    def _read_own(cls, own: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._read_own(own, arrays) | {"output_ids": tuple(own["output_ids"])}
        return fields | {name: arrays[name] for name in ("mean", "scale", "gene_scores")}


def learn_genes(
    slices: SliceTables,
    reference: Any,
    request: Request,
    genes: Sequence[str] | None,
    key: str,
    table_key: str | None,
) -> ImputationHead:
    """Fit a head to slices, or to a reference and impute with it what these lack."""
    ImputationHead.refuse_key(slices, key, request, request.reps)
    training, own, tables = slices, request, {"the data": slices}
    if reference is not None:
        training, request, own = resolve_reference(slices, reference, request, table_key)
        tables = {"the reference": training, "the query": slices}
    own.check(training)
    if others := [rep for rep in own.reps if rep not in MADE_BY_EMBED]:
        logger.info(
            "obsm%s are read as they are; genes to impute must have no part in them.", others
        )
    (columns, *rest), own, vocabulary = _find_columns(own, tables)
    query = rest[0] if rest else []
    learnt = new_genes(columns, query) if genes is None else find_genes(genes, columns, vocabulary)
    panel = choose_panel(columns, learnt, query)
    if reference is not None:
        _tell_size(slices, len(learnt), is_asked=genes is not None)
    reduced, own, counts = reduce_tables(training, columns, panel, own, learnt=learnt)
    targets = ExpressionTargets.of(reduced, counts, [gene.name for gene in learnt])
    blocks, splits, members, fields = fit(reduced, targets, own, ImputationHead.task)
    head = ImputationHead(
        **fields,
        outputs=tuple(gene.name for gene in learnt),
        params={**own.record, "n_inputs": len(panel)},
        validation_scores=pd.DataFrame(),
        gene_scores=pd.Series(np.nan, range(len(learnt))),
        panel=panel,
        output_ids=tuple(gene.id for gene in learnt),
        mean=targets.mean,
        scale=targets.scale,
    )
    scores = []
    for k, rows in enumerate(members.held_out):
        # Members that were not fitted to these cells.
        fitted = slice(k, None, len(splits))
        parts = {name: fields[name][fitted] for name in ("networks", "reads", "weights")}
        scores.append(score_genes(replace(head, **parts), blocks.take(rows), targets.values[rows]))
    index = pd.RangeIndex(1, len(splits) + 1, name="network")
    head = replace(
        head,
        validation_scores=pd.DataFrame([one.mean() for one in scores]).set_index(index),
        gene_scores=pd.concat([one["pearson"] for one in scores], axis=1).mean(axis=1),
    )
    logger.info(
        "Head for %d genes from %d others: mean correlation %.3f with held-out cells; %d genes are "
        "below 0.1.",
        *(len(learnt), len(panel), head.gene_scores.mean(), int((head.gene_scores < 0.1).sum())),
    )
    if reference is not None:
        head.apply(slices, replace(request, model=head.model or own.model), key, head.genes)
    return head


def _tell_size(slices: SliceTables, n_genes: int, *, is_asked: bool) -> None:
    """Say how large the result will be, unless the genes were asked for."""
    n_cells = sum(table.n_obs for table in slices.tables)
    if not is_asked:
        logger.info(
            "%d genes will be imputed in %d cells, %.3g GB; pass genes= for fewer.",
            *(n_genes, n_cells, 4e-9 * n_genes * n_cells),
        )


def _find_columns(
    request: Request, tables: Mapping[str, SliceTables]
) -> tuple[list[list[GeneColumns]], Request, GeneVocabulary]:
    """Genes of all tables, the request with its model loaded if it is read, and the vocabulary."""
    is_read = bool(set(request.reps) & set(MADE_BY_EMBED))
    model = load_model(request.model) if is_read else None
    vocabulary = embedded_vocabulary() if model is None else model.vocabulary
    found = [
        read_columns(slices, vocabulary, must_map=is_read, name=name)
        for name, slices in tables.items()
    ]
    return found, replace(request, model=model), vocabulary


def score_genes(head: ImputationHead, blocks: Blocks, true: sparse.csr_matrix) -> pd.DataFrame:
    """Scores of each gene over some cells, some genes at a time."""
    parts = []
    for start in range(0, true.shape[1], _GENES_AT_ONCE):
        columns = np.arange(start, min(start + _GENES_AT_ONCE, true.shape[1]))
        own, found = true[:, columns].toarray(), head.predict(blocks, columns)
        parts.append(score_outputs(columns, own, found, "gene"))
    return pd.concat(parts, ignore_index=True)
