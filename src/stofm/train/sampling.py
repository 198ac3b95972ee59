"""Epochs: which cells and sub-slices make a batch, and in which order."""

from __future__ import annotations

import threading
from collections import OrderedDict
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from stofm.nn.inference import padded_length
from stofm.spatial import canonical_order, partition_balanced, partition_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from stofm.spatial import SubSliceConfig
    from stofm.train.corpus import Corpus

#: A sub-slice's number in its slice takes the lower bits of a sample's number.
_PART_BITS = 32
_SIZE_CLASSES_PER_OCTAVE = 4
#: Epochs whose cuts are kept: the present one, and the next, which is loaded ahead.
_EPOCHS_KEPT = 2


class Purpose(IntEnum):
    """What random numbers are drawn for; numbers of different purposes are independent."""

    ORDER = 1
    ROTATION = 2
    MASKING = 3
    CELLS = 4
    GENES = 5


def generator(seed: int, stage: int, epoch: int, purpose: Purpose, *sample: int) -> Generator:
    """Random numbers of one sample, whatever batch, process or thread asks for them.

    Parameters
    ----------
    seed
        Seed of the run, at least 0.
    stage
        Number of the stage in the run.
    epoch
        Number of the epoch in the stage.
    purpose
        What is drawn.
    sample
        What it is drawn for.
    """
    # The purpose comes before the sample: trailing zeros would not change the numbers.
    return np.random.default_rng([seed, stage, epoch, int(purpose), *sample])


def epoch_of_cells(
    corpus: Corpus, *, batch_size: int, max_length: int, rng: Generator
) -> list[NDArray[np.int64]]:
    """Batches that take each cell of a corpus once.

    Parameters
    ----------
    corpus
        The slices.
    batch_size
        Cells of a batch over all processes, at most.
    max_length
        Longest input of the cell encoder, ``<cls>`` counted.
    rng
        Draws the order.

    Returns
    -------
    Numbers of cells. Most batches hold cells of one padded length.
    """
    return batches_of_like_size(
        batch_length(corpus.cell_lengths, max_length), batch_size=batch_size, rng=rng
    )


def batch_length(n_tokens: NDArray[np.integer], max_length: int) -> NDArray[np.int64]:
    """Padded length of cells with `n_tokens` gene tokens, ``<cls>`` counted."""
    length = np.minimum(n_tokens.astype(np.int64) + 1, max_length)
    padded: NDArray[np.int64] = np.minimum(padded_length(length), max_length)
    return padded


def size_class(sizes: NDArray[np.number]) -> NDArray[np.int64]:
    """Class of like sizes, at most 19 % apart."""
    octaves = np.log2(np.maximum(sizes, 1))
    found: NDArray[np.int64] = np.round(octaves * _SIZE_CLASSES_PER_OCTAVE).astype(np.int64)
    return found


def batches_of_like_size(
    sizes: NDArray[np.integer], *, batch_size: int, rng: Generator
) -> list[NDArray[np.int64]]:
    """Shuffle samples and group those of one size, so that batches hold little padding.

    What does not fill a batch of its own size is put together with the next sizes.

    Parameters
    ----------
    sizes
        (n_samples,) size, or class of size.
    batch_size
        Samples of a batch, at most.
    rng
        Draws which samples are together, and the order of the batches.

    Returns
    -------
    Numbers of samples; each occurs once.
    """
    if batch_size < 1:
        msg = f"batch_size must be at least 1, found {batch_size}."
        raise ValueError(msg)
    shuffled = rng.permutation(len(sizes))
    by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    ends = np.flatnonzero(np.diff(sizes[by_size])) + 1
    full: list[NDArray[np.int64]] = []
    left = [np.empty(0, dtype=np.int64)]
    for group in np.split(by_size, ends):
        n_full = len(group) // batch_size
        full.extend(group[: n_full * batch_size].reshape(n_full, batch_size))
        left.append(group[n_full * batch_size :])
    rest = np.concatenate(left)
    # Nearly equal parts: a batch of one cell has nothing to contrast it with.
    mixed = np.array_split(rest, -(-len(rest) // batch_size)) if len(rest) else []
    batches = [*full, *mixed]
    return [batches[k].astype(np.int64) for k in rng.permutation(len(batches))]


class SubSliceSampler:
    """Cuts the slices of a corpus into sub-slices, for every epoch anew if they are to vary.

    A sample's number holds the slice and the sub-slice in it, so that it stands for the same
    slice in every epoch. To vary them, the plane is turned by a random angle before a slice is
    cut; a slice that fits into one sub-slice stays as it is.

    Parameters
    ----------
    coordinates
        (n_cells, 2) coordinates of each slice, model units.
    config
        Gives the partition and the number of cells of a sub-slice.
    vary
        Cut anew in every epoch.
    seed, stage
        Of the random angles.
    """

    def __init__(
        self,
        coordinates: Sequence[NDArray[np.float64]],
        config: SubSliceConfig,
        *,
        vary: bool,
        seed: int,
        stage: int,
    ) -> None:
        self._coordinates = coordinates
        self._config = config
        self.vary = vary
        self._seed = seed
        self._stage = stage
        self._cuts: OrderedDict[tuple[int, int], list[NDArray[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def epochs_differ_in_length(self) -> bool:
        """Whether the number of sub-slices may differ between epochs."""
        return self.vary and self._config.partition != "balanced"

    def samples(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of all sub-slices of an epoch, slice after slice."""
        parts = [self._n_parts(k, epoch) for k in range(len(self._coordinates))]
        return np.concatenate(
            [(k << _PART_BITS) + np.arange(n, dtype=np.int64) for k, n in enumerate(parts)]
        )

    def epoch(self, epoch: int, *, batch_size: int, rng: Generator) -> list[NDArray[np.int64]]:
        """Batches that take each sub-slice of an epoch once, like sizes together."""
        samples = self.samples(epoch)
        number, _ = self.locate(samples)
        sizes = np.array([len(xy) for xy in self._coordinates])[number]
        # Parts of a slice are of nearly equal size.
        mean = sizes / np.bincount(number)[number]
        found = batches_of_like_size(size_class(mean), batch_size=batch_size, rng=rng)
        return [samples[batch] for batch in found]

    @staticmethod
    def locate(samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each sample's slice, and its number there."""
        return samples >> _PART_BITS, samples & ((1 << _PART_BITS) - 1)

    def cells(self, sample: int, epoch: int) -> NDArray[np.int64]:
        """Rows of a sub-slice's cells in its slice, ascending."""
        number, part = sample >> _PART_BITS, sample & ((1 << _PART_BITS) - 1)
        return self._cut(number, epoch)[part]

    def _n_parts(self, number: int, epoch: int) -> int:
        if self._config.partition == "balanced":
            return -(-len(self._coordinates[number]) // self._config.n_cells)
        return len(self._cut(number, epoch))

    def _cut(self, number: int, epoch: int) -> list[NDArray[np.int64]]:
        key = (epoch if self.vary else 0, number)
        with self._lock:
            found = self._cuts.get(key)
            if found is None:
                found = self._cuts[key] = cut_slice(
                    self._coordinates[number], self._config, angle=self._angle(*key)
                )
                while len(self._cuts) > _EPOCHS_KEPT * len(self._coordinates):
                    self._cuts.popitem(last=False)
        return found

    def _angle(self, epoch: int, number: int) -> float:
        if not self.vary:
            return 0.0
        rng = generator(self._seed, self._stage, epoch, Purpose.ROTATION, number)
        return float(rng.uniform(0.0, 2 * np.pi))


def cut_slice(
    coordinates: NDArray[np.float64], config: SubSliceConfig, *, angle: float = 0.0
) -> list[NDArray[np.int64]]:
    """Cut a slice into sub-slices after turning it.

    Parameters
    ----------
    coordinates
        (n, 2) model units.
    config
        Gives the partition and the number of cells.
    angle
        Radians, counter-clockwise.

    Returns
    -------
    Rows of each sub-slice, ascending; each row occurs once.
    """
    xy = np.asarray(coordinates)
    if angle:
        cosine, sine = np.cos(angle), np.sin(angle)
        xy = xy @ np.array([[cosine, sine], [-sine, cosine]])
    if config.partition == "reference":
        return partition_reference(xy, config.n_cells)
    order = canonical_order(coordinates, np.empty((len(xy), 0)))
    return [np.sort(order[rows]) for rows in partition_balanced(xy[order], config.n_cells)]
