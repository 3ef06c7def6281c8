"""What a run is shown in: TensorBoard, and other trackers if they are asked for. One that fails ends no
training."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from configs.run.events import Evaluated
from configs.run.folder import RunDir
from configs.run.ledger import History
from configs.schema import RunConfig


class Tracker(Protocol):
    """Shows what happens in a run. Nothing of it waits for a network or raises."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Draw a point on each curve."""

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text, in Markdown."""

    def audio(self, tag: str, waveform: torch.Tensor, rate: int, step: int) -> None:
        """Let a clip be heard. waveform: (1, n) float32."""

    def image(self, tag: str, picture: torch.Tensor, step: int) -> None:
        """Show a picture. picture: (3, height, width) uint8."""

    def flush(self) -> None:
        """Let others see what was shown."""

    def close(self, patience: float = 0.0) -> None:
        """Nothing more is shown. patience: seconds that it may take to bring what is under way."""


class Trackers:
    """Several as one."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Draw a point on each curve."""
        for tracker in self._trackers:
            tracker.scalars(values, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """Show a text, in Markdown."""
        for tracker in self._trackers:
            tracker.text(tag, text, step)

    def audio(self, tag: str, waveform: torch.Tensor, rate: int, step: int) -> None:
        """Let a clip be heard. waveform: (1, n) float32."""
        for tracker in self._trackers:
            tracker.audio(tag, waveform, rate, step)

    def image(self, tag: str, picture: torch.Tensor, step: int) -> None:
        """Show a picture. picture: (3, height, width) uint8."""
        for tracker in self._trackers:
            tracker.image(tag, picture, step)

    def flush(self) -> None:
        """Let others see what was shown."""
        for tracker in self._trackers:
            tracker.flush()

    def close(self, patience: float = 0.0) -> None:
        """Nothing more is shown. patience: seconds that it may take, for all of them together."""
        until = time.monotonic() + patience
        for tracker in self._trackers:
            tracker.close(max(0.0, until - time.monotonic()))


def open_trackers(config: RunConfig, run: RunDir, history: History, first_step: int) -> Trackers:
    """Those that a run asks for. history: of the attempts before; first_step: steps taken before."""
    return Trackers([_open(name, config, run, history, first_step) for name in config.monitor.trackers])


def _open(name: str, config: RunConfig, run: RunDir, history: History, first_step: int) -> Tracker:
    if name == "tensorboard":
        from trainer.curves import Curves  # TensorBoard, which the other ranks do without

        # What the attempts before have drawn and this one draws anew is taken back; step 0 is evaluated
        # again, as it is never saved.
        purge_step = first_step + 1 if first_step else 0
        evaluated = history.last(Evaluated)
        return Curves(run.tensorboard, purge_step, evaluated.metrics if evaluated else ())
    from trainer.courier import Courier
    from trainer.services import SERVICES

    return Courier(name, SERVICES[name](config, run), run, first_step)
