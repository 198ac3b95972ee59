"""The head of ``stofm.tl.impute``, what it reads and what it writes."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

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
from stofm._logging import logger
from stofm.heads.base import Entries, Head
from stofm.heads.embeddings import counts_layer
from stofm.heads.gene_columns import Gene
from stofm.heads.inputs import add_neighborhood
from stofm.heads.network import apply_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from stofm.heads.gene_columns import GeneColumns
    from stofm.heads.inputs import Inputs
    from stofm.heads.options import Reading
    from stofm.heads.sections import Sections
    from stofm.heads.targets import ExpressionTargets
    from stofm.nn import PredictionHead

#: Genes that are computed at a time.
_GENES_AT_ONCE: Final = 512


class Ballot(NamedTuple):
    """A network, what it reads, and how much it counts."""

    network: PredictionHead
    features: NDArray[np.float32]
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _Entries(Entries):
    inputs: tuple[tuple[str, str], ...]
    output_ids: tuple[str, ...]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ImputationHead(Head):
    """A head that imputes the expression of genes, from :func:`stofm.tl.impute`.

    Keep it with ``head.save(folder)``, and read it with ``ImputationHead.load(folder)``. The
    attributes of the parts that all heads have come after these.

    Attributes
    ----------
    gene_scores
        By gene, Pearson correlation of measured and imputed expression over held-out cells, mean
        over the networks, each on the cells that it was not fitted to; NaN for a gene that is
        constant there. Drop genes with a low one.
    inputs
        Genes that the model reads: all others are taken out of a query first.
    output_ids
        Ids of the genes to impute in the model's vocabulary, ``""`` for genes that it lacks.
    mean, scale
        (n_genes,) mean and standard deviation of each gene over the training cells.
    outputs, use_rep, origin, strategy, params, split, validation_scores, history, model
        Genes to impute; what is read and by which model; how the head was fitted and how good it
        is.
    networks, reads, weights, expression, n_neighbors
        Networks whose weighted mean is the prediction, and what they read.
    """

    task: ClassVar[str] = "imputation"
    called: ClassVar[str] = "genes"
    own_entries: ClassVar[type[Any]] = _Entries
    params_read: ClassVar[tuple[str, ...]] = ("seed",)
    may_be_nan: ClassVar[frozenset[str]] = frozenset({"gene_scores"})

    gene_scores: pd.Series[float]
    inputs: tuple[Gene, ...]
    output_ids: tuple[str, ...]
    mean: NDArray[np.float32]
    scale: NDArray[np.float32]

    @property
    def genes(self) -> tuple[str, ...]:
        """Names of the genes that can be imputed."""
        return self.outputs

    @property
    def targets(self) -> tuple[Gene, ...]:
        """The genes that can be imputed."""
        pairs = zip(self.outputs, self.output_ids, strict=True)
        return tuple(Gene(name, gene_id) for name, gene_id in pairs)

    def columns_of(self, genes: Sequence[str] | None) -> NDArray[np.int64]:
        """Find genes among the outputs, by name or id of the vocabulary; None for all."""
        if genes is None:
            return np.arange(len(self.outputs))
        asked = [genes] if isinstance(genes, str) else [str(gene) for gene in genes]
        places = {gene_id: k for k, gene_id in enumerate(self.output_ids) if gene_id}
        places |= {name: k for k, name in enumerate(self.outputs)}
        if unknown := [gene for gene in asked if gene not in places]:
            near = difflib.get_close_matches(unknown[0], places, n=3)
            msg = (
                f"The head does not impute {len(unknown)} of {len(asked)} genes, for example "
                f"{unknown[:3]} (near {unknown[0]!r}: {near or 'nothing'}). It knows "
                f"{len(self.outputs)} genes, see head.genes; fit one with these genes."
            )
            raise ValueError(msg)
        columns = np.array([places[gene] for gene in asked], dtype=np.int64)
        if not len(columns) or len(np.unique(columns)) < len(columns):
            msg = f"genes must name the genes to impute, each once; found {asked[:5]}."
            raise ValueError(msg)
        return columns

    def predict(
        self, inputs: Inputs, columns: NDArray[np.int64] | None = None
    ) -> NDArray[np.float32]:
        """Log-normalised expression, float32 (n, n_genes), not negative; of some outputs, or of all."""
        columns = np.arange(len(self.outputs)) if columns is None else columns
        return predict_expression(ballots_of(self, inputs), columns, self.mean, self.scale)

    def read_beside_panel(
        self,
        sections: Sections,
        columns: Sequence[GeneColumns],
        inputs: Inputs,
        reading: Reading,
    ) -> Inputs:
        """Add what networks read beside embeddings; genes that are lacking are taken to be as usual."""
        if self.expression is not None:
            parts = []
            for k, (table, own) in enumerate(zip(sections.tables, columns, strict=True)):
                with sections.naming(k):
                    layer = counts_layer(table, reading.layer)
                    parts.append(self.expression.read(table, own, layer=layer, least_measured=0.0))
            scores = np.concatenate([part for part in parts if part is not None])
            scores = self.expression.centered(scores, sections.slices.rows)
            inputs = replace(inputs, expression=scores)
        return add_neighborhood(
            sections,
            inputs,
            self.n_neighbors,
            spatial_key=reading.spatial_key,
            needed=range(len(sections.tables)),
        )

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries, arrays = super()._own()
        entries["inputs"] = [[gene.name, gene.id] for gene in self.inputs]
        entries["output_ids"] = list(self.output_ids)
        scores = self.gene_scores.to_numpy(dtype=np.float64)
        own = {"mean": self.mean, "scale": self.scale, "gene_scores": scores}
        return entries, arrays | own

    @classmethod
    def _read_own(cls, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        own = ("mean", "scale", "gene_scores")
        return super()._read_own(entries, arrays) | {
            "inputs": tuple(Gene(name, id_) for name, id_ in entries.inputs),
            "output_ids": entries.output_ids,
            **{name: arrays[name] for name in own},
        }

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        for name in ("output_ids", "mean", "scale", "gene_scores"):
            if np.shape(getattr(self, name)) != (len(self.outputs),):
                yield f"{name} must have {len(self.outputs)} entries, one for each gene"
        if not (self.scale > 0).all():
            yield "scale must be positive"

    def __post_init__(self) -> None:
        """Name the scores."""
        scores = np.asarray(self.gene_scores, dtype=np.float64)
        index = pd.Index(self.outputs, name="gene")
        object.__setattr__(self, "gene_scores", pd.Series(scores, index=index, name="pearson"))


def ballots_of(head: ImputationHead, inputs: Inputs) -> list[Ballot]:
    """The networks of a head with what they read of some cells, and their weights."""
    weights = head.weights or (1.0,) * len(head.networks)
    read = {source: inputs.of(source) for source in set(head.sources)}
    return [
        Ballot(network, features, weight)
        for network, source, weight in zip(head.networks, head.sources, weights, strict=True)
        if (features := read[source]) is not None
    ]


def predict_expression(
    ballots: Sequence[Ballot],
    columns: NDArray[np.int64],
    mean: NDArray[np.float32],
    scale: NDArray[np.float32],
) -> NDArray[np.float32]:
    """Weighted mean of networks, in the unit of the genes and clipped at 0; some genes at a time."""
    total = sum(ballot.weight for ballot in ballots)
    found = np.empty((len(ballots[0].features), len(columns)), dtype=np.float32)
    for start in range(0, len(columns), _GENES_AT_ONCE):
        own = columns[start : start + _GENES_AT_ONCE]
        part = np.zeros((len(found), len(own)), dtype=np.float32)
        for network, features, weight in ballots:
            if weight:
                part += weight / total * apply_head(network, features, "values", columns=own)
        part *= scale[own]
        part += mean[own]
        found[:, start : start + _GENES_AT_ONCE] = np.maximum(part, 0.0, out=part)
    return found


def score_genes(
    ballots: Sequence[Ballot], targets: ExpressionTargets, rows: NDArray[np.int64]
) -> pd.DataFrame:
    """Pearson correlation, RMSE and MAE of each gene over some cells, some genes at a time.

    NaN throughout for fewer than two cells.
    """
    if len(rows) < 2:
        return pd.DataFrame(np.nan, range(targets.n_outputs), ["pearson", "rmse", "mae"])
    parts = []
    for start in range(0, targets.n_outputs, _GENES_AT_ONCE):
        columns = np.arange(start, min(start + _GENES_AT_ONCE, targets.n_outputs))
        true = targets.values[rows][:, columns].toarray()
        own = [ballot._replace(features=ballot.features[rows]) for ballot in ballots]
        found = predict_expression(own, columns, targets.mean, targets.scale)
        scores = {
            "pearson": metrics.pearson(true, found),
            "rmse": metrics.rmse(true, found),
            "mae": metrics.mae(true, found),
        }
        parts.append(pd.DataFrame(scores))
    return pd.concat(parts, ignore_index=True)


def error_products(
    ballots: Sequence[Ballot], targets: ExpressionTargets, rows: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Products of the errors of each two networks, (n, n), summed over some cells and all genes.

    Errors are those of standardised expression, so that all genes count the same.
    """
    read = [(ballot.network, ballot.features[rows]) for ballot in ballots]
    products = np.zeros((len(read), len(read)))
    for start in range(0, targets.n_outputs, _GENES_AT_ONCE):
        columns = np.arange(start, min(start + _GENES_AT_ONCE, targets.n_outputs))
        true = targets.values[rows][:, columns].toarray() - targets.mean[columns]
        true /= targets.scale[columns]
        errors = np.stack(
            [apply_head(*one, "values", columns=columns).ravel() - true.ravel() for one in read]
        ).astype(np.float64)
        products += errors @ errors.T
    return products


def write_imputed(
    sections: Sections,
    head: ImputationHead,
    inputs: Inputs,
    columns: NDArray[np.int64],
    read: Sequence[Sequence[str]],
    key: str,
) -> None:
    """Write imputed expression to each table, with a record of it and of the genes `read` there."""
    names = [head.outputs[k] for k in columns]
    # All is computed before anything is written.
    found = head.predict(inputs, columns)
    refuse_not_finite(head.task, found)
    frames = [
        make_frame(table, found[part], names)
        for table, part in zip(sections.tables, sections.places, strict=True)
    ]
    with all_or_nothing(*sections.tables):
        for table, frame, genes in zip(sections.tables, frames, read, strict=True):
            params = {
                "n_genes": len(names),
                "n_inputs": len(head.inputs),
                # Of these is the total that measured expression compares with.
                "inputs": np.array(genes, dtype=object),
                "use_rep": list(head.use_rep),
                "strategy": head.strategy,
                "seed": head.params["seed"],
            }
            write_record(table, key, params, **head.model_names())
            write_frame(table, key, frame, names)
    logger.info("%d genes imputed in %d cells into obsm[%r].", len(names), len(found), key)
