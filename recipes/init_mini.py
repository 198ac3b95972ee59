"""Write the embedded checkpoint with random weights, until trained ones take its place.

    python recipes/init_mini.py VOCABULARY.tsv OUT_FOLDER

The vocabulary comes from ``recipes/fit_mini_vocabulary.py``. Weights are stored in half precision.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from stofm import GeneVocabulary, Stofm
from stofm.nn import StofmConfig

PROVENANCE = (
    "Random weights from seed 0: this checkpoint is not trained, and its embeddings carry no "
    "learned biology. Vocabulary and medians were fitted on public spatial transcriptomics slices."
)


def main() -> None:
    """Read the command line and write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    vocabulary = GeneVocabulary.from_tsv(options.vocabulary)
    config = replace(StofmConfig.mini(vocabulary.n_tokens), provenance=PROVENANCE)
    Stofm(config, vocabulary, seed=0).save_pretrained(
        options.out, dtype=torch.float16, overwrite=True
    )


if __name__ == "__main__":
    main()
