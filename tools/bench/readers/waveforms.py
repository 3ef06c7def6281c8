"""Earwitness up to the waveforms that a GPU is given, which computes the log-mel itself: what is left to the
CPUs of a node."""

from __future__ import annotations

from collections.abc import Iterator

from tools.bench.readers import Ready, Task, earwitness


def read(task: Task) -> Iterator[Ready]:
    """Batches with waveforms in place of features."""
    for batch in earwitness.batches(task):
        yield Ready(batch.waveforms, batch.labels, [key.rpartition("/")[2] for key in batch.keys])
