"""Tools: run and train models on AnnData."""

from stofm.tl._domains import domains
from stofm.tl._embed import embed
from stofm.tl._encode_cells import encode_cells
from stofm.tl._train import train

__all__ = ["domains", "embed", "encode_cells", "train"]
