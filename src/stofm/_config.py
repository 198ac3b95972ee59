"""Frozen dataclasses from plain tables (JSON, TOML): what does not fit a field is refused."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import types
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Config = TypeVar("Config")

_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}


class _MisfitError(Exception):
    """A value is none of a field's type."""


def build_dataclass(
    cls: type[Config], entries: object, where: str, table: str = "", *, is_listed: bool = False
) -> Config:
    """Build a dataclass from its fields by name, as their annotations say.

    Tables become dataclasses and lists tuples where a field is annotated so. Messages name the
    file `where`, and the dotted `table` in it, which `is_listed` if it is one of several.
    """
    brackets = f"[[{table}]]" if is_listed else f"[{table}]"
    place = f"{brackets} of {where}" if table else where
    if not isinstance(entries, Mapping):
        msg = f"{place} must be a table, found {_short(entries)}."
        raise ValueError(msg)
    fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(cls)  # type: ignore[arg-type]
    _check_names(entries, fields, place)
    hints = get_type_hints(cls)
    values = {}
    for name, value in entries.items():
        try:
            values[name] = _fitted(value, hints[name], where, f"{table}.{name}".lstrip("."))
        except _MisfitError:
            msg = f"{place}: {name} must be {_described(hints[name])}, found {_short(value)}."
            raise ValueError(msg) from None
    try:
        return cls(**values)
    except ValueError as error:
        msg = f"{place}: {error}"
        raise ValueError(msg) from error


def check_seed(seed: object) -> None:
    """Refuse what is no seed for every generator that is used."""
    if not (hasattr(seed, "__index__") and 0 <= operator.index(seed) < 2**32):
        msg = f"seed must be a whole number from 0 to {2**32 - 1}, found {seed!r}."
        raise ValueError(msg)


def require(config: Any, rule: str, fits: Callable[[Any], bool], *names: str) -> None:
    """Refuse values of a config that don't follow a rule; None stands for no value."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not fits(value):
            msg = f"{name} {rule}, found {value!r}."
            raise ValueError(msg)


def check_shares(config: Any, *names: str) -> None:
    """Refuse values of a config that are no shares."""
    rule = "is a share and must lie between 0 and 1"
    require(config, rule, lambda value: 0 <= value <= 1, *names)


def check_choice(config: Any, name: str, kind: Any) -> None:
    """Refuse a value of a config that is not among those of a literal type."""
    value, allowed = getattr(config, name), get_args(kind)
    if value not in allowed:
        msg = f"{name} must be one of {list(allowed)}, found {value!r}."
        raise ValueError(msg)


def check_sum(config: Any, *names: str) -> None:
    """Refuse shares of a config that are more than the whole together."""
    total = sum(getattr(config, name) for name in names)
    if total > 1 + 1e-9:
        msg = f"{', '.join(names)} must add up to at most 1, found {total:g}."
        raise ValueError(msg)


def _check_names(
    entries: Mapping[Any, Any], fields: tuple[dataclasses.Field[Any], ...], place: str
) -> None:
    known = [f.name for f in fields]
    for name in entries:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            msg = f"Unknown entry {name!r} in {place}{hint} Known are {sorted(known)}."
            raise ValueError(msg)
    required = [
        f.name
        for f in fields
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in entries]:
        msg = f"Missing from {place}: {missing}."
        raise ValueError(msg)


def _fitted(value: Any, hint: Any, where: str, table: str) -> Any:
    """The value as a field of that type holds it."""
    kinds = get_args(hint)
    match get_origin(hint) or hint:
        case origin if origin is Union or origin is types.UnionType:
            return _first_fitting(value, kinds, where, table)
        case origin if origin is Literal:
            fits = any(value == one and type(value) is type(one) for one in kinds)
        case origin if origin is tuple or origin is list:
            return origin(_fitted_items(value, kinds, where, table))
        case origin if isinstance(origin, type) and issubclass(origin, Mapping):
            return _fitted_mapping(value, kinds, where, table)
        case kind if dataclasses.is_dataclass(kind):
            return build_dataclass(kind, value, where, table)  # type: ignore[arg-type]
        case kind if kind is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool)
            fits = fits and abs(value) < math.inf
        case kind if kind is int:
            fits = isinstance(value, int) and not isinstance(value, bool)
        case kind:
            fits = kind is Any or isinstance(value, kind)
    if not fits:
        raise _MisfitError
    return value


def _first_fitting(value: Any, kinds: tuple[Any, ...], where: str, table: str) -> Any:
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        try:
            return _fitted(value, kind, where, table)
        except _MisfitError:
            continue
    raise _MisfitError


def _fitted_items(value: Any, kinds: tuple[Any, ...], where: str, table: str) -> list[Any]:
    """Items of a list, all of one type: ``tuple[int, ...]``, ``list[str]``; or of several."""
    is_list = isinstance(value, list | tuple)
    if dataclasses.is_dataclass(kinds[0]):
        if is_list and all(isinstance(one, Mapping) for one in value):
            return [build_dataclass(kinds[0], one, where, table, is_listed=True) for one in value]  # type: ignore[arg-type]
        msg = (
            f"{table} of {where} must be a list of tables: write [[{table}]], with two brackets, "
            f"above each; found {_short(value)}."
        )
        raise ValueError(msg)
    if not is_list:
        raise _MisfitError
    if len(kinds) == 1 or kinds[-1] is ...:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise _MisfitError
    return [_fitted(one, kind, where, table) for one, kind in zip(value, kinds, strict=True)]


def _fitted_mapping(value: Any, kinds: tuple[Any, ...], where: str, table: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise _MisfitError
    kind = kinds[1] if kinds else Any
    return {name: _fitted(one, kind, where, f"{table}.{name}") for name, one in value.items()}


def _described(hint: Any) -> str:
    """Words for the type of a field."""
    origin, kinds = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in kinds if one is not types.NoneType)
    if origin is Literal:
        return f"one of {list(kinds)}"
    if origin in (tuple, list):
        return f"a list of {'s and '.join(_plural(one) for one in kinds if one is not ...)}"
    return _WORDS.get(hint, "a table")


def _plural(hint: Any) -> str:
    return _described(hint).removeprefix("an ").removeprefix("a ") + "s"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON file that holds one table; of a damaged one the message names the remedy."""
    try:
        entries = json.loads(path.read_bytes().decode("utf-8"), object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        msg = f"{path} is damaged ({error}); {remedy}."
        raise ValueError(msg) from error
    if not isinstance(entries, dict):
        msg = f"{path} is damaged: expected a table of names and values, found {_short(entries)}; {remedy}."
        raise ValueError(msg)
    return entries


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        msg = f"the entry {next(n for n in names if names.count(n) > 1)!r} occurs twice"
        raise ValueError(msg)
    return entries
