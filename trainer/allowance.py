"""How many clips may be captioned at an evaluation: as many as take at most `evaluate.share` of the time that
training takes."""

from __future__ import annotations

import math

from configs.run.events import Evaluated, Progress
from configs.run.ledger import History
from configs.schema import RunConfig

FIRST = 8
"""Clips that are captioned where nothing is known of the time that it takes, and there is no panel."""


def affordable(
    config: RunConfig, history: History, samples_per_second: float | None, *, wanted: int, panel: int
) -> int:
    """The number of clips, at most `wanted` and at least `panel`.

    history: of the run, which knows how long captions took last time; samples_per_second: of training in this
    attempt, None where that is not known: then the ledger's last one counts.
    """
    captioned = [event for event in history.of(Evaluated) if event.captioned]
    speeds = [event.samples_per_second for event in history.of(Progress) if event.samples_per_second]
    speed = samples_per_second or next(reversed(speeds), None)
    if config.evaluate.share == math.inf:
        return wanted
    if not captioned or not speed:
        return min(wanted, panel or FIRST)
    between = config.evaluate.every_steps * config.batch.global_size / speed
    seconds_per_clip = captioned[-1].captioning_seconds / captioned[-1].captioned
    return max(panel, min(wanted, int(config.evaluate.share * between / seconds_per_clip)))
