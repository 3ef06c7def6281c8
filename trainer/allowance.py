"""How many clips may be captioned at an evaluation: as many as take at most `evaluate.share` of the time that
training takes."""

from __future__ import annotations

import math

from configs.metrics import is_of_captions
from configs.run.events import Evaluated, Progress
from configs.run.ledger import History
from configs.schema import RunConfig
from trainer.listening import GROUP


class Allowance:
    """What is known of the time that captions and training take, on rank 0."""

    def __init__(self, config: RunConfig, history: History, ranks: int) -> None:
        """history: of the attempts before."""
        self._config, self._ranks = config, ranks
        captioned = [event for event in history.of(Evaluated) if event.captioned]
        self._seconds_per_clip = 0.0
        """0 where it is not known."""
        if captioned:
            self.note(captioned[-1].captioned, captioned[-1].captioning_seconds)
        speeds = [event.samples_per_second for event in history.of(Progress) if event.samples_per_second]
        self._speed = speeds[-1] if speeds else None

    def note(self, clips: int, seconds: float) -> None:
        """Take in how long captions took."""
        if clips:
            self._seconds_per_clip = seconds / clips

    def clips(self, samples_per_second: float | None, *, all_clips: int, panel: int) -> int:
        """How many clips to caption: the panel, and at least a group for each rank besides; the panel alone,
        or a group without one, where nothing is known yet. All of them where figures of captions mark the
        best checkpoint: those of fewer clips could not be compared.

        samples_per_second: of training in this attempt, None where it is not known.
        """
        evaluate = self._config.evaluate
        if evaluate.share == math.inf or is_of_captions(evaluate.best_metric):
            return all_clips
        speed = samples_per_second or self._speed
        if not self._seconds_per_clip or not speed:
            return min(all_clips, panel or GROUP)
        between = evaluate.every_steps * self._config.batch.global_size / speed
        fitting = int(evaluate.share * between / self._seconds_per_clip)
        return min(all_clips, max(panel + GROUP * self._ranks, fitting))
