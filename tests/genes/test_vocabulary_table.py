from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stofm.genes import GeneVocabulary

HEADER = "token\tgene_id\tsymbol\tmedian\taliases\n"


@pytest.mark.parametrize("name", ["vocabulary.tsv", "vocabulary.tsv.gz"])
def test_round_trip_is_exact(vocabulary: GeneVocabulary, tmp_path: Path, name: str) -> None:
    vocabulary.save(tmp_path / name)
    back = GeneVocabulary.from_tsv(tmp_path / name)
    assert back.fingerprint == vocabulary.fingerprint
    order = np.argsort(vocabulary.tokens)
    assert np.array_equal(back.medians, vocabulary.medians[order])
    assert np.array_equal(back.symbols, vocabulary.symbols[order])
    assert dict(back.special) == dict(vocabulary.special)
    assert dict(back.aliases) == dict(vocabulary.aliases)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_equal_vocabularies_give_equal_files(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    for name in ("a.tsv.gz", "b.tsv.gz"):
        vocabulary.save(tmp_path / name)
    assert (tmp_path / "a.tsv.gz").read_bytes() == (tmp_path / "b.tsv.gz").read_bytes()


def test_layout(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    vocabulary.save(tmp_path / "v.tsv")
    lines = (tmp_path / "v.tsv").read_text().splitlines()
    assert lines[:4] == [
        "token\tgene_id\tsymbol\tmedian\taliases",
        "0\t<pad>\t\t\t",
        "1\t<mask>\t\t\t",
        "2\tENSG00000123560\tPLP1\t7.0\t",
    ]
    assert lines[6] == "5\tENSG00000131095\tGFAP\t1.5\tENSMUSG00000020932"
    assert lines[-1] == "9\t<cls>\t\t\t"


def test_a_failed_save_leaves_the_old_table(vocabulary: GeneVocabulary, tmp_path: Path) -> None:
    path = tmp_path / "v.tsv"
    path.write_text("old")
    for change in ({"symbols": np.repeat("a\tb", 7)}, {"aliases": {"a|b": "ENSG00000131095"}}):
        with pytest.raises(ValueError, match=r"separates the table|empty or holds a tab"):
            replace(vocabulary, **change).save(path)
    assert [item.read_text() for item in tmp_path.iterdir()] == ["old"]


def test_an_interrupted_save_leaves_nothing(
    vocabulary: GeneVocabulary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        vocabulary.save(tmp_path / "v.tsv")
    assert not list(tmp_path.iterdir())


def test_other_layout_gets_cls(tmp_path: Path) -> None:
    path = tmp_path / "table.tsv.gz"
    text = "token_id\tensembl_id\tmedian\tsymbol\n0\t<pad>\t\t\n1\t<mask>\t\t\n2\tENSG1\t0.5\tA\n"
    path.write_bytes(gzip.compress(text.encode()))
    vocabulary = GeneVocabulary.from_tsv(path)
    assert dict(vocabulary.special) == {"pad": 0, "mask": 1, "cls": 3}
    assert vocabulary.symbols.tolist() == ["A"]


def test_further_special_tokens_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "v.tsv"
    special = "".join(
        f"{i}\t<{name}>\t\t\t\n" for i, name in enumerate(("pad", "mask", "cls", "eos"))
    )
    path.write_text(HEADER + special + "4\tENSG1\tA\t0.5\t\n")
    vocabulary = GeneVocabulary.from_tsv(path)
    assert dict(vocabulary.special) == {"pad": 0, "mask": 1, "cls": 2, "eos": 3}
    assert vocabulary.n_tokens == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene\tvalue\nA\t1\n", r"is not a vocabulary table: expected the columns .*'gene', 'value'"),
        (HEADER + "2\tENSG1\tA\tmuch\t\n", "line 2: token or median is not a number"),
        (HEADER + "2\tENSG1\tA\t\t\n", "line 2: the gene ENSG1 has no median"),
        (HEADER + "2\tENSG1\tA\n", "line 2: expected 5 cells, found 3"),
        (HEADER + "2\tENSG1\tA\t1.0\t\n", "needs the special tokens"),
    ],
)  # fmt: skip
def test_unusable_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "v.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        GeneVocabulary.from_tsv(path)
