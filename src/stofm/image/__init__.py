"""Tissue images: read in pieces, cut into patches, encoded; arrays and torch, no AnnData."""
