"""Edits of a slice, and what a model makes of them: arrays in, arrays out.

From what a user asks to what is computed: ``reading`` (tables, cells and genes by name), ``goal``,
``perturbing`` and ``screening`` (edits and their test, with ``null`` and ``effect``), ``masking``,
``influence`` and ``ligand_receptor`` (neighbours masked, and the test of that); ``tissue`` (slices of a
table together), ``edit``, ``engine`` and ``runs`` (a slice, and each of its sub-slices, after edits).
"""

from stofm.perturb.edit import Detached, Edit
from stofm.perturb.engine import Embedded, UneditedSlice

__all__ = ["Detached", "Edit", "Embedded", "UneditedSlice"]
