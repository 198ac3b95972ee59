"""What proportions are learnt from: the ways to call :func:`stofm.tl.deconvolve`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from stofm._edge.records import all_or_nothing
from stofm._keys import Obsm
from stofm._messages import naming
from stofm.heads.fitting import fit
from stofm.heads.labels import read_labels
from stofm.heads.sections import resolve_slices
from stofm.heads.spot_reference import SpotSimulation, fit_simulated, read_panels
from stofm.heads.spot_tables import SLICE, grid_into_spots, read_proportions
from stofm.heads.spots import ProportionsTask, refuse_keys, write_proportions
from stofm.nn import choose_device
from stofm.nn.model import load_model

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from stofm.heads.labels import Labels
    from stofm.heads.options import FitOptions
    from stofm.heads.sections import Sections
    from stofm.heads.spots import DeconvolutionHead
    from stofm.spatial.spots import SpotRules

#: Components that are read of spots simulated from a reference.
_N_COMPONENTS: Final = 50


class LabelOptions(NamedTuple):
    """Which column of ``obs`` has types, and which of its labels count."""

    key: str | None
    missing: Collection[object]
    min_share: float

    def read(self, sections: Sections) -> Labels:
        """Types of the cells of some tables."""
        return read_labels(sections, str(self.key), missing=self.missing, min_share=self.min_share)

    @property
    def record(self) -> dict[str, Any]:
        """What is written down of it."""
        missing = [str(one) for one in self.missing or ()]
        return {"label_key": self.key, "missing": missing, "min_share": self.min_share}


class ReferenceCells(NamedTuple):
    """Single cells to learn from, as they are given."""

    data: Any
    layer: str | None
    labels: LabelOptions


def chosen_way(**ways: Any) -> str:
    """The one way to learn, or to use a head, that is asked for."""
    given = [name for name, value in ways.items() if value is not None]
    if len(given) == 1:
        return given[0]
    msg = (
        "Pass one of proportions_key= (spots with known proportions), reference= (single cells), "
        "spot_size= (slices of single cells to sum into spots), or head= (a fitted head); found "
        f"{given or 'none'}."
    )
    raise ValueError(msg)


def check_way(way: str, options: FitOptions, labels: LabelOptions, *, copy: bool) -> None:
    """Refuse options that do not go together."""
    if way in ("reference", "spot_size") and labels.key is None:
        msg = f"{way}= needs label_key=, the column of obs with the types of the cells."
        raise ValueError(msg)
    if way != "reference":
        return
    if options.strategy != "frozen":
        msg = (
            f"strategy={options.strategy!r} does not go with reference=: a model is tuned on slices, and "
            "simulated spots have no place in one. Use strategy='frozen', or spot_size= with a "
            "slice of single cells."
        )
        raise ValueError(msg)
    if copy:
        msg = (
            "copy=True does not go with reference=, which returns the head. Pass data.copy(), or "
            "use the returned head: st.tl.deconvolve(data, head=head, copy=True)."
        )
        raise ValueError(msg)


def learn_proportions(
    sections: Sections, key: str | Sequence[str], options: FitOptions, *, copy: bool
) -> DeconvolutionHead:
    """Fit a head to spots whose proportions are known."""
    options.check(sections)
    known = read_proportions(sections, key)
    source = {"proportions_key": key if isinstance(key, str) else list(key)}
    head: DeconvolutionHead = fit(
        ProportionsTask.of(known, options, source), sections.copied() if copy else sections
    )
    return head


def learn_squares(
    sections: Sections, spot_size: float, labels: LabelOptions, options: FitOptions
) -> DeconvolutionHead:
    """Fit a head to squares that single cells are summed into."""
    options.check(sections)
    reading = options.reading
    squares = grid_into_spots(
        sections,
        labels.read(sections),
        spot_size=spot_size,
        layer=reading.layer,
        spatial_key=reading.spatial_key,
    )
    own = replace(reading, library_key=SLICE, layer=None, spatial_key=Obsm.SPATIAL)
    source = {**labels.record, "spot_size": spot_size}
    task = ProportionsTask.of(squares, replace(options, reading=own), source)
    head: DeconvolutionHead = fit(task, squares.sections)
    return head


def learn_reference(
    sections: Sections,
    reference: ReferenceCells,
    rules: SpotRules,
    options: FitOptions,
    key: str,
) -> DeconvolutionHead:
    """Fit a head to spots simulated from single cells, and write the proportions that it finds."""
    options.check(None)
    reading, labels = options.reading, reference.labels
    refuse_keys(sections, key, reading)
    # A reference's slices do not matter, nor whether they overlap.
    _require_single_tables(reference.data)
    with naming("the reference", adata="reference"):
        cells = resolve_slices(reference.data, spatial_key="", role="reference")
        types = labels.read(cells)
    model = load_model(options.model)
    panels = read_panels(
        sections, cells, types, model, layer=reading.layer, reference_layer=reference.layer
    )
    n_components = _N_COMPONENTS if options.n_components is None else options.n_components
    reading = replace(reading, device=choose_device(reading.device))
    simulation = SpotSimulation(
        model=model, rules=rules, n_components=n_components, reading=reading
    )
    head, features = fit_simulated(panels, simulation, options, labels.record)
    with all_or_nothing(*sections.tables):
        write_proportions(sections, head, head.predict(head.inputs_of(features)), key)
    return head


def _require_single_tables(reference: Any) -> None:
    """Refuse SpatialData with several tables: `table_key` names one of the query."""
    plain = list(reference.values()) if isinstance(reference, dict) else reference
    for one in plain if isinstance(plain, list | tuple) else [plain]:
        names = sorted(getattr(one, "tables", ()))
        if len(names) > 1:
            msg = (
                f"The reference is a SpatialData with the tables {names}; pass the one with the "
                f"single cells: reference=sdata.tables[{names[0]!r}]."
            )
            raise KeyError(msg)
