"""Running a model over many cells and sub-slices: arrays in, float32 arrays out."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from stofm._arrays import count_not_finite, let_go, spacious
from stofm._logging import logger, progress
from stofm.nn.batch import GeneBag, SubSliceBatch, TokenBatch
from stofm.nn.cell_encoder import NO_VALUES
from stofm.nn.device import using_threads
from stofm.spatial import build_subslice, rows_by_subslice

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from stofm.genes import GeneVocabulary, RankedTokens
    from stofm.nn.cell_encoder import CellEncoder
    from stofm.nn.se2_transformer import SE2Transformer
    from stofm.spatial import SliceLayout, SubSliceConfig

#: Tokens that go through the cell encoder at a time, by kind of device.
TOKEN_BUDGET = {"cpu": 8_192, "cuda": 262_144, "mps": 32_768}
#: Sub-slices that go through the SE(2) Transformer at a time, by kind of device.
SUBSLICES_AT_ONCE = {"cpu": 1, "cuda": 16, "mps": 4}
#: CUDA's attention kernels want a multiple of nodes.
CUDA_NODE_MULTIPLE = 8


def padded_length(n_tokens: NDArray[np.integer], most: int | None = None) -> NDArray[np.int64]:
    """Length to which a cell's tokens are padded, which depends on their number only.

    So a cell is computed in the same shape, whatever other cells are in its batch. At most 12 %
    of a list of 64 tokens or more is padding. Longer lists than `most` are cut to it.
    """
    most = most or 2**62
    n = np.minimum(np.asarray(n_tokens, dtype=np.int64), most)
    step = np.select([n <= 128, n <= 256, n <= 512], [8, 16, 32], default=64)
    padded: NDArray[np.int64] = np.minimum(-(-n // step) * step, most)
    return padded


def encode_cells(
    encoder: CellEncoder,
    ranked: RankedTokens,
    vocabulary: GeneVocabulary,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    token_budget: int | None = None,
    panel: NDArray[np.integer] | None = None,
    show_progress_bar: bool = False,
) -> NDArray[np.float32]:
    """Embed cells with the cell encoder.

    Cells of one padded length make a batch, with as many cells as the token budget allows.

    Parameters
    ----------
    encoder
        The cell encoder; used in evaluation mode.
    ranked
        Ranked gene tokens of n_cells cells, without ``<cls>``; with values if the model reads
        them.
    vocabulary
        Gives ``<cls>`` and ``<pad>``.
    device, dtype
        Where and in which precision to compute.
    token_budget
        Tokens at a time, padding counted; fitted to the device by default.
    panel
        Tokens of the genes that are measured, on which pooled sums depend; by default those that
        occur in the cells.
    show_progress_bar
        Show a bar.

    Returns
    -------
    (n_cells, d_cell) embeddings, rows in the order of `ranked`; of unit length unless the model
    pools.

    Raises
    ------
    MemoryError
        The device has no room for a single cell.
    FloatingPointError
        The device gave NaN or infinite numbers.     ValueError         The model uses values and
        the tokens have none.
    """
    if not encoder.config.reads_values:
        ranked = ranked.without_values()
    elif ranked.values is None:
        raise ValueError(NO_VALUES)
    panel = np.unique(ranked.tokens if panel is None else panel).astype(np.int64)
    n_cells = len(ranked.n_tokens)
    lengths = padded_length(ranked.n_tokens + 1, encoder.config.max_positions)
    budget = token_budget or TOKEN_BUDGET.get(device.type, TOKEN_BUDGET["cpu"])
    result = spacious((n_cells, encoder.config.d_cell))
    encoder.to(device)

    def run(cells: NDArray[np.int64]) -> None:
        batch = TokenBatch.from_ranked(
            ranked,
            cells,
            cls_token=vocabulary.cls,
            pad_token=vocabulary.pad,
            length=int(lengths[cells[0]]),
        )
        bag = GeneBag.from_ranked(ranked, cells).to(device) if encoder.config.pooled else None
        result[cells] = encoder.embed(batch.to(device), weights, bag).float().cpu().numpy()

    with torch.inference_mode(), evaluating(encoder):
        weights = encoder.lay_out(dtype, torch.from_numpy(panel).to(device))
        batches = list(_token_batches(lengths, budget))
        for cells in progress(batches, "encode cells", "batch", show=show_progress_bar):
            _halving(run, cells, "token_budget")
    refuse_not_finite(result, device, dtype)
    return result


def _token_batches(lengths: NDArray[np.int64], budget: int) -> Iterator[NDArray[np.int64]]:
    """Rows of one padded length each, as many as the budget allows, longest first."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order])) + 1
    for rows in np.split(order, ends):
        if len(rows):
            at_once = max(1, budget // int(lengths[rows[0]]))
            yield from np.split(rows, range(at_once, len(rows), at_once))


def embed_slice(
    transformer: SE2Transformer,
    layout: SliceLayout,
    features: NDArray[np.floating],
    config: SubSliceConfig,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int | None = None,
    on_done: Callable[[int], object] | None = None,
) -> NDArray[np.float32]:
    """Embed the cells of one slice with the SE(2) Transformer, sub-slice by sub-slice.

    Sub-slices are built when their turn comes, so memory is bounded by the batch.

    Parameters
    ----------
    transformer
        The SE(2) Transformer; used in evaluation mode.
    layout
        The slice's sub-slices and virtual cells.
    features
        (n_cells, d_cell) cell embeddings.
    config
        Sub-slice rules.
    device, dtype
        Where and in which precision to compute.
    batch_size
        Sub-slices at a time; fitted to the device by default.
    on_done
        Called with the number of sub-slices after each batch.

    Returns
    -------
    (n_cells, d_model) embeddings; every cell is written exactly once.

    Raises
    ------
    MemoryError
        The device has no room for a single sub-slice.
    FloatingPointError
        The device gave NaN or infinite numbers.
    """
    at_once = batch_size or SUBSLICES_AT_ONCE.get(device.type, 1)
    parts = rows_by_subslice(layout)
    # Sub-slices of like size together: less padding.
    order = np.argsort([len(rows) for rows in parts], kind="stable")
    result = spacious((len(features), transformer.config.d_embedding))
    transformer = placed(transformer, device, dtype)

    def run(numbers: NDArray[np.int64]) -> None:
        subslices = [build_subslice(layout, features, parts[k], config) for k in numbers]
        multiple = CUDA_NODE_MULTIPLE if device.type == "cuda" else 1
        batch = SubSliceBatch.from_subslices(subslices, node_multiple=multiple)
        hidden = transformer.embed(batch.to(device)).float().cpu().numpy()
        is_cell = batch.cell_index.numpy() >= 0
        result[batch.cell_index.numpy()[is_cell]] = hidden[is_cell]
        let_go(features)
        let_go(result)
        if on_done is not None:
            on_done(len(numbers))

    with torch.inference_mode(), evaluating(transformer):
        for start in range(0, len(order), at_once):
            _halving(run, order[start : start + at_once], "n_cells of the sub-slice rules")
    refuse_not_finite(result, device, dtype)
    return result


def refuse_not_finite(
    result: NDArray[np.float32], device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse NaN, which some devices compute where the CPU does not."""
    if n_bad := count_not_finite(result):
        raise FloatingPointError(
            f"The embedding of {n_bad} of {len(result)} cells is not finite on {device} in "
            f"{str(dtype).removeprefix('torch.')}. Try dtype='float32' or device='cpu'; if that "
            "does not help, the model's weights are damaged: use another model."
        )


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Use evaluation mode and the number of threads in the settings within a block."""
    was_training = module.training
    module.eval()
    try:
        with using_threads():
            yield
    finally:
        module.train(was_training)


def placed(transformer: SE2Transformer, device: torch.device, dtype: torch.dtype) -> SE2Transformer:
    """Move the transformer to a device; another precision is a copy, so that no bit is lost.

    A transformer that is placed already is returned as it is: place it once to embed several
    slices.
    """
    transformer = transformer.to(device)
    if next(transformer.parameters()).dtype != dtype:
        transformer = copy.deepcopy(transformer)
        for name, part in transformer.named_children():
            # Distances up to 100 need more than bfloat16's three digits.
            if name != "distance_bias":
                part.to(dtype)
    return transformer


def _halving(
    run: Callable[[NDArray[np.int64]], None], items: NDArray[np.int64], option: str
) -> None:
    """Run over `items`; halve the batch as often as needed if the device runs out of memory."""
    try:
        run(items)
        return
    except RuntimeError as error:
        # torch.OutOfMemoryError on CUDA; on MPS and the CPU only the message tells.
        text = str(error)
        lacks_memory = "out of memory" in text or "can't allocate memory" in text
        if not (lacks_memory or isinstance(error, torch.OutOfMemoryError)):
            raise
    if len(items) == 1:
        raise MemoryError(
            f"The device lacks memory for the smallest batch; lower {option} or use device='cpu'."
        )
    logger.warning("Out of device memory with a batch of %d; halving it.", len(items))
    # After the failed attempt has let go of its tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for half in np.array_split(items, 2):
        _halving(run, half, option)
