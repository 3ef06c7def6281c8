"""A chain of attempts: whether and where the next one may go on after those that have ended.

How an end comes about, and where it is told:

    a signal   -> StopFlag (slurm/signals.py) -> the sums of a step (trainer/loop.py) -> all save
               -> TrainingEnded (launch/worker.py)
    an error   -> the same sums, or an exception on one rank -> RankFailed with its cause (launch/worker.py)
    a death    -> what srun says or the launcher sees (slurm/said.py, launch/local.py) -> Failure
    all three  -> Ended (configs/run/ends.py) -> Verdict (here) -> job.sh
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from configs.run.causes import FAILURES, FAULTS_OF_NODES, FINAL, MISFORTUNES, Cause
from configs.run.ends import Failure, Outside, find_end
from configs.run.events import AttemptBegan, CouldNotBegin, Ended, Submitted
from configs.run.folder import RunDir
from configs.run.lease import holder
from configs.run.ledger import History
from configs.schema import Slurm, node_range
from slurm.said import JOB_STATES, first_failure, job_state

FAULTS_LIMIT = 2
"""Faults after which a node is left out; one that makes it unfit before the start is enough."""
BACK_OFF = 60.0
"""Seconds that are waited after the second failure in a row without progress."""
BACK_OFF_GROWTH = 5
"""How many times longer after each further one."""
LONGEST_BACK_OFF = 600.0
"""Seconds that are waited at most."""
MISFORTUNES_WITHOUT_PROGRESS = 10
"""Lost nodes, unfit nodes and poisoned samples in a row without a new checkpoint that end a chain."""


@dataclass(frozen=True)
class Verdict:
    """Whether the chain goes on; why not; nodes to leave out; seconds to wait first."""

    go: bool
    why: str = ""
    exclude: tuple[str, ...] = ()
    delay: float = 0.0


def settle(run: RunDir, chain: str = "-") -> None:
    """Write into the ledger how attempts ended that nobody has told of.

    An attempt of this chain has ended, as the next one starts only then. One of another chain, or of `launch
    train`, may still be at work, by its signs of life.
    """
    now = holder(run)
    for began in run.ledger.read().unsettled:
        is_alive = now is not None and now.alive and now.attempt == began.attempt
        if began.chain == chain or not is_alive:
            record_end(run, began.attempt)


def record_end(
    run: RunDir, attempt: int, exit_code: int | None = None, failure: Failure | None = None
) -> Ended:
    """Find out how an attempt ended, and write it into the ledger, if nobody has yet.

    exit_code: of the ranks' step, if it has just ended; failure: what was seen from outside, if it is known.
    """
    history = run.ledger.read()
    if told := history.last(Ended, attempt):
        return told
    end = seen_end(run, history, attempt, exit_code, failure)
    run.ledger.record(end)
    return end


def seen_end(
    run: RunDir,
    history: History,
    attempt: int,
    exit_code: int | None = None,
    failure: Failure | None = None,
) -> Ended:
    """How an attempt ended, by what it has left and by what Slurm knows of it, if it was a job; nothing is
    written."""
    began = history.last(AttemptBegan, attempt)
    job = began.job if began else ""
    state = job_state(run, job)
    outside = Outside(
        failure=failure or first_failure(run, job, attempt),
        job_cause=JOB_STATES.get(state),
        job_state=state,
        stop_asked=bool(job) and stop_requested(run),
        exit_code=exit_code,
    )
    return find_end(run, history, attempt, outside)


def decide(
    settings: Slurm,
    ends: Sequence[Ended],
    partition_nodes: int,
    now: float | None = None,
    *,
    could_not_begin: Sequence[CouldNotBegin] = (),
) -> Verdict:
    """Whether a chain goes on after its attempts ended like this, oldest first.

    partition_nodes: how many nodes there are; never so many are left out that too few remain. now: in seconds
    since the epoch.
    """
    exclude = _exclude(settings, ends, could_not_begin, partition_nodes, now or time.time())
    if not ends:
        return Verdict(True, exclude=exclude)
    last = ends[-1]
    if last.cause in FINAL:
        return Verdict(False, last.words)
    without_progress = _without_progress(ends)
    failures = sum(end.cause in FAILURES for end in without_progress)
    misfortunes = sum(end.cause in MISFORTUNES for end in without_progress)
    count = failures + misfortunes
    limit = ""
    if failures >= settings.max_attempts_without_progress:
        limit = "slurm.max_attempts_without_progress"
    elif misfortunes >= MISFORTUNES_WITHOUT_PROGRESS:
        limit = f"at most {MISFORTUNES_WITHOUT_PROGRESS}, though they are no fault of the run"
    if limit:
        return Verdict(
            False,
            f"{count} attempts failed in a row without a checkpoint after step {last.saved}; the last one:"
            f" {last.words} ({limit})",
        )
    delay = 0.0
    if count >= 2:
        delay = min(LONGEST_BACK_OFF, BACK_OFF * BACK_OFF_GROWTH ** (count - 2))
    return Verdict(True, exclude=exclude, delay=delay)


def _without_progress(ends: Sequence[Ended]) -> list[Ended]:
    """The last attempts that made no new checkpoint, newest first."""
    saved_before = [0, *(end.saved for end in ends[:-1])]
    fruitless = []
    for end, before in zip(reversed(ends), reversed(saved_before), strict=True):
        if end.saved > before:
            break
        fruitless.append(end)
    return fruitless


def _exclude(
    settings: Slurm,
    ends: Sequence[Ended],
    could_not_begin: Sequence[CouldNotBegin],
    partition_nodes: int,
    now: float,
) -> tuple[str, ...]:
    """The nodes to leave out: the last ones at fault first, as long as enough others remain."""
    oldest = now - 60 * settings.exclude_minutes
    guilt = [(end.time, end.node, end.cause) for end in ends if end.cause in FAULTS_OF_NODES]
    guilt += [(event.time, event.node, Cause.UNFIT_NODE) for event in could_not_begin]
    faults = Counter[str]()
    last_faults: list[str] = []
    for time_of_fault, node, cause in sorted(guilt, key=lambda fault: fault[0]):
        if node and time_of_fault > oldest:
            faults[node] += FAULTS_LIMIT if cause is Cause.UNFIT_NODE else 1
            last_faults.append(node)
    newest_first = dict.fromkeys(node for node in reversed(last_faults) if faults[node] >= FAULTS_LIMIT)
    spare = max(0, partition_nodes - node_range(settings.nodes)[0])
    return tuple(sorted(list(newest_first)[:spare]))


def chain_jobs(run: RunDir) -> set[str]:
    """All jobs that were ever submitted for a run."""
    queued_next = {path.read_text(encoding="utf-8").strip() for path in (run.slurm / "jobs").glob("*.next")}
    history = run.ledger.read()
    submitted = {event.job for event in history.of(Submitted)}
    begun = {event.job for event in history.of(AttemptBegan)}
    return {job for job in queued_next | submitted | begun if job}


def stop_requested(run: RunDir) -> bool:
    """Whether `launch stop` has been asked for."""
    return (run.slurm / "stop").exists()
