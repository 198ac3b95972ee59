"""What all heads have: their members, what these read, and the folder that they are saved in."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import numpy as np
import torch

from stofm._config import read_json
from stofm._edge.colors import UNKNOWN_COLOR, fill_colors
from stofm._edge.tables import (
    make_frame,
    refuse_foreign,
    refuse_not_finite,
    refuse_taken,
    remove_entry,
    write_frame,
    write_record,
)
from stofm._files import Kind, local, read_table, reading, take_back
from stofm._keys import Label, Obs, Obsm, Suffix, Uns
from stofm._version import __version__
from stofm.heads.blocks import read_embeddings, with_neighborhood
from stofm.heads.expression import ExpressionComponents, read_expression
from stofm.heads.genes import Gene
from stofm.heads.network import apply_head
from stofm.nn.checkpoint import CONFIG, load_exactly, read_tensors, require_beside, write_atomically
from stofm.nn.checkpoint import FILES as CHECKPOINT_FILES
from stofm.nn.checkpoint import write_tensors as write_weights
from stofm.nn.device import seeded
from stofm.nn.model import Stofm
from stofm.nn.prediction_head import HeadConfig, PredictionHead

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd
    from numpy.typing import NDArray

    from stofm.heads.blocks import Blocks, Source
    from stofm.heads.embeddings import Origin
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.targets import TargetKind

_WEIGHTS: Final = "head.safetensors"
_HISTORY: Final = "history.tsv"
_SCORES: Final = "validation_scores.tsv"
_MODEL: Final = "model"
_FILES: Final = (CONFIG, _WEIGHTS, _SCORES, _HISTORY)
#: Fields that config.json holds as they are.
_PLAIN: Final = ("outputs", "use_rep", "origin", "strategy", "params", "split")


@dataclass(frozen=True, eq=False, kw_only=True)
class Head:
    """A fitted head with all that its predictions depend on."""

    #: Name of the task in files and messages, and what the outputs are called together.
    task: ClassVar[str]
    called: ClassVar[str]
    #: Where predictions are written by default, and what else is, by what is put behind that name.
    key: ClassVar[str]
    obs_beside: ClassVar[tuple[str, ...]] = ()
    obsm_beside: ClassVar[tuple[str, ...]] = ()
    #: Whether all slices must have places if neighbours are read.
    needs_places: ClassVar[bool] = False
    #: Arrays in which NaN has a meaning.
    may_be_nan: ClassVar[frozenset[str]] = frozenset()

    #: Its members; the weighted mean of what they say is the prediction.
    networks: tuple[PredictionHead, ...]
    #: What each member reads: ``"embedding"``, ``"expression"``, or ``"neighborhood"`` and
    #: ``"expression neighborhood"``, which are these beside their means over the neighbours.
    reads: tuple[Source, ...]
    weights: tuple[float, ...]  #: Of each member; they sum to 1
    outputs: tuple[str, ...]  #: Names of what is predicted: classes, cell types or genes
    #: Entries of ``obsm`` that are read, and by name the model that made them.
    use_rep: tuple[str, ...]
    origin: Origin
    #: How the head was fitted, how cells were held out, and how many.
    strategy: str
    params: dict[str, Any]
    split: dict[str, Any]
    #: Scores on the held-out cells, and losses of the networks.
    validation_scores: pd.DataFrame
    history: pd.DataFrame
    #: Genes and components that members read; None if none does.
    expression: ExpressionComponents | None = None
    n_neighbors: int = 0  #: Over how many neighbours means are; 0 if none are read
    #: Genes to which a query is reduced before anything is read; None for all.
    panel: tuple[Gene, ...] | None = None
    model: Stofm | None = None  #: The tuned model; None for a frozen one

    def __repr__(self) -> str:
        """A line with task, outputs, inputs and strategy."""
        return (
            f"{type(self).__name__}({len(self.outputs)} {self.called}, "
            f"use_rep={list(self.use_rep)}, strategy={self.strategy!r})"
        )

    @classmethod
    def refuse_key(
        cls, slices: SliceTables, key: str, request: Request, use_rep: Sequence[str]
    ) -> None:
        """Refuse a key that is read, or where or beside which something else is stored."""
        refuse_reserved(key, cls.key, request.spatial_key, request.library_key, *use_rep)
        beside = {
            "obs": [key + name for name in cls.obs_beside],
            "obsm": [key + name for name in cls.obsm_beside],
        }
        slices.each(lambda table: refuse_foreign(table, key, **beside))

    def read(self, slices: SliceTables, request: Request) -> Blocks:
        """What the head reads of cells; NaN where they lack places, genes or counts."""
        request = replace(request, model=self.model if request.model is None else request.model)
        blocks = read_embeddings(slices, request, self.use_rep, expected=self.origin)
        if self.expression is not None:
            blocks = read_expression(self.expression, slices, blocks, request.layer)
        needed = range(len(slices.tables)) if self.needs_places else ()
        blocks = with_neighborhood(slices, blocks, self.n_neighbors, request, needed=needed)
        for source, network in zip(self.reads, self.networks, strict=True):
            expected, widths = network.config.d_input, blocks.widths_of(source)
            if widths and sum(widths) != expected:
                raise ValueError(
                    f"The head reads {expected} columns of obsm{list(self.use_rep)} ({source}), "
                    f"found {list(widths)}. Make them as for fitting."
                )
        return blocks

    def write(
        self,
        slices: SliceTables,
        key: str,
        frames: Mapping[str, NDArray[np.floating]],
        *,
        obs: Mapping[str, Any] | None = None,
        names: Sequence[str] | None = None,
        params: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write predictions of all cells to each table, with a record.

        `frames`, (n_obs, n_names), go to ``obsm`` and `obs`, (n_obs,), to ``obs``, by what is put
        behind the key. `names` are those of the outputs by default; `params` are of each table.
        """
        refuse_not_finite(self.task, *frames.values())
        names = self.outputs if names is None else names
        same = {
            "use_rep": list(self.use_rep),
            "strategy": self.strategy,
            "seed": self.params["seed"],
        }
        model = {name: value for rep in self.use_rep for name, value in self.origin[rep].items()}
        # All is made before anything is written.
        made = [
            {beside: make_frame(table, values[part], names) for beside, values in frames.items()}
            for table, part in zip(slices.tables, slices.places, strict=True)
        ]
        for table, part, own, more in zip(slices.tables, slices.places, made, params, strict=True):
            write_record(table, key, {**same, **more}, **model)
            for beside, column in (obs or {}).items():
                table.obs[key + beside] = column[part]
            # What is left of an earlier run would be taken for this one's.
            table.uns.pop(key + Suffix.COLORS, None)
            if (colors := self.params.get("colors")) is not None:
                called = [*names, Label.UNKNOWN] if obs else names
                known = {**colors, Label.UNKNOWN: UNKNOWN_COLOR}
                table.uns[key + Suffix.COLORS] = fill_colors(called, known)
            for beside in set(self.obsm_beside) - set(own):
                remove_entry(table, key + beside)
            for beside, frame in own.items():
                write_frame(table, key + beside, frame, names)

    def votes(
        self, blocks: Blocks, kind: TargetKind, *, columns: NDArray[np.int64] | None = None
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float64]]]:
        """Yield what each member says, (n, n_outputs), and its weight for each cell, (n,).

        Members that read what a cell lacks have no weight for it; those of a cell sum to 1.
        """
        known = {source: blocks.knows(source) for source in set(self.reads)}
        shares = [w * known[source] for source, w in zip(self.reads, self.weights, strict=True)]
        total = np.sum(shares, axis=0)
        if n_bad := int((total == 0).sum()):
            raise ValueError(
                f"{n_bad} of {len(total)} cells have nothing of what the head reads "
                f"({', '.join(sorted(known))}); see the warnings before, or fit a head to what there is."
            )
        for network, reads, share in zip(self.networks, self.reads, shares, strict=True):
            if share.any():
                vote = apply_head(network, blocks.rows_of(reads), kind, columns=columns)
                vote[share == 0] = 0
                yield vote, share / total

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
            `folder` is there and `overwrite` is false, or it holds something other than a head of
            this task, or other files beside it.
        OSError
            The disk is full, or can't be written to.
        """
        files = {*_FILES, *(f"{_MODEL}/{name}" for name in CHECKPOINT_FILES)}
        kind = Kind(f"a head for {self.task}", self._is_one, files.__contains__)
        write_atomically(Path(folder), self._write, overwrite=overwrite, kind=kind)

    @classmethod
    def _is_one(cls, folder: Path) -> bool:
        with contextlib.suppress(OSError, ValueError):
            config = read_json(folder / CONFIG, "")
            return config.get("task") == cls.task and "networks" in config
        return False

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
        missing = [name for name in _FILES if not (where / name).is_file()]
        config = {} if CONFIG in missing else read_json(where / CONFIG, "save the head again")
        found = config.get("task")
        if config and found != cls.task:
            what = f"a head for {found}" if found else "no head"
            raise ValueError(f"{where} holds {what}, not one for {cls.task}.")
        if missing:
            raise FileNotFoundError(f"{where} is no folder of a head: {missing} missing.")
        try:
            return cls._read(where, config)
        except (OSError, MemoryError):
            raise
        # A missing entry, one of another type, tables, tensors that do not fit.
        except Exception as error:
            if str(where) in str(error):
                raise
            raise ValueError(
                f"{where} is damaged, or was saved by an older stofm ({type(error).__name__}: "
                f"{error}); it says {config.get('stofm_version')}, this is {__version__}. Fit the "
                "head again."
            ) from error

    @classmethod
    def _read(cls, where: Path, config: Mapping[str, Any]) -> Self:
        # The digest of all files vouches for what is not checked here.
        require_beside(where / _WEIGHTS, _digested(where, config))
        tensors = read_tensors(where / _WEIGHTS, may_be_nan=cls.may_be_nan)
        has_model = (where / _MODEL).is_dir()
        if config["strategy"] != "frozen" and not has_model:
            raise ValueError(f"there is no {_MODEL}/ with the tuned model")
        fields = {name: config[name] for name in _PLAIN}
        fields |= {name: tuple(config[name]) for name in ("outputs", "use_rep")}
        return cls(
            **fields,
            networks=tuple(_read_network(c, tensors, k) for k, c in enumerate(config["networks"])),
            validation_scores=_read_table(where / _SCORES),
            history=_read_table(where / _HISTORY).reset_index(),
            model=Stofm.from_pretrained(where / _MODEL) if has_model else None,
            **cls._read_own(config["own"], {name: one.numpy() for name, one in tensors.items()}),
        )

    def _own(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """What members read, and what a task adds: entries of config.json, and arrays."""
        entries = {
            name: getattr(self, name) for name in ("reads", "weights", "n_neighbors", "panel")
        }
        if self.expression is None:
            return entries | {"expression": None}, {}
        return entries | {"expression": self.expression.entries}, self.expression.arrays

    @classmethod
    def _read_own(cls, own: Mapping[str, Any], arrays: Mapping[str, Any]) -> dict[str, Any]:
        """Fields from what :meth:`_own` returned."""
        expression, panel = own["expression"], own["panel"]
        return {
            "reads": tuple(own["reads"]),
            "weights": tuple(own["weights"]),
            "n_neighbors": own["n_neighbors"],
            "expression": expression and ExpressionComponents.of(expression, arrays),
            "panel": panel and tuple(Gene(*gene) for gene in panel),
        }

    def _write(self, folder: Path) -> None:
        own, arrays = self._own()
        config: dict[str, Any] = {"task": self.task, "stofm_version": __version__}
        config |= {name: getattr(self, name) for name in _PLAIN}
        config |= {"networks": [asdict(one.config) for one in self.networks], "own": own}
        text = json.dumps(config, indent=2, default=_plain)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        self.validation_scores.to_csv(folder / _SCORES, sep="\t")
        self.history.to_csv(folder / _HISTORY, sep="\t", index=False)
        tensors = {name: torch.tensor(value) for name, value in arrays.items()}
        for k, network in enumerate(self.networks):
            tensors |= {f"{k}.{name}": value for name, value in network.state_dict().items()}
        write_weights(folder / _WEIGHTS, tensors, _digested(folder, json.loads(text)))
        if self.model is not None:
            self.model.save_pretrained(folder / _MODEL)


def _plain(value: Any) -> Any:
    """Numbers of numpy, which options may be, as those of Python."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _digested(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file of weights keeps a digest of."""
    tables = {name: (folder / name).read_text("utf-8").splitlines() for name in (_SCORES, _HISTORY)}
    return {CONFIG: config} | tables


def _read_network(
    config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], number: int
) -> PredictionHead:
    prefix = f"{number}."
    state = {n.removeprefix(prefix): one for n, one in tensors.items() if n.startswith(prefix)}
    with seeded(0):
        network = PredictionHead(HeadConfig(**config))
    load_exactly(network, state, f"network {number} in {_WEIGHTS}")
    return network.eval()


def _read_table(path: Path) -> pd.DataFrame:
    with reading(path, "table"):
        return read_table(path, sep="\t", index_col=0)


def refuse_reserved(key_added: str, suggestion: str, *read: str | None) -> None:
    """Refuse a key whose entry or record is read, or means something else."""
    own = {Obs.N_TOKENS, Obs.SUBSLICE, Obs.VIRTUAL_CELL, Obs.DOMAIN, Obs.ANNOTATION, Uns.SUBSLICE}
    own |= {Obs.NOVELTY, Obs.NOVEL}
    own |= {Obsm.TOKENS, Obsm.TOKEN_VALUES, Obsm.X_CELL, Obsm.X, Obsm.COORDINATES}
    refuse_taken(key_added, suggestion, *own - {suggestion}, *read)


def require_head(head: Any, kind: type[Head]) -> None:
    """Refuse something other than a head of a task."""
    if head is None or isinstance(head, kind):
        return
    if isinstance(head, str | Path):
        found = f"the path {str(head)!r}; read it with {kind.__name__}.load(path)"
    elif isinstance(head, Head):
        found = f"a head for {head.task}"
    else:
        found = f"a {type(head).__name__}"
    raise TypeError(f"Expected a head for {kind.task} ({kind.__name__}), found {found}.")
