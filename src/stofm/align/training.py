"""Training of an aligner: batches of spots from few slides, in the loop that pretrains models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch

from stofm._digests import fingerprint
from stofm._files import put_in_place, reading, take_back
from stofm._logging import step_bar
from stofm.align.losses import AlignBatch, AlignObjective, retrieval_ranks
from stofm.align.network import LEVELS, MODALITIES, AlignNetwork
from stofm.nn.device import seeded
from stofm.train.checkpoint import Progress
from stofm.train.config import RunConfig
from stofm.train.loop import TrainingLoop
from stofm.train.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from stofm.align.config import AlignOptions
    from stofm.align.inputs import Spots

    Matrix = NDArray[np.float32]

_ROWS_AT_ONCE = 8192


@dataclass(frozen=True, eq=False)
class AlignSamples:
    """Spots of some slides, as the training loop takes samples.

    `features` (n, d) by branch and `where` (n, 4), as in :class:`AlignBatch`, are of all `spots`;
    `slides` are the numbers of those that are drawn from.
    """

    features: Mapping[str, Matrix]
    where: Matrix
    spots: Spots
    slides: Sequence[int]
    options: AlignOptions
    seed: int

    def epoch(self, number: int) -> list[NDArray[np.int64]]:
        """Batches of rows, each from few slides; all rows once."""
        rng = np.random.default_rng([self.seed, number])
        order, step, batches = rng.permutation(self.slides), self.options.slides_per_batch, []
        for start in range(0, len(order), step):
            parts = [self.spots.parts[k] for k in order[start : start + step]]
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
        return f"slices {[self.spots.names[k] for k in slides]}"


@dataclass(frozen=True, eq=False)
class _Stage:
    """What the training loop asks of a stage."""

    objective: nn.Module
    samples: AlignSamples
    validation: AlignSamples | None
    name: str = "align"
    number: int = 0
    refresh_every: int | None = None


def _read_checkpoint(path: Path, inputs: str) -> dict[str, Any]:
    """What training wrote on the way, empty if nothing; refuse that of another training."""
    place = take_back(path)
    if not place.exists():
        return {}
    with reading(path, "checkpoint of st.tl.align"):
        state: dict[str, Any] = torch.load(place, map_location="cpu", weights_only=True)
        is_same = state["inputs"] == inputs
    if not is_same:
        raise ValueError(
            f"{path} is of an alignment of other slides, or with other options or another seed: go on "
            "with those, name another file, or delete it to begin anew."
        )
    return state


class _Recorder:
    """Keeps the history, and the weights with the lowest loss on held-out slides.

    Writes the file `path`, if there is to be one; `inputs` tells of what it is.
    """

    def __init__(
        self,
        loop: TrainingLoop,
        network: nn.Module,
        stored: Mapping[str, Any],
        *,
        path: Path | None,
        inputs: str,
        show: bool,
    ) -> None:
        self.rows: list[dict[str, Any]] = stored.get("rows", [])
        self.best: dict[str, torch.Tensor] = stored.get("best", {})
        self._loop, self._network, self._path, self._inputs = loop, network, path, inputs
        self._bar = step_bar("align", total=loop.n_steps, done=loop.progress.step, show=show)

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
        """Write the checkpoint, whole or not at all."""
        if self._path is not None:
            state = {
                "inputs": self._inputs,
                "progress": asdict(self._loop.progress),
                "network": self._network.state_dict(),
                "optimizer": self._loop.optimizer.state_dict(),
                "best": self.best,
                "rows": self.rows,
            }
            put_in_place(self._path, lambda part: torch.save(state, part))

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def train(
    samples: AlignSamples,
    validation: AlignSamples | None,
    *,
    device: str | torch.device,
    checkpoint: Path | None,
    show_progress_bar: bool,
) -> tuple[AlignNetwork, pd.DataFrame]:
    """Train a network; gives it on the CPU, with the history of its losses.

    With held-out slides, the weights with the lowest loss on them. Training is written to the file
    `checkpoint` on the way, and goes on from there.
    """
    processes, options = Processes.start(device), samples.options
    with seeded(samples.seed):
        network = AlignNetwork({k: v.shape[1] for k, v in samples.features.items()}, options)
    objective = AlignObjective(network).to(processes.device)
    path = checkpoint if processes.is_first else None
    slides = [one and list(one.slides) for one in (samples, validation)]
    facts = f"{options} {samples.seed} {slides} {len(samples.where)} {list(samples.features)}"
    inputs = "" if path is None else fingerprint(facts, samples.where, *samples.features.values())
    stored = processes.agree({} if path is None else _read_checkpoint(path, inputs))
    # The loop asks of a stage and its config only what these have.
    loop = TrainingLoop(
        cast("Any", _Stage(objective, samples, validation)),
        cast("Any", options),
        run=RunConfig(seed=samples.seed, n_threads=0),
        processes=processes,
        progress=Progress(**stored.get("progress", {})),
    )
    if stored:
        network.load_state_dict(stored["network"])
        loop.optimizer.load_state_dict(stored["optimizer"])
    show = show_progress_bar and processes.is_first
    recorder = _Recorder(loop, network, stored, path=path, inputs=inputs, show=show)
    try:
        loop.train(recorder)
    finally:
        recorder.close()
    if recorder.best:
        network.load_state_dict(recorder.best)
    return network.cpu().eval(), pd.DataFrame(recorder.rows)


@torch.no_grad()
def project(
    network: AlignNetwork, features: Mapping[str, Matrix], device: torch.device
) -> dict[str, dict[str, Matrix]]:
    """Unit vectors of spots by modality, as far as it is read, and level."""
    network = network.to(device).eval()
    n = len(next(iter(features.values())))
    found: dict[str, dict[str, list[Matrix]]] = {name: {} for name in MODALITIES}
    for start in range(0, n, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        batch = {
            name: torch.from_numpy(np.ascontiguousarray(values[rows])).to(device)
            for name, values in features.items()
        }
        for level, views in network(batch).items():
            for name, parts in found.items():
                if (values := getattr(views, name)) is not None:
                    parts.setdefault(level, []).append(values.cpu().numpy())
    network.cpu()
    return {
        name: {level: np.concatenate(values) for level, values in parts.items()}
        for name, parts in found.items()
        if parts
    }


def fuse(aligned: Mapping[str, Mapping[str, Matrix]], spots: Spots) -> dict[str, Matrix]:
    """Unit vectors of both modalities by level; one modality stands for itself.

    On each slide they have the weights with which the two vectors of spots, together, come nearest
    to the mean of the genes' vectors of the other spots in their niches.
    """
    if len(aligned) == 1:
        return dict(*aligned.values())
    views = [aligned[name] for name in MODALITIES]
    around = spots.niche_means(aligned["genes"]["spot"], with_self=False)
    found = {level: np.empty_like(around) for level in LEVELS}
    for part in spots.parts:
        image, genes, target = (
            (one[part] - one[part].mean(axis=0)).ravel()
            for one in (*(view["spot"] for view in views), around)
        )
        pair = np.stack([image, genes])
        weights = np.linalg.lstsq(pair @ pair.T, pair @ target, rcond=None)[0].clip(min=0)
        weights = weights if weights.any() else np.ones(2)
        for level, both in found.items():
            sums = sum(w * view[level][part] for w, view in zip(weights, views, strict=True))
            both[part] = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    return found


def score_retrieval(
    aligned: Mapping[str, Mapping[str, Matrix]], spots: Spots, held_out: Sequence[int]
) -> pd.DataFrame:
    """How well genes are found by the image of their spot or niche, among all of its slide.

    Columns: ``slide``, ``split``, ``level``, ``n`` spots, ``top_1``, ``top_10`` (shares of the spots
    whose partner is among so many nearest), ``chance_10`` (that share by chance), ``rank`` (median,
    as a share of n; 0.5 by chance).
    """
    rows = []
    for number, (name, part) in enumerate(zip(spots.names, spots.parts, strict=True)):
        own = {"slide": name, "split": "validation" if number in held_out else "train"}
        for level in LEVELS:
            ranks = retrieval_ranks(*(aligned[one][level][part] for one in MODALITIES))
            n = len(ranks)
            shares = {f"top_{k}": float((ranks <= k).mean()) for k in (1, 10)}
            rest = {"chance_10": min(1.0, 10 / n), "rank": float(np.median(ranks)) / n}
            rows.append({**own, "level": level, "n": n, **shares, **rest})
    return pd.DataFrame(rows)
