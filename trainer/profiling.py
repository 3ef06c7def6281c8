"""A trace of some steps of a run at work, for `launch profile`."""

from __future__ import annotations

import time

import torch

from configs.run.files import write_atomic
from configs.run.profiles import Profiles

STEPS = 3
"""Steps of a trace."""
LOOK_EVERY = 5.0
"""Seconds between two looks whether a trace is asked for: on a network file system each is a request."""
ROWS, NAME_WIDTH = 15, 60
"""Of the table of what took longest."""


class StepProfiler:
    """Is told of every step, and traces the next ones where this rank is asked to."""

    def __init__(self, profiles: Profiles, rank: int, device: torch.device) -> None:
        self._profiles, self._rank, self._device = profiles, rank, device
        self._looked_at = 0.0
        self._tracing: torch.profiler.profile | None = None
        self._left = 0
        """Steps until the trace is complete."""

    def step(self, number: int) -> None:
        """Another step was taken. number: of all that were."""
        if self._tracing:
            self._left -= 1
            if self._left == 0:
                self._finish(self._tracing, number)
        elif time.monotonic() - self._looked_at >= LOOK_EVERY:
            self._looked_at = time.monotonic()
            if self._profiles.is_asked_for(self._rank):
                self._begin()

    def close(self) -> None:
        """Give up what is under way; the next attempt will find that it is asked for."""
        if self._tracing:
            self._tracing.stop()

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._tracing, self._left = torch.profiler.profile(activities=activities), STEPS
        self._wait_for_device()
        self._tracing.start()

    def _finish(self, tracing: torch.profiler.profile, number: int) -> None:
        self._wait_for_device()
        tracing.stop()
        self._tracing = None
        trace = self._profiles.trace(self._rank, number)
        unfinished = trace.with_name(f".{trace.name}")  # torch compresses what is called .gz
        tracing.export_chrome_trace(str(unfinished))
        unfinished.replace(trace)
        on_device = "cuda" if self._device.type == "cuda" else "cpu"
        table = tracing.key_averages().table(
            sort_by=f"self_{on_device}_time_total", row_limit=ROWS, max_name_column_width=NAME_WIDTH
        )
        write_atomic(self._profiles.table(trace), f"{table}\n")
        self._profiles.withdraw(self._rank)

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
