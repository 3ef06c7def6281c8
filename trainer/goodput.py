"""Where a run's time went: the clock of the attempt at work, and what the ledger tells of all of them.
`launch status` reads it, too: no torch here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

TIMED = ("start_up", "first_step", "data_wait", "training", "evaluation", "saving")
"""What the clock of an attempt tells apart."""


class Clock:
    """Seconds of an attempt by phase, on this rank."""

    def __init__(self, began: float, tell: Callable[[str], None] = lambda phase: None) -> None:
        """began: when the attempt did, in seconds since the epoch; tell: is told of each phase."""
        self._tell = tell
        self.seconds = dict.fromkeys(TIMED, 0.0)
        self.steps = 0
        """Steps taken."""
        self._phase, self._since, self._before = "start_up", began, 0.0

    def __call__(self, phase: str) -> None:
        """A phase begins, or goes on. The training of the first step counts as `first_step`."""
        self._tell(phase)
        now = time.time()
        name = "first_step" if self._phase == "training" and not self.steps else self._phase
        self.seconds[name] += max(0.0, now - self._since)
        self._phase, self._since = phase, now

    def step(self) -> None:
        """A step is taken."""
        self(self._phase)
        self.steps += 1
        if self.steps == 1:
            self._before = self._busy

    def progress(self, step_samples: int) -> dict[str, Any]:
        """For the ledger, whenever it is asked for; the speed is that of all steps but the first, evaluations
        left out."""
        self(self._phase)
        busy = self._busy - self._before
        speed = round((self.steps - 1) * step_samples / busy, 3) if self.steps > 1 and busy > 0 else None
        return {
            "samples_per_second": speed,
            "seconds": {name: round(seconds, 3) for name, seconds in self.seconds.items()},
        }

    @property
    def _busy(self) -> float:
        return self.seconds["data_wait"] + self.seconds["training"] + self.seconds["saving"]


@dataclass
class Attempt:
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
    """Why it ended: preempted, crash, ... (slurm/chain.py)."""
    words: str = ""
    """The same in words."""
    first: int | None = None
    """Step that it went on from; None: it did not get that far."""
    last: int | None = None
    """The last step that it is known to have taken."""
    repeated: int = 0
    """How many of its steps no checkpoint held: they are lost, and taken again."""
    samples_per_second: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    """What its time went into (see `goodput`)."""

    @property
    def place(self) -> str:
        """As `job 4711, 2 nodes x 2`."""
        nodes = f"{len(self.nodes)} node{'s' * (len(self.nodes) > 1)} x {self.ranks // len(self.nodes)}"
        return f"job {self.job}, {nodes}" if self.job else nodes


def attempts(lines: Iterable[dict[str, Any]], now: float) -> list[Attempt]:
    """What lines of a ledger tell, oldest attempt first. `now` counts as the end of the one at work."""
    rows: dict[int, Attempt] = {}
    saved = 0
    for line in lines:
        event = line["event"]
        if event == "attempt":
            nodes = line.get("nodes") or [line["host"]]
            rows[line["attempt"]] = Attempt(
                line["attempt"], line.get("job", ""), nodes, line["ranks"], line["time"]
            )
        row = rows.get(line.get("attempt", max(rows, default=-1)))
        if row is None:
            continue
        if event == "start":
            row.first, row.last, row.seconds = (
                line["step"],
                line["step"],
                {"start_up": line["time"] - row.begin},
            )
        elif event in ("progress", "checkpoint", "stop") and row.first is not None:
            row.last = max(row.last or 0, line["step"])
        if event == "progress":
            row.samples_per_second, row.seconds = line["samples_per_second"], dict(line["seconds"])
        elif event == "checkpoint":
            saved = line["step"]
        elif event == "ended":
            row.end, row.cause, row.words = line.get("at", line["time"]), line["cause"], line["words"]
    end, starts = now, list[int]()
    for row in reversed(rows.values()):
        # What a later attempt went on from is what was kept, whatever had been saved.
        kept = min(starts, default=saved if row.end else row.last or 0)
        row.repeated = max(0, (row.last or 0) - max(row.first or 0, kept))
        _divide(row, min(row.end or now, end))
        end, starts = row.begin, [*starts, *([] if row.first is None else [row.first])]
    return list(rows.values())


def _divide(row: Attempt, end: float) -> None:
    """Complete the seconds of an attempt: what was lost, and what its clock has not told."""
    seconds = row.seconds or {"start_up": end - row.begin}
    rest = max(0.0, end - row.begin - sum(seconds.values()))
    after_first = max(1, (row.last or 0) - (row.first or 0) - 1)
    lost = {
        name: seconds.get(name, 0.0) * min(1.0, row.repeated / after_first)
        for name in ("data_wait", "training")
    }
    row.seconds = {name: value - lost.get(name, 0.0) for name, value in seconds.items()} | {
        "lost": sum(lost.values()),
        "other": 0.0,
    }
    row.seconds["lost" if row.repeated and "training" in seconds else "other"] += rest


def goodput(rows: Sequence[Attempt], since: float, until: float) -> dict[str, float]:
    """Seconds from `since` to `until` by what they went into; they add up.

    queue: no attempt was alive. start_up: from an attempt's start until it can train. first_step: the first
    step's computation, in which kernels are loaded and compiled. data_wait: for samples. training: steps that
    were kept, and nothing else. evaluation: validation loss and captions. saving: what training waits for a
    checkpoint. lost: steps that were taken after the newest checkpoint when their attempt died. other: what
    no clock has told, as the time between its last word and the end.
    """
    total = {name: sum(row.seconds.get(name, 0.0) for row in rows) for name in (*TIMED, "lost", "other")}
    return {"queue": max(0.0, until - since - sum(total.values())), **total}


def begin(lines: Iterable[dict[str, Any]]) -> float | None:
    """When a run was first submitted or started; None if it never was."""
    return next((line["time"] for line in lines if line["event"] in ("submitted", "attempt")), None)
