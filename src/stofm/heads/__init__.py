"""Heads: what is learnt on the embeddings of cells, for the tasks of ``stofm.tl`` (torch)."""
