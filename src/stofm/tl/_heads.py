"""What the heads of all tasks share: what they hold, and how they are saved and loaded."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np

from stofm import __version__
from stofm._config import build_dataclass, read_json
from stofm._files import Kind, local, reading, take_back
from stofm._keys import Obs, Obsm, Uns
from stofm._tables import read_table
from stofm._writing import refuse_taken
from stofm.nn import Stofm, checkpoint
from stofm.nn.checkpoint import CONFIG, write_atomically
from stofm.nn.device import seeded
from stofm.nn.prediction_head import HeadConfig, PredictionHead

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    import torch
    from numpy.typing import NDArray

    from stofm.tl._embeddings import Origin
    from stofm.tl._head_inputs import Inputs

#: ``"frozen"``: the head alone is fitted. Else the model is tuned with it: by changes of low rank
#: (``"lora"``), or all its weights (``"full"``).
Strategy = Literal["frozen", "lora", "full"]

_WEIGHTS = "head.safetensors"
_HISTORY = "history.tsv"
_VALIDATION = "validation_scores.tsv"
_TEST = "test_scores.tsv"
_MODEL = "model"


@dataclass(frozen=True)
class NoEntries:
    """A task that adds nothing."""


@dataclass(frozen=True, kw_only=True)
class _Entries:
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
        One network, or several that vote.
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
    test_scores
        Scores of the runs of a protocol; None without one.
    history
        Losses while the head was fitted.
    model
        The tuned model; None for a frozen one.
    """

    #: Name of the task in files and messages, and what the outputs are called together.
    task: ClassVar[str]
    called: ClassVar[str]
    #: What a task adds to config.json, the params that its records name, and arrays with NaN.
    own_entries: ClassVar[type[Any]] = NoEntries
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
    test_scores: pd.DataFrame | None = None
    model: Stofm | None = None

    def __repr__(self) -> str:
        """A line with task, outputs, inputs and strategy."""
        return (
            f"{type(self).__name__}({len(self.outputs)} {self.called}, "
            f"use_rep={list(self.use_rep)}, strategy={self.strategy!r})"
        )

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
        write_atomically(Path(folder), self._write, overwrite=overwrite, kind=_kind(type(self)))

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
        config = _read_config(where, cls)
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
        entries = build_dataclass(_Entries, config, CONFIG)
        own = build_dataclass(cls.own_entries, entries.own, CONFIG, "own")
        tensors = checkpoint.read_tensors(where / _WEIGHTS, may_be_nan=cls.may_be_nan)
        test = where / _TEST
        head = cls(
            networks=tuple(
                _read_network(sizes, tensors, k) for k, sizes in enumerate(entries.networks)
            ),
            outputs=entries.outputs,
            use_rep=entries.use_rep,
            origin=entries.origin,
            strategy=entries.strategy,
            params=entries.params,
            split=entries.split,
            validation_scores=_read_table(where / _VALIDATION),
            history=_read_table(where / _HISTORY).reset_index(),
            test_scores=_read_table(test) if test.is_file() else None,
            model=Stofm.from_pretrained(where / _MODEL) if (where / _MODEL).is_dir() else None,
            **cls._read_own(own, {name: value.numpy() for name, value in tensors.items()}),
        )
        head.check()
        if others := sorted(set(tensors) - set(head._tensors())):
            msg = f"{_WEIGHTS} holds {others[:3]}, which {CONFIG} does not name"
            raise ValueError(msg)
        checkpoint.require_beside(where / _WEIGHTS, _beside(where, config))
        return head

    def check(self) -> None:
        """Refuse parts that do not belong together.

        Raises
        ------
        ValueError
            Some do not.
        """
        sizes = [network.config.d_output for network in self.networks]
        if not sizes or set(sizes) != {len(self.outputs)}:
            msg = f"{len(self.outputs)} {self.called}, and networks with {sizes} outputs"
            raise ValueError(msg)
        if any(not (network.input_scale > 0).all() for network in self.networks):
            msg = "input_scale of a network must be positive"
            raise ValueError(msg)
        if len(set(self.outputs)) < len(self.outputs):
            msg = f"{self.called} occur twice among {list(self.outputs[:5])}"
            raise ValueError(msg)
        if missing := [rep for rep in self.use_rep if rep not in self.origin]:
            msg = f"origin lacks {missing}"
            raise ValueError(msg)
        if missing := [name for name in self.params_read if name not in self.params]:
            msg = f"params lacks {missing}"
            raise ValueError(msg)
        if self.strategy != "frozen" and self.model is None:
            msg = f"strategy {self.strategy!r}, and no {_MODEL}/ with the tuned model"
            raise ValueError(msg)

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What a task adds: entries of config.json, and arrays."""
        return {}, {}

    @classmethod
    def _read_own(cls, entries: Any, arrays: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        """Fields that a task adds, from its entries and arrays."""
        return {}

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
        text = json.dumps(config, indent=2, default=_plain)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        self.validation_scores.to_csv(folder / _VALIDATION, sep="\t")
        self.history.to_csv(folder / _HISTORY, sep="\t", index=False)
        if self.test_scores is not None:
            self.test_scores.to_csv(folder / _TEST, sep="\t")
        checkpoint.write_tensors(
            folder / _WEIGHTS, self._tensors(), _beside(folder, json.loads(text))
        )
        if self.model is not None:
            self.model.save_pretrained(folder / _MODEL)


def check_strategy(strategy: str) -> None:
    """Refuse an unknown strategy.

    Raises
    ------
    ValueError
        `strategy` is none of :data:`Strategy`.
    """
    if strategy not in get_args(Strategy):
        msg = f"strategy must be one of {get_args(Strategy)}, found {strategy!r}."
        raise ValueError(msg)


def refuse_reserved(key_added: str, suggestion: str, *read: str | None) -> None:
    """Refuse a key whose entry or record is read, or means something else.

    Raises
    ------
    ValueError
        `key_added` can't be written to a file, is one of stofm's other keys, or among those that are read.
    """
    own = (Obs.N_TOKENS, Obs.SUBSLICE, Obs.VIRTUAL_CELL, Obs.DOMAIN, Uns.SUBSLICE)
    entries = (Obsm.TOKENS, Obsm.TOKEN_VALUES, Obsm.X_CELL, Obsm.X, Obsm.COORDINATES)
    refuse_taken(key_added, suggestion, *own, *entries, *read)


def require_head(head: Any, kind: type[Head]) -> None:
    """Refuse something else than a head of a task.

    Raises
    ------
    TypeError
        `head` is of another task, or no head.
    """
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


def _plain(value: Any) -> Any:
    """Numbers of numpy, which options may be, as those of Python."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    msg = f"Object of type {type(value).__name__} is not JSON serializable"
    raise TypeError(msg)


def _kind(kind: type[Head]) -> Kind:
    """What a head may replace: one of the same task."""

    def is_one(folder: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            config = read_json(folder / CONFIG, "")
            return config.get("task") == kind.task and "networks" in config
        return False

    files = {CONFIG, _WEIGHTS, _HISTORY, _VALIDATION, _TEST}
    files |= {f"{_MODEL}/{name}" for name in checkpoint.FILES}
    return Kind(f"a head for {kind.task}", is_one, files.__contains__)


def _read_config(folder: Path, kind: type[Head]) -> dict[str, Any]:
    parts = (CONFIG, _WEIGHTS, _VALIDATION, _HISTORY)
    missing = [name for name in parts if not (folder / name).is_file()]
    config = {} if CONFIG in missing else read_json(folder / CONFIG, "save the head again")
    found = config.get("task")
    if config and found != kind.task:
        what = f"a head for {found}" if found else "no head"
        msg = f"{folder} holds {what}, not one for {kind.task}."
        raise ValueError(msg)
    if missing:
        msg = f"{folder} is no folder of a head: {missing} missing."
        raise FileNotFoundError(msg)
    return config


def _beside(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    tables = [p for name in (_VALIDATION, _HISTORY, _TEST) if (p := folder / name).is_file()]
    return {CONFIG: config} | {p.name: p.read_text("utf-8").splitlines() for p in tables}


def _read_network(
    config: HeadConfig, tensors: Mapping[str, torch.Tensor], number: int
) -> PredictionHead:
    prefix = f"{number}."
    state = {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }
    what = f"network {number} in {_WEIGHTS}"
    checkpoint.check_sizes(
        lambda: PredictionHead(config), len(config.widths), checkpoint.shapes(state), what
    )
    with seeded(0):
        network = PredictionHead(config)
    checkpoint.load_exactly(network, state, what)
    return network.eval()


def _read_table(path: Path) -> pd.DataFrame:
    with reading(path, "table"):
        return read_table(path, sep="\t", index_col=0)
