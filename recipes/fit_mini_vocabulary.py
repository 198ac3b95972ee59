"""Fit the vocabulary of the built-in model from a folder of slices.

    python recipes/fit_mini_vocabulary.py SLICES ORTHOLOGS OUT.tsv [--symbols TABLE]

Genes are the human Ensembl ids of the slices, and the human orthologs of their mouse Ensembl
ids, that are seen in at least ten cells. Medians are exact, over the non-zero counts per 10,000.
Symbols, former symbols, mouse ids and mouse symbols come from the slices' own columns and from
the ortholog table, so human and mouse slices are recognised offline. Columns without an id are
told by their symbol, if TABLE (a vocabulary table with symbols) is given; renamed_symbols.tsv
beside this script joins former and present symbols.

Sources of the table in ``src/stofm/weights/stofm-mini``: gene ids and symbols as they stand in
public slices (medians are one number per gene over all slices); pairs of mouse and human ids from
SToFM's release (PharMolix/SToFM, MIT licence, copyright 2025 PharMolix); pairs of human ids and
symbols from Geneformer's name table in that release (Apache-2.0).

Medians come from the slices that recipes/stofm-mini.toml trains on or validates with. All others
give only further names of genes that these have.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scipy import sparse

from stofm._edge.gene_mapping import ids_and_symbols
from stofm._edge.slice_files import open_table
from stofm._logging import logger
from stofm.genes import GeneVocabulary
from stofm.train.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator

RECIPE = Path(__file__).with_name("stofm-mini.toml")
MIN_CELLS = 10
#: Symbols of one gene on each line.
RENAMED = Path(__file__).with_name("renamed_symbols.tsv")


def read_slices(folder: Path) -> Iterator[object]:
    """Yield every slice, those that the recipe leaves out without their counts."""
    data = Recipe.from_toml(RECIPE).data
    used = {file for files in data.find(folder) for file in files}
    for path in sorted(folder.glob("*.h5ad")):
        adata = open_table(path)
        options = data.options_of(path, folder)
        if path not in used:
            ids, symbols = ids_and_symbols(adata)
            yield sparse.csr_matrix((0, len(ids))), ids, symbols
        elif options.exclude:
            left_out = adata.obs[options.library_key].isin(options.exclude)
            yield adata[~left_out.to_numpy()].to_memory()
        else:
            yield path


def with_former_symbols(vocabulary: GeneVocabulary) -> GeneVocabulary:
    """Add the other symbols of genes that have been renamed as aliases."""
    aliases = dict(vocabulary.aliases)
    for line in RENAMED.read_text(encoding="utf-8").splitlines():
        symbols = line.split("\t")
        genes = {
            vocabulary.rows_by_name[name] for name in symbols if name in vocabulary.rows_by_name
        }
        if len(genes) == 1:
            gene = str(vocabulary.gene_ids[genes.pop()])
            new = (name for name in symbols if name not in vocabulary.rows_by_name)
            aliases |= dict.fromkeys(new, gene)
    return replace(vocabulary, aliases=aliases)


def main() -> None:
    """Read the arguments, fit, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slices", type=Path, help="folder of .h5ad files with raw counts")
    parser.add_argument("orthologs", type=Path, help="table of mouse and human Ensembl ids")
    parser.add_argument("out", type=Path, help="table to write")
    parser.add_argument("--symbols", type=Path, help="vocabulary table with further symbols")
    options = parser.parse_args()
    reference = None
    if options.symbols is not None:
        reference = with_former_symbols(GeneVocabulary.from_tsv(options.symbols))
    vocabulary = GeneVocabulary.fit(
        read_slices(options.slices),
        orthologs=options.orthologs,
        reference=reference,
        min_cells=MIN_CELLS,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    vocabulary.save(options.out)
    without = int((vocabulary.symbols == "").sum())
    logger.info("%r, %d genes without a symbol -> %s", vocabulary, without, options.out)


if __name__ == "__main__":
    main()
