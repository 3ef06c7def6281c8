"""How much audio attempts took at a time, by `batch.micro_seconds: auto`, and which ran out of memory."""

from __future__ import annotations

from configs.run.causes import Cause
from configs.run.events import MicroSeconds, RankFailed
from configs.run.ledger import History

OTHERWISE = "set model.gradient_checkpointing=true, or take more ranks or more memory for each"
"""What there is to do where one window at a time takes too much memory."""


def ran_out(history: History, taken: MicroSeconds) -> RankFailed | None:
    """The error of a rank without memory for its micro-batches, in the attempt that took so much."""
    cause = Cause.OUT_OF_MEMORY if taken.device == "cpu" else Cause.OUT_OF_GPU_MEMORY
    errors = history.of(RankFailed, taken.attempt)
    return next((error for error in errors if error.cause is cause), None)


def will_halve(history: History, attempt: int) -> bool:
    """Whether an attempt ran out of memory, and the next one takes half as much."""
    taken = history.last(MicroSeconds, attempt)
    return taken is not None and taken.seconds > taken.least and ran_out(history, taken) is not None


def next_seconds(history: History, device: str, setup: str) -> tuple[float, str] | None:
    """Seconds of audio that the next attempt takes, and why: as many as the last one on such devices, half of
    them if it ran out of memory. None if there was none."""
    alike = [took for took in history.of(MicroSeconds) if (took.device, took.setup) == (device, setup)]
    if not alike:
        return None
    last = alike[-1]
    error = ran_out(history, last)
    if error is None:
        return last.seconds, f"as in attempt {last.attempt}"
    failed = f"rank {error.rank} ran out of memory with {last.seconds:g} s in attempt {last.attempt}"
    if last.seconds > last.least:
        return max(last.least, last.seconds / 2), f"half, as {failed}"
    return last.seconds, f"{failed}, and no less than a window can be taken; {OTHERWISE}"
