"""The ledger of a run: what happened, told by every process in a file of its own, read as one history."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from configs.errors import ConfigError
from configs.run.events import AttemptBegan, CheckpointSaved, Ended, Event, parse
from configs.run.files import JsonLines

E = TypeVar("E", bound=Event)


@dataclass
class History:
    """The events of a run, by attempt and, within one, by time: the clocks of machines differ, attempts
    follow each other."""

    events: list[Event]
    unreadable: list[str] = field(default_factory=list)
    """Places (FILE:LINE) of lines that are torn, or that another version of Earwitness wrote."""

    def of(self, kind: type[E], attempt: int | None = None) -> list[E]:
        """The events of a kind, oldest first; of one attempt, if it is named."""
        return [
            event for event in self.events if isinstance(event, kind) and attempt in (None, event.attempt)
        ]

    def last(self, kind: type[E], attempt: int | None = None) -> E | None:
        """The newest event of a kind; of one attempt, if it is named."""
        return next(reversed(self.of(kind, attempt)), None)

    @property
    def saved_step(self) -> int:
        """Step of the newest checkpoint; 0 before the first one."""
        checkpoint = self.last(CheckpointSaved)
        return checkpoint.step if checkpoint else 0

    @property
    def next_attempt(self) -> int:
        """Number of the attempt that starts next: 0, 1, ..."""
        return 1 + max((began.attempt for began in self.of(AttemptBegan)), default=-1)

    @property
    def unsettled(self) -> list[AttemptBegan]:
        """Attempts that have not ended, or of whose end nobody has told."""
        ended = {end.attempt for end in self.of(Ended)}
        return [began for began in self.of(AttemptBegan) if began.attempt not in ended]


class Ledger:
    """Appends events, and reads those of all processes."""

    def __init__(self, folder: Path) -> None:
        self._journal = JsonLines(folder)

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._journal.folder

    def record(self, event: Event) -> None:
        """Tell of an event. Raises OSError."""
        self._journal.append(event.as_json())

    def read(self) -> History:
        """All that was told. Raises ConfigError for a run of an earlier version, which kept one file."""
        former = self.folder.with_suffix(".jsonl")
        if former.exists():
            raise ConfigError(
                f"{former}: an earlier version of Earwitness began this run, and this one does not read its"
                f" ledger. Begin a new run (run.name) with its weights: model.init_from={former.parent}"
            )
        lines = self._journal.read()
        history = History([], lines.torn)
        for line, place in zip(lines.values, lines.places, strict=True):
            try:
                history.events.append(parse(line))
            except ValueError as error:
                history.unreadable.append(f"{place}: {error}")
        history.events.sort(key=lambda event: (event.attempt, event.time))
        return history


def warning(history: History) -> str:
    """What to say of lines that cannot be read; empty where there are none."""
    count = len(history.unreadable)
    if not count:
        return ""
    return (
        f"{count} line{'s' if count > 1 else ''} of the ledger cannot be read (a full disk, a power cut, or"
        f" another version), e.g. {history.unreadable[0]}"
    )
