"""Which names of genes mean the same gene, learnt from slices that give several."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stofm.genes.gene_ids import MOUSE_TYPES, id_type, strip_version

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


class GeneNames:
    """Counts, slice by slice, how often a name stood for a gene."""

    def __init__(self) -> None:
        self._votes: Counter[tuple[str, str]] = Counter()
        self._symbol_votes: Counter[tuple[str, str]] = Counter()

    def add(self, genes: Iterable[str], *names: Iterable[str]) -> None:
        """Add the columns of one slice.

        Parameters
        ----------
        genes
            (n_vars,) human Ensembl ids, ``""`` where unknown.
        *names
            Each (n_vars,): ids or symbols of the same columns, ``""`` where missing.
        """
        for gene, *others in zip(genes, *names, strict=True):
            is_mouse = any(id_type(name) in MOUSE_TYPES for name in others)
            for name in {strip_version(other) for other in others if gene and other} - {gene}:
                self._votes[gene, name] += 1
                if not is_mouse and not name.startswith("ENS"):
                    self._symbol_votes[gene, name] += 1

    def add_aliases(self, aliases: Mapping[str, str]) -> None:
        """Add names that stand for genes but are not their symbols."""
        self._votes.update((gene, name) for name, gene in aliases.items() if name != gene)

    def symbols(self, genes: Iterable[str]) -> dict[str, str]:
        """Return the symbol that most slices give to each gene; no symbol is given twice."""
        wanted = set(genes)
        symbols: dict[str, str] = {}
        taken: set[str] = set()
        for (gene, name), _ in _most_frequent_first(self._symbol_votes):
            if gene in wanted and gene not in symbols and name not in taken:
                symbols[gene] = name
                taken.add(name)
        return symbols

    def aliases(self, symbols: Mapping[str, str], genes: Iterable[str]) -> dict[str, str]:
        """Return all other names of `genes`, each to the gene that most slices mean by it.

        Names that are ids or symbols of the vocabulary are left out, and so are names that stand
        for two genes equally often.
        """
        wanted = set(genes)
        taken = wanted | set(symbols.values())
        best: dict[str, tuple[str, int]] = {}
        tied: set[str] = set()
        for (gene, name), votes in _most_frequent_first(self._votes):
            if gene not in wanted or name in taken:
                continue
            if name not in best:
                best[name] = (gene, votes)
            elif best[name][1] == votes:
                tied.add(name)
        return {name: gene for name, (gene, _) in best.items() if name not in tied}


def _most_frequent_first(
    votes: Counter[tuple[str, str]],
) -> list[tuple[tuple[str, str], int]]:
    return sorted(votes.items(), key=lambda item: (-item[1], item[0]))
