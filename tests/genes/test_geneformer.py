from __future__ import annotations

import logging
import os
import pickle
from typing import TYPE_CHECKING

import numpy as np
import pytest

from stofm.genes import GeneVocabulary

if TYPE_CHECKING:
    from pathlib import Path

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
