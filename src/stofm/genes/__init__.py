"""Gene vocabularies, mapping of gene ids, and ranking: numpy and scipy only."""

from stofm.genes.mapping import GeneMapping, map_gene_ids, read_orthologs
from stofm.genes.ranking import RankedTokens, rank_genes
from stofm.genes.vocabulary import GeneVocabulary, embedded_vocabulary

__all__ = [
    "GeneMapping",
    "GeneVocabulary",
    "RankedTokens",
    "embedded_vocabulary",
    "map_gene_ids",
    "rank_genes",
    "read_orthologs",
]
