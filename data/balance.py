"""Balance between ranks: which of a step's samples a rank computes. The batch, and so the training, stays as
it is: a sample's loss does not depend on where it is computed, and moving a few keeps ranks from waiting.

The samples of a step begin with the ranks that own their lanes. From the fullest rank to the emptiest one
after another moves, as long as that helps. All ranks know the work of all samples, and come to the same
result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from configs.schema import RunConfig
from data.order import EMPTY, Ints, rank_lanes

EVEN = 1.03
"""The fullest rank is full enough below this multiple of the mean: closer than that, what a sample really
takes is not known."""
STEPS_TOGETHER = 256
"""Steps that are dealt at a time, at most: their arrays stay in the processor's cache."""
NO_MOVE = np.iinfo(np.int64).max
Work = Callable[[Ints, int], Ints]
"""Work of samples, (n,), from their rows in the index, (n,), and the epoch. Whole numbers, whose sums are
the same on every machine; only their ratios matter."""


def deal(work: Ints, ranks: int) -> Ints:
    """The rank that takes each sample of some steps: (lanes, steps), from the work of each, (lanes, steps),
    0 where there is none. A step's result depends on its own work and the number of ranks alone."""
    lanes, steps = work.shape
    share = [rank_lanes(rank, ranks, lanes) for rank in range(ranks)]
    costs = np.ascontiguousarray(work.T)
    takers = np.tile(np.repeat(np.arange(ranks), [len(own) for own in share]), (steps, 1))
    loads = np.stack([costs[:, own.start : own.stop].sum(axis=1) for own in share], axis=1)
    enough = EVEN * loads.sum(axis=1) / ranks
    uneven = np.flatnonzero(loads.max(axis=1) > enough)
    while len(uneven):
        fullest, emptiest = loads[uneven].argmax(axis=1), loads[uneven].argmin(axis=1)
        gap = loads[uneven, fullest] - loads[uneven, emptiest]
        cost = costs[uneven]
        helps = (takers[uneven] == fullest[:, None]) & (cost > 0) & (cost < gap[:, None])
        # What halves the gap would be best.
        misfit = np.where(helps, np.abs(2 * cost - gap[:, None]), NO_MOVE)
        lane = misfit.argmin(axis=1)
        can_move = misfit.min(axis=1) < NO_MOVE
        uneven, lane, fullest, emptiest = (of_step[can_move] for of_step in (uneven, lane, fullest, emptiest))
        moved = costs[uneven, lane]
        takers[uneven, lane] = emptiest
        loads[uneven, fullest] -= moved
        loads[uneven, emptiest] += moved
        uneven = uneven[loads[uneven].max(axis=1) > enough[uneven]]
    return takers.T


@dataclass(frozen=True)
class Balance:
    """What a rank takes of steps of `lanes` samples, where `work` knows them all."""

    work: Work
    rank: int
    ranks: int
    lanes: int

    def is_taken(self, rows: Ints, epoch: int) -> npt.NDArray[np.bool_]:
        """Whether this rank takes a sample: (lanes, steps), from the rows of all lanes in some steps of an
        epoch, (lanes, steps), EMPTY where there is none."""
        taken = np.zeros(rows.shape, bool)
        for start in range(0, rows.shape[1], STEPS_TOGETHER):
            stretch = rows[:, start : start + STEPS_TOGETHER]
            is_there = stretch != EMPTY
            work = np.zeros(stretch.shape, np.int64)
            work[is_there] = self.work(stretch[is_there], epoch)
            taken[:, start : start + STEPS_TOGETHER] = is_there & (deal(work, self.ranks) == self.rank)
        return taken


def is_possible(config: RunConfig, ranks: int) -> bool:
    """Whether ranks can be evened out: there are several, clips differ in work, and a rank has more than one
    of them to give."""
    return _clips_differ(config) and 1 < ranks < config.batch.global_size


def remark_on_balance(config: RunConfig, ranks: int) -> str:
    """What to say where ranks have about one sample each, and so nothing to even them out with; empty
    otherwise."""
    size = config.batch.global_size
    if not _clips_differ(config) or ranks == 1 or size >= 2 * ranks:
        return ""
    return (
        f"one sample for each of {ranks} processes (batch.global_size={size}): at every step all wait for the"
        " one with the longest clip, about twice the mean on clips of mixed lengths. A larger"
        f" batch.global_size would help: with {4 * ranks}, four each, clips are moved between them until they"
        " are nearly even"
    )


def _clips_differ(config: RunConfig) -> bool:
    """Whether a clip's work depends on its length."""
    return config.data.window == "own" and config.data.full_share < 1
