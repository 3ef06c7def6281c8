"""Where a run's time went: the clock of the attempt at work, and what the ledger tells of all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from configs.run.events import (
    AttemptBegan,
    CheckpointSaved,
    Ended,
    Event,
    Progress,
    Submitted,
    TrainingBegan,
    TrainingEnded,
)
from configs.run.ledger import History


class Phase(StrEnum):
    """What an attempt is doing; its clock tells these apart."""

    START_UP = "start_up"
    FIRST_STEP = "first_step"
    DATA_WAIT = "data_wait"
    TRAINING = "training"
    EVALUATION = "evaluation"
    SAVING = "saving"


BUSY = (Phase.DATA_WAIT, Phase.TRAINING, Phase.SAVING)
"""Phases that count for the speed."""


class Clock:
    """Seconds of an attempt by phase, on this rank."""

    def __init__(self, began: float, tell: Callable[[Phase], None] = lambda phase: None) -> None:
        """began: when the attempt did, in seconds since the epoch; tell: is told of each phase."""
        self._tell = tell
        self.seconds = dict.fromkeys(Phase, 0.0)
        self.steps = 0
        """Steps taken."""
        self._phase, self._since = Phase.START_UP, began
        self._busy_before = 0.0
        """Busy seconds until the first step was taken."""

    def enter(self, phase: Phase) -> None:
        """Begin a phase, or go on in it. The training of the first step counts as `first_step`."""
        self._tell(phase)
        now = time.time()
        is_first_step = self._phase is Phase.TRAINING and self.steps == 0
        counts_as = Phase.FIRST_STEP if is_first_step else self._phase
        self.seconds[counts_as] += max(0.0, now - self._since)
        self._phase, self._since = phase, now

    def step(self) -> None:
        """Count a step."""
        self.enter(self._phase)
        self.steps += 1
        if self.steps == 1:
            self._busy_before = self._busy

    def progress(self, attempt: int, step: int, global_size: int) -> Progress:
        """What to tell the ledger now. The speed is that of all steps but the first, evaluations left out."""
        self.enter(self._phase)
        busy = self._busy - self._busy_before
        speed = None
        if self.steps > 1 and busy > 0:
            speed = round((self.steps - 1) * global_size / busy, 3)
        seconds = {phase.value: round(spent, 3) for phase, spent in self.seconds.items()}
        return Progress(attempt=attempt, step=step, samples_per_second=speed, seconds=seconds)

    @property
    def _busy(self) -> float:
        return sum(self.seconds[phase] for phase in BUSY)


@dataclass
class AttemptSummary:
    """A start of the run, as the ledger tells of it. Times in seconds since the epoch."""

    attempt: int
    job: str
    """Empty for `launch train`."""
    nodes: list[str]
    ranks: int
    begin: float
    end: float | None = None
    """None: it is at work, or nobody has told yet."""
    cause: str = ""
    """Why it ended: preempted, crash, ... (configs/run/causes.py)."""
    words: str = ""
    """The same in words."""
    first: int | None = None
    """Step that it went on from; None: it did not get that far."""
    last: int | None = None
    """The last step that it is known to have taken."""
    repeated: int = 0
    """Steps that no checkpoint held: they are lost, and taken again."""
    samples_per_second: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """What its time went into (see `goodput`)."""

    @property
    def place(self) -> str:
        """As `job 4711, 2 nodes x 2`."""
        count = len(self.nodes)
        nodes = f"{count} {'nodes' if count > 1 else 'node'} x {self.ranks // count}"
        return f"job {self.job}, {nodes}" if self.job else nodes

    def add(self, event: Event) -> None:
        """Take in an event of this attempt."""
        match event:
            case TrainingBegan():
                self.first = self.last = event.step
                self.seconds = {Phase.START_UP: event.time - self.begin}
            case Progress():
                self._reached(event.step)
                self.samples_per_second, self.seconds = event.samples_per_second, dict(event.seconds)
            case CheckpointSaved() | TrainingEnded():
                self._reached(event.step)
            case Ended():
                self.end, self.cause, self.words = event.at, event.cause.value, event.words

    def _reached(self, step: int) -> None:
        if self.first is not None:
            self.last = max(self.last or 0, step)


def summarize(history: History, now: float) -> list[AttemptSummary]:
    """The attempts of a run, oldest first. `now` counts as the end of the one at work."""
    rows: dict[int, AttemptSummary] = {}
    saved = 0
    for event in history.events:
        if isinstance(event, AttemptBegan):
            row = AttemptSummary(event.attempt, event.job, event.nodes, event.ranks, event.time)
            rows[event.attempt] = row
        elif event.attempt in rows:
            rows[event.attempt].add(event)
        if isinstance(event, CheckpointSaved):
            saved = event.step
    end = now
    starts: list[int] = []
    for row in reversed(rows.values()):
        # What a later attempt went on from is what was kept, whatever had been saved.
        kept = min(starts, default=saved if row.end else row.last or 0)
        row.repeated = max(0, (row.last or 0) - max(row.first or 0, kept))
        _divide(row, min(row.end or now, end))
        end = row.begin
        if row.first is not None:
            starts.append(row.first)
    return list(rows.values())


def _divide(row: AttemptSummary, end: float) -> None:
    """Complete the seconds of an attempt: what was lost, and what its clock has not told."""
    told = row.seconds or {Phase.START_UP: end - row.begin}
    untold = max(0.0, end - row.begin - sum(told.values()))
    steps_after_first = max(1, (row.last or 0) - (row.first or 0) - 1)
    lost_share = min(1.0, row.repeated / steps_after_first)
    row.seconds = {"lost": 0.0, "other": 0.0}
    for phase, seconds in told.items():
        lost = seconds * lost_share if phase in (Phase.DATA_WAIT, Phase.TRAINING) else 0.0
        row.seconds[phase] = seconds - lost
        row.seconds["lost"] += lost
    # After the last word of an attempt that has lost steps come more of them.
    row.seconds["lost" if row.repeated and Phase.TRAINING in told else "other"] += untold


def goodput(rows: Sequence[AttemptSummary], since: float, until: float) -> dict[str, float]:
    """Seconds from `since` to `until` by what they went into; they add up.

    queue: no attempt was alive. start_up: from an attempt's start until it can train. first_step: the first
    step's computation, in which kernels are loaded and compiled. data_wait: for samples. training: steps that
    were kept, and nothing else. evaluation: validation loss and captions. saving: what training waits for a
    checkpoint. lost: steps that were taken after the newest checkpoint when their attempt died. other: what
    no clock has told, as the time between its last word and the end.
    """
    names = (*(phase.value for phase in Phase), "lost", "other")
    total = {name: sum(row.seconds.get(name, 0.0) for row in rows) for name in names}
    return {"queue": max(0.0, until - since - sum(total.values())), **total}


def begin(history: History) -> float | None:
    """When a run was first submitted or started, in seconds since the epoch; None if it never was."""
    times = [event.time for event in history.events if isinstance(event, Submitted | AttemptBegan)]
    return min(times, default=None)
