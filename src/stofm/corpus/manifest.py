"""The folder of a corpus: settings, vocabulary, shards, and the manifest of its slices."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import pandas as pd

from stofm._config import read_json
from stofm._files import local, put_in_place, reading
from stofm.corpus.reader import CorpusSlice, Reading
from stofm.corpus.shards import Shard, find_shards
from stofm.genes import GeneVocabulary

if TYPE_CHECKING:
    from os import PathLike
    from pathlib import Path

SETTINGS: Final = "corpus.json"
VOCABULARY: Final = "vocabulary.tsv"
MANIFEST: Final = "manifest.parquet"
#: Folders of shards, of slices waiting to be joined to one, of failures, and of held-out slices.
SHARDS, PARTS, FAILED, HELD_OUT = "shards", "parts", "failed", "held_out"
#: Columns of the manifest, and their values if nothing is known.
COLUMNS: Final[dict[str, Any]] = {
    **{"name": "", "source": "", "slice": "", "status": "ok", "reason": ""},
    **dict.fromkeys(("licence", "technology", "species", "tissue", "donor"), ""),
    **{"unit": "unknown", "cells": 0, "cells_left_out": 0, "min_genes": 0, "genes": 0},
    **{"genes_matched": 0, "counts_kept": float("nan"), "gene_report": "", "checksum": ""},
    **{"content": "", "shard": "", "number": -1, "key": "", "order": 0},
}


def is_corpus(path: str | PathLike[str]) -> bool:
    """Whether a path is a corpus."""
    return (local(path) / SETTINGS).is_file()


def require_corpus(path: str | PathLike[str]) -> Path:
    """Return the path if it is a corpus, else raise an error."""
    folder = local(path)
    if not is_corpus(folder):
        raise FileNotFoundError(
            f"{folder} is not a corpus (it has no {SETTINGS}): make one with stofm.corpus.build."
        )
    return folder


def read_manifest(folder: Path) -> pd.DataFrame:
    """Read the manifest of a corpus: a row for each slice, and for each file without one."""
    path = require_corpus(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: its build was interrupted. Run it again; it goes on from "
            "where it was."
        )
    with reading(path, "manifest of a corpus"):
        return pd.read_parquet(path)


def write_manifest(folder: Path) -> pd.DataFrame:
    """Write the manifest of the folder; of slices with the same cells, the first counts."""
    rows = [
        {**entry, "shard": shard.folder.name, "number": number}
        for shard in find_shards(folder / SHARDS)
        for number, entry in enumerate(shard.slices)
    ]
    failed = sorted((folder / FAILED).glob("*.json"))
    rows += [read_json(path, "delete it") for path in failed]
    table = pd.DataFrame([{**COLUMNS, **row} for row in rows], columns=list(COLUMNS))
    # A file that has changed is listed again.
    is_old = table.duplicated(["source", "slice"], keep="last")
    table.loc[is_old, ["status", "reason"]] = ["replaced", "the file has changed since"]
    table = table.sort_values(["order", "source", "shard", "number"], ignore_index=True)
    is_ok = table["status"] == "ok"
    first = table[is_ok].groupby("content")[["source", "slice"]].transform("first")
    is_again = is_ok & table["content"].where(is_ok).duplicated()
    table.loc[is_again, "status"] = "duplicate"
    table.loc[is_again, "reason"] = (
        "has the cells of " + first["source"] + (" " + first["slice"]).str.rstrip()
    )
    put_in_place(folder / MANIFEST, lambda part: table.to_parquet(part, index=False))
    return table


def read_slices(folder: str | PathLike[str]) -> list[CorpusSlice]:
    """Open the slices of a corpus that are to be read, in the order of the manifest."""
    place = require_corpus(folder).absolute()
    table = read_manifest(place)
    vocabulary = read_vocabulary(place)
    how = Reading(vocabulary, vocabulary.n_tokens)
    table = table[(table["status"] == "ok") & (table["cells"] > 0)]
    shards = {name: Shard(place / SHARDS / name) for name in table["shard"].unique()}
    pairs = zip(table["shard"], table["number"].tolist(), strict=True)
    return [CorpusSlice(shards[name], number, how) for name, number in pairs]


def open_slice(shard: Path, number: int) -> CorpusSlice:
    """Open a slice of a corpus by the folder of its shard."""
    vocabulary = read_vocabulary(shard.parents[1])
    return CorpusSlice(Shard(shard), number, Reading(vocabulary, vocabulary.n_tokens))


@lru_cache(maxsize=2)
def read_vocabulary(folder: Path) -> GeneVocabulary:
    """Read the vocabulary of a corpus, once."""
    return GeneVocabulary.from_tsv(folder / VOCABULARY)
