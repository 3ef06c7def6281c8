"""How an attempt ended: what the ledger tells, and what others know of it, weighed against each other.

Ranks write the cause of their failure as a value; nothing here reads their sentences.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from configs.errors import ExitCode
from configs.run.causes import Cause
from configs.run.events import (
    AttemptBegan,
    ChainEnded,
    CouldNotBegin,
    Ended,
    Hung,
    Progress,
    RankFailed,
    Submitted,
    TrainingEnded,
)
from configs.run.folder import RunDir
from configs.run.ledger import History


@dataclass(frozen=True)
class Failure:
    """The first task or node that was seen to fail from outside; the others were ended because of it.

    node: the one at fault, empty if none is; by_signal: the task did not end by itself; rank: None if it is
    not known.
    """

    cause: Cause
    words: str
    node: str = ""
    by_signal: bool = False
    rank: int | None = None


@dataclass(frozen=True)
class Outside:
    """What others than the ranks know of an attempt's end."""

    failure: Failure | None = None
    """As srun, the launcher or the crash journal tell of it."""
    job_cause: Cause | None = None
    """As Slurm says of the job: cancelled, preempted, time limit, ...; None if it says nothing of the
    kind."""
    job_state: str = ""
    """Slurm's own word for the job's state."""
    stop_asked: bool = False
    """Whether `launch stop` was asked for."""
    exit_code: int | None = None
    """Of the ranks' step, if it has just ended."""


def find_end(run: RunDir, history: History, attempt: int, outside: Outside) -> Ended:
    """How an attempt ended, by what there is to read; nothing is written.

    The first rule that holds decides: all ranks have finished; the config or the data are wrong; the watchdog
    has spoken; a rank knows that it was superseded, or that its node is unfit; all ranks have saved; what
    Slurm did to the job; another error of a rank; what was seen from outside. Ranks that have only lost
    another one come last.
    """
    stop = history.last(TrainingEnded, attempt)
    errors = rank_errors(history, attempt)
    own_errors = [error for error in errors if error.cause is not Cause.LOST_PEER]
    error = next(iter(own_errors), None)
    hang = history.last(Hung, attempt)
    failure = outside.failure
    saved = history.saved_step
    at = round(time.time(), 3) if outside.exit_code is not None else _last_sign(history, attempt)

    def end(cause: Cause, details: str = "", node: str = "") -> Ended:
        words = f"{cause.words}: {details}" if details else cause.words
        return Ended(attempt=attempt, cause=cause, words=words, at=at, node=node, saved=saved)

    if stop and stop.outcome == Cause.FINISHED:
        return end(Cause.FINISHED, f"but then {_of_rank(error)}" if error else "")
    if error and _is_bad_input(error, history):
        return end(Cause.BAD_INPUT, error.words)
    if hang:
        return end(Cause.HANG, hang.words, hang.node)
    if error and error.cause is Cause.SUPERSEDED:
        return end(Cause.SUPERSEDED, error.words)
    if error and error.cause is Cause.UNFIT_NODE:
        return end(Cause.UNFIT_NODE, error.words, error.node)
    if stop and not error:
        if outside.stop_asked:
            return end(Cause.STOPPED)
        by_signal = Cause.TIME_LIMIT if stop.signal == "SIGUSR2" else Cause.SAVED
        where = f"saved at step {stop.step}" if stop.step else "before the first step, with nothing to save"
        return end(outside.job_cause or by_signal, where)
    if outside.job_cause:
        node = failure.node if failure and failure.cause is Cause.NODE_LOST else ""
        return end(outside.job_cause, node or _before_it_could_save(saved), node)
    if error:
        is_for_memory = error.cause in (Cause.OUT_OF_MEMORY, Cause.OUT_OF_GPU_MEMORY)
        cause = error.cause if is_for_memory else Cause.ERROR
        return end(cause, _of_rank(error), error.node)
    has_spoken = failure is not None and failure.rank in {error.rank for error in errors}
    if failure and (failure.by_signal or not has_spoken):
        return end(failure.cause, failure.words + _last_words(run, attempt, failure), failure.node)
    if errors:
        return end(Cause.ERROR, _of_rank(errors[0]), errors[0].node)
    began = history.last(AttemptBegan, attempt)
    known = "no word of it, as after a kill"
    if began and began.job:
        known = f"job {began.job}, state {outside.job_state or 'not known'}"
    code = f", exit code {outside.exit_code}" if outside.exit_code else ""
    return end(Cause.UNKNOWN, known + code)


def rank_errors(history: History, attempt: int) -> list[RankFailed]:
    """What the ranks of an attempt say of their failures: first those that know why, then those that have
    only lost another one; oldest first, by clocks that differ."""
    return sorted(
        history.of(RankFailed, attempt), key=lambda error: (error.cause is Cause.LOST_PEER, error.time)
    )


def _is_bad_input(error: RankFailed, history: History) -> bool:
    """Whether another attempt would fail alike. After a step was taken bad data may be credentials that have
    expired; the next attempt reads them anew. What was read and cannot be used stays as it is."""
    if error.cause is Cause.UNUSABLE_DATA:
        return True
    if error.cause is not Cause.BAD_INPUT:
        return False
    has_trained = history.last(Progress, error.attempt) is not None
    return error.exit_code == ExitCode.USAGE or not has_trained


def _before_it_could_save(saved: int) -> str:
    newest = f"the newest checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
    return f"before it could save; {newest}"


def _of_rank(error: RankFailed) -> str:
    return f"rank {error.rank}: {error.words}"


def _last_words(run: RunDir, attempt: int, failure: Failure) -> str:
    """What the rank that failed wrote last, before it could tell of an error in another way."""
    if failure.by_signal or failure.rank is None:
        return ""
    log = run.rank_file(attempt, failure.rank, "log")
    if not log.is_file():
        return ""
    lines = log.read_text(errors="replace", encoding="utf-8").splitlines()
    last = next((line for line in reversed(lines) if line.strip()), "")
    return f"; its log ends with: {last}" if last else ""


def _last_sign(history: History, attempt: int) -> float:
    """When an attempt was last heard of, in seconds since the epoch."""
    of_others = Ended | Submitted | ChainEnded | CouldNotBegin
    return max(
        event.time
        for event in history.events
        if event.attempt == attempt and not isinstance(event, of_others)
    )
