"""The dictionaries that Geneformer publishes, from a folder or the Hugging Face hub.

They are pickles, and unpickling a file can run any code that its author put in. The reader here
accepts dictionaries, strings, numbers and numpy's scalars, which it builds itself. It refuses
anything else that a file asks for, before it happens.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from stofm._files import local
from stofm._logging import logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from os import PathLike

_REPOSITORY: Final = "ctheodoris/Geneformer"
_TOKENS, _MEDIANS, _NAMES = "token_dictionary", "gene_median_dictionary", "gene_name_id_dict"
#: Where the published repository has the tables, by vocabulary.
_HUB_FILES: Final = {
    "30m": "geneformer/gene_dictionaries_30m/{}_gc30M.pkl",
    "104m": "geneformer/{}_gc104M.pkl",
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
_FORMATS: Final = {"f8": "d", "f4": "f", "i8": "q", "i4": "i", "i2": "h", "u8": "Q", "u4": "I"}
_ADMITTED: Final = (
    "Only dictionaries of names and numbers are read, because a pickle can hold any program."
)


class UnsafeTableError(ValueError):
    """A pickle asks for something other than names and numbers."""


def load_geneformer(
    name: str,
    *,
    folder: str | PathLike[str] | None,
    revision: str | None,
    check_sha256: bool,
) -> tuple[list[tuple[str, str, int, float]], dict[str, int], dict[str, str]]:
    """Genes, special tokens and aliases; see :meth:`stofm.genes.GeneVocabulary.geneformer`."""
    if name not in _HUB_FILES:
        raise ValueError(
            f"There is no Geneformer vocabulary {name!r}; there are {sorted(_HUB_FILES)}."
        )
    tables = {}
    for table in (_TOKENS, _MEDIANS, _NAMES):
        path = _download(name, table, revision) if folder is None else _find(name, table, folder)
        expected = _SHA256[name].get(table) if check_sha256 else None
        tables[table] = read_pickle_table(path, sha256=expected)
    tokens, medians, ids_by_name = tables.values()
    symbols = {str(gene): symbol for symbol, gene in reversed(ids_by_name.items())}
    aliases = {
        symbol: str(gene)
        for symbol, gene in ids_by_name.items()
        if symbols[str(gene)] != symbol and gene in tokens
    }
    special = {key.strip("<>"): int(token) for key, token in tokens.items() if key[0] == "<"}
    genes = [gene for gene in tokens if gene[0] != "<"]
    if without := [gene for gene in genes if gene not in medians]:
        raise ValueError(
            f"{len(without)} genes have a token but no median, for example {without[:3]}."
        )
    rows = [
        (gene, symbols.get(gene, ""), int(tokens[gene]), float(medians[gene])) for gene in genes
    ]
    return rows, special, aliases


def _download(name: str, table: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    file = _HUB_FILES[name].format(table)
    return Path(hf_hub_download(_REPOSITORY, file, revision=revision))


def _find(name: str, table: str, folder: str | PathLike[str]) -> Path:
    """Find a table anywhere in a folder, as named now, or as in earlier releases."""
    own = Path(_HUB_FILES[name].format(table)).name
    names = [own, f"{table}.pkl"] if name == "30m" else [own]
    for file in names:
        if found := sorted(local(folder).rglob(file)):
            return found[0]
    raise FileNotFoundError(
        f"{folder} has no {table} of the vocabulary {name!r}; looked for {' and '.join(names)}."
    )


def read_pickle_table(path: Path, *, sha256: str | None = None) -> dict[str, Any]:
    """Read a pickled dictionary of names to names or numbers, with this checksum if one is given."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if sha256 is None:
        logger.info("%s: sha256 %s, not compared with a known one", path, found)
    elif found != sha256:
        raise ValueError(
            f"{path} is not the published file: its sha256 is {found}, expected {sha256}. "
            "Download it again, or pass check_sha256=False if it is meant to differ."
        )
    try:
        table = _TableReader(io.BytesIO(content)).load()
    except UnsafeTableError as error:
        raise UnsafeTableError(f"{path} is refused. {error} {_ADMITTED}") from None
    except Exception as error:
        raise ValueError(f"{path} could not be read as a pickle: {error}") from error
    if not isinstance(table, dict) or not all(
        isinstance(key, str) and isinstance(value, str | int | float)
        for key, value in table.items()
    ):
        raise UnsafeTableError(
            f"{path} is refused: it is not a dictionary of names to names or numbers. {_ADMITTED}"
        )
    return dict(table)


class _ScalarType:
    """Stands for ``numpy.dtype`` while a table is read."""

    def __init__(self, name: str, *_: object) -> None:
        if name not in _FORMATS:
            raise UnsafeTableError(f"It holds numbers of the unknown type {name!r}.")
        self.format = f"<{_FORMATS[name]}"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] == ">":
            self.format = f">{self.format[1:]}"


def _scalar(kind: Any, content: bytes) -> float | int:
    """Stands for the function that makes numpy's scalars while a table is read."""
    value: float | int = struct.unpack(kind.format, content)[0]
    return value


def _encode(text: str, _encoding: str) -> bytes:
    """Stands for ``codecs.encode``, with which early pickle protocols write bytes."""
    return text.encode("latin-1")


_STAND_INS: Final[dict[tuple[str, str], Callable[..., Any]]] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "dtype"): _ScalarType,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _TableReader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        stand_in = _STAND_INS.get((module_name, global_name))
        if stand_in is None:
            raise UnsafeTableError(f"It asks for {module_name}.{global_name}.")
        # Wrapped each time, because a pickle may set attributes of what it gets.
        return lambda *arguments: stand_in(*arguments)
