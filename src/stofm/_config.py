"""Frozen dataclasses from plain tables (JSON, TOML): what does not fit a field is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import operator
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

Config = TypeVar("Config")

_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}


class _MisfitError(Exception):
    """A value is none of a field's type."""


def build_dataclass(cls: type[Config], entries: object, where: str, table: str = "") -> Config:
    """Build a dataclass from its fields by name, as their annotations say.

    Tables become dataclasses and lists tuples where a field is annotated so. Messages name the
    file `where`, and the dotted `table` in it.
    """
    place = f"[{table}] of {where}" if table else where
    if not isinstance(entries, Mapping):
        raise ValueError(f"{place} must be a table, found {_short(entries)}.")
    _check_names(cls, entries, place)
    hints = get_type_hints(cls)
    values = {}
    for name, value in entries.items():
        try:
            values[name] = _fitted(
                value, hints[name], where, f"{table.strip('[]')}.{name}".lstrip(".")
            )
        except _MisfitError:
            dotted = f"{table}.{name}".lstrip(".")
            raise ValueError(
                f"{place}: {name} must be {_described(hints[name], dotted)}, found {_short(value)}."
            ) from None
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


class Checked:
    """Base of dataclasses whose values must follow the rules of their fields (:func:`must`).

    Those of a literal type must be among its values.
    """

    def __post_init__(self) -> None:
        """Check each field."""
        hints = get_type_hints(type(self))
        for one in dataclasses.fields(self):  # type: ignore[arg-type]
            if one.metadata:
                require(self, one.metadata["rule"], one.metadata["fits"], one.name)
            elif get_origin(hints[one.name]) is Literal:
                check_choice(self, one.name, hints[one.name])


def must(rule: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
    """Metadata of a field: a rule in words and whether a value follows it; None stands for no value."""
    return {"rule": f"must {rule}", "fits": fits}


AT_LEAST_ONE = must("be at least 1", lambda value: value >= 1)
POSITIVE = must("be positive and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = must("be at least 0 and finite", lambda value: 0 <= value < math.inf)
BELOW_ONE = must("be at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = must("lie between 0 and 1", lambda value: 0 <= value <= 1)
SEED = must(
    f"be a whole number from 0 to {2**32 - 1}",
    lambda seed: hasattr(seed, "__index__") and 0 <= operator.index(seed) < 2**32,
)


def check_seed(seed: object) -> None:
    """Refuse what is no seed for every generator that is used."""
    if not SEED["fits"](seed):
        raise ValueError(f"seed {SEED['rule']}, found {seed!r}.")


def require(config: Any, rule: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Refuse values of a config that don't follow a rule; None stands for no value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not fits(value):
            raise ValueError(f"{name} {rule}, found {value!r}.")


def require_rules(rules: Mapping[str, bool]) -> None:
    """Refuse arguments by the first message, of those that state rules, whose rule does not hold."""
    for msg, holds in rules.items():
        if not holds:
            raise ValueError(msg)


def check_shares(config: Any, *names: str) -> None:
    """Refuse values of a config that are no shares."""
    rule = "is a share and must lie between 0 and 1"
    require(config, rule, lambda value: 0 <= value <= 1, *names)


def check_choice(config: Any, name: str, kind: Any) -> None:
    """Refuse a value of a config that is not among those of a literal type."""
    check_one_of(name, getattr(config, name), get_args(kind))


def check_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse an argument that is not among some values."""
    if value not in (known := list(allowed)):
        raise ValueError(f"{name} must be one of {known}, found {value!r}.")


def check_sum(config: Any, *names: str) -> None:
    """Refuse shares of a config that are more than the whole together."""
    total = sum(getattr(config, name) for name in names)
    if total > 1 + 1e-9:
        raise ValueError(f"{', '.join(names)} must add up to at most 1, found {total:g}.")


def _check_names(cls: type, entries: Mapping[Any, Any], place: str) -> None:
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)
    known = sorted(field.name for field in fields)
    for name in entries:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"Unknown entry {name!r} in {place}{hint} Known are {known}.")
    nothing = dataclasses.MISSING
    required = [f.name for f in fields if f.default is f.default_factory is nothing]
    if missing := [name for name in required if name not in entries]:
        raise ValueError(f"Missing from {place}: {missing}.")


def _fitted(value: Any, hint: Any, where: str, table: str) -> Any:
    """The value as a field of that type holds it."""
    origin, kinds = get_origin(hint) or hint, get_args(hint)
    if origin in (Union, types.UnionType):
        for kind in kinds if value is not None or types.NoneType not in kinds else ():
            with contextlib.suppress(_MisfitError):
                return _fitted(value, kind, where, table)
        if value is None and types.NoneType in kinds:
            return None
        raise _MisfitError
    if dataclasses.is_dataclass(origin):
        return build_dataclass(origin, value, where, table)  # type: ignore[arg-type]
    if origin in (tuple, list):
        return origin(_fitted_items(value, kinds, where, f"[{table}]"))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise _MisfitError
        kind = kinds[1] if kinds else Any
        return {name: _fitted(one, kind, where, f"{table}.{name}") for name, one in value.items()}
    if not _is_of(value, origin, kinds):
        raise _MisfitError
    return value


def _fitted_items(value: Any, kinds: tuple[Any, ...], where: str, table: str) -> list[Any]:
    """Items of a list, all of one type (``tuple[int, ...]``, ``list[str]``), or of several."""
    if not isinstance(value, list | tuple):
        raise _MisfitError
    if len(kinds) == 1 or kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _MisfitError
    return [_fitted(one, kind, where, table) for one, kind in zip(value, kinds, strict=True)]


def _is_of(value: Any, kind: Any, choices: tuple[Any, ...]) -> bool:
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in choices)
    if kind in (int, float):
        is_number = isinstance(value, int if kind is int else int | float)
        return is_number and not isinstance(value, bool) and abs(value) < math.inf
    return kind is Any or isinstance(value, kind)


def _described(hint: Any, name: str) -> str:
    """Words for the type of a field."""
    kinds = [kind for kind in get_args(hint) if kind not in (..., types.NoneType)]
    origin = get_origin(hint)
    if origin is Literal:
        return f"one of {kinds}"
    if origin in (Union, types.UnionType):
        return " or ".join(_described(kind, name) for kind in kinds)
    if origin in (tuple, list):
        if dataclasses.is_dataclass(kinds[0]):
            return f"a list of tables: write [[{name}]], with two brackets, above each"
        return f"a list of {_WORDS.get(kinds[0], 'a list').split(' ', 1)[1]}s"
    return _WORDS.get(hint, "a table")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds one table; of a damaged one the message names the remedy."""
    try:
        entries = json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path} is damaged: expected a table of names and values; {remedy}.")
    return entries
