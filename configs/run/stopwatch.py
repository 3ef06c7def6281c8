"""Where the seconds of a start go: from the beginning of a process to its first step, by part."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path


class Stopwatch:
    """Seconds since this process began, by what they were for; the parts follow one another."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """By part, in the order in which they ended."""
        self._since = _began()

    def lap(self, part: str, less: Mapping[str, float] | None = None) -> None:
        """What was done since the last part ended belongs to this one; less: seconds of other parts in it."""
        now = _now()
        others = dict(less or {})
        self.seconds |= others
        self.seconds[part] = now - self._since - sum(others.values())
        self._since = now


def _now() -> float:
    """Seconds since the machine was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _began() -> float:
    """When this process began, on the same clock, to the hundredth of a second."""
    _, _, fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")
    ticks = int(fields.split()[19])  # starttime, the 22nd of all
    return ticks / os.sysconf("SC_CLK_TCK")
