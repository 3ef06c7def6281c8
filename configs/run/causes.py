"""Why an attempt ends."""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """Why an attempt ended, or a rank failed; `words` says it to people."""

    FINISHED = "finished"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    PREEMPTED = "preempted"
    TIME_LIMIT = "time_limit"
    NODE_LOST = "node_lost"
    UNFIT_NODE = "unfit_node"
    OUT_OF_MEMORY = "out_of_memory"
    """The host's."""
    OUT_OF_GPU_MEMORY = "out_of_gpu_memory"
    HANG = "hang"
    CRASH = "crash"
    POISONED_SAMPLE = "poisoned_sample"
    ERROR = "error"
    BAD_INPUT = "bad_input"
    UNUSABLE_DATA = "unusable_data"
    """Of a rank, never of an attempt: too few samples can be used, and another attempt would find the same,
    as with other bad input."""
    SUPERSEDED = "superseded"
    LOST_PEER = "lost_peer"
    """Of a rank, never of an attempt: another rank is gone, which is the cause."""
    SAVED = "saved"
    UNKNOWN = "unknown"

    @property
    def words(self) -> str:
        """As people say it."""
        return WORDS.get(self, self.value.replace("_", " "))


WORDS = {
    Cause.STOPPED: "stopped by `launch stop`",
    Cause.BAD_INPUT: "bad config or data",
    Cause.SAVED: "asked to save",
    Cause.OUT_OF_GPU_MEMORY: "out of GPU memory",
}

FINAL = {Cause.FINISHED, Cause.STOPPED, Cause.CANCELLED, Cause.BAD_INPUT, Cause.SUPERSEDED}
"""After these nothing follows."""
FAILURES = {
    Cause.OUT_OF_MEMORY,
    Cause.OUT_OF_GPU_MEMORY,
    Cause.HANG,
    Cause.CRASH,
    Cause.ERROR,
    Cause.TIME_LIMIT,
    Cause.SAVED,
    Cause.UNKNOWN,
}
"""These may not come again and again without a new checkpoint (slurm.max_attempts_without_progress). SAVED is
among them: something that asks every attempt to save before it has taken a step would go on for ever."""
MISFORTUNES = {Cause.NODE_LOST, Cause.UNFIT_NODE, Cause.POISONED_SAMPLE}
"""These are no fault of the run; it takes more of them to end a chain."""
FAULTS_OF_NODES = {Cause.NODE_LOST, Cause.UNFIT_NODE, Cause.HANG, Cause.CRASH}
"""After these the node at fault may be left out for a while."""
