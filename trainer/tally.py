"""What comes of the samples of an attempt, over all ranks: a run that learns nothing must not go on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from configs.schema import RunConfig
from data.order import Order
from data.tolerance import FEW, too_many_bad

FEW_TOO_LONG = 32
"""So many samples are not all too long by chance, where half of them may be."""
FEW_OF_SOURCE = 100
"""So many samples of a source are not all unusable by chance, be most of it too long."""
WINDOW = 100
"""Steps of which at most half may be empty slots."""


@dataclass(frozen=True)
class Complaint:
    """Why a run must not go on as it is."""

    what: str
    source: str = ""
    """The one that it is about; empty: all."""
    only_bad: bool = False
    """Whether samples that the configuration leaves out have nothing to do with it."""


@dataclass
class Counts:
    """Samples of the steps since some point; what the order itself leaves empty does not count."""

    usable: float = 0
    seen: float = 0

    def add(self, usable: float, unusable: float) -> None:
        """Count those of a step."""
        self.usable += usable
        self.seen += usable + unusable


class Tally:
    """Counts samples from the beginning of each epoch, the first time from that of the attempt. So one bad
    clip of few is the same share in any number of epochs.

    All ranks count the same: sums over all of them.
    """

    def __init__(
        self, config: RunConfig, order: Order, sizes: Sequence[int], first_step: int, total_steps: int
    ) -> None:
        """sizes: samples that each source has to train on; first_step: steps taken before this attempt."""
        self._config, self._order = config, order
        self._steps_left, self._is_whole_run = total_steps - first_step, first_step == 0
        self._passes = [
            size * max(1, math.ceil(passes)) for passes, size in zip(order.weights, sizes, strict=True)
        ]
        """By source: samples from the beginning of an epoch on, among which each comes once at least."""
        self._epoch, steps_before = order.locate(first_step)
        self._left_in_epoch = order.steps_in(self._epoch) - steps_before
        self._is_from_beginning = steps_before == 0
        """Whether counting began with an epoch."""
        self._all, self._bad = Counts(), 0.0
        self._by_source = [Counts() for _ in sizes]
        """Not begun anew with each epoch, as one may hold a part of a source only."""
        self._last_steps: deque[Counts] = deque(maxlen=WINDOW)

    def add(self, usable: Sequence[float], unusable: Sequence[float], bad: float) -> Complaint | None:
        """Count a step before it is taken; what there is to complain of, if there is. usable, unusable: its
        samples by source; bad: those of the unusable ones that have bad content."""
        if not self._left_in_epoch:
            self._begin_epoch()
        self._left_in_epoch -= 1
        self._steps_left -= 1
        self._last_steps.append(Counts(sum(usable), sum(usable) + sum(unusable)))
        self._all.add(sum(usable), sum(unusable))
        self._bad += bad
        for counts, of_source in zip(self._by_source, zip(usable, unusable, strict=True), strict=True):
            counts.add(*of_source)
        return self._nothing() or self._too_many_bad() or self._nothing_of_a_source() or self._mostly_empty()

    def _begin_epoch(self) -> None:
        self._epoch += 1
        self._left_in_epoch = self._order.steps_in(self._epoch)
        self._all, self._bad = Counts(), 0.0
        if not self._is_from_beginning:
            self._by_source = [Counts() for _ in self._by_source]
        self._is_from_beginning = True

    def _nothing(self) -> Complaint | None:
        """Nothing usable at the beginning, or in the whole of a short run."""
        seen = self._all.seen
        few = FEW if self._bad == seen else FEW_TOO_LONG
        is_over = self._is_over and not self._has_learnt
        if self._all.usable or not seen or (seen < self._enough(few, sum(self._passes)) and not is_over):
            return None
        where = f"epoch {self._epoch + 1}" if self._is_from_beginning else "this attempt"
        return Complaint(f"none of the first {seen:.0f} samples of {where} can be used")

    @property
    def _is_over(self) -> bool:
        """Whether this is the last step of a run, all of which was counted."""
        return self._is_whole_run and not self._steps_left

    @property
    def _has_learnt(self) -> bool:
        return any(counts.usable for counts in self._by_source)

    def _too_many_bad(self) -> Complaint | None:
        allowed = self._config.data.max_bad_fraction
        if not too_many_bad(self._bad, self._all.seen, allowed):
            return None
        return Complaint(
            f"{self._bad:.0f} of {self._all.seen:.0f} samples could not be used, more than"
            f" data.max_bad_fraction={allowed:g} allows",
            only_bad=True,
        )

    def _nothing_of_a_source(self) -> Complaint | None:
        """Nothing usable of a source; of one with a small weight few samples may come in a whole run."""
        few = FEW if self._is_over else FEW_OF_SOURCE
        for source, counts, one_pass in zip(
            self._config.data.sources, self._by_source, self._passes, strict=True
        ):
            if not counts.usable and counts.seen >= self._enough(few, one_pass):
                return Complaint(
                    f"source {source.name}: none of its first {counts.seen:.0f} samples can be used",
                    source=source.name,
                )
        return None

    def _mostly_empty(self) -> Complaint | None:
        """More slots of the last steps empty than not."""
        seen = sum(counts.seen for counts in self._last_steps)
        empty = seen - sum(counts.usable for counts in self._last_steps)
        if len(self._last_steps) < WINDOW or 2 * empty <= seen:
            return None
        return Complaint(
            f"{empty:.0f} of {seen:.0f} samples of the last {WINDOW} steps could not be used: steps are"
            f" {1 - empty / seen:.0%} of what batch.global_size={self._config.batch.global_size} asks for"
        )

    def _enough(self, few: int, one_pass: int) -> int:
        """Samples that may not all be unusable: few, or all that there are."""
        return min(few, one_pass) if self._is_from_beginning else few
