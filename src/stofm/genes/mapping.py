"""From the names of a slice's columns to genes of a vocabulary, with a report."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

import numpy as np

from stofm.genes.gene_ids import (
    HUMAN_TYPES,
    MOUSE_TYPES,
    IdType,
    clean_names,
    id_type,
    read_orthologs,
    strip_version,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from stofm.genes.vocabulary import GeneVocabulary

Species = Literal["auto", "human", "mouse"]

#: Fewer genes than this are too few, unless at least half of a smaller panel is found.
MIN_GENES: Final = 10
#: A smaller share of the genes is too few: names of another species match now and then.
MIN_SHARE: Final = 0.02
#: Share of the counts in unknown columns from which on a cell's embedding is another: where it is
#: half, cosines to the embedding of the known genes alone are 0.98, and where it is 0.9, 0.87 to
#: 0.90. Slices of the benchmark have up to 0.28 (mitochondrial and ribosomal RNA).
MOST_UNKNOWN: Final = 0.4
#: Share of the counts in columns beyond the first of their gene from which on they may be no genes:
#: paralogs of mice that are one human gene have up to 0.01 in slices of the benchmark, and
#: antibodies often more than RNA. In columns before the last, which antibodies can be too, the
#: genes themselves have up to 0.02 there, and a gene of a small panel has more.
_MOST_BEYOND_FIRST: Final = 0.03
_MOST_BEFORE_LAST: Final = 0.2
#: A second species is named in the report from this share of the ids on.
_MIXED_SHARE: Final = 0.1
_N_EXAMPLES: Final = 3
_ADVICE: Final = (
    "Pass `gene_key` to name the column of adata.var with Ensembl ids or symbols, `species` "
    "('human' or 'mouse'), or `orthologs` to translate mouse Ensembl ids; genes of other species "
    "must be translated to human ones first."
)
#: Names that are looked at to give advice, and what stands between parts of a name.
_SAMPLE: Final = 2000
_SEPARATORS: Final = ("_", ":", "|", "-", " ", "/")
#: Parts of names that say that it is no gene, although one is named.
_OTHER: Final = re.compile(r"adt|hto|prot(ein)?|ab|antibody|totalseq\w*", re.IGNORECASE)
#: What a spreadsheet makes of MARCH1, SEPT7 and DEC1, and how it numbers days.
_DATE: Final = re.compile(
    r"\d{1,2}[-/. ](mar|sep|dec)\w*|(mar|sep|dec)\w*[-/. ]\d{1,2}"
    r"|\d{4}-(03|09|12)-\d\d( 00:00:00)?|\d{1,2}/\d{1,2}/\d{2,4}",
    re.IGNORECASE,
)
_FIRST_DAY: Final = date(1899, 12, 30)
_MONTHS: Final = (3, 9, 12)


@dataclass(frozen=True, eq=False)
class GeneMapping:
    """Which gene of a vocabulary each column is, and what was lost.

    Attributes
    ----------
    gene_index
        (n_vars,) int64 place in the vocabulary's arrays, -1 for none.
    gene_id
        (n_vars,) gene id of the vocabulary, ``""`` for none.
    token_id
        (n_vars,) int32 token, -1 for none.
    species
        ``"human"``, ``"mouse"``, ``"human and mouse"`` or ``"unknown"``.
    id_types
        Kinds of names and how many columns have each, the most frequent first.
    routes
        How many columns were found by ``"id"``, ``"alias"``, ``"ortholog"``, ``"symbol"`` or
        ``"case"`` (the symbol in capitals).
    names
        Name of each column that the report shows.
    counts_per_gene
        (n_vars,) counts over all cells, or None; may be filled in later with
        :func:`dataclasses.replace`.
    """

    gene_index: NDArray[np.int64]
    gene_id: NDArray[np.str_]
    token_id: NDArray[np.int32]
    species: str
    id_types: Mapping[str, int]
    routes: Mapping[str, int]
    names: Sequence[str]
    counts_per_gene: NDArray[Any] | None

    @property
    def n_vars(self) -> int:
        """Number of columns that may be genes."""
        return sum(self.id_types.values())

    @property
    def n_matched(self) -> int:
        """Number of columns that were found."""
        return int((self.gene_index >= 0).sum())

    @property
    def n_genes(self) -> int:
        """Number of different genes that were found."""
        return len(np.unique(self.gene_index[self.gene_index >= 0]))

    @property
    def counts_share(self) -> float:
        """Share of all counts that is in columns found; NaN if it is not known."""
        if self.counts_per_gene is None or not self.counts_per_gene.any():
            return float("nan")
        kept = self.counts_per_gene[self.gene_index >= 0].sum()
        return float(kept / self.counts_per_gene.sum())

    @property
    def lost(self) -> list[str]:
        """Names that were not found."""
        return [self.names[row] for row in self._lost_rows()]

    @property
    def unmatched(self) -> tuple[str, ...]:
        """Up to three names that were not found, those with most counts first."""
        rows = self._lost_rows()
        if self.counts_per_gene is not None:
            rows.sort(key=(-self.counts_per_gene).__getitem__)
        return tuple(self.names[row] for row in rows[:_N_EXAMPLES])

    def _lost_rows(self) -> list[int]:
        rows: list[int] = np.flatnonzero(self.gene_index < 0).tolist()
        return [row for row in rows if self.names[row]]

    def summary(self) -> str:
        """Return the report as one line."""
        share = "" if np.isnan(self.counts_share) else f", {self.counts_share:.1%} of the counts"
        examples = ", ".join(self.unmatched)
        return (
            f"{self.n_matched} of {self.n_vars} genes matched ({self.n_genes} different){share}; "
            f"species: {self.species}; found {self._types()}"
            + (f"; not matched, for example: {examples}" if examples else "")
        )

    def require_enough(self, advise: Callable[[], str] | None = None) -> None:
        """Refuse a mapping that found no gene, or so few that tokens would mean little.

        Parameters
        ----------
        advise
            Returns better advice for the message than to pass an argument, or ``""``.

        Raises
        ------
        ValueError
            Fewer than 2 % of the columns were found, or fewer than 10 genes (half of the panel
            if it has fewer than 20).
        """
        fewest = max(1.0, min(MIN_GENES, self.n_vars / 2), MIN_SHARE * self.n_vars)
        if self.n_matched >= fewest:
            return
        examples = ", ".join(repr(name) for name in self.unmatched)
        advice = advise() if advise else ""
        msg = (
            f"Only {self.n_matched} of {self.n_vars} genes are in the vocabulary. Found "
            f"{self._types()} (species: {self.species}); not in the vocabulary, for example: "
            f"{examples}. {advice or _ADVICE}"
        )
        raise ValueError(msg)

    def _types(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.id_types.items())


def map_gene_ids(
    ids: Iterable[Any],
    vocabulary: GeneVocabulary,
    *,
    species: Species = "auto",
    orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
    fallback_ids: Iterable[Any] | None = None,
    counts_per_gene: NDArray[Any] | None = None,
) -> GeneMapping:
    """Find the gene of the vocabulary that each id means.

    Each id is looked up on its own, so kinds and species may be mixed. Ensembl ids may carry
    versions. Order: gene id, alias, human ortholog of a mouse Ensembl id, symbol, and for mouse
    the symbol in capitals (Gfap, GFAP), which is right for most genes with one ortholog.

    Parameters
    ----------
    ids
        (n_vars,) Ensembl ids or symbols; None, NaN or ``""`` where missing.
    vocabulary
        Genes to find.
    species
        ``"auto"`` takes names with capitals as in mouse symbols for mouse symbols; ``"mouse"``
        takes all symbols for them. ``"human"`` looks up neither orthologs nor
        capitals; names that the vocabulary itself lists as aliases are found all the same.
    orthologs
        Mouse to human Ensembl ids, see :func:`stofm.genes.read_orthologs`.
    fallback_ids
        (n_vars,) second names, looked up where `ids` leads to nothing.
    counts_per_gene
        (n_vars,) counts over all cells, to report the share that is kept.

    Raises
    ------
    ValueError
        `species` is none of the three, or the arguments differ in length.
    """
    if species not in get_args(Species):
        msg = f"species must be 'auto', 'human' or 'mouse', found {species!r}."
        raise ValueError(msg)
    names = clean_names(ids)
    second = [""] * len(names) if fallback_ids is None else clean_names(fallback_ids)
    if len(second) != len(names):
        msg = f"There are {len(names)} ids, but {len(second)} fallback ids."
        raise ValueError(msg)
    if counts_per_gene is not None and np.shape(counts_per_gene) != (len(names),):
        msg = f"There are {len(names)} ids, but counts_per_gene is {np.shape(counts_per_gene)}."
        raise ValueError(msg)
    tables = _lookup_tables(vocabulary, species, orthologs)
    found = [
        _look_up(name, tables, species) or _look_up(other, tables, species) or (-1, "")
        for name, other in zip(names, second, strict=True)
    ]
    shown = [name or other for name, other in zip(names, second, strict=True)]
    types = Counter(id_type(name) for name in shown)
    index = np.array([row for row, _ in found], dtype=np.int64)
    return GeneMapping(
        gene_index=index,
        gene_id=np.where(index >= 0, vocabulary.gene_ids[index], ""),
        token_id=np.where(index >= 0, vocabulary.tokens[index], -1).astype(np.int32),
        species=_main_species(types),
        id_types={kind.value: number for kind, number in types.most_common()},
        routes=dict(Counter(route for _, route in found if route).most_common()),
        names=shown,
        counts_per_gene=counts_per_gene,
    )


def counts_of_shared_genes(
    genes: NDArray[np.integer], counts: NDArray[np.float64]
) -> tuple[NDArray[np.float64], Literal["first", "last"]]:
    """Counts of columns that share their gene with another, if there are too many for genes.

    Returns the counts of the columns that may be no genes, (n_vars,), 0 in all others, and which
    column of each gene is not one of them.
    """
    beyond_first = np.where(_stand_again(genes), counts, 0.0)
    before_last = np.where(_stand_again(genes[::-1])[::-1], counts, 0.0)
    after, before = beyond_first.sum(), before_last.sum()
    is_much = after > _MOST_BEYOND_FIRST * counts.sum() or before > _MOST_BEFORE_LAST * counts.sum()
    if not is_much:
        return np.zeros_like(counts), "first"
    return (beyond_first, "first") if after >= before else (before_last, "last")


def _stand_again(genes: NDArray[np.integer]) -> NDArray[np.bool_]:
    again = genes >= 0
    again[np.unique(genes, return_index=True)[1]] = False
    return again


def _lookup_tables(
    vocabulary: GeneVocabulary,
    species: Species,
    orthologs: Mapping[str, str] | str | PathLike[str] | None,
) -> dict[str, Mapping[str, int]]:
    rows = vocabulary.rows_by_id
    pairs = {} if orthologs is None or species == "human" else read_orthologs(orthologs)
    return {
        "id": rows,
        "alias": vocabulary.rows_by_alias,
        "ortholog": {mouse: rows[human] for mouse, human in pairs.items() if human in rows},
        "symbol": vocabulary.rows_by_symbol,
    }


def _look_up(
    name: str, tables: Mapping[str, Mapping[str, int]], species: Species
) -> tuple[int, str] | None:
    if not name:
        return None
    bare = strip_version(name)
    for route, rows in tables.items():
        if bare in rows:
            return rows[bare], route
    may_be_mouse = species == "mouse" or (
        species == "auto" and id_type(name) is IdType.MOUSE_SYMBOL
    )
    if not may_be_mouse:
        return None
    capitals = name.upper()
    row = tables["symbol"].get(capitals, tables["alias"].get(capitals))
    return None if row is None else (row, "case")


def _main_species(types: Mapping[IdType, int]) -> str:
    human = sum(types.get(kind, 0) for kind in HUMAN_TYPES)
    mouse = sum(types.get(kind, 0) for kind in MOUSE_TYPES)
    if human + mouse == 0 or types.get(IdType.OTHER_ENSEMBL, 0) > human + mouse:
        return "unknown"
    if min(human, mouse) >= _MIXED_SHARE * (human + mouse):
        return "human and mouse"
    return "human" if human >= mouse else "mouse"


def advice_for_names(names: Iterable[str], vocabulary: GeneVocabulary, where: str) -> str:
    """Say how to change names so that at least half of them are found; ``""`` for no idea.

    `where` is what holds the names, as code: ``"adata.var_names"``.
    """
    kept = [name for name in names if name][:_SAMPLE]
    best, advice = len(kept) / 2, ""
    for changed, description, code in _changes(kept):
        n_found = map_gene_ids(changed, vocabulary).n_matched
        if n_found > best or (n_found == best > 0 and not advice):
            best = n_found
            advice = (
                f"{n_found} of {len(kept)} names {description} are found, such as {changed[0]!r} "
                f"for {kept[0]!r}: {where} = {where}.str.{code}"
            )
    return advice


def _changes(names: Sequence[str]) -> Iterator[tuple[list[str], str, str]]:
    """Changed names, what was done to them, and the method of ``.str`` that does it."""
    if not names:
        return
    yield [name.upper() for name in names], "in capitals", "upper()"
    for separator in _SEPARATORS:
        split = [name.partition(separator)[::2] for name in names if separator in name]
        if 2 * len(split) < len(names):
            continue
        yield from _without_prefix(names, separator)
        if not any(_OTHER.fullmatch(part) or part.isdigit() for parts in split for part in parts):
            first = [name.split(separator)[0] for name in names]
            last = [name.split(separator)[-1] for name in names]
            yield first, f"up to {separator!r}", f"split({separator!r}).str[0]"
            yield last, f"after the last {separator!r}", f"split({separator!r}).str[-1]"


def _without_prefix(names: Sequence[str], separator: str) -> Iterator[tuple[list[str], str, str]]:
    """Names without the prefix that at least half of them share."""
    pattern = re.compile(rf"[^{re.escape(separator)}]+{re.escape(separator)}+")
    found = (pattern.match(name) for name in names)
    prefix, number = Counter(match[0] if match else "" for match in found).most_common(1)[0]
    if prefix and 2 * number >= len(names) and not _OTHER.fullmatch(prefix.rstrip(separator)):
        changed = [name.removeprefix(prefix) for name in names]
        yield changed, f"without the prefix {prefix!r}", f"removeprefix({prefix!r})"


def spreadsheet_dates(names: Sequence[str]) -> list[str]:
    """Names that a spreadsheet turned into dates, such as 1-Mar or 43525 for MARCH1.

    Numbers are taken for days only if all of them can be.
    """
    numbers = [name for name in names if name.isdecimal()]
    are_days = all(
        len(name) == 5 and (_FIRST_DAY + timedelta(days=int(name))).month in _MONTHS
        for name in numbers
    )
    return [name for name in names if _DATE.fullmatch(name) or (are_days and name.isdecimal())]
