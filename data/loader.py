"""The samples of each step, read ahead in ranged reads and decoded in threads. Starts at any step at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from data import storage
from data.balance import Balance
from data.batch import Sample
from data.location import Location
from data.order import EMPTY, RUN_BYTES, Ints, Plan
from data.samples import Content, Partner, Place, Rejected, SampleReader, Stretch

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
    """What one rank has for a step: its samples in the order of lanes, the rejected ones, and the seconds it
    waited for them."""

    number: int
    samples: list[Sample]
    rejected: list[Rejected]
    waited: float
    lanes: list[int] = field(default_factory=list)
    """The lane of each sample."""


@dataclass(eq=False)
class _Span:
    """A stretch of a shard that is fetched in one read, and how many members still need it."""

    location: Location
    start: int
    end: int
    uses: int = 0
    content: Future[bytes] | None = None

    def cut(self, member: Stretch) -> bytes:
        """Wait for the read, and cut a member out of it."""
        assert self.content is not None
        return self.content.result()[member.start - self.start : member.end - self.start]


@dataclass(frozen=True)
class _Reads:
    """The reads that bring a sample's audio and its text; usually the same."""

    audio: _Span
    text: _Span

    def content(self, place: Place) -> Content:
        """Wait for them, and cut the sample out."""
        return Content(self.audio.cut(place.audio), self.text.cut(place.text))


@dataclass(frozen=True)
class _Clip:
    """A clip on its way. row: its number in the index."""

    row: int
    place: Place
    reads: _Reads

    def content(self) -> Content:
        """Wait for its bytes."""
        return self.reads.content(self.place)


@dataclass(eq=False)
class _Slot:
    """A sample of a step on its way. partner: the clip that is mixed into it."""

    lane: int
    epoch: int
    clip: _Clip
    partner: _Clip | None
    sample: Future[Sample | Rejected] | None = None

    @property
    def spans(self) -> list[_Span]:
        """One for each member."""
        clips = [self.clip, self.partner] if self.partner else [self.clip]
        return [span for clip in clips for span in (clip.reads.audio, clip.reads.text)]


@dataclass
class _Coming:
    """A step on its way."""

    number: int
    slots: list[_Slot]

    @property
    def samples(self) -> list[Future[Sample | Rejected]]:
        """The samples that are being read and decoded."""
        return [slot.sample for slot in self.slots if slot.sample is not None]


class Loader(Iterator[Step]):
    """Iterates over some steps of a plan, for one rank: the samples of its lanes or, with a balance, what it
    takes of all lanes.

    All bookkeeping happens in the thread that calls `next`; threads only read and decode. A failure to read
    surfaces in `next`.
    """

    def __init__(
        self,
        reader: SampleReader,
        plan: Plan,
        lanes: range,
        steps: range,
        *,
        threads: int,
        read_ahead_mb: int,
        balance: Balance | None = None,
        read: Read = storage.read,
    ) -> None:
        """lanes: of this rank; read: gives a range of a shard, as `storage.read` does."""
        self.reader, self.plan, self.lanes, self.steps = reader, plan, lanes, steps
        self.balance = balance
        self._planned_lanes = range(balance.lanes) if balance else lanes
        self._read = read
        self.budget = read_ahead_mb << 20
        self._readers = ThreadPoolExecutor(READERS, "reader")
        self._decoders = ThreadPoolExecutor(threads, "decoder")
        self._planned: deque[_Coming] = deque()
        self._decoding: deque[_Coming] = deque()
        self._held = 0
        """Bytes read or being read."""
        self._waited = 0.0
        """Seconds that the next step was waited for."""
        self._next = steps.start
        self._epoch, self._in_epoch = plan.locate(steps.start)
        self._steps_in_epoch = plan.steps_in(self._epoch)
        self._window = range(0)
        """Steps of the epoch whose reads are planned."""
        self._rows: Ints
        """Samples of the window, (planned lanes, steps); EMPTY where another rank takes one."""
        self._partners: Ints
        """The clip that is mixed into each, EMPTY where none is."""
        self._reads: dict[int, _Reads] = {}
        """Those of the window's samples, by row; none where each sample is read by itself."""

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
        step = self._decoding.popleft()
        waited, self._waited = self._waited, 0.0
        for sample in step.samples:
            if sample.done():
                sample.result()  # an error is raised at once, however long the others would take
        done = [sample.result() for sample in step.samples]
        for slot in step.slots:
            for span in slot.spans:
                span.uses -= 1
                if span.uses == 0:
                    self._held -= span.end - span.start
                    span.content = None  # the window still holds the span
        samples = {
            slot.lane: result
            for slot, result in zip(step.slots, done, strict=True)
            if isinstance(result, Sample)
        }
        rejected = [result for result in done if isinstance(result, Rejected)]
        return Step(step.number, list(samples.values()), rejected, waited, list(samples))

    def close(self) -> None:
        """Give up what is under way."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        self._readers.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self) -> None:
        """Keep DECODE_AHEAD steps decoding, and the steps after them read as far as the budget allows."""
        while len(self._decoding) < DECODE_AHEAD and (self._planned or self._plan_step()):
            step = self._planned.popleft()
            for slot in step.slots:
                self._fetch(slot)
                slot.sample = self._decoders.submit(self._build, slot, step.number)
            self._decoding.append(step)
        while self._held < self.budget and len(self._planned) < PLAN_AHEAD and self._plan_step():
            for slot in self._planned[-1].slots:
                self._fetch(slot)

    def _fetch(self, slot: _Slot) -> None:
        for span in slot.spans:
            if span.content is None:
                self._held += span.end - span.start
                span.content = self._readers.submit(self._read, span.location, span.start, span.end)

    def _build(self, slot: _Slot, step: int) -> Sample | Rejected:
        partner = Partner(slot.partner.row, slot.partner.content()) if slot.partner else None
        return self.reader.build(slot.clip.row, slot.clip.content(), step, slot.epoch, partner)

    def _plan_step(self) -> bool:
        """Plan one more step; False at the end."""
        if self._next >= self.steps.stop:
            return False
        while self._in_epoch >= self._steps_in_epoch:
            self._epoch, self._in_epoch = self._epoch + 1, 0
            self._steps_in_epoch = self.plan.steps_in(self._epoch)
            self._window = range(0)
        if self._in_epoch not in self._window:
            self._enter_window()
        slots = []
        place = self._in_epoch - self._window.start
        rows, partners = self._rows[:, place].tolist(), self._partners[:, place].tolist()
        for lane, row, partner in zip(self._planned_lanes, rows, partners, strict=True):
            if row == EMPTY:
                continue
            planned = self._reads if lane in self.lanes else {}
            mixed_in = None if partner == EMPTY else self._clip(partner, planned)
            slots.append(_Slot(lane, self._epoch, self._clip(row, planned), mixed_in))
        self._planned.append(_Coming(self._next, slots))
        self._next += 1
        self._in_epoch += 1
        return True

    def _clip(self, row: int, planned: Mapping[int, _Reads]) -> _Clip:
        """A clip, and the reads that bring it: planned ones, else one of its own."""
        place = self.reader.place(row)
        return _Clip(row, place, planned.get(row) or _alone(place))

    def _enter_window(self) -> None:
        """Find out what this rank takes in (the rest of) a window, and plan its reads."""
        end = (self._in_epoch // self.plan.shuffle_window + 1) * self.plan.shuffle_window
        self._window = range(self._in_epoch, min(end, self._steps_in_epoch))
        self._rows = self.plan.lanes(self._epoch, self._planned_lanes, self._window)
        if self.balance:
            self._rows[~self.balance.is_taken(self._rows, self._epoch)] = EMPTY
        self._partners = self.reader.partners(self._rows, self._epoch)
        own = self._own(self._rows)
        own = own[own != EMPTY]
        partners = self._own(self._partners)
        partners = partners[partners != EMPTY]
        # Spans of a whole window stay in memory until their last sample is used; where that is too much,
        # samples are read singly.
        some = [self.reader.place(row) for row in own[:: -(-len(own) // 1000) or 1].tolist()]
        size = float(np.mean([place.end - place.start for place in some])) if some else 0.0
        is_too_much = size * len(own) > self.budget  # partners lie among them
        self._reads = {} if is_too_much else self._plan_reads(np.append(own, partners))

    def _own(self, rows: Ints) -> Ints:
        """Of the rows of all planned lanes those of this rank's."""
        first = self.lanes.start - self._planned_lanes.start
        return rows[first : first + len(self.lanes)]

    def _plan_reads(self, rows: Ints) -> dict[int, _Reads]:
        """The reads that bring some samples, (n,), by row; neighbours come in one."""
        reads: dict[int, _Reads] = {}
        wanted, times = np.unique(rows, return_counts=True)
        span, shard = None, -1
        for row, count in zip(wanted.tolist(), times.tolist(), strict=True):
            place = self.reader.place(row)
            if _scattered(place):
                reads[row] = _alone(place, count)
                continue
            if span is None or shard != place.shard or not _extends(span, place):
                span, shard = _Span(place.location, place.start, place.start), place.shard
            span.end = place.end
            span.uses += 2 * count
            reads[row] = _Reads(span, span)
        return reads


def _alone(place: Place, count: int = 1) -> _Reads:
    """The reads of one sample that is needed `count` times: one, unless its audio and its text lie far
    apart."""
    if _scattered(place):
        audio, text = place.audio, place.text
        return _Reads(_Span(place.location, *audio, count), _Span(place.location, *text, count))
    span = _Span(place.location, place.start, place.end, 2 * count)
    return _Reads(span, span)


def _scattered(place: Place) -> bool:
    """Whether much lies between a sample's audio and its text."""
    wanted = (place.audio.end - place.audio.start) + (place.text.end - place.text.start)
    return place.end - place.start > wanted + LARGEST_GAP


def _extends(span: _Span, place: Place) -> bool:
    """Whether a read goes on to a sample: it follows closely, and the read does not become too long."""
    return 0 <= place.start - span.end <= LARGEST_GAP and place.end - span.start <= 2 * RUN_BYTES
