"""Edits of a slice, and what a model makes of them: arrays in, arrays out."""

from stofm.perturb.edit import Detached, Edit
from stofm.perturb.engine import UneditedSlice
from stofm.perturb.runs import Embedded

__all__ = ["Detached", "Edit", "Embedded", "UneditedSlice"]
