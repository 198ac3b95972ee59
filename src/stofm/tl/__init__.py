"""Tools: run models on AnnData."""

from stofm.tl._embed import embed
from stofm.tl._encode_cells import encode_cells

__all__ = ["embed", "encode_cells"]
