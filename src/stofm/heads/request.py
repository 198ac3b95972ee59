"""What a call of ``stofm.tl`` asks of a head: slices to read, and options; checked first."""

from __future__ import annotations

import importlib.util
import operator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from stofm._config import check_choice, check_seed, require
from stofm._edge.places import read_coordinates
from stofm._edge.slices import read_slices
from stofm._edge.tables import resolve_table
from stofm._keys import Obsm
from stofm._messages import naming
from stofm.heads.embeddings import MADE_BY_EMBED, places_entry, slices_column
from stofm.heads.targets import MIN_SHARE, MISSING
from stofm.spatial.splits import SplitRule
from stofm.spatial.spots import SpotRules

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from anndata import AnnData
    from numpy.typing import NDArray

    from stofm._edge.slices import Slices
    from stofm.nn import Stofm

DEFAULT_REP = (Obsm.X_CELL, Obsm.X)

#: ``"frozen"``: the head alone is fitted. Otherwise the model is tuned with it: by changes of low
#: rank (``"lora"``), or all its weights (``"full"``).
Strategy = Literal["frozen", "lora", "full"]
_Read = TypeVar("_Read")


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """How a head is fitted: options of :func:`stofm.tl.annotate`, `deconvolve` and `impute`.

    Attributes
    ----------
    strategy
        ``"frozen"`` fits the head to stored embeddings, in seconds. ``"lora"`` and ``"full"`` first
        tune a copy of the model, which the head then carries; not with a single-cell reference.
    n_neighbors
        Nearest neighbours of the same slice over which ``X_stofm_cell`` (or, if it is not used, all
        of `use_rep`) and the first 50 components are averaged. None: 10 beside embeddings of a
        model where the labelled cells have coordinates and the split is not random, else 0.
    n_components
        Most principal components of log-normalised counts that are used beside the embeddings, of
        the genes that all labelled cells have. None: 150 beside embeddings of a model if there are
        raw counts, else 0. 0 is safer for a query from another technology.
    split
        How a tenth of the cells is held out, to stop early, to weigh the members of the head and to
        score them: ``"slices"``, ``"blocks"`` of the plane with a margin, ``"random"``, or
        ``"auto"``: whole slices where there are four or more, else blocks. Neighbours resemble each
        other, so a random split gives scores that are too good.
    missing
        Labels treated as missing (case-insensitive), besides NaN and empty strings. By default all
        that look like unknown, unassigned, other, missing, ambiguous, doublet or low quality.
    min_share
        Classes with a smaller share of the labelled cells are left out; 0 for none.
    class_weights
        ``"balanced"``: classes weigh the same in the loss, however few cells they have.
    reject_rate
        Largest share of the correctly named held-out cells that may be called unknown, from 0 (none) to
        below 1.
    coverage
        Share of cells whose class is to be in their prediction set, above 0 and below 1.
    reference_layer
        Layer of `reference` with raw counts; None: `layer` if the reference has it, else ``X``.
    spots
        How many spots are simulated from a single-cell reference, and of how many cells.
    """

    strategy: Strategy = "frozen"
    n_neighbors: int | None = None
    n_components: int | None = None
    split: SplitRule = "auto"
    missing: Collection[object] = MISSING
    min_share: float = MIN_SHARE
    class_weights: Literal["balanced"] | None = None
    reject_rate: float = 0.02
    coverage: float = 0.9
    reference_layer: str | None = None
    spots: SpotRules = field(default_factory=SpotRules)

    def __post_init__(self) -> None:
        """Refuse values that no data could go with."""
        for name in ("n_neighbors", "n_components"):
            given = getattr(self, name)
            check_whole_number(name, 0 if given is None else given, least=0)
        check_choice(self, "strategy", Strategy)
        check_choice(self, "split", SplitRule)
        check_choice(self, "class_weights", Literal[None, "balanced"])
        if not isinstance(self.spots, SpotRules):
            raise TypeError(f"spots must be st.spatial.SpotRules(...), found {self.spots!r}.")
        shares = ("min_share", "reject_rate")
        require(self, "must be from 0 to below 1", lambda share: 0 <= share < 1, *shares)
        require(self, "must be above 0 and below 1", lambda share: 0 < share < 1, "coverage")


@dataclass(frozen=True)
class Request:
    """What a call asks for; fields as in :func:`stofm.tl.annotate`."""

    model: Stofm | str | Path | None = None
    use_rep: str | Sequence[str] = DEFAULT_REP
    library_key: str | None = None
    layer: str | None = None
    spatial_key: str = Obsm.SPATIAL
    seed: int = 0
    device: str | torch.device = "auto"
    show_progress_bar: bool = True
    options: HeadOptions = field(default_factory=HeadOptions)

    def __post_init__(self) -> None:
        """Refuse values that no data could go with."""
        check_seed(self.seed)
        if not isinstance(self.options, HeadOptions):
            raise TypeError(
                f"options must be st.tl.HeadOptions(...), found {type(self.options).__name__}."
            )
        if not self.reps or len(set(self.reps)) < len(self.reps):
            raise ValueError(
                f"use_rep must name one or several entries of obsm, each once; found {self.use_rep!r}."
            )

    @property
    def reps(self) -> tuple[str, ...]:
        """Names of the representations."""
        return (self.use_rep,) if isinstance(self.use_rep, str) else tuple(self.use_rep)

    @property
    def record(self) -> dict[str, Any]:
        """What is written down of it with a head."""
        names = ("layer", "library_key", "spatial_key")
        return {
            "n_neighbors": self.options.n_neighbors,
            "n_components": self.options.n_components,
            "seed": int(self.seed),
            **{name: getattr(self, name) for name in names},
        }

    @property
    def reading(self) -> dict[str, Any]:
        """Arguments of :func:`stofm.tl.embed`."""
        names = ("library_key", "layer", "spatial_key", "device", "show_progress_bar")
        return {name: getattr(self, name) for name in names}

    def check(self, slices: SliceTables) -> None:
        """Refuse what does not go together, or with the slices, before cells are embedded."""
        options = self.options
        if options.strategy != "frozen":
            if strange := [rep for rep in self.reps if rep not in MADE_BY_EMBED]:
                raise ValueError(
                    f"strategy={options.strategy!r} tunes a model, and obsm{strange} are not "
                    "embeddings of one; use strategy='frozen', or use_rep from "
                    f"{list(MADE_BY_EMBED)}."
                )
            if options.strategy == "lora" and importlib.util.find_spec("peft") is None:
                raise ImportError(
                    "strategy='lora' needs peft: pip install 'stofm[lora]'. Or use strategy='full'."
                )
        if options.split == "slices" and len(slices.rows) < 2:
            raise ValueError(
                "split='slices' holds out whole slices, and there is a single one; use "
                "split='blocks', or pass library_key= if there are several."
            )
        if options.split == "blocks" or options.strategy != "frozen":
            slices.coordinates(self.spatial_key)


def check_whole_number(name: str, value: Any, *, least: int) -> None:
    """Refuse what is no whole number, or too small."""
    try:
        is_usable = operator.index(value) >= least
    except TypeError:
        is_usable = False
    if not is_usable:
        raise ValueError(f"{name} must be a whole number of at least {least}, found {value!r}.")


@dataclass(frozen=True, eq=False)
class SliceTables:
    """Tables whose cells are taken one after another, and the slices in them."""

    tables: tuple[AnnData, ...]  # the AnnData objects
    #: Of the slices; rows count through all tables.
    names: list[str]
    rows: list[NDArray[np.int64]]
    #: Of each table, what messages start with and how the user writes it.
    called: tuple[tuple[str, str], ...]
    #: Of the tables in the dict that was given; None for a list, or for a single one.
    keys: tuple[str, ...] | None = None
    is_single: bool = False  # whether a single one was given
    layer_argument: str = "layer"  # the user's argument for the layer with counts

    @property
    def n_obs(self) -> int:
        """Number of cells."""
        return sum(table.n_obs for table in self.tables)

    @property
    def places(self) -> list[slice]:
        """Rows of each table."""
        ends = np.cumsum([table.n_obs for table in self.tables]).tolist()
        return [slice(end - t.n_obs, end) for t, end in zip(self.tables, ends, strict=True)]

    def naming(self, number: int) -> AbstractContextManager[None]:
        """Within it, messages speak of one of the tables as the user does."""
        where, written = self.called[number]
        return naming(where, adata=written, layer=self.layer_argument)

    def each(self, read: Callable[[AnnData], _Read]) -> list[_Read]:
        """What a function gives of each table; its messages name that one."""
        found = []
        for k, table in enumerate(self.tables):
            with self.naming(k):
                found.append(read(table))
        return found

    def copied(self) -> SliceTables:
        """The same with copies of the tables."""
        return replace(self, tables=tuple(table.copy() for table in self.tables))

    def as_given(self) -> Any:
        """The tables in the form in which they were given: one, a list or a dict."""
        if self.is_single:
            return self.tables[0]
        tables = list(self.tables)
        return tables if self.keys is None else dict(zip(self.keys, tables, strict=True))

    def tables_of(self, rows: NDArray[np.int64]) -> list[int]:
        """Numbers of the tables that have some of the cells."""
        ends = np.array([place.stop for place in self.places])
        found: list[int] = np.unique(np.searchsorted(ends, rows, side="right")).tolist()
        return found

    def coordinates(self, spatial_key: str) -> NDArray[np.float64]:
        """Places of all cells, (n_obs, 2): as asked for, or those that tables were embedded with."""
        return np.concatenate(
            self.each(lambda table: read_coordinates(table, places_entry(table, spatial_key)))
        )

    def has_coordinates(self, spatial_key: str, numbers: list[int] | None = None) -> bool:
        """Whether all tables, or some, have places."""
        tables = self.tables if numbers is None else [self.tables[k] for k in numbers]
        return all(places_entry(table, spatial_key) in table.obsm for table in tables)


def resolve_slices(
    data: Any,
    library_key: str | None = None,
    spatial_key: str = Obsm.SPATIAL,
    table_key: str | None = None,
    *,
    copy: bool = False,
    role: str = "",
) -> SliceTables:
    """Take an AnnData, a SpatialData, or a list or dict of them, which are different slices.

    `library_key` is by default the column that a table was embedded with; overlapping slices without
    one are told by the coordinates, in `spatial_key`. `copy` says that copies of the tables will be
    made later on, and `role`, ``"query"`` or ``"reference"``, what messages call the data.
    """
    is_single = not isinstance(data, dict | list | tuple)
    given = data if isinstance(data, dict) else dict(enumerate([data] if is_single else data))
    tables = tuple(resolve_table(one, table_key, copy=copy) for one in given.values())
    if not tables or len({id(table) for table in tables}) < len(tables):
        msg = f"Expected different AnnData, found {len(tables)} of which some are the same."
        raise ValueError(msg if tables else "The list of AnnData is empty.")
    is_reference = role == "reference"
    called = [(f"{'reference' if is_reference else 'data'}[{key!r}]",) * 2 for key in given]
    if is_single:
        called = [(f"the {role}" if role else "", role if is_reference else "adata")]
    found = SliceTables(
        tables,
        [],
        [],
        tuple(called),
        keys=tuple(map(str, given)) if isinstance(data, dict) else None,
        is_single=is_single,
        layer_argument="reference_layer" if is_reference else "layer",
    )
    parts = found.each(lambda table: _read_slices(table, library_key, spatial_key))
    for key, place, own in zip(given, found.places, parts, strict=True):
        prefix = "" if is_single else str(key)
        found.names.extend(":".join(filter(None, (prefix, name))) for name in own.names)
        found.rows.extend(rows + place.start for rows in own.rows)
    return found


def resolve_reference(
    query: SliceTables, reference: Any, request: Request, table_key: str | None
) -> tuple[SliceTables, Request, Request]:
    """Slices to learn from, and how to read the query and these.

    A reference may do without the query's column of slices. A layer that one side alone has is read
    there.
    """
    library_key, layer = request.library_key, request.layer
    if library_key is not None:
        plain = reference.values() if isinstance(reference, dict) else reference
        tables = plain if isinstance(plain, list | tuple) else [plain]
        if not any(library_key in getattr(table, "obs", {}) for table in tables):
            library_key = None
    with naming("the reference", adata="reference"):
        key = request.spatial_key
        found = resolve_slices(reference, library_key, key, table_key, role="reference")
    theirs = request.options.reference_layer
    if theirs is None and layer is not None:
        in_query, in_reference = (
            any(layer in t.layers for t in one.tables) for one in (query, found)
        )
        theirs = layer if in_reference else None
        layer = layer if in_query or not in_reference else None
    own = replace(request, layer=theirs, library_key=library_key)
    return found, replace(request, layer=layer), own


def _read_slices(adata: AnnData, library_key: str | None, spatial_key: str) -> Slices:
    if adata.n_obs == 0:
        raise ValueError("An AnnData has no cells; nothing to do. Was it filtered too hard?")
    return read_slices(adata, slices_column(adata, library_key), places_entry(adata, spatial_key))
