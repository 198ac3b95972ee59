"""The genes a model knows: ids, tokens, medians, and the names that lead to them."""

from __future__ import annotations

import gzip
import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np

from stofm._config import require_rules
from stofm._files import local, put_in_place, read_text_table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from os import PathLike
    from pathlib import Path

    from numpy.typing import NDArray

_COLUMNS: Final = ("token", "gene_id", "symbol", "median", "aliases")
#: Column names of plain copies of Geneformer's dictionaries, and ours for them.
_OTHER_NAMES: Final = {"token_id": "token", "ensembl_id": "gene_id"}


@dataclass(frozen=True, eq=False)
class GeneVocabulary:
    """Human genes with their tokens, medians and other names.

    Attributes
    ----------
    gene_ids
        (n_genes,) human Ensembl gene ids without version, each once.
    symbols
        (n_genes,) gene symbols, ``""`` where unknown.
    tokens
        (n_genes,) int32, each once, none of them a special token.
    medians
        (n_genes,) float64; non-zero median over a corpus of a gene's count / total count of the
        cell x 10,000. Positive.
    special
        Tokens of ``"pad"`` (always 0), ``"mask"`` and ``"cls"``; others are allowed.
    aliases
        Other names to gene ids: mouse Ensembl ids, mouse symbols, former symbols and ids.

    Raises
    ------
    ValueError
        The arrays differ in length, or an id, token or median is not valid.
    """

    gene_ids: NDArray[np.str_]
    symbols: NDArray[np.str_]
    tokens: NDArray[np.int32]
    medians: NDArray[np.float64]
    special: Mapping[str, int]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n, special = self.n_genes, self.special
        n_bad = int((~(np.isfinite(self.medians) & (self.medians > 0))).sum())
        tokens = [*self.tokens.tolist(), *special.values()]
        lengths = {len(self.symbols), len(self.tokens), len(self.medians)}
        named = {"pad", "mask", "cls"} <= set(special) and special["pad"] == 0
        require_rules(
            {
                "gene_ids, symbols, tokens and medians must have one length, at least 1.": n > 0
                and lengths == {n},
                "A vocabulary needs the special tokens pad (0), mask and cls, found "
                f"{dict(special)}.": named,
                "The gene ids must be unique.": len(set(self.gene_ids.tolist())) == n,
                "The tokens must be unique and not negative.": len(set(tokens)) == len(tokens)
                and min(tokens, default=0) >= 0,
                f"Medians must be positive and finite; {n_bad} are not.": n_bad == 0,
            }
        )

    def __repr__(self) -> str:
        return (
            f"GeneVocabulary({self.n_genes} genes, {self.n_tokens} tokens, "
            f"{len(self.aliases)} aliases, fingerprint {self.fingerprint})"
        )

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.gene_ids)

    @property
    def n_tokens(self) -> int:
        """Largest token + 1: the number of rows that a token embedding needs."""
        return 1 + max(int(self.tokens.max(initial=0)), *self.special.values())

    @property
    def pad(self) -> int:
        """Token of padding, 0."""
        return self.special["pad"]

    @property
    def mask(self) -> int:
        """Token of a masked gene."""
        return self.special["mask"]

    @property
    def cls(self) -> int:
        """Token that stands in front of a cell's genes."""
        return self.special["cls"]

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits over ids, tokens, medians and special tokens.

        Names (symbols, aliases) are left out: they change which columns are found, not what a
        token means to a model.
        """
        order = np.argsort(self.tokens)
        digest = hashlib.sha256("\n".join(self.gene_ids[order].tolist()).encode())
        digest.update(self.tokens[order].astype("<i4").tobytes())
        digest.update(self.medians[order].astype("<f8").tobytes())
        digest.update(json.dumps(dict(sorted(self.special.items()))).encode())
        return digest.hexdigest()[:16]

    @cached_property
    def rows_by_id(self) -> dict[str, int]:
        """Gene ids and their indices in the arrays."""
        return {name: row for row, name in enumerate(self.gene_ids.tolist())}

    @cached_property
    def rows_by_name(self) -> dict[str, int]:
        """Index of each id, alias and symbol; a symbol of several genes has the first.

        A name of several kinds counts as an id first, then as an alias.
        """
        ids, symbols = self.rows_by_id, self.symbols.tolist()
        first = {symbols[row]: row for row in reversed(range(self.n_genes)) if symbols[row]}
        aliases = {alias: ids[gene] for alias, gene in self.aliases.items() if gene in ids}
        return first | aliases | ids

    @classmethod
    def from_tsv(cls, path: str | PathLike[str]) -> GeneVocabulary:
        """Read a vocabulary table, plain or gzip.

        Two layouts are known: stofm's own (``token gene_id symbol median aliases``, see
        :meth:`save`) and that of plain copies of Geneformer's dictionaries (``token_id ensembl_id
        median symbol``). Special tokens are rows without a median. A table without ``<cls>`` gets
        it as the next token, as the reference implementation does at run time.

        Raises
        ------
        ValueError
            The header is not one of these, or a row is not valid.
        """
        try:
            return cls(**arranged(*_read_genes(local(path))))
        except (ValueError, OverflowError) as error:
            if str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table that :meth:`from_tsv` reads back exactly.

        Columns ``token gene_id symbol median aliases``, separated by tabs, aliases by ``|``,
        rows by token. The file is written completely or not at all.
        """
        content = "".join(f"{line}\n" for line in _lines(self)).encode()
        if str(path).endswith(".gz"):
            # A fixed time stamp makes equal vocabularies equal files.
            content = gzip.compress(content, mtime=0)
        put_in_place(local(path), lambda part: part.write_bytes(content))

    @classmethod
    def fit(
        cls,
        slices: Iterable[Any],
        *,
        orthologs: Mapping[str, str] | str | PathLike[str] | None = None,
        reference: GeneVocabulary | None = None,
        method: Literal["exact", "histogram"] = "exact",
        min_cells: int = 10,
        layer: str | None = None,
    ) -> GeneVocabulary:
        """Make a vocabulary of the genes in `slices`, with their medians.

        The median of a gene is taken over the cells that have it, of count / total count of the
        cell x 10,000 (SToFM, arXiv 2507.11588, section 3.2, after Geneformer). Columns of one
        gene are summed first; mouse columns count as their human ortholog. Tokens: 0 padding,
        1 mask, then the genes in ascending id, then ``<cls>``.

        Parameters
        ----------
        slices
            AnnData or SpatialData, paths of ``.h5ad`` files or ``.zarr`` stores, or tuples (counts,
            gene ids) or (counts, gene ids, symbols) with counts (n_cells, n_vars) as a sparse
            matrix. They are read one after another; an iterator works too.
        orthologs
            Mouse to human Ensembl ids: a mapping, a table or its address, see
            :func:`stofm.genes.read_orthologs`.
        reference
            Vocabulary that translates names other than human Ensembl ids (symbols, mouse ids that
            `orthologs` lacks), and whose symbols are kept.
        method
            ``"exact"`` keeps all non-zero values in memory (12 bytes each). ``"histogram"``
            counts them in narrow logarithmic bins: memory does not grow with the number of
            cells, medians are accurate to 0.1 %, and the order of slices does not matter.
        min_cells
            Number of cells in which a gene must be detected.
        layer
            Layer of the AnnData objects that holds raw counts; None for ``X``.

        Raises
        ------
        ValueError
            No gene is left, or counts are not raw counts.
        """
        from stofm.genes.fitting import fit_genes

        genes = fit_genes(
            slices,
            orthologs=orthologs,
            reference=reference,
            method=method,
            min_cells=min_cells,
            layer=layer,
        )
        return cls(**arranged(*genes))

    @classmethod
    def geneformer(
        cls,
        name: Literal["30m", "104m"] = "30m",
        *,
        folder: str | PathLike[str] | None = None,
        revision: str | None = None,
        check_sha256: bool = True,
    ) -> GeneVocabulary:
        """Load the dictionaries that Geneformer publishes.

        They are pickles, but only plain dictionaries of strings and numbers are read, and nothing
        in them is executed.

        Parameters
        ----------
        name
            ``"30m"`` (Geneformer V1, the vocabulary of SToFM's published weights) or
            ``"104m"`` (Geneformer V2).
        folder
            Local folder with the published files, at its top or where the published repository has
            them. None: download them from the Hugging Face repository ``ctheodoris/Geneformer``, or
            use its local cache.
        revision
            Branch, tag or commit of that repository.
        check_sha256
            Refuse files of ``"30m"`` other than the published ones. For ``"104m"`` no checksum is
            known; the one found is logged.

        Raises
        ------
        FileNotFoundError
            `folder` lacks a file.
        ValueError
            A file has another checksum, or holds something other than names and numbers.
        """
        from stofm.genes.geneformer import load_geneformer

        genes = load_geneformer(name, folder=folder, revision=revision, check_sha256=check_sha256)
        return cls(**arranged(*genes))


@lru_cache(maxsize=1)
def embedded_vocabulary() -> GeneVocabulary:
    """Return the vocabulary of the built-in model ``stofm-mini``, for human and mouse."""
    table = resources.files("stofm").joinpath("weights", "stofm-mini", "vocabulary.tsv")
    with resources.as_file(table) as path:
        return GeneVocabulary.from_tsv(path)


def arranged(
    genes: list[tuple[str, str, int, float]], special: dict[str, int], aliases: dict[str, str]
) -> dict[str, Any]:
    """Fields of a vocabulary: (gene id, symbol, token, median) by token, and ``cls`` if absent."""
    by_token = sorted(genes, key=lambda gene: gene[2])
    gene_ids, symbols, tokens, medians = zip(*by_token, strict=True) if genes else ((),) * 4
    if "cls" not in special:
        special = {**special, "cls": max(-1, *tokens, *special.values()) + 1}
    return {
        "gene_ids": np.array(gene_ids, dtype=np.str_),
        "symbols": np.array(symbols, dtype=np.str_),
        "tokens": np.array(tokens, dtype=np.int32),
        "medians": np.array(medians, dtype=np.float64),
        "special": special,
        "aliases": aliases,
    }


def _read_genes(
    path: Path,
) -> tuple[list[tuple[str, str, int, float]], dict[str, int], dict[str, str]]:
    """Read a table's genes, its special tokens and its aliases."""
    table = read_text_table(path, "vocabulary table").fillna("").rename(columns=_OTHER_NAMES)
    if not {"token", "gene_id", "median"} <= set(table):
        raise ValueError(
            f"{path} is not a vocabulary table: expected the columns {list(_COLUMNS)} "
            f"(or token_id, ensembl_id, median, symbol), found {list(table)}."
        )
    genes: list[tuple[str, str, int, float]] = []
    special: dict[str, int] = {}
    aliases: dict[str, str] = {}
    rows = table.reindex(columns=list(_COLUMNS), fill_value="").itertuples(index=False, name=None)
    for token, gene, symbol, median, others in rows:
        if gene.startswith("<"):
            special[gene.strip("<>")] = int(token)
            continue
        genes.append((gene, symbol, int(token), float(median)))
        aliases |= dict.fromkeys(filter(None, others.split("|")), gene)
    return genes, special, aliases


def _lines(vocabulary: GeneVocabulary) -> list[str]:
    """Lines of the table of a vocabulary, the header first."""
    names = [*vocabulary.gene_ids.tolist(), *vocabulary.symbols.tolist(), *vocabulary.aliases]
    bad = [name for name in names if set(name) & set("\t\n\r")]
    if bad := bad + [alias for alias in vocabulary.aliases if not alias or "|" in alias]:
        raise ValueError(f"The name {bad[0]!r} is empty, or contains a separator of the table.")
    aliases: dict[str, list[str]] = {}
    for alias, gene in vocabulary.aliases.items():
        aliases.setdefault(gene, []).append(alias)
    rows = [(token, f"<{name}>", "", "", "") for name, token in vocabulary.special.items()]
    columns = (vocabulary.tokens, vocabulary.gene_ids, vocabulary.symbols, vocabulary.medians)
    for token, gene, symbol, median in zip(*(one.tolist() for one in columns), strict=True):
        rows.append((token, gene, symbol, repr(median), "|".join(sorted(aliases.get(gene, [])))))
    return ["\t".join(map(str, cells)) for cells in [_COLUMNS, *sorted(rows)]]
