"""What a rank says of its own failure: a cause, as a value for the ledger, and words for people."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass

from configs.disk import words_of_disk
from configs.errors import EarwitnessError
from configs.run.causes import Cause
from configs.run.events import MicroSeconds
from configs.run.memory import OTHERWISE
from configs.schema import RunConfig

LOST_CONNECTION = re.compile(r"Connection (closed|reset|refused)|gloo|NCCL", re.IGNORECASE)
"""In what torch says (RuntimeError) of a collective whose other side is gone."""
NO_HOST_MEMORY = "can't allocate memory"
"""In what torch says (RuntimeError) where the host has no more memory."""
NO_GPU_MEMORY = re.compile(
    r"CUDA (error|failure).*out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""In what torch says (RuntimeError) where a GPU has none left for CUDA's own libraries."""


@dataclass(frozen=True)
class Diagnosis:
    """A failure of this rank. message: a paragraph, or a traceback where it is a bug."""

    cause: Cause
    exit_code: int
    message: str


def diagnose(error: Exception, config: RunConfig | None, taken: MicroSeconds | None = None) -> Diagnosis:
    """Why this rank fails, by the type of an error; only where torch throws one type for everything, by what
    it says. config: of the run, if it could be read; taken: how much audio forward passes take, by `auto`."""
    if isinstance(error, EarwitnessError):
        return Diagnosis(error.cause, error.exit_code, str(error))
    if _is_out_of_gpu_memory(error):
        return Diagnosis(Cause.OUT_OF_GPU_MEMORY, 1, _out_of_gpu_memory(error, config, taken))
    if _is_out_of_memory(error):
        return Diagnosis(Cause.OUT_OF_MEMORY, 1, _out_of_memory(error, config, taken))
    if words := words_of_disk(error):
        return Diagnosis(Cause.ERROR, 1, f"{words}. When that is mended, the same command goes on")
    cause = Cause.LOST_PEER if _is_lost_peer(error) else Cause.ERROR
    return Diagnosis(cause, 1, "".join(traceback.format_exception(error)))


def _is_out_of_gpu_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")
    if torch and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_GPU_MEMORY.search(str(error)) is not None


def _is_out_of_memory(error: Exception) -> bool:
    """numpy's, or torch's on a CPU."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_HOST_MEMORY in str(error)


def _is_lost_peer(error: Exception) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed and isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and LOST_CONNECTION.search(str(error)) is not None


def _out_of_gpu_memory(error: Exception, config: RunConfig | None, taken: MicroSeconds | None) -> str:
    return f"there is too little GPU memory: {_first_line(error)}\n{_less_audio(config, taken)}."


def _out_of_memory(error: Exception, config: RunConfig | None, taken: MicroSeconds | None) -> str:
    """The data lie in the host's memory, and on a CPU so does what a forward pass computes."""
    data = "Lower data.read_ahead_mb, or take more memory, and start again."
    if taken is None or taken.device == "cpu":
        data = f"{_less_audio(config, taken)}. If the data took it, lower data.read_ahead_mb."
    return f"there is too little memory: {_first_line(error)}\n{data}"


def _less_audio(config: RunConfig | None, taken: MicroSeconds | None) -> str:
    """What to do so that a forward pass takes less memory."""
    if taken and taken.seconds > taken.least:
        return (
            f"A forward pass took up to {taken.seconds:g} s of audio (batch.micro_seconds: auto); the next"
            " start takes half"
        )
    if config is None or config.batch.micro_seconds == "auto":
        return f"No less audio than a window can be taken at a time: {OTHERWISE}, and start again"
    return (
        f"Lower batch.micro_seconds ({config.batch.micro_seconds:g} now; it changes nothing but rounding) or"
        f" write auto; or {OTHERWISE}, and start again"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
