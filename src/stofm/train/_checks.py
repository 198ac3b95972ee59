"""Checks that several configs of training share."""

from __future__ import annotations

from typing import Any


def check_shares(config: Any, *names: str) -> None:
    """Refuse values of a config that are no shares."""
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            msg = f"{name} is a share and must lie between 0 and 1, found {getattr(config, name)}."
            raise ValueError(msg)


def check_sum(config: Any, *names: str) -> None:
    """Refuse shares of a config that are more than the whole together."""
    total = sum(getattr(config, name) for name in names)
    if total > 1 + 1e-9:
        msg = f"{', '.join(names)} must add up to at most 1, found {total:g}."
        raise ValueError(msg)


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        msg = f"{name} must be one of {list(allowed)}, found {value!r}."
        raise ValueError(msg)
