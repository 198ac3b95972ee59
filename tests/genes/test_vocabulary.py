from __future__ import annotations

import gzip
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from stofm.genes import GeneVocabulary, embedded_vocabulary


def test_sizes_and_special_tokens(vocabulary: GeneVocabulary) -> None:
    assert (vocabulary.n_genes, vocabulary.n_tokens) == (7, 10)
    assert (vocabulary.pad, vocabulary.mask, vocabulary.cls) == (0, 1, 9)
    assert vocabulary.rows_by_id["ENSG00000160307"] == 2
    assert vocabulary.rows_by_name == vocabulary.rows_by_id | {
        "GFAP": 0, "SLC17A7": 1, "S100B": 2, "PLP1": 3, "MBP": 4, "GAD1": 5,
        "ENSMUSG00000020932": 0, "VGLUT1": 1,
    }  # fmt: skip
    assert "7 genes, 10 tokens, 2 aliases" in repr(vocabulary)


def test_fingerprint_covers_what_tokens_mean(vocabulary: GeneVocabulary) -> None:
    fingerprint = vocabulary.fingerprint
    assert len(fingerprint) == 16
    same = [
        replace(vocabulary, symbols=vocabulary.symbols[::-1], aliases={}),
        GeneVocabulary(
            **{
                field.name: getattr(vocabulary, field.name)[::-1]
                if isinstance(getattr(vocabulary, field.name), np.ndarray)
                else getattr(vocabulary, field.name)
                for field in fields(vocabulary)
            }
        ),
    ]
    other = [
        replace(vocabulary, gene_ids=np.roll(vocabulary.gene_ids, 1)),
        replace(vocabulary, tokens=np.roll(vocabulary.tokens, 1)),
        replace(vocabulary, medians=np.nextafter(vocabulary.medians, np.inf)),
        replace(vocabulary, special={"pad": 0, "mask": 1, "cls": 10}),
    ]
    assert {item.fingerprint for item in same} == {fingerprint}
    assert len({fingerprint, *(item.fingerprint for item in other)}) == 5


def test_fingerprint_is_the_same_on_every_machine(vocabulary: GeneVocabulary) -> None:
    # It stands in records and checkpoints, so it must not change between versions.
    assert vocabulary.fingerprint == "7cbe8ef9f82cf0ee"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symbols": np.array(["A"])}, "must have one length"),
        ({"special": {"pad": 0, "mask": 1}}, "needs the special tokens pad \\(0\\), mask and cls"),
        ({"special": {"pad": 11, "mask": 1, "cls": 9}}, "needs the special tokens pad \\(0\\)"),
        ({"special": {"pad": 0, "mask": 1, "cls": 8}}, "tokens must be unique"),
        ({"gene_ids": np.repeat("G", 7)}, "gene ids must be unique"),
        ({"tokens": np.arange(-1, 6, dtype=np.int32) * 20}, "must"),
        ({"medians": np.array([1, 1, 0, 1, 1, -2, 1.0])}, "2 are not"),
        ({"medians": np.array([1, np.nan, 1, 1, 1, 1, 1.0])}, "1 are not"),
    ],
)  # fmt: skip
def test_unusable_fields(
    vocabulary: GeneVocabulary, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(vocabulary, **change)


def test_negative_tokens_and_no_genes(vocabulary: GeneVocabulary) -> None:
    with pytest.raises(ValueError, match="tokens must be unique and not negative"):
        replace(vocabulary, tokens=np.array([-5, 3, 8, 2, 7, 4, 6], dtype=np.int32))
    empty = {name: np.array([]) for name in ("gene_ids", "symbols", "tokens", "medians")}
    with pytest.raises(ValueError, match="at least 1"):
        replace(vocabulary, **empty)


def test_table_of_the_reference(shared: Path) -> None:
    vocabulary = GeneVocabulary.from_tsv(shared / "vocab" / "geneformer-30m.tsv.gz")
    assert (vocabulary.n_genes, vocabulary.n_tokens) == (25_424, 25_427)
    assert dict(vocabulary.special) == {"pad": 0, "mask": 1, "cls": 25_426}
    assert vocabulary.medians.min() == pytest.approx(0.0947, abs=1e-4)
    first = vocabulary.rows_by_name["TSPAN6"]
    assert vocabulary.tokens[first] == 2
    assert vocabulary.medians[first] == 2.001186019549122


def test_embedded_vocabulary() -> None:
    vocabulary = embedded_vocabulary()
    assert vocabulary is embedded_vocabulary()
    assert vocabulary.n_tokens == vocabulary.n_genes + 3
    assert vocabulary.cls == vocabulary.n_tokens - 1
    assert sorted(vocabulary.gene_ids) == vocabulary.gene_ids.tolist()
    for symbol, names in {
        "GFAP": ("Gfap", "ENSMUSG00000020932"),
        "SLC17A7": ("Slc17a7", "ENSMUSG00000070570"),
    }.items():
        assert len({vocabulary.rows_by_name[name] for name in (symbol, *names)}) == 1


def test_embedded_names_are_unambiguous() -> None:
    vocabulary = embedded_vocabulary()
    symbols = [symbol for symbol in vocabulary.symbols.tolist() if symbol]
    assert len(symbols) == len(set(symbols))
    assert not set(vocabulary.aliases) & (set(symbols) | set(vocabulary.gene_ids.tolist()))
    assert set(vocabulary.aliases.values()) <= set(vocabulary.gene_ids.tolist())


def test_former_and_present_symbols_lead_to_one_gene() -> None:
    table = Path(__file__).parents[2] / "recipes" / "renamed_symbols.tsv"
    if not table.is_file():
        pytest.skip("no recipes/ beside the tests")
    vocabulary = embedded_vocabulary()
    known = vocabulary.rows_by_name
    rows = [line.split("\t") for line in table.read_text().splitlines()]
    for names in rows:
        assert len({known[name] for name in names if name in known}) <= 1, names
    complete = [names for names in rows if all(name in known for name in names)]
    assert len(complete) > 0.95 * len(rows)


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
        with pytest.raises(ValueError, match="a separator of the table"):
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
        (HEADER + "2\tENSG1\tA\tmuch\t\n", "v.tsv: could not convert string to float: 'much'"),
        (HEADER + "2\tENSG1\tA\t\t\n", "v.tsv: could not convert"),
        (HEADER + "2\tENSG1\tA\n", "v.tsv: could not convert"),
        (HEADER + "2\tENSG1\tA\t1.0\t\n", "needs the special tokens"),
    ],
)  # fmt: skip
def test_unusable_tables(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "v.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        GeneVocabulary.from_tsv(path)
