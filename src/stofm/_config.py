"""Frozen dataclasses from plain tables (JSON, TOML), with unknown entries refused."""

from __future__ import annotations

import dataclasses
import difflib
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Mapping

Config = TypeVar("Config")


def build_dataclass(cls: type[Config], entries: Mapping[str, Any], where: str) -> Config:
    """Build a dataclass from its fields by name.

    Parameters
    ----------
    cls
        The dataclass.
    entries
        Values by name of field; fields with a default may be left out.
    where
        What the entries are called in messages, for example ``"[optimizer] of recipe.toml"``.

    Raises
    ------
    ValueError
        An entry is not among the fields, or a field without a default is missing.
    """
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = {f.name: f for f in fields}
    for name in entries:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            msg = f"Unknown entry {name!r} in {where}{hint} Known are {sorted(known)}."
            raise ValueError(msg)
    required = [
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in entries]:
        msg = f"Missing from {where}: {missing}."
        raise ValueError(msg)
    return cls(**entries)
