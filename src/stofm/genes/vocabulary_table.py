"""Reading and writing of vocabulary tables."""

from __future__ import annotations

import gzip
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from stofm._files import put_in_place, reading

if TYPE_CHECKING:
    import io
    from collections.abc import Iterator
    from pathlib import Path

    from stofm.genes.vocabulary import GeneVocabulary

COLUMNS: Final = ("token", "gene_id", "symbol", "median", "aliases")
#: Column names of plain copies of Geneformer's dictionaries, and ours for them.
_OTHER_NAMES: Final = {"token_id": "token", "ensembl_id": "gene_id"}
_LARGEST_TOKEN: Final = 2**31 - 2
_REQUIRED: Final = ("token", "gene_id", "median")


def read_table(path: Path) -> dict[str, Any]:
    """Read the fields of a :class:`~stofm.genes.GeneVocabulary` from a table."""
    genes: list[tuple[str, str, int, float]] = []
    special: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for number, row in _rows(path):
        gene_id = row["gene_id"]
        try:
            token = int(row["token"])
            median = float(row["median"]) if row["median"] else None
        except ValueError:
            msg = f"{path}, line {number}: token or median is not a number: {row}."
            raise ValueError(msg) from None
        if not 0 <= token <= _LARGEST_TOKEN:
            msg = f"{path}, line {number}: tokens are from 0 to {_LARGEST_TOKEN}, found {token}."
            raise ValueError(msg)
        if gene_id.startswith("<"):
            special[gene_id.strip("<>")] = token
            continue
        if median is None:
            msg = f"{path}, line {number}: the gene {gene_id} has no median."
            raise ValueError(msg)
        genes.append((gene_id, row.get("symbol", ""), token, median))
        names = row.get("aliases", "")
        aliases.update(dict.fromkeys(names.split("|"), gene_id) if names else {})
    return vocabulary_fields(genes, special, aliases)


def vocabulary_fields(
    genes: list[tuple[str, str, int, float]], special: dict[str, int], aliases: dict[str, str]
) -> dict[str, Any]:
    """Arrange (gene id, symbol, token, median) by token; append ``cls`` if it is absent."""
    genes = sorted(genes, key=lambda gene: gene[2])
    if "cls" not in special:
        used = [token for *_, token, _ in genes] + list(special.values())
        special = {**special, "cls": max(used, default=-1) + 1}
    return {
        "gene_ids": np.array([gene[0] for gene in genes], dtype=np.str_),
        "symbols": np.array([gene[1] for gene in genes], dtype=np.str_),
        "tokens": np.array([gene[2] for gene in genes], dtype=np.int32),
        "medians": np.array([gene[3] for gene in genes], dtype=np.float64),
        "special": special,
        "aliases": aliases,
    }


def write_table(vocabulary: GeneVocabulary, path: Path) -> None:
    """Write `vocabulary` to `path` (gzip if it ends in ``.gz``), whole or not at all."""
    lines = ["\t".join(COLUMNS), *_lines(vocabulary)]
    content = ("\n".join(lines) + "\n").encode()
    if path.suffix == ".gz":
        # A fixed time stamp makes equal vocabularies equal files.
        content = gzip.compress(content, mtime=0)
    put_in_place(path, lambda part: part.write_bytes(content))


def _lines(vocabulary: GeneVocabulary) -> list[str]:
    names: dict[str, list[str]] = {}
    for alias, gene_id in vocabulary.aliases.items():
        names.setdefault(gene_id, []).append(alias)
    rows: list[tuple[int, list[str]]] = [
        (token, [str(token), f"<{name}>", "", "", ""]) for name, token in vocabulary.special.items()
    ]
    for gene_id, symbol, token, median in zip(
        vocabulary.gene_ids.tolist(),
        vocabulary.symbols.tolist(),
        vocabulary.tokens.tolist(),
        vocabulary.medians.tolist(),
        strict=True,
    ):
        own = sorted(names.get(gene_id, []))
        _require_plain(gene_id, symbol, own)
        rows.append((token, [str(token), gene_id, symbol, repr(median), "|".join(own)]))
    return ["\t".join(cells) for _, cells in sorted(rows)]


def _require_plain(gene_id: str, symbol: str, aliases: list[str]) -> None:
    separators = "\t\n\r"
    for name in (gene_id, symbol):
        if any(separator in name for separator in separators):
            msg = f"The name {name!r} of {gene_id} holds a character that separates the table."
            raise ValueError(msg)
    for name in aliases:
        if not name or any(separator in name for separator in separators + "|"):
            msg = f"The alias {name!r} of {gene_id} is empty or holds a tab, line end or '|'."
            raise ValueError(msg)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    with reading(path, "vocabulary table"), open_text(path) as file:
        header = file.readline().rstrip("\r\n").split("\t")
        columns = [_OTHER_NAMES.get(name, name) for name in header]
        if not set(_REQUIRED) <= set(columns):
            msg = (
                f"{path} is not a vocabulary table: expected the columns {list(COLUMNS)} "
                f"(or token_id, ensembl_id, median, symbol), found {header}."
            )
            raise ValueError(msg)
        for number, line in enumerate(file, start=2):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(columns):
                msg = f"{path}, line {number}: expected {len(columns)} cells, found {len(cells)}."
                raise ValueError(msg)
            yield number, dict(zip(columns, cells, strict=True))


def open_text(path: Path) -> io.TextIOBase:
    """Open a text file, decompressing it if its name ends in ``.gz``."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")
