"""What a step is fed with: its samples as micro-batches, prepared a step ahead beside the training."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from configs.errors import DataError
from data.batch import Sample, Size
from data.captions import Tokens
from data.loader import Step
from trainer.feed import Feed

SIZE = Size(seconds=2.5, window_seconds=30, tokens=448)
CPU = torch.device("cpu")
EVEN = torch.ones(1)
"""Loss weights of the one source."""


class Steps:
    """Takes the place of a loader: three clips of a second per step."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.asked = threading.Semaphore(0)
        self.threads: set[int] = set()
        self.closed = False
        self._steps = self._make(count, error)

    def _make(self, count: int, error: Exception | None) -> Iterator[Step]:
        for number in range(count):
            clips = [
                Sample(np.full(16_000, number, np.int16), Tokens([1, 2], [2, -100]), "", 0, f"{clip}", 100)
                for clip in range(3)
            ]
            yield Step(number, clips, [], 7.0)
        if error:
            raise error

    def __next__(self) -> Step:
        self.threads.add(threading.get_ident())
        self.asked.release()
        return next(self._steps)

    def close(self) -> None:
        self.closed = True


def test_a_step_comes_as_micro_batches_with_its_tokens() -> None:
    feed = Feed(Steps(2), SIZE, CPU, EVEN)
    for number in range(2):
        fed = next(feed)
        assert fed.step.number == number and fed.tokens == 3
        assert [batch.keys for batch in fed.batches] == [("0", "1"), ("2",)]
        assert all((batch.waveforms == number).all() for batch in fed.batches)
    with pytest.raises(StopIteration):
        next(feed)


def test_the_next_step_is_prepared_while_this_one_is_taken() -> None:
    steps = Steps(3)
    feed = Feed(steps, SIZE, CPU, EVEN)
    next(feed)
    assert steps.asked.acquire(timeout=30) and steps.asked.acquire(timeout=30), "nobody has asked for it yet"
    assert threading.get_ident() not in steps.threads


def test_what_the_training_waits_for_is_all_that_counts_as_waiting() -> None:
    """Planning, reading, collating and copying alike: the loader alone has waited 7 s."""
    feed = Feed(Steps(2), SIZE, CPU, EVEN)
    next(feed)
    assert feed.ready(None)
    assert next(feed).step.waited < 5


def test_an_error_comes_in_place_of_the_step_that_it_spoils() -> None:
    steps = Steps(1, DataError("gone"))
    feed = Feed(steps, SIZE, CPU, EVEN)
    assert next(feed).step.number == 0
    assert feed.ready(30)
    with pytest.raises(DataError, match="gone"):
        next(feed)
    feed.close()
    assert steps.closed
