from __future__ import annotations

import gzip
import hashlib
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from stofm.genes import read_orthologs
from stofm.genes.gene_ids import IdType, clean_names, id_type, strip_version

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000131095", IdType.HUMAN_ENSEMBL),
        ("ENSG00000131095.12", IdType.HUMAN_ENSEMBL_VERSION),
        ("ENSG00000002586.20_PAR_Y", IdType.HUMAN_ENSEMBL_VERSION),
        ("ENSGR0000002586", IdType.HUMAN_ENSEMBL),
        ("ENSMUSG00000020932", IdType.MOUSE_ENSEMBL),
        ("ENSMUSG00000020932.3", IdType.MOUSE_ENSEMBL_VERSION),
        ("ENSRNOG00000002919", IdType.OTHER_ENSEMBL),
        ("ENSDARG00000025301.9", IdType.OTHER_ENSEMBL),
        ("ENST00000253408", IdType.TRANSCRIPT),
        ("ENSMUST00000067444.2", IdType.TRANSCRIPT),
        ("GFAP", IdType.HUMAN_SYMBOL),
        ("HLA-DRB1", IdType.HUMAN_SYMBOL),
        ("C2orf74", IdType.HUMAN_SYMBOL),
        ("FO538757.1", IdType.HUMAN_SYMBOL),
        ("Gfap", IdType.MOUSE_SYMBOL),
        ("1700022I11Rik", IdType.MOUSE_SYMBOL),
        ("mt-Nd4", IdType.MOUSE_SYMBOL),
        ("H2-Ab1", IdType.MOUSE_SYMBOL),
        ("2670", IdType.NUMBER),
        ("gfap", IdType.OTHER),
        ("NegControlProbe_00042", IdType.OTHER),
        ("", IdType.MISSING),
    ],
)
def test_kinds_of_names(name: str, expected: IdType) -> None:
    assert id_type(name) is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000131095.12", "ENSG00000131095"),
        ("ensmusg00000020932.3", "ENSMUSG00000020932"),
        ("ENSG00000002586.20_PAR_Y", "ENSG00000002586"),
        ("AC005606.1", "AC005606.1"),
        ("Gfap", "Gfap"),
    ],
)
def test_versions_are_taken_from_ensembl_ids_only(name: str, expected: str) -> None:
    assert strip_version(name) == expected


def test_missing_names() -> None:
    names = [" GFAP ", None, np.nan, pd.NA, "<NA>", "nan", "", b"MBP", 2670, np.str_("PLP1")]
    assert clean_names(names) == ["GFAP", "", "", "", "", "", "", "MBP", "2670", "PLP1"]
    assert clean_names(pd.Categorical(["A", None])) == ["A", ""]


TEXT = (
    "mouse_ensembl_id\thuman_ensembl_id\n"
    "ENSMUSG00000020932\tENSG00000131095\n"
    "ENSMUSG00000070570.2\tENSG00000104888.11\n"
)
PAIRS = {"ENSMUSG00000020932": "ENSG00000131095", "ENSMUSG00000070570": "ENSG00000104888"}
TABLE = gzip.compress(TEXT.encode(), mtime=0)


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        del format, arguments


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of the table on a server of this machine, with an empty cache."""
    served = tmp_path / "served"
    served.mkdir()
    (served / "orthologs.tsv.gz").write_bytes(TABLE)
    monkeypatch.setattr("pooch.os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(QuietHandler, directory=str(served))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/orthologs.tsv.gz"
        server.shutdown()
        thread.join()


def test_tables_and_mappings_of_orthologs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(TEXT)
    (tmp_path / "b.tsv.gz").write_bytes(TABLE)
    assert read_orthologs(tmp_path / "a.tsv") == PAIRS
    assert read_orthologs(str(tmp_path / "b.tsv.gz")) == PAIRS
    assert read_orthologs({"ENSMUSG00000020932.1": "ENSG00000131095.2"}) == {
        "ENSMUSG00000020932": "ENSG00000131095"
    }


def test_unusable_tables_of_orthologs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("mouse\thuman\nA\tB\n")
    with pytest.raises(ValueError, match="expected the columns mouse_ensembl_id and human_ens"):
        read_orthologs(tmp_path / "a.tsv")
    with pytest.raises(FileNotFoundError):
        read_orthologs(tmp_path / "none.tsv")


def test_download_is_kept(address: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="stofm"):
        assert read_orthologs(address) == PAIRS
    assert hashlib.sha256(TABLE).hexdigest() in caplog.text
    (tmp_path / "served" / "orthologs.tsv.gz").unlink()
    assert read_orthologs(address) == PAIRS


def test_checksum_of_a_download_is_held(address: str, tmp_path: Path) -> None:
    assert read_orthologs(f"{address}#sha256={hashlib.sha256(TABLE).hexdigest()}") == PAIRS
    with pytest.raises(ValueError, match=f"sha256 .*, expected {'0' * 64}; the file was discarded"):
        read_orthologs(f"{address}#sha256={'0' * 64}")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
