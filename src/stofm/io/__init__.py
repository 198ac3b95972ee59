"""What an instrument wrote, as AnnData."""

from stofm.io.reading import read

__all__ = ["read"]
