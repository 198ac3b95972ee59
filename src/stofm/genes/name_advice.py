"""What to do about names of genes that nothing was found for, as their pattern suggests."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date, timedelta
from typing import TYPE_CHECKING, Final

from stofm.genes.mapping import map_gene_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from stofm.genes.vocabulary import GeneVocabulary

#: Names that are looked at.
_SAMPLE: Final = 2000
#: What stands between parts of a name.
_SEPARATORS: Final = ("_", ":", "|", "-", " ", "/")
#: Parts of names that say that it is no gene, although one is named.
_OTHER: Final = re.compile(r"adt|hto|prot(ein)?|ab|antibody|totalseq\w*", re.IGNORECASE)
#: What a spreadsheet makes of MARCH1, SEPT7 and DEC1, and how it numbers days.
_DATE: Final = re.compile(
    r"\d{1,2}[-/. ](mar|sep|dec)\w*|(mar|sep|dec)\w*[-/. ]\d{1,2}"
    r"|\d{4}-(03|09|12)-\d\d( 00:00:00)?|\d{1,2}/\d{1,2}/\d{2,4}",
    re.IGNORECASE,
)
_FIRST_DAY: Final = date(1899, 12, 30)
_MONTHS: Final = (3, 9, 12)


def advice_for_names(names: Iterable[str], vocabulary: GeneVocabulary, where: str) -> str:
    """Say how to change names so that at least half of them are found; ``""`` for no idea.

    Parameters
    ----------
    names
        Names, of which few are found as they are.
    vocabulary
        Genes to find.
    where
        What holds the names, as code: ``"adata.var_names"``.
    """
    kept = [name for name in names if name][:_SAMPLE]
    best, advice = len(kept) / 2, ""
    for changed, description, code in _changes(kept):
        n_found = map_gene_ids(changed, vocabulary).n_matched
        if n_found > best or (n_found == best > 0 and not advice):
            best = n_found
            advice = (
                f"{n_found} of {len(kept)} names {description} are found, such as {changed[0]!r} "
                f"for {kept[0]!r}: {where} = {where}.str.{code}"
            )
    return advice


def spreadsheet_dates(names: Iterable[str]) -> list[str]:
    """Names that a spreadsheet turned into dates, such as 1-Mar or 43525 for MARCH1.

    Numbers are taken for days only if all of them can be.
    """
    known = list(names)
    numbers = [name for name in known if name.isdecimal()]
    are_days = all(len(name) == 5 and _day(int(name)).month in _MONTHS for name in numbers)
    return [name for name in known if _DATE.fullmatch(name) or (are_days and name.isdecimal())]


def _day(number: int) -> date:
    return _FIRST_DAY + timedelta(days=number)


def _changes(names: Sequence[str]) -> Iterator[tuple[list[str], str, str]]:
    """Changed names, what was done to them, and the method of ``.str`` that does it."""
    if not names:
        return
    yield [name.upper() for name in names], "in capitals", "upper()"
    for separator in _SEPARATORS:
        split = [(name, *name.partition(separator)[::2]) for name in names if separator in name]
        if 2 * len(split) < len(names):
            continue
        yield from _without_prefix(names, separator)
        if not any(
            _OTHER.fullmatch(part) or part.isdigit() for _, *parts in split for part in parts
        ):
            first = [name.split(separator)[0] for name in names]
            last = [name.split(separator)[-1] for name in names]
            yield first, f"up to {separator!r}", f"split({separator!r}).str[0]"
            yield last, f"after the last {separator!r}", f"split({separator!r}).str[-1]"


def _without_prefix(names: Sequence[str], separator: str) -> Iterator[tuple[list[str], str, str]]:
    """Names without the prefix that at least half of them share."""
    pattern = re.compile(rf"[^{re.escape(separator)}]+{re.escape(separator)}+")
    found = (pattern.match(name) for name in names)
    prefix, number = Counter(match[0] if match else "" for match in found).most_common(1)[0]
    if prefix and 2 * number >= len(names) and not _OTHER.fullmatch(prefix.rstrip(separator)):
        changed = [name.removeprefix(prefix) for name in names]
        yield changed, f"without the prefix {prefix!r}", f"removeprefix({prefix!r})"
