"""Training of an aligner: batches of spots from few slides, in the loop that pretrains models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch

from stofm._logging import step_bar
from stofm.align.losses import AlignBatch, AlignObjective, retrieval_ranks
from stofm.align.network import LEVELS, AlignNetwork
from stofm.nn.device import seeded
from stofm.train.checkpoint import Progress
from stofm.train.config import RunConfig
from stofm.train.loop import TrainingLoop
from stofm.train.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray
    from torch import nn

    from stofm.align.config import AlignOptions

    Matrix = NDArray[np.float32]

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class AlignSamples:
    """Spots of slides, as the training loop takes samples.

    `features` (n, d) are by branch, `where` (n, 4) as in :class:`AlignBatch`; each of `parts` is a
    slide.
    """

    features: Mapping[str, Matrix]
    where: Matrix
    parts: Sequence[slice]
    names: Sequence[str]
    options: AlignOptions
    seed: int

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches of rows, each from few slides; all rows once."""
        rng = np.random.default_rng([self.seed, number])
        order, step, batches = rng.permutation(len(self.parts)), self.options.slides_per_batch, []
        for start in range(0, len(order), step):
            parts = [self.parts[k] for k in order[start : start + step]]
            rows = rng.permutation(np.concatenate([np.arange(p.start, p.stop) for p in parts]))
            batches += np.array_split(rows, -(-len(rows) // self.options.batch_size))
        return [batches[k] for k in rng.permutation(len(batches))]

    def load(self, samples: NDArray[np.int64], epoch: int) -> AlignBatch:
        """Features of some rows."""
        features = {
            name: torch.from_numpy(np.ascontiguousarray(values[samples]))
            for name, values in self.features.items()
        }
        return AlignBatch(features, torch.from_numpy(self.where[samples]))

    def describe(self, samples: NDArray[np.int64]) -> str:
        """Slides that rows are of."""
        slides = np.unique(self.where[samples, 2].astype(int))
        return f"slices {[self.names[k] for k in slides]}"


@dataclass(frozen=True, eq=False)
class _Stage:
    """What the training loop asks of a stage."""

    objective: nn.Module
    samples: AlignSamples
    validation: AlignSamples | None
    name: str = "align"
    number: int = 0
    refresh_every: int | None = None


class _Recorder:
    """Keeps the history, and the weights with the lowest loss on held-out slides."""

    def __init__(self, loop: TrainingLoop, network: nn.Module, *, show: bool) -> None:
        self.rows: list[dict[str, Any]] = []
        self.best: dict[str, torch.Tensor] | None = None
        self._network = network
        self._bar = step_bar("align", total=loop.n_steps, done=0, show=show)

    def record(self, row: Mapping[str, Any]) -> None:
        """Add a row to the history."""
        self.rows.append({k: v for k, v in row.items() if k not in ("stage", "tokens")})

    def advance(self) -> None:
        """Count a step."""
        self._bar.update()

    def keep(self) -> None:
        """Keep the weights as the best so far."""
        self.best = {name: one.clone() for name, one in self._network.state_dict().items()}

    def save(self) -> None:
        """Write nothing: alignment takes minutes, and begins anew."""

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def train(
    samples: AlignSamples,
    validation: AlignSamples | None,
    options: AlignOptions,
    *,
    device: str | torch.device,
    show_progress_bar: bool,
) -> tuple[AlignNetwork, pd.DataFrame]:
    """Train a network; gives it on the CPU, with the history of its losses.

    With held-out slides, the weights with the lowest loss on them.
    """
    processes = Processes.start(device)
    with seeded(samples.seed):
        network = AlignNetwork({k: v.shape[1] for k, v in samples.features.items()}, options)
    objective = AlignObjective(network).to(processes.device)
    run = RunConfig(seed=samples.seed, n_threads=0)
    # The loop asks of a stage and its config only what these have.
    loop = TrainingLoop(
        cast("Any", _Stage(objective, samples, validation)),
        cast("Any", options),
        run=run,
        processes=processes,
        progress=Progress(),
    )
    recorder = _Recorder(loop, network, show=show_progress_bar)
    try:
        loop.train(recorder)
    finally:
        recorder.close()
    if recorder.best is not None:
        network.load_state_dict(recorder.best)
    return network.cpu().eval(), pd.DataFrame(recorder.rows)


@torch.no_grad()
def project(
    network: AlignNetwork, features: Mapping[str, Matrix], device: torch.device
) -> dict[str, dict[str, Matrix]]:
    """Unit vectors of spots by level and by ``"image"``, ``"genes"`` and ``"fused"``."""
    network = network.to(device).eval()
    n = len(next(iter(features.values())))
    found: dict[str, dict[str, list[Matrix]]] = {level: {} for level in LEVELS}
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        batch = {
            name: torch.from_numpy(np.ascontiguousarray(values[rows])).to(device)
            for name, values in features.items()
        }
        for level, views in network(batch).items():
            for name, values in views._asdict().items():
                if values is not None:
                    found[level].setdefault(name, []).append(values.cpu().numpy())
    network.cpu()
    return {
        level: {name: np.concatenate(parts) for name, parts in views.items()}
        for level, views in found.items()
    }


def score_retrieval(
    network: AlignNetwork, samples: AlignSamples, split: str, device: torch.device
) -> pd.DataFrame:
    """How well genes are found by the image of their spot or niche, among all of its slide.

    Columns: ``slide``, ``split``, ``level``, ``n`` spots, ``top_1``, ``top_10`` (shares of the spots
    whose partner is among so many nearest), ``chance_10`` (that share by chance), ``rank`` (median,
    as a share of n; 0.5 by chance).
    """
    found = project(network, samples.features, device)
    rows = []
    for name, part in zip(samples.names, samples.parts, strict=True):
        for level, views in found.items():
            ranks = retrieval_ranks(views["image"][part], views["genes"][part])
            n = len(ranks)
            shares = {f"top_{k}": float((ranks <= k).mean()) for k in (1, 10)}
            rest = {"chance_10": min(1.0, 10 / n), "rank": float(np.median(ranks)) / n}
            rows.append({"slide": name, "split": split, "level": level, "n": n, **shares, **rest})
    return pd.DataFrame(rows)
