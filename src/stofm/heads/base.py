"""What the heads of all tasks share: what they hold, and how they are saved and loaded."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from stofm import __version__
from stofm._config import build_dataclass
from stofm._edge.records import refuse_taken
from stofm._files import local, take_back
from stofm._keys import Obs, Obsm, Uns
from stofm.heads.components import ComponentsEntries, ExpressionComponents, read_expression
from stofm.heads.head_files import (
    HISTORY,
    MODEL,
    VALIDATION,
    WEIGHTS,
    beside_weights,
    kind_of,
    plain,
    read_config,
    read_network,
    read_table,
)
from stofm.heads.inputs import (
    Source,
    add_neighborhood,
)
from stofm.heads.network import apply_head
from stofm.heads.options import Strategy  # noqa: TC001 - read when a head is loaded
from stofm.nn import Stofm
from stofm.nn.checkpoint import CONFIG, read_tensors, require_beside, write_atomically
from stofm.nn.checkpoint import write_tensors as write_weights
from stofm.nn.prediction_head import HeadConfig  # noqa: TC001 - read when a head is loaded

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import pandas as pd
    import torch
    from numpy.typing import NDArray

    from stofm.heads.embeddings import Origin
    from stofm.heads.inputs import Inputs
    from stofm.heads.options import Reading
    from stofm.heads.sections import Sections
    from stofm.heads.targets import TargetKind
    from stofm.nn import PredictionHead


@dataclass(frozen=True, kw_only=True)
class Entries:
    """What config.json holds of the networks of a head and of its task; see :class:`Head`."""

    reads: tuple[Source, ...]
    weights: tuple[float, ...]
    n_neighbors: int
    expression: ComponentsEntries | None = None


@dataclass(frozen=True, kw_only=True)
class _Config:
    """config.json of a head."""

    task: str
    stofm_version: str
    outputs: tuple[str, ...]
    use_rep: tuple[str, ...]
    origin: dict[str, dict[str, str]]
    strategy: Strategy
    params: dict[str, Any]
    split: dict[str, Any]
    networks: tuple[HeadConfig, ...]
    own: dict[str, Any]


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """A fitted head with all that its predictions depend on.

    Attributes
    ----------
    networks
        One network, or several whose weighted mean is the prediction.
    outputs
        Names of what is predicted: classes, cell types or genes.
    use_rep
        Entries of ``obsm`` that are read, side by side.
    origin
        For each of them, name and fingerprints of the model that made it.
    strategy
        ``"frozen"``, ``"lora"`` or ``"full"``.
    params
        What the head was fitted with.
    split
        How cells were held out, and how many.
    validation_scores
        Scores on the held-out cells.
    history
        Losses while the head was fitted.
    reads
        What each network reads: ``"embedding"``, as the first one does, or ``"expression"``;
        ``"neighborhood"`` and ``"expression neighborhood"`` are these with means over the
        neighbours beside them. Empty if all read embeddings.
    weights
        Weight of each network in the mean; empty for equal ones.
    expression
        Genes and components for the networks that read expression; None if there are none.
    n_neighbors
        Over how many neighbours means are, for the networks that read them; 0 if there are none.
    model
        The tuned model; None for a frozen one.
    """

    #: Name of the task in files and messages, and what the outputs are called together.
    task: ClassVar[str]
    called: ClassVar[str]
    #: What a task adds to config.json, the params that its records name, and arrays with NaN.
    own_entries: ClassVar[type[Entries]] = Entries
    params_read: ClassVar[tuple[str, ...]] = ()
    may_be_nan: ClassVar[frozenset[str]] = frozenset()

    networks: tuple[PredictionHead, ...]
    outputs: tuple[str, ...]
    use_rep: tuple[str, ...]
    origin: Origin
    strategy: str
    params: dict[str, Any]
    split: dict[str, Any]
    validation_scores: pd.DataFrame
    history: pd.DataFrame
    reads: tuple[Source, ...] = ()
    weights: tuple[float, ...] = ()
    expression: ExpressionComponents | None = None
    n_neighbors: int = 0
    model: Stofm | None = None

    def __repr__(self) -> str:
        """A line with task, outputs, inputs and strategy."""
        return (
            f"{type(self).__name__}({len(self.outputs)} {self.called}, "
            f"use_rep={list(self.use_rep)}, strategy={self.strategy!r})"
        )

    @property
    def sources(self) -> tuple[Source, ...]:
        """What each network reads."""
        embedding: Source = "embedding"
        return self.reads or (embedding,) * len(self.networks)

    def with_components(self, expression: ExpressionComponents | None) -> Self:
        """The same with components of expression, if a network reads them."""
        is_read = any("expression" in source for source in self.reads)
        return replace(self, expression=expression if is_read else None)

    def check_inputs(self, inputs: Inputs) -> None:
        """Refuse representations of another width than those that the head was fitted to."""
        expected = self.networks[0].config.d_input
        if inputs.features.shape[1] != expected:
            msg = (
                f"The head reads {expected} columns from obsm{list(self.use_rep)}, found "
                f"{inputs.features.shape[1]} ({list(inputs.widths)}). Make them as for fitting."
            )
            raise ValueError(msg)

    def model_names(self) -> dict[str, str]:
        """Name and fingerprints of the model, for records; none if it is not recorded."""
        return {name: value for rep in self.use_rep for name, value in self.origin[rep].items()}

    def read_beside(self, sections: Sections, inputs: Inputs, reading: Reading) -> Inputs:
        """Add what networks read beside embeddings; NaN in tables that lack places, genes or counts."""
        if self.expression is not None:
            inputs = read_expression(self.expression, sections, inputs, reading.layer)
        return add_neighborhood(sections, inputs, self.n_neighbors, spatial_key=reading.spatial_key)

    def votes(
        self, inputs: Inputs, kind: TargetKind
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
        """Yield the probabilities of each network, (n, n_outputs), and its weight for each cell, (n,).

        Networks that read what a cell lacks have no weight for it; those of a cell sum to 1.
        """
        weights = self.weights or (1.0,) * len(self.networks)
        known = {source: inputs.knows(source) for source in set(self.sources)}
        shares = [
            weight * known[source] for source, weight in zip(self.sources, weights, strict=True)
        ]
        total = np.sum(shares, axis=0)
        source, features = None, inputs.features
        for network, reads, share in zip(self.networks, self.sources, shares, strict=True):
            if not share.any():
                continue
            # Networks of a kind follow one another, and what they read may be large.
            if reads != source:
                source, read = reads, inputs.of(reads)
                assert read is not None
                # Embeddings are never lacking, and a copy of all of them would be large.
                features = read if share.all() else np.nan_to_num(read)
            yield apply_head(network, features, kind), share / total

    def save(self, folder: str | Path, *, overwrite: bool = False) -> None:
        """Write the head to a folder; a crash leaves nothing half-written.

        Parameters
        ----------
        folder
            Gets ``config.json`` with the names of the outputs, ``head.safetensors``, scores and
            history as tables, and a tuned model's checkpoint in ``model/``.
        overwrite
            Replace a head that is already there.

        Raises
        ------
        FileExistsError
            `folder` is there and `overwrite` is false, or it holds something else than a head of
            this task, or other files beside it.
        OSError
            The disk is full, or can't be written to.
        """
        write_atomically(Path(folder), self._write, overwrite=overwrite, kind=kind_of(self.task))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read a head from a folder.

        Parameters
        ----------
        folder
            Written by :meth:`save`.

        Raises
        ------
        FileNotFoundError
            `folder` is not there, or lacks a file.
        ValueError
            It holds a head of another task, or is damaged.
        """
        where = local(folder)
        take_back(where)
        config = read_config(where, cls.task)
        try:
            return cls._read(where, config)
        except (OSError, MemoryError):
            raise
        # A missing entry, one of another type, tables, tensors that do not fit.
        except Exception as error:
            if str(where) in str(error):
                raise
            msg = f"{where} is damaged ({type(error).__name__}: {error}); save the head again."
            raise ValueError(msg) from error

    @classmethod
    def _read(cls, where: Path, config: Mapping[str, Any]) -> Self:
        entries = build_dataclass(_Config, config, CONFIG)
        own = build_dataclass(cls.own_entries, entries.own, CONFIG, "own")
        tensors = read_tensors(where / WEIGHTS, may_be_nan=cls.may_be_nan)
        model = where / MODEL
        same = ("outputs", "use_rep", "origin", "strategy", "params", "split")
        head = cls(
            **{name: getattr(entries, name) for name in same},
            networks=tuple(
                read_network(sizes, tensors, k) for k, sizes in enumerate(entries.networks)
            ),
            validation_scores=read_table(where / VALIDATION),
            history=read_table(where / HISTORY).reset_index(),
            model=Stofm.from_pretrained(model) if model.is_dir() else None,
            **cls._read_own(own, {name: value.numpy() for name, value in tensors.items()}),
        )
        head.check()
        if others := sorted(set(tensors) - set(head._tensors())):
            msg = f"{WEIGHTS} holds {others[:3]}, which {CONFIG} does not name"
            raise ValueError(msg)
        require_beside(where / WEIGHTS, beside_weights(where, config))
        return head

    def check(self) -> None:
        """Refuse parts that do not belong together."""
        for problem in self._problems():
            raise ValueError(problem)

    def _problems(self) -> Iterator[str]:
        """What does not belong together; a task adds its own."""
        called = self.called
        sizes = [network.config.d_output for network in self.networks]
        if not sizes or set(sizes) != {len(self.outputs)}:
            yield f"{len(self.outputs)} {called}, and networks with {sizes} outputs"
        if any(not (network.input_scale > 0).all() for network in self.networks):
            yield "input_scale of a network must be positive"
        if len(set(self.outputs)) < len(self.outputs):
            yield f"{called} occur twice among {list(self.outputs[:5])}"
        if missing := [rep for rep in self.use_rep if rep not in self.origin]:
            yield f"origin lacks {missing}"
        if missing := [name for name in self.params_read if name not in self.params]:
            yield f"params lacks {missing}"
        if self.strategy != "frozen" and self.model is None:
            yield f"strategy {self.strategy!r}, and no {MODEL}/ with the tuned model"
        yield from self._problems_of_reading()

    def _problems_of_reading(self) -> Iterator[str]:
        """What networks read and there is not, or the other way round."""
        read = sorted(set(self.sources))
        counts = (len(self.reads), len(self.weights))
        if not set(counts) <= {0, len(self.networks)}:
            yield f"{len(self.networks)} networks, and reads and weights for {counts}"
        if self.weights and not (min(self.weights) >= 0 and abs(sum(self.weights) - 1) < 1e-6):
            yield f"weights must be shares of a whole and sum to 1, found {list(self.weights)}"
        needs = " ".join(self.sources)
        if ("expression" in needs) != (self.expression is not None):
            there = "given" if self.expression else "missing"
            yield f"networks read {read}, and expression is {there}"
        if ("neighborhood" in needs) != (self.n_neighbors > 0):
            yield f"networks read {read}, and n_neighbors is {self.n_neighbors}"
        widths = {(s, n.config.d_input) for s, n in zip(self.sources, self.networks, strict=True)}
        if len(widths) > len(read):
            yield f"networks that read the same have several widths: {sorted(widths)}"

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Entries of config.json beside those that all heads have, and arrays."""
        entries: dict[str, Any] = {
            "reads": list(self.reads),
            "weights": list(self.weights),
            "n_neighbors": self.n_neighbors,
        }
        if self.expression is None:
            return entries, {}
        expression, arrays = self.expression.to_entries()
        return {**entries, "expression": expression}, arrays

    @classmethod
    def _read_own(cls, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Fields from what :meth:`_own` returned."""
        components = entries.expression
        return {
            "reads": entries.reads,
            "weights": entries.weights,
            "n_neighbors": entries.n_neighbors,
            "expression": components and ExpressionComponents.from_entries(components, arrays),
        }

    def _tensors(self) -> dict[str, torch.Tensor]:
        import torch

        found = {name: torch.tensor(value) for name, value in self._own()[1].items()}
        for k, network in enumerate(self.networks):
            found |= {f"{k}.{name}": value for name, value in network.state_dict().items()}
        return found

    def _write(self, folder: Path) -> None:
        config = {
            "task": self.task,
            "stofm_version": __version__,
            "outputs": list(self.outputs),
            "use_rep": list(self.use_rep),
            "origin": self.origin,
            "strategy": self.strategy,
            "params": self.params,
            "split": self.split,
            "networks": [asdict(network.config) for network in self.networks],
            "own": self._own()[0],
        }
        text = json.dumps(config, indent=2, default=plain)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        self.validation_scores.to_csv(folder / VALIDATION, sep="\t")
        self.history.to_csv(folder / HISTORY, sep="\t", index=False)
        write_weights(folder / WEIGHTS, self._tensors(), beside_weights(folder, json.loads(text)))
        if self.model is not None:
            self.model.save_pretrained(folder / MODEL)


def refuse_reserved(key_added: str, suggestion: str, *read: str | None) -> None:
    """Refuse a key whose entry or record is read, or means something else."""
    own = (Obs.N_TOKENS, Obs.SUBSLICE, Obs.VIRTUAL_CELL, Obs.DOMAIN, Uns.SUBSLICE)
    entries = (Obsm.TOKENS, Obsm.TOKEN_VALUES, Obsm.X_CELL, Obsm.X, Obsm.COORDINATES)
    refuse_taken(key_added, suggestion, *own, *entries, *read)


def require_head(head: Any, kind: type[Head]) -> None:
    """Refuse something else than a head of a task."""
    if isinstance(head, kind):
        return
    if isinstance(head, str | Path):
        found = f"the path {str(head)!r}; read it with {kind.__name__}.load(path)"
    elif isinstance(head, Head):
        found = f"a head for {head.task}"
    else:
        found = f"a {type(head).__name__}"
    msg = f"Expected a head for {kind.task} ({kind.__name__}), found {found}."
    raise TypeError(msg)
