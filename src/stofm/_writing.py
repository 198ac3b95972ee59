"""Writing into an AnnData: all of it, or nothing."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stofm._anndata import read_record
from stofm._keys import Uns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pandas as pd
    from anndata import AnnData
    from numpy.typing import NDArray


@contextmanager
def all_or_nothing(*tables: AnnData) -> Iterator[None]:
    """Put back what the tables held if what is done within it does not come to its end.

    That is their ``obs``, ``var``, ``obsm`` and ``uns``, also of a backed AnnData: stofm writes
    nothing else. Whatever ends it counts, an interruption too. Arrays are not copied: stofm puts
    new ones in their place and changes none.
    """
    before = [_Slots.of(table) for table in tables]
    try:
        yield
    except BaseException:
        for slots, table in zip(before, tables, strict=True):
            slots.put_back(table)
        raise


def refuse_taken(key_added: str, suggestion: str, *taken: str | None) -> None:
    """Refuse a name that files can't hold, or that is one of these.

    Parameters
    ----------
    key_added
        Name of what is written.
    suggestion
        A name that can be had.
    taken
        Names that are read, or that mean something else.

    Raises
    ------
    ValueError
        `key_added` is no such name, or taken.
    """
    if not key_added.strip(".") or set(key_added) & {"/", "\0"}:
        msg = (
            f"key_added={key_added!r} can't be written to a file: a name has to have letters and no "
            f"'/'. Choose one such as {suggestion!r}."
        )
        raise ValueError(msg)
    if key_added in taken:
        msg = (
            f"key_added={key_added!r} would replace something that is read or that means something "
            f"else; choose another name, such as {suggestion!r}."
        )
        raise ValueError(msg)


def refuse_foreign(
    adata: AnnData, key: str, *, obs: Iterable[str] = (), obsm: Iterable[str] = ()
) -> None:
    """Refuse to replace what stands under names that are made of `key`, if stofm has not written it.

    Raises
    ------
    ValueError
        There is such a thing, `key` has no record, and is none of stofm's own.
    """
    if key.startswith(Uns.STOFM) or read_record(adata, key) is not None:
        return
    found = [f"obs[{name!r}]" for name in obs if name in adata.obs]
    found += [f"obsm[{name!r}]" for name in obsm if name in adata.obsm]
    if found:
        msg = (
            f"key_added={key!r} would replace {' and '.join(found)}, which stofm has not written. "
            "Choose another name, or delete it first."
        )
        raise ValueError(msg)


@dataclass(frozen=True)
class _Slots:
    """What an AnnData holds."""

    obs: pd.DataFrame
    var: pd.DataFrame
    obsm: dict[str, Any]
    uns: dict[str, Any]

    @classmethod
    def of(cls, adata: AnnData) -> _Slots:
        # Entries of a view are bound to it, and it ends with the first thing that is written.
        obsm = adata.obsm.copy() if adata.is_view else adata.obsm
        return cls(
            adata.obs.copy(deep=False), adata.var.copy(deep=False), dict(obsm), dict(adata.uns)
        )

    def put_back(self, adata: AnnData) -> None:
        if adata.is_view:
            return  # nothing was written
        for held, former in ((adata.obsm, self.obsm), (adata.uns, self.uns)):
            for key in set(held) - set(former):
                del held[key]
            for key, value in former.items():
                if key not in held or held[key] is not value:
                    held[key] = value
        adata.obs, adata.var = self.obs, self.var


def refuse_not_finite(task: str, *predicted: NDArray[Any] | None) -> None:
    """Refuse to write predictions that are NaN or infinite.

    Raises
    ------
    FloatingPointError
        Some are.
    """
    for values in predicted:
        if values is not None and (n_bad := int((~np.isfinite(values)).any(axis=1).sum())):
            msg = (
                f"The {task} of {n_bad} of {len(values)} cells is not finite, and nothing is "
                "written: the head's weights are damaged. Fit it again, or load it from where it "
                "was saved."
            )
            raise FloatingPointError(msg)
