"""Heads whose networks vote: some read embeddings, others neighbourhoods or expression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np

from stofm._messages import warn
from stofm.genes.vocabulary import embedded_vocabulary
from stofm.heads.base import Head
from stofm.heads.components import ComponentsEntries, ExpressionComponents, fit_components
from stofm.heads.embeddings import MADE_BY_EMBED, counts_layer
from stofm.heads.gene_columns import GeneColumns, choose_panel
from stofm.heads.inputs import Source  # noqa: TC001 - read when a head is loaded
from stofm.heads.neighborhood import add_neighborhood
from stofm.heads.network import apply_head

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from stofm.heads.inputs import Inputs
    from stofm.heads.sections import Sections
    from stofm.heads.targets import TargetKind

#: A panel of some hundred genes has hardly more that matter.
_N_COMPONENTS: Final = 150


@dataclass(frozen=True, kw_only=True)
class VotingEntries:
    """What such a head adds to config.json; see :class:`VotingHead`."""

    reads: tuple[Source, ...]
    weights: tuple[float, ...]
    n_neighbors: int
    expression: ComponentsEntries | None = None


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class VotingHead(Head):
    """A head whose networks' probabilities are averaged.

    Attributes
    ----------
    reads
        What each network reads: ``"embedding"``, as the first one does, or ``"expression"``;
        ``"neighborhood"`` and ``"expression neighborhood"`` are these with means over the
        neighbours beside them. Empty if all read embeddings.
    weights
        Weight of each network in the mean; empty for equal ones.
    expression
        Genes and components for the networks that read expression; None if there are none.
    n_neighbors
        Over how many neighbours means are, for the networks that read them; 0 if there are none.
    """

    own_entries: ClassVar[type[Any]] = VotingEntries

    reads: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()
    expression: ExpressionComponents | None = None
    n_neighbors: int = 0

    def with_components(self, expression: ExpressionComponents | None) -> Self:
        """The same with components of expression, if a network reads them."""
        is_read = any("expression" in source for source in self.reads)
        return replace(self, expression=expression if is_read else None)

    def read_beside(
        self, sections: Sections, inputs: Inputs, *, layer: str | None, spatial_key: str
    ) -> Inputs:
        """Add what networks read beside embeddings; NaN in tables that lack places, genes or counts."""
        inputs = self._read_expression(sections, inputs, layer)
        return add_neighborhood(sections, inputs, self.n_neighbors, spatial_key=spatial_key)

    def _read_expression(self, sections: Sections, inputs: Inputs, layer: str | None) -> Inputs:
        if self.expression is None:
            return inputs
        k = self.expression.axes.shape[1]
        scores = np.full((len(inputs.features), k), np.nan, dtype=np.float32)
        vocabulary = embedded_vocabulary()
        for k, (table, place) in enumerate(zip(sections.tables, sections.places, strict=True)):
            columns = GeneColumns.read(table, vocabulary, must_map=False)
            try:
                with sections.naming(k):
                    known = self.expression.read(table, columns, layer=counts_layer(table, layer))
            except (KeyError, ValueError) as error:
                _warn_of(error, table.n_obs)
                continue
            if known is not None:
                scores[place] = known
        return replace(inputs, expression=self.expression.centered(scores, sections.slices.rows))

    def votes(
        self, inputs: Inputs, kind: TargetKind
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
        """Let each network predict, one after another.

        Parameters
        ----------
        inputs
            Representations, and what is read beside them; networks that read what cells lack have
            no vote on these.
        kind
            Classes or proportions.

        Yields
        ------
        (n, n_outputs) probabilities of a network that has a vote, and its weight for each cell,
        (n,); those of a cell sum to 1.
        """
        weights = self.weights or (1.0,) * len(self.networks)
        known = {source: inputs.knows(source) for source in set(self.sources)}
        shares = [
            weight * known[source] for source, weight in zip(self.sources, weights, strict=True)
        ]
        total = np.sum(shares, axis=0)
        source, features = None, inputs.features
        for network, reads, share in zip(self.networks, self.sources, shares, strict=True):
            if not share.any():
                continue
            # Networks of a kind follow one another, and what they read may be large.
            if reads != source:
                source, read = reads, inputs.of(reads)
                assert read is not None
                # Embeddings are never lacking, and a copy of all of them would be large.
                features = read if share.all() else np.nan_to_num(read)
            yield apply_head(network, features, kind), share / total

    @property
    def sources(self) -> tuple[Source, ...]:
        """What each network reads."""
        embedding: Source = "embedding"
        return self.reads or (embedding,) * len(self.networks)

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        entries: dict[str, Any] = {
            "reads": list(self.reads),
            "weights": list(self.weights),
            "n_neighbors": self.n_neighbors,
        }
        if self.expression is None:
            return entries, {}
        expression, arrays = self.expression.to_entries()
        return {**entries, "expression": expression}, arrays

    @classmethod
    def _read_own(cls, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        components = entries.expression
        return {
            "reads": entries.reads,
            "weights": entries.weights,
            "n_neighbors": entries.n_neighbors,
            "expression": components and ExpressionComponents.from_entries(components, arrays),
        }

    def check(self) -> None:
        """Refuse parts that do not belong together."""
        super().check()
        sizes = (len(self.reads), len(self.weights))
        if not set(sizes) <= {0, len(self.networks)}:
            msg = f"{len(self.networks)} networks, and reads and weights for {sizes}"
            raise ValueError(msg)
        if self.weights and not (min(self.weights) >= 0 and abs(sum(self.weights) - 1) < 1e-6):
            msg = f"weights must be shares of a whole and sum to 1, found {list(self.weights)}"
            raise ValueError(msg)
        needs = " ".join(self.sources)
        if ("expression" in needs) != (self.expression is not None):
            msg = f"networks read {sorted(set(self.sources))}, and expression is {'given' if self.expression else 'missing'}"
            raise ValueError(msg)
        if ("neighborhood" in needs) != (self.n_neighbors > 0):
            msg = (
                f"networks read {sorted(set(self.sources))}, and n_neighbors is {self.n_neighbors}"
            )
            raise ValueError(msg)
        widths = {(s, n.config.d_input) for s, n in zip(self.sources, self.networks, strict=True)}
        if len(widths) > len(set(self.sources)):
            msg = f"networks that read the same have several widths: {sorted(widths)}"
            raise ValueError(msg)


def choose_n_components(
    n_components: int | None, use_rep: tuple[str, ...], *, is_repeated: bool
) -> int:
    """Components to read: as asked for, or some beside embeddings that a model makes.

    Parameters
    ----------
    n_components
        What is asked for; None for a choice.
    use_rep
        Entries of ``obsm`` that are read.
    is_repeated
        Whether a protocol says what is fitted; it has none.
    """
    if n_components is not None:
        return n_components
    return _N_COMPONENTS if set(use_rep) <= set(MADE_BY_EMBED) and not is_repeated else 0


def add_expression(
    sections: Sections,
    inputs: Inputs,
    rows: NDArray[np.int64],
    *,
    n_components: int,
    layer: str | None,
    is_asked_for: bool,
    classes: NDArray[np.int64] | None = None,
) -> tuple[Inputs, ExpressionComponents | None]:
    """Find components of the labelled cells' expression, and add those of their tables' cells.

    Parameters
    ----------
    sections
        The cells.
    inputs
        Their representations.
    rows
        Labelled cells, in an order that does not depend on the file.
    n_components
        Most components; 0 for none.
    layer
        Layer with raw counts; None for the one that was embedded.
    is_asked_for
        Whether it is an error, and not only worth a warning, if there are no counts to read.
    classes
        (n_obs,) classes of the cells; None if they have none.

    Raises
    ------
    KeyError, ValueError
        There are no raw counts, or no shared genes, and they are asked for.
    """
    if not n_components:
        return inputs, None
    # Tables without labels have no say in what is read.
    known = np.zeros(sections.n_obs, dtype=bool)
    known[rows] = True
    own, places = sections.of_tables(
        [k for k, place in enumerate(sections.places) if known[place].any()]
    )
    vocabulary = embedded_vocabulary()
    try:
        columns = [GeneColumns.read(table, vocabulary, must_map=False) for table in own.tables]
        layers = [counts_layer(table, layer) for table in own.tables]
        components, found = fit_components(
            own,
            np.searchsorted(places, rows),
            columns,
            choose_panel(columns, ()).inputs,
            layers,
            n_components,
            None if classes is None else classes[places],
        )
    except (KeyError, ValueError) as error:
        if is_asked_for:
            raise
        _warn_of(error, sections.n_obs)
        return inputs, None
    scores = np.full((sections.n_obs, found.shape[1]), np.nan, dtype=np.float32)
    scores[places] = found
    return replace(inputs, expression=scores), components


def _warn_of(error: Exception, n_obs: int) -> None:
    warn(f"{n_obs} cells are judged without their expression: {error.args[0]}")
