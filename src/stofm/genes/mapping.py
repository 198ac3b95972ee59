"""Names of genes: their kind and species, and the gene of a vocabulary that each stands for."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args
from urllib.parse import urldefrag

import numpy as np

from stofm._files import local, read_text_table
from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from os import PathLike

    from numpy.typing import NDArray

    from stofm.genes.vocabulary import GeneVocabulary

#: Ids such as ENSG00000000003.15 and ENSG00000002586.20_PAR_Y; ENSGR0000002586 is the old form
#: of the latter.
_ENSEMBL_GENE: Final = re.compile(r"(ENS(?:[A-Z]{3,4})?GR?\d{10,})(\.\d+)?(_PAR_Y)?", re.IGNORECASE)
#: Columns of a table of orthologs.
_MOUSE: Final = "mouse_ensembl_id"
_HUMAN: Final = "human_ensembl_id"
#: Text that a missing value becomes when a table is written and read back.
_MISSING: Final = frozenset({"", "nan", "NaN", "NA", "<NA>", "None"})


class IdType(StrEnum):
    """Kinds of gene names."""

    HUMAN_ENSEMBL = "human Ensembl ids"
    HUMAN_ENSEMBL_VERSION = "human Ensembl ids with version"
    MOUSE_ENSEMBL = "mouse Ensembl ids"
    MOUSE_ENSEMBL_VERSION = "mouse Ensembl ids with version"
    OTHER_ENSEMBL = "Ensembl ids of another species"
    TRANSCRIPT = "Ensembl transcript ids"
    HUMAN_SYMBOL = "human symbols"
    MOUSE_SYMBOL = "mouse symbols"
    NUMBER = "numbers"
    OTHER = "other names"
    MISSING = "missing names"


_KINDS: Final = (
    (re.compile(""), IdType.MISSING),
    (re.compile(r"ENS(?:[A-Z]{3,4})?T\d{10,}(\.\d+)?", re.IGNORECASE), IdType.TRANSCRIPT),
    (re.compile(r"\d+"), IdType.NUMBER),
    # Human symbols are upper case but for names such as C2orf74.
    (re.compile(r"[A-Z0-9][A-Z0-9.@/-]*|C(\d+|X|Y)orf\d+[A-Z]*(-\d+)?"), IdType.HUMAN_SYMBOL),
    # Mouse symbols have capitals as in a name (Gfap, H2-Ab1, 1700022I11Rik, mt-Nd4).
    (re.compile(r"(mt-)?[A-Z0-9][A-Za-z0-9.()/-]*"), IdType.MOUSE_SYMBOL),
    (re.compile(".*", re.DOTALL), IdType.OTHER),
)
HUMAN_TYPES: Final = frozenset(kind for kind in IdType if kind.name.startswith("HUMAN"))
MOUSE_TYPES: Final = frozenset(kind for kind in IdType if kind.name.startswith("MOUSE"))
ENSEMBL_TYPES: Final = frozenset(kind for kind in IdType if "ENSEMBL" in kind.name)
SYMBOL_TYPES: Final = frozenset({IdType.HUMAN_SYMBOL, IdType.MOUSE_SYMBOL})


def clean_names(names: Iterable[Any]) -> list[str]:
    """Return `names` as stripped strings, ``""`` where a value is missing (None, NaN, or their text)."""
    return [_clean_name(name) for name in names]


def _clean_name(name: Any) -> str:
    if isinstance(name, bytes):
        name = name.decode()
    if isinstance(name, int | np.integer):
        name = str(name)
    text = name.strip() if isinstance(name, str) else ""
    return "" if text in _MISSING else text


def strip_version(name: str) -> str:
    """Return an Ensembl gene id in capitals and without version; other names as they are."""
    match = _ENSEMBL_GENE.fullmatch(name)
    return match[1].upper() if match else name


def id_type(name: str) -> IdType:
    """Return what kind of gene name `name` is."""
    if match := _ENSEMBL_GENE.fullmatch(name):
        species = re.match("ENS(MUS)?G", match[1].upper())
        if species is None:
            return IdType.OTHER_ENSEMBL
        version = "_VERSION" if match[2] or match[3] else ""
        return IdType[f"{'MOUSE' if species[1] else 'HUMAN'}_ENSEMBL{version}"]
    return next(kind for pattern, kind in _KINDS if pattern.fullmatch(name))


def read_orthologs(source: Mapping[str, str] | str | PathLike[str]) -> dict[str, str]:
    """Return mouse Ensembl ids and their human orthologs, without versions.

    Parameters
    ----------
    source
        One of: a mapping of mouse to human ids; the path of a table (plain or gzip, separated by
        tabs) with the columns ``mouse_ensembl_id`` and ``human_ensembl_id``; the http(s) or ftp
        address of such a table, which is downloaded once and kept in the user's cache. An
        address may end in ``#sha256=...``; the file must then have this checksum. Otherwise the
        checksum found is logged.

    Raises
    ------
    FileNotFoundError
        There is no file at the path.
    ValueError
        The table lacks a column, or the checksum differs.
    """
    if isinstance(source, Mapping):
        pairs = source
    else:
        is_remote = str(source).startswith(("http://", "https://", "ftp://"))
        path = _download(str(source)) if is_remote else local(source)
        table = read_text_table(path, "ortholog table")
        if not {_MOUSE, _HUMAN} <= set(table):
            raise ValueError(
                f"{path} is not an ortholog table: expected the columns {_MOUSE} and {_HUMAN}, "
                f"separated by tabs, found {list(table)}."
            )
        pairs = table.dropna(subset=[_MOUSE, _HUMAN]).set_index(_MOUSE)[_HUMAN].to_dict()
    return {strip_version(mouse): strip_version(human) for mouse, human in pairs.items()}


def _download(address: str) -> Path:
    import pooch

    url, fragment = urldefrag(address)
    known = f"sha256:{fragment.removeprefix('sha256=').lower()}" if fragment else None
    path = Path(pooch.retrieve(url, known_hash=known, path=pooch.os_cache("stofm")))
    if known is None:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        logger.info("ortholog table %s has sha256 %s", url, found)
    return path


# Genes of a vocabulary

Species = Literal["auto", "human", "mouse"]

#: Fewer genes than this are too few, unless they are at least half of a smaller panel.
MIN_GENES: Final = 10
#: A smaller share of the genes is too few: names of another species match now and then.
MIN_SHARE: Final = 0.02
#: Share of the counts in unknown columns from which on a cell's embedding changes: at half, cosines
#: to the embedding of the known genes alone are 0.98, and at 0.9, 0.87 to 0.90. Slices of
#: the benchmark have up to 0.28 (mitochondrial and ribosomal RNA).
MOST_UNKNOWN: Final = 0.4
#: Share of the counts in columns beyond the first of their gene from which on they may not be
#: genes: paralogs of mice that are one human gene have up to 0.01 in slices of the benchmark.
MOST_REPEATED: Final = 0.03
#: A second species is named in the report from this share of the ids on.
_MIXED_SHARE: Final = 0.1
_N_EXAMPLES: Final = 3
_ADVICE: Final = (
    "Pass `gene_key` to name the column of adata.var with Ensembl ids or symbols, `species` "
    "('human' or 'mouse'), or `orthologs` to translate mouse Ensembl ids; genes of other species "
    "must be translated to human ones first."
)


#: Number of names that are looked at to give advice, and what separates parts of a name.
_SAMPLE: Final = 2000
_SEPARATORS: Final = "_:|- /"


@dataclass(frozen=True, eq=False)
class GeneMapping:
    """Which gene of a vocabulary each column is, and what was lost.

    Attributes
    ----------
    gene_index
        (n_vars,) int64 index into the vocabulary's arrays, -1 for none.
    gene_id
        (n_vars,) gene id of the vocabulary, ``""`` for none.
    token_id
        (n_vars,) int32 token, -1 for none.
    species
        ``"human"``, ``"mouse"``, ``"human and mouse"`` or ``"unknown"``.
    id_types
        Kinds of names and how many columns have each, the most frequent first.
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
    names: Sequence[str]
    counts_per_gene: NDArray[Any] | None = None

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
    def unmatched(self) -> tuple[str, ...]:
        """Up to three names that were not found, those with most counts first."""
        rows: list[int] = np.flatnonzero(self.gene_index < 0).tolist()
        rows = [row for row in rows if self.names[row]]
        if self.counts_per_gene is not None:
            rows.sort(key=(-self.counts_per_gene).__getitem__)
        return tuple(self.names[row] for row in rows[:_N_EXAMPLES])

    def summary(self) -> str:
        """Return the report as one line, a short one if all genes were found."""
        found = f"{self.n_matched} of {self.n_vars} genes matched"
        if self.n_genes < self.n_matched:
            found += f" ({self.n_genes} different)"
        if not (examples := ", ".join(self.unmatched)):
            return f"{found}; species: {self.species}"
        share = "" if np.isnan(self.counts_share) else f", {self.counts_share:.1%} of the counts"
        return (
            f"{found}{share}; species: {self.species}; found {self._types()}; "
            f"not matched, for example: {examples}"
        )

    def require_enough(self, advise: Callable[[], str] | None = None) -> None:
        """Raise an error if no gene was found, or so few that tokens would mean little.

        Parameters
        ----------
        advise
            Returns advice for the message that is better than to pass an argument, or ``""``.

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
        raise ValueError(
            f"Only {self.n_matched} of {self.n_vars} genes are in the vocabulary. Found "
            f"{self._types()} (species: {self.species}); not in the vocabulary, for example: "
            f"{examples}. {advice or _ADVICE}"
        )

    def _types(self) -> str:
        return ", ".join(f"{number} {kind}" for kind, number in self.id_types.items())


def map_gene_ids(
    ids: Iterable[Any],
    vocabulary: GeneVocabulary,
    *,
    species: Species = "auto",
    orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
    fallback_ids: Iterable[Any] | None = None,
) -> GeneMapping:
    """Find the gene of the vocabulary that each id stands for.

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
        ``"auto"`` takes names that are capitalised like mouse symbols for mouse symbols,
        ``"mouse"`` all symbols. ``"human"`` looks up neither orthologs nor capitals; names that the
        vocabulary itself lists as aliases are found nevertheless.
    orthologs
        Mouse to human Ensembl ids, see :func:`stofm.genes.read_orthologs`.
    fallback_ids
        (n_vars,) second names, looked up where the name in `ids` is not found.

    Raises
    ------
    ValueError
        `species` is none of the three, or the arguments differ in length.
    """
    if species not in get_args(Species):
        raise ValueError(f"species must be 'auto', 'human' or 'mouse', found {species!r}.")
    names = clean_names(ids)
    second = [""] * len(names) if fallback_ids is None else clean_names(fallback_ids)
    if len(second) != len(names):
        raise ValueError(f"There are {len(names)} ids, but {len(second)} fallback ids.")
    pairs = {} if orthologs is None or species == "human" else read_orthologs(orthologs)
    rows = vocabulary.rows_by_name
    rows = {mouse: rows[human] for mouse, human in pairs.items() if human in rows} | rows

    def look_up(name: str) -> int:
        row = rows.get(strip_version(name), -1)
        if row >= 0 or species == "human":
            return row
        may_be_mouse = species == "mouse" or id_type(name) is IdType.MOUSE_SYMBOL
        return rows.get(name.upper(), -1) if may_be_mouse else -1

    found = (
        row if (row := look_up(name)) >= 0 else look_up(other)
        for name, other in zip(names, second, strict=True)
    )
    index = np.fromiter(found, dtype=np.int64, count=len(names))
    shown = [name or other for name, other in zip(names, second, strict=True)]
    types = Counter(id_type(name) for name in shown)
    return GeneMapping(
        gene_index=index,
        gene_id=np.where(index >= 0, vocabulary.gene_ids[index], ""),
        token_id=np.where(index >= 0, vocabulary.tokens[index], -1).astype(np.int32),
        species=_main_species(types),
        id_types={kind.value: number for kind, number in types.most_common()},
        names=shown,
    )


def counts_of_repeated_genes(
    genes: NDArray[np.integer], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Counts of columns whose gene (not negative) an earlier column has too; 0 elsewhere."""
    is_repeated = genes >= 0
    is_repeated[np.unique(genes, return_index=True)[1]] = False
    return np.where(is_repeated, counts, 0.0)


def _main_species(types: Mapping[IdType, int]) -> str:
    human = sum(types.get(kind, 0) for kind in HUMAN_TYPES)
    mouse = sum(types.get(kind, 0) for kind in MOUSE_TYPES)
    if human + mouse == 0 or types.get(IdType.OTHER_ENSEMBL, 0) > human + mouse:
        return "unknown"
    if min(human, mouse) >= _MIXED_SHARE * (human + mouse):
        return "human and mouse"
    return "human" if human >= mouse else "mouse"


def advice_for_names(names: Iterable[str], vocabulary: GeneVocabulary, where: str) -> str:
    """Say how to change names so that at least half of them are found; ``""`` if no way is known.

    `where` is the code that gives the names: ``"adata.var_names"``.
    """
    kept = [name for name in names if name][:_SAMPLE]
    changes = {"upper()": [name.upper() for name in kept]}
    for sign in _SEPARATORS:
        for place in (0, -1):
            changes[f"split({sign!r}).str[{place}]"] = [name.split(sign)[place] for name in kept]
    for code, changed in changes.items():
        n_found = map_gene_ids(changed, vocabulary).n_matched
        if 2 * n_found >= max(len(kept), 1):
            return f"{n_found} of {len(kept)} names are found after {where} = {where}.str.{code}."
    return ""
