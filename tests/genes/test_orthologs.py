from __future__ import annotations

import gzip
import hashlib
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import pytest

from stofm.genes import read_orthologs

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

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


def test_tables_and_mappings(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text(TEXT)
    (tmp_path / "b.tsv.gz").write_bytes(TABLE)
    assert read_orthologs(tmp_path / "a.tsv") == PAIRS
    assert read_orthologs(str(tmp_path / "b.tsv.gz")) == PAIRS
    assert read_orthologs({"ENSMUSG00000020932.1": "ENSG00000131095.2"}) == {
        "ENSMUSG00000020932": "ENSG00000131095"
    }


def test_unusable_tables(tmp_path: Path) -> None:
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
