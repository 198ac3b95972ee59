from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import pytest

from stofm.genes.name_advice import advice_for_names, spreadsheet_dates

if TYPE_CHECKING:
    from collections.abc import Callable

    from stofm.genes import GeneVocabulary


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda k, s: f"GRCh38_{s}", "removeprefix('GRCh38_')"),
        (lambda k, s: f"mm10___{s}", "removeprefix('mm10___')"),
        (lambda k, s: f"gene:{s}", "removeprefix('gene:')"),
        (lambda k, s: f"gene-{s}", "removeprefix('gene-')"),
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
    assert advice.endswith(f": adata.var_names = adata.var_names.str.{code}")
    changed = eval(f"index.str.{code}", {"index": pd.Index(names)})
    assert changed.tolist() == symbols


@pytest.mark.parametrize("name", ["x{}", "ADT_{}", "{}_TotalSeqB", "{}-1", "prot:{}", ""])
def test_no_idea(vocabulary: GeneVocabulary, name: str) -> None:
    names = [name.format(symbol) for symbol in vocabulary.symbols if symbol]
    assert advice_for_names(names, vocabulary, "adata.var_names") == ""


def test_dates_of_spreadsheets() -> None:
    dates = ["1-Mar", "2-Sep", "SEP-11", "Dec-01", "10-Mar", "2019-09-02 00:00:00", "3/1/2020"]
    assert spreadsheet_dates([*dates, "MARCHF1", "Sept7", "DEC1", "HLA-A", "1-Foo"]) == dates


def test_days_that_a_spreadsheet_counts() -> None:
    assert spreadsheet_dates(["43891", "MARCHF1", "44075"]) == ["43891", "44075"]
    # Ids of genes are numbers too.
    assert spreadsheet_dates(["43891", "7157"]) == spreadsheet_dates(["43891", "43840"]) == []
