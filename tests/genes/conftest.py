"""A small vocabulary with everything that a lookup can meet."""

from __future__ import annotations

import numpy as np
import pytest

from stofm.genes import GeneVocabulary


@pytest.fixture
def vocabulary() -> GeneVocabulary:
    """Seven genes in an order of tokens that is not that of ids."""
    return GeneVocabulary(
        gene_ids=np.array(
            [
                "ENSG00000131095",
                "ENSG00000104888",
                "ENSG00000160307",
                "ENSG00000123560",
                "ENSG00000197971",
                "ENSG00000128683",
                "ENSG00000136750",
            ]
        ),
        symbols=np.array(["GFAP", "SLC17A7", "S100B", "PLP1", "MBP", "GAD1", ""]),
        tokens=np.array([5, 3, 8, 2, 7, 4, 6], dtype=np.int32),
        medians=np.array([1.5, 0.1, 2.25, 7.0, 1 / 3, 4.0, 1e-3]),
        special={"pad": 0, "mask": 1, "cls": 9},
        aliases={"ENSMUSG00000020932": "ENSG00000131095", "VGLUT1": "ENSG00000104888"},
    )
