"""Which samples an epoch takes, in which order. It follows from seed, stage and epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, overload

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.random import Generator
    from numpy.typing import NDArray

#: Number of samples whose batches are made at once.
WINDOW = 1 << 16
#: Rounds of the cipher that permutes, and an odd number that separates its keys.
_N_ROUNDS = 6
_STEP = 0x9E37_79B9_7F4A_7C15


class Purpose(IntEnum):
    """Purposes of random numbers; those of different purposes are independent."""

    ORDER = 1
    ROTATION = 2
    MASKING = 3
    CELLS = 4
    MIXTURE = 6


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How samples are drawn."""

    seed: int  # seed of the run, at least 0
    stage: int  # number of the stage in the run
    batch_size: int  # samples of a batch over all processes, at most

    @property
    def window(self) -> int:
        """Samples whose batches are made at once: whole batches, about 65,536."""
        return self.batch_size * max(1, WINDOW // self.batch_size)

    def generator(self, epoch: int, purpose: Purpose, *sample: int) -> Generator:
        """Return a sample's generator, the same in every batch, process and thread."""
        # The purpose comes before the sample: trailing zeros would not change the numbers.
        return np.random.default_rng([self.seed, self.stage, epoch, int(purpose), *sample])

    def batches(
        self, sizes: NDArray[np.integer], epoch: int, window: int = 0
    ) -> list[NDArray[np.int64]]:
        """Shuffle samples and group those of one size, so that batches hold little padding.

        Samples that do not fill a batch of their own size are combined with the next sizes. Each
        sample occurs once. `window` is the number of the samples' window.
        """
        rng = self.generator(epoch, Purpose.ORDER, window)
        shuffled = rng.permutation(len(sizes))
        by_size = shuffled[np.argsort(sizes[shuffled], kind="stable")]
        ends = np.flatnonzero(np.diff(sizes[by_size])) + 1
        batches: list[NDArray[np.int64]] = []
        left = [np.empty(0, dtype=np.int64)]
        for group in np.split(by_size, ends):
            n_in_full = len(group) - len(group) % self.batch_size
            batches.extend(group[:n_in_full].reshape(-1, self.batch_size))
            left.append(group[n_in_full:])
        rest = np.concatenate(left)
        if len(rest):
            # Nearly equal parts, because a batch of one cell has nothing to contrast it with.
            batches += np.array_split(rest, -(-len(rest) // self.batch_size))
        return [batches[k].astype(np.int64) for k in rng.permutation(len(batches))]

    def numbers(
        self, sizes: NDArray[np.int64], shares: NDArray[np.float64] | None, epoch: int
    ) -> NDArray[np.int64]:
        """Number of samples that an epoch takes of each slice, by the slices' sizes and shares."""
        if shares is None:
            return sizes
        # Fractions are rounded by chance, so that small slices have their turn.
        by_chance = self.generator(epoch, Purpose.MIXTURE).random(len(sizes))
        return np.floor(sizes * shares + by_chance).astype(np.int64)

    def cells(
        self, sizes: NDArray[np.int64], shares: NDArray[np.float64] | None, epoch: int
    ) -> tuple[int, Callable[[NDArray[np.int64]], NDArray[np.int64]]]:
        """Number of cells of an epoch, and a function from positions in its order to cells.

        Cells are numbered over all slices of these sizes. Nothing is stored for single cells.
        """
        taken = self.numbers(sizes, shares, epoch)
        ends, first = np.cumsum(taken), np.cumsum(sizes) - sizes
        n = int(ends[-1])
        key, own = self.generator(epoch, Purpose.MIXTURE, 1).integers(1 << 62, size=2)

        def find(positions: NDArray[np.int64]) -> NDArray[np.int64]:
            # One window shuffles its cells itself.
            places = permuted(positions, n, key) if n > self.window else positions
            number = np.searchsorted(ends, places, side="right")
            rows = places - (ends - taken)[number]
            if shares is not None:
                rows = permuted(rows, sizes[number], own + number)
            return first[number] + rows

        return n, find


class Batches(Sequence["NDArray[np.int64]"]):
    """Batches of an epoch of `n_samples`, made window by window.

    `make` gives those of a window, from its number and the positions of its samples in the epoch.
    """

    def __init__(
        self,
        n_samples: int,
        draws: Draws,
        make: Callable[[int, NDArray[np.int64]], list[NDArray[np.int64]]],
    ) -> None:
        self._n_samples, self._batch_size = n_samples, draws.batch_size
        size = draws.window
        self._per_window = size // draws.batch_size

        def batches(window: int) -> list[NDArray[np.int64]]:
            return make(window, np.arange(window * size, min((window + 1) * size, n_samples)))

        # Samples to train on, and samples loaded in advance.
        self._window = lru_cache(2)(batches)

    def __len__(self) -> int:
        return -(-self._n_samples // self._batch_size)

    @overload
    def __getitem__(self, number: int) -> NDArray[np.int64]: ...
    @overload
    def __getitem__(self, number: slice) -> list[NDArray[np.int64]]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[k] for k in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        window, place = divmod(number, self._per_window)
        return self._window(window)[place]


def permuted(positions: NDArray[np.int64], n: Any, key: Any) -> NDArray[np.int64]:
    """Images of some numbers under the permutation of `n` numbers that `key` determines.

    `n` and `key` are numbers, or one for each position. A Feistel network (Luby and Rackoff 1988)
    permutes the next power of four, and results beyond `n` are permuted again.
    """
    positions, n, key = np.broadcast_arrays(positions, n, key)
    found, todo = positions.astype(np.uint64), np.arange(len(positions))
    bits = np.ceil(np.log2(np.maximum(n, 2)) / 2).astype(np.uint64)
    n, key = n.astype(np.uint64), key.astype(np.uint64)
    while len(todo):
        half, mask = bits[todo], (np.uint64(1) << bits[todo]) - np.uint64(1)
        left, right = found[todo] >> half, found[todo] & mask
        for number in range(_N_ROUNDS):
            mixed = _mix(_mix(key[todo] + np.uint64(number)) + right)
            left, right = right, left ^ (mixed & mask)
        found[todo] = (left << half) | right
        todo = todo[found[todo] >= n[todo]]
    return found.astype(np.int64)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread each bit over all bits (the finalizer of SplitMix64)."""
    values = values + np.uint64(_STEP)
    for shift, factor in ((30, 0xBF58_476D_1CE4_E5B9), (27, 0x94D0_49BB_1331_11EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values ^ (values >> np.uint64(31))


def shares_of(
    slices: Sequence[Mapping[str, Any]], mixture: Mapping[str, Mapping[str, float]]
) -> NDArray[np.float64] | None:
    """Share of each slice's samples that an epoch takes, from the slices' metadata; None for all.

    `mixture` gives weights by column of the manifest and value there. A slice's weight is the
    product of those that fit it, and the largest weight has the share 1.
    """
    if not mixture:
        return None
    weights = np.ones(len(slices))
    for column, own in mixture.items():
        values = [str(one.get(column, "")) for one in slices]
        if unknown := sorted({*own} - {*values}):
            raise ValueError(
                f"mixture[{column!r}] names {unknown}, and the slices to train on have "
                f"{sorted({*values})}; correct the name or leave it out."
            )
        weights *= [own.get(value, 1.0) for value in values]
    if not weights.any():
        raise ValueError("All slices have the weight 0 by `mixture`: nothing would be trained on.")
    return np.asarray(weights / weights.max())
