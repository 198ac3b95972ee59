from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from stofm.genes import GeneVocabulary
from stofm.genes.geneformer import UnsafeTableError, read_pickle_table

TOKENS_30M = {"<pad>": 0, "<mask>": 1, "ENSG01": np.int64(2), "ENSG02": np.int64(3)}
TOKENS_104M = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "ENSG01": 4, "ENSG02": 5}


MEDIANS = {"ENSG02": np.float64(0.3), "ENSG01": np.float64(2.5), "ENSG99": np.float64(1.0)}
NAMES = {"AAA": "ENSG01", "OLD": "ENSG01", "ZZZ": "ENSG99"}


def write_tables(folder: Path, pattern: str, tokens: dict[str, object]) -> None:
    tables = {
        "token_dictionary": tokens,
        "gene_median_dictionary": MEDIANS,
        "gene_name_id_dict": NAMES,
    }
    for name, table in tables.items():
        path = folder / pattern.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(table))


@pytest.mark.parametrize(
    "pattern",
    [
        "{}.pkl",
        "geneformer/{}.pkl",
        "{}_gc30M.pkl",
        "geneformer/gene_dictionaries_30m/{}_gc30M.pkl",
    ],
)
def test_folders_of_30m(tmp_path: Path, pattern: str) -> None:
    write_tables(tmp_path, pattern, TOKENS_30M)
    vocabulary = GeneVocabulary.geneformer("30m", folder=tmp_path, check_sha256=False)
    assert vocabulary.gene_ids.tolist() == ["ENSG01", "ENSG02"]
    assert vocabulary.tokens.tolist() == [2, 3]
    assert vocabulary.medians.tolist() == [2.5, 0.3]
    assert vocabulary.symbols.tolist() == ["AAA", ""]
    assert dict(vocabulary.aliases) == {"OLD": "ENSG01"}
    assert dict(vocabulary.special) == {"pad": 0, "mask": 1, "cls": 4}


def test_104m_brings_its_special_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tables(tmp_path, "geneformer/{}_gc104M.pkl", TOKENS_104M)
    with caplog.at_level(logging.INFO, logger="stofm"):
        vocabulary = GeneVocabulary.geneformer("104m", folder=str(tmp_path))
    assert dict(vocabulary.special) == {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    assert vocabulary.n_tokens == 6
    assert caplog.text.count("not compared with a known one") == 3


def test_30m_must_be_the_published_files(tmp_path: Path) -> None:
    write_tables(tmp_path, "{}.pkl", TOKENS_30M)
    with pytest.raises(ValueError, match=r"is not the published file: its sha256 is .*ab9dc409"):
        GeneVocabulary.geneformer("30m", folder=tmp_path)


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, str | None]] = []

    def download(repository: str, file: str, *, revision: str | None) -> str:
        asked.append((repository, file, revision))
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    write_tables(tmp_path, "geneformer/gene_dictionaries_30m/{}_gc30M.pkl", TOKENS_30M)
    write_tables(tmp_path, "geneformer/{}_gc104M.pkl", TOKENS_104M)
    GeneVocabulary.geneformer("30m", revision="abc", check_sha256=False)
    GeneVocabulary.geneformer("104m")
    assert {(repository, revision) for repository, _, revision in asked[:3]} == {
        ("ctheodoris/Geneformer", "abc")
    }
    assert asked[3] == ("ctheodoris/Geneformer", "geneformer/token_dictionary_gc104M.pkl", None)


def test_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no token_dictionary of the vocabulary '104m'"):
        GeneVocabulary.geneformer("104m", folder=tmp_path)
    with pytest.raises(
        ValueError, match=r"no Geneformer vocabulary '95m'; there are \['104m', '30"
    ):
        GeneVocabulary.geneformer("95m", folder=tmp_path)  # type: ignore[arg-type]
    write_tables(tmp_path, "{}_gc104M.pkl", {**TOKENS_104M, "ENSG03": 6})
    with pytest.raises(ValueError, match=r"1 genes have a token but no median.*ENSG03"):
        GeneVocabulary.geneformer("104m", folder=tmp_path)


@pytest.mark.internet
@pytest.mark.skipif("STOFM_INTERNET" not in os.environ, reason="downloads; set STOFM_INTERNET")
def test_published_tables(shared: Path) -> None:
    published = GeneVocabulary.geneformer("30m")
    copy = GeneVocabulary.from_tsv(shared / "vocab" / "geneformer-30m.tsv.gz")
    assert published.fingerprint == copy.fingerprint


def write(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_names_and_numbers(tmp_path: Path, protocol: int) -> None:
    table = {
        "ENSG1": 1.5,
        "ENSG2": 7,
        "<pad>": 0,
        "A": "ENSG1",
        "f8": np.float64(1 / 3),
        "f4": np.float32(0.25),
        "i8": np.int64(-(2**40)),
        "big": np.array(2.5, dtype=">f8")[()],
    }
    found = read_pickle_table(write(tmp_path / "table.pkl", table, protocol))
    assert found == table
    assert {type(value) for value in found.values()} == {float, int, str}


class Bomb:
    """Leaves a mark when it is unpickled as usual."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def test_a_program_is_refused_and_not_run(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = write(tmp_path / "table.pkl", {"ENSG1": 1.0, "ENSG2": Bomb(mark)})
    with pytest.raises(
        UnsafeTableError, match=r"table.pkl is refused. It asks for \S+ *\S*\. Only"
    ):
        read_pickle_table(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # the file does what it was made for
    assert mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(print), "asks for builtins.print"),
        (b"cposix\nsystem\n(S'true'\ntR.", "asks for posix.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.", "asks for builtins.eval"),
        (pickle.dumps({"a": OrderedDict()}), "asks for collections.OrderedDict"),
        (pickle.dumps({"a": np.arange(3)}), "asks for numpy"),
        (pickle.dumps({"a": np.array("text")[()]}), "refused"),
        (pickle.dumps({"a": np.datetime64("2020-01-01")}), "unknown type 'M8'"),
        (b"cnumpy\ndtype\n.", "not a dictionary of names"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "table.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafeTableError, match=message):
        read_pickle_table(path)


@pytest.mark.parametrize(
    "value", [["a"], {1: 2.0}, {"a": None}, {"a": [1]}, {"a": {"b": 1}}, "text"]
)
def test_other_content_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UnsafeTableError, match="not a dictionary of names to names or numbers"):
        read_pickle_table(write(tmp_path / "table.pkl", value))


def test_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "table.pkl"
    for content in (b"", b"no pickle", pickle.dumps({"a": 1.5})[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="could not be read as a pickle"):
            read_pickle_table(path)


def test_checksum(tmp_path: Path) -> None:
    path = write(tmp_path / "table.pkl", {"a": 1.5})
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read_pickle_table(path, sha256=checksum) == {"a": 1.5}
    with pytest.raises(ValueError, match=f"its sha256 is {checksum}, expected 00. Download"):
        read_pickle_table(path, sha256="00")
