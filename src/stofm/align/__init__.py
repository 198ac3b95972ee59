"""Alignment of tissue images and expression, of spots and their niches."""
