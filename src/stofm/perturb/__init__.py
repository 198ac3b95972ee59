"""Edits of a slice, and what a model makes of them: arrays in, arrays out.

From what a user asks to what is computed: ``reading`` (tables, cells and genes by name, goals),
``perturbing`` (edits and screens, and their test, with ``effect``), ``masking`` and ``influence``
(neighbours masked, and the test of that); ``tissue`` (slices of a table together), ``edit`` and
``engine`` (a slice, and each of its sub-slices, after edits).
"""

from stofm.perturb.edit import Detached, Edit
from stofm.perturb.engine import Embedded, UneditedSlice

__all__ = ["Detached", "Edit", "Embedded", "UneditedSlice"]
