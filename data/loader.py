"""The samples of each step, read ahead in ranged reads and decoded in threads. Starts at any step at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from data import storage
from data.batch import Sample
from data.location import Location
from data.order import EMPTY, RUN_BYTES, Ints, Order
from data.samples import Place, Rejected, Samples

READERS = 8
"""Ranged reads under way at a time, per rank."""
DECODE_AHEAD = 2
"""Steps whose samples are decoded before they are asked for (a 30 s clip takes 1 MB)."""
PLAN_AHEAD = 64
"""Steps that are looked at for reading ahead, at most."""
LARGEST_GAP = 64 << 10
"""Bytes between two wanted members that are read along rather than asked for separately."""
Read = Callable[[Location, int, int], bytes]


@dataclass
class Step:
    """What one rank has for a step: its samples in the order of its lanes, the rejected ones, and the seconds
    it waited for them."""

    number: int
    samples: list[Sample]
    rejected: list[Rejected]
    waited: float


@dataclass(eq=False)
class _Span:
    """A stretch of a shard that is fetched in one read, and how many samples still need it."""

    location: Location
    start: int
    end: int
    uses: int = 0
    content: Future[bytes] | None = None

    def cut(self, part: tuple[int, int]) -> bytes:
        assert self.content is not None
        return self.content.result()[part[0] - self.start : part[1] - self.start]


@dataclass(eq=False)
class _Slot:
    """A sample of a step on its way."""

    row: int
    place: Place
    spans: tuple[_Span, _Span]
    """Of the audio and of the text; usually the same."""
    sample: Future[Sample | Rejected] | None = None


@dataclass
class _Plan:
    number: int
    slots: list[_Slot] = field(default_factory=list)

    @property
    def samples(self) -> list[Future[Sample | Rejected]]:
        """Those of the slots, once they are being read and decoded."""
        return [slot.sample for slot in self.slots if slot.sample is not None]


class Loader(Iterator[Step]):
    """Iterates over some steps of an order, for the lanes of one rank.

    All bookkeeping happens in the thread that calls `next`; threads only read and decode. A failure to read
    surfaces in `next`.
    """

    def __init__(
        self,
        samples: Samples,
        order: Order,
        lanes: range,
        steps: range,
        *,
        threads: int,
        read_ahead_mb: int,
        read: Read = storage.read,
    ) -> None:
        """read: gives a range of a shard, as `storage.read` does."""
        self._read, self.samples, self.order, self.lanes, self.end = read, samples, order, lanes, steps.stop
        self.budget = read_ahead_mb << 20
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._decoders = ThreadPoolExecutor(threads, "decoder")
        self._planned: deque[_Plan] = deque()
        self._decoding: deque[_Plan] = deque()
        self._held = 0  # bytes read or being read
        self._waited = 0.0  # seconds, for the next step
        self._next = steps.start
        self._epoch, self._in_epoch = order.locate(steps.start)
        self._enter_epoch()

    def ready(self, seconds: float | None) -> bool:
        """Wait until `next` has something to give at once: the next step, the error in its place, or the end.
        False if that takes longer than `seconds`."""
        self._read_ahead()
        if not self._decoding:
            return True
        began = time.perf_counter()
        done, waiting = wait(self._decoding[0].samples, seconds, return_when=FIRST_EXCEPTION)
        self._waited += time.perf_counter() - began
        return not waiting or any(sample.exception() for sample in done)

    def __next__(self) -> Step:
        self.ready(None)
        if not self._decoding:
            self.close()
            raise StopIteration
        plan = self._decoding.popleft()
        waited, self._waited = self._waited, 0.0
        for sample in plan.samples:
            if sample.done():
                sample.result()  # an error is raised at once, however long the others would take
        done = [sample.result() for sample in plan.samples]
        for slot in plan.slots:
            for span in slot.spans:
                span.uses -= 1
                if span.uses == 0:
                    self._held -= span.end - span.start
                    span.content = None  # the lane's window still holds the span
        samples = [result for result in done if isinstance(result, Sample)]
        rejected = [result for result in done if isinstance(result, Rejected)]
        return Step(plan.number, samples, rejected, waited)

    def close(self) -> None:
        """Give up what is under way."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self) -> None:
        """Keep DECODE_AHEAD steps decoding, and the steps after them read as far as the budget allows."""
        while len(self._decoding) < DECODE_AHEAD and (self._planned or self._plan()):
            plan = self._planned.popleft()
            for slot in plan.slots:
                self._fetch(slot)
                slot.sample = self._decoders.submit(self._build, slot, plan.number)
            self._decoding.append(plan)
        while self._held < self.budget and len(self._planned) < PLAN_AHEAD and self._plan():
            for slot in self._planned[-1].slots:
                self._fetch(slot)

    def _fetch(self, slot: _Slot) -> None:
        for span in slot.spans:
            if span.content is None:
                self._held += span.end - span.start
                span.content = self._readers.submit(self._read, span.location, span.start, span.end)

    def _build(self, slot: _Slot, step: int) -> Sample | Rejected:
        audio, text = slot.spans
        return self.samples.build(slot.row, audio.cut(slot.place.audio), text.cut(slot.place.text), step)

    def _plan(self) -> bool:
        """Plan one more step; False at the end."""
        if self._next >= self.end:
            return False
        while self._in_epoch >= self._rows.shape[1]:
            self._epoch, self._in_epoch = self._epoch + 1, 0
            self._enter_epoch()
        plan = _Plan(self._next)
        for lane in range(len(self.lanes)):
            row = int(self._rows[lane, self._in_epoch])
            if row != EMPTY:
                plan.slots.append(self._slot(lane, row))
        self._planned.append(plan)
        self._next += 1
        self._in_epoch += 1
        return True

    def _enter_epoch(self) -> None:
        self._rows: Ints = self.order.lanes(self._epoch, self.lanes)
        self._windows: dict[int, tuple[int, dict[int, tuple[_Span, _Span]]]] = {}
        # Spans of a whole window stay in memory until their last sample is used; where that is too much,
        # samples are read singly.
        some = self._rows[self._rows != EMPTY][:1000]
        size = (
            np.mean([place.end - place.start for place in map(self.samples.place, some.tolist())])
            if len(some)
            else 0
        )
        self._singly = (
            size * len(self.lanes) * min(self.order.shuffle_window, self._rows.shape[1]) > self.budget
        )

    def _slot(self, lane: int, row: int) -> _Slot:
        window = self._in_epoch // self.order.shuffle_window
        if self._windows.get(lane, (-1, {}))[0] != window:
            end = (window + 1) * self.order.shuffle_window
            self._windows[lane] = window, self._spans(self._rows[lane, self._in_epoch : end])
        return _Slot(row, self.samples.place(row), self._windows[lane][1][row])

    def _spans(self, rows: Ints) -> dict[int, tuple[_Span, _Span]]:
        """The reads that bring the samples of (the rest of) a lane's window: row -> spans of its audio and
        its text."""
        wanted, times = np.unique(rows[rows != EMPTY], return_counts=True)
        spans: dict[int, tuple[_Span, _Span]] = {}
        last, last_shard = None, -1
        for row, uses in zip(wanted.tolist(), times.tolist(), strict=True):
            place = self.samples.place(row)
            scattered = (
                place.end - place.start
                > place.audio[1] - place.audio[0] + place.text[1] - place.text[0] + LARGEST_GAP
            )
            if scattered:
                audio, text = (
                    _Span(place.location, *place.audio, uses),
                    _Span(place.location, *place.text, uses),
                )
                spans[row] = audio, text
                continue
            near = (
                last is not None
                and last_shard == place.shard
                and 0 <= place.start - last.end <= LARGEST_GAP
                and place.end - last.start <= 2 * RUN_BYTES
            )
            if last is None or not near or self._singly:
                last, last_shard = _Span(place.location, place.start, place.end), place.shard
            last.end = place.end
            last.uses += 2 * uses
            spans[row] = last, last
        return spans
