"""The dictionaries that Geneformer publishes, from a folder or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stofm._files import local
from stofm._logging import logger
from stofm.genes.pickle_tables import file_sha256, read_pickle_table
from stofm.genes.vocabulary_table import vocabulary_fields

if TYPE_CHECKING:
    from os import PathLike

_REPOSITORY: Final = "ctheodoris/Geneformer"
_TOKENS, _MEDIANS, _NAMES = "token_dictionary", "gene_median_dictionary", "gene_name_id_dict"
#: Where the published repository has the tables, by vocabulary.
_HUB_FILES: Final = {
    "30m": "geneformer/gene_dictionaries_30m/{}_gc30M.pkl",
    "104m": "geneformer/{}_gc104M.pkl",
}
#: Where a local folder may have them: as published now, at its top, or as in earlier releases.
_LOCAL_FILES: Final = {
    "30m": (
        "geneformer/gene_dictionaries_30m/{}_gc30M.pkl",
        "gene_dictionaries_30m/{}_gc30M.pkl",
        "{}_gc30M.pkl",
        "{}.pkl",
        "geneformer/{}.pkl",
    ),
    "104m": ("geneformer/{}_gc104M.pkl", "{}_gc104M.pkl"),
}
#: Checksums of the tables; none are known for "104m".
_SHA256: Final[dict[str, dict[str, str]]] = {
    "30m": {
        _TOKENS: "ab9dc40973fa5224d77b793e2fd114cacf3d08423ed9c4c49caf0ba9c7f218f1",
        _MEDIANS: "b3b589bb5ec75040d05fc44dd6bf0184cf87f3c362cf158d196a6ed3b7fe5f39",
        _NAMES: "55e67962e79c0039a6c32d43c5c99f38e51964bbcfa32f736150ee1e285c438c",
    },
    "104m": {},
}


def load_geneformer(
    name: str,
    *,
    folder: str | PathLike[str] | None,
    revision: str | None,
    check_sha256: bool,
) -> dict[str, Any]:
    """Load the fields of a vocabulary; see :meth:`stofm.genes.GeneVocabulary.geneformer`."""
    if name not in _HUB_FILES:
        msg = f"There is no Geneformer vocabulary {name!r}; there are {sorted(_HUB_FILES)}."
        raise ValueError(msg)
    tables = {}
    for table in (_TOKENS, _MEDIANS, _NAMES):
        path = _download(name, table, revision) if folder is None else _find(name, table, folder)
        expected = _SHA256[name].get(table) if check_sha256 else None
        if expected is None:
            logger.info("%s: sha256 %s, not compared with a known one", path, file_sha256(path))
        tables[table] = read_pickle_table(path, sha256=expected)
    return _fields(tables[_TOKENS], tables[_MEDIANS], tables[_NAMES])


def _download(name: str, table: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    file = _HUB_FILES[name].format(table)
    return Path(hf_hub_download(_REPOSITORY, file, revision=revision))


def _find(name: str, table: str, folder: str | PathLike[str]) -> Path:
    candidates = [local(folder) / pattern.format(table) for pattern in _LOCAL_FILES[name]]
    for path in candidates:
        if path.is_file():
            return path
    searched = ", ".join(str(path.relative_to(folder)) for path in candidates)
    msg = f"{folder} has no {table} of the vocabulary {name!r}; looked for {searched}."
    raise FileNotFoundError(msg)


def _fields(
    tokens: dict[str, Any], medians: dict[str, Any], ids_by_name: dict[str, Any]
) -> dict[str, Any]:
    symbols: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for name, gene_id in ids_by_name.items():
        if symbols.setdefault(str(gene_id), name) != name and gene_id in tokens:
            aliases[name] = str(gene_id)
    special = {key.strip("<>"): int(token) for key, token in tokens.items() if key[0] == "<"}
    genes = [gene for gene in tokens if gene[0] != "<"]
    without = [gene for gene in genes if gene not in medians]
    if without:
        msg = f"{len(without)} genes have a token but no median, for example {without[:3]}."
        raise ValueError(msg)
    return vocabulary_fields(
        [(gene, symbols.get(gene, ""), int(tokens[gene]), float(medians[gene])) for gene in genes],
        special,
        aliases,
    )
