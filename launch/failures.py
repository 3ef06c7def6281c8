"""What a rank says of its own failure: a cause, as a value for the ledger, and words for people."""

from __future__ import annotations

import re
import sys
import traceback
from dataclasses import dataclass

from configs.errors import EarwitnessError
from configs.run.causes import Cause
from configs.schema import RunConfig

LOST_CONNECTION = re.compile(r"Connection (closed|reset|refused)|gloo|NCCL", re.IGNORECASE)
"""In what torch says (RuntimeError) of a collective whose other side is gone."""
NO_HOST_MEMORY = "can't allocate memory"
"""In what torch says (RuntimeError) where the host has no more memory."""


@dataclass(frozen=True)
class Diagnosis:
    """A failure of this rank. message: a paragraph, or a traceback where it is a bug."""

    cause: Cause
    exit_code: int
    message: str


def diagnose(error: Exception, config: RunConfig | None) -> Diagnosis:
    """Why this rank fails, by the type of an error; only where torch throws one type for everything, by what
    it says. config: of the run, if it could be read."""
    if isinstance(error, EarwitnessError):
        return Diagnosis(error.cause, error.exit_code, str(error))
    if _is_out_of_memory(error):
        return Diagnosis(Cause.OUT_OF_MEMORY, 1, _out_of_memory(error, config))
    cause = Cause.LOST_PEER if _is_lost_peer(error) else Cause.ERROR
    return Diagnosis(cause, 1, "".join(traceback.format_exception(error)))


def _is_out_of_memory(error: Exception) -> bool:
    """numpy's, torch's on a GPU, or torch's on a CPU."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and NO_HOST_MEMORY in str(error)


def _is_lost_peer(error: Exception) -> bool:
    distributed = sys.modules.get("torch.distributed")
    if distributed and isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and LOST_CONNECTION.search(str(error)) is not None


def _out_of_memory(error: Exception, config: RunConfig | None) -> str:
    said = next(iter(str(error).splitlines()), type(error).__name__)
    now = f"{config.batch.micro_seconds} now; " if config else ""
    return (
        f"there is too little memory: {said}\nLower batch.micro_seconds ({now}it changes nothing but rounding),"
        " set model.gradient_checkpointing=true, lower data.read_ahead_mb if it is the host's memory, or take"
        " more memory, and start again."
    )
