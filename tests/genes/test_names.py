from __future__ import annotations

from stofm.genes.names import GeneNames


def test_most_slices_decide_the_symbol() -> None:
    names = GeneNames()
    names.add(["ENSG1", "ENSG2", ""], ["ENSG1", "ENSG2", ""], ["OLD", "B", "C"])
    for _ in range(2):
        names.add(["ENSG1", "ENSG2"], ["ENSG1.4", "ENSG2"], ["NEW", "B"])
    symbols = names.symbols(["ENSG1", "ENSG2"])
    assert symbols == {"ENSG1": "NEW", "ENSG2": "B"}
    assert names.aliases(symbols, ["ENSG1", "ENSG2"])["OLD"] == "ENSG1"


def test_mouse_names_are_aliases_only() -> None:
    names = GeneNames()
    names.add(["ENSG1"], ["ENSMUSG00000020932.2"], ["Gfap"])
    assert names.symbols(["ENSG1"]) == {}
    assert names.aliases({}, ["ENSG1"]) == {"ENSMUSG00000020932": "ENSG1", "Gfap": "ENSG1"}


def test_a_symbol_is_given_once_and_is_no_alias() -> None:
    names = GeneNames()
    names.add(["ENSG1", "ENSG2"], ["A", "A"])
    names.add(["ENSG2"], ["B"])
    symbols = names.symbols(["ENSG1", "ENSG2"])
    assert symbols == {"ENSG1": "A", "ENSG2": "B"}
    assert names.aliases(symbols, ["ENSG1", "ENSG2"]) == {}


def test_aliases_of_several_genes() -> None:
    names = GeneNames()
    names.add_aliases({"Tied": "ENSG1", "Won": "ENSG1", "Gone": "ENSG9"})
    names.add_aliases({"Tied": "ENSG2", "Won": "ENSG2", "ENSG2": "ENSG2"})
    names.add_aliases({"Won": "ENSG2"})
    assert names.aliases({}, ["ENSG1", "ENSG2"]) == {"Won": "ENSG2"}
