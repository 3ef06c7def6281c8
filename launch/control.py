"""`launch stop` and `launch drill`: a running chain is asked to save, to end or to go on."""

from __future__ import annotations

import contextlib
import time
from typing import TypeVar

from configs.errors import ConfigError, EarwitnessError
from configs.run.events import AttemptBegan, Ended, Event, Progress, TrainingBegan, TrainingEnded
from configs.run.folder import RunDir
from slurm import cluster
from slurm.chain import chain_jobs

E = TypeVar("E", bound=Event)
POLL = 0.5
"""Seconds between two looks."""
ASK_AGAIN = 10.0
"""Seconds after which a job is asked once more."""
DRILL_MINUTES = 30
"""After which a drill is given up."""


def stop(run: RunDir) -> None:
    """End a run's chain: the attempt at work saves first. Returns when nothing is left of it. Raises
    ConfigError if there is no chain."""
    jobs = _jobs(run)
    waiting = [job.job for job in jobs if job.state == "PENDING"]
    running = [job.job for job in jobs if job.state == "RUNNING"]
    (run.slurm / "stop").touch()  # whoever starts now leaves again
    cluster.cancel(*waiting)
    asked = 0.0
    while cluster.queued(running):
        if time.monotonic() - asked > ASK_AGAIN:  # the ranks may not have been there yet
            with contextlib.suppress(EarwitnessError):  # or are not any more
                for job in running:
                    cluster.send_signal(job, "USR2")
            print(f"job {', '.join(running)}: asked to save and to end", flush=True)
            asked = time.monotonic()
        time.sleep(POLL)
    history = run.ledger.read()
    ended = history.last(Ended)
    words = f" ({ended.words})" if ended else ""
    step = history.saved_step
    saved = f"the newest checkpoint is of step {step}" if step else "there is no checkpoint yet"
    print(
        f"{run.path}: the chain has ended{words}; {saved}. `python -m launch submit` with its config goes on"
    )


def drill(run: RunDir) -> None:
    """Do to the running attempt what the cluster does when it preempts, and report how long everything took.

    Raises ConfigError if no attempt is training, EarwitnessError if the chain does not go on.
    """
    running = [job.job for job in _jobs(run) if job.state == "RUNNING"]
    history = run.ledger.read()
    attempts = [began for began in history.of(AttemptBegan) if began.job in running]
    if not attempts or history.last(TrainingBegan, attempts[-1].attempt) is None:
        raise ConfigError(
            f"{run.path}: no attempt is training now; `python -m launch status {run.path}` says what it"
            " waits for"
        )
    attempt, job = attempts[-1].attempt, attempts[-1].job
    began = time.time()
    for signal in ("CONT", "TERM"):  # what Slurm sends
        cluster.send_signal(job, signal)
    print(f"job {job}: sent SIGCONT and SIGTERM, as a preemption does", flush=True)
    until = began + 60 * DRILL_MINUTES

    def report(kind: type[Event], what: str, from_attempt: int) -> None:
        event = wait_for(run, kind, what, until, from_attempt)
        print(f"  {event.time - began:7.1f} s  {what}", flush=True)

    report(TrainingEnded, "durable save", attempt)
    report(AttemptBegan, "next attempt starts", attempt + 1)
    report(TrainingBegan, "it has loaded the checkpoint", attempt + 1)
    report(Progress, "its first step is taken", attempt + 1)


def wait_for(run: RunDir, kind: type[E], what: str, until: float, from_attempt: int = 0) -> E:
    """Wait for the first event of a kind of an attempt or a later one, until a time (s since the epoch).

    what: the same in words. Raises EarwitnessError if it does not come, or the chain ends first.
    """
    while True:
        jobs = cluster.queued(chain_jobs(run))  # before the ledger, so that the last words of a job are seen
        events = [event for event in run.ledger.read().of(kind) if event.attempt >= from_attempt]
        if events:
            return events[0]
        if not jobs or time.time() > until:
            queue = "; ".join(f"job {job.job} is {job.state.lower()} ({job.reason})" for job in jobs)
            raise EarwitnessError(
                f"{run.path}: waited for this in vain: {what};"
                f" {queue or 'no job of this run is in the queue any more'}."
                f" `python -m launch status {run.path}` says more"
            )
        time.sleep(POLL)


def _jobs(run: RunDir) -> list[cluster.QueuedJob]:
    jobs = cluster.queued(chain_jobs(run))
    if not jobs:
        raise ConfigError(
            f"{run.path}: no job of this run is in the queue; `python -m launch status {run.path}` says how"
            " it ended"
        )
    return jobs
