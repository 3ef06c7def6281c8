"""Brings what a run shows to a service, beside the training: its library may be slow, or fail."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from configs.disk import words_of_disk
from configs.run.files import JsonLines
from configs.run.folder import RunDir

T = TypeVar("T")
WAITING = 1000
"""Rows that may wait for a service; more are sent at the next start."""
CLOSE_SECONDS = 15.0
"""That a service gets to take the last rows, when nothing else is left to do."""


@dataclass
class Row:
    """What is shown of a step at a time, by name."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    audio: dict[str, tuple[torch.Tensor, int]] = field(default_factory=dict)
    """Waveforms, and their rates."""
    images: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """Of all that it shows."""
        return {*self.scalars, *self.texts, *self.audio, *self.images}


class Service(Protocol):
    """A tracker's library. Its methods may take long, and raise."""

    def begin(self, past: list[Row]) -> int:
        """Take up the run. past: what it was told by earlier attempts. Returns how many of these rows it has;
        the others are sent again."""

    def send(self, number: int, row: Row) -> None:
        """Tell it a row. number: of the rows before, over all attempts."""

    def finish(self) -> None:
        """Send what is left."""


class Courier:
    """A tracker behind a thread. Every row is first kept in the run's folder: an attempt that goes on knows
    by it which step was told, and tells none twice; and what a service did not get, it gets then."""

    def __init__(self, name: str, service: Service, run: RunDir, first_step: int) -> None:
        self._name, self._service, self._first_step = name, service, first_step
        self._journal = JsonLines(run.trackers / name)
        self._row = Row(first_step)
        self._rows: queue.Queue[tuple[int, Row] | None] = queue.Queue(WAITING)
        self._told: set[str] = set()
        self._gave_up = False
        """Whether rows are only kept, as a service that lacks one must not get the next."""
        past = self._read()
        self._number = len(past)
        self._said = {name: row.step for row in past for name in row.names}
        """Last step of each name that was told by an attempt before."""
        self._thread = threading.Thread(target=self._serve, args=[past], name=name, daemon=True)
        self._thread.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Draw a point on each curve."""
        self._of(step).scalars.update({name: float(value) for name, value in values.items()})

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text, in Markdown."""
        self._of(step).texts[tag] = text

    def audio(self, tag: str, waveform: torch.Tensor, rate: int, step: int) -> None:
        """Let a clip be heard. waveform: (1, n) float32."""
        self._of(step).audio[tag] = waveform, rate

    def image(self, tag: str, picture: torch.Tensor, step: int) -> None:
        """Show a picture. picture: (3, height, width) uint8."""
        self._of(step).images[tag] = picture

    def flush(self) -> None:
        """Keep what was collected, and hand it over."""
        row, self._row = self._new(self._row), Row(self._row.step)
        if not row.names:
            return
        line = {"row": self._number, "step": row.step, "scalars": row.scalars, "texts": row.texts}
        try:
            self._journal.append(line)
        except OSError as error:
            return self._tell(f"is not told for now, training goes on: {words_of_disk(error) or error}")
        try:
            if not self._gave_up:
                self._rows.put_nowait((self._number, row))
        except queue.Full:
            self._give_up("does not keep up")
        self._number += 1

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """Wait a little for what is under way. patience: seconds."""
        self.flush()
        until = time.monotonic() + (0.0 if self._gave_up else patience)
        with contextlib.suppress(queue.Full):
            self._rows.put(None, timeout=max(0.0, until - time.monotonic()))
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._give_up(f"did not take all in {patience:.0f} s")

    def _of(self, step: int) -> Row:
        """The row that is being collected."""
        if step != self._row.step:
            self.flush()
            self._row.step = step
        return self._row

    def _new(self, row: Row) -> Row:
        """A row without what an attempt before has told of the same steps. The mark of a restart is no
        point of a curve: it stays."""

        def new(values: dict[str, T]) -> dict[str, T]:
            return {name: value for name, value in values.items() if row.step > self._said.get(name, -1)}

        texts = row.texts if row.step == self._first_step else new(row.texts)
        return Row(row.step, new(row.scalars), texts, row.audio, row.images)  # these come once per attempt

    def _read(self) -> list[Row]:
        """What earlier attempts have told, in order."""
        try:
            lines = self._journal.read().values
        except OSError as error:
            self._tell(f"may be told steps again: {words_of_disk(error) or error}")
            return []
        by_number = {line["row"]: Row(line["step"], line["scalars"], line["texts"]) for line in lines}
        missing = Row(self._first_step)  # of a line that a machine lost with its power
        return [by_number.get(number, missing) for number in range(1 + max(by_number, default=-1))]

    def _serve(self, past: list[Row]) -> None:
        """Hand rows to the service, in a thread of its own, until there are no more."""
        try:
            for number in range(self._service.begin(past), len(past)):
                self._service.send(number, past[number])
            past.clear()
            while (numbered := self._rows.get()) is not None:
                self._service.send(*numbered)
            self._service.finish()
        except Exception as error:
            said = " ".join(str(error).split())
            self._give_up(f"failed ({type(error).__name__}: {said})")

    def _give_up(self, why: str) -> None:
        self._gave_up = True
        self._tell(f"{why}: training goes on without it; what it did not get, it gets at the next start")

    def _tell(self, words: str) -> None:
        """Say something once."""
        if words not in self._told:
            print(f"{self._name} {words}", flush=True)
        self._told.add(words)
