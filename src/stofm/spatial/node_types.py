"""What a node of a sub-slice is."""

from __future__ import annotations

from enum import IntEnum


class NodeType(IntEnum):
    """Kinds of nodes; the published weights fix the numbers."""

    CELL = 0
    SLICE = 1
    VIRTUAL = 2
    PADDING = 3
