"""Which sample comes when: a pure function of (index, seed, epoch, global batch, weights), the same for any
number of ranks.

An epoch is a sequence of *runs* (consecutive samples of a shard, one ranged read) in random order. It is cut
into as many *lanes* as a global batch has samples; batch `s` is the `s`-th sample of every lane. A rank owns
neighbouring lanes. So the position of the whole job is one integer, the global step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

ORDER_VERSION = 2
"""Version of the order. One that puts samples, or their crops, in other places gets the next number: a run
that goes on from a checkpoint is told, and asked."""
RUN_BYTES = 5 << 20
"""Bytes after which a run ends: one ranged read of this size hides the latency of object storage."""
RUNS_PER_LANE = 16
"""Runs are shorter where a lane would have fewer of them per epoch, so that small data sets mix well."""
EMPTY = -1
"""Slot without a sample."""
READ_TOGETHER = 64
"""Samples of a list whose reads are put together where they are neighbours."""
SHUFFLE_RUNS, SHUFFLE_LANE, CYCLE, CROP, WHOLE, CAPTION, STYLE = 1, 2, 3, 4, 5, 6, 7
GAIN, NOISE, NOISE_SNR, NOISE_BITS, SPEED, MIX, PARTNER, MASKS, LISTEN = 8, 9, 10, 11, 12, 13, 14, 15, 16
"""Purposes of random keys."""


def random_keys(count: int, seed: int, *purpose: int, first: int = 0) -> Keys:
    """Random 64-bit keys, (count,), which depend on `seed` and `purpose` alone: those from number `first` on.

    They are the same in every version of numpy, which promises the raw stream of PCG64 and what SeedSequence
    makes of a seed, but not how a Generator permutes or draws.
    """
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=purpose))
    return bits.advance(first).random_raw(count)


def hashed(rows: npt.ArrayLike, seed: int, *purpose: int) -> Keys:
    """A random 64-bit key for each row, (n,), which depends on `seed`, `purpose` and the row alone (the
    finalizer of SplitMix64)."""
    keys = np.asarray(rows).astype(np.uint64) + random_keys(1, seed, *purpose)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def is_chosen(rows: npt.ArrayLike, share: float, seed: int, *purpose: int) -> npt.NDArray[np.bool_]:
    """Whether a row is one of a share of all, (n,): by `seed`, `purpose` and the row alone."""
    keys = hashed(rows, seed, *purpose)
    return (keys < np.uint64(min(share * 2.0**64, 2**64 - 1))) | (share >= 1)


def uniform(rows: npt.ArrayLike, seed: int, *purpose: int) -> npt.NDArray[np.float64]:
    """A random number from 0 to (but not) 1 for each row, (n,): by `seed`, `purpose` and the row alone."""
    return fractions(hashed(rows, seed, *purpose))


def fractions(keys: Keys) -> npt.NDArray[np.float64]:
    """Random keys -> random numbers from 0 to (but not) 1."""
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53


def cut_runs(shard: npt.ArrayLike, size: npt.ArrayLike, global_batch: int) -> Ints:
    """Cut samples into runs of neighbours in one shard.

    shard, size: (n,) shard number and bytes of each sample in the order of the index. Returns (r + 1,)
    boundaries: run `i` holds samples [b[i], b[i + 1]).
    """
    shards, sizes = np.asarray(shard), np.asarray(size, np.int64)
    if not len(sizes):
        return np.zeros(1, np.int64)
    limit = max(1, min(RUN_BYTES, int(sizes.sum()) // (RUNS_PER_LANE * global_batch)))
    before = np.cumsum(sizes)
    before -= sizes
    first = np.flatnonzero(np.r_[True, shards[1:] != shards[:-1]])
    last = np.r_[first[1:], len(sizes)] - 1
    # Runs of a shard after its first one; the k-th of them begins where k times the limit is reached.
    more = (before[last] - before[first]) // limit
    k = np.arange(1, more.sum() + 1) - np.repeat(np.cumsum(more) - more, more)
    later = np.searchsorted(before, np.repeat(before[first], more) + limit * k)
    return np.unique(np.r_[first, later, len(sizes)]).astype(np.int64)


class Plan(Protocol):
    """Which samples come when: what a loader asks for, be it a run's order or a list."""

    @property
    def shuffle_window(self) -> int:
        """Steps of an epoch whose samples are read in as few requests as can be."""

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a step."""

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch."""

    def lanes(self, epoch: int, lanes: range, steps: range | None = None) -> Ints:
        """Samples of some lanes in some steps of an epoch, by default all: (len(lanes), len(steps)), EMPTY
        where there is none."""


@dataclass(frozen=True)
class Listed:
    """Samples as they are listed, once: each step has the next `width` of them, one for each lane."""

    rows: Sequence[int]
    width: int

    @property
    def steps(self) -> int:
        """Steps until all samples have come; the last one may have empty slots."""
        return -(-len(self.rows) // self.width)

    @property
    def shuffle_window(self) -> int:
        """Steps whose samples are read in as few requests as can be; nothing is shuffled."""
        return max(1, READ_TOGETHER // self.width)

    def locate(self, step: int) -> tuple[int, int]:
        """There is one epoch."""
        return 0, step

    def steps_in(self, epoch: int) -> int:
        """All of them."""
        return self.steps

    def lanes(self, epoch: int, lanes: range, steps: range | None = None) -> Ints:
        """Samples of some lanes in some steps, by default all: (len(lanes), len(steps)), EMPTY where the last
        step has none."""
        steps = range(self.steps) if steps is None else steps
        rows = self.rows[steps.start * self.width : steps.stop * self.width]
        slots = np.full(len(steps) * self.width, EMPTY, np.int64)
        slots[: len(rows)] = rows
        return slots.reshape(len(steps), self.width).T[lanes.start : lanes.stop]


@dataclass(frozen=True)
class _Queue:
    """The samples of an epoch, run after run in the order of the shuffled runs.

    shift: (r,) first sample of each run, less its first place in the queue; ends: (r,) place after its last.
    """

    shift: Ints
    ends: Ints

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def samples(self, places: Ints) -> Ints:
        """The samples at some places, (n,)."""
        return self.shift[np.searchsorted(self.ends, places, "right")] + places


@dataclass(frozen=True)
class Order:
    """The order of the samples of a run.

    runs: (r + 1,) boundaries from `cut_runs`; run_source: (r,) source number of each run; weights: passes per
    epoch by source.
    """

    runs: Ints
    run_source: Ints
    weights: Sequence[float]
    seed: int
    global_batch: int
    shuffle_window: int
    base_step: int = 0
    """Global step at which this order begins; later than 0 for a run whose data were changed on purpose."""
    base_epoch: int = 0
    """The epoch that begins there."""
    _queues: dict[int, _Queue] = field(default_factory=dict, init=False, repr=False, compare=False)
    """That of the epoch whose lanes were asked for last, by epoch."""

    def samples_in(self, epoch: int) -> int:
        """Samples of an epoch."""
        return int(self._lengths()[self._runs_in(epoch)].sum())

    def steps_in(self, epoch: int) -> int:
        """Steps of an epoch; the last one may have empty slots."""
        return -(-self.samples_in(epoch) // self.global_batch)

    def steps_of(self, epochs: float) -> int:
        """Global step at which the first `epochs` passes are done; a part of an epoch is rounded up."""
        whole = int(epochs)
        steps = self.base_step + sum(self.steps_in(epoch) for epoch in range(self.base_epoch, whole))
        part = epochs - whole
        if part and whole >= self.base_epoch:
            steps += int(np.ceil(part * self.steps_in(whole)))
        return steps

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step in that epoch) of a global step from `base_step` on."""
        step, epoch = step - self.base_step, self.base_epoch
        while step >= (steps := self.steps_in(epoch)):
            step -= steps
            epoch += 1
        return epoch, step

    def lanes(self, epoch: int, lanes: range, steps: range | None = None) -> Ints:
        """Samples of some lanes in some steps of an epoch, by default all: (len(lanes), len(steps)), EMPTY
        where a lane is one shorter."""
        queue = self._queue(epoch)
        if steps is None:
            steps = range(-(-len(queue) // self.global_batch))
        window = self.shuffle_window
        whole_windows = range(steps.start // window * window, -(-steps.stop // window) * window)
        out = np.full((len(lanes), len(steps)), EMPTY, np.int64)
        for row, lane in enumerate(lanes):
            begin, end = (number * len(queue) // self.global_batch for number in (lane, lane + 1))
            places = np.arange(begin + whole_windows.start, min(begin + whole_windows.stop, end))
            samples = self._shuffled(queue.samples(places), epoch, lane, whole_windows.start)
            samples = samples[steps.start - whole_windows.start :][: len(steps)]
            out[row, : len(samples)] = samples
        return out

    def _shuffled(self, stretch: Ints, epoch: int, lane: int, first: int) -> Ints:
        """Shuffle a stretch of a lane, which begins at its sample `first`, inside windows of `shuffle_window`
        samples."""
        window = min(self.shuffle_window, max(1, len(stretch)))
        # A short last window is filled up with the largest key, which a stable sort leaves at the end.
        keys = np.full((-(-len(stretch) // window), window), np.iinfo(np.uint64).max, np.uint64)
        keys.flat[: len(stretch)] = random_keys(
            len(stretch), self.seed, SHUFFLE_LANE, epoch, lane, first=first
        )
        places = keys.argsort(axis=1, kind="stable") + window * np.arange(len(keys))[:, None]
        return stretch[places.ravel()[: len(stretch)]]

    def _queue(self, epoch: int) -> _Queue:
        if epoch not in self._queues:
            runs = self._runs_in(epoch)
            runs = runs[random_keys(len(runs), self.seed, SHUFFLE_RUNS, epoch).argsort(kind="stable")]
            lengths = self._lengths()[runs]
            ends = np.cumsum(lengths)
            self._queues.clear()
            self._queues[epoch] = _Queue(self.runs[runs] - (ends - lengths), ends)
        return self._queues[epoch]

    def _runs_in(self, epoch: int) -> Ints:
        """Runs of an epoch, unshuffled: each `floor(weight)` times, and of the rest the epoch's slice of a
        fixed cycle through all runs."""
        chosen = []
        for source, weight in enumerate(self.weights):
            runs = np.flatnonzero(self.run_source == source)
            whole = int(weight)
            chosen += [runs] * whole
            if part := weight - whole:
                cycle = runs[random_keys(len(runs), self.seed, CYCLE, source).argsort(kind="stable")]
                start, end = round(epoch * part * len(runs)), round((epoch + 1) * part * len(runs))
                chosen.append(cycle[np.arange(start, end) % len(runs)])
        return np.concatenate(chosen).astype(np.int64)

    def _lengths(self) -> Ints:
        return np.diff(self.runs)


def rank_lanes(rank: int, world_size: int, global_batch: int) -> range:
    """The lanes of a rank: contiguous, as even as can be."""
    return range(rank * global_batch // world_size, (rank + 1) * global_batch // world_size)
