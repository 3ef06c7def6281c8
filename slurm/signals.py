"""Signals set a flag and do nothing else; the loop polls it, and all ranks agree before they act."""

from __future__ import annotations

import signal
from types import FrameType


def stop_signals() -> list[signal.Signals]:
    """The signals that ask to save and to leave: a terminal that goes away does, too, unless `nohup` was
    told that it will."""
    signals = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    return signals


class StopFlag:
    """Set by TERM, USR1, USR2, INT or HUP: save and leave."""

    def __init__(self) -> None:
        self.signum: int | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    @property
    def name(self) -> str:
        """Of the first signal that came, as SIGTERM; empty if there was none."""
        return "" if self.signum is None else signal.Signals(self.signum).name

    def install(self) -> StopFlag:
        """Take over the signals of this process."""
        for signum in stop_signals():
            signal.signal(signum, self._on_signal)
        return self

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum
