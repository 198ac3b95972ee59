from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from stofm.genes.gene_ids import IdType, clean_names, id_type, strip_version


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
