"""Fine-tuning: a model and a head on it learn a task together, sub-slice by sub-slice."""

from __future__ import annotations

import copy
import math
import re
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.func import functional_call
from torch.optim.lr_scheduler import LambdaLR

from stofm._edge.tokens import read_tokens
from stofm._keys import Obsm
from stofm._logging import logger, progress
from stofm._messages import warn
from stofm.heads.embeddings import bare_table, read_places, recorded_options
from stofm.heads.targets import head_loss
from stofm.nn import choose_device, embed_slice, encode_cells
from stofm.nn.batch import SubSliceBatch, TokenBatch
from stofm.nn.cell_encoder import put_learned
from stofm.nn.device import seeded
from stofm.nn.inference import padded_length
from stofm.pp import tokenize
from stofm.spatial import build_subslice, canonical_order, lay_out_slice
from stofm.spatial.plane import partition_balanced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from stofm.genes import RankedTokens
    from stofm.heads.request import Request, SliceTables
    from stofm.heads.targets import Targets
    from stofm.nn import Stofm
    from stofm.nn.prediction_head import PredictionHead
    from stofm.spatial import SliceLayout

#: Maps that are changed: those of the SE(2) Transformer's layers, of BERT's
#: attention, and what brings either to its output or input.
_CHANGED: Final = re.compile(
    r"se2_transformer\.(input_projection|layers\.\d+\.(qkv|out|fc1|fc2))"
    r"|cell_encoder\.projection"
    r"|cell_encoder\.bert\.encoder\.layer\.\d+\.attention\.(self\.(query|key|value)|output\.dense)"
)
_ADAPTER: Final = "default"
_COLUMNS: Final = ["split", "epoch", "step", "loss", "learning_rate", "seconds"]


@dataclass(frozen=True, kw_only=True)
class FineTuning:
    """How a model is tuned together with a head. A step sees one sub-slice."""

    #: Of AdamW; decay for matrices only.
    learning_rate: float = 3e-4
    weight_decay: float = 0.01
    warmup_steps: int = 10  # steps over which the learning rate rises; then it falls linearly to 0
    #: Passes over the sub-slices, and the fewest steps.
    epochs: int = 10
    min_steps: int = 100
    #: Steps between validations, or those of an epoch if these are more. All cells are embedded
    #: anew before each.
    validate_every: int = 10
    patience: int = 5  # validations without a lower loss after which tuning stops
    #: Cells of a sub-slice that go through the cell encoder in a step, with gradients.
    sampled_cells: int = 32
    max_norm: float = 1.0  # norm to which larger gradients are scaled down
    #: ``"lora"``: rank of the changes, and their scale times the rank.
    lora_rank: int = 8
    lora_alpha: int = 16


class TuningSlice(NamedTuple):
    """Rows of a slice's cells in the tokens of their table and in the targets, in order of place."""

    tokens: RankedTokens
    cells: NDArray[np.int64]
    rows: NDArray[np.int64]
    coordinates: NDArray[np.float64]


def read_tuning_slices(
    slices: SliceTables, model: Stofm, request: Request, used: NDArray[np.int64]
) -> list[TuningSlice]:
    """Tokens and places of the slices that have a used cell."""
    tokens, coordinates = {}, np.full((slices.n_obs, 2), np.nan)
    for k in slices.tables_of(used):
        with slices.naming(k):
            options = recorded_options(slices.tables[k], request)
            coordinates[slices.places[k]] = read_places(slices.tables[k], options["spatial_key"])
            bare = bare_table(slices.tables[k], options)
            tokenize(bare, model, layer=options["layer"], show_progress_bar=False)
            tokens[k] = read_tokens(bare, model)
    found = []
    for rows in slices.rows:
        if len(np.intersect1d(rows, used)):
            number = slices.tables_of(rows)[0]
            own = rows[canonical_order(coordinates[rows], np.empty((len(rows), 0)))]
            cells = own - slices.places[number].start
            found.append(TuningSlice(tokens[number], cells, own, coordinates[own]))
    return found


def fine_tune(
    slices: SliceTables,
    model: Stofm,
    head: PredictionHead,
    targets: Targets,
    *,
    fitted: NDArray[np.int64],
    held_out: NDArray[np.int64],
    request: Request,
    task: str,
    how: FineTuning | None = None,
) -> tuple[Stofm, pd.DataFrame]:
    """Tune copies of a model and of a head on it, so that the head predicts targets better.

    In each step some of a sub-slice's cells go through the cell encoder, with gradients; the others
    keep embeddings that are computed anew before each validation. Slices are cut anew in every epoch,
    at another angle. By the loss on the `held_out` rows the best step is chosen, without them the last.

    ``"full"`` trains all weights but the table of gene embeddings, so that genes that these slices
    don't measure still lie where they did among those that they do; ``"lora"`` trains changes of low
    rank, which are added to the weights at the end.

    Returns the tuned model, on the CPU, with a name of its own that has the `task`, and the losses.

    References
    ----------
    SToFM (arXiv 2507.11588), section C.2; LoRA (Hu et al. 2021, arXiv 2106.09685).
    """
    read = read_tuning_slices(slices, model, request, np.union1d(fitted, held_out))
    with seeded(request.seed, choose_device(request.device)):
        run = _Tuning(model, head, targets, read, request, how or FineTuning())
        history = run.train(fitted, held_out)
        tuned = run.result()
    for weight, given in zip(tuned.parameters(), model.parameters(), strict=True):
        weight.requires_grad_(given.requires_grad)
    tuned = tuned.to("cpu").eval()
    tuned.config = replace(
        model.config,
        name=f"{model.name}-{task}",
        provenance=(
            f"Tuned ({request.options.strategy}, {task}, {len(fitted)} cells) from {model.name!r}, "
            f"fingerprint {model.fingerprint}. Of that: {model.config.provenance}"
        ),
        trained=True,
    )
    losses, by = history.loc[history["split"] == "validation", "loss"].to_numpy(), ""
    if len(losses):
        first, best = losses[0], losses[1:].min()
        by = f"loss on held-out cells {first:.4g} -> {best:.4g}, "
        if best > first:
            warn(
                f"Tuning {model.name!r} made the loss on the held-out cells no lower ({first:.4g} at the "
                f"beginning, at best {best:.4g} afterwards): strategy='frozen' may serve as well."
            )
    done = (tuned.name, model.name, by, history["step"].max(), history["seconds"].max())
    logger.info("%r was tuned from %r: %s%d steps, %.1f s.", *done)
    return tuned, history


class _Tuning:
    """A run of :func:`fine_tune`."""

    def __init__(
        self,
        model: Stofm,
        head: PredictionHead,
        targets: Targets,
        slices: Sequence[TuningSlice],
        request: Request,
        how: FineTuning,
    ) -> None:
        self._device = device = choose_device(request.device)
        self._model = _copied(model, model).to(device).requires_grad_(requires_grad=True)
        self._head = copy.deepcopy(head).to(device)
        self._targets, self._slices, self._request, self._how = targets, slices, request, how
        weights = targets.class_weights
        self._class_weights = None if weights is None else torch.as_tensor(weights).to(device)
        self._changes: Any = None
        if request.options.strategy == "lora":
            rank, alpha = how.lora_rank, how.lora_alpha
            self._changes = add_low_rank(self._model, rank, alpha, seed=request.seed)
        else:
            self._model.cell_encoder.gene_embeddings.weight.requires_grad = False
        weighted = (*self._model.parameters(), *self._head.parameters())
        self._trained = [weight for weight in weighted if weight.requires_grad]
        self._encoded: list[tuple[NDArray[np.float32], SliceLayout]] = []

    def train(self, fitted: NDArray[np.int64], held_out: NDArray[np.int64]) -> pd.DataFrame:
        """Train, leave the best weights in place, and return the losses."""
        how, started = self._how, time.perf_counter()
        history: list[tuple[Any, ...]] = []
        is_fitted = np.zeros(len(self._targets), dtype=bool)
        is_fitted[fitted] = True
        self._refresh()
        pending = self._cut(0, is_fitted)
        every = max(how.validate_every, len(pending))
        n_steps = -(-max(how.epochs * len(pending), how.min_steps) // every) * every
        optimizer, schedule = self._optimizer(n_steps)
        best, best_step, epoch, losses = math.inf, 0, 0, []
        kept: list[torch.Tensor] = []

        def record(split: str, step: int, loss: float) -> None:
            rate, seconds = schedule.get_last_lr()[0], time.perf_counter() - started
            history.append((split, epoch, step, loss, rate, seconds))

        if len(held_out):
            # A head that was stopped early on these cells has its lowest loss here: not a candidate.
            record("validation", 0, self._loss_on(held_out))
        show = self._request.show_progress_bar
        for step in progress(range(1, n_steps + 1), "fine-tune", "step", show=show):
            if not pending:
                epoch += 1
                pending = self._cut(epoch, is_fitted)
            losses.append(self._step(*pending.pop(), is_fitted, optimizer, step))
            schedule.step()
            if step % every:
                continue
            record("train", step, float(np.mean(losses)))
            losses = []
            self._refresh()
            if not len(held_out):
                continue
            loss = self._loss_on(held_out)
            record("validation", step, loss)
            if loss < best:
                best, best_step = loss, step
                kept = [weight.detach().clone() for weight in self._trained]
            elif step - best_step >= how.patience * every:
                break
        with torch.no_grad():
            for weight, value in zip(self._trained, kept, strict=False):
                weight.copy_(value)
        return pd.DataFrame(history, columns=_COLUMNS)

    def _optimizer(self, n_steps: int) -> tuple[torch.optim.AdamW, LambdaLR]:
        how = self._how
        groups: list[dict[str, Any]] = [
            {"params": [weight for weight in self._trained if weight.ndim > 1]},
            {"params": [w for w in self._trained if w.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=how.learning_rate, weight_decay=how.weight_decay)
        warmup = min(how.warmup_steps, n_steps // 2)

        def rate(step: int) -> float:
            return min((step + 1) / max(warmup, 1), (n_steps - step) / (n_steps - warmup))

        return optimizer, LambdaLR(optimizer, rate)

    def result(self) -> Stofm:
        """The model as it is, with low-rank changes added to its weights."""
        return self._model if self._changes is None else merged(self._changes, self._model)

    def _refresh(self) -> None:
        """Embed all cells with the model as it is, and find the virtual cells."""
        model, tokens = self.result(), {id(one.tokens): one.tokens for one in self._slices}
        encoded = {
            number: encode_cells(model.cell_encoder, own, model.vocabulary, device=self._device)
            for number, own in tokens.items()
        }
        self._encoded = []
        for one in self._slices:
            features = encoded[id(one.tokens)][one.cells]
            layout = lay_out_slice(one.coordinates, features, model.config.subslice)
            self._encoded.append((features, layout))

    def _cut(self, epoch: int, is_fitted: NDArray[np.bool_]) -> list[tuple[int, int, Any]]:
        """Cut the slices at an angle: number of the sub-slice, of its slice, and its cells."""
        rng = np.random.default_rng([self._request.seed, epoch])
        angle = rng.uniform(0, 2 * np.pi) if epoch else 0.0
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        size = self._model.config.subslice.n_cells
        named = enumerate(zip(self._slices, self._encoded, strict=True))
        parts = [
            (number, cells)
            for number, (one, (_, layout)) in named
            for cells in partition_balanced(layout.coordinates @ turn, size)
            if is_fitted[one.rows[cells]].any()
        ]
        order = rng.permutation(len(parts)).tolist()
        return [(k, *parts[k]) for k in order]

    def _step(
        self,
        part: int,
        number: int,
        cells: NDArray[np.int64],
        is_fitted: NDArray[np.bool_],
        optimizer: torch.optim.Optimizer,
        step: int,
    ) -> float:
        one, (features, layout) = self._slices[number], self._encoded[number]
        rules = self._model.config.subslice
        subslice = build_subslice(layout, features, np.sort(cells), rules)
        batch = SubSliceBatch.from_subslices([subslice]).to(self._device)
        nodes = np.flatnonzero(subslice.cell_index >= 0)
        rng = np.random.default_rng([self._request.seed, step, part])
        sampled = np.sort(rng.permutation(nodes)[: self._how.sampled_cells])
        self._model.train()
        self._head.train()
        fresh = self._encode(one, subslice.cell_index[sampled])
        values = put_learned(batch.features, torch.from_numpy(sampled).to(self._device), fresh)
        found = {Obsm.X_CELL: values}
        if Obsm.X in self._request.reps:
            found[Obsm.X] = self._model.se2_transformer.embed(replace(batch, features=values))
        known = nodes[is_fitted[one.rows[subslice.cell_index[nodes]]]]
        read = torch.cat(
            [found[rep][0, torch.from_numpy(known)] for rep in self._request.reps], dim=1
        )
        loss = self._loss(read, one.rows[subslice.cell_index[known]])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, self._how.max_norm)
        optimizer.step()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"The loss is {value} in step {step} of tuning {self._model.name!r}. Tune on another "
                "device, or use strategy='frozen'."
            )
        return value

    def _encode(self, one: TuningSlice, cells: NDArray[np.integer]) -> Any:
        """Compute what is learned of some cells of a slice, with gradients."""
        encoder, vocabulary = self._model.cell_encoder, self._model.vocabulary
        own, tokens = one.cells[cells], one.tokens
        tokens = tokens if encoder.config.reads_values else tokens.without_values()
        longest = int(padded_length(tokens.n_tokens[own].max(keepdims=True) + 1)[0])
        batch = TokenBatch.from_ranked(
            tokens,
            own,
            cls_token=vocabulary.cls,
            pad_token=vocabulary.pad,
            length=min(longest, encoder.config.max_positions),
        ).to(self._device)
        weights = {} if self._changes is None else encoder_weights(self._model)
        return functional_call(encoder, weights, (batch,))

    def _loss(self, read: torch.Tensor, rows: NDArray[np.int64]) -> torch.Tensor:
        outputs, wanted = self._head(read.float()), self._targets.take(rows).to(self._device)
        total, count = head_loss(outputs, wanted, self._targets.kind, self._class_weights)
        return total / count

    @torch.no_grad()
    def _loss_on(self, rows: NDArray[np.int64]) -> float:
        """Loss on held-out cells, embedded as :func:`stofm.tl.embed` does."""
        model = self.result()
        self._head.eval()
        where = np.full(len(self._targets), -1)
        where[rows] = np.arange(len(rows))
        read = np.empty((len(rows), self._head.config.d_input), dtype=np.float32)
        for one, (features, layout) in zip(self._slices, self._encoded, strict=True):
            found = {Obsm.X_CELL: features}
            if Obsm.X in self._request.reps:
                by = model.se2_transformer, layout, features, model.config.subslice
                found[Obsm.X] = embed_slice(*by, device=self._device)
            is_own = where[one.rows] >= 0
            parts = [found[rep][is_own] for rep in self._request.reps]
            read[where[one.rows[is_own]]] = np.concatenate(parts, axis=1)
        return float(self._loss(torch.from_numpy(read).to(self._device), rows))


def add_low_rank(model: Stofm, rank: int, alpha: int, *, seed: int) -> Any:
    """Put changes of low rank, 0 at first, into a model's maps, whose own weights stay: peft's wrapper."""
    import peft

    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=_CHANGED.pattern)
    with seeded(seed):
        return peft.LoraModel(model, config, _ADAPTER)


def merged(changes: Any, model: Stofm) -> Stofm:
    """A plain model, a copy, with the changes added to its weights."""
    found: Stofm = _copied(changes, model).merge_and_unload()
    return found


def _copied(one: Any, model: Stofm) -> Any:
    # All but the vocabulary, which is large, and which nothing changes.
    return copy.deepcopy(one, {id(model.vocabulary): model.vocabulary})


def encoder_weights(model: Stofm) -> dict[str, torch.Tensor]:
    """Weights of the cell encoder's changed maps with the change added, by name.

    The cell encoder reads its maps' weights rather than calling them; gradients flow to the change.
    """
    return {
        f"{name}.base_layer.weight": part.get_base_layer().weight + part.get_delta_weight(_ADAPTER)
        for name, part in model.cell_encoder.named_modules()
        if hasattr(part, "get_delta_weight")
    }
