"""Epochs: which cells and sub-slices make a batch, in which order, and what is drawn for each.

All random numbers of a sample come from the seed, the stage, the epoch and the sample's own
number, so that it does not matter which batch, process or thread loads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stofm._config import require
from stofm.nn.inference import padded_length
from stofm.spatial import canonical_order, partition_balanced, partition_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator
    from numpy.typing import NDArray

    from stofm.spatial import SubSliceConfig

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


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What samples are drawn by.

    Attributes
    ----------
    seed
        Seed of the run, at least 0.
    stage
        Number of the stage in the run.
    batch_size
        Samples of a batch over all processes, at most.
    """

    seed: int
    stage: int
    batch_size: int

    def __post_init__(self) -> None:
        """Check each value."""
        require(self, "must be at least 0", lambda value: value >= 0, "seed", "stage")
        require(self, "must be at least 1", lambda value: value >= 1, "batch_size")

    def generator(self, epoch: int, purpose: Purpose, *sample: int) -> Generator:
        """Random numbers of one sample, whatever batch, process or thread asks for them."""
        # The purpose comes before the sample: trailing zeros would not change the numbers.
        return np.random.default_rng([self.seed, self.stage, epoch, int(purpose), *sample])


def draw_batches(draws: Draws, sizes: NDArray[np.integer], epoch: int) -> list[NDArray[np.int64]]:
    """Batches of an epoch that hold samples of like size."""
    rng = draws.generator(epoch, Purpose.ORDER)
    return batches_of_like_size(sizes, batch_size=draws.batch_size, rng=rng)


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

    What does not fill a batch of its own size is put together with the next sizes. Each sample
    occurs once.
    """
    if batch_size < 1:
        msg = f"batch_size must be at least 1, found {batch_size}."
        raise ValueError(msg)
    shuffled = rng.permutation(len(sizes))
    by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
    ends = np.flatnonzero(np.diff(sizes[by_size])) + 1
    batches: list[NDArray[np.int64]] = []
    left = [np.empty(0, dtype=np.int64)]
    for group in np.split(by_size, ends):
        n_full = len(group) // batch_size
        batches.extend(group[: n_full * batch_size].reshape(n_full, batch_size))
        left.append(group[n_full * batch_size :])
    rest = np.concatenate(left)
    if len(rest):
        # Nearly equal parts: a batch of one cell has nothing to contrast it with.
        batches += np.array_split(rest, -(-len(rest) // batch_size))
    return [batches[k].astype(np.int64) for k in rng.permutation(len(batches))]


class SubSliceSampler:
    """Cuts the slices of a corpus into sub-slices, for every epoch anew if they are to vary.

    A sample's number holds the slice and the sub-slice in it, so that it stands for the same
    slice in every epoch. To vary them, the plane is turned by a random angle before a slice is
    cut; a slice that fits into one sub-slice stays as it is.
    """

    def __init__(
        self,
        coordinates: Sequence[NDArray[np.float64]],
        config: SubSliceConfig,
        draws: Draws,
        *,
        vary: bool,
    ) -> None:
        self._coordinates = coordinates
        self._config = config
        self._draws = draws
        self.vary = vary
        self._cut = lru_cache(_EPOCHS_KEPT * len(coordinates))(self._cut_anew)

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

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Batches that take each sub-slice of an epoch once, like sizes together."""
        samples = self.samples(epoch)
        number, _ = self.locate(samples)
        sizes = np.array([len(xy) for xy in self._coordinates])[number]
        # Parts of a slice are of nearly equal size.
        mean = sizes / np.bincount(number)[number]
        return [samples[batch] for batch in draw_batches(self._draws, size_class(mean), epoch)]

    @staticmethod
    def locate(samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each sample's slice, and its number there."""
        return samples >> _PART_BITS, samples & ((1 << _PART_BITS) - 1)

    def cells(self, sample: int, epoch: int) -> NDArray[np.int64]:
        """Rows of a sub-slice's cells in its slice, ascending."""
        number, part = sample >> _PART_BITS, sample & ((1 << _PART_BITS) - 1)
        return self._cut(number, epoch if self.vary else 0)[part]

    def _n_parts(self, number: int, epoch: int) -> int:
        if self._config.partition == "balanced":
            return -(-len(self._coordinates[number]) // self._config.n_cells)
        return len(self._cut(number, epoch if self.vary else 0))

    def _cut_anew(self, number: int, epoch: int) -> list[NDArray[np.int64]]:
        angle = 0.0
        if self.vary:
            rng = self._draws.generator(epoch, Purpose.ROTATION, number)
            angle = float(rng.uniform(0.0, 2 * np.pi))
        return cut_slice(self._coordinates[number], self._config, angle=angle)


def cut_slice(
    coordinates: NDArray[np.float64], config: SubSliceConfig, *, angle: float = 0.0
) -> list[NDArray[np.int64]]:
    """Turn a slice by an angle in radians and cut it: rows of each sub-slice, ascending."""
    xy = np.asarray(coordinates)
    if angle:
        cosine, sine = np.cos(angle), np.sin(angle)
        xy = xy @ np.array([[cosine, sine], [-sine, cosine]])
    if config.partition == "reference":
        return partition_reference(xy, config.n_cells)
    order = canonical_order(coordinates, np.empty((len(xy), 0)))
    return [np.sort(order[rows]) for rows in partition_balanced(xy[order], config.n_cells)]
