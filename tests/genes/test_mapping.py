from __future__ import annotations

import gzip
import hashlib
import logging
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from stofm.genes import (
    GeneMapping,
    GeneVocabulary,
    embedded_vocabulary,
    map_gene_ids,
    read_orthologs,
)
from stofm.genes.mapping import IdType, advice_for_names, clean_names, id_type, strip_version

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
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
    with pytest.raises(ValueError, match="hash of downloaded file"):
        read_orthologs(f"{address}#sha256={'0' * 64}")


NEURON = {"ENSMUSG00000070570": "ENSG00000104888"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("ENSG00000131095", 0),
        ("ENSG00000131095.7", 0),
        ("ENSMUSG00000020932", 0),
        ("ENSMUSG00000020932.12", 0),
        ("VGLUT1", 1),
        ("ENSMUSG00000070570.4", 1),
        ("S100B", 2),
        ("S100b", 2),
        ("Vglut1", 1),
    ],
)
def test_each_kind_of_id(vocabulary: GeneVocabulary, name: str, row: int) -> None:
    mapping = map_gene_ids(["nothing", name], vocabulary, orthologs=NEURON)
    assert mapping.gene_index.tolist() == [-1, row]
    assert mapping.gene_id.tolist() == ["", vocabulary.gene_ids[row]]
    assert mapping.token_id.tolist() == [-1, vocabulary.tokens[row]]


def test_kinds_may_be_mixed(vocabulary: GeneVocabulary) -> None:
    ids = ["ENSG00000131095.7", "Mbp", "GAD1", None, "ENSMUSG00000070570", "Unknown1"]
    mapping = map_gene_ids(ids, vocabulary, orthologs=NEURON)
    assert mapping.gene_index.tolist() == [0, 4, 5, -1, 1, -1]
    assert mapping.species == "human and mouse"
    assert mapping.id_types == {
        "mouse symbols": 2,
        "human Ensembl ids with version": 1,
        "human symbols": 1,
        "missing names": 1,
        "mouse Ensembl ids": 1,
    }


def test_species_settles_what_is_looked_up(vocabulary: GeneVocabulary) -> None:
    ids = ["Gfap", "gfap", "ENSMUSG00000070570"]
    found = {
        species: map_gene_ids(ids, vocabulary, species=species, orthologs=NEURON).gene_index
        for species in ("auto", "human", "mouse")
    }
    assert found["auto"].tolist() == [0, -1, 1]
    assert found["human"].tolist() == [-1, -1, -1]
    assert found["mouse"].tolist() == [0, 0, 1]


def test_fallback_ids(vocabulary: GeneVocabulary) -> None:
    mapping = map_gene_ids(
        ["ENSG00000131095", None, "ENSG00000999999", ""],
        vocabulary,
        fallback_ids=["MBP", "MBP", "Gad1", "x_y"],
    )
    assert mapping.gene_index.tolist() == [0, 4, 5, -1]
    assert mapping.unmatched == ("x_y",)


def test_report(vocabulary: GeneVocabulary) -> None:
    ids = ["GFAP", "A", "B", "MBP", "C", "ENSG00000131095", "D", ""]
    counts = np.array([10, 1, 5, 20, 2, 0, 4, 8.0])
    mapping = replace(map_gene_ids(ids, vocabulary), counts_per_gene=counts)
    assert (mapping.n_vars, mapping.n_matched, mapping.n_genes) == (8, 3, 2)
    assert mapping.counts_share == pytest.approx(30 / 50)
    assert mapping.unmatched == ("B", "D", "C")
    assert mapping.summary() == (
        "3 of 8 genes matched (2 different), 60.0% of the counts; species: human; found "
        "6 human symbols, 1 human Ensembl ids, 1 missing names; not matched, for example: B, D, C"
    )


def test_report_without_counts(vocabulary: GeneVocabulary) -> None:
    mapping = map_gene_ids(["GFAP", "A"], vocabulary)
    assert np.isnan(mapping.counts_share)
    assert "the counts" not in mapping.summary()
    assert np.isnan(replace(mapping, counts_per_gene=np.zeros(2)).counts_share)


@pytest.mark.parametrize(
    ("ids", "species"),
    [
        (["GFAP", "MBP"], "human"),
        (["Gfap", "Mbp", "ENSMUSG00000070570"], "mouse"),
        (["gfap_1", "mbp_1"], "unknown"),
        (["ENSDARG00000025301", "ENSDARG00000025302", "GFAP"], "unknown"),
        ([*["GFAP"] * 10, "Gfap"], "human"),
    ],
)
def test_species_of_a_slice(vocabulary: GeneVocabulary, ids: list[str], species: str) -> None:
    assert map_gene_ids(ids, vocabulary).species == species


def matched(n_matched: int, n_vars: int, vocabulary: GeneVocabulary) -> GeneMapping:
    return map_gene_ids(
        ["GFAP"] * n_matched + [f"Zf{i}" for i in range(n_vars - n_matched)], vocabulary
    )


@pytest.mark.parametrize(("n_matched", "n_vars"), [(1, 1), (4, 7), (10, 33), (10, 500), (41, 2050)])
def test_enough_genes(vocabulary: GeneVocabulary, n_matched: int, n_vars: int) -> None:
    matched(n_matched, n_vars, vocabulary).require_enough()


@pytest.mark.parametrize(("n_matched", "n_vars"), [(0, 1), (3, 7), (9, 33), (10, 501), (40, 2050)])
def test_too_few_genes(vocabulary: GeneVocabulary, n_matched: int, n_vars: int) -> None:
    with pytest.raises(ValueError, match=f"Only {n_matched} of {n_vars} genes are in the vocab"):
        matched(n_matched, n_vars, vocabulary).require_enough()


def test_message_says_what_was_found_and_what_to_do(vocabulary: GeneVocabulary) -> None:
    ids = [f"ENSDARG000000{i:05d}.2" for i in range(29)]
    with pytest.raises(ValueError, match="Only 0 of 29 genes") as caught:
        map_gene_ids(ids, vocabulary).require_enough()
    message = str(caught.value)
    assert "Found 29 Ensembl ids of another species (species: unknown)" in message
    assert "'ENSDARG00000000000.2', 'ENSDARG00000000001.2', 'ENSDARG00000000002.2'" in message
    for advice in ("`gene_key`", "`species`", "`orthologs`"):
        assert advice in message


def test_unusable_arguments(vocabulary: GeneVocabulary) -> None:
    with pytest.raises(ValueError, match="species must be 'auto', 'human' or 'mouse', found 'rat'"):
        map_gene_ids(["GFAP"], vocabulary, species="rat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1 ids, but 2 fallback ids"):
        map_gene_ids(["GFAP"], vocabulary, fallback_ids=["a", "b"])


def test_aliases_of_the_embedded_vocabulary_agree_with_the_ortholog_table(shared: Path) -> None:
    vocabulary = embedded_vocabulary()
    bare = replace(vocabulary, aliases={})
    mouse = [name for name in vocabulary.aliases if name.startswith("ENSMUSG")]
    table = shared / "vocab" / "mouse_human_orthologs.tsv.gz"
    by_table = map_gene_ids(mouse, bare, orthologs=table)
    by_alias = map_gene_ids(mouse, vocabulary)
    in_table = by_table.gene_index >= 0
    assert in_table.mean() > 0.95
    assert np.array_equal(by_table.gene_index[in_table], by_alias.gene_index[in_table])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda k, s: f"GRCh38_{s}", "split('_').str[-1]"),
        (lambda k, s: f"gene:{s}", "split(':').str[-1]"),
        (lambda k, s: s.lower(), "upper()"),
        (lambda k, s: f"{s}_p{k}", "split('_').str[0]"),
        (lambda k, s: f"p{k}|{s}", "split('|').str[-1]"),
        (lambda k, s: f"{'hg38_' if k % 2 else 'mm10_'}{s}", "split('_').str[-1]"),
    ],
)
def test_what_a_pattern_suggests(
    vocabulary: GeneVocabulary, change: Callable[[int, str], str], code: str
) -> None:
    symbols = [symbol for symbol in vocabulary.symbols.tolist() if symbol]
    names = [change(k, symbol) for k, symbol in enumerate(symbols)]
    advice = advice_for_names(["", *names], vocabulary, "adata.var_names")
    assert advice.startswith(f"{len(names)} of {len(names)} names ")
    assert advice.endswith(f"found after adata.var_names = adata.var_names.str.{code}.")
    changed = eval(f"index.str.{code}", {"index": pd.Index(names)})
    assert changed.tolist() == symbols


@pytest.mark.parametrize("name", ["x{}", ""])
def test_no_idea(vocabulary: GeneVocabulary, name: str) -> None:
    names = [name.format(symbol) for symbol in vocabulary.symbols if symbol]
    assert advice_for_names(names, vocabulary, "adata.var_names") == ""
